"""Draw many images by number: shared out among processes, stored as shards, joined into the ``.npz`` of ADM's suite.

Image ``i`` has the class ``classes[i % len(classes)]`` and the noise of seed ``first_seed + i``. A shard is one batch
of images with consecutive numbers, and process ``r`` of ``n`` draws the shards ``r, r + n, ...``: whoever draws a
shard, and in whatever run, it holds the same bits.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from qandc.errors import ConfigError, DataError, ProcessError
from qandc.evaluation.pixels import to_uint8
from qandc.experiments.processes import Processes, finish_on_terminate
from qandc.support.arguments import Between, Count, check_fields
from qandc.support.files import FileKind, write_whole

__all__ = ["Draw", "ImageSet", "delete_shards", "draw_shards", "merge_shards", "missing_shards"]

Draw = Callable[[Sequence[int], Sequence[int]], torch.Tensor]
"""Labels and seeds to images ``[B, C, H, W]`` in [-1, 1]."""

SHARD = FileKind("shard of images", 1, dict[str, float], "delete it and run the same command again", DataError)


@dataclass(frozen=True)
class ImageSet:
    """Say which images are drawn.

    Attributes:
        count: how many.
        classes: in turn.
        first_seed: of image 0.
        batch_size: images of a shard. It decides nothing about an image but the rounding of products, which libraries
            compute in another order for another number of rows.

    Raises:
        ConfigError: a number is out of range, or there is no class.
    """

    count: Count
    classes: tuple[Annotated[int, Between(0, 2**63 - 1)], ...]
    first_seed: Annotated[int, Between(0, 2**62 - 1)] = 0  # the images have this one and those that follow
    batch_size: Count = 50

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.classes:
            raise ConfigError("classes is (); an image set needs a tuple of at least one class")

    @property
    def labels(self) -> np.ndarray:
        """Return the class of each image, ``[count] int64``."""
        return np.resize(np.array(self.classes, dtype=np.int64), self.count)

    def shards(self) -> Iterator[range]:
        """Return the numbers of the images of each shard."""
        for first in range(0, self.count, self.batch_size):
            yield range(first, min(first + self.batch_size, self.count))


def _path(directory: Path, shard: range) -> Path:
    return Path(directory) / f"images-{shard.start:07d}.safetensors"


def draw_shards(
    directory: Path,
    image_set: ImageSet,
    draw: Draw,
    processes: Processes | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, completed, total: None,
    stage: str = "images",
    measure: Callable[[], dict[str, int]] = dict,
) -> None:
    """Draw the shards of this process that are not there yet.

    Args:
        directory: where shards are kept.
        draw: see :data:`Draw`; called with one shard at a time.
        processes: that share the images; this one alone by default.
        progress: called as ``progress(stage, completed, total)`` with the images of this process.
        stage: what progress is told to be of.
        measure: figures to be kept with each shard.

    Raises:
        DataError: an image holds NaN or inf, or what is drawn is no such tensor of as many images.
        OutputError: a shard cannot be written.
        ProcessError: SIGTERM came; the shard that was begun is finished and kept.
    """
    processes = Processes() if processes is None else processes
    labels = image_set.labels
    ours = [shard for i, shard in enumerate(image_set.shards()) if i % processes.count == processes.rank]
    done, total = 0, sum(map(len, ours))
    progress(stage, done, total)
    with finish_on_terminate() as told_to_end:
        for shard in ours:
            path = _path(directory, shard)
            if not path.exists():
                seeds = [image_set.first_seed + i for i in shard]
                started = time.perf_counter()
                images = draw(labels[shard.start : shard.stop].tolist(), seeds)
                seconds = time.perf_counter() - started
                pixels = to_uint8(images, first=shard.start)
                if pixels.ndim != 4 or len(pixels) != len(shard):
                    raise DataError(
                        f"{len(shard)} images [B, C, H, W] were to be drawn; got {list(pixels.shape)}; mend `draw`"
                    )
                figures = {"seconds": seconds, **{name: float(value) for name, value in measure().items()}}
                SHARD.write_tensors(path, {"images": pixels.permute(0, 2, 3, 1)}, figures)
            done += len(shard)
            progress(stage, done, total)
            if told_to_end():
                raise ProcessError(
                    f"told to end (SIGTERM); shards up to image {shard.stop} are kept, run the same command again"
                )


def missing_shards(directory: Path, image_set: ImageSet) -> list[range]:
    """List the shards that are not in ``directory``."""
    return [shard for shard in image_set.shards() if not _path(directory, shard).exists()]


def merge_shards(directory: Path, image_set: ImageSet, path: Path) -> dict[str, float]:
    """Write ``arr_0`` ``[N, H, W, C] uint8`` and ``arr_1``, the labels ``[N] int64``, to an ``.npz``.

    One shard is in memory at a time.

    Returns:
        ``seconds`` that drawing took, summed over the shards; of everything else that was measured the largest.

    Raises:
        DataError: a shard is missing, damaged or of another size.
        OutputError: the file cannot be written.
    """
    found = {"seconds": 0.0}

    def write(partial: Path) -> None:
        shape: tuple[int, ...] = ()
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for shard in image_set.shards():
                    source = _path(directory, shard)
                    tensors, figures = SHARD.read_tensors(source)
                    images = tensors.get("images", torch.empty(0)).numpy()
                    for name, value in figures.items():
                        before = found.get(name, 0.0)
                        found[name] = before + value if name == "seconds" else max(before, value)
                    if not shape:
                        shape = images.shape[1:]
                        _write_header(file, (image_set.count, *shape), np.uint8)
                    expected = (len(shard), *shape)
                    if images.shape != expected or images.dtype != np.uint8 or images.ndim != 4:
                        raise DataError(
                            f"{str(source)!r} holds images {list(images.shape)} instead of {list(expected)}, of type "
                            f"{images.dtype} (uint8 are drawn); {SHARD.advice}"
                        )
                    file.write(images.tobytes())
            with archive.open("arr_1.npy", "w") as file:
                _write_header(file, (image_set.count,), np.int64)
                file.write(image_set.labels.tobytes())

    write_whole(path, write)
    return found


def delete_shards(directory: Path) -> None:
    """Delete a folder of shards and all in it, once they are joined; it is renamed first and goes as a whole."""
    directory = Path(directory)
    if directory.is_dir():
        gone = directory.with_name(f".{uuid.uuid4().hex[:16]}.deleted")
        os.replace(directory, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write_header(file: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Write the header of an array in C order (NumPy's format, version 1.0)."""
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})
