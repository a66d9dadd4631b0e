"""Find the steps that a feature cache should compute, from the features of the model it will serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qandc.caching.schedule import CacheConfig, CalibratedSchedule, even_schedule, optimal_schedule, schedule_error
from qandc.errors import ConfigError, DataError
from qandc.method.observation import observe
from qandc.models import Family, older_names
from qandc.models.family import Block, arguments_of, image_part
from qandc.sampling.loop import Guidance, check_sampling, plain_timestep, sample_latents, set_timesteps
from qandc.support.arguments import Count, Integers, Model, Scheduler, Seeds, Steps, checked

__all__ = ["calibrate_schedule", "feature_gram", "schedule_from_run"]

logger = logging.getLogger(__name__)

POSITIONS = 512  # places (token, channel) of a sample at which features are compared


class _RecordedRun:
    """Hold features and gates of one run at the recorded places, a step each."""

    def __init__(self, key: Any) -> None:
        self.key = key  # kept, so that no other tensor gets its id
        self.timesteps: list[float] = []
        self.features: list[torch.Tensor] = []  # [S] of [L · K, B, P]
        self.gates: list[torch.Tensor] = []

    def gram(self) -> np.ndarray:
        features, found = torch.stack(self.features), []  # [S, L · K, B, P]
        for gates in self.gates:
            contributions = torch.einsum("slbp,lbp->sbp", features, gates).flatten(1).double()
            found.append((contributions @ contributions.t()).cpu().numpy())
        return np.stack(found)


class _Recorder:
    """Record features and gates of every step at a few places, the same in all steps and blocks.

    What a feature adds is its product with the gate, place by place, so errors at these places estimate those at all.
    Runs are told apart by the tensor that a cache knows them by.
    """

    def __init__(self, family: Family, transformer: Any, mode: str, seed: int) -> None:
        self.family, self.seed = family, seed
        self.runs: dict[int, _RecordedRun] = {}
        self._of_step: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        self._shape: torch.Size | None = None
        self._places: tuple[torch.Tensor, ...] = ()
        self._input: torch.Tensor | None = None
        blocks, _ = family.blocks(transformer)
        handles = [transformer.register_forward_hook(self._end, with_kwargs=True)]
        handles.append(blocks[0].module.register_forward_pre_hook(self._begin(blocks[0]), with_kwargs=True))
        if mode == "delta":
            handles.append(blocks[-1].module.register_forward_hook(self._leave))
        else:
            for block in blocks:
                handles.append(block.module.register_forward_pre_hook(self._gate(block), with_kwargs=True))
                handles += [getattr(block.module, n).register_forward_hook(self._feature) for n in block.places]
        self.handles = handles

    def _at(self, x: torch.Tensor) -> torch.Tensor:
        """Return the recorded places ``[B, P]`` of ``x [B, tokens, D]``."""
        if self._shape != x.shape[1:]:  # of the first step, or of a run at another resolution
            self._shape = x.shape[1:]
            generator = torch.Generator().manual_seed(self.seed)
            tokens, channels = (torch.randint(n, (POSITIONS,), generator=generator) for n in x.shape[1:])
            self._places = tokens.to(x.device), channels.to(x.device)
        return x[:, self._places[0], self._places[1]].float()

    def _begin(self, block: Block) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            self._of_step = [], []
            self._input = self._at(block.stream(arguments_of(module, args, kwargs)))

        return note

    def _leave(self, block: Any, args: Any, output: Any) -> None:
        assert self._input is not None
        self._of_step[0].append(self._at(output[-1] if isinstance(output, tuple) else output) - self._input)
        self._of_step[1].append(torch.ones_like(self._input))

    def _gate(self, block: Block) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            for gate in block.stack.gates(module, arguments_of(module, args, kwargs)):
                self._of_step[1].append(gate[:, self._places[1]].float())

        return note

    def _feature(self, branch: Any, args: Any, output: Any) -> None:
        assert self._shape is not None
        self._of_step[0].append(self._at(image_part(output, self._shape[0])))

    def _end(self, transformer: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note a step, as one tensor: many small ones, among its large temporary ones, would fragment the memory."""
        call = arguments_of(transformer, args, kwargs)
        key = call.get(self.family.run_key)
        run = self.runs.setdefault(id(key), _RecordedRun(key))
        run.timesteps.append(plain_timestep(torch.as_tensor(call["timestep"]).reshape(-1)[0]))
        run.features.append(torch.stack(self._of_step[0]))
        run.gates.append(torch.stack(self._of_step[1]))


