"""Notice that timesteps begin anew, or are not those of a schedule, without waiting for the GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from qandc.caching.schedule import SAME_TIMESTEP
from qandc.errors import CacheError

__all__ = ["TimestepWatch"]

HALF = (torch.float16, torch.bfloat16)


class TimestepWatch:
    """Compare the timesteps of the steps of one run: at once on the CPU, on a GPU when they have arrived from there.

    Args:
        expected: the timestep of each step, where a schedule says it.
    """

    def __init__(self, expected: Sequence[float] | None = None) -> None:
        self._expected = expected
        self._last: torch.Tensor | None = None
        self._on_the_way: deque[tuple[int, torch.Tensor, Any]] = deque()

    def rises(self, step: int, timestep: torch.Tensor) -> bool:
        """Note the timesteps ``[B]`` of a step and tell whether this step is the first of a run.

        It is if a row rises, or if all are as on the first step: then a run that ended there is followed by another.
        Half precision rounds two to one, and is left out. Whole numbers may be alike where steps are many: on a CPU
        such a run computes one step more. Those on a GPU are compared by later calls.

        Raises:
            CacheError: a timestep is not the one expected, or those that came from a GPU begin anew.
        """
        if not timestep.is_cuda:
            return self._compare(step, timestep.detach().clone(), timestep.dtype not in HALF)
        self.settle()
        if not torch.cuda.is_current_stream_capturing():
            copy = torch.empty(timestep.shape, dtype=timestep.dtype, pin_memory=True)
            copy.copy_(timestep, non_blocking=True)
            self._on_the_way.append((step, copy, torch.cuda.current_stream(timestep.device).record_event()))
        return False

    def settle(self) -> None:
        """Compare the timesteps that have arrived from a GPU since.

        Raises:
            CacheError: as :meth:`rises`.
        """
        while self._on_the_way and self._on_the_way[0][2].query():
            step, timestep, _ = self._on_the_way.popleft()
            if self._compare(step, timestep, timestep.dtype in (torch.float32, torch.float64)):
                raise CacheError(
                    "timesteps began anew within one run, so features of another run were reused since; give every run "
                    "a tensor of labels or of the prompt of its own, or call reset_all_caches(transformer) before each"
                )

    def _compare(self, step: int, timestep: torch.Tensor, exact: bool) -> bool:
        last, self._last = self._last, timestep
        rises = False
        if last is not None and (last.shape == timestep.shape or 1 in (last.numel(), timestep.numel())):
            twice = exact and step == 1 and (self._expected is None or len({*self._expected[:2]}) > 1)
            rises = bool((timestep > last).any()) or (twice and bool((timestep == last).all()))
        if rises:
            step = 0
        if self._expected is not None and step < len(self._expected):
            expected = self._expected[step]
            # models are often called in half precision, timestep included
            rounded = torch.finfo(timestep.dtype).eps / 2 if timestep.is_floating_point() else 0.0
            off = timestep[(timestep.double() - expected).abs() > max(rounded, SAME_TIMESTEP) * abs(expected)]
            if off.numel():
                raise CacheError(
                    f"the cache schedule is for a run of {len(self._expected)} steps, with step {step + 1} at timestep "
                    f"{expected:g}; this run has it at {off[0].item():g}, so it is a run of another number of steps or "
                    "of another scheduler: calibrate a schedule for it, or give an interval"
                )
        return rises
