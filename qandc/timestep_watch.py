"""Notices that timesteps rise, which they never do within a denoising run, without waiting for the GPU."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from qandc.errors import CacheError

__all__ = ["TimestepWatch"]


class TimestepWatch:
    """Compares the timesteps of successive steps: at once on the CPU, on a GPU when they have arrived from there."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._on_the_way: deque[tuple[torch.Tensor, Any]] = deque()

    def rises(self, timestep: torch.Tensor) -> bool:
        """Note the timesteps ``[B]`` of a step; whether a row rises. Those on a GPU are compared by later calls.

        Raises:
            CacheError: timesteps that came from a GPU rise.
        """
        if not timestep.is_cuda:
            return self._compare(timestep.detach().clone())
        while self._on_the_way and self._on_the_way[0][1].query():
            if self._compare(self._on_the_way.popleft()[0]):
                raise CacheError(
                    "timesteps rose within one run, so features of another run were reused since; give every run a "
                    "class_labels tensor of its own, or call reset_all_caches(transformer) before each"
                )
        if not torch.cuda.is_current_stream_capturing():
            copy = torch.empty(timestep.shape, dtype=timestep.dtype, pin_memory=True)
            copy.copy_(timestep, non_blocking=True)
            self._on_the_way.append((copy, torch.cuda.current_stream(timestep.device).record_event()))
        return False

    def _compare(self, timestep: torch.Tensor) -> bool:
        last, self._last = self._last, timestep
        return last is not None and last.shape == timestep.shape and bool((timestep > last).any())
