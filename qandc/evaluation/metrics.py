"""Compute metrics of images: Fréchet and kernel distance, inception score, precision, recall, accuracy, PSNR, SNR.

A Fréchet distance depends on its features. The networks here are a small Fashion-MNIST classifier, which is shipped,
and EfficientNet-Lite0 trained on ImageNet, not InceptionV3 (:mod:`qandc.evaluation.inception`):
do not call their numbers "FID", and compare them only with numbers made by the same extractor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qandc.errors import ConfigError, DataError
from qandc.evaluation.networks import (
    EfficientNetFeatures,
    FashionClassifier,
    fashion_classifier_path,
    load_fashion_classifier,
)
from qandc.evaluation.pixels import to_float, to_uint8
from qandc.support.arguments import Between, Count, Seed, check_fields, checked

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
    "precision_recall",
    "psnr",
    "snr",
]


SubsetSize = Annotated[int, Between(2)]


@checked
@torch.no_grad()
def extract_features(
    model: nn.Module, images: torch.Tensor, batch_size: Count = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features ``[N, D]`` and logits ``[N, K]``, both float64 on the CPU, of ``images [N, C, H, W]``.

    Images are uint8, or float in [-1, 1], which are rounded to 8 bits first (values outside are clamped), so that an
    image and its saved file score the same.

    Raises:
        ConfigError: ``batch_size`` is no integer >= 1.
        DataError: there is no image, they are no such tensor, or contain NaN or inf.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"features are those of a tensor of images [N >= 1, C, H, W]; got {_described(images)}")
    device = next(model.parameters(), images).device
    features, logits = [], []
    for first in range(0, len(images), batch_size):
        batch = to_uint8(images[first : first + batch_size], first=first)
        f, y = model(to_float(batch.to(device)))
        features.append(f.double().cpu())
        logits.append(y.double().cpu())
    return torch.cat(features), torch.cat(logits)


@dataclass(frozen=True)
class FeatureStatistics:
    """Hold mean ``[D]`` and covariance ``[D, D]`` (1/(n-1)) of ``count`` feature vectors, float64; 0: unknown.

    Raises:
        ConfigError: count is no integer >= 0.
        DataError: the arrays do not fit each other, contain NaN or inf, or are no covariance.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: Annotated[int, Between(0)]

    def __post_init__(self) -> None:
        check_fields(self)
        mean, covariance = self.mean.shape, self.covariance.shape
        if len(mean) != 1 or mean[0] < 1 or covariance != mean * 2:
            raise DataError(f"statistics are a mean [D] and a covariance [D, D]; got {list(mean)}, {list(covariance)}")
        for array in (self.mean, self.covariance):
            if not np.isfinite(array).all():
                raise DataError("contains NaN or inf: a mean or covariance; compute it anew from its images")
        asymmetry = np.abs(self.covariance - self.covariance.T).max()
        if asymmetry > 1e-4 * np.abs(self.covariance).max() or self.covariance.diagonal().min() < 0:
            raise DataError("a covariance is symmetric, without negative variances; compute it anew from its images")

    @classmethod
    @checked
    def of(cls, features: torch.Tensor) -> FeatureStatistics:
        """Compute the statistics of ``features [N, D]``, on any device; at least two finite rows are needed.

        Raises:
            DataError: they are no such tensor.
        """
        rows = _rows("feature statistics", features, at_least=2)
        array = rows.cpu().double().numpy()
        return cls(array.mean(0), np.atleast_2d(np.cov(array, rowvar=False)), len(array))


