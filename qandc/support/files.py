"""Write files that are whole or not there, read JSON and tensors back with one error, lock directories for one run."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from qandc.errors import ConfigError, OutputError, QandCError

if TYPE_CHECKING:
    import torch

__all__ = [
    "keep_settings",
    "locked",
    "make_directory",
    "read_json",
    "read_tensors",
    "reading",
    "regular_size",
    "write_json",
    "write_whole",
]

logger = logging.getLogger(__name__)

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


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a name beside ``path``, then rename, so that a file under this name is always whole.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged.
    """
    from safetensors import SafetensorError

    partial = path.with_name(f".{uuid.uuid4().hex[:16]}.partial")  # other machines may write beside us
    try:
        write(partial)
        with partial.open("rb") as file:  # a name must not survive a power failure without its contents
            os.fsync(file.fileno())
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


def read_json(
    path: Path,
    what: str,
    advice: str,
    *,
    version: int | None = None,
    names: Iterable[str] = (),
    error: type[QandCError] = ConfigError,
) -> dict[str, Any]:
    """Read a JSON file that this package wrote: an object, at most 64 MiB of UTF-8.

    Args:
        path: the file.
        what: it should be, for messages: "schedule".
        advice: ends the messages: what to do about it.
        version: the one that is known, by default files of this kind have none.
        names: that it must have.
        error: the class of the errors.

    Raises:
        ConfigError: or ``error``: no such file or no regular one, too large, no JSON, no object, nested too deeply, of
            another version, or without one of the names.
    """
    with reading(path, what, advice, error):
        if regular_size(path) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST_JSON).decode())
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
        if _depth(found) > DEEPEST_JSON:
            raise RecursionError
        if version is not None and type(found["version"]) is not int:
            raise ValueError(f"its version is {str(found['version'])[:40]!r}, not an integer")
    if version is not None and found["version"] != version:
        what_to_do = "update qandc" if found["version"] > version else advice
        raise error(f"{str(path)!r} has version {found['version']}, known is {version}; {what_to_do}")
    for name in names:
        if name not in found:
            raise error(f"{str(path)!r} is no {what}: it has no {name!r}; {advice}")
    return found


def _depth(value: Any) -> int:
    """Count how many objects and lists are within each other."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


def read_tensors(
    path: Path, what: str, advice: str, *, error: type[QandCError] = ConfigError
) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file; arguments and errors as :func:`read_json`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with reading(path, what, advice, error):
        regular_size(path)
        try:
            return load_file(path)
        except SafetensorError as cause:
            raise ValueError(str(cause)) from cause


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
    """Long texts are cut to what stands around the first difference."""
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
