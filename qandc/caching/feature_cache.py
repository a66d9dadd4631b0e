"""Plan each step of a cached model, from the run that it belongs to and its place in the schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qandc.caching.compensation import FeatureCompensation
from qandc.caching.plan import Action, Plan
from qandc.caching.runs import Run, Runs
from qandc.caching.schedule import CacheConfig
from qandc.errors import CacheError
from qandc.support.arguments import checked
from qandc.support.attach import Attachment

__all__ = ["FeatureCache"]


class FeatureCache(Attachment):
    """Hold the state of one attached feature cache, and hand out a plan for each step.

    A run is known by a tensor that a pipeline makes once per run, of class ids or of what the prompt means; it is over
    when the tensor is gone. Steps are counted; the first step of a run is computed whatever was before. A loop of
    your own passes one tensor to all steps of a run, and another to the next run, or calls :func:`reset_all_caches`
    between them. Two runs may take turns. A tensor that was written to, other latents (shape, dtype, device) or
    timesteps that rise begin a run anew. Timesteps that are not those of ``config.timesteps`` are an error. On a GPU
    nothing waits for timesteps: there a rise is an error too, and both are raised a step or more later, by the next run
    at the latest.

    Memory is one :class:`qandc.caching.features.FeatureStore` per run, made once: one tensor ``[rows, tokens, hidden]``
    for ``delta``, one per branch for ``branch`` (2 a block of DiT, 3 of PixArt), ``order + 1`` times that to forecast;
    two for ``first_block``.

    Attributes:
        config: what it does when.
        compensation: corrects what reuse steps take, or None.
        plan: what the current step does; outside of a step, to compute.
        compute_steps, reuse_steps: how many steps of each kind were taken since the cache was attached or reset.
    """

    @checked
    def __init__(self, config: CacheConfig, compensation: FeatureCompensation | None = None) -> None:
        if compensation is not None:
            compensation.check(config)
            config = compensation.config  # with the timesteps that it was fitted for
        self.config = config
        self.compensation = compensation
        self._in_step = False
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "compensation": self.compensation,
        }  # a copy of the model begins with an empty cache

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget all features, runs and counters, and free their memory, but for that of graphs of whole runs."""
        self.compute_steps = 0
        self.reuse_steps = 0
        self.plan = Plan()
        self._runs = Runs(self.config)
        self._weights: dict[Any, torch.Tensor] = {}
        self._corrections: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Return the bytes of all features that are stored."""
        return sum(store.nbytes for store in self._runs.stores())

    @contextlib.contextmanager
    def step(
        self, latents: torch.Tensor, timestep: Any, key: torch.Tensor | None, mark: torch.Tensor | None = None
    ) -> Iterator[Plan]:
        """Plan one forward of the transformer, which runs inside; all steps of a run share ``key`` and ``mark``.

        An exception, Ctrl-C included, leaves nothing of the run behind.
        """
        if self._in_step:
            raise CacheError(
                "two threads are inside this cached transformer at once, and its features would mix; give each thread "
                "a copy of the model (copy.deepcopy), or a lock"
            )
        self._in_step, run = True, None
        try:
            if not self.paused:
                if timestep is None:
                    raise CacheError("a cached model needs timestep: pass the timestep of this denoising step")
                run = self._runs.of(key, mark, latents)
                self.plan = self._plan(run, timestep, latents.device)
            yield self.plan
        except BaseException:
            if run is not None:
                self._runs.drop(run)
            raise
        finally:
            self._in_step, self.plan = False, Plan()

    @contextlib.contextmanager
    def planned(
        self, weights: torch.Tensor | None, correction: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Iterator[None]:
        """Take these tensors in the place of those of the current plan, inside the block: memory of a CUDA graph."""
        before, self.plan = self.plan, replace(self.plan, weights=weights, correction=correction)
        try:
            yield
        finally:
            self.plan = before

    @torch.no_grad()
    def decide(self, added: torch.Tensor) -> bool:
        """Tell whether to compute the rest of a step, by what its first block adds, and plan it so.

        Waits for the GPU, on all but the first step.
        """
        store, position, threshold = self.plan.store, self._position, self.config.threshold
        assert store is not None
        assert threshold is not None
        if position.stored and store.is_near(added, threshold):
            self.reuse_steps += 1
            self.plan = replace(self.plan, action=Action.REUSE)
            return False
        store.first = added.detach()
        position.stored += 1
        self.compute_steps += 1
        self.plan = replace(self.plan, action=Action.STORE)
        return True

    def _plan(self, run: Run, timestep: Any, device: torch.device) -> Plan:
        if run.watch.rises(run.position.step + 1, torch.as_tensor(timestep).reshape(-1)):
            self._runs.restart(run)
        position, length = run.position, self.config.length
        if length is not None and position.step + 1 >= length:
            raise CacheError(
                f"the cache schedule has {length} steps, and this is one more; give a schedule of the right length, or "
                "call reset_all_caches(transformer) between runs that share one tensor of labels or of the prompt"
            )
        action = position.advance()
        if action is Action.DECIDE:
            self._position = position
            return Plan(action, run.store)
        if action is Action.REUSE:
            self.reuse_steps += 1
            weights = self._on(device, position.forecast())
            return Plan(action, run.store, weights=weights, correction=self._correction(device, position.reused))
        self.compute_steps += 1
        return Plan(action, run.store, position.newest)

    def _on(self, device: torch.device, weights: tuple[float, ...]) -> torch.Tensor | None:
        """Return weights as a device tensor, written by kernels: a copy from the host would synchronise."""
        if not weights:
            return None
        if (device, weights) not in self._weights:
            made = self._weights[device, weights] = torch.empty(len(weights), dtype=torch.float32, device=device)
            for i, weight in enumerate(weights):
                made[i].fill_(weight)
        return self._weights[device, weights]

    def _correction(self, device: torch.device, reused: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return gains and offsets of the reuse step after so many others, from tensors that are copied once."""
        found = self.compensation
        if found is None:
            return None
        if device not in self._corrections:
            with torch.inference_mode(False):
                self._corrections[device] = found.gains.to(device).contiguous(), found.offsets.to(device).contiguous()
        gains, offsets = self._corrections[device]
        return gains[reused], offsets[reused]

    def take_finished(self) -> list[Any]:
        """Detach and return the buffers of finished runs, so that a captured CUDA graph can keep them alive."""
        return [*self._runs.take_finished(), *self._weights.values(), *self._corrections.values()]
