"""Read sets of images to be compared: an ``.npz`` in the format of the ADM suite, a folder of PNG or JPEG, an array."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from qandc.errors import ConfigError, DataError
from qandc.evaluation.npz import AT_ONCE, Npz, decoding
from qandc.evaluation.pixels import to_uint8
from qandc.support.arguments import Between, Count, checked

__all__ = ["MAX_PIXELS", "Images", "MaxPixels"]

logger = logging.getLogger(__name__)

MAX_PIXELS = 2**26
"""Pixels that one image of a file may have, 8192 x 8192, if nothing else is asked for."""

MaxPixels = Annotated[int, Between(1)]

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # what Pillow finds in a file, and what we make of it
SAVE = "save them with np.savez(path, np.ascontiguousarray(images)), images uint8 [N, H, W, 1 or 3]"
CONVERT = (
    "give 8-bit grayscale or RGB, one upright picture per file, without transparency, e.g. by Pillow's "
    "ImageOps.exif_transpose(image).convert('RGB')"
)


@dataclass(frozen=True)
class Images:
    """Hold ``count`` images of one ``shape`` (height, width, channels: 1 or 3), uint8, read when they are needed."""

    name: str
    count: int
    shape: tuple[int, int, int]
    _read: Callable[[int], Iterator[np.ndarray]] = field(repr=False, compare=False)

    @classmethod
    @checked
    def open(cls, path: str | Path, max_pixels: MaxPixels = MAX_PIXELS) -> Images:
        """Open the images of an ``.npz`` file (``arr_0``: uint8 ``[N, H, W]`` or ``[N, H, W, C]``) or of a folder.

        Headers are read and checked here, pixels later. Labels (``arr_1``) and other arrays of an ``.npz`` are ignored.

        Which files of a folder count: regular files that end in .png, .jpg or .jpeg (in any case), in the folder and
        its subfolders, in the order of their paths. Symbolic links are followed, and each file counts once, however
        many links lead to it or its folder. Files and folders whose names begin with a dot do not count; what macOS
        leaves beside files it copies (._NAME.png) is refused, because the images beside it may be incomplete too.

        What an image may be, decided by the contents of the file, not by its name: PNG or JPEG; 8-bit grayscale (or
        less), RGB, or a palette (RGB, whatever its colours); one picture, upright. Transparency of every kind, 16 bits,
        CMYK, animations, and an EXIF orientation that asks for turning are refused.

        Args:
            path: the file or folder.
            max_pixels: height x width that one image may have. It bounds what a small file can take of the memory.

        Raises:
            ConfigError: there is neither such a file nor such a folder.
            DataError: it holds no images, or images of several sizes, or anything that is described above as refused;
                a file or folder cannot be read, or a link leads nowhere.
        """
        path = Path(path)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            lacking = isinstance(error, FileNotFoundError)
            found = "is not there" if lacking else f"cannot be opened ({error.strerror})"
            raise ConfigError(f"images {str(path)!r} {found}; give an .npz file or a folder of PNG or JPEG") from None
        if stat.S_ISDIR(mode):
            return _open_folder(path, max_pixels)
        if path.suffix.lower() != ".npz" or not stat.S_ISREG(mode):
            raise ConfigError(
                f"images {str(path)!r} is neither a folder nor an .npz file; give an .npz file or a folder of PNG or "
                "JPEG files"
            )
        return _open_npz(path, max_pixels)

    @classmethod
    def of(cls, images: np.ndarray | torch.Tensor, name: str = "images") -> Images:
        """Take images in memory: an array uint8 ``[N, H, W]`` or ``[N, H, W, C]``, or a tensor ``[N, C, H, W]``.

        A tensor may be uint8, or float in [-1, 1], which is rounded to 8 bits as in a saved file (values outside are
        clamped).

        Raises:
            DataError: another shape or type, or NaN or inf in it.
        """
        if isinstance(images, torch.Tensor):
            if images.ndim != 4:
                raise DataError(f"{name}: a tensor of images is [N, C, H, W]; got {list(images.shape)}")
            images = to_uint8(images.detach().cpu(), name).permute(0, 2, 3, 1).numpy()
        if not isinstance(images, np.ndarray):
            raise DataError(f"{name}: images are an array or a tensor; got {type(images).__name__}")
        if images.dtype.kind == "f":
            _refuse_nan(name, images)
        shape = _checked_shape(name, images.shape, images.dtype)
        array = images.reshape(len(images), *shape)
        return cls(name, len(array), shape, lambda size: (array[i : i + size] for i in range(0, len(array), size)))

    @checked
    def batches(self, size: Count) -> Iterator[torch.Tensor]:
        """Read all images in order, as uint8 tensors ``[at most size, C, H, W]``.

        Of large images fewer than ``size`` come at once: a batch has at most 512 MiB.

        Raises:
            ConfigError: ``size`` is no integer >= 1.
            DataError: a file has become unreadable, or is cut off.
        """
        height, width, channels = self.shape
        size = max(1, min(size, AT_ONCE // (height * width * channels)))
        for batch in self._read(size):
            images = batch.reshape(-1, *self.shape).transpose(0, 3, 1, 2)
            yield torch.from_numpy(images.copy("C"))  # what a file was read into is not writable


def _refuse_nan(name: str, images: np.ndarray) -> None:
    if not np.isfinite(images).all():
        raise DataError(f"{name}: the images contain NaN or inf; look for the sampling run that made them")


def _checked_shape(name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """Return (height, width, channels) of an array of images."""
    if dtype != np.uint8:
        hint = "round values in [-1, 1] by ((x / 2 + 0.5).clip(0, 1) * 255).round()"
        raise DataError(f"{name}: images are uint8, 0 to 255; got {dtype}; {hint} and {SAVE}")
    if len(shape) not in (3, 4) or 0 in shape or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise DataError(f"{name}: images are [N, H, W] or [N, H, W, 1 or 3]; got {list(shape)}; {SAVE}")
    return (*shape[1:], 1)[:3]  # type: ignore[return-value]


def _check_size(name: str, height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DataError(
            f"{name} declares images of {height} x {width} pixels, {height * width:,}; at most {max_pixels:,} are "
            "decoded: give smaller images, or raise max_pixels (--max-pixels) if you trust it"
        )


def _open_npz(path: Path, max_pixels: int) -> Images:
    """Open an archive whose rows are read as they are asked for: 50,000 images of 256 x 256 are 10 GB."""
    name = str(path)
    npz = Npz(path, f"{name}: not an .npz file that can be read", SAVE)
    if "arr_0" not in npz.names:
        raise DataError(f"{name}: there is no array arr_0, only {', '.join(npz.names[:10]) or 'none'}; {SAVE}")
    header = npz.header("arr_0")
    if header.dtype.kind == "f" and header.nbytes <= AT_ONCE:
        _refuse_nan(name, npz.read("arr_0"))
    shape = _checked_shape(name, header.shape, header.dtype)
    _check_size(name, *shape[:2], max_pixels)
    if header.fortran:
        return Images.of(npz.read("arr_0"), name)
    return Images(name, header.shape[0], shape, lambda size: npz.rows(header, size))


def _image_files(folder: Path) -> list[Path]:
    """List the files below a folder that count as images, by the rule of :meth:`Images.open`."""
    found: dict[str, Path] = {}
    walked, waiting = set(), [str(folder)]
    with decoding(f"folder {str(folder)!r} cannot be read", "remove or replace what is named here"):
        while waiting:
            here = waiting.pop()
            real = os.path.realpath(here)
            if real in walked:
                continue
            walked.add(real)
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            for entry in listed:
                named = os.path.splitext(entry.name)[1].lower() in SUFFIXES
                if named and entry.name.startswith("._"):
                    raise DataError(f"{entry.path} is a leftover of macOS and no image; remove all files named ._*")
                if entry.name.startswith("."):
                    continue
                mode = entry.stat().st_mode  # of what a link leads to
                if stat.S_ISDIR(mode):
                    waiting.append(entry.path)
                elif not named:
                    continue
                elif stat.S_ISREG(mode):
                    file = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                    found.setdefault(file, Path(entry.path))
                else:
                    logger.warning("%s is neither a file nor a folder; it is left out", entry.path)
    return sorted(found.values())


def _check_header(path: Path, image: Any, max_pixels: int) -> None:
    """Refuse what can be told before pixels are decoded."""
    _check_size(str(path), image.height, image.width, max_pixels)
    fault = None
    if image.mode not in MODES:
        fault = f"is of mode {image.mode}"
    elif "16" in str(image.tile[0][3]):  # how the decoder unpacks pixels: Pillow's mode is RGB all the same
        fault = f"is of mode {image.mode} with 16 bits per channel"
    elif getattr(image, "n_frames", 1) > 1:
        fault = f"holds an animation of {image.n_frames} pictures"
    if fault is not None:
        raise DataError(f"{path} {fault}; {CONVERT}")


def _check_chunks(path: Path, image: Any) -> None:
    """Refuse what side information makes of the pixels. It may stand behind them: call this again after decoding."""
    from PIL import ExifTags, Image

    if "transparency" in image.info:
        raise DataError(f"{path} has transparency (a colour or palette entries are see-through); {CONVERT}")
    # that of PngImageFile would decode pixels first
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        raise DataError(f"{path} is to be turned or mirrored (EXIF orientation {orientation}); {CONVERT}")


def _load(path: Path, max_pixels: int, pixels: bool) -> tuple[tuple[int, int, int], np.ndarray | None]:
    """Return (height, width, channels) of an image file, and its pixels if they are asked for."""
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    # Not by Image.open, which has limits of its own, and decoders of 40 formats more.
    with decoding(f"{path} cannot be read as an image", "remove or replace it"), path.open("rb") as file:
        kinds = {b"\x89P": PngImageFile, b"\xff\xd8": JpegImageFile}
        kind = kinds.get(file.read(2))
        if kind is None:
            raise ValueError("it is neither PNG nor JPEG")
        file.seek(0)
        with kind(file) as image:
            _check_header(path, image, max_pixels)
            if pixels:
                image.load()
            _check_chunks(path, image)
            mode = MODES[image.mode]
            shape = (image.height, image.width, len(mode))
            return shape, np.asarray(image.convert(mode)) if pixels else None


def _open_folder(folder: Path, max_pixels: int) -> Images:
    paths = _image_files(folder)
    if not paths:
        raise DataError(f"{str(folder)!r} holds no {', '.join(SUFFIXES)} file; give another folder, or an .npz file")
    shape, _ = _load(paths[0], max_pixels, False)
    for path in paths[1:]:
        other, _ = _load(path, max_pixels, False)
        if other != shape:
            raise DataError(
                f"{str(folder)!r} mixes sizes [H, W, C]: {paths[0].name} is {list(shape)}, {path.name} {list(other)}; "
                "all images must be alike"
            )

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), size):
            arrays = []
            for path in paths[start : start + size]:
                now, pixels = _load(path, max_pixels, True)
                if pixels is None or now != shape:
                    raise DataError(f"{path} has changed since the folder was opened; run again")
                arrays.append(pixels.reshape(shape))
            yield np.stack(arrays)

    return Images(str(folder), len(paths), shape, read)
