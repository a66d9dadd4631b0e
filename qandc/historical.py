"""Hold what only the paper's ablation compares with: choices of samples that win nowhere (docs/calibration.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["CLUSTERERS", "agglomerative", "dbscan"]

LARGEST_DENSE = 4000  # samples whose pairwise distances are held at once; others join the nearest cluster
NEIGHBOURS = 5


def _by_nearest(
    features: np.ndarray, seed: int, fit: Callable[[np.ndarray], np.ndarray], largest: int = LARGEST_DENSE
) -> np.ndarray:
    """Label a sub-sample that fits into memory; all other samples take the label of the nearest cluster mean."""
    n = len(features)
    if n <= largest:
        return fit(features)
    chosen = np.sort(np.random.default_rng(seed).choice(n, largest, replace=False))
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
