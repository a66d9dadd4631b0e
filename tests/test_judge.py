"""The judge of scenes: what it finds, and how that is compared with what was asked for."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from qandc import ConfigError, DataError
from qandc.evaluation.judge import Judge, compare_scenes, judge_path, score_scenes
from qandc.evaluation.metrics import extract_features
from qandc.evaluation.scenes import COLOURS, KINDS, PLACES, Garment, draw_scenes, scene_arrays

sys.path.append(str(Path(__file__).parents[1] / "training"))
from fashion_mnist import DEFAULT_DIRECTORY
from train_wardrobe_judge import score, targets
from wardrobe_pictures import GarmentImages

COAT, BAG = Garment("coat", "red", "left"), Garment("bag", "blue", "right")
RIGHT_COAT = Garment("coat", "red", "right")


def garment(kind: str, colour: str, place: str | None = None) -> Garment:
    return Garment(kind, colour, place)


@pytest.mark.parametrize(
    ("found", "asked", "expected"),  # objects, colours, places, everything, matched
    [
        ([COAT, BAG], [BAG, COAT], (1, 1, 1, 1, 2)),
        ([COAT, BAG], [garment("bag", "blue"), garment("coat", "red")], (1, 1, 1, 1, 2)),
        ([COAT, BAG], [garment("bag", "red"), garment("coat", "blue")], (1, 0, 1, 0, 0)),  # colours swapped
        ([COAT, BAG], [garment("bag", "blue", "left"), garment("coat", "red", "right")], (1, 1, 0, 0, 0)),
        ([COAT], [COAT, BAG], (0, 0, 0, 0, 1)),
        ([COAT, BAG], [COAT], (0, 0, 1, 0, 1)),  # one too many
        ([], [COAT], (0, 0, 0, 0, 0)),
        ([COAT, COAT], [garment("coat", "red"), COAT], (1, 1, 1, 1, 2)),
        # the one with a place must not be taken by the one without
        ([COAT, RIGHT_COAT], [garment("coat", "red"), garment("coat", "red", "left")], (1, 1, 1, 1, 2)),
        # each place is right for one of them, but not with its colour
        ([COAT, RIGHT_COAT], [garment("coat", "blue", "left"), garment("coat", "red")], (1, 0, 1, 0, 1)),
        ([garment("coat", "red")], [COAT], (1, 1, 0, 0, 0)),  # in the centre
    ],
)
def test_known_cases(found, asked, expected):
    scores = compare_scenes([found], [asked])
    given = (scores.objects[0], scores.colours[0], scores.places[0], scores.everything[0], scores.recall)
    assert given == (*map(bool, expected[:4]), expected[4] / len(asked))


def test_matching_by_brute_force():
    rng = random.Random(0)
    kinds, colours, places = KINDS[:2], list(COLOURS)[:2], [*list(PLACES)[:2], None]

    def draw(least: int, somewhere: bool) -> list[Garment]:
        return [
            garment(rng.choice(kinds), rng.choice(colours), rng.choice(places[: 2 + somewhere]))
            for _ in range(rng.randint(least, 4))
        ]

    pairs = [(draw(0, False), draw(1, True)) for _ in range(2000)]
    scores = compare_scenes([found for found, _ in pairs], [asked for _, asked in pairs])
    matched = 0
    for i, (found, asked) in enumerate(pairs):
        most = placed = 0
        for order in itertools.permutations([*found, *[None] * len(asked)], len(asked)):
            there = [g and a.kind == g.kind and a.place in (None, g.place) for a, g in zip(asked, order, strict=True)]
            alike = [fits and a.colour == g.colour for fits, a, g in zip(there, asked, order, strict=True)]
            placed, most = max(placed, sum(map(bool, there))), max(most, sum(map(bool, alike)))
        assert scores.places[i] == (placed == len(asked))
        assert scores.everything[i] == (most == len(asked) == len(found))
        assert scores.objects[i] == (sorted(g.kind for g in found) == sorted(g.kind for g in asked))
        assert scores.colours[i] == (
            sorted((g.kind, g.colour) for g in found) == sorted((g.kind, g.colour) for g in asked)
        )
        matched += most
    assert scores.recall == pytest.approx(matched / sum(len(asked) for _, asked in pairs))
    shares = scores.shares()
    assert 0.01 < shares["everything"] < shares["colours"] < shares["objects"] < shares["places"] < 0.9
    assert shares["everything"] == np.mean(scores.everything)


class Told(Judge):
    """A judge whose maps are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1), self.logits[: len(images)]


def maps(garments: list[tuple[str, str, float, float]], confidence: float = 30.0) -> torch.Tensor:
    """The logits of a judge that is sure: 3 x 3 cells around each centre (x, y)."""
    logits = torch.zeros(len(KINDS) + 1 + len(COLOURS), 16, 16)
    logits[len(KINDS)] = confidence
    centres = torch.arange(16) * 4 + 2
    for kind, colour, x, y in garments:
        cells = ((centres - y).abs() < 6)[:, None] & ((centres - x).abs() < 6)
        logits[:, cells] = 0
        logits[KINDS.index(kind), cells] = logits[len(KINDS) + 1 + list(COLOURS).index(colour), cells] = confidence
    return logits


