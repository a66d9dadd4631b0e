"""Run InceptionV3 as the Fréchet Inception Distance knows it, with weights that the user has.

The network of the TensorFlow graph ``inception-2015-12-05``, which FID (Heusel et al. 2017) and the suite of ADM
(Dhariwal and Nichol 2021) use. Architecture: Szegedy et al. 2015, arXiv 1512.00567. It differs from torchvision's: 1008
classes, average pools that do not count the padding, a max pool in the last block, pixels ``(x - 128) / 128``, and
TensorFlow 1's bilinear resizing, which maps pixel i to ``i * in / out``.

Checked against torch-fidelity 0.4.0 with equal random weights (``tests/test_inception.py`` keeps its answers). Never
run with the published weights, which could not be had where this was written: names and shapes of the state dict are
those that torch-fidelity loads. That package is not used itself: importing it takes a torchvision made for the very
build of torch that is installed, and it unpickles what a file of weights holds, code included.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qandc.errors import ConfigError
from qandc.evaluation.pixels import check_images
from qandc.support.arguments import checked

__all__ = ["PUBLISHED", "InceptionV3", "load_inception"]

PUBLISHED = "6726825d"
"""The SHA-256 of ``pt_inception-2015-12-05-6726825d.pth`` begins with this."""

SIZE = 299
POINT, COLUMN, ROW, SQUARE = (1, 1), (7, 1), (1, 7), (3, 3)

# A branch is a chain of convolutions (name, channels, kernels...); two kernels run side by side as name + "a", "b".
Branch = list[tuple[Any, ...]]


def _double(*channels: int) -> Branch:
    return [(f"3x3dbl_{i + 1}", width, SQUARE if i else POINT) for i, width in enumerate(channels)]


def _block_35(pool: int) -> list[Branch]:
    return [
        [("1x1", 64, POINT)],
        [("5x5_1", 48, POINT), ("5x5_2", 64, (5, 5))],
        _double(64, 96, 96),
        [("_pool", pool, POINT)],
    ]


def _block_17(width: int) -> list[Branch]:
    chain = [(f"7x7dbl_{i}", 192 if i == 5 else width, kernel) for i, kernel in enumerate((COLUMN, ROW) * 2, start=2)]
    return [
        [("1x1", 192, POINT)],
        [("7x7_1", width, POINT), ("7x7_2", width, ROW), ("7x7_3", 192, COLUMN)],
        [("7x7dbl_1", width, POINT), *chain],
        [("_pool", 192, POINT)],
    ]


BLOCK_8: list[Branch] = [
    [("1x1", 320, POINT)],
    [("3x3_1", 384, POINT), ("3x3_2", 384, (1, 3), (3, 1))],
    [("3x3dbl_1", 448, POINT), ("3x3dbl_2", 384, SQUARE), ("3x3dbl_3", 384, (1, 3), (3, 1))],
    [("_pool", 192, POINT)],
]
TO_17: list[Branch] = [[("3x3", 384, SQUARE)], _double(64, 96, 96), []]
TO_8: list[Branch] = [
    [("3x3_1", 192, POINT), ("3x3_2", 320, SQUARE)],
    [("7x7x3_1", 192, POINT), ("7x7x3_2", 192, ROW), ("7x7x3_3", 192, COLUMN), ("7x7x3_4", 192, SQUARE)],
    [],
]


class _Conv(nn.Module):
    """Apply convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Run branches side by side and concatenate their channels; the last branch begins with a pool.

    ``pool`` is "average" or "max" (resolution is kept) or "halve": max pool with stride 2, which
    the last convolutions of the other branches have too.
    """

    def __init__(self, inputs: int, branches: list[Branch], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        self.outputs = 0
        for branch in branches:
            width, steps = inputs, []
            for number, (name, channels, *kernels) in enumerate(branch):
                stride = 2 if pool == "halve" and number == len(branch) - 1 else 1
                names = [f"branch{name}{part}" for part in ("ab" if len(kernels) > 1 else [""])]
                for full, kernel in zip(names, kernels, strict=True):
                    self.add_module(full, _Conv(width, channels, kernel, stride, padded=stride == 1))
                steps.append(names)
                width = channels * len(kernels)
            self.branches.append(steps)
            self.outputs += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = []
        for branch in self.branches:
            y = x
            if branch is self.branches[-1]:
                y = self._pooled(x)
            for names in branch:
                parts = [self.get_submodule(name)(y) for name in names]
                y = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            results.append(y)
        return torch.cat(results, 1)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "max" else F.max_pool2d(x, 3, stride=2)


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize ``[B, C, H, W]`` bilinearly to ``[B, C, size, size]`` as TensorFlow 1: pixel i at ``i * in / out``."""
    for dim in (2, 3):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = position.long().clamp(max=length - 1)
        fraction = (position - low).view([-1, 1] if dim == 2 else [-1])
        first, second = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = first + (second - first) * fraction
    return images


