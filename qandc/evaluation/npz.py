"""Read arrays of ``.npz`` files, whose sizes are checked before anything is decoded."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qandc.errors import DataError, QandCError
from qandc.support.files import regular_size

__all__ = ["AT_ONCE", "ArrayHeader", "Npz", "decoding"]

AT_ONCE = 2**29
"""Bytes that are decoded at once: what a small file inflates to must not fill the memory."""

HEADER_BYTES = 2**14  # NumPy writes 128 and refuses more than 10,000


@contextmanager
def decoding(failure: str, advice: str) -> Iterator[None]:
    """Turn every exception inside the block into a DataError ``failure (reason); advice``, and silence warnings.

    Decoders raise nearly anything on damaged files, and warn of faults that change no pixel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except QandCError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{failure} ({reason}); {advice}") from None


@dataclass(frozen=True)
class ArrayHeader:
    """Hold what the header of one array declares: ``offset`` is its own length in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Count the bytes of the values, exactly however large."""
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """Read an ``.npz`` file array by array or row by row.

    Args:
        path: the file.
        failure: begins the message if it cannot be read.
        advice: ends it: what to do then.

    Raises:
        DataError: it is no zip file, or no regular one.
    """

    def __init__(self, path: str | Path, failure: str, advice: str) -> None:
        self.path, self.failure, self.advice = Path(path), failure, advice
        with decoding(failure, advice):
            regular_size(self.path)
        with decoding(failure, advice), zipfile.ZipFile(self.path) as archive:
            self.names = tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def header(self, name: str) -> ArrayHeader:
        """Read the header of one array.

        Raises:
            DataError: there is no such array, its header is damaged, or promises more than the file holds.
        """
        with decoding(self.failure, self.advice), zipfile.ZipFile(self.path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed by method {entry.compress_type}; NumPy writes 0 and 8")
            with archive.open(entry) as file:
                start = io.BytesIO(file.read(HEADER_BYTES))
            version = np.lib.format.read_magic(start)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"{name} is of NumPy's format {version}, which is unknown")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(start)
            if min(shape, default=0) < 0:
                raise ValueError(f"{name} is declared as {list(shape)}")
            found = ArrayHeader(name, shape, dtype, fortran, start.tell())
            if not dtype.hasobject and entry.file_size < found.offset + found.nbytes:
                raise self._too_short(found, entry.file_size - found.offset)
            return found

    def read(self, name: str, limit: int = AT_ONCE) -> np.ndarray:
        """Read one whole array.

        Raises:
            DataError: it declares more than ``limit`` bytes, holds objects, or is damaged.
        """
        found = self.header(name)
        if found.dtype.hasobject:
            raise DataError(f"{self.failure} ({name} holds Python objects, which are never loaded); {self.advice}")
        if found.nbytes > limit:
            raise DataError(
                f"{self.failure} ({name} is declared as {list(found.shape)} {found.dtype}: {found.nbytes:,} bytes, of "
                f"which at most {limit:,} are decoded at once); {self.advice}"
            )
        [raw] = self._pieces(found, found.nbytes, 1)
        with decoding(self.failure, self.advice):
            return np.ndarray(found.shape, found.dtype, raw, order="F" if found.fortran else "C")

    def integer(self, name: str) -> int:
        """Read one integer.

        Raises:
            DataError: it is another array, or damaged.
        """
        value = self.read(name)
        if value.shape or value.dtype.kind not in "iu":
            raise DataError(f"{self.failure} ({name} is {list(value.shape)} {value.dtype}, no integer); {self.advice}")
        return int(value)

    def rows(self, found: ArrayHeader, size: int) -> Iterator[np.ndarray]:
        """Read an array in C order, at most ``size`` rows at a time.

        Raises:
            DataError: it is damaged, or ends early.
        """
        one = found.nbytes // found.shape[0]
        for raw in self._pieces(found, one, size):
            yield np.ndarray((len(raw) // one, *found.shape[1:]), found.dtype, raw)

    def _pieces(self, found: ArrayHeader, one: int, size: int) -> Iterator[bytes]:
        """Yield all bytes of an array, ``size`` times ``one`` at a time."""
        with decoding(self.failure, self.advice):
            archive = zipfile.ZipFile(self.path)
        with archive:
            with decoding(self.failure, self.advice):
                file = archive.open(f"{found.name}.npy")
            with file:
                with decoding(self.failure, self.advice):
                    file.read(found.offset)
                for start in range(0, found.nbytes, size * one) if one else (0,):
                    wanted = min(size * one, found.nbytes - start)
                    with decoding(self.failure, self.advice):
                        raw = file.read(wanted)
                    if len(raw) < wanted:
                        raise self._too_short(found, start + len(raw))
                    yield raw

    def _too_short(self, found: ArrayHeader, there: int) -> DataError:
        rows = max(0, there) * max(1, *found.shape[:1]) // max(1, found.nbytes)
        return DataError(
            f"{self.path}: {found.name} ends after {rows} of {found.shape[0] if found.shape else 1} images or rows; "
            "it was cut off, write it again"
        )
