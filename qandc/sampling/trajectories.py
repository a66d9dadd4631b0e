"""Record trajectories of a model; fit variance compensation along them, for our loop and for any pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qandc.errors import ConfigError, DataError
from qandc.models import older_names
from qandc.sampling.loop import (
    Guidance,
    check_gains,
    check_sampling,
    describe_run,
    plain_timestep,
    sample_latents,
    set_timesteps,
    timesteps_of,
)
from qandc.support.arguments import Integers, Scheduler, Seed, Seeds, Share, Steps, check_fields, checked
from qandc.support.attach import attach
from qandc.variance_compensation import FORMS, Compensation, FittedFor, compensate, least_squares

__all__ = ["Trajectory", "compensated_scheduler", "fit_compensation", "record_trajectory"]

COMPENSATION = "_qandc_compensation"


@older_names
@dataclass(frozen=True)
class Trajectory:
    """Hold what a model made of some noise, step by step.

    Attributes:
        samples: the latents after each step, ``[S, B, C, H, W] float32``; S counts calls of the model.
        noises: the guided noise predictions, likewise.
        conditions, seeds, num_inference_steps, guidance_scale: of the run, to repeat it with another model.
    """

    samples: torch.Tensor
    noises: torch.Tensor
    conditions: tuple[int, ...]
    seeds: tuple[Seed, ...]
    num_inference_steps: Steps
    guidance_scale: Guidance

    def __post_init__(self) -> None:
        check_fields(self)
        shape, images = tuple(self.samples.shape), len(self.conditions)
        if len(shape) != 5 or self.noises.shape != shape or not images == len(self.seeds) == shape[1]:
            raise DataError(
                "a trajectory is samples and noises [S, B, C, H, W] with B class ids and seeds; got "
                f"{list(shape)}, {list(self.noises.shape)}, {images} and {len(self.seeds)}"
            )
        for name in ("samples", "noises"):
            values = getattr(self, name)
            if not values.is_floating_point() or not torch.isfinite(values).all():
                raise DataError(f"{name} of a trajectory must be finite floating-point numbers; record it anew")


class _Recorder:
    """Keep what a run computes and change nothing, as its corrector."""

    def __init__(self) -> None:
        self.samples: list[torch.Tensor] = []
        self.noises: list[torch.Tensor] = []

    def noise(self, step: int, noise_pred: torch.Tensor) -> torch.Tensor:
        self.noises.append(noise_pred.clone())
        return noise_pred

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        self.samples.append(latents.clone())
        return latents


@older_names
@checked
def record_trajectory(
    transformer: nn.Module,
    scheduler: Scheduler,
    conditions: Integers,
    *,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> Trajectory:
    """Sample, and keep every step: the reference of :func:`fit_compensation`, taken before the model is quantized.

    Arguments and errors: as :func:`qandc.sample_latents`; seeds are 0, 1, 2, ... by default. Memory: twice the latents
    of all steps, on the device of the model.
    """
    conditions = check_sampling(transformer, scheduler, conditions, num_inference_steps, guidance_scale)
    seeds = tuple(range(len(conditions)) if seeds is None else seeds)
    recorder = _Recorder()
    sample_latents(
        transformer,
        scheduler,
        conditions,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seeds=seeds,
        corrector=recorder,
        callback=callback,
    )
    return Trajectory(
        torch.stack(recorder.samples),
        torch.stack(recorder.noises),
        tuple(conditions),
        seeds,
        num_inference_steps,
        guidance_scale,
    )


class _Fitter:
    """Find the gain of each step, as a corrector, just before it is applied, so that later ones see its effect."""

    def __init__(
        self, reference: Trajectory, target: str, form: Callable[..., torch.Tensor], start_step: int, shrinkage: float
    ) -> None:
        self.target, self.form = target, form
        self.reference = reference.samples if target == "sample" else reference.noises
        self.start_step, self.shrinkage = start_step, shrinkage
        self.gains: list[torch.Tensor] = []
        self.means: list[torch.Tensor] = []

    def _fit(self, step: int, x: torch.Tensor) -> torch.Tensor:
        mean = x.double().transpose(0, 1).flatten(1).mean(1)
        gain = torch.ones_like(mean)
        if step >= self.start_step:
            gain += (1 - self.shrinkage) * (self.form(self.reference[step], x, mean) - 1)
        self.gains.append(gain.float())
        self.means.append(mean.float())
        return compensate(x, self.gains[-1], self.means[-1])

    def noise(self, step: int, noise_pred: torch.Tensor) -> torch.Tensor:
        return self._fit(step, noise_pred) if self.target == "noise" else noise_pred

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        return self._fit(step, latents) if self.target == "sample" else latents


@checked
def fit_compensation(
    reference: Trajectory,
    transformer: nn.Module,
    scheduler: Scheduler,
    *,
    form: str = "least_squares",
    target: str = "sample",
    start_step: int = 0,
    shrinkage: Share = 0.0,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> Compensation:
    """Run the quantized, cached model from the noise of ``reference`` and find the gain of every step on the way.

    The gain of a step is found on samples that all earlier gains have corrected already, and applied before the run
    goes on: gains that were found on an uncorrected run would correct one deviation many times over.

    Args:
        reference: of the unquantized model without a cache (:func:`record_trajectory`); some hundred samples.
        transformer: the model as it will be used, with its cache attached.
        scheduler: of the runs to come.
        form: ``least_squares``, ``variance_ratio`` (Eq. 9) or ``paper`` (Eq. 12 as printed)
            (:mod:`qandc.variance_compensation`).
        target: ``sample`` (VC), or ``noise``, the guided prediction (as TAC does, Yao et al. 2024, arXiv 2407.03917).
        start_step: first step that is corrected, counted in calls of the model; the paper corrects the later part of a
            run.
        shrinkage: 0 to 1; how far gains are drawn towards 1.

    Raises:
        ConfigError: a value is not one of these, or the scheduler takes another number of steps than the reference has.
        DataError: a gain is not finite: a channel does not vary at some step.
    """
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    if target not in ("sample", "noise"):
        raise ConfigError(f"target {target!r} is unknown; choose sample or noise")
    steps = len(reference.samples)
    if not 0 <= start_step < steps:
        raise ConfigError(f"start_step is {start_step!r}; the run has steps 0 to {steps - 1}")
    check_sampling(
        transformer, scheduler, reference.conditions, reference.num_inference_steps, reference.guidance_scale
    )
    calls = len(set_timesteps(scheduler, reference.num_inference_steps))
    if calls != steps:
        raise ConfigError(
            f"the reference has {steps} steps, but with this scheduler a run of num_inference_steps "
            f"{reference.num_inference_steps} has {calls} (calls of the model); record it with the same scheduler"
        )
    fitter = _Fitter(reference, target, FORMS.get(form, least_squares), start_step, shrinkage)
    sample_latents(
        transformer,
        scheduler,
        reference.conditions,
        num_inference_steps=reference.num_inference_steps,
        guidance_scale=reference.guidance_scale,
        seeds=reference.seeds,
        corrector=fitter,
        callback=callback,
    )
    gain, mean = torch.stack(fitter.gains).cpu(), torch.stack(fitter.means).cpu()
    if not torch.isfinite(gain).all():
        raise DataError("a gain is not finite: at some step a channel of the samples does not vary; check the model")
    run = describe_run(transformer, scheduler, reference.guidance_scale)
    return Compensation(gain, mean, target, form, FittedFor(**run))


@dataclass
class _Applied:
    """Hold what is applied to the steps of a scheduler, and how far its run is."""

    compensation: Compensation
    forced: bool
    timesteps: tuple[float, ...] = ()
    following: int = 0  # the step to come

    def begin(self, timesteps: tuple[float, ...]) -> None:
        """Begin a run with these timesteps, one for each step."""
        if not self.forced:
            self.compensation.check({"timesteps": timesteps})
        check_gains(self.compensation, len(timesteps), self.compensation.gain.shape[1])
        self.timesteps, self.following = timesteps, 0

    def step_at(self, timestep: float) -> int:
        """Return which step has this timestep, the one to come if it has, and go on to the next."""
        steps = self.timesteps
        if timestep not in steps:
            known = f"the {len(steps)} of this run, {steps[0]:g} to {steps[-1]:g}" if steps else "a run; none has begun"
            raise ConfigError(
                f"timestep {timestep:g} is none of {known}: call set_timesteps, and give one of scheduler.timesteps"
            )
        # the second order has a timestep twice
        step = steps.index(timestep, self.following if timestep in steps[self.following :] else 0)
        self.following = step + 1
        return step


class _CompensatedScheduler:
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        getattr(self, COMPENSATION).begin(timesteps_of(self))

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        applied: _Applied = getattr(self, COMPENSATION)
        compensation, step = applied.compensation, applied.step_at(plain_timestep(timestep))
        check_gains(compensation, len(applied.timesteps), sample.shape[1])
        output = super().step(compensation.noise(step, model_output), timestep, sample, *args, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple):
            return (compensation.sample(step, output[0]), *output[1:])
        output.prev_sample = compensation.sample(step, output.prev_sample)
        return output


@checked
def compensated_scheduler(scheduler: Scheduler, compensation: Compensation, *, force: bool = False) -> Any:
    """Copy ``scheduler``, to one whose steps apply ``compensation``: ``pipe.scheduler = compensated_scheduler(...)``.

    A scheduler does not see the model nor its guidance scale; that they are those of the fit is up to the caller here
    (``qandc.sample_latents(compensation=...)`` checks them).

    Raises:
        ConfigError: another scheduler, or, when the run begins, other timesteps than those of the fit; unless forced.
            Forced or not, when the run begins, more steps than there are gains; in its first step, other channels.
    """
    name = type(scheduler).__name__
    if not force:
        compensation.check({"scheduler": name})
    found = copy.deepcopy(scheduler)
    attach(found, _CompensatedScheduler, **{COMPENSATION: _Applied(compensation, force)})
    return found
