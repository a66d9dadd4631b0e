"""Judge pictures of scenes: find the garments in them, and compare with what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qandc.errors import ConfigError, DataError
from qandc.evaluation.pixels import check_images, to_float, to_uint8
from qandc.evaluation.scenes import COLOURS, KINDS, SIZE, Garment, Scene
from qandc.support.arguments import checked

__all__ = ["Judge", "SceneScores", "compare_scenes", "judge_path", "score_scenes"]

STRIDE = 4  # pixels of a cell of the maps
REACH = 6  # pixels from a garment's centre in which cells belong to it: 3 x 3 cells
THRESHOLD = 0.5  # mean certainty of 3 x 3 cells that a garment is there
BATCH = 500
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def judge_path() -> Path:
    """Return the file with the weights of the shipped judge."""
    return Path(__file__).parents[1] / "assets" / "wardrobe-judge" / "judge.safetensors"


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    """Add two convolutions to what they are given (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width)
        self.second = _convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x))


class Judge(nn.Module):
    """Find garments in pictures of 64 x 64 pixels with a small convolutional detector.

    The kinds and colours of cells of 4 x 4 pixels are classified; around the centre of a garment 3 x 3 cells are its
    own, all others nobody's. Features for a Fréchet distance are means over the picture at an eighth of its size.
    """

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_convolution(3, 32, 2), _convolution(32, 64, 2), _Residual(64), _Residual(64))
        self.coarse = nn.Sequential(_convolution(64, 128, 2), _Residual(128), _Residual(128))
        self.down = nn.Conv2d(self.num_features, 64, 1)
        self.joint = _Residual(64)
        self.head = nn.Conv2d(64, len(KINDS) + 1 + len(COLOURS), 1)

    @classmethod
    @checked
    def load(cls, path: str | Path | None = None, device: torch.device | str = "cpu") -> Judge:
        """Load a judge, by default the shipped one, in eval mode.

        Raises:
            DataError: there is no such file, or it holds no judge.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = judge_path() if path is None else Path(path)
        judge = cls()
        try:
            judge.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path} holds no judge ({reason}); training/train_wardrobe_judge.py makes one") from None
        return judge.eval().requires_grad_(False).to(device)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map ``images [B, 3, 64, 64]`` in [-1, 1] to ``(features [B, 128], logits [B, kinds + 1 + colours, 16, 16])``.

        The logit after those of the kinds is that of no garment.

        Raises:
            DataError: they are no such tensor.
        """
        check_images(images, (3,), "the judge")
        if images.shape[2:] != (SIZE, SIZE):
            raise DataError(f"the judge takes images of {SIZE} x {SIZE} pixels; got {list(images.shape)}")
        fine = self.fine(images)
        coarse = self.coarse(fine)
        joint = fine + F.interpolate(self.down(coarse), scale_factor=2.0)
        return coarse.mean((2, 3)), self.head(self.joint(joint))

    @checked
    @torch.no_grad()
    def find_garments(self, images: torch.Tensor) -> list[tuple[Garment, ...]]:
        """Find the garments in ``images [N, 3, 64, 64]``, uint8, or float in [-1, 1], which are rounded to 8 bits.

        The place of a garment is that of the nearest of nine points; in the centre of the picture it is None.

        Raises:
            DataError: they are no such tensor, or contain NaN or inf.
        """
        device = next(self.parameters()).device
        found: list[list[Garment]] = []
        for first in range(0, len(images), BATCH):
            pixels = to_uint8(images[first : first + BATCH], first=first).to(device)
            kinds, colours = self(to_float(pixels))[1].float().split((len(KINDS) + 1, len(COLOURS)), 1)
            kinds, colours = kinds.softmax(1), colours.softmax(1)
            certainty = 1 - kinds[:, len(KINDS)]
            kinds, colours, certainty = (F.avg_pool2d(x, 3, 1, 1) for x in (kinds, colours, certainty))
            order = torch.arange(certainty[0].numel(), device=device).view(certainty.shape[1:])
            certainty = certainty - 1e-6 * order  # no two cells are alike
            peaks = (certainty == F.max_pool2d(certainty, 7, 1, 3)) & (certainty > THRESHOLD)
            image, y, x = peaks.nonzero(as_tuple=True)
            kind, colour = kinds[image, : len(KINDS), y, x].argmax(1), colours[image, :, y, x].argmax(1)
            rows: list[list[Garment]] = [[] for _ in pixels]
            for i, *names, row, column in torch.stack([image, kind, colour, y, x], 1).tolist():
                rows[i].append(Garment(list(KINDS)[names[0]], list(COLOURS)[names[1]], _place(row, column)))
            found += rows
        return [tuple(row) for row in found]


