"""Metrics against closed forms, and the shipped classifier against its own statistics."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from qandc import ConfigError, DataError, OutputError
from qandc.evaluation.compare import ReferenceStatistics
from qandc.evaluation.metrics import (
    EfficientNetFeatures,
    FeatureStatistics,
    RunningStatistics,
    class_accuracy,
    extract_features,
    fashion_classifier_path,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_fashion_classifier,
    precision_recall,
    psnr,
    snr,
)
from qandc.evaluation.pixels import to_float


def test_frechet_distance_of_known_gaussians():
    a = FeatureStatistics(np.array([0.0, 1.0]), np.diag([1.0, 4.0]), 10)
    b = FeatureStatistics(np.array([3.0, 1.0]), np.diag([9.0, 16.0]), 10)
    # 3² + (1 - 3)² + (2 - 4)²
    assert frechet_distance(a, b) == pytest.approx(17)
    assert frechet_distance(b, a) == pytest.approx(17)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_equals_scipys_matrix_root(seeded):
    from scipy.linalg import sqrtm

    a, b = (
        FeatureStatistics.of(torch.randn(50, 6, generator=seeded) @ torch.randn(6, 6, generator=seeded)) for _ in "ab"
    )
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_statistics_refuse_what_is_none():
    with pytest.raises(DataError, match="N >= 2"):
        FeatureStatistics.of(torch.zeros(1, 3))
    with pytest.raises(DataError, match="NaN"):
        FeatureStatistics.of(torch.tensor([[1.0], [float("nan")]]))
    one, two = (FeatureStatistics(np.zeros(n), np.eye(n), 5) for n in (1, 2))
    with pytest.raises(ConfigError, match="1 and 2 features"):
        frechet_distance(one, two)


def test_covariance_is_unbiased():
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert np.array_equal(FeatureStatistics.of(features).covariance, [[2, 0], [0, 0]])
    one = FeatureStatistics.of(features[:, :1])
    assert frechet_distance(one, one) == pytest.approx(0)


def test_inception_score_of_extremes():
    assert inception_score(torch.full((10, 10), 0.0)) == pytest.approx(1)
    assert inception_score(torch.eye(10) * 100) == pytest.approx(10)
    assert inception_score(torch.eye(10)[:2].repeat(3, 1) * 1000) == pytest.approx(2)


def test_class_accuracy():
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
    assert class_accuracy(logits, torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)


def test_psnr():
    reference = torch.zeros(2, 1, 4, 4)
    images = reference.clone()
    images[1] = 0.2
    values = psnr(images, reference)
    assert values[0] == float("inf")
    assert values[1].item() == pytest.approx(20, abs=1e-5)
    with pytest.raises(ConfigError, match="one shape"):
        psnr(images, reference[:1])
    pixels = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert psnr(pixels, pixels + 51).tolist() == pytest.approx([20 * np.log10(5)] * 2)  # of 255
    assert psnr(pixels.float(), pixels + 51.0, peak=255).tolist() == psnr(pixels, pixels + 51).tolist()


def test_snr():
    expected = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    actual = expected + torch.tensor([[[0.0, 0.5]], [[0.0, 0.0]]])
    assert snr(actual, expected).tolist() == pytest.approx([20, float("inf")])
    for other in (expected[:1], expected[0, 0, 0]):
        with pytest.raises(ConfigError, match="one shape"):
            snr(other, expected if other.ndim else other)


def test_shipped_classifier_and_statistics():
    model = load_fashion_classifier()
    statistics = ReferenceStatistics.load(fashion_classifier_path() / "train-statistics.npz").features
    assert statistics.count == 60000
    assert statistics.mean.shape == (128,)
    assert np.allclose(statistics.covariance, statistics.covariance.T)
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = extract_features(model, images, batch_size=2)
    assert features.shape == (3, 128)
    assert logits.shape == (3, 10)
    assert features.dtype == logits.dtype == torch.float64
    exact, _ = model.double()(images.double() / 127.5 - 1)
    # six layers of float32, whose sums of at most 9 * 128 products are each off by as many roundings
    torch.testing.assert_close(features, exact, rtol=0, atol=6 * 9 * 128 * 2**-24 * float(exact.max()))


def test_float_images_and_their_bytes_are_one_to_a_network():
    """Bit for bit what the network sees; of its answers batches of other sizes would differ in rounding."""
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, images):
            seen.append(images)
            return images.flatten(1), images.flatten(1)

    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extract_features(Network(1, 1), images)
    extract_features(Network(1, 1), to_float(images))
    assert torch.equal(*seen)


def test_frechet_distance_of_fewer_images_than_features(seeded):
    """Covariances without full rank: no NaN, nothing negative, zero for equal ones."""
    a, b = (FeatureStatistics.of(torch.randn(10, 40, generator=seeded)) for _ in "ab")
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-5)
    assert frechet_distance(a, b) > 1


def test_efficientnet_features(seeded):
    model = EfficientNetFeatures()
    images = torch.rand(3, 1, 32, 32, generator=seeded) * 2 - 1
    features, logits = model(images)
    assert (features.shape, logits.shape) == ((3, 1280), (3, 1000))
    large = torch.nn.functional.interpolate(images.expand(-1, 3, -1, -1), (112, 112), mode="bilinear")
    # the library's own forward, which may sum 16 pixels, 1280 features and a bias in another order
    bound = 2 * (16 + 1280 + 1) * 2**-24 * (features.abs() @ model.body._fc.weight.abs().T + 1)
    assert ((logits - model.body(large)).abs() <= bound).all()
    torch.testing.assert_close(model(images.expand(-1, 3, -1, -1))[0], features)
    assert extract_features(model, images)[0].shape == (3, 1280)
    assert (features[0] - features[1]).abs().max() > 0.01


def test_efficientnet_needs_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"qandc-kernels\[features\]"):
        EfficientNetFeatures()


def running(*batches: torch.Tensor) -> FeatureStatistics:
    statistics = RunningStatistics()
    for batch in batches:
        statistics.add(batch)
    return statistics.result()


@pytest.mark.parametrize("sizes", [(1, 40, 59), (0, 100), (100, 0), (50, 0, 50)], ids=str)
def test_running_statistics_are_those_of_all_rows(seeded, sizes):
    features = torch.randn(100, 5, generator=seeded) + 1000  # far from zero: sums of squares would lose digits
    found, expected = running(*features.split(sizes)), FeatureStatistics.of(features)
    assert found.count == 100
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(DataError, match="two images or more; got 0"):
        running()


def test_inception_score_in_parts():
    logits = torch.cat([torch.eye(2).repeat(3, 1), torch.zeros(6, 2)]) * 1000
    assert inception_score(logits, split=6) == pytest.approx((2 + 1) / 2)


def test_precision_and_recall_of_points_on_a_line():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # k = 1: every ball of the reference has radius 1; those of the others radii 0.5, 0.5 and 97
    generated = torch.tensor([[3.5], [4.0], [101.0]])
    assert precision_recall(generated, reference, neighbours=1) == (2 / 3, 1 / 4)
    generated = torch.tensor([[3.5], [3.0], [-1.5]])
    # radii 0.5, 0.5, 4.5: the last reaches all of the reference
    assert precision_recall(generated, reference, neighbours=1) == (2 / 3, 1)
    assert precision_recall(reference + 0.5, reference + 1000, neighbours=1) == (0, 0)
    # one point of the reference is beside the others'
    assert precision_recall(torch.tensor([[0.0], [0.1], [0.2]]), reference, neighbours=1) == (1, 1 / 4)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_precision_and_recall_of_identical_sets(seeded, block):
    features = torch.randn(40, 6, generator=seeded) + 100
    features[:10] = features[0]  # more than k equal images: radius 0
    assert precision_recall(features, features.clone(), block=block) == (1, 1)
    half = features[:20]
    assert precision_recall(half, features, block=block)[0] == 1


def test_rounding_leaves_equal_images_in_balls_of_radius_0(seeded):
    """How a product rounds a row depends on how many there are: without a tolerance some would be outside."""
    features = torch.randn(100, 2048, generator=seeded) * 3 + 100
    features[:10] = features[0]
    for count in (5, 37):
        assert precision_recall(features[:1].repeat(count, 1), features)[0] == 1


def test_kernel_distance_of_two_and_two():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # k(x, x') = 1, k(y, y') = 7³, k(x, y) = 1, 1, 3³, 4³
    assert kernel_distance(x, y) == (1 + 343 - 2 * (1 + 1 + 27 + 64) / 4, 0)


def test_kernel_distance_is_unbiased_and_seeded(seeded):
    """The mean over small subsets estimates the same as all images together; for one distribution that is about 0."""
    a, b, c = (torch.randn(2000, 4, generator=seeded) + shift for shift in (0, 0, 0.5))
    whole, none = kernel_distance(a, c, subset_size=2000)
    mean, deviation = kernel_distance(a, c, subsets=200, subset_size=100)
    assert none == 0
    assert deviation > 0
    assert mean == pytest.approx(whole, abs=4 * deviation / 200**0.5)
    assert kernel_distance(a, c, subsets=1, subset_size=100)[1] == 0
    same, deviation = kernel_distance(a, b, subsets=200, subset_size=100)
    assert abs(same) < 4 * deviation / 200**0.5
    assert whole > 10 * abs(same)
    assert kernel_distance(a, b, subsets=2, seed=1) == kernel_distance(a, b, subsets=2, seed=1)
    assert kernel_distance(a, b, subsets=2, seed=1) != kernel_distance(a, b, subsets=2, seed=2)


def test_distances_of_sets_refuse_what_is_none():
    four = torch.zeros(4, 2)
    for metric in (precision_recall, kernel_distance):
        with pytest.raises(ConfigError, match=r"got \[4, 2\] and \[4, 3\]"):
            metric(four, torch.zeros(4, 3))
        with pytest.raises(DataError, match="NaN"):
            metric(four, four + float("nan"))
        with pytest.raises(DataError, match=r"N >= .*; got \[1, 2\]"):
            metric(four, four[:1])


def test_a_refused_batch_is_not_counted(seeded):
    features = torch.randn(8, 3, generator=seeded)
    statistics = RunningStatistics()
    statistics.add(features)
    for bad, kind in ((features[:, :2], ConfigError), (features[:0, :2], ConfigError), (features / 0, DataError)):
        with pytest.raises(kind):
            statistics.add(bad)
    assert np.array_equal(statistics.result().covariance, running(features).covariance)


FOUR = torch.arange(8.0).reshape(4, 2).square()
IMAGES = torch.zeros(2, 1, 4, 4)
OF_ROWS = {
    "RunningStatistics": (lambda x: RunningStatistics().add(x), 0),
    "FeatureStatistics": (FeatureStatistics.of, 2),
    "inception_score": (inception_score, 1),
    "inception_score in parts": (lambda x: inception_score(x, split=2), 1),
    "class_accuracy": (lambda x: class_accuracy(x, torch.zeros(len(x), dtype=torch.long)), 1),
    "precision_recall": (lambda x: precision_recall(x, FOUR), 4),
    "precision_recall of a reference": (lambda x: precision_recall(FOUR, x), 4),
    "kernel_distance": (lambda x: kernel_distance(x, FOUR), 2),
    "kernel_distance of a reference": (lambda x: kernel_distance(FOUR, x), 2),
}
NO_ROWS = {
    "an array": FOUR.numpy(),
    "a vector": FOUR[0],
    "three dimensions": FOUR[None],
    "no columns": FOUR[:, :0],
    "NaN": torch.where(FOUR == 1, float("nan"), FOUR),
    "inf": torch.where(FOUR == 1, float("inf"), FOUR),
}


@pytest.mark.parametrize("given", NO_ROWS.values(), ids=NO_ROWS)
@pytest.mark.parametrize("metric", OF_ROWS)
def test_what_is_no_set_of_features_is_refused(metric, given):
    with pytest.raises((DataError, ConfigError), match=r"got|NaN or inf|give a dense torch.Tensor"):
        OF_ROWS[metric][0](given)


@pytest.mark.parametrize("metric", OF_ROWS)
def test_too_few_rows_are_refused_and_enough_are_taken(metric):
    compute, fewest = OF_ROWS[metric]
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int64):
        compute(FOUR[:fewest].to(dtype))
    compute(FOUR[: max(fewest, 1)].clone().requires_grad_())
    if fewest:
        with pytest.raises(DataError, match=f"N >= {fewest}"):
            compute(FOUR[: fewest - 1])


def test_labels_that_are_refused():
    good = torch.tensor([0, 1, 1, 0])
    assert class_accuracy(FOUR, good) == 0.5
    for labels in (good[:3], good[:1], good[None], good.float(), good.numpy(), good - 1, good + 1, good > 0, None):
        with pytest.raises(DataError, match="labels"):
            class_accuracy(FOUR, labels)


@pytest.mark.parametrize(
    "given", [IMAGES[:0], IMAGES[:, :, :0], IMAGES[0], IMAGES.numpy()], ids=["empty", "no pixel", "one image", "array"]
)
def test_images_that_are_refused(given):
    for compute in (lambda x: psnr(x, x), lambda x: extract_features(torch.nn.Linear(1, 1), x)):
        with pytest.raises(DataError, match=r"got|give a dense torch.Tensor"):
            compute(given)
    with pytest.raises(DataError, match="got"):
        load_fashion_classifier()(given if len(given) else IMAGES[:, 0])


def test_numbers_that_are_refused():
    for compute in (
        lambda n: precision_recall(FOUR, FOUR, neighbours=n),
        lambda n: precision_recall(FOUR, FOUR, block=n),
        lambda n: kernel_distance(FOUR, FOUR, subsets=n),
        lambda n: kernel_distance(FOUR, FOUR, subset_size=n + 1),
        lambda n: kernel_distance(FOUR, FOUR, seed=n - 1),
        lambda n: extract_features(torch.nn.Linear(1, 1), IMAGES, batch_size=n),
        lambda n: inception_score(FOUR, split=n),
    ):
        for wrong in (0, 1.5):
            with pytest.raises(ConfigError, match="give an integer >= "):
                compute(wrong)
    for peak in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(ConfigError, match="peak is"):
            psnr(IMAGES, IMAGES, peak=peak)
    with pytest.raises(DataError, match="NaN or inf"):
        psnr(IMAGES, IMAGES + float("nan"))


def test_statistics_that_are_refused():
    eye = np.eye(2)
    for mean, covariance, count in (
        (np.zeros(3), eye, 4),
        (np.zeros((2, 1)), eye, 4),
        (np.zeros((2, 2)), np.zeros((2, 2, 2, 2)), 4),
        (np.zeros(0), np.zeros((0, 0)), 4),
        (np.full(2, np.nan), eye, 4),
        (np.zeros(2), np.full((2, 2), np.inf), 4),
        (np.zeros(2), -eye, 4),
        (np.zeros(2), np.array([[1.0, 0.5], [0.1, 1.0]]), 4),
        (np.zeros(2, complex), eye, 4),
        (np.zeros(2), eye, -1),
        (np.zeros(2), eye, 1.5),
    ):
        with pytest.raises((ConfigError, DataError)):
            FeatureStatistics(mean, covariance, count)
    with pytest.raises(ConfigError, match=r"give a qandc\.FeatureStatistics"):
        frechet_distance(FeatureStatistics(np.zeros(2), eye, 4), eye)


def test_files_of_statistics(tmp_path):
    statistics, path = ReferenceStatistics(FeatureStatistics.of(FOUR)), tmp_path / "x.npz"
    statistics.save(path)
    found = ReferenceStatistics.load(path)
    assert np.array_equal(found.features.covariance, statistics.features.covariance)
    assert (found.features.count, found.spatial, found.extractor) == (4, None, None)
    with pytest.raises(OutputError, match="cannot write"):
        found.save(tmp_path / "none" / "x.npz")
    path.unlink()
    with pytest.raises(DataError, match=r"x\.npz' cannot be read \(.*No such file"):
        ReferenceStatistics.load(path)
