"""Sets of images to be compared: an ``.npz`` in the format of the ADM suite, a folder of PNG or JPEG, an array."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from qandc.errors import ConfigError, DataError

__all__ = ["Images"]

SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # what Pillow finds in a file, and what we make of it
SAVE = "save them with np.savez(path, images), images uint8 [N, H, W, 1 or 3]"


@dataclass(frozen=True)
class Images:
    """``count`` images of one ``shape`` (height, width, channels: 1 or 3), uint8, read when they are needed."""

    name: str
    count: int
    shape: tuple[int, int, int]
    _read: Callable[[int], Iterator[np.ndarray]] = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Images:
        """The images of an ``.npz`` file (``arr_0``: uint8 ``[N, H, W]`` or ``[N, H, W, C]``) or of a folder.

        A folder is searched with its subfolders for PNG and JPEG files, in the order of their paths. Of all files the
        headers are read here, the pixels later. Labels (``arr_1``) and other arrays of the ``.npz`` are ignored.

        Raises:
            ConfigError: there is neither such a file nor such a folder.
            DataError: it holds no images, or images of several sizes, or anything but 8-bit grayscale or RGB.
        """
        path = Path(path)
        if path.is_dir():
            return _open_folder(path)
        if path.suffix.lower() != ".npz" or not path.is_file():
            found = "is not there" if not path.exists() else "is neither a folder nor an .npz file"
            raise ConfigError(f"images {str(path)!r} {found}; give an .npz file or a folder of PNG or JPEG files")
        return _open_npz(path)

    @classmethod
    def of(cls, images: np.ndarray | torch.Tensor, name: str = "images") -> Images:
        """Images in memory: an array uint8 ``[N, H, W]`` or ``[N, H, W, C]``, or a tensor ``[N, C, H, W]``.

        A tensor may be uint8, or float in [-1, 1], which is rounded to 8 bits as in a saved file.

        Raises:
            DataError: another shape or type, or NaN or inf in it.
        """
        if isinstance(images, torch.Tensor):
            images = images.detach().cpu()
            if images.is_floating_point():
                _refuse_nan(name, bool(images.isfinite().all()))
                images = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            if images.ndim != 4:
                raise DataError(f"{name}: a tensor of images is [N, C, H, W]; got {list(images.shape)}")
            images = images.permute(0, 2, 3, 1).numpy()
        if images.dtype.kind == "f":
            _refuse_nan(name, bool(np.isfinite(images).all()))
        shape = _checked_shape(name, images.shape, images.dtype)
        array = images.reshape(len(images), *shape)
        return cls(name, len(array), shape, lambda size: (array[i : i + size] for i in range(0, len(array), size)))

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """All images in order, as uint8 tensors ``[at most size, C, H, W]``.

        Raises:
            DataError: a file has become unreadable, or is cut off.
        """
        for batch in self._read(size):
            images = batch.reshape(-1, *self.shape).transpose(0, 3, 1, 2)
            yield torch.from_numpy(images.copy("C"))  # what a file was read into is not writable


def _refuse_nan(name: str, finite: bool) -> None:
    if not finite:
        raise DataError(f"{name}: the images contain NaN or inf; look for the sampling run that made them")


def _checked_shape(name: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """(height, width, channels) of an array of images."""
    if dtype != np.uint8:
        hint = "round values in [-1, 1] by ((x / 2 + 0.5).clip(0, 1) * 255).round()"
        raise DataError(f"{name}: images are uint8, 0 to 255; got {dtype}; {hint} and {SAVE}")
    if len(shape) not in (3, 4) or 0 in shape or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise DataError(f"{name}: images are [N, H, W] or [N, H, W, 1 or 3]; got {list(shape)}; {SAVE}")
    return (*shape[1:], 1)[:3]  # type: ignore[return-value]


def _open_npz(path: Path) -> Images:
    """Reads rows from the archive as they are asked for: 50,000 images of 256 x 256 are 10 GB."""
    name = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = [entry.removesuffix(".npy") for entry in archive.namelist()]
            if "arr_0" not in arrays:
                raise DataError(f"{name}: there is no array arr_0, only {', '.join(arrays)}; {SAVE}")
            with archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                full, fortran, dtype = header(file)
        if dtype.kind == "f":
            with np.load(path, allow_pickle=False) as data:
                _refuse_nan(name, bool(np.isfinite(data["arr_0"]).all()))
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name}: not an .npz file that can be read ({error}); {SAVE}") from None
    shape = _checked_shape(name, full, dtype)
    if fortran:
        with np.load(path, allow_pickle=False) as data:
            return Images.of(data["arr_0"], name)

    def read(size: int) -> Iterator[np.ndarray]:
        bytes_per_image = int(np.prod(shape))
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                header(file)
                for start in range(0, full[0], size):
                    wanted = min(size, full[0] - start)
                    raw = file.read(wanted * bytes_per_image)
                    if len(raw) < wanted * bytes_per_image:
                        raise DataError(f"{name}: ends after {start + len(raw) // bytes_per_image} of {full[0]} images")
                    yield np.frombuffer(raw, np.uint8).reshape(wanted, *shape)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{name}: cannot be read to its end ({error}); write it again") from None

    return Images(name, full[0], shape, read)


def _open_folder(folder: Path) -> Images:
    from PIL import Image

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{str(folder)!r} holds no {', '.join(SUFFIXES)} file; give another folder, or an .npz file")

    def load(path: Path, pixels: bool) -> tuple[tuple[int, int, int], np.ndarray | None]:
        try:
            with Image.open(path) as image:
                mode = MODES.get(image.mode)
                if mode is None:
                    raise DataError(
                        f"{path} is of mode {image.mode}; give 8-bit grayscale or RGB, without transparency"
                    )
                shape = (image.height, image.width, len(mode))
                return shape, np.asarray(image.convert(mode)) if pixels else None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            # Pillow reports some broken PNG files as SyntaxError
            raise DataError(f"{path} cannot be read as an image ({error}); remove or replace it") from None

    shape, _ = load(paths[0], False)
    for path in paths[1:]:
        other, _ = load(path, False)
        if other != shape:
            raise DataError(
                f"{str(folder)!r} mixes sizes [H, W, C]: {paths[0].name} is {list(shape)}, {path.name} {list(other)}; "
                "all images must be alike"
            )

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), size):
            arrays = []
            for path in paths[start : start + size]:
                now, pixels = load(path, True)
                if pixels is None or now != shape:
                    raise DataError(f"{path} has changed since the folder was opened; run again")
                arrays.append(pixels.reshape(shape))
            yield np.stack(arrays)

    return Images(str(folder), len(paths), shape, read)
