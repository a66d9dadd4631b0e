"""Files that are whole or not there, and directories that belong to one run."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qandc.errors import ConfigError, OutputError

__all__ = ["keep_settings", "locked", "make_directory", "write_json", "write_whole"]

logger = logging.getLogger(__name__)

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


def make_directory(path: Path) -> None:
    """With its parents, if it is not there.

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
        try:
            before = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{str(path)!r} cannot be read ({error}); give another directory") from error
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
