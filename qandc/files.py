"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qandc.errors import OutputError

__all__ = ["write_whole"]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a name beside ``path``, then rename, so that a file under this name is always whole.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged.
    """
    from safetensors import SafetensorError

    partial = path.with_name(f".{os.getpid()}.partial")  # not longer than the name itself may be
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the file system
        raise OutputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        partial.unlink(missing_ok=True)
