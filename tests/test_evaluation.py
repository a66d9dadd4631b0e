"""``qandc evaluate``: identical sets, published figures, other libraries with the same features, what is refused."""

from __future__ import annotations

import json
import logging
import re
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qandc import ConfigError, DataError, DeviceError
from qandc.cli.main import main
from qandc.evaluation.compare import FASHION_MNIST, ReferenceStatistics, evaluate
from qandc.evaluation.extractors import Extractor, load_extractor
from qandc.evaluation.images import Images
from qandc.evaluation.metrics import FeatureStatistics, frechet_distance
from qandc.evaluation.pixels import to_float

ROOT = Path(__file__).parents[1]
COUNT = 200


def draw(seed: int, count: int = COUNT, channels: int = 1) -> np.ndarray:
    """Pictures of rectangles, ``[N, 32, 32, C] uint8``: no two alike, and none noise."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 40, (count, 32, 32, channels), dtype=np.uint8)
    for image in images:
        top, left = random.integers(0, 20, 2)
        height, width = random.integers(4, 12 + 4 * seed, 2)
        image[top : top + height, left : left + width] += np.uint8(random.integers(60, 200))
    return images


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    return draw(0), draw(1)


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("fashion-classifier")


@pytest.fixture(scope="module")
def result(sets, extractor):
    ours, theirs = (Images.of(images, name) for images, name in zip(sets, ("ours", "theirs"), strict=True))
    return evaluate(ours, theirs, extractor, kernel_subset_size=COUNT)


def test_identical_sets(sets, extractor):
    images = Images.of(sets[0])
    found = evaluate(images, Images.of(sets[0]), extractor, kernel_subset_size=COUNT)
    assert found.frechet_distance == pytest.approx(0, abs=1e-9)
    assert found.spatial_frechet_distance == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall) == (1, 1)
    # (Σ_{i≠j} k_ij)(2 / (m (m-1)) - 2 / m²) - 2 Σ_i k_ii / m²: not zero, but small
    assert abs(found.kernel_distance) < 0.1


def test_the_network_is_named(result):
    assert (result.extractor, result.spatial, result.split) == ("fashion-classifier", "fifth convolution", None)
    assert (result.images, result.count) == ("ours", COUNT)
    assert (result.reference, result.reference_count) == ("theirs", COUNT)
    assert result.notes == ()


class _Features(nn.Module):
    """The classifier as torchmetrics takes it: uint8 images to one of its outputs."""

    num_features = 128

    def __init__(self, extractor, output: int) -> None:
        super().__init__()
        self.model, self.output = extractor.model, output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # float64, or torchmetrics would sum the differences of a kernel distance in float32
        return self.model(to_float(images))[self.output].double()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Metric `:UserWarning", "ignore:std:UserWarning")  # that it keeps features; of one
def test_torchmetrics_agrees(sets, extractor, result):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    ours, theirs = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in sets)
    features, logits = _Features(extractor, 0), _Features(extractor, 1)
    distance = FrechetInceptionDistance(features)
    kernel = KernelInceptionDistance(features, subsets=1, subset_size=COUNT)
    for metric in (distance, kernel):
        metric.update(theirs, real=True)
        metric.update(ours, real=False)
    score = InceptionScore(logits, splits=1)
    score.update(ours)
    assert result.frechet_distance > 0.1
    assert result.frechet_distance == pytest.approx(distance.compute().item(), rel=1e-4)
    assert result.kernel_distance == pytest.approx(kernel.compute()[0].item(), rel=1e-4)
    assert result.inception_score > 1.05
    assert result.inception_score == pytest.approx(score.compute()[0].item(), rel=1e-4)


@pytest.mark.slow
def test_scikit_learn_agrees_on_precision_and_recall(sets, extractor, result):
    from sklearn.neighbors import NearestNeighbors

    ours, theirs = (torch.cat([b.features for b in extractor(Images.of(x))]).double().numpy() for x in sets)

    def covered(queries: np.ndarray, members: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=4).fit(members).kneighbors(members)[0][:, 3]
        distances = np.linalg.norm(queries[:, None] - members, axis=2)
        return float((distances <= radii).any(1).mean())

    assert 0 < result.precision < 1
    assert 0 < result.recall < 1
    assert result.precision == pytest.approx(covered(ours, theirs), rel=1e-4)
    assert result.recall == pytest.approx(covered(theirs, ours), rel=1e-4)


@pytest.mark.slow
def test_spatial_distance_is_that_of_the_named_layer(sets, extractor, result):
    def spatial(images: np.ndarray) -> FeatureStatistics:
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.no_grad():
            return FeatureStatistics.of(extractor.model.body[:15](to_float(x))[:, :7].flatten(1))

    expected = frechet_distance(*(spatial(images) for images in sets))
    assert result.spatial_frechet_distance == pytest.approx(expected, rel=1e-4)


def test_published_figures_of_the_test_images(caplog, extractor, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "training")
    from fashion_mnist import DEFAULT_DIRECTORY, load_split

    if not DEFAULT_DIRECTORY.is_dir():
        pytest.skip(f"Fashion-MNIST is not in {DEFAULT_DIRECTORY}; install the Debian package dataset-fashion-mnist")
    images, _ = load_split(DEFAULT_DIRECTORY, "t10k")
    rows = json.loads((ROOT / "results/h200/fashion-dit.json").read_text())["rows"]
    published = next(row for row in rows if row["name"] == "test images")
    found = evaluate(Images.of(images), FASHION_MNIST, extractor, allow_unequal=True)
    assert (found.count, found.reference_count) == (10_000, 60_000)
    assert found.frechet_distance == pytest.approx(published["frechet_distance"], rel=5e-3)  # products in TF32
    assert found.inception_score == pytest.approx(published["inception_score"], rel=1e-3)
    assert (found.spatial_frechet_distance, found.precision, found.recall, found.kernel_distance) == (None,) * 4
    assert len(found.notes) == 2
    assert not caplog.records  # 10,000 are enough


@pytest.mark.slow
def test_efficientnet_by_name(caplog):
    found = evaluate(Images.of(draw(0, 8, 3)), Images.of(draw(1, 8, 3)), "efficientnet-lite0")
    assert (found.extractor, found.spatial) == ("efficientnet-lite0", "block 10")
    assert len(found.statistics.features.mean) == 1280
    assert len(found.statistics.spatial.mean) == 7 * 7 * 7
    assert found.frechet_distance > 0
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "8 images: Fréchet distances of fewer than 10000 are too large" in caplog.messages[0]
    assert "8 images for 1280 features: a covariance has no full rank" in caplog.messages[1]
    assert "8 images for 343 spatial features" in caplog.messages[2]


def test_statistics_in_the_place_of_images(tmp_path, sets, extractor, result):
    result.statistics.save(tmp_path / "x.npz")
    found = evaluate(Images.of(sets[0]), tmp_path / "x.npz", extractor)
    for name in ("frechet_distance", "spatial_frechet_distance", "inception_score"):
        assert getattr(found, name) == pytest.approx(getattr(result, name), rel=1e-12)
    assert (found.reference_count, found.precision, found.kernel_distance) == (COUNT, None, None)
    assert found.notes == ("the reference has statistics and no images: no precision, recall and kernel distance",)
    again = evaluate(Images.of(sets[0]), result.statistics, extractor)
    assert again.frechet_distance == found.frechet_distance


@pytest.mark.slow
def test_a_file_of_images_and_statistics(tmp_path, sets, extractor, result):
    """As those of the ADM suite: statistics of many images, and some of them. They decide the Fréchet distances."""
    mean, covariance = np.ones(128), np.eye(128)
    np.savez(tmp_path / "x.npz", sets[1], mu=mean, sigma=covariance)
    with pytest.raises(ConfigError, match=rf"{COUNT} images, .*x\.npz is of {COUNT} and an unknown number"):
        evaluate(Images.of(sets[0]), tmp_path / "x.npz", extractor)
    found = evaluate(Images.of(sets[0]), tmp_path / "x.npz", extractor, allow_unequal=True, kernel_subset_size=COUNT)
    own = evaluate(Images.of(sets[0]), ReferenceStatistics(FeatureStatistics(mean, covariance, COUNT)), extractor)
    assert found.frechet_distance == own.frechet_distance
    assert (found.precision, found.recall) == (result.precision, result.recall)
    assert found.kernel_distance == pytest.approx(result.kernel_distance)
    np.savez(tmp_path / "x.npz", sets[1], mu=np.ones(2048), sigma=np.eye(2048))  # of Inception: not used
    found = evaluate(Images.of(sets[0]), tmp_path / "x.npz", extractor)
    assert found.frechet_distance == pytest.approx(result.frechet_distance)


def test_statistics_that_are_refused(tmp_path, extractor):
    images, path = Images.of(draw(0, 8)), tmp_path / "x.npz"

    def refuses(kind, message, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(kind, match=message):
            evaluate(images, path, extractor, allow_unequal=True)

    refuses(ConfigError, "holds 2048 features of an extractor it does not name", mu=np.ones(2048), sigma=np.eye(2048))
    good = {"mu": np.ones(128), "sigma": np.eye(128)}
    refuses(ConfigError, "holds 128 features of other, but features are fashion-classifier", **good, extractor="other")
    refuses(DataError, r"mu is \[128\] and sigma \[2, 2\]", mu=np.ones(128), sigma=np.eye(2))
    refuses(DataError, "contains NaN", mu=np.full(128, np.nan), sigma=np.eye(128))
    refuses(DataError, "cannot be read", mu=np.ones(128))
    refuses(DataError, r"cannot be read \(mu holds Python objects", mu=np.array([None] * 128), sigma=np.eye(128))
    refuses(DataError, r"x\.npz'.* NumPy array of numbers", mu=np.ones(128, complex), sigma=np.eye(128))
    refuses(DataError, r"x\.npz'.* symmetric", mu=np.ones(128), sigma=-np.eye(128))
    refuses(DataError, "count is .* no integer", **good, count=np.ones(3))
    refuses(DataError, "count is -1", **good, count=np.int64(-1))
    refuses(DataError, r"mu_s is \[2\] and sigma_s \[3, 3\]", **good, mu_s=np.ones(2), sigma_s=np.eye(3))
    refuses(DataError, "at most 4,096 are decoded", **good, extractor=np.str_("x" * 2000))
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        evaluate(images, path, extractor)
    other = ReferenceStatistics(FeatureStatistics(np.ones(3), np.eye(3), 8))
    with pytest.raises(ConfigError, match="holds 3 features"):
        evaluate(images, other, extractor)


def test_sets_that_are_refused(tmp_path, extractor):
    images = Images.of(draw(0, 8), "ours")
    cases = (
        (draw(1, 8, 3), ConfigError, "ours is grayscale, theirs is RGB; convert one of them"),
        (draw(1, 8)[:, :28, :28], ConfigError, "images of ours are 32 x 32, those of theirs 28 x 28"),
        (draw(1, 9), ConfigError, r"ours holds 8 images, theirs is of 9; .*give equal numbers, or --allow-unequal"),
        (draw(1, 3), DataError, "theirs holds 3 images; .*4 or more"),
    )
    for theirs, kind, message in cases:
        with pytest.raises(kind, match=message):
            evaluate(images, Images.of(theirs, "theirs"), extractor)
    assert evaluate(images, Images.of(draw(1, 9)), extractor, allow_unequal=True).reference_count == 9
    with pytest.raises(DataError, match="few holds 3 images"):
        evaluate(Images.of(draw(0, 3), "few"), images, extractor, allow_unequal=True)
    small = Images.of(draw(0, 8)[:, :28, :28], "small")
    with pytest.raises(ConfigError, match=r"fashion-classifier takes images .* \[32, 32, 1\], those of small are \[28"):
        evaluate(small, small, extractor)
    with pytest.raises(ConfigError, match=r"is not there; give a folder of images, an \.npz"):
        evaluate(images, tmp_path / "nothing", extractor)


@pytest.mark.slow
def test_statistics_of_a_size_that_fills_the_memory(tmp_path, extractor):
    """13,000 features are declared, and would be 1.3 GB of zeros in a file of some megabytes."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in (("mu", (13_000,)), ("sigma", (13_000, 13_000))):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
                for _ in range(0, int(np.prod(shape)), 13_000):
                    file.write(bytes(8 * 13_000))
    with pytest.raises(DataError, match=r"sigma is declared as \[13000, 13000\] float64: 1,352,000,000 bytes"):
        evaluate(Images.of(draw(0, 8)), path, extractor)


