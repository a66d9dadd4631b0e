"""Hold what only the paper's ablation compares with, and what wins nowhere: docs/calibration.md has the figures.

Choices of samples for :mod:`qandc.tap`, and a gain for :mod:`qandc.variance_compensation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

__all__ = ["CLUSTERERS", "agglomerative", "dbscan", "paper_gain"]

LARGEST_DENSE = 4000  # samples whose pairwise distances are held at once; others join the nearest cluster
NEIGHBOURS = 5


def _by_nearest(features: np.ndarray, seed: int, fit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Label a sub-sample that fits into memory; all other samples take the label of the nearest cluster mean."""
    n = len(features)
    if n <= LARGEST_DENSE:
        return fit(features)
    chosen = np.sort(np.random.default_rng(seed).choice(n, LARGEST_DENSE, replace=False))
    labels = fit(features[chosen])
    names = np.unique(labels)
    means = np.stack([features[chosen][labels == name].mean(0) for name in names])
    squares = (means**2).sum(1)[None] - 2 * features @ means.T
    found = names[squares.argmin(1)]
    found[chosen] = labels
    return found


def agglomerative(features: np.ndarray, times: np.ndarray, config: Any, seed: int) -> np.ndarray:
    """Cluster by Ward's criterion."""
    from sklearn.cluster import AgglomerativeClustering

    return _by_nearest(features, seed, lambda x: AgglomerativeClustering(config.clusters).fit_predict(x))


def dbscan(features: np.ndarray, times: np.ndarray, config: Any, seed: int) -> np.ndarray:
    """Cluster by density, the median distance to the fifth neighbour being the radius; noise is one cluster more."""
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    def fit(x: np.ndarray) -> np.ndarray:
        neighbours = min(NEIGHBOURS, len(x) - 1)
        distances, _ = NearestNeighbors(n_neighbors=neighbours + 1).fit(x).kneighbors(x)
        radius = float(np.median(distances[:, -1]))
        return DBSCAN(eps=max(radius, 1e-12), min_samples=neighbours).fit_predict(x) + 1

    return _by_nearest(features, seed, fit)


CLUSTERERS = {"agglomerative": agglomerative, "dbscan": dbscan}


def paper_gain(
    reference: torch.Tensor, sample: torch.Tensor, mean: torch.Tensor, smallest: float = 0.05
) -> torch.Tensor:
    """Compute Eq. 12 as printed: ``[Σ (x'-μ)(x̂-μ) + Σ (x̂-μ)/x'] / [Σ (x̂-μ)² + Σ (x̂-μ)²/x'²]``, ``[C]``.

    It is not the minimiser of the objective it is derived from, and the few ``x'`` near 0 decide it: on data with a
    known gain it gives about 0. Elements with ``|x'| <= smallest`` are left out of the sums, which makes it finite, not
    right. Pairs are needed.
    """
    mean = mean.double().view(1, -1, *[1] * (sample.ndim - 2))
    keep = reference.abs() > smallest
    of_each = [0, *range(2, sample.ndim)]  # all dimensions but the channels
    target, off = (reference.double() - mean) * keep, (sample.double() - mean) * keep
    relative = off / torch.where(keep, reference.double(), 1.0)
    return ((target * off).sum(of_each) + relative.sum(of_each)) / ((off**2).sum(of_each) + (relative**2).sum(of_each))
