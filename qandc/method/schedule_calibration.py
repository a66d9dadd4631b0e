"""Find the steps that a feature cache should compute, from the features of the model it will serve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from qandc.caching.compensation import DEFAULT_FORM, DEFAULT_PULL, gain_and_offset
from qandc.caching.schedule import (
    CacheConfig,
    CalibratedSchedule,
    even_schedule,
    forecast_weights,
    optimal_schedule,
    schedule_error,
)
from qandc.errors import ConfigError, DataError
from qandc.method.observation import Observer, Run, observe
from qandc.models import Family, older_names
from qandc.sampling.loop import Guidance, check_sampling, sample_latents, set_timesteps
from qandc.support.arguments import Count, Integers, Model, Scheduler, Seeds, Steps, checked

__all__ = ["calibrate_schedule", "feature_moments", "schedule_for", "schedule_from_run"]

logger = logging.getLogger(__name__)

TOKENS = 8  # of a sample, drawn by chance, at which features are compared
CHANNELS = 4608  # of all branches together, drawn for each: fewer change what is chosen


class StepMoments:
    """Hold means over samples and tokens of what features of S steps have in common, for M channels of all branches.

    Attributes:
        means, products: of f_a ``[S, M]``, and of f_a f_b ``[S, S, M]``, for steps a and b; float64.
        gates: of the square of the gates, ``[S, M]``.
    """

    def __init__(self, means: torch.Tensor, products: torch.Tensor, gates: torch.Tensor) -> None:
        self.means, self.products, self.gates = means, products, gates
        self._truth = (gates * products.diagonal().T).sum(1)  # [S]
        if not torch.isfinite(self._truth).all() or not (self._truth > 0).all():
            raise DataError("features of the blocks are NaN, infinite or all zero; check the weights and the dtype")

    def errors(
        self, computed: Sequence[int], pull: float | None = None, form: str = "least_squares", mode: str = "taylor"
    ) -> np.ndarray:
        """Compute relative errors of the forecasts for all steps after the newest of ``computed``, newest first.

        ``√(Σ gate_j² |a f + b - g|² / Σ gate_j² |g|²)`` with f the forecast of feature g at step j, sums over all
        channels of all branches. Without ``pull`` a is 1 and b 0, else they are those of
        :func:`qandc.caching.compensation.gain_and_offset`: what is left when a compensation corrects the features.
        """
        at, kept, order = torch.arange(computed[0] + 1, len(self.means)), list(computed), len(computed) - 1
        if not len(at):
            return np.zeros(0)
        weights = torch.tensor([forecast_weights(computed, int(j), order, mode) for j in at], dtype=torch.float64)
        f, g = weights @ self.means[kept], self.means[at]
        ff = torch.einsum("ja,abm,jb->jm", weights, self.products[kept][:, kept], weights)
        fg = torch.einsum("ja,ajm->jm", weights, self.products[kept][:, at])
        gg = self.products[at, at]
        if pull is None:
            squares = ff - 2 * fg + gg
        else:
            a, b = gain_and_offset(f, g, ff, gg, fg, form=form, pull=pull)
            squares = a * a * ff + 2 * a * b * f + b * b - 2 * (a * fg + b * g) + gg
        return ((self.gates[at] * squares).sum(1).clamp(min=0) / self._truth[at]).sqrt().numpy()


def _drawn(size: int, most: int, seed: int, device: torch.device) -> torch.Tensor:
    """Draw ``most`` of so many indices; all where there are no more."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:most].to(device)


class _RecordedRun(Run):
    """Hold features ``[L · K, B, tokens, channels]`` and gates ``[L · K, B, channels]`` of each step of a run."""

    def __init__(self, *known_by: Any) -> None:
        super().__init__(*known_by)
        self.features: list[torch.Tensor] = []
        self.gates: list[torch.Tensor] = []


