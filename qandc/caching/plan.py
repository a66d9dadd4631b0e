"""Say what a step of a run does, by its place in the schedule, and with which features."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from qandc.caching.features import FeatureStore
from qandc.caching.schedule import CacheConfig, forecast_weights
from qandc.errors import CacheError

__all__ = ["Action", "Plan", "Position"]


class Action(enum.Enum):
    """Name what a step does: compute, compute and keep features, reuse them, or decide so behind the first block."""

    COMPUTE = enum.auto()
    STORE = enum.auto()
    REUSE = enum.auto()
    DECIDE = enum.auto()


@dataclass(frozen=True)
class Plan:
    """Say what one step does; whoever has a part in the step reads it here.

    Attributes:
        store: where features of the run are kept.
        at: which of its sets a step that stores writes.
        weights: of each set in the forecast of a step that reuses, ``[S]`` on the device of the latents, or None for
            one set as it is.
        correction: gains and offsets ``[L, K, D]`` of a step that reuses, or None.
        gates: of the branches of each block so far, in a step that reuses.
    """

    action: Action = Action.COMPUTE
    store: FeatureStore | None = None
    at: int = 0
    weights: torch.Tensor | None = None
    correction: tuple[torch.Tensor, torch.Tensor] | None = None
    gates: list[torch.Tensor] = field(default_factory=list)

    @property
    def passes_blocks(self) -> bool:
        """Tell whether no block has a part in the step, nor the gates of its branches."""
        return self.action is Action.REUSE and self.store is not None and not self.store.per_branch

    @property
    def key(self) -> Hashable:
        """Return what a CUDA graph of the step depends on beside its tensors; None before the store has its buffers."""
        if self.store is None or self.action is Action.COMPUTE:
            return (Action.COMPUTE,)
        serial = getattr(self.store, "serial", None)
        return None if serial is None else (self.action, serial, self.at)

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> FeatureStore:
        """Return the store, with buffers made for features ``[L, K, B, tokens, D]`` of one step.

        Raises:
            CacheError: a step that reuses asks for features that no step has stored.
        """
        assert self.store is not None
        if self.store.make(shape, dtype, device) and self.action is Action.REUSE:
            raise CacheError("the cache holds no features of this shape; call reset_all_caches and start again")
        return self.store


@dataclass
class Position:
    """Count the steps of one run, and tell what each does."""

    config: CacheConfig
    step: int = -1
    stored: int = 0
    computed: list[int] = field(default_factory=list)  # steps whose features are kept, newest first

    def advance(self) -> Action:
        """Go on to the next step of the schedule, which must have one."""
        self.step += 1
        if not self.config.planned:
            return Action.DECIDE
        if not self.config.computes(self.step):
            return Action.REUSE
        if not self.config.stores(self.step):
            return Action.COMPUTE
        self.stored += 1
        self.computed = [self.step, *self.computed][: self.config.history]
        return Action.STORE

    @property
    def reused(self) -> int:
        """Return how many steps before this one reuse features."""
        return sum(not self.config.computes(step) for step in range(self.step))

    @property
    def newest(self) -> int:
        """Return the index of the set with the features stored last."""
        return (self.stored - 1) % self.config.history

    def forecast(self) -> tuple[float, ...]:
        """Return a weight for each set, to forecast the features of this step; none where one set is taken as it is."""
        if self.config.history == 1:
            return ()
        weights = [0.0] * self.config.history
        for age, weight in enumerate(forecast_weights(self.computed, self.step, self.config.order, self.config.mode)):
            weights[(self.newest - age) % self.config.history] = weight
        return tuple(weights)
