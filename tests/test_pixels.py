"""One conversion to 8 bits: clamped, rounded, NaN refused; every writer and every reader uses it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qandc import DataError
from qandc.evaluation.images import Images
from qandc.evaluation.metrics import extract_features
from qandc.evaluation.pixels import to_float, to_uint8
from qandc.experiments.generate import ModelImages, draw_grid
from qandc.experiments.shards import ImageSet, draw_shards, merge_shards

# What a decoder may leave beside [-1, 1], and what a wrapped byte would make of it
VALUES = torch.tensor([-3.0, -1.02, -1.0001, -1.0, -0.004, 0.0, 0.004, 1.0, 1.0001, 1.02, 1.5, 3.0])
PIXELS = [0, 0, 0, 0, 127, 128, 128, 255, 255, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_clamped_and_rounded(dtype):
    assert to_uint8(VALUES.to(dtype)[:, None]).flatten().tolist() == PIXELS
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(levels) is levels
    assert to_uint8(torch.empty(0, 3, 2, 2, dtype=dtype)).shape == (0, 3, 2, 2)


def test_bytes_become_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    for centre in (127.5, 128.0):
        values = to_float(levels, centre)
        assert values.dtype == torch.float32
        assert torch.equal(values, ((levels.double() - centre) / centre).float())
    assert to_float(levels)[[0, 255]].tolist() == [-1, 1]


def test_low_precision_is_rounded_once():
    """In bfloat16 a product by 255 would lose half of all levels."""
    values = torch.linspace(-1, 1, 999).bfloat16()
    exact = (values.double() + 1) * 127.5
    assert (to_uint8(values).double() - exact).abs().max() <= 0.5 + 255 * 2**-22  # float32 rounds a few times


def of_grid(images: torch.Tensor) -> np.ndarray:
    grid = draw_grid([ModelImages("a", 0, [images])], ["" for _ in images], "")
    size = 32 * 3
    left = grid.width - len(images) * (size + 6)
    return np.array([[grid.getpixel((left + i * (size + 6) + 5, 28 + 5))[0]] for i in range(len(images))])


def of_shards(images: torch.Tensor, tmp_path) -> np.ndarray:
    image_set = ImageSet(len(images), (0,), batch_size=5)
    draw_shards(tmp_path, image_set, lambda labels, seeds: images[list(seeds)])
    merge_shards(tmp_path, image_set, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as data:
        return data["arr_0"][:, 5, 5]


class Seen(nn.Module):
    """Remembers what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[torch.Tensor] = []

    def forward(self, images):
        self.batches.append(images)
        return images.flatten(1), images.flatten(1)


def of_features(images: torch.Tensor) -> np.ndarray:
    model = Seen()
    extract_features(model, images, batch_size=5)
    return to_uint8(torch.cat(model.batches)[:, 0, 5, 5]).numpy()[:, None]


def test_all_who_make_bytes_make_the_same(tmp_path):
    images = VALUES[:, None, None, None].expand(-1, 1, 32, 32)
    assert of_grid(images).flatten().tolist() == PIXELS
    assert of_shards(images, tmp_path).flatten().tolist() == PIXELS
    assert of_features(images).flatten().tolist() == PIXELS
    [batch] = Images.of(images).batches(99)
    assert batch[:, 0, 5, 5].tolist() == PIXELS


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "inf"), (-float("inf"), "inf")])
def test_all_who_make_bytes_refuse_nan(tmp_path, value, name):
    images = torch.zeros(12, 1, 32, 32)
    images[7, 0, 3, 3] = value
    for make in (of_grid, lambda x: of_shards(x, tmp_path), of_features, Images.of):
        with pytest.raises(DataError, match=f"contain NaN or inf: image 7 holds {name}"):
            make(images)


@pytest.mark.parametrize(
    "given", [torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1) > 0, torch.tensor(0.5), np.zeros(3), None]
)
def test_what_is_no_image(given):
    with pytest.raises(DataError, match="pixels are a torch tensor, uint8, or float"):
        to_uint8(given)