class _Recorder(Observer[_RecordedRun]):
    """Record features and gates at a few tokens and some channels of each branch, the same at all steps."""

    def __init__(self, family: Family, model: Any, per_branch: bool) -> None:
        super().__init__(family, model, per_branch)
        self.count = 0
        self.sums = [torch.zeros(())] * 3  # of what StepMoments holds the means of
        self._of_step: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # channels, features

    def make_run(self, *known_by: Any) -> _RecordedRun:
        return _RecordedRun(*known_by)

    def see(self, layer: int, branch: int, feature: torch.Tensor) -> None:
        (_, tokens, channels), (layers, branches) = feature.shape, self.branches.shape
        each = -(-CHANNELS // (layers * branches))
        found = _drawn(channels, each, layer * branches + branch, feature.device)
        at = _drawn(tokens, TOKENS, 0, feature.device)
        self._of_step[layer, branch] = found, feature[:, at][:, :, found].float()

    def end(self, stream: torch.Tensor) -> None:
        """Note a step, as one tensor: many small ones, among its large temporary ones, would fragment the memory."""
        gates = self.branches.gates()
        channels, features = zip(*(self._of_step[place] for place in sorted(self._of_step)), strict=True)
        of_branches = [torch.ones_like(stream[:, 0])] if gates is None else gates.flatten(0, 1)
        self.run.features.append(torch.stack(features))
        self.run.gates.append(torch.stack([g[:, at].float() for g, at in zip(of_branches, channels, strict=True)]))

    def finish(self, run: _RecordedRun) -> None:
        tokens = run.features[0].shape[2]
        of_branches = []
        for features in torch.stack(run.features, 1).flatten(2, 3):  # [S, B · tokens, channels]
            f = features.double()
            of_branches.append((f.sum(1), torch.einsum("anc,bnc->abc", f, f)))
        sums, products = (torch.cat(found, -1) for found in zip(*of_branches, strict=True))  # [S, M], [S, S, M]
        gates = torch.stack(run.gates).double().square().sum(2).flatten(1) * tokens
        self.count += f.shape[1]
        found = sums, products, gates
        self.sums = [total + more.cpu() for total, more in zip(self.sums, found, strict=True)]


def feature_moments(transformer: Any, run: Callable[[], Any], mode: str) -> tuple[StepMoments, tuple[float, ...]]:
    """Run a model without cache and compare the features of all its steps; return their moments, and the timesteps.

    A step is a call of the model. Modes that keep the same have the same moments.

    Errors: as :func:`schedule_from_run`.
    """
    config = CacheConfig(mode)
    config.check_planned("no schedule can be found for it")
    model = getattr(transformer, "_orig_mod", transformer)
    recorder, timesteps = observe(
        model,
        run,
        lambda family: _Recorder(family, model, config.per_branch),
        known="schedules are found for",
        instead="calibrate the schedule",
    )
    return StepMoments(*(total / recorder.count for total in recorder.sums)), timesteps


@checked
def schedule_from_run(
    transformer: Model,
    run: Callable[[], Any],
    *,
    mode: str = "branch",
    order: int = 1,
    computed_steps: Count,
    compensated: bool = False,
) -> CalibratedSchedule:
    """Choose the ``computed_steps`` steps of a run whose features serve the other steps best.

    ``schedule_from_run(pipe.transformer, lambda: pipe(prompts, num_inference_steps=20), computed_steps=8)``.

    Runs once without cache and compares, for every pair of steps a <= j, what the features of a would add at j (with
    the gates of j) with what is added there. The sum of the relative errors of all reuse steps is minimised by dynamic
    programming, exactly for order 0 and 1, and never to more than that of evenly spaced steps.

    The error is an estimate: as if errors of branches were independent, from some tokens and channels of them instead
    of all, and on a run without cache. It says which schedule to prefer, not how far images will be off.

    Args:
        transformer: quantized as it will be used; not fused yet (fuse it afterwards). An attached cache is paused,
            compiled modules run uncompiled.
        run: draws some images as they will be drawn later, with as many steps, in one run or several.
        mode, order: of the cache, as in :class:`qandc.CacheConfig`.
        computed_steps: how many of the steps, which are calls of the model: a scheduler of second order (Heun) makes
            2 n - 1 for n inference steps.
        compensated: minimise what is left of the errors once :func:`qandc.fit_feature_compensation`, with its
            defaults, corrects the features: for a cache that will have one.

    Raises:
        ConfigError: an unknown mode, fewer computed steps than the order needs, timesteps that rise within a run, or
            runs of different steps.
        ModelError: no such transformer, or it is fused.
        DataError: the transformer did not run, its features are NaN or infinite, or nothing is added at all.
    """
    mode = CacheConfig(mode, order=order).mode  # refuses others before any work
    return _best(*feature_moments(transformer, run, mode), mode, order, computed_steps, compensated)


def schedule_for(
    transformer: Any, run: Callable[[], Any], cache: CacheConfig, compensated: bool = False, uniform: bool = False
) -> CalibratedSchedule:
    """Choose as many steps as a cache with an interval would compute, or those; one that has a schedule keeps it.

    Errors: as :func:`schedule_from_run`.
    """
    moments, timesteps = feature_moments(transformer, run, cache.mode)
    computed = cache.of_steps(len(timesteps))
    if uniform or cache.schedule is not None or all(computed):
        return CalibratedSchedule(computed, timesteps, cache.mode, cache.history - 1)
    return _best(moments, timesteps, cache.mode, cache.order, sum(computed), compensated)


def _best(
    moments: StepMoments, timesteps: tuple[float, ...], mode: str, order: int, computed_steps: int, compensated: bool
) -> CalibratedSchedule:
    order = _check_steps(mode, order, computed_steps, timesteps)
    pull = DEFAULT_PULL[mode] if compensated else None
    errors = partial(moments.errors, pull=pull, form=DEFAULT_FORM[mode], mode=mode)
    even = even_schedule(len(timesteps), computed_steps, order + 1)
    found = optimal_schedule(errors, len(timesteps), computed_steps, order=order, warm_up_steps=order + 1)
    # for order 2 not all schedules were tried
    error, found = min((schedule_error(errors, schedule, order), schedule) for schedule in (even, found))
    result = CalibratedSchedule(found, timesteps, mode, order, error, schedule_error(errors, even, order))
    logger.info("calibrated schedule: error %.4g, evenly spaced %.4g", result.error, result.uniform_error)
    return result


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
    compensated: bool = False,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> CalibratedSchedule:
    """Choose the steps to compute as :func:`schedule_from_run` does, from a run of :func:`qandc.sample_latents`.

    Args:
        transformer, mode, order, compensated: as :func:`schedule_from_run`; a DiT.
        scheduler: of the runs to come.
        conditions: classes of the samples, ``[B]`` integers, a few dozen.
        computed_steps: e.g. ``sum(uniform_schedule(num_inference_steps, 3))``. Counts calls of the model.
        num_inference_steps, guidance_scale, callback: as :func:`qandc.sample_latents`.
        seeds: one per sample; 0, 1, 2, ... by default.

    Raises:
        ConfigError, ModelError, DataError: as :func:`schedule_from_run` and :func:`qandc.sample_latents`.
    """
    conditions = check_sampling(transformer, scheduler, conditions, num_inference_steps, guidance_scale)
    timesteps = set_timesteps(scheduler, num_inference_steps)
    _check_steps(mode, order, computed_steps, timesteps)

    def run() -> None:
        sample_latents(
            transformer,
            scheduler,
            conditions,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seeds=range(len(conditions)) if seeds is None else seeds,
            callback=callback,
        )

    return schedule_from_run(
        transformer, run, mode=mode, order=order, computed_steps=computed_steps, compensated=compensated
    )


def _check_steps(mode: str, order: int, computed_steps: int, timesteps: tuple[float, ...]) -> int:
    """Refuse a schedule that a run of these timesteps can't have; return the order of its forecasts, 0 without."""
    steps = len(timesteps)
    config = CacheConfig(mode, schedule=(True,) * steps, order=order, timesteps=timesteps)
    if not config.history <= computed_steps <= steps:
        raise ConfigError(
            f"computed_steps is {computed_steps}; a cache of mode {mode!r} and {steps} steps, which are calls of the "
            f"model, can compute {config.history} to {steps}"
        )
    return config.history - 1
