"""Correct predictions and latents in the scheduler of a pipeline, which knows nothing of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qandc.errors import ConfigError, DataError
from qandc.sampling.loop import Corrector, check_gains, plain_timestep, timesteps_of
from qandc.support.arguments import Scheduler, checked
from qandc.support.attach import attach
from qandc.variance_compensation import Compensation, channels_first

__all__ = ["check_uncorrected", "compensated_scheduler", "run_with"]

STEPS = "_qandc_steps"


@dataclass
class _Steps:
    """Hold what corrects the steps of a scheduler, and how far its run is."""

    corrector: Corrector
    timesteps: tuple[float, ...] = ()
    following: int = 0  # the step to come

    def begin(self, timesteps: tuple[float, ...]) -> None:
        """Begin a run with these timesteps, one for each step."""
        self.timesteps, self.following = timesteps, 0

    def look(self, sample: torch.Tensor) -> None:
        """Refuse latents that cannot be corrected."""

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


@dataclass
class _Compensated(_Steps):
    forced: bool = False

    def begin(self, timesteps: tuple[float, ...]) -> None:
        compensation: Any = self.corrector
        if not self.forced:
            compensation.check({"timesteps": timesteps})
        check_gains(compensation, len(timesteps), compensation.gain.shape[1])
        super().begin(timesteps)

    def look(self, sample: torch.Tensor) -> None:
        compensation: Any = self.corrector
        check_gains(compensation, len(self.timesteps), channels_first(sample).shape[1])


@dataclass
class _Once(_Steps):
    expected: int | None = None

    def begin(self, timesteps: tuple[float, ...]) -> None:
        if self.following:
            raise ConfigError("the pipeline was called more than once; draw all images in one call, as one batch")
        if self.expected not in (None, len(timesteps)):
            raise ConfigError(
                f"the reference has {self.expected} steps, and this run {len(timesteps)} (calls of the model); record "
                "it with the same run"
            )
        super().begin(timesteps)


class _CorrectedScheduler:
    """Correct steps. Methods keep their signatures: pipelines look what they take, and give no more."""

    @property
    def set_timesteps(self) -> Callable[..., None]:
        original = super().set_timesteps  # type: ignore[misc]

        @functools.wraps(original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            getattr(self, STEPS).begin(timesteps_of(self))

        return set_timesteps

    @property
    def step(self) -> Callable[..., Any]:
        original, steps = super().step, getattr(self, STEPS)  # type: ignore[misc]

        @functools.wraps(original)
        def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            number = steps.step_at(plain_timestep(timestep))
            steps.look(sample)
            output = original(steps.corrector.noise(number, model_output), timestep, sample, *args, **kwargs)
            if isinstance(output, tuple):
                return (steps.corrector.sample(number, output[0]), *output[1:])
            output.prev_sample = steps.corrector.sample(number, output.prev_sample)
            return output

        return step


def check_uncorrected(scheduler: Any) -> None:
    """Refuse, with a ConfigError, a scheduler that corrects its steps already: it has one corrector."""
    if STEPS in vars(scheduler):
        name = type(scheduler).__name__
        raise ConfigError(
            f"this {name} is compensated already; give the one that it was made from, or "
            f"{name}.from_config(scheduler.config)"
        )


def _corrected(scheduler: Any, steps: _Steps) -> Any:
    check_uncorrected(scheduler)
    found = copy.deepcopy(scheduler)
    attach(found, _CorrectedScheduler, **{STEPS: steps})
    return found


def run_with(pipe: Any, run: Callable[[], Any], corrector: Corrector, steps: int | None = None) -> Any:
    """Call ``run`` while the scheduler of a pipeline has a corrector; return the scheduler that took its one run.

    Raises:
        ConfigError: its scheduler is compensated already, or the pipeline is called more than once, or has another
            number of steps than ``steps``.
        DataError: it is not called.
    """
    scheduler, once = pipe.scheduler, _Once(corrector, expected=steps)
    corrected = pipe.scheduler = _corrected(scheduler, once)
    try:
        with torch.no_grad():
            run()
    finally:
        pipe.scheduler = scheduler
    if once.following < len(once.timesteps) or not once.timesteps:
        taken = f"took {once.following} of {len(once.timesteps)} steps"
        raise DataError(f"the function {taken} of this {type(pipe).__name__}; give one that draws with it, from noise")
    return corrected


@checked
def compensated_scheduler(scheduler: Scheduler, compensation: Compensation, *, force: bool = False) -> Any:
    """Copy ``scheduler``, to one whose steps apply ``compensation``: ``pipe.scheduler = compensated_scheduler(...)``.

    A scheduler does not see the model nor its guidance scale; that they are those of the fit is up to the caller here
    (``qandc.sample_latents(compensation=...)`` checks them).

    Raises:
        ConfigError: another scheduler, or, when the run begins, other timesteps than those of the fit; unless forced.
            Forced or not, one that is compensated already; when the run begins, more steps than there are gains; in
            its first step, other channels.
    """
    name = type(scheduler).__name__
    if not force:
        compensation.check({"scheduler": name})
    return _corrected(scheduler, _Compensated(compensation, forced=force))
