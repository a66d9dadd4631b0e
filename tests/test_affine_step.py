"""Steps of a fused model that one kernel takes: what scheduler.step and a compensation make of the same predictions."""

from __future__ import annotations

import copy

import pytest
import torch

import qandc
from qandc import compensated_scheduler, fuse_dit, make_scheduler, sample_latents
from qandc.fusion.fuse import unfuse_dit
from qandc.sampling.affine_step import affine_coefficients, is_affine
from qandc.sampling.loop import describe_run
from qandc.variance_compensation import Compensation, FittedFor
from qandc_kernels import Backend, guided_step
from tests.test_fused_dit import make_quantized, relative_error

STEPS = 6
ROUNDING = 0.01  # of the latents' norm: what some roundings that fall otherwise can move
CONFIG = {"num_train_timesteps": 1000, "clip_sample": False}
targets = pytest.mark.parametrize("target", [None, "sample", "noise"])


def scheduler(**config):
    made = make_scheduler("ddim", {**CONFIG, **config})
    made.set_timesteps(STEPS)
    return made


def compensation(target, generator, fitted_for=None):
    if target is None:
        return None
    gain, mean = (torch.rand(STEPS, 4, generator=generator) for _ in range(2))
    fitted_for = fitted_for or FittedFor("DDIMScheduler", tuple(reversed(range(STEPS))), 0.0, "")
    return Compensation(gain / 5 + 0.9, mean - 0.5, target, "least_squares", fitted_for)


@targets
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "trailing", "set_alpha_to_one": False, "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_equals_the_scheduler(config, target, guidance_scale, seeded):
    plain, fitted = scheduler(**config), compensation(target, seeded)
    assert is_affine(plain)
    coefficients = affine_coefficients(plain, 4, fitted)
    assert coefficients.shape == (STEPS, 3, 4)
    for step, timestep in enumerate(plain.timesteps):
        latents = torch.randn(2, 4, 3, 5, generator=seeded)
        prediction = torch.randn(2 if guidance_scale is None else 4, 6, 3, 5, generator=seeded)
        epsilon = prediction[:, :4]
        if guidance_scale is not None:
            cond, uncond = epsilon.chunk(2)
            epsilon = uncond + guidance_scale * (cond - uncond)
        if fitted is not None:
            epsilon = fitted.noise(step, epsilon)
        expected = plain.step(epsilon, timestep, latents, return_dict=False)[0]
        if fitted is not None:
            expected = fitted.sample(step, expected)
        actual, _ = guided_step(prediction, latents, coefficients[step], guidance_scale)
        torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


def test_what_is_no_affine_step():
    assert not is_affine(make_scheduler("ddpm", CONFIG))
    assert not is_affine(scheduler(clip_sample=True))
    assert not is_affine(scheduler(thresholding=True))
    assert not is_affine(compensated_scheduler(scheduler(), compensation("sample", torch.Generator())))
    replaced = scheduler()
    replaced.step = lambda *args, **kwargs: None
    assert not is_affine(replaced)


@pytest.fixture
def calls(fused_anywhere, monkeypatch):
    """On the CPU as if it had kernels; how often the kernel's op was called."""
    monkeypatch.setattr("qandc.sampling.loop.select_backend", lambda device: Backend("triton", "as if"))
    counted = []

    def counting(*args):
        counted.append(args)
        return guided_step(*args)

    monkeypatch.setattr(qandc.sampling.loop, "guided_step", counting)
    return counted


@pytest.mark.slow
@targets
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_fused_model_draws_the_same_images(calls, target, guidance_scale, seeded):
    model = make_quantized()
    fitted_for = FittedFor(**describe_run(model, scheduler(), guidance_scale))
    call = {"num_inference_steps": STEPS, "seeds": [5, 6], "guidance_scale": guidance_scale}
    call["compensation"] = compensation(target, seeded, fitted_for)
    fuse_dit(model)
    seen = []
    actual = sample_latents(model, scheduler(), [1, 2], callback=lambda *step: seen.append(step[2]), **call)
    assert len(calls) == len(seen) == STEPS
    assert torch.equal(seen[-1], actual)
    unfuse_dit(model)
    expected = sample_latents(model, scheduler(), [1, 2], **call)
    assert len(calls) == STEPS
    assert relative_error(actual, expected) < ROUNDING
    if target is not None:  # forced upon a run of fewer steps: the first ones
        call.update(num_inference_steps=STEPS - 1, force_compensation=True)
        expected = sample_latents(model, scheduler(), [1, 2], **call)
        actual = sample_latents(fuse_dit(model), scheduler(), [1, 2], **call)
        assert relative_error(actual, expected) < ROUNDING


def test_a_callback_may_write_to_the_latents(calls):
    model = fuse_dit(make_quantized())
    call = {"num_inference_steps": STEPS, "seeds": [5], "callback": lambda step, timestep, latents: latents.mul_(0.5)}
    actual = sample_latents(model, scheduler(), [1], **call)
    assert len(calls) == STEPS
    expected = sample_latents(unfuse_dit(model), scheduler(), [1], **call)
    assert relative_error(actual, expected) < ROUNDING


def test_coefficients_are_made_on_the_cpu(seeded):
    fitted = compensation("noise", seeded)
    expected = affine_coefficients(scheduler(), 4, fitted)
    plain = scheduler()
    with torch.device("meta"):
        assert torch.equal(affine_coefficients(plain, 4, fitted), expected)


def test_what_the_kernel_does_not_know_takes_the_scheduler(calls):
    model = fuse_dit(make_quantized())
    call = {"num_inference_steps": STEPS, "seeds": [5]}
    sample_latents(model, scheduler(clip_sample=True), [1], **call)
    sample_latents(model, make_scheduler("ddpm", CONFIG), [1], **call)

    class Corrector:
        noise = sample = staticmethod(lambda step, x: x)

    sample_latents(model, scheduler(), [1], corrector=Corrector(), **call)
    assert not calls
    sample_latents(copy.deepcopy(model), scheduler(), [1], **call)
    assert len(calls) == STEPS