class RunningStatistics:
    """Collect :class:`FeatureStatistics` of features that come in batches and are not kept.

    Batch b of n_b rows with mean μ_b changes the sums of n rows (Chan, Golub and LeVeque 1979):
    ``M += M_b + (μ_b - μ)(μ_b - μ)ᵀ n n_b / (n + n_b)``, ``μ += (μ_b - μ) n_b / (n + n_b)``.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    @checked
    def add(self, features: torch.Tensor) -> None:
        """Count ``features [B, D]``, on any device; sums are float64. An empty batch changes nothing.

        Raises:
            ConfigError: earlier batches had another number of features.
            DataError: they are no such tensor, or contain NaN or inf; nothing is counted then.
        """
        rows = _rows("feature statistics", features, at_least=0).double()
        if isinstance(self._mean, torch.Tensor) and len(self._mean) != rows.shape[1]:
            raise ConfigError(f"{rows.shape[1]} features after batches of {len(self._mean)}; use one extractor")
        if not len(rows):
            return
        mean = rows.mean(0)
        centred = rows - mean
        step, total = mean - self._mean, self.count + len(rows)
        self._squares = self._squares + centred.T @ centred + torch.outer(step, step) * (self.count * len(rows) / total)
        self._mean = self._mean + step * (len(rows) / total)
        self.count = total

    def result(self) -> FeatureStatistics:
        """Compute the statistics of all rows so far.

        Raises:
            DataError: there are fewer than two.
        """
        if self.count < 2 or not isinstance(self._mean, torch.Tensor) or not isinstance(self._squares, torch.Tensor):
            raise DataError(f"feature statistics need two images or more; got {self.count}")
        covariance = self._squares / (self.count - 1)
        return FeatureStatistics(self._mean.cpu().numpy(), covariance.cpu().numpy(), self.count)


@checked
def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Compute ``|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)``, the squared Fréchet distance of two Gaussians.

    Source: Dowson and Landau 1982; used as FID by Heusel et al. 2017 (there on InceptionV3 features).
    The trace of the matrix root is the sum of the roots of the eigenvalues of ``Σ_a^½ Σ_b Σ_a^½``, which is symmetric
    and has those of ``Σ_a Σ_b``.

    Raises:
        ConfigError: the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(f"statistics of {a.mean.shape[0]} and {b.mean.shape[0]} features cannot be compared")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)
    difference = a.mean - b.mean
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(eigenvalues).sum()
    return max(0.0, float(difference @ difference + trace))  # of equal sets rounding may leave less


@checked
def inception_score(logits: torch.Tensor, split: Count | None = None) -> float:
    """Compute ``exp(E_x KL(p(y|x) || p(y)))`` of ``logits [N, C]`` (Salimans et al. 2016).

    Over all images; with ``split`` the mean over parts of so many, in order (5000 in the suite of ADM; the last part
    may be smaller).

    Raises:
        ConfigError: ``split`` is no integer >= 1.
        DataError: there is no row, they are no such tensor, or contain NaN or inf.
    """
    logits = _rows("an inception score", logits, at_least=1).double()
    if split is not None:
        return float(np.mean([inception_score(part) for part in logits.split(split)]))
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    marginal = p.mean(0)
    # p log p is 0 at p = 0, where log p(y) may be -inf
    kl = (torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)).sum(1)
    return float(kl.mean().exp())


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute squared distances, ``[A, D]`` and ``[B, D]`` float64 to ``[A, B]``."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)


@checked
def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, neighbours: Count = 3, block: Count = 1000
) -> tuple[float, float]:
    """Compute improved precision and recall of ``features [N, D]`` against ``reference [M, D]``.

    The manifold of a set is the union of balls around its members, each as large as the distance to the member's k-th
    nearest other one. Precision is the share of ``features`` in the manifold of ``reference``, recall the reverse.
    Source: Kynkäänniemi et al. 2019, Eqs. 1 and 2, k = 3.

    Distances are float64, ``block`` rows of them in memory at a time, on the device of the features.

    Raises:
        DataError: a set has not more than k members, or holds NaN.
        ConfigError: k or block is less than 1, or the numbers of features differ.
    """
    a, b = _pair("precision and recall", features, reference, at_least=neighbours + 1)
    centre = b.double().mean(0)  # distances stay, and lose less to rounding
    a, b = a.double() - centre, b.double() - centre
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


@checked
def kernel_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    subsets: Count = 100,
    subset_size: SubsetSize = 1000,
    seed: Seed = 0,
) -> tuple[float, float]:
    """Compute the mean and standard deviation, over random subsets of m images each, of the unbiased squared MMD.

    ``Σ_{i≠j} (k(x_i, x_j) + k(y_i, y_j)) / (m (m - 1)) - 2 Σ_ij k(x_i, y_j) / m²``, ``k(x, y) = (x·y / D + 1)³``,
    in float64; x are of ``features [N, D]``, y of ``reference [M, D]``. It may be negative. Smaller sets make smaller
    subsets. The deviation is that of single subsets, not of their mean, and it is 0, which says nothing, where there is
    only one subset: with ``subsets=1``, and where a subset is all of both sets.
    Source: Bińkowski et al. 2018, Sec. 4; called KID when the features are those of Inception.

    Raises:
        DataError: a set has fewer than 2 members, or holds NaN.
        ConfigError: a number is out of range, or the numbers of features differ.
    """
    features, reference = _pair("kernel distance", features, reference, at_least=2)
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


def _described(given: torch.Tensor) -> str:
    return f"{list(given.shape)} {given.dtype}"


def _rows(what: str, x: torch.Tensor, at_least: int) -> torch.Tensor:
    """Return ``x [N, D]`` without its gradient; refuse anything else with a DataError."""
    if x.ndim != 2 or x.shape[1] < 1 or len(x) < at_least:
        raise DataError(f"{what} need a tensor [N >= {at_least}, D]; got {_described(x)}")
    if not bool(x.isfinite().all()):
        raise DataError(f"{what}: features or logits contain NaN or inf; check the images they were computed from")
    return x.detach()


def _pair(
    what: str, features: torch.Tensor, reference: torch.Tensor, at_least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refuse two sets of rows that cannot be compared."""
    a, b = _rows(what, features, at_least), _rows(what, reference, at_least)
    if a.shape[1] != b.shape[1]:
        raise ConfigError(f"{what} compare [N, D] with [M, D] features; got {list(a.shape)} and {list(b.shape)}")
    if a.device != b.device:
        raise ConfigError(f"{what} compare features on one device; got {a.device} and {b.device}")
    return a, b


