"""Record trajectories of a model; fit variance compensation along them, for our loop and for any pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from qandc.cache import check_planned
from qandc.errors import ConfigError, DataError
from qandc.models import older_names
from qandc.sampling.corrected_scheduler import run_with
from qandc.sampling.loop import Guidance, check_sampling, describe_run, sample_latents, set_timesteps
from qandc.support.arguments import Integers, Pipeline, Scheduler, Seed, Seeds, Share, Steps, check_fields, checked
from qandc.variance_compensation import FORMS, Compensation, FittedFor, channels_first, compensate

__all__ = [
    "Trajectory",
    "compensation_from_run",
    "fit_compensation",
    "record_trajectory",
    "trajectory_from_run",
]


@older_names
@dataclass(frozen=True)
class Trajectory:
    """Hold what a model made of some noise, step by step.

    Attributes:
        samples: the latents after each step, ``[S, B, C, H, W] float32``, of other pipelines as they have them; S
            counts calls of the model.
        noises: the guided predictions of noise or velocity, likewise.
        conditions, seeds: of the run, to repeat it with another model; empty of a run of a pipeline.
        num_inference_steps, guidance_scale: of the run.
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
        of_run = len(shape) in (4, 5, 6) and images == len(self.seeds) == 0
        of_images = len(shape) == 5 and images == len(self.seeds) == shape[1]
        if self.noises.shape != shape or not (of_run or of_images):
            raise DataError(
                "a trajectory is samples and noises [S, B, C, H, W] with B class ids and seeds, or without any; got "
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
        self.noises.append(_kept(noise_pred))
        return noise_pred

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        self.samples.append(_kept(latents))
        return latents

    def trajectory(self, *of_run: Any) -> Trajectory:
        """Return what was kept, with the other fields of a trajectory."""
        return Trajectory(torch.stack(self.samples), torch.stack(self.noises), *of_run)


def _kept(x: torch.Tensor) -> torch.Tensor:
    return x.to("cpu", torch.float32, copy=True)


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
    of all steps, on the CPU.
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
    return recorder.trajectory(conditions, seeds, num_inference_steps, guidance_scale)


@checked
def trajectory_from_run(pipe: Annotated[Any, Pipeline], run: Callable[[], Any]) -> Trajectory:
    """Keep every step of a run of a pipeline: the reference of :func:`compensation_from_run`, before it is quantized.

    ``trajectory_from_run(pipe, lambda: pipe(prompts, generator=[torch.Generator().manual_seed(i) for i in seeds]))``.

    Args:
        pipe: any pipeline of diffusers. While it runs its scheduler is one that keeps what it is given and returns.
        run: draws all images in one call of the pipeline, from noise that is the same each time.

    Raises:
        ConfigError: it calls the pipeline more than once.
        DataError: it does not, or predictions or latents are NaN or infinite.
    """
    recorder = _Recorder()
    run_with(pipe, run, recorder)
    return recorder.trajectory((), (), len(recorder.samples), _guidance_of(pipe))


def _guidance_of(pipe: Any) -> float:
    """Return the guidance scale of the last run of a pipeline; 1 where it tells none."""
    scale = getattr(pipe, "guidance_scale", None)
    return 1.0 if scale is None else float(scale)


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
        reference = self.reference[step].to(x.device)
        if reference.shape != x.shape:
            raise DataError(
                f"the reference has latents {list(reference.shape)}, this run {list(x.shape)}; draw the same"
            )
        reference, first = channels_first(reference), channels_first(x)
        mean = first.double().transpose(0, 1).flatten(1).mean(1)
        gain = torch.ones_like(mean)
        if step >= self.start_step:
            gain += (1 - self.shrinkage) * (self.form(reference, first, mean) - 1)
        self.gains.append(gain.float())
        self.means.append(mean.float())
        return channels_first(compensate(first, self.gains[-1], self.means[-1]))

    def noise(self, step: int, noise_pred: torch.Tensor) -> torch.Tensor:
        return self._fit(step, noise_pred) if self.target == "noise" else noise_pred

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        return self._fit(step, latents) if self.target == "sample" else latents

    def compensation(self, form: str, run: Mapping[str, Any]) -> Compensation:
        """Return what was found, for runs that are described so."""
        gain, mean = torch.stack(self.gains).cpu(), torch.stack(self.means).cpu()
        if not torch.isfinite(gain).all():
            raise DataError(
                "a gain is not finite: at some step a channel of the samples does not vary; check the model"
            )
        return Compensation(gain, mean, self.target, form, FittedFor(**run))


def _fitter(
    transformer: Any, reference: Trajectory, form: str, target: str, start_step: int, shrinkage: float
) -> _Fitter:
    """Make what finds gains along a run, or refuse its settings with a ConfigError."""
    check_planned(transformer, "its samples cannot be compensated")
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    if target not in ("sample", "noise"):
        raise ConfigError(f"target {target!r} is unknown; choose sample or noise")
    steps = len(reference.samples)
    if not 0 <= start_step < steps:
        raise ConfigError(f"start_step is {start_step!r}; the run has steps 0 to {steps - 1}")
    return _Fitter(reference, target, FORMS[form], start_step, shrinkage)


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
    fitter, steps = _fitter(transformer, reference, form, target, start_step, shrinkage), len(reference.samples)
    check_sampling(
        transformer, scheduler, reference.conditions, reference.num_inference_steps, reference.guidance_scale
    )
    calls = len(set_timesteps(scheduler, reference.num_inference_steps))
    if calls != steps:
        raise ConfigError(
            f"the reference has {steps} steps, but with this scheduler a run of num_inference_steps "
            f"{reference.num_inference_steps} has {calls} (calls of the model); record it with the same scheduler"
        )
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
    return fitter.compensation(form, describe_run(transformer, scheduler, reference.guidance_scale))


@checked
def compensation_from_run(
    pipe: Annotated[Any, Pipeline],
    run: Callable[[], Any],
    reference: Trajectory,
    *,
    form: str = "least_squares",
    target: str = "sample",
    start_step: int = 0,
    shrinkage: Share = 0.0,
) -> Compensation:
    """Find the gain of every step along a run of a pipeline, as :func:`fit_compensation` does along our own loop.

    Gains are those of channels: the last dimension of packed tokens ``[B, tokens, C]``, else the second.
    ``pipe.scheduler = compensated_scheduler(pipe.scheduler, found)`` applies them.

    Args:
        pipe: the pipeline as it will be used, its transformer quantized and its cache attached.
        run: what ``reference`` was recorded with.
        reference: of the unquantized model without a cache (:func:`trajectory_from_run`); some dozens of images.
        form, start_step, shrinkage: as :func:`fit_compensation`.
        target: ``sample`` (VC), or ``noise``, the guided prediction of noise or velocity.

    Raises:
        ConfigError: a value is not one of these, the run has other steps than the reference, or calls the pipeline
            more than once.
        DataError: the run does not call the pipeline, has other latents, or a gain is not finite.
    """
    fitter = _fitter(pipe.transformer, reference, form, target, start_step, shrinkage)
    scheduler = run_with(pipe, run, fitter, len(reference.samples))
    return fitter.compensation(form, describe_run(pipe.transformer, scheduler, _guidance_of(pipe)))
