"""Choose calibration samples by temporal-aware parallel clustering, TAP (Q&C, arXiv 2503.02508, Sec. 3.1).

A cache makes the inputs of neighbouring steps alike, so samples drawn at random repeat each other. TAP clusters the
pool by what samples look like and when they occur, and takes a few of each cluster. Plain functions over arrays:
``features [N, D]`` describe the samples of a pool, ``times [N]`` say when each was seen, in steps (or timesteps).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from qandc import historical
from qandc.errors import ConfigError, DataError
from qandc.historical import LARGEST_DENSE
from qandc.support.arguments import Between, Count, Share, check_fields, checked

__all__ = [
    "METHODS",
    "TapConfig",
    "cluster_pool",
    "pick_samples",
    "select_samples",
    "similarity",
    "spatial_similarity",
    "spectral_clusters",
    "temporal_similarity",
]

logger = logging.getLogger(__name__)

KERNELS = ("laplace", "gaussian")
METHODS = ("tap", "random", "uniform", "kmeans")
BLOCK = 1 << 20  # similarities of the pool to a sub-sample that are held at once
ClusterSeed = Annotated[int, Between(0, 2**32 - 1001)]  # scikit-learn's, and one for each sub-sample
MEMBERS_PER_CLUSTER = 5  # of a sub-sample at least: clusters of single samples tell nothing


@dataclass(frozen=True)
class TapConfig:
    """Hold settings of TAP; the defaults are the paper's.

    Attributes:
        clusters: k, of each sub-sample and of the whole.
        alpha: weight of spatial similarity, 0 to 1; the rest is temporal.
        kernel: of temporal similarity: ``laplace`` (Eq. 8) or ``gaussian``.
        bandwidth: of the kernel, in the unit of ``times``.
        subsamples: m, clustered in parallel.
        rate: share of the pool in each, lowered to 4000 samples, and raised where clusters would have fewer than 5
            members.

    Raises:
        ConfigError: a value is outside of what is said here.
    """

    clusters: Count = 100
    alpha: Share = 0.5
    kernel: str = "laplace"
    bandwidth: float = 1.0
    subsamples: Annotated[int, Between(1, 1000)] = 3
    rate: float = 1 / 20

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel {self.kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
        if self.bandwidth <= 0:
            raise ConfigError(f"bandwidth is {self.bandwidth!r}; give a finite number > 0, in the unit of times")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate is {self.rate!r}; give a share > 0 and at most 1")


def spatial_similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute ``(1 + cos(x_i, y_j)) / 2``: ``[N, D]`` and ``[M, D]`` to ``[N, M]`` in [0, 1]; 1/2 where a row is zero.

    The paper's spatial similarity is the cosine. It may be negative, which a degree must not be, so it is mapped to
    [0, 1]; the order stays.
    """

    def rows_of_length_one(rows: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(length > 0, length, 1)

    return (1 + rows_of_length_one(x) @ rows_of_length_one(y).T) / 2


def temporal_similarity(s: np.ndarray, t: np.ndarray, kernel: str = "laplace", bandwidth: float = 1.0) -> np.ndarray:
    """Compute ``exp(-|s_i - t_j| / h)`` (Eq. 8) or ``exp(-(s_i - t_j)² / 2 h²)``: ``[N]``, ``[M]`` to ``[N, M]``."""
    apart = np.abs(s[:, None] - t[None, :]) / bandwidth
    return np.exp(-apart) if kernel == "laplace" else np.exp(-(apart**2) / 2)


def similarity(
    features: np.ndarray, times: np.ndarray, others: np.ndarray, their_times: np.ndarray, config: TapConfig
) -> np.ndarray:
    """Compute ``A = α A_spatial + (1 - α) A_temporal``: ``[N, M]`` in [0, 1]."""
    spatial = spatial_similarity(features, others)
    temporal = temporal_similarity(times, their_times, config.kernel, config.bandwidth)
    return config.alpha * spatial + (1 - config.alpha) * temporal


def _similarity_in_blocks(
    features: np.ndarray, times: np.ndarray, others: np.ndarray, their_times: np.ndarray, config: TapConfig
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows of :func:`similarity`, so many that none of its steps takes more than ``BLOCK`` numbers."""
    rows = max(1, BLOCK // len(others))
    for first in range(0, len(features), rows):
        block = slice(first, first + rows)
        yield block, similarity(features[block], times[block], others, their_times, config)


def spectral_clusters(affinity: np.ndarray, clusters: int, seed: int, overwrite: bool = False) -> np.ndarray:
    """Label ``[N]`` samples of a symmetric affinity ``[N, N]``: k-means on the top eigenvectors of ``D^-½ A D^-½``.

    Rows of the eigenvectors are scaled to length one before (Ng, Jordan and Weiss 2001). With ``overwrite`` an affinity
    in column-major order is worked on where it is: there is never a second matrix of its size.
    """
    from scipy.linalg import eigh

    n = len(affinity)
    root = 1 / np.sqrt([row.sum() for row in affinity])  # row by row they round alike in both orders
    normalised = affinity if overwrite else np.array(affinity, dtype=np.float64, order="F")
    normalised *= root[:, None]
    normalised *= root[None, :]
    _, vectors = eigh(normalised, subset_by_index=[n - clusters, n - 1], overwrite_a=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _kmeans(vectors / np.where(length > 0, length, 1), clusters, seed)


def _kmeans(x: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # of duplicates there are fewer clusters than asked for, which is right
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(clusters, n_init=1, random_state=seed).fit_predict(x)


def _tap(features: np.ndarray, times: np.ndarray, config: TapConfig, seed: int) -> np.ndarray:
    """Run Algorithm 1: cluster m sub-samples in parallel, then find the clusters that they agree on.

    A sub-sample gives every sample of the pool a label: that of the cluster whose members it is most similar to on
    average. The co-occurrence of i and j is the share of sub-samples that put them into one cluster, ``C = Z Zᵀ / m``
    with Z ``[N, m k]`` of zeros and ones. Its rows are clustered by k-means; as ``‖C_i - C_j‖`` is the length of
    ``(Z_i - Z_j) (ZᵀZ)^½ / m``, that needs no N x N matrix.
    """
    import sklearn.cluster  # noqa: F401  (loads every BLAS there is: only what is loaded can be limited)
    from joblib import Parallel, delayed
    from threadpoolctl import threadpool_limits

    n, clusters = len(features), config.clusters
    size = math.ceil(config.rate * n)
    if size > LARGEST_DENSE:
        logger.info("sub-samples have %d samples in the place of %d, to fit into memory", LARGEST_DENSE, size)
    size = min(n, max(min(size, LARGEST_DENSE), MEMBERS_PER_CLUSTER * clusters))
    generator = np.random.default_rng(seed)
    drawn = [np.sort(generator.choice(n, size, replace=False)) for _ in range(config.subsamples)]

    def label_pool(chosen: np.ndarray, seed: int) -> np.ndarray:
        theirs, when = features[chosen], times[chosen]
        affinity = np.empty((size, size), order="F")
        for block, rows in _similarity_in_blocks(theirs, when, theirs, when, config):
            affinity[block] = rows
        labels = spectral_clusters(affinity, clusters, seed, True)
        del affinity
        members = np.zeros((size, clusters))
        members[np.arange(size), labels] = 1
        members /= np.maximum(members.sum(0), 1)
        found = np.empty(n, dtype=np.int64)
        for block, rows in _similarity_in_blocks(features, times, theirs, when, config):
            found[block] = (rows @ members).argmax(1)
        found[chosen] = labels
        return found

    work = [delayed(label_pool)(chosen, seed + i) for i, chosen in enumerate(drawn)]
    # BLAS that starts threads of its own within those of k-means may hang; sub-samples are parallel enough
    with threadpool_limits(limits=1, user_api="blas"):
        labels = Parallel(n_jobs=config.subsamples, prefer="threads")(work)
    z = np.zeros((n, config.subsamples * clusters))
    for i, found in enumerate(labels):
        z[np.arange(n), i * clusters + found] = 1
    values, vectors = np.linalg.eigh(z.T @ z)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return _kmeans(z @ root / config.subsamples, clusters, seed)


CLUSTERERS = {
    "tap": _tap,
    "kmeans": lambda features, times, config, seed: _kmeans(features, config.clusters, seed),
    **historical.CLUSTERERS,
}


@checked
def cluster_pool(
    features: np.ndarray,
    times: np.ndarray,
    config: TapConfig | None = None,
    *,
    method: str = "tap",
    seed: ClusterSeed = 0,
) -> np.ndarray:
    """Cluster a pool: labels ``[N]``.

    Args:
        features: ``[N, D]`` finite numbers, N >= clusters.
        times: ``[N]`` finite numbers.
        config: of TAP; the baselines use its ``clusters``.
        method: ``tap``, ``kmeans``, or a name of :data:`qandc.historical.CLUSTERERS`.
        seed: the same gives the same labels.

    Raises:
        ConfigError: an unknown method, or fewer samples than clusters.
        DataError: shapes do not match, or a value is NaN or infinite.
    """
    config = TapConfig() if config is None else config
    features, times = _check_pool(features, times)
    if method not in CLUSTERERS:
        raise ConfigError(f"method {method!r} does not cluster; choose one of {', '.join(CLUSTERERS)}")
    if len(features) < config.clusters:
        raise ConfigError(
            f"{config.clusters} clusters need as many samples; the pool has {len(features)} (lower clusters)"
        )
    return CLUSTERERS[method](features, times, config, seed)


def _check_pool(features: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if features.ndim != 2 or times.shape != (len(features),) or features.size == 0:
        raise DataError(f"a pool is features [N, D] and times [N]; got shapes {features.shape} and {times.shape}")
    times = times.astype(np.float64)
    if features.dtype not in (np.float32, np.float64):  # lengths of vectors in half precision overflow
        features = features.astype(np.float32)
    if not np.isfinite(features).all() or not np.isfinite(times).all():
        raise DataError("the pool holds NaN or infinite values; drop those samples, or check where they come from")
    return features, times


def pick_samples(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Pick ``count`` samples, as many of each cluster as can be: smaller clusters give all, the others share the rest.

    Raises:
        ConfigError: there are fewer samples than ``count``.
    """
    if not 0 < count <= len(labels):
        raise ConfigError(f"count is {count}; a pool of {len(labels)} samples can give 1 to {len(labels)}")
    generator = np.random.default_rng(seed)
    members = [generator.permutation(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    taken = np.zeros(len(members), dtype=int)
    while (missing := count - taken.sum()) > 0:
        open_ones = np.flatnonzero(taken < [len(m) for m in members])
        # one more of each; in the last round of a few of them, chosen at random
        taken[open_ones if len(open_ones) <= missing else generator.choice(open_ones, missing, replace=False)] += 1
    return np.sort(np.concatenate([m[:n] for m, n in zip(members, taken, strict=True)]))


@checked
def select_samples(
    features: np.ndarray,
    times: np.ndarray,
    count: int = 800,
    config: TapConfig | None = None,
    *,
    method: str = "tap",
    seed: ClusterSeed = 0,
) -> np.ndarray:
    """Select the samples to calibrate with: indices ``[count]``, ascending.

    Args:
        features, times, config, seed: as :func:`cluster_pool`.
        count: how many.
        method: ``tap``, ``random``, ``uniform`` (as many of each time), or as :func:`cluster_pool`.

    Raises:
        ConfigError, DataError: as :func:`cluster_pool`; or there are fewer samples than ``count``.
    """
    features, times = _check_pool(features, times)
    if method not in (*METHODS, *CLUSTERERS):
        raise ConfigError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not 0 < count <= len(features):
        raise ConfigError(f"count is {count}; a pool of {len(features)} samples can give 1 to {len(features)}")
    if method == "random":
        return np.sort(np.random.default_rng(seed).choice(len(features), count, replace=False))
    if method == "uniform":
        return pick_samples(np.unique(times, return_inverse=True)[1], count, seed)
    return pick_samples(cluster_pool(features, times, config, method=method, seed=seed), count, seed)
