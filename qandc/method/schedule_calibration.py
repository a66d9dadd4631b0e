"""Finding the steps that a feature cache should compute, from the features of the model it will serve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qandc.caching.schedule import CacheConfig, CalibratedSchedule, optimal_schedule, schedule_error
from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.fuse import is_fused
from qandc.models import Family, family_of, older_names
from qandc.models.family import arguments_of
from qandc.sampling.loop import Guidance, check_sampling, sample_latents, set_timesteps
from qandc.support.arguments import Count, Integers, Model, Scheduler, Seeds, Steps, checked
from qandc.support.attach import eager, paused

__all__ = ["calibrate_schedule", "feature_gram"]

logger = logging.getLogger(__name__)

POSITIONS = 512  # places (token, channel) of a sample at which features are compared


class _Recorder:
    """Records features and gates of every step at a few places, the same in all steps and blocks.

    What a feature adds is its product with the gate, place by place, so errors at these places estimate those at all.
    """

    def __init__(self, family: Family, blocks: Sequence[Any], mode: str, seed: int) -> None:
        self.family, self.mode, self.seed = family, mode, seed
        self.features: list[torch.Tensor] = []  # [S] of [L · K, B, P]
        self.gates: list[torch.Tensor] = []
        self._of_step: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
        self._input: torch.Tensor | None = None
        if mode == "block":
            handles = [blocks[0].register_forward_pre_hook(self._enter), blocks[-1].register_forward_hook(self._leave)]
        else:
            handles = [blocks[0].register_forward_pre_hook(self._begin)]
            for block in blocks:
                handles.append(block.register_forward_pre_hook(self._gate, with_kwargs=True))
                handles += [getattr(block, name).register_forward_hook(self._feature) for name in family.branches]
        self.handles = handles

    def _at(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, P]`` of ``[B, tokens, D]``."""
        if self._places is None:
            generator = torch.Generator().manual_seed(self.seed)
            tokens, channels = (torch.randint(n, (POSITIONS,), generator=generator) for n in x.shape[1:])
            self._places = tokens.to(x.device), channels.to(x.device)
        return x[:, self._places[0], self._places[1]].float()

    def _begin(self, block: Any, args: Any) -> None:
        self._end()
        self._at(args[0])

    def _end(self) -> None:
        """One tensor for a step: many small ones, kept among its large temporary ones, would fragment the memory."""
        features, gates = self._of_step
        if features:
            self.features.append(torch.stack(features))
            self.gates.append(torch.stack(gates))
        self._of_step = [], []

    def _enter(self, block: Any, args: Any) -> None:
        self._input = args[0].clone()

    def _leave(self, block: Any, args: Any, output: torch.Tensor) -> None:
        assert self._input is not None
        self.features.append(self._at(output - self._input)[None])
        self.gates.append(torch.ones_like(self.features[-1]))

    def _gate(self, block: Any, args: Any, kwargs: Any) -> None:
        assert self._places is not None
        for gate in self.family.gates(block, arguments_of(block, args, kwargs)):
            self._of_step[1].append(gate[:, self._places[1]].float())

    def _feature(self, branch: Any, args: Any, output: torch.Tensor) -> None:
        self._of_step[0].append(self._at(output))

    def gram(self) -> np.ndarray:
        """``[S, S, S]`` as :func:`qandc.schedule.forecast_errors` takes it."""
        self._end()
        features = torch.stack(self.features)  # [S, L · K, B, P]
        found = []
        for gates in self.gates:
            contributions = torch.einsum("slbp,lbp->sbp", features, gates).flatten(1).double()
            found.append((contributions @ contributions.t()).cpu().numpy())
        return np.stack(found)


