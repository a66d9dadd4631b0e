"""The Inception network of FID, against answers of torch-fidelity's to equal random weights."""

from __future__ import annotations

import pytest
import torch

from qandc import ConfigError, DataError
from qandc.evaluation.extractors import load_extractor
from qandc.evaluation.images import Images
from qandc.evaluation.inception import InceptionV3, load_inception

# torch-fidelity 0.4.0, FeatureExtractorInceptionV3 in float64, on random_weights() and random_image()
FEATURES = [0.75697, 0.01826, 0.02791, 1.13513, 0.17851, 0.18006, 0.49386, 0.65642]  # every 256th
LOGITS = [-0.2134, 0.13826, -0.31274, 0.5629, 0.33451, 0.47637, 0.32213, 0.13876]  # every 126th, unbiased
SPATIAL = [338.93021, 110.15725, 0.0, 12.14929, 8.06866, 0.0, 4.8304]  # sums of 7 channels of Mixed_6d.branch1x1


def random_weights() -> dict[str, torch.Tensor]:
    generator, state = torch.Generator().manual_seed(0), {}
    shapes = {name: value.shape for name, value in InceptionV3().state_dict().items() if "num_batches" not in name}
    for name, shape in sorted(shapes.items()):
        x = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            x = x.abs() + 0.5
        elif name.endswith("bn.weight"):
            x = 1 + 0.1 * x
        else:
            x = x * ((2 / x[0].numel()) ** 0.5 if x.ndim > 1 else 0.1)
        state[name] = x
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(), path)
    return path


def random_image() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_answers_of_torch_fidelity(weights):
    extractor = load_extractor("inception", inception_weights=weights)
    [found] = extractor(Images.of(random_image()))
    assert found.features.shape == (1, 2048)
    assert found.logits.shape == (1, 1008)
    assert found.spatial.shape == (1, 7 * 17 * 17)
    near = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(found.features[0, ::256], torch.tensor(FEATURES), **near)
    torch.testing.assert_close(found.logits[0, ::126], torch.tensor(LOGITS), **near)
    torch.testing.assert_close(found.spatial.view(7, -1).sum(1), torch.tensor(SPATIAL), atol=1e-3, rtol=2e-5)


@pytest.mark.slow
def test_names_say_whose_weights_they_are(weights, monkeypatch):
    extractor = load_extractor("inception", inception_weights=weights)
    assert extractor.name.startswith("inception-")
    assert extractor.description == "InceptionV3, not with the published FID weights"
    monkeypatch.setattr("qandc.evaluation.extractors.PUBLISHED", extractor.name.removeprefix("inception-"))
    assert load_extractor("inception", inception_weights=weights).description == "InceptionV3: FID, sFID, KID"


@pytest.mark.slow
def test_gray_images_are_three_equal_channels(weights):
    model, _ = load_inception(weights)
    gray = torch.rand(1, 1, 20, 20) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model(gray)[0], model(gray.expand(-1, 3, -1, -1))[0])


def test_images_that_are_refused():
    model = InceptionV3()
    for images in (torch.zeros(1, 2, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None):
        with pytest.raises(DataError, match=r"Inception takes float images \[B, 1 or 3, H, W\]"):
            model(images)


def test_structure_of_the_published_weights():
    """94 convolutions with batch norm, as torchvision's without its auxiliary classifier, and 8 classes more."""
    state = {name: value for name, value in InceptionV3().state_dict().items() if "num_batches" not in name}
    assert len(state) == 94 * 5 + 2
    assert sum(value.numel() for name, value in state.items() if "running" not in name) == 23_834_568 + 8 * 2049
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def test_weights_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"are not there; give pt_inception-2015-12-05-6726825d\.pth of pytorch-fid"):
        load_inception(tmp_path / "none.pth")
    path = tmp_path / "x.pth"
    path.write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_inception(path)
    for wrong in ({}, [1], {"fc.weight": torch.zeros(1000, 2048)}):
        torch.save(wrong, path)
        with pytest.raises(ConfigError, match="holds no FID Inception: 472 of 472 tensors"):
            load_inception(path)
    with pytest.raises(ConfigError, match=r"need the path of their weights \(--inception-weights\)"):
        load_extractor("inception")
    with pytest.raises(ConfigError, match="Inception weights are given, but features are fashion-classifier"):
        load_extractor("fashion-classifier", inception_weights=path)
    with pytest.raises(
        ConfigError, match="'vgg' are unknown; choose fashion-classifier, efficientnet-lite0, inception"
    ):
        load_extractor("vgg")
