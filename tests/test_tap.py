"""TAP by its definitions, on pools with known clusters, on degenerate pools, and in its bounds of time and memory."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

import qandc.tap
from qandc import ConfigError, DataError, TapConfig, cluster_pool, select_samples
from qandc.tap import (
    CLUSTERERS,
    METHODS,
    pick_samples,
    similarity,
    spatial_similarity,
    spectral_clusters,
    temporal_similarity,
)

ROOT = Path(__file__).parents[1]


def blobs(clusters=6, each=30, width=8, spread=0.05, seed=0):
    """Features around ``clusters`` directions, times around as many moments: labels, features, times."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(clusters, width))
    labels = np.repeat(np.arange(clusters), each)
    features = centres[labels] + spread * generator.normal(size=(len(labels), width))
    order = generator.permutation(len(labels))
    return labels[order], features[order].astype(np.float32), 10.0 * labels[order]


def agreement(found, wanted):
    """Share of pairs that both put into one cluster, or both into two (Rand index)."""
    same = found[:, None] == found[None]
    return (same == (wanted[:, None] == wanted[None])).mean()


def test_spatial_similarity_is_the_cosine_in_0_to_1():
    x = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    assert spatial_similarity(x, x) == pytest.approx(
        np.array([[1, 0.5, 0, 0.5], [0.5, 1, 0.5, 0.5], [0, 0.5, 1, 0.5], [0.5, 0.5, 0.5, 0.5]])
    )


def test_temporal_similarity():
    s, t = np.array([0.0, 3.0]), np.array([1.0, 3.0])
    assert temporal_similarity(s, t) == pytest.approx(np.exp(-np.array([[1, 3], [2, 0]])))
    assert temporal_similarity(s, t, "laplace", 2.0) == pytest.approx(np.exp(-np.array([[1, 3], [2, 0]]) / 2))
    assert temporal_similarity(s, t, "gaussian", 2.0) == pytest.approx(np.exp(-np.array([[1, 9], [4, 0]]) / 8))


def test_alpha_weighs_the_two():
    _, features, times = blobs()
    both = [similarity(features, times, features, times, TapConfig(alpha=alpha)) for alpha in (0, 0.3, 1)]
    assert both[1] == pytest.approx(0.3 * both[2] + 0.7 * both[0])
    assert both[0] == pytest.approx(temporal_similarity(times, times))
    assert both[2] == pytest.approx(spatial_similarity(features, features))


def test_spectral_clusters_are_those_of_scikit_learn():
    from sklearn.cluster import SpectralClustering

    labels, features, _ = blobs()
    affinity = spatial_similarity(features, features).astype(np.float64) ** 20
    mine = spectral_clusters(affinity, 6, seed=0)
    theirs = SpectralClustering(6, affinity="precomputed", random_state=0).fit_predict(affinity)
    assert agreement(mine, labels) == 1
    assert agreement(theirs, mine) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_known_clusters_are_found(alpha):
    labels, features, times = blobs(clusters=5, each=60)
    found = cluster_pool(features, times, TapConfig(clusters=5, alpha=alpha))
    assert agreement(found, labels) > 0.95


def test_time_tells_apart_what_looks_alike():
    """The point of TAP: one look at two moments is two clusters, unless time does not count."""
    generator = np.random.default_rng(0)
    features = (np.ones(8) + 0.01 * generator.normal(size=(80, 8))).astype(np.float32)
    times = np.repeat([0.0, 40.0], 40)
    assert agreement(cluster_pool(features, times, TapConfig(clusters=2, alpha=0.5)), times) == 1
    assert agreement(cluster_pool(features, times, TapConfig(clusters=2, alpha=1.0)), times) < 0.8


def test_co_occurrence_by_definition(monkeypatch):
    """The rows that are clustered at last have the distances of the rows of the co-occurrence matrix."""
    _, features, times = blobs(clusters=4, each=20)
    seen = []
    original = KMeans.fit_predict

    def spy(self, x):
        labels = original(self, x)
        seen.append((x, labels))
        return labels

    monkeypatch.setattr(KMeans, "fit_predict", spy)
    monkeypatch.setattr("joblib.Parallel.__call__", lambda self, work: [f(*a, **k) for f, a, k in work])
    config = TapConfig(clusters=4, subsamples=3, rate=1.0)  # sub-samples are the whole pool
    cluster_pool(features, times, config)
    *sub, (rows, _) = seen
    assert len(sub) == 3
    together = np.mean([labels[:, None] == labels[None] for _, labels in sub], axis=0)
    distances = np.linalg.norm(together[:, None] - together[None], axis=2)
    assert np.linalg.norm(rows[:, None] - rows[None], axis=2) == pytest.approx(distances, abs=1e-8)


