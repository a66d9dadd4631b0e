"""Read Fashion-MNIST (Xiao et al. 2017, MIT licence) from its IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer

LABELS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEFAULT_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
Data = Annotated[Path, typer.Option(help="Directory with the IDX files of Fashion-MNIST.")]  # option of the scripts


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not: two zero bytes, type 8, rank, big-endian sizes, data."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise SystemExit(
            f"{path}[.gz] not found: install the Debian package dataset-fashion-mnist, or give --data DIRECTORY with "
            "the four IDX files of Fashion-MNIST"
        )
    raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes (it begins with {raw[:4].hex()})")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(directory: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Load "train" or "t10k": images ``[N, 1, 32, 32] uint8`` (28x28 padded with black), labels ``[N] int64``."""
    images = torch.from_numpy(read_idx(directory / f"{split}-images-idx3-ubyte").copy())[:, None]
    labels = torch.from_numpy(read_idx(directory / f"{split}-labels-idx1-ubyte").copy()).long()
    return F.pad(images, (2, 2, 2, 2)), labels
