"""The state of a feature cache: which run a step belongs to, what it does, and where its features are kept."""

from __future__ import annotations

import contextlib
import enum
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qandc.caching.features import FeatureStore
from qandc.caching.schedule import CacheConfig, forecast_weights
from qandc.caching.timestep_watch import TimestepWatch
from qandc.errors import CacheError
from qandc.support.arguments import checked
from qandc.support.attach import Attachment

__all__ = ["TARGET", "Action", "FeatureCache", "Plan"]

logger = logging.getLogger(__name__)

TARGET = "_qandc_target"  # where a branch writes its output
LIVE_RUNS = 2  # a run and one that is interleaved with it


class Action(enum.Enum):
    """Name what a step does: compute, compute and keep features, or reuse them."""

    COMPUTE = enum.auto()
    STORE = enum.auto()
    REUSE = enum.auto()


@dataclass(eq=False)  # a run is itself alone
class _Run:
    """The steps of one denoising run so far. It lasts as long as its key and the shape of its latents."""

    key: Any  # a weak reference to the tensor that all steps of the run share, or None where there is none
    version: int | None
    signature: tuple[Any, ...]
    watch: TimestepWatch
    step: int = -1
    stored: int = 0
    computed: list[int] = field(default_factory=list)  # steps whose features are kept, newest first
    store: FeatureStore | None = None

    def is_over(self) -> bool:
        return self.key is not None and self.key() is None

    def is_of(self, key: torch.Tensor | None) -> bool:
        return key is None if self.key is None else self.key() is key is not None


@dataclass(frozen=True)
class Plan:
    """Say what the current step does."""

    action: Action = Action.COMPUTE
    at: int = 0  # which set of features a compute step writes
    weights: tuple[float, ...] = ()  # of each set in a forecast; empty for one set as it is


