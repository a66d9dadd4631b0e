"""Load the networks whose features :mod:`qandc.evaluation.compare` compares, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qandc.errors import ConfigError
from qandc.evaluation.images import Images
from qandc.evaluation.inception import PUBLISHED, load_inception
from qandc.evaluation.metrics import EfficientNetFeatures, load_fashion_classifier
from qandc.evaluation.pixels import to_float
from qandc.support.arguments import checked

__all__ = ["EXTRACTORS", "Activations", "Extractor", "load_extractor"]

EXTRACTORS = ("fashion-classifier", "efficientnet-lite0", "inception")
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Activations:
    """Hold ``features [B, D]``, ``logits [B, K]``, ``spatial [B, S]`` of a batch, float32, where the extractor is."""

    features: torch.Tensor
    logits: torch.Tensor
    spatial: torch.Tensor


@dataclass(frozen=True)
class Extractor:
    """Hold a network in eval mode, and where its features are.

    Attributes:
        name: in results and statistics files; numbers of different names must not be compared.
        description: the network, in words.
        spatial: the layer whose output is the spatial features, in words: a convolution after its norm and ReLU
            (EfficientNet-Lite0: a block, which ends in a norm).
        model: pixels ``(x - centre) / centre`` ``[B, C, H, W]`` to ``(features, logits)``.
        layer: of the model, norm and ReLU included; the first 7 channels of its output are the spatial features, after
            Nash et al. 2021 (arXiv 2103.03841), whose sFID takes them from Inception.
        centre: see ``model``.
        split: images of a part of the inception score, or None.
        batch_size: images at a time.
        shape: height, width, channels that it takes, or None for any.
    """

    name: str
    description: str
    spatial: str
    model: nn.Module
    layer: nn.Module
    centre: float = 127.5
    split: int | None = None
    batch_size: int = 50
    shape: tuple[int, int, int] | None = None

    @property
    def num_features(self) -> int:
        """Return D, the length of a feature vector."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Return the device that the network computes on."""
        return next(self.model.parameters()).device

    @checked
    @torch.no_grad()
    def __call__(self, images: Images) -> Iterator[Activations]:
        """Compute the activations of all images, batch by batch.

        Raises:
            ConfigError: these are no :class:`Images`, or it does not take images of this shape.
            DataError: a file cannot be read.
        """
        if self.shape is not None and images.shape != self.shape:
            raise ConfigError(
                f"{self.name} takes images [H, W, C] {list(self.shape)}, those of {images.name} are "
                f"{list(images.shape)}; pad 28 x 28 with 2 black pixels, or choose {EXTRACTORS[1]} or {EXTRACTORS[2]}"
            )
        seen: list[torch.Tensor] = []
        hook = self.layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            for batch in images.batches(self.batch_size):
                features, logits = self.model(to_float(batch.to(self.device), self.centre))
                yield Activations(features, logits, seen.pop()[:, :SPATIAL_CHANNELS].flatten(1))
        finally:
            hook.remove()


@checked
def load_extractor(
    name: str, device: torch.device | str = "cpu", inception_weights: str | Path | None = None
) -> Extractor:
    """Load an extractor by name.

    - ``fashion-classifier``: shipped; 32 x 32 grayscale; 128 features; spatial: 7 x 8 x 8 after the fifth convolution,
      its norm and ReLU.
    - ``efficientnet-lite0``: extra ``features``; any images; 1280 features; spatial: 7 x 7 x 7 after block 10, which
      ends in a norm.
    - ``inception``: any images; 2048 features; spatial: 7 x 17 x 17 after the 1 x 1 convolution of Mixed_6d, its norm
      and ReLU (``mixed_6/conv`` of the ADM suite); inception score in parts of 5000 images, as there. The name goes on
      with the first digits of the SHA-256 of the weights; with the published ones it is ``inception-6726825d``, and the
      distances are FID and sFID.

    Raises:
        ConfigError: the name or device is unknown, a package is not installed, or weights are missing, wrong, not used.
        DeviceError: the device is not here.
    """
    if name not in EXTRACTORS:
        raise ConfigError(f"features {name!r} are unknown; choose {', '.join(EXTRACTORS)}")
    if inception_weights is not None and name != "inception":
        raise ConfigError(f"Inception weights are given, but features are {name}; choose inception, or leave them out")
    batch_size = 50 if torch.device(device).type == "cpu" else 500  # what fits a processor's cache
    if name == "fashion-classifier":
        classifier = load_fashion_classifier(device)
        text = "shipped Fashion-MNIST classifier"
        where = "fifth convolution"
        layer = classifier.body[14]
        return Extractor(name, text, where, classifier, layer, batch_size=batch_size, shape=(32, 32, 1))
    if name == "efficientnet-lite0":
        efficientnet = EfficientNetFeatures().to(device)
        text = "EfficientNet-Lite0, ImageNet"
        layer = efficientnet.body._blocks[10]
        return Extractor(name, text, "block 10", efficientnet, layer, batch_size=batch_size)
    if inception_weights is None:
        raise ConfigError(
            "features inception need the path of their weights (--inception-weights), "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid; or choose other features"
        )
    inception, digits = load_inception(inception_weights)
    published = digits == PUBLISHED
    text = "InceptionV3: FID, sFID, KID" if published else "InceptionV3, not with the published FID weights"
    return Extractor(
        f"{name}-{digits}",
        text,
        "mixed_6/conv",
        inception.to(device),
        inception.get_submodule("Mixed_6d.branch1x1"),
        centre=128.0,
        split=5000,
        batch_size=batch_size,
    )
