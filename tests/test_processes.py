"""Test that processes defer SIGTERM, in the main thread and outside of it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qandc.experiments.processes import finish_on_terminate


class EndedError(Exception):
    """Raised by the handler of the tests."""


@pytest.fixture
def handler():
    """A handler of SIGTERM that was there before."""

    def end(number, frame):
        raise EndedError

    before = signal.signal(signal.SIGTERM, end)
    yield end
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_deferred_inside_the_block_only(handler):
    with finish_on_terminate() as told_to_end:
        assert not told_to_end()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told_to_end()
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(EndedError):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_handler_is_put_back_after_an_exception(handler):
    with pytest.raises(KeyError), finish_on_terminate():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is handler


def test_outside_of_the_main_thread_nothing_is_deferred(handler, caplog):
    found = []

    def work():
        with finish_on_terminate() as told_to_end:
            found.extend([signal.getsignal(signal.SIGTERM), told_to_end()])

    with caplog.at_level(logging.INFO, "qandc"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [handler, False]
    assert "only the main thread can handle signals" in caplog.text


def test_a_handler_that_python_cannot_put_back_stays(handler, caplog, monkeypatch):
    """Leave a handler that was not set from Python: getsignal gives None for it, which signal.signal refuses."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with caplog.at_level(logging.INFO, "qandc"), finish_on_terminate() as told_to_end:
        with pytest.raises(EndedError):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not told_to_end()
    assert "not installed by Python" in caplog.text


LEAVE_A_GROUP = """
import sys
from pathlib import Path
from qandc.experiments.processes import Processes
with Processes.joined() as processes:
    processes.barrier("this")
    import torch._dynamo  # as torch.compile does, and an optimizer
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
sys.exit(f"still running: {names}" if any("gloo" in name for name in names) else 0)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads are read from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """Leave no thread that takes the interpreter's lock while it ends: that aborts the process after its work."""
    script = tmp_path / "script.py"
    script.write_text(LEAVE_A_GROUP)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