def _place(row: int, column: int) -> str | None:
    vertical, horizontal = (int((STRIDE * cell + STRIDE / 2) / SIZE * 4 - 0.5) for cell in (row, column))
    return f"{ROWS[min(vertical, 2)]} {COLUMNS[min(horizontal, 2)]}".strip() or None


@dataclass(frozen=True)
class SceneScores:
    """Hold what is right in each picture, ``[N] bool``, and the shares of pictures in which it is.

    Attributes:
        objects: kinds are those asked for, each as often.
        colours: pairs of kind and colour are.
        places: each garment asked for has one of its kind of its own, where a place was said at that place.
        everything: each garment asked for has one of its own, with kind, colour and place, and there are no others.
        recall: the share of garments asked for that have one of their own, with kind, colour and place.
    """

    objects: np.ndarray
    colours: np.ndarray
    places: np.ndarray
    everything: np.ndarray
    recall: float

    def shares(self) -> dict[str, float]:
        """Return the share of pictures in which objects, colours, places and everything are right, and the recall."""
        names = ("objects", "colours", "places", "everything")
        return {**{name: float(getattr(self, name).mean()) for name in names}, "recall": self.recall}


def _most_matched(asked: Sequence[Garment], found: Sequence[Garment], fits: Callable[[Garment, Garment], bool]) -> int:
    """Return how many garments asked for can have one found of their own (augmenting paths)."""
    owners: dict[int, int] = {}

    def assign(i: int, tried: set[int]) -> bool:
        for j in range(len(found)):
            if j not in tried and fits(asked[i], found[j]):
                tried.add(j)
                if j not in owners or assign(owners[j], tried):
                    owners[j] = i
                    return True
        return False

    return sum(assign(i, set()) for i in range(len(asked)))


def _kind_and_place(asked: Garment, found: Garment) -> bool:
    return asked.kind == found.kind and asked.place in (None, found.place)


def _alike(asked: Garment, found: Garment) -> bool:
    return asked.colour == found.colour and _kind_and_place(asked, found)


@checked
def compare_scenes(found: Sequence[Sequence[Garment]], asked: Sequence[Sequence[Garment]]) -> SceneScores:
    """Compare the garments found in pictures with those asked for.

    Raises:
        ConfigError: these are not as many pictures as scenes, or none.
    """
    if len(found) != len(asked) or not len(found):
        raise ConfigError(f"{len(found)} pictures, {len(asked)} scenes; give a picture of each scene, at least one")
    rows = []
    for seen, wanted in zip(found, asked, strict=True):
        same_kinds, same_colours = (
            Counter(map(key, seen)) == Counter(map(key, wanted))
            for key in (lambda g: g.kind, lambda g: (g.kind, g.colour))
        )
        placed = _most_matched(wanted, seen, _kind_and_place) == len(wanted)
        count = _most_matched(wanted, seen, _alike)
        rows.append((same_kinds, same_colours, placed, count == len(wanted) == len(seen), count))
    objects, colours, places, everything, matched = np.array(rows).T
    recall = float(matched.sum() / sum(map(len, asked)))
    return SceneScores(objects > 0, colours > 0, places > 0, everything > 0, recall)


@checked
def score_scenes(judge: Judge, images: torch.Tensor, scenes: Sequence[Scene]) -> SceneScores:
    """Judge ``images [N, 3, 64, 64]``, drawn from the captions of as many scenes, by what the captions asked for.

    Raises:
        ConfigError: these are not as many images as scenes, or none.
        DataError: the images are no such tensor, or contain NaN or inf.
    """
    return compare_scenes(judge.find_garments(images), [scene.asked for scene in scenes])