def test_arguments_that_are_refused_before_the_work(extractor):
    class Never(Extractor):
        def __call__(self, images):
            raise AssertionError("images were read")

    never = Never(**{field.name: getattr(extractor, field.name) for field in fields(extractor)})
    images = Images.of(draw(0, 8))
    for changes, message in (
        ({"kernel_subsets": 0}, "kernel_subsets is 0"),
        ({"kernel_subset_size": 1}, "kernel_subset_size is 1"),
        ({"kernel_subset_size": 2.5}, "kernel_subset_size is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"images": None}, "images is None"),
        ({"images": draw(0, 8)}, r"give a path .* or a qandc\.Images"),
        ({"reference": 3}, "reference is 3"),
        ({"extractor": None}, "extractor is None"),
        ({"extractor": "vgg"}, "'vgg' are unknown"),
        ({"images": ROOT, "max_pixels": 0}, "max_pixels is 0"),
        ({"reference": ROOT, "max_pixels": "many"}, "max_pixels is 'many'"),
        ({"images": "x" * 300}, "names have at most 240 bytes"),
        ({"reference": "a\0b"}, "give a path"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(**{"images": images, "reference": images, "extractor": never, **changes})
    with pytest.raises(ConfigError, match=r"give a qandc\.Images"):
        next(extractor(draw(0, 8)))
    with pytest.raises(ConfigError, match="device is 'tpu'; give a device"):
        load_extractor("fashion-classifier", "tpu")
    with pytest.raises(DeviceError, match="device is 'cuda:99'; give a device that is here"):
        load_extractor("fashion-classifier", "cuda:99")


def test_spatial_features_are_taken_after_norm_and_relu(sets, extractor):
    """So the docstrings say: they are not negative, and many are 0."""
    spatial = next(extractor(Images.of(sets[0]))).spatial
    assert spatial.min() == 0
    assert "norm and ReLU" in load_extractor.__doc__
    assert "norm and ReLU" in Extractor.__doc__


def test_few_images_of_saved_statistics_are_a_warning(caplog, extractor, result):
    with caplog.at_level(logging.WARNING):
        evaluate(Images.of(draw(0, 8)), result.statistics, extractor, allow_unequal=True)
    assert "8 images:" in caplog.messages[0]


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["evaluate", *(str(a) for a in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_the_command(capsys, tmp_path, sets):
    ours, theirs, saved = tmp_path / "ours.npz", tmp_path / "theirs.npz", tmp_path / "saved.npz"
    np.savez(ours, sets[0])
    np.savez(theirs, sets[1][..., 0])
    record = tmp_path / "x.json"
    options = ("--device", "cpu", "--kernel-subsets", 1)
    status, out, _ = run(capsys, ours, theirs, *options, "--save-statistics", saved, "--json", record)
    assert status == 0
    row = json.loads(record.read_text())["rows"][0]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == f"Fréchet distance {row['frechet_distance']:.5g}"
    assert lines[1] == f"Fréchet distance, spatial (fifth convolution) {row['spatial_frechet_distance']:.5g}"
    assert lines[2] == f"inception score {row['inception_score']:.5g}"
    assert lines[3] == f"precision {row['precision']:.5g}"
    assert lines[4] == f"recall {row['recall']:.5g}"
    assert lines[5] == f"kernel distance {row['kernel_distance']:.5g}"
    assert lines[6] == "features: fashion-classifier (shipped Fashion-MNIST classifier)"
    assert lines[7:] == [f"{COUNT} of {ours} against {COUNT} of {theirs}", f"wrote {saved}"]
    status, out, _ = run(capsys, ours, saved, *options)
    assert status == 0
    assert lines[0] in " ".join(out.split())
    assert re.search(r"precision +- *\n", out)
    assert "note: the reference has statistics and no images" in out
    assert not list(tmp_path.glob(".*"))


def test_the_command_refuses_in_one_line(capsys, tmp_path):
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    np.savez(ours, draw(0, 8))
    np.savez(theirs, draw(1, 9))
    empty, transparent, broken = (tmp_path / name for name in ("empty", "transparent", "broken.npz"))
    broken.write_bytes(b"PK\3\4nothing")
    for folder in (empty, transparent, tmp_path / "broken"):
        folder.mkdir()
    Image.new("L", (32, 32)).save(transparent / "x.png", transparency=0)
    (tmp_path / "broken" / "x.png").write_bytes(b"\x89PNG")
    for arguments, message in (
        ((ours, theirs), "--allow-unequal"),
        ((ours, tmp_path / "nothing"), "is not there"),
        ((tmp_path / "nothing", ours), "is not there"),
        ((ours, ours, "--features", "inception"), "--inception-weights"),
        ((ours, ours, "--features", "inception", "--inception-weights", tmp_path / "w.pth"), "are not there"),
        ((ours, ours, "--features", "vgg"), "choose fashion-classifier"),
        ((ours, ours, "--kernel-subsets", 0), "--kernel-subsets is 0"),
        ((ours, ours, "--json", tmp_path / "x.txt"), "must end in .json"),
        ((ours, ours, "--save-statistics", tmp_path / "no" / "x.npz"), "does not exist"),
        ((ours, ours, "--device", "tpu"), "tpu"),
        ((ours, ours, "--max-pixels", 1023), "at most 1,023 are decoded"),
        ((ours, ours, "--max-pixels", 0), "max_pixels is 0"),
        ((ours, ours, "--max-pixels", "many"), "Invalid value for '--max-pixels'"),
        ((ours, ours, "--seed", -1), "--seed is -1; give"),
        ((ours, ours, "--seed", 2**63), "--seed is 9223372036854775808; give"),
        ((empty, ours), "holds no .png"),
        ((transparent, ours), "transparency"),
        ((broken, ours), "not an .npz file that can be read"),
        ((ours, broken), "cannot be read"),
        ((broken.parent / "broken", ours), "cannot be read as an image"),
        (("x" * 300, ours), "names have at most 240 bytes"),
        ((ours, "a\0b"), "null byte"),
        ((ours, ours, "--features", "inception", "--inception-weights", broken), "cannot be read"),
        ((ours, ours, "--features", "inception", "--inception-weights", "x" * 300), "names have at most 240 bytes"),
        ((ours, ours, "--save-statistics", tmp_path), "is a directory"),
        ((ours,), "Missing argument 'reference'"),
    ):
        status, out, err = run(capsys, "--device", "cpu", *arguments)
        assert (status, out) == (2, "")
        assert err.strip().count("\n") == 0
        assert err.strip().startswith("qandc: error: ")
        assert message in err


def test_efficientnet_without_its_packages_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match=r"qandc-kernels\[features\]"):
        load_extractor("efficientnet-lite0")