class InceptionV3(nn.Module):
    """Map images ``[B, 1 or 3, H, W]`` of values ``(x - 128) / 128`` to ``(features [B, 2048], logits [B, 1008])``.

    Logits are without bias, as in the suites of ADM and torch-fidelity.

    Raises:
        DataError: images are no such tensor.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, SQUARE, 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, SQUARE, 1, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, SQUARE, 1, padded=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, POINT, 1, padded=False)
        self.Conv2d_4a_3x3 = _Conv(80, 192, SQUARE, 1, padded=False)
        blocks = {
            "5b": (_block_35(32), "average"), "5c": (_block_35(64), "average"), "5d": (_block_35(64), "average"),
            "6a": (TO_17, "halve"), "6b": (_block_17(128), "average"), "6c": (_block_17(160), "average"),
            "6d": (_block_17(160), "average"), "6e": (_block_17(192), "average"),
            "7a": (TO_8, "halve"), "7b": (BLOCK_8, "average"), "7c": (BLOCK_8, "max"),
        }  # fmt: skip
        width = 192
        self.blocks = [f"Mixed_{name}" for name in blocks]
        for name, (branches, pool) in zip(self.blocks, blocks.values(), strict=True):
            block = _Block(width, branches, pool)
            self.add_module(name, block)
            width = block.outputs
        self.fc = nn.Linear(width, 1008)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_images(images, (1, 3), "Inception")
        x = _resize(images.expand(-1, 3, -1, -1), SIZE)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


@checked
def load_inception(path: str | Path) -> tuple[InceptionV3, str]:
    """Load the network in eval mode with the weights of a state dict, and the first 8 digits of the file's SHA-256.

    Both ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid and ``weights-inception-2015-12-05-6726825d.pth`` of
    torch-fidelity fit. A file whose digits are not :data:`PUBLISHED` is loaded all the same: the caller sees them.

    Raises:
        ConfigError: the file is not there, or holds anything else.
    """
    path = Path(path)
    hint = "give pt_inception-2015-12-05-6726825d.pth of pytorch-fid (github.com/mseitzer/pytorch-fid, releases)"
    if not path.is_file():
        raise ConfigError(f"Inception weights {str(path)!r} are not there; {hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on files that are none of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"Inception weights {str(path)!r} cannot be read ({reason[:100]}); {hint}") from None
    model = InceptionV3()
    wanted = {name: value.shape for name, value in model.state_dict().items() if "num_batches" not in name}
    given = state if isinstance(state, dict) else {}
    wrong = [name for name, shape in wanted.items() if getattr(given.get(name), "shape", None) != shape]
    if wrong:
        raise ConfigError(
            f"{str(path)!r} holds no FID Inception: {len(wrong)} of {len(wanted)} tensors, {wrong[0]} first, are "
            f"missing or of another shape; {hint}"
        )
    model.load_state_dict({name: given[name] for name in wanted}, strict=False)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return model.eval().requires_grad_(False), digits