def feature_gram(
    transformer: Model,
    scheduler: Scheduler,
    conditions: Integers,
    *,
    mode: str,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> np.ndarray:
    """Sample without cache and compare, for all steps a, b and j, what the features of a and b add at step j.

    Arguments, errors: as :func:`calibrate_schedule`. ``[S, S, S] float64``, S being calls of the model, as
    :func:`qandc.schedule.optimal_schedule` takes it; modes "branch" and "taylor" have the same.
    """
    if is_fused(transformer):
        raise ModelError("the features of a fused transformer cannot be seen; calibrate the schedule before fuse")
    conditions = check_sampling(transformer, scheduler, conditions, num_inference_steps, guidance_scale)
    with paused(transformer), eager():
        family = family_of(transformer)
        assert family is not None  # as only DiT can be sampled here
        recorder = _Recorder(family, list(transformer.transformer_blocks), mode, seed=0)
        try:
            sample_latents(
                transformer,
                scheduler,
                conditions,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seeds=range(len(conditions)) if seeds is None else seeds,
                callback=callback,
            )
        finally:
            for handle in recorder.handles:
                handle.remove()
    gram = recorder.gram()
    if not np.isfinite(gram).all() or not (np.einsum("jjj->j", gram) > 0).all():
        raise DataError("features of the blocks are NaN, infinite or all zero; check the weights and the dtype")
    return gram


@older_names
@checked
def calibrate_schedule(
    transformer: Model,
    scheduler: Scheduler,
    conditions: Integers,
    *,
    mode: str = "branch",
    order: int = 1,
    computed_steps: Count,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> CalibratedSchedule:
    """Choose the ``computed_steps`` steps whose features serve the others best.

    Samples once without cache and compares, for every pair of steps a <= j, what the features of a would add at j (with
    the gates of j) with what is added there. The sum of the relative errors of all reuse steps is minimised by dynamic
    programming, exactly for order 0 and 1, and never to more than that of evenly spaced steps.

    The error is an estimate: from 512 places of each feature instead of all; of the branches apart, whose errors may
    cancel in the sum that reaches the next step (with ``block`` of that sum); and on a run without cache. It says which
    schedule to prefer, not how far images will be off.

    Args:
        transformer: a DiT, quantized as it will be used; not fused yet (fuse it afterwards). An attached cache is
            paused, compiled modules run uncompiled.
        scheduler: of the runs to come.
        conditions: classes of the samples, ``[B]`` integers, a few dozen.
        mode, order: of the cache, as in :class:`qandc.CacheConfig`.
        computed_steps: e.g. ``sum(uniform_schedule(num_inference_steps, 3))``. Counts calls of the model, as the
            schedule does: a scheduler of second order (Heun) makes 2 n - 1 for n inference steps.
        num_inference_steps, guidance_scale, callback: as :func:`qandc.sample_latents`.
        seeds: one per sample; 0, 1, 2, ... by default.

    Raises:
        ConfigError: an unknown mode, fewer computed steps than the order needs, timesteps that rise within the run, or
            as :func:`qandc.sample_latents`.
        ModelError: the transformer is fused.
        DataError: features are NaN or infinite, or nothing is added at all.
    """
    check_sampling(transformer, scheduler, conditions, num_inference_steps, guidance_scale)
    timesteps = set_timesteps(scheduler, num_inference_steps)
    steps = len(timesteps)
    config = CacheConfig(mode, schedule=(True,) * steps, order=order, timesteps=timesteps)
    order = config.history - 1
    if not config.history <= computed_steps <= steps:
        raise ConfigError(
            f"computed_steps is {computed_steps}; a cache of mode {mode!r} and {steps} steps can compute "
            f"{config.history} to {steps} (calls of the model; num_inference_steps is {num_inference_steps})"
        )
    gram = feature_gram(
        transformer,
        scheduler,
        conditions,
        mode=mode,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seeds=seeds,
        callback=callback,
    )
    even = _evenly(steps, computed_steps, order + 1)
    found = optimal_schedule(gram, computed_steps, order=order, warm_up_steps=order + 1)
    # for order 2 not all schedules were tried
    found = min(found, even, key=lambda schedule: schedule_error(gram, schedule, order))
    result = CalibratedSchedule(
        found, timesteps, mode, order, schedule_error(gram, found, order), schedule_error(gram, even, order)
    )
    logger.info("calibrated schedule: error %.4g, evenly spaced %.4g", result.error, result.uniform_error)
    return result


def _evenly(steps: int, computed: int, warm_up: int) -> tuple[bool, ...]:
    """Space as many computed steps as evenly as can be."""
    if computed == steps:
        return (True,) * steps
    chosen = set(range(warm_up)) | {
        warm_up - 1 + round(i * (steps - warm_up) / (computed - warm_up + 1)) for i in range(1, computed - warm_up + 1)
    }
    return tuple(step in chosen for step in range(steps))
