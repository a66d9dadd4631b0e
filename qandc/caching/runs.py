"""Tell which denoising run a step belongs to, by a tensor that all steps of the run share."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qandc.caching.features import FeatureStore
from qandc.caching.plan import Position
from qandc.caching.schedule import CacheConfig
from qandc.caching.timestep_watch import TimestepWatch

__all__ = ["Run", "Runs", "weakly"]

logger = logging.getLogger(__name__)

LIVE_RUNS = 2  # a run and one that is interleaved with it


def weakly(tensor: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
    """Return a function that gives the tensor for as long as somebody else holds it, then None."""
    return (lambda: None) if tensor is None else weakref.ref(tensor)


@dataclass(eq=False)  # a run is itself alone
class Run:
    """Hold one denoising run so far. It lasts as long as its key and the shape of its latents."""

    key: Any  # a weak reference to the tensor that all steps of the run share, or None where there is none
    mark: Callable[[], torch.Tensor | None]  # gives a second such tensor, of models whose first is the user's own
    kind: tuple[Any, ...]  # version of that tensor; shape, dtype and device of the latents
    position: Position
    watch: TimestepWatch
    store: FeatureStore
    left: bool = False  # it was over, and its memory stayed, when another began

    def is_over(self) -> bool:
        """Tell whether nobody holds the tensor of this run any more."""
        return self.key is not None and self.key() is None

    def is_of(self, key: torch.Tensor | None) -> bool:
        """Tell whether ``key`` is the tensor of this run."""
        return key is None if self.key is None else self.key() is key is not None


class Runs:
    """Keep the runs that are going on, and the memory of those that are over until another takes it."""

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._runs: list[Run] = []  # the one used last at the end
        self._said: set[str] = set()

    def of(self, key: torch.Tensor | None, mark: torch.Tensor | None, latents: torch.Tensor) -> Run:
        """Return the run that a step belongs to, a new one if there is none."""
        version = None if key is None or key.is_inference() else key._version  # writing to the tensor changes it
        kind = (version, latents.shape, latents.dtype, latents.device)
        for run in self._runs:
            if run.is_of(key):
                self._runs.remove(run)
                self._runs.append(run)
                if run.kind != kind or run.mark() is not mark:
                    self.restart(run)
                    run.kind, run.mark, run.watch = kind, weakly(mark), TimestepWatch(self._config.timesteps)
                return run
        store = self._free(kind) or FeatureStore(self._config)
        known_by = None if key is None else weakref.ref(key)
        run = Run(known_by, weakly(mark), kind, Position(self._config), TimestepWatch(self._config.timesteps), store)
        self._runs.append(run)
        return run

    def _free(self, kind: tuple[Any, ...]) -> FeatureStore | None:
        """Return memory that serves a new run, of one that is over or of the oldest of too many.

        That of others that are over stays for a run that takes turns with this one, until a run is over that did not.
        """
        free = [run for run in self._runs if run.is_over()]
        if not free and len(self._runs) >= LIVE_RUNS:
            free = self._runs[:1]
            logger.info("a run at step %d is given up: features of %d are kept", free[0].position.step, LIVE_RUNS)
        if free and free[-1].position.step == 0 and self._config.stores(0):
            self._say(
                "the feature cache begins a run anew because the model was given another tensor of labels or of the "
                "prompt than in the steps before; if this is a denoising loop of your own, make it once and pass the "
                "same tensor to every step (conditional and unconditional rows in one batch), or nothing is ever reused"
            )
        ended = [run for run in free if not run.left] or free
        serves = next((run for run in ended if run.kind[1:] == kind[1:]), None)
        for run in free:
            run.left = serves is not None and run in ended and run is not serves
            if not run.left:
                self._runs.remove(run)
        for run in free:
            if run.is_over():
                self._note_length(run)
            run.watch.settle()
        return None if serves is None else serves.store

    def restart(self, run: Run) -> None:
        """Let the next step of a run be its first."""
        self._note_length(run)
        run.position = Position(self._config)

    def drop(self, run: Run) -> None:
        """Forget a run and its features."""
        self._runs = [other for other in self._runs if other is not run]

    def stores(self) -> list[FeatureStore]:
        """List the memory of all runs, of those that are over too."""
        return [run.store for run in self._runs]

    def take_finished(self) -> list[FeatureStore]:
        """Forget the runs that are over and return their buffers."""
        over = [run for run in self._runs if run.is_over()]
        self._runs = [run for run in self._runs if not run.is_over()]
        return [run.store for run in over]

    def _note_length(self, run: Run) -> None:
        """Warn of a run that ended early: without timesteps nothing else tells that its schedule is too long."""
        length, taken = self._config.length, run.position.step + 1
        if length is not None and 1 < taken < length:
            self._say(
                f"the feature cache has a schedule of {length} steps, but a run ended after {taken}; unless it was "
                f"interrupted, give a schedule for {taken} steps, or an interval"
            )

    def _say(self, warning: str) -> None:
        """Log a warning once."""
        if warning not in self._said:
            self._said.add(warning)
            logger.warning(warning)