def test_garments_are_found_once_at_the_nearest_place():
    rng = random.Random(1)
    scenes = draw_scenes(200, 5)
    logits = []
    for scene in scenes:
        moved = [[c + rng.uniform(-3, 3) for c in PLACES[g.place]] for g in scene.garments]
        logits.append(maps([(g.kind, g.colour, *centre) for g, centre in zip(scene.garments, moved, strict=True)]))
    judge, images = Told(torch.stack(logits)), torch.zeros(200, 3, 64, 64)
    assert [set(found) for found in judge.find_garments(images)] == [set(s.garments) for s in scenes]
    assert score_scenes(judge, images, scenes).everything.all()
    assert Told(maps([("bag", "pink", 33.0, 31.0)])[None]).find_garments(images[:1]) == [(garment("bag", "pink"),)]
    assert Told(maps([])[None]).find_garments(images[:1]) == [()]
    left, right = maps([("bag", "pink", 14.0, 31.0)]), maps([("bag", "pink", 18.0, 31.0)])
    wide = torch.where(left[len(KINDS)] > 0, right, left)  # two cells are as certain as each other
    assert Told(wide[None]).find_garments(images[:1]) == [(garment("bag", "pink", "left"),)]
    right = maps([("bag", "pink", 22.0, 31.0)])
    torn = torch.where(left[len(KINDS)] > 0, right, left)
    torn[len(KINDS), 6:9, 3:6] = 29.6  # less certain in the middle
    assert len(Told(torn[None]).find_garments(images[:1])[0]) == 1
    uncertain = maps([("bag", "pink", 17.0, 31.0)])
    uncertain[: len(KINDS)] -= 30.5  # less likely than nothing
    assert Told(uncertain[None]).find_garments(images[:1]) == [()]


def test_weights_are_loaded_from_a_file(tmp_path, seeded):
    torch.manual_seed(0)
    judge = Judge().eval()
    assert sum(p.numel() for p in judge.parameters()) * 2 < 2e6  # bytes in half precision
    save_file(judge.state_dict(), tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    images = torch.rand(3, 3, 64, 64, generator=seeded) * 2 - 1
    features, logits = extract_features(again, images)
    assert features.shape == (3, 128)
    assert logits.shape == (3, len(KINDS) + 1 + len(COLOURS), 16, 16)
    with torch.no_grad():
        assert torch.equal(extract_features(judge, images)[1], logits)
    assert not again.training
    assert len(again.find_garments(images)) == 3
    assert again.find_garments(images[:0]) == []


@pytest.mark.slow
@pytest.mark.skipif(not DEFAULT_DIRECTORY.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_shipped_judge_scores_what_it_says():
    said = json.loads(judge_path().with_name("score.json").read_text())
    assert judge_path().stat().st_size < 2e6
    found = score(Judge.load(), GarmentImages.load(DEFAULT_DIRECTORY, "t10k"), 500)
    assert found["everything"] == pytest.approx(said["everything"], abs=0.03)  # of other pictures
    assert found["colour_accuracy"] == pytest.approx(said["colour_accuracy"], abs=0.01)


def test_what_is_refused(tmp_path):
    judge = Judge().eval()
    with pytest.raises(DataError, match=r"the judge takes images of 64 x 64 pixels; got \[1, 3, 32, 32\]"):
        judge.find_garments(torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match=r"the judge takes float images \[B, 3, H, W\]"):
        judge.find_garments(torch.zeros(1, 1, 64, 64))
    with pytest.raises(DataError, match="contain NaN or inf: image 1"):
        judge.find_garments(torch.full((2, 3, 64, 64), 0.0).index_fill(0, torch.tensor(1), float("nan")))
    with pytest.raises(ConfigError, match="1 pictures, 2 scenes; give a picture of each scene"):
        score_scenes(judge, torch.zeros(1, 3, 64, 64), draw_scenes(2, 0))
    with pytest.raises(DataError, match="holds no judge"):
        Judge.load(tmp_path / "missing.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match="holds no judge"):
        Judge.load(tmp_path / "other.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "small.safetensors")
    with pytest.raises(DataError, match="holds no judge"):
        Judge.load(tmp_path / "small.safetensors")


def test_images_are_judged_in_batches():
    images = torch.zeros(501, 3, 64, 64)
    judge = Told(maps([("bag", "pink", 17.0, 31.0)]).expand(501, -1, -1, -1))
    assert judge.find_garments(images) == [(garment("bag", "pink", "left"),)] * 501
    images[500] = float("nan")
    with pytest.raises(DataError, match="contain NaN or inf: image 500 "):
        judge.find_garments(images)


def test_a_judge_that_gives_its_targets_is_always_right(seeded):
    scenes = draw_scenes(300, 6)
    arrays = scene_arrays(scenes)
    places = torch.tensor([*PLACES.values(), (0, 0)])[arrays[2].long()]
    centres = places + 4 * torch.rand(300, 4, 2, generator=seeded) - 2
    kinds, colours = targets(*arrays[:2], centres)
    for cells, scene, centre in zip(kinds < len(KINDS), scenes, centres[:, 0], strict=True):
        if len(scene.garments) == 1:  # cells are of four pixels, y before x
            assert (cells.nonzero().float().mean(0) * 4 + 2 - centre.flip(0)).abs().max() <= 2
    assert torch.equal((kinds < len(KINDS)).sum((1, 2)), 9 * (arrays[0] >= 0).sum(1))
    assert torch.equal(kinds == len(KINDS), colours == -100)  # what cross entropy leaves out
    logits = [F.one_hot(x.clamp(min=0), n).movedim(3, 1) for x, n in ((kinds, len(KINDS) + 1), (colours, len(COLOURS)))]
    judge = Told(30.0 * torch.cat(logits, 1))
    assert score_scenes(judge, torch.zeros(300, 3, 64, 64), scenes).everything.all()