@checked
def class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the share of ``logits [N, C]`` whose largest entry is at ``labels [N]``, integers from 0 to C - 1.

    Raises:
        DataError: there is no row, they are no such tensors, contain NaN or inf, or a label is out of range.
    """
    rows = _rows("class accuracy", logits, at_least=1)
    if labels.is_floating_point() or labels.shape != rows.shape[:1]:
        raise DataError(f"class accuracy needs integer labels [{len(rows)}]; got {_described(labels)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < rows.shape[1]:
        raise DataError(f"labels are {int(labels.min())} to {int(labels.max())}; give 0 to {rows.shape[1] - 1}")
    return float((rows.argmax(1) == labels.to(rows.device)).double().mean())


def snr(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Compute ``10 log10(Σ expected² / Σ (actual - expected)²)`` in dB per sample: ``[B, ...]`` to ``[B]``.

    Raises:
        ConfigError: the shapes differ.
    """
    if actual.shape != expected.shape or not actual.ndim:
        raise ConfigError(
            f"snr compares tensors of one shape [B, ...]; got {tuple(actual.shape)}, {tuple(expected.shape)}"
        )
    signal, error = (t.double().square().flatten(1).sum(1) for t in (expected, actual - expected))
    return 10 * torch.log10(signal / error)


@checked
def psnr(images: torch.Tensor, reference: torch.Tensor, peak: float | None = None) -> torch.Tensor:
    """Compute ``10 log10(peak² / MSE)`` in dB per image: ``[B, C, H, W]`` to ``[B]``; inf for equal images.

    ``peak`` is the length of the value range; by default 255 for uint8 images, 2 for float images in [-1, 1].

    Raises:
        ConfigError: the shapes differ, or ``peak`` is no finite number > 0.
        DataError: there is no image, they are no such tensors, or contain NaN or inf.
    """
    if peak is not None and peak <= 0:
        raise ConfigError(f"peak is {peak!r}; give the length of the value range, a finite number > 0")
    for given in (images, reference):
        if given.ndim != 4 or 0 in given.shape:
            raise DataError(f"psnr compares tensors [B >= 1, C, H, W]; got {_described(given)}")
    if images.shape != reference.shape:
        raise ConfigError(f"psnr compares images of one shape; got {tuple(images.shape)} and {tuple(reference.shape)}")
    mse = (images.double() - reference.double()).square().flatten(1).mean(1)
    if not bool(mse.isfinite().all()):
        raise DataError("psnr: the images contain NaN or inf; look for the sampling run that made them")
    if peak is None:
        peak = 255 if images.dtype == torch.uint8 else 2
    return 10 * torch.log10(peak**2 / mse)
