"""Write files that are whole or not there, read JSON and tensors back with one error, lock directories for one run.

A :class:`FileKind` is what this package believes when it reads it: its content has a schema and a checksum.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from filelock import FileLock, Timeout

from qandc.errors import ConfigError, OutputError, QandCError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FileEntry",
    "FileKind",
    "bytes_of",
    "content_digest",
    "keep_settings",
    "locked",
    "make_directory",
    "read_json",
    "reading",
    "regular_size",
    "settle",
    "usual_mode",
    "write_json",
    "write_whole",
]

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

LARGEST_JSON = 1 << 26  # bytes
DEEPEST_JSON = 32  # objects and lists within each other
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of file systems that have none


def usual_mode(directory: Path) -> int:
    """Return the mode that the umask gives a new file of a directory; safetensors would let nobody else read."""
    probe = directory / f".{uuid.uuid4().hex[:16]}.partial"
    probe.touch()
    try:
        return probe.stat().st_mode
    finally:
        probe.unlink()


def settle(path: Path, mode: int) -> None:
    """Give a written file its mode and wait until it is on the disk: a name must not outlive a power failure alone."""
    os.chmod(path, mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a name beside ``path``, then rename, so that a file under this name is always whole.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged.
    """
    from safetensors import SafetensorError

    partial = path.with_name(f".{uuid.uuid4().hex[:16]}.partial")  # other machines may write beside us
    try:
        mode = usual_mode(path.parent)
        write(partial)
        settle(partial, mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the file system
        raise OutputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):  # a name below a file is not there either
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a readable JSON file, as :func:`write_whole` does."""
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def regular_size(path: Path) -> int:
    """Return the bytes of a regular file, without opening it: a FIFO would wait for a writer, a device might not end.

    Raises:
        OSError: there is no such file, or it is a directory, FIFO, device or socket.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'special')}, no regular file")
    return found.st_size


