"""Metrics against closed forms, and the shipped classifier against its own statistics."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from qandc import ConfigError, DataError
from qandc.metrics import (
    EfficientNetFeatures,
    FeatureStatistics,
    class_accuracy,
    extract_features,
    frechet_distance,
    inception_score,
    load_fashion_classifier,
    load_statistics,
    psnr,
)


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


def test_shipped_classifier_and_statistics():
    model = load_fashion_classifier()
    statistics = load_statistics()
    assert statistics.count == 60000
    assert statistics.mean.shape == (128,)
    assert np.allclose(statistics.covariance, statistics.covariance.T)
    images = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = extract_features(model, images, batch_size=2)
    assert features.shape == (3, 128)
    assert logits.shape == (3, 10)
    as_float, _ = extract_features(model, images.float() / 127.5 - 1)
    torch.testing.assert_close(as_float, features)


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
    torch.testing.assert_close(logits, model.body(large))  # the library's own forward
    torch.testing.assert_close(model(images.expand(-1, 3, -1, -1))[0], features)
    assert extract_features(model, images)[0].shape == (3, 1280)
    assert (features[0] - features[1]).abs().max() > 0.01


def test_efficientnet_needs_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"qandc-kernels\[features\]"):
        EfficientNetFeatures()