class FeatureCache(Attachment):
    """State of one attached cache.

    A run is known by a tensor that a pipeline makes once per run, ``class_labels`` or ``encoder_hidden_states``; it is
    over when the tensor is gone. Steps are counted; the first step of a run is computed whatever was before. A loop of
    your own passes one tensor to all steps of a run, and another to the next run, or calls :func:`reset_all_caches`
    between them. Two runs may take turns. A tensor that was written to, other latents (shape, dtype, device) or
    timesteps that rise begin a run anew. Timesteps that are not those of ``config.timesteps`` are an error. On a GPU
    nothing waits for timesteps: there a rise is an error too, and both are raised a step or more later, by the next run
    at the latest.

    Memory is one :class:`qandc.features.FeatureStore` per run, made once: one tensor ``[rows, tokens, hidden]`` for
    ``block``, one per branch for ``branch`` (2 a block of DiT, 3 of PixArt), ``order + 1`` per branch for ``taylor``.

    Attributes:
        config: what it does when.
        compute_steps, reuse_steps: how many steps of each kind were taken since the cache was attached or reset.
    """

    @checked
    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.active = False  # inside a forward of the transformer
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}  # a copy of the model begins with an empty cache

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]

    def reset(self) -> None:
        """Forget all features, runs and counters, and free their memory, but for that of graphs of whole runs."""
        self.compute_steps = 0
        self.reuse_steps = 0
        self.plan = Plan()
        self._runs: list[_Run] = []  # the one used last at the end
        self._weights: dict[Any, torch.Tensor] = {}
        self._said: set[str] = set()
        self._leave()

    def _leave(self) -> None:
        self._run: _Run | None = None
        self._family: Any = None
        self._blocks: list[Any] = []
        self._input: torch.Tensor | None = None
        self._aimed = False

    @property
    def nbytes(self) -> int:
        """Memory of all features that are kept."""
        return sum(run.store.nbytes for run in self._runs if run.store is not None)

    @contextlib.contextmanager
    def step(
        self, family: Any, blocks: list[Any], hidden_states: torch.Tensor, timestep: Any, key: torch.Tensor | None
    ) -> Iterator[None]:
        """Run one forward of the transformer inside; an exception, Ctrl-C included, leaves nothing of its run behind.

        Args:
            family: what is known of the model (:class:`qandc.models.Family`).
            key: what all steps of a run share.
        """
        if self.active:
            raise CacheError(
                "two threads are inside this cached transformer at once, and its features would mix; give each thread "
                "a copy of the model (copy.deepcopy), or a lock"
            )
        self.active = True
        try:
            if not self.paused:
                self._family, self._blocks = family, blocks
                self._begin(hidden_states, timestep, key)
            yield
        except BaseException:
            if self._run in self._runs:
                self._runs.remove(self._run)
            raise
        finally:
            if self._aimed:
                self._aim(None)
            self.active, self.plan = False, Plan()
            self._leave()

    def _begin(self, hidden_states: torch.Tensor, timestep: Any, key: torch.Tensor | None) -> None:
        """Decide what this step does."""
        if timestep is None:
            raise CacheError("a cached model needs timestep: pass the timestep of this denoising step")
        signature = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        run = self._run = self._run_of(signature, key)
        timestep = torch.as_tensor(timestep).reshape(-1)
        if run.watch.rises(timestep):
            self._restart(run)
        run.step += 1
        if self.config.length is not None and run.step >= self.config.length:
            raise CacheError(
                f"the cache schedule has {self.config.length} steps, and this is one more; give a schedule of the "
                "right length, or call reset_all_caches(transformer) between runs that share one "
                f"{self._family.run_key} tensor"
            )
        if not self.config.computes(run.step):
            self.reuse_steps += 1
            self.plan = Plan(Action.REUSE, weights=self._forecast(run))
            return
        self.compute_steps += 1
        if self.config.stores(run.step):
            self.plan = Plan(Action.STORE, at=run.stored % self.config.history)
            run.stored += 1
            run.computed = [run.step, *run.computed][: self.config.history]

    def _run_of(self, signature: tuple[Any, ...], key: torch.Tensor | None) -> _Run:
        """The run that this step belongs to, a new one if there is none."""
        version = None if key is None or key.is_inference() else key._version  # writing to the tensor changes it
        for run in self._runs:
            if run.is_of(key):
                self._runs.remove(run)
                self._runs.append(run)
                if (run.version, run.signature) != (version, signature):
                    self._restart(run)
                    run.version, run.signature, run.watch = version, signature, TimestepWatch(self.config.timesteps)
                return run
        free = [run for run in self._runs if run.is_over()]
        if not free and len(self._runs) >= LIVE_RUNS:
            free = self._runs[:1]
            logger.info("a run at step %d is given up: features of %d are kept", free[0].step, LIVE_RUNS)
        if free and free[-1].step == 0 and self.config.stores(0):
            self._say(
                f"the feature cache begins a run anew because {self._family.run_key} is another tensor than in the "
                "steps before; if this is a denoising loop of your own, make it once and pass the same tensor to every "
                "step (conditional and unconditional rows in one batch), or nothing is ever reused"
            )
        reusable = next((run.store for run in free if run.signature == signature), None)
        for run in free:
            self._runs.remove(run)
        for run in free:
            if run.is_over():
                self._note_length(run)
            run.watch.settle()
        known_by = None if key is None else weakref.ref(key)
        watch = TimestepWatch(self.config.timesteps)
        self._runs.append(_Run(known_by, version, signature, watch, store=reusable))
        return self._runs[-1]

    def _restart(self, run: _Run) -> None:
        self._note_length(run)
        run.step, run.stored, run.computed = -1, 0, []

    def _note_length(self, run: _Run) -> None:
        """Warn of a run that ended early: without timesteps nothing else tells that its schedule is too long."""
        length, taken = self.config.length, run.step + 1
        if length is not None and 1 < taken < length:
            self._say(
                f"the feature cache has a schedule of {length} steps, but a run ended after {taken}; unless it was "
                f"interrupted, give a schedule for {taken} steps, or an interval"
            )

    def _say(self, warning: str) -> None:
        """Once for each warning."""
        if warning not in self._said:
            self._said.add(warning)
            logger.warning(warning)

    def _forecast(self, run: _Run) -> tuple[float, ...]:
        if self.config.mode != "taylor":
            return ()
        weights = [0.0] * self.config.history
        for age, weight in enumerate(forecast_weights(run.computed, run.step, self.config.order)):
            weights[(run.stored - 1 - age) % self.config.history] = weight
        return tuple(weights)

    def weights(self, device: torch.device) -> torch.Tensor | None:
        """Those of the current plan on a device, filled in there: a copy from the processor would wait."""
        if not self.plan.weights:
            return None
        key = (device, self.plan.weights)
        if key not in self._weights:
            with torch.inference_mode(False):
                made = torch.empty(len(self.plan.weights), dtype=torch.float32, device=device)
                for i, weight in enumerate(self.plan.weights):
                    made[i].fill_(weight)
            self._weights[key] = made
        return self._weights[key]

    def store(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> FeatureStore:
        """Buffers for the features of the current run, ``shape`` being ``[rows, tokens, hidden]``.

        Raises:
            CacheError: a reuse step asks for features that no compute step has kept.
        """
        run = self._run
        assert run is not None
        if run.store is None or run.store.made_for != (shape, dtype, device):
            if self.plan.action is Action.REUSE:
                raise CacheError("the cache holds no features of this shape; call reset_all_caches and start again")
            layers, branches = len(self._blocks), len(self._family.branches)
            if self.config.mode == "block":
                layers = branches = 1
            run.store = None  # its memory first
            run.store = FeatureStore(
                self.config.history, layers, branches, shape, dtype, device, self.config.storage_dtype
            )
        return run.store

    def hand_over(self) -> list[Any]:
        """The memory that runs which are over have used: no later run will, but a captured graph of one may go on."""
        over = [run for run in self._runs if run.is_over()]
        self._runs = [run for run in self._runs if not run.is_over()]
        return [run.store for run in over] + list(self._weights.values())

    # what the modules below do with it

    def _aim(self, store: FeatureStore | None) -> None:
        """Let every branch write its output to its place in ``store``, or none."""
        self._aimed = store is not None
        for layer, block in enumerate(self._blocks):
            for branch, name in enumerate(self._family.branches):
                target = None if store is None else store.target(self.plan.at, layer, branch)
                getattr(block, name).__dict__[TARGET] = target

    def first_block_input(self, x: torch.Tensor) -> None:
        """Get ready to store what a compute step makes of ``x``."""
        if self.plan.action is Action.STORE:
            store = self.store(tuple(x.shape), x.dtype, x.device)
            if self.config.mode == "block":
                self._input = x
            else:
                self._aim(store)

    def last_block_output(self, x: torch.Tensor) -> None:
        if self._input is not None:
            store = self.store(tuple(x.shape), x.dtype, x.device)
            store.target(0, 0, 0).store_(x - self._input)

    @torch.no_grad()
    def reuse(self, x: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
        """Return what all blocks together make of ``x`` on a reuse step; ``call`` is what the first block is given."""
        store = self.store(tuple(x.shape), x.dtype, x.device)
        if self.config.mode == "block":
            return store.add_to(x)
        gates = torch.stack([self._family.gates(block, call) for block in self._blocks])  # [L, branches, B, D]
        return store.add_to(x, gates, self.weights(x.device))
