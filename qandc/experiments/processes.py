"""Share one run among the processes of ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported in a group it keeps it, and the process can abort at its exit

from qandc.errors import ConfigError, ProcessError

__all__ = ["Processes", "finish_on_terminate"]

logger = logging.getLogger(__name__)

LONGEST_WAIT = datetime.timedelta(days=2)  # the others wait while the first one calibrates


@dataclass(frozen=True)
class Processes:
    """Identify this process among ``count``; alone by default.

    Attributes:
        rank: number of this process, from 0; the main process, 0, calibrates, merges and scores.
        local_rank: the same on this machine: the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Give this process a GPU of its own where the device names none."""
        if device.type != "cuda" or device.index is not None or self.count == 1 or torch.cuda.device_count() == 1:
            return device  # the only one that is visible is its own
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.local_rank} of this machine has no GPU of its own, torch sees "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        return torch.device("cuda", self.local_rank)

    def barrier(self, what: str) -> None:
        """Wait until every process is here.

        Raises:
            ProcessError: one of them has ended.
        """
        if self.count == 1:
            return
        try:
            dist.monitored_barrier(timeout=LONGEST_WAIT)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ProcessError(
                f"a process ended before {what} was finished; its own message says why. What is written stays: run the "
                f"same command again ({reason})"
            ) from error

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Processes]:
        """Join the process group of torchrun (RANK, WORLD_SIZE, LOCAL_RANK; gloo); a single process if they are unset.

        Raises:
            ConfigError: the variables are no numbers.
            ProcessError: the others cannot be reached.
        """
        try:
            count = int(os.environ.get("WORLD_SIZE", 1))
            rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        except ValueError as error:
            raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}; use torchrun") from None
        if count == 1:
            yield cls()
            return
        try:
            dist.init_process_group("gloo", timeout=LONGEST_WAIT, rank=rank, world_size=count)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"process {rank} of {count} cannot reach the others ({error}); use torchrun") from error
        try:
            yield cls(rank, count, local_rank)
        finally:
            dist.destroy_process_group()


@contextmanager
def finish_on_terminate() -> Iterator[Callable[[], bool]]:
    """Defer SIGTERM inside the block; yields a function that says whether it was received.

    ``torchrun`` sends it to all processes when one has ended, half a minute before it kills them. Python lets the main
    thread alone handle signals: in another one SIGTERM does what it did before, and the function says False. So it does
    where a handler was installed outside of Python, which could not be put back. The reason is logged.
    """
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        came = True

    reason = None
    if threading.current_thread() is not threading.main_thread():
        reason = "only the main thread can handle signals"
    elif signal.getsignal(signal.SIGTERM) is None:
        reason = "its handler was not installed by Python"
    if reason is not None:
        logger.info("SIGTERM is not deferred: %s", reason)
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
