"""Locks of directories, and what reads the JSON files of this package."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from qandc.errors import OutputError
from qandc.support.files import locked

ROOT = Path(__file__).parents[1]


def test_a_lock_is_free_again_however_its_run_ends(tmp_path):
    path = tmp_path / "run" / ".lock"
    code = f"""
import pathlib, sys
from qandc.support.files import locked
with locked(pathlib.Path({str(path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputError, match=r"another run is writing to '.*run'; wait for its end, or give"),
            locked(path),
        ):
            pass
        other.kill()
        other.wait()
    for _ in range(2):
        with locked(path):
            pass
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path):
        pass


def test_a_lock_without_fcntl(tmp_path):
    """As on systems that are not POSIX: the package can be imported, and a second run is kept out."""
    code = f"""
import sys, warnings
sys.modules["fcntl"] = None
import pathlib, qandc
from qandc.support.files import locked
warnings.simplefilter("ignore")
path = pathlib.Path({str(tmp_path / ".lock")!r})
with locked(path):
    try:
        with locked(path):
            print("two at once")
    except qandc.OutputError as error:
        print(error)
with locked(path):
    print("free again")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("another run is writing to")
    assert second == "free again"


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"), locked(tmp_path / "file" / "below" / ".lock"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write to"), locked(tmp_path / "folder"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / ".lock"):
        pass
    assert "cannot be locked (No locks available): nothing keeps a second run out" in caplog.text
