"""Variance compensation along runs of pipelines: known gains of flow matching, any latents, unmodified pipelines."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from qandc import (
    CacheConfig,
    ConfigError,
    DataError,
    apply_cache,
    compensated_scheduler,
    compensation_from_run,
    quantize_model,
    trajectory_from_run,
)
from qandc.variance_compensation import FittedFor, epsilon_scaling
from tests.conftest import make_dit
from tests.test_families import pipeline  # noqa: F401  (a fixture)

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SHAPES = {"packed": (64, 20, 4), "image": (64, 4, 5, 4), "video": (64, 4, 2, 3, 3)}
GAIN = torch.tensor([0.8, 0.95, 1.0, 1.2])


def per_channel(values, shape):
    """Shape values of channels for latents: the last dimension of packed tokens, else the second."""
    return values if len(shape) == 3 else values.view(-1, *[1] * (len(shape) - 2))


def mean_of(x):
    return x.mean([i for i in range(x.ndim) if i != (2 if x.ndim == 3 else 1)])


class Synthetic:
    """A pipeline whose model predicts a velocity; a worse one predicts its deviation from the mean divided by GAIN."""

    def __init__(self, scheduler, shape, worse=False):
        import diffusers

        self.scheduler, self.transformer = getattr(diffusers, scheduler)(), make_dit(num_layers=1)
        self.shape, self.worse, self.guidance_scale = shape, worse, 3.5

    def velocity(self, x, sigma):
        v = x * (1 - sigma / 2) + sigma * per_channel(torch.tensor([-1.0, 0.0, 2.0, 1.0]), self.shape)
        if self.worse:
            mean = per_channel(mean_of(v), self.shape)
            v = mean + (v - mean) / per_channel(GAIN, self.shape)
        return v

    def __call__(self, steps=6, seed=0, count=None):
        self.scheduler.set_timesteps(steps)
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))[:count]
        for timestep in self.scheduler.timesteps:
            x = self.scheduler.step(self.velocity(x, float(timestep) / 1000), timestep, x, return_dict=False)[0]
        return x


@pytest.mark.parametrize("form", ["least_squares", "variance_ratio"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scheduler", FLOW)
def test_a_known_gain_of_velocities_is_found_and_undone(scheduler, shape, form):
    """K = σ(v') / σ(v̂) at every step, whatever the steps of sigma are; then the runs are those of the reference."""
    true, worse = (Synthetic(scheduler, shape, worse) for worse in (False, True))
    reference = trajectory_from_run(true, true)
    found = compensation_from_run(worse, worse, reference, target="noise", form=form)
    assert found.gain.shape == (len(reference.samples), 4)
    torch.testing.assert_close(found.gain, GAIN.expand_as(found.gain), atol=1e-4, rtol=0)
    assert (worse() - true()).abs().max() > 0.1
    worse.scheduler = compensated_scheduler(worse.scheduler, found)
    torch.testing.assert_close(worse(), true(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_gain_of_samples_is_that_of_the_derivation(shape):
    """docs/calibration.md: K² = Var(x + Δσ v') / Var(x + Δσ v̂), from one x, with its covariance with v."""
    true, worse = (Synthetic(FLOW[0], shape, worse) for worse in (False, True))
    reference = trajectory_from_run(true, lambda: true(steps=1))
    found = compensation_from_run(worse, lambda: worse(steps=1), reference, form="variance_ratio")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    v = true.velocity(x, 1.0)
    step, (x, v) = -1.0, (t - per_channel(mean_of(t), shape) for t in (x, v))  # sigma falls from 1 to 0
    var_x, var_v, cov = mean_of(x * x), mean_of(v * v), mean_of(x * v)
    after = [var_x + 2 * step * cov / g + (step / g) ** 2 * var_v for g in (1, GAIN)]
    torch.testing.assert_close(found.gain[0].double(), (after[0] / after[1]).sqrt(), atol=1e-4, rtol=0)
    assert (found.gain[0] - 1).abs().max() > 0.05


@pytest.mark.parametrize("target", ["sample", "noise"])
def test_gains_are_applied_in_unmodified_pipelines(pipeline, target):  # noqa: F811
    """The run with a compensated scheduler is the run along which its gains were found."""
    pipe, draw, _ = pipeline
    images = []
    reference = trajectory_from_run(pipe, lambda: images.append(draw()))
    plain, scheduler = draw(), pipe.scheduler
    assert torch.equal(images[0], plain)
    torch.testing.assert_close(reference.samples[-1].flatten(), plain.float().flatten())
    model = quantize_model(pipe.transformer, w_bits=4)
    apply_cache(model, config=CacheConfig("branch", interval=3))
    without = draw()
    found = compensation_from_run(pipe, lambda: images.append(draw()), reference, target=target, form="variance_ratio")
    assert pipe.scheduler is scheduler
    latents = reference.samples[0]
    assert found.gain.shape == (6, latents.shape[2 if latents.ndim == 3 else 1])
    assert (found.fitted_for.cache_schedule, len(found.fitted_for.timesteps)) == ((True, False, False) * 2, 6)
    pipe.scheduler = compensated_scheduler(scheduler, found)
    assert torch.equal(draw(), images[1])
    assert not torch.equal(images[1], without)
    with pytest.raises(ConfigError, match="fitted for timesteps 6 steps"):
        draw(steps=5)


def test_what_methods_take_is_what_the_scheduler_takes():
    """Pipelines look at signatures before they give sigmas, mu or a generator."""
    import diffusers

    for name in (*FLOW, "DDPMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        plain = getattr(diffusers, name)()
        for found in (
            made := compensated_scheduler(plain, epsilon_scaling(1.1, 4, FittedFor(name, (1,), 1.0, ""))),
            copy.deepcopy(made),
            pickle.loads(pickle.dumps(made)),
        ):
            for method in ("set_timesteps", "step"):
                assert inspect.signature(getattr(found, method)) == inspect.signature(getattr(plain, method))
            assert isinstance(found, type(plain))


def test_runs_that_are_not_those_of_the_reference_are_refused():
    pipe = Synthetic(FLOW[0], SHAPES["packed"])
    scheduler, reference = pipe.scheduler, trajectory_from_run(pipe, pipe)
    assert (reference.conditions, reference.seeds, reference.guidance_scale) == ((), (), 3.5)
    for run, error, message in (
        (lambda: None, DataError, "the function took 0 of 0 steps of this Synthetic"),
        (lambda: (pipe(), pipe()), ConfigError, "was called more than once; draw all images in one call"),
        (lambda: pipe(steps=5), ConfigError, "the reference has 6 steps, and this run 5"),
        (lambda: pipe(count=3), DataError, r"reference has latents \[64, 20, 4\], this run \[3, 20, 4\]"),
    ):
        with pytest.raises(error, match=message):
            compensation_from_run(pipe, run, reference)
        assert pipe.scheduler is scheduler
    for change, message in (
        ({"form": "mean"}, "form 'mean' is unknown"),
        ({"target": "image"}, "target 'image' is unknown"),
        ({"start_step": 6}, "start_step is 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            compensation_from_run(pipe, pipe, reference, **change)
    with pytest.raises(DataError, match="the function took 0 of 0"):
        trajectory_from_run(pipe, lambda: None)
    found = compensation_from_run(pipe, pipe, reference, start_step=2)
    assert (found.gain[:2] == 1).all()
    pipe.scheduler = compensated_scheduler(scheduler, found)
    pipe.shape = (64, 20, 5)
    pipe.velocity = lambda x, sigma: x
    with pytest.raises(ConfigError, match="gains for 6 steps and 4 channels; this run has 6 steps and 5 channels"):
        pipe()