@contextlib.contextmanager
def reading(path: Path, what: str, advice: str, error: type[QandCError] = ConfigError) -> Iterator[None]:
    """Turn what goes wrong inside the block, where a file is read, into one error: ``path is no what: why; advice``.

    Errors of this package pass.
    """
    try:
        yield
    except QandCError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as cause:
        reason: Any = getattr(cause, "strerror", None) or cause
        if isinstance(cause, KeyError):
            reason = f"it has no {cause}"
        elif isinstance(cause, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(cause, UnicodeDecodeError):
            reason = "it is not UTF-8"
        raise error(f"{str(path)!r} is no {what}: {reason}; {advice}") from cause


class _Envelope(msgspec.Struct):
    """Hold what is around the content of a file; ``sha256`` is of the content as it is written, and of the tensors."""

    version: int
    kind: str = ""
    sha256: str = ""
    content: msgspec.Raw = msgspec.Raw()


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold size and SHA-256 of a file, as the manifest of its directory does."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Measure a file.

        Raises:
            OSError: it cannot be read, or is no regular file.
        """
        size, digest = regular_size(path), hashlib.sha256()
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class FileKind(Generic[Content]):
    """Write and read a kind of file: JSON, or tensors with JSON in their header, with its version and a checksum.

    Attributes:
        what: the file is, for messages and in the file: "schedule".
        version: the one that is written and read.
        content: the type that the JSON must have, as msgspec checks it: a Struct, a dataclass, a dictionary.
        advice: ends the messages: what to do about a file that is refused.
        error: the class of the errors.
    """

    what: str
    version: int
    content: type[Content]
    advice: str
    error: type[QandCError] = ConfigError

    def write(self, path: Path, content: Content) -> None:
        """Write a JSON file, whole or not at all."""
        text = self._around(content, {})
        write_whole(path, lambda partial: partial.write_bytes(text + b"\n"))

    def write_tensors(self, path: Path, tensors: Mapping[str, torch.Tensor], content: Content) -> None:
        """Write a safetensors file, whole or not at all; its metadata hold the content."""
        from safetensors.torch import save_file

        # cloned: tensors may share memory, which safetensors refuses
        ours = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": "pt", "qandc": self._around(content, ours).decode()}
        write_whole(path, lambda partial: save_file(ours, partial, metadata))

    def read(self, path: Path) -> Content:
        """Read a JSON file that :meth:`write` wrote.

        Raises:
            ConfigError: or ``error``: no such file or no regular one, more than 64 MiB, no JSON, nested too deeply, of
                another kind or version, changed since it was written, or not of the type of the content.
        """
        with reading(path, self.what, self.advice, self.error):
            envelope = msgspec.json.decode(_read_bytes(path), type=_Envelope)
        return self._checked(path, envelope, {})

    def read_tensors(self, path: Path) -> tuple[dict[str, torch.Tensor], Content]:
        """Read a safetensors file that :meth:`write_tensors` wrote; errors as :meth:`read`."""
        tensors, metadata = self.read_foreign_tensors(path)
        with reading(path, self.what, self.advice, self.error):
            envelope = msgspec.json.decode(metadata.get("qandc", '{"version": 0}'), type=_Envelope)
        return tensors, self._checked(path, envelope, tensors)

    def read_foreign_tensors(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Read tensors and metadata of a safetensors file that others wrote: its checksum is up to the caller."""
        from safetensors import SafetensorError, safe_open

        with reading(path, self.what, self.advice, self.error):
            regular_size(path)
            try:
                with safe_open(path, "pt") as file:
                    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            except SafetensorError as cause:
                raise ValueError(str(cause)) from cause

    def _around(self, content: Content, tensors: Mapping[str, torch.Tensor]) -> bytes:
        body = msgspec.json.format(msgspec.json.encode(content), indent=1)
        digest = content_digest(body, tensors)
        return msgspec.json.encode(_Envelope(self.version, self.what, digest, msgspec.Raw(body)))

    def _checked(self, path: Path, envelope: _Envelope, tensors: Mapping[str, torch.Tensor]) -> Content:
        if envelope.version != self.version:
            what_to_do = "update qandc" if envelope.version > self.version else self.advice
            raise self.error(f"{str(path)!r} has version {envelope.version}, known is {self.version}; {what_to_do}")
        with reading(path, self.what, self.advice, self.error):
            if envelope.kind != self.what:
                raise ValueError(f"it says that it is a {envelope.kind[:40]!r}")
            body = bytes(envelope.content)
            if content_digest(body, tensors) != envelope.sha256:
                raise ValueError("it is not as it was written (checksum)")
            return msgspec.json.decode(body, type=self.content)


def content_digest(body: bytes, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of bytes and of tensors with their names, dtypes and shapes, in whatever order these are."""
    digest = hashlib.sha256(body)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in the order of its elements."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    # a contiguous tensor of one element may have any strides
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data


def _read_bytes(path: Path) -> bytes:
    if regular_size(path) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
    with path.open("rb") as file:
        return file.read(LARGEST_JSON)


def read_json(path: Path, what: str, advice: str, *, names: Iterable[str] = ()) -> dict[str, Any]:
    """Read a JSON file whose content is compared, not believed: an object, at most 64 MiB of UTF-8.

    Args:
        path: the file.
        what: it should be, for messages: "record of settings".
        advice: ends the messages: what to do about it.
        names: that it must have.

    Raises:
        ConfigError: no such file or no regular one, too large, no JSON, no object, nested too deeply, or without one of
            the names.
    """
    with reading(path, what, advice):
        found = json.loads(_read_bytes(path).decode())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
        if _depth(found) > DEEPEST_JSON:
            raise RecursionError
        for name in names:
            if name not in found:
                raise KeyError(name)
    return found


def _depth(value: Any) -> int:
    """Count how many objects and lists are within each other."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


def make_directory(path: Path) -> None:
    """Make a directory with its parents, if it is not there.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {str(path)!r}: {error.strerror or error}") from error


def keep_settings(path: Path, settings: dict[str, Any], what: str) -> None:
    """Note the settings of new work in a JSON file, directory and all; compare them with those of work begun before.

    Raises:
        ConfigError: it was begun with others; the message shows the first difference.
        OutputError: the file cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = read_json(path, "record of settings", "give another directory")
        for name in settings:
            if name not in before:
                raise ConfigError(
                    f"{str(path.parent)!r} holds {what} of another version of qandc: {path.name} has no {name!r} (give "
                    "another directory)"
                )
            if before[name] != settings[name]:
                theirs, ours = _where_they_differ(str(before[name]), str(settings[name]))
                raise ConfigError(
                    f"{str(path.parent)!r} holds {what} of {name} {theirs}; this one would have {ours} (give another "
                    "directory, or the same settings)"
                )
        return
    make_directory(path.parent)
    write_json(path, settings)


def _where_they_differ(*texts: str) -> tuple[str, ...]:
    """Cut long texts to what stands around the first difference."""
    different = (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    first = max(0, next(different, 0) - 20)
    parts = [text[first : first + 60] if len(text) > 60 else text for text in texts]
    return tuple(
        f"{'...' if first and part is not text else ''}{part}{'...' if first + 60 < len(text) else ''}"
        for part, text in zip(parts, texts, strict=True)
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``; the operating system releases it when the process exits.

    Raises:
        OutputError: another run holds it, or it cannot be written.
    """
    directory = path.parent
    make_directory(directory)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"another run is writing to {str(directory)!r}; wait for its end, or give another directory"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", errno.ENOSYS) not in WITHOUT_LOCKS:
            raise OutputError(f"cannot write to {str(directory)!r}: {reason}") from error
        logger.warning("%s cannot be locked (%s): nothing keeps a second run out", path, reason)
    try:
        yield
    finally:
        lock.release()