@pytest.mark.parametrize("method", sorted({*METHODS, *CLUSTERERS}))
def test_every_method_selects(method):
    _, features, times = blobs()
    config = TapConfig(clusters=6)
    chosen = select_samples(features, times, 48, config, method=method, seed=3)
    assert chosen.shape == (48,)
    assert len(set(chosen.tolist())) == 48
    assert (np.diff(chosen) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < len(features)
    assert np.array_equal(chosen, select_samples(features, times, 48, config, method=method, seed=3))
    if method != "dbscan":
        others = select_samples(features, times, 48, config, method=method, seed=4)
        assert not np.array_equal(chosen, others)


@pytest.mark.parametrize("method", ["tap", "kmeans", "agglomerative", "uniform"])
def test_clusters_are_served_alike_whatever_their_size(method):
    """1 sample in 20 is rare: chance would take two of 40, these methods take a fair share."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, 8))
    labels = np.repeat([0, 1], [380, 20])
    features = (centres[labels] + 0.05 * generator.normal(size=(400, 8))).astype(np.float32)
    chosen = select_samples(features, 10.0 * labels, 40, TapConfig(clusters=2, rate=0.5), method=method)
    assert (labels[chosen] == 1).sum() == 20


def test_lengths_of_half_precision_do_not_overflow():
    """The squares of 131,072 numbers of unit variance add up to twice the largest float16."""
    labels, features, times = blobs(clusters=2, each=20, width=131_072)
    config = TapConfig(clusters=2, alpha=1.0)
    assert agreement(cluster_pool(features.astype(np.float16), times, config), labels) == 1


def test_pick_samples():
    labels = np.array([0] * 10 + [1] * 2 + [2] * 5)
    chosen = labels[pick_samples(labels, 11)]
    assert np.bincount(chosen).tolist() == [5, 2, 4] or np.bincount(chosen).tolist() == [4, 2, 5]
    assert np.array_equal(pick_samples(labels, 17), np.arange(17))
    with pytest.raises(ConfigError, match="count is 18; a pool of 17 samples can give 1 to 17"):
        pick_samples(labels, 18)


@pytest.mark.parametrize("method", CLUSTERERS)
@pytest.mark.parametrize("kind", ["duplicates", "constant", "zero", "one time", "as many as clusters", "two features"])
def test_degenerate_pools(method, kind):
    generator = np.random.default_rng(0)
    features, times = generator.normal(size=(60, 4)), np.arange(60.0) // 6
    if kind == "duplicates":
        features = np.repeat(features[:3], 20, 0)
    elif kind == "constant":
        features[:] = 2.5
    elif kind == "zero":
        features[:] = 0
    elif kind == "one time":
        times[:] = 7
    elif kind == "as many as clusters":
        features, times = features[:10], times[:10]
    else:
        features = features[:, :2]
    chosen = select_samples(features, times, 10, TapConfig(clusters=10), method=method)
    assert len(set(chosen.tolist())) == 10


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": np.zeros((3, 2))}, ConfigError, "100 clusters need as many samples; the pool has 3"),
        ({"features": np.full((200, 2), np.nan)}, DataError, "NaN or infinite"),
        ({"features": np.zeros(200)}, DataError, r"features \[N, D\] and times \[N\]"),
        ({"times": np.zeros(3)}, DataError, r"features \[N, D\] and times \[N\]"),
        ({"times": np.full(200, np.inf)}, DataError, "NaN or infinite"),
        ({"count": 201}, ConfigError, "count is 201; a pool of 200"),
        ({"count": 0}, ConfigError, "count is 0"),
        ({"method": "best"}, ConfigError, "method 'best' is unknown; choose one of tap, random"),
    ],
)
def test_refusals(change, error, message):
    arguments = {
        "features": np.random.default_rng(0).normal(size=(200, 2)),
        "times": np.zeros(200),
        "count": 2,
        **change,
    }
    if len(arguments["features"]) == 3:
        arguments["times"] = np.zeros(3)
    with pytest.raises(error, match=message):
        select_samples(**arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kernel": "cauchy"}, "kernel 'cauchy' is unknown; choose one of laplace, gaussian"),
        ({"bandwidth": 0}, "bandwidth is 0"),
        ({"rate": 0}, "rate is 0"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=message):
        TapConfig(**setting)


def test_random_has_nothing_of_tap():
    _, features, times = blobs()
    chosen = select_samples(features, times, 20, method="random", seed=1)
    assert np.array_equal(chosen, select_samples(features * 0, times * 0, 20, method="random", seed=1))


@pytest.mark.slow
def test_ten_thousand_samples_in_a_minute_and_two_gigabytes():
    """The paper's size: 10,000 samples of 1024 features, 800 of 100 clusters; in a process of its own."""
    code = (
        "import numpy as np, pathlib, re\n"
        "from qandc import select_samples\n"
        "generator = np.random.default_rng(0)\n"
        "features = generator.normal(size=(10_000, 1024)).astype(np.float32)\n"
        "chosen = select_samples(features, np.arange(10_000) % 50)\n"
        "assert len(chosen) == 800\n"
        # not getrusage, whose maximum a process inherits from the one that started it
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 60
    assert int(done.stdout) * 1024 < 2 << 30


def test_memory_grows_with_the_pool_and_not_with_its_square(monkeypatch):
    """No sub-sample's similarity to the whole pool is ever held, and large pools do not make larger sub-samples."""
    monkeypatch.setattr(qandc.tap, "BLOCK", 1 << 16)
    monkeypatch.setattr(qandc.tap, "LARGEST_DENSE", 400)
    generator = np.random.default_rng(0)
    n, size, clusters = 16_000, 400, 10
    features = generator.normal(size=(n, 16)).astype(np.float32)
    select_samples(features[:200], np.zeros(200), 20, TapConfig(clusters=clusters))  # imports what it needs
    tracemalloc.start()
    try:
        select_samples(features, np.arange(n) % 50, 100, TapConfig(clusters=clusters))
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < n * size * 8  # of one of three sub-samples


@pytest.mark.parametrize(("n", "rate", "size"), [(300, 0.5, 150), (300, 0.01, 30), (300, 1.0, 200), (24, 1.0, 24)])
def test_sizes_of_subsamples(monkeypatch, n, rate, size):
    """A share of the pool, but at least 5 members for each cluster, and not so many that memory is short."""
    seen = []
    original = qandc.tap.spectral_clusters

    def spy(affinity, *arguments):
        seen.append(affinity.copy())
        return original(affinity, *arguments)

    monkeypatch.setattr(qandc.tap, "spectral_clusters", spy)
    monkeypatch.setattr(qandc.tap, "LARGEST_DENSE", 200)
    monkeypatch.setattr(qandc.tap, "BLOCK", 1 << 10)  # several blocks
    _, features, times = blobs(each=n // 6)
    config = TapConfig(clusters=6, rate=rate)
    labels = cluster_pool(features, times, config)
    assert [affinity.shape for affinity in seen] == [(size, size)] * 3
    assert all(affinity == pytest.approx(affinity.T) for affinity in seen)
    assert all(np.diagonal(affinity) == pytest.approx(1) for affinity in seen)
    monkeypatch.setattr(qandc.tap, "BLOCK", 1 << 20)  # one
    assert agreement(cluster_pool(features, times, config), labels) == 1


def test_an_affinity_is_worked_on_in_place_only_if_asked():
    labels, features, _ = blobs()
    affinity = np.asfortranarray(spatial_similarity(features, features).astype(np.float64) ** 20)
    before = affinity.copy()
    assert agreement(spectral_clusters(affinity, 6, 0), labels) == 1
    assert np.array_equal(affinity, before)
    assert agreement(spectral_clusters(affinity, 6, 0, True), labels) == 1


def test_subsamples_run_in_parallel(monkeypatch):
    import threading

    _, features, times = blobs()
    together = threading.Barrier(3, timeout=20)
    original = qandc.tap.spectral_clusters

    def wait_for_the_others(*arguments):
        together.wait()  # passes only if all three are inside at once
        return original(*arguments)

    monkeypatch.setattr(qandc.tap, "spectral_clusters", wait_for_the_others)
    cluster_pool(features, times, TapConfig(clusters=6))
