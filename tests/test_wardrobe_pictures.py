"""Pictures of scenes: garments are at their places, in their colours, whole; the generator decides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qandc.evaluation.scenes import COLOURS, KINDS, PLACES, Garment, Scene, draw_scenes, scene_arrays

sys.path.append(str(Path(__file__).parents[1] / "training"))
from fashion_mnist import DEFAULT_DIRECTORY
from wardrobe_pictures import GarmentImages, cloth_masks, recognisable


@pytest.fixture(scope="module")
def garments() -> GarmentImages:
    """Images of one bright square each, of a size that tells the kind."""
    images = torch.zeros(2 * len(KINDS), 1, 28, 28, dtype=torch.uint8)
    kinds = torch.arange(len(KINDS)).repeat(2)
    for image, kind in zip(images, kinds.tolist(), strict=True):
        image[:, 10 - kind : 18 + kind, 10 - kind : 18 + kind] = 255
    return GarmentImages(images, kinds)


def draw(garments: GarmentImages, arrays: tuple[torch.Tensor, ...], seed: int = 0) -> torch.Tensor:
    return garments.draw(*arrays, torch.Generator().manual_seed(seed))


def alone(kind: str, count: int) -> tuple[torch.Tensor, ...]:
    """The arrays of red garments of a kind, one in the top left corner of each picture."""
    garment = Garment(kind, "red", "top left")
    return scene_arrays([Scene((garment,), (garment,), "")] * count)


def test_garments_are_at_their_places_in_their_colours_and_sizes(garments):
    scenes = draw_scenes(300, 1)
    generator = torch.Generator().manual_seed(0)
    pictures, centres = garments.draw_with_centres(*scene_arrays(scenes), generator)
    assert pictures.shape == (300, 3, 64, 64)
    assert -1 <= pictures.min() < -0.7
    assert 0.8 < pictures.max() <= 1
    picture = (pictures.double() + 1) / 2
    ys, xs = torch.meshgrid(torch.arange(64.0) + 0.5, torch.arange(64.0) + 0.5, indexing="ij")
    for scene, image, row in zip(scenes, picture, centres, strict=True):
        background = image.flatten(1).median(1).values[:, None, None]
        seen = torch.zeros(64, 64, dtype=torch.bool)
        for garment, centre in zip(scene.garments, row, strict=False):
            x, y = PLACES[garment.place]
            assert max(abs(centre[0] - x), abs(centre[1] - y)) <= 2
            window = torch.zeros(64, 64, dtype=torch.bool)
            window[y - 16 : y + 16, x - 16 : x + 16] = True
            seen |= window
            colour = torch.tensor(COLOURS[garment.colour])[:, None, None] / 255
            away = colour - background
            share = (((image - background) * away).sum(0) / away.square().sum(0))[window]
            assert share.max() == pytest.approx(1, abs=0.01)
            found = (share * xs[window]).sum() / share.sum(), (share * ys[window]).sum() / share.sum()
            assert found == pytest.approx(centre.tolist(), abs=0.3)
            side = 8 + 2 * KINDS.index(garment.kind)
            assert 0.84 * side - 1 < share.sum().sqrt() < side + 1
        assert not (image - background)[:, ~seen].abs().gt(1e-6).any()


def test_dark_cloth_is_darker_in_the_same_hue():
    image = torch.zeros(len(KINDS), 1, 28, 28, dtype=torch.uint8)
    image[:, :, 5:23, 5:23], image[:, :, 8:20, 8:20] = 255, 0
    picture = (draw(GarmentImages(image, torch.arange(len(KINDS))), alone("coat", 40)) + 1) / 2
    red = torch.tensor(COLOURS["red"]) / 255
    assert torch.allclose(picture[:, :, 16, 16], 0.4 * red, atol=1e-5)  # enclosed: cloth, not a hole
    bright = (picture[:, :, 16, 5:12] - red[:, None]).abs().sum(1).min(1).values
    assert bright.max() < 0.02


def test_backgrounds_are_plain_and_of_three_kinds(garments):
    arrays = scene_arrays(draw_scenes(300, 2))
    corner = draw(garments, [array[:, :1].new_full((300, 4), -1) for array in arrays])
    assert torch.equal(corner, corner[:, :, :1, :1].expand_as(corner))
    brightness = (corner[:, :, 0, 0].mean(1) + 1) / 2
    for level in (0.95, 0.55, 0.12):
        near = brightness[(brightness - level).abs() < 0.05]
        assert len(near) > 70
        assert near.std() > 0.005


def test_the_generator_decides(garments):
    arrays = scene_arrays(draw_scenes(50, 3))
    assert torch.equal(draw(garments, arrays), draw(garments, arrays))
    assert not torch.equal(draw(garments, arrays), draw(garments, arrays, seed=1))


def test_each_image_of_a_kind_is_drawn():
    images = torch.zeros(3 * len(KINDS), 1, 28, 28, dtype=torch.uint8)
    images[:, :, 4:24, 4:24] = torch.linspace(60, 255, len(images)).byte()[:, None, None, None]
    kinds = torch.randperm(3 * len(KINDS), generator=torch.Generator().manual_seed(0)) % len(KINDS)
    garments = GarmentImages(images, kinds)
    for kind, name in enumerate(KINDS):
        red = (draw(garments, alone(name, 100))[:, 0, 16, 16] + 1) / 2
        expected = COLOURS["red"][0] / 255 * (0.4 + 0.6 * images[kinds == kind, 0, 14, 14] / 255)
        nearest = (red[:, None] - expected).abs().min(1)
        assert nearest.values.max() < 1e-5
        assert set(nearest.indices.tolist()) == {0, 1, 2}


def test_masks():
    grey = torch.zeros(1, 1, 28, 28)
    grey[..., 5:23, 5:23] = 0.8
    grey[..., 10:14, 10:14] = 0  # enclosed
    grey[..., 5:23, 18] = 0  # a seam of a pixel from edge to edge
    grey[..., 4, 5:18] = 0.2  # a quarter of it is cloth
    mask = cloth_masks(grey)[0, 0]
    assert mask[6:22, 5:23].min() == 1
    assert torch.allclose(mask[4, 6:17], torch.tensor(0.25))
    mask[4:23, 4:24] = 0
    assert mask.max() == 0
    open_below = torch.zeros(1, 1, 28, 28)
    open_below[..., 5:23, 5:23], open_below[..., 10:, 10:18] = 0.8, 0
    assert cloth_masks(open_below)[0, 0, 12:, 11:17].max() == 0


def test_recognisable_is_unanimous_nearest_neighbours(seeded):
    train = torch.randint(0, 256, (40, 1, 32, 32), generator=seeded, dtype=torch.uint8)
    train[20:] //= 2
    labels = torch.arange(40) // 20
    labels[:3] = 1
    images = train.clone()

    def kept(i: int, among: list[int]) -> bool:
        small = (train.double() / 2).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).floor()
        nearest = sorted(among, key=lambda j: (small[i] - small[j]).square().sum().item())[:4]
        return all(labels[j] == labels[i] for j in nearest)

    everyone = list(range(40))
    own = [kept(i, [j for j in everyone if j != i]) for i in everyone]
    assert recognisable(train, labels, train, labels).tolist() == own
    assert recognisable(images, labels, train, labels).tolist() == [kept(i, everyone) for i in everyone]
    assert 5 < sum(own) < 38


@pytest.mark.slow
def test_most_test_images_are_recognisable():
    if not DEFAULT_DIRECTORY.is_dir():
        pytest.skip(f"Fashion-MNIST is not in {DEFAULT_DIRECTORY}; install the Debian package dataset-fashion-mnist")
    garments = GarmentImages.load(DEFAULT_DIRECTORY, "t10k")
    assert garments.counts.tolist() == [840, 937, 689, 894, 735, 851, 932, 882]