def feature_gram(transformer: Any, run: Callable[[], Any], mode: str) -> tuple[np.ndarray, tuple[float, ...]]:
    """Run a model without cache and compare, for all steps a, b and j, what the features of a and b add at step j.

    Errors: as :func:`schedule_from_run`.

    Returns:
        ``[S, S, S] float64``, the sum over all runs, S being calls of the model, as
        :func:`qandc.schedule.optimal_schedule` takes it; modes "branch" and "taylor" have the same. The timesteps.
    """
    model = getattr(transformer, "_orig_mod", transformer)
    recorder, timesteps = observe(
        model,
        run,
        lambda family: _Recorder(family, model, CacheConfig(mode).mode, seed=0),
        known="schedules are found for",
        instead="calibrate the schedule",
    )
    gram = np.sum([found.gram() for found in recorder.runs.values()], axis=0)
    if not np.isfinite(gram).all() or not (np.einsum("jjj->j", gram) > 0).all():
        raise DataError("features of the blocks are NaN, infinite or all zero; check the weights and the dtype")
    return gram, timesteps


@checked
def schedule_from_run(
    transformer: Model, run: Callable[[], Any], *, mode: str = "branch", order: int = 1, computed_steps: Count
) -> CalibratedSchedule:
    """Choose the ``computed_steps`` steps of a run whose features serve the other steps best.

    ``schedule_from_run(pipe.transformer, lambda: pipe(prompts, num_inference_steps=20), computed_steps=8)``.

    Runs once without cache and compares, for every pair of steps a <= j, what the features of a would add at j (with
    the gates of j) with what is added there. The sum of the relative errors of all reuse steps is minimised by dynamic
    programming, exactly for order 0 and 1, and never to more than that of evenly spaced steps.

    The error is an estimate: of the sum of what all branches add, from 512 places of it instead of all, and on a run
    without cache. It says which schedule to prefer, not how far images will be off.

    Args:
        transformer: DiT or PixArt, quantized as it will be used; not fused yet (fuse it afterwards). An attached cache
            is paused, compiled modules run uncompiled.
        run: draws some images as they will be drawn later, with as many steps, in one run or several.
        mode, order: of the cache, as in :class:`qandc.CacheConfig`.
        computed_steps: how many of the steps, which are calls of the model: a scheduler of second order (Heun) makes
            2 n - 1 for n inference steps.

    Raises:
        ConfigError: an unknown mode, fewer computed steps than the order needs, timesteps that rise within a run, or
            runs of different steps.
        ModelError: no such transformer, or it is fused.
        DataError: the transformer did not run, its features are NaN or infinite, or nothing is added at all.
    """
    mode = CacheConfig(mode, order=order).mode  # refuses others before any work
    gram, timesteps = feature_gram(transformer, run, mode)
    order = _check_steps(mode, order, computed_steps, timesteps)
    even = even_schedule(len(timesteps), computed_steps, order + 1)
    found = optimal_schedule(gram, computed_steps, order=order, warm_up_steps=order + 1)
    # for order 2 not all schedules were tried
    found = min(found, even, key=lambda schedule: schedule_error(gram, schedule, order))
    result = CalibratedSchedule(
        found, timesteps, mode, order, schedule_error(gram, found, order), schedule_error(gram, even, order)
    )
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
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> CalibratedSchedule:
    """Choose the steps to compute as :func:`schedule_from_run` does, from a run of :func:`qandc.sample_latents`.

    Args:
        transformer, mode, order: as :func:`schedule_from_run`; a DiT.
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

    return schedule_from_run(transformer, run, mode=mode, order=order, computed_steps=computed_steps)


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
