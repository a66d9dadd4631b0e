"""Variance compensation: known gains found again, fitted along runs, saved, refused where it does not belong."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qandc import (
    CacheConfig,
    Compensation,
    ConfigError,
    DataError,
    OutputError,
    apply_cache,
    apply_cache_to_dit,
    compensated_scheduler,
    decode_latents,
    fit_compensation,
    get_cache,
    make_scheduler,
    quantize_model,
    record_trajectory,
    remove_cache,
    sample_latents,
)
from qandc.sampling.trajectories import _Fitter
from qandc.variance_compensation import (
    FILE,
    CompensationHeader,
    FittedFor,
    epsilon_scaling,
    least_squares,
    paper_gain,
    variance_ratio,
)
from tests.conftest import make_dit

GAIN = torch.tensor([0.87, 1.0, 1.1, 0.95])
RUN = {"num_inference_steps": 6, "guidance_scale": 1.5}
LABELS = (1, 2, 3, 4)


def pairs(mean=0.0, own_noise=0.0, count=400, seed=0):
    """Samples, and references that are ``μ + gain · (samples - μ)``, both with noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(count, 4, 8, 8, generator=generator) + mean
    reference = mean + GAIN[:, None, None] * (sample - mean)
    reference = reference + own_noise * torch.randn(sample.shape, generator=generator)
    return reference, sample, torch.full((4,), mean)


@pytest.mark.parametrize("mean", [0.0, 0.3, -2.0])
def test_a_known_gain_is_found(mean):
    reference, sample, means = pairs(mean)
    assert least_squares(reference, sample, means).float() == pytest.approx(GAIN, abs=1e-5)
    assert variance_ratio(reference, sample, means).float() == pytest.approx(GAIN, abs=1e-3)


def test_a_known_gain_is_found_under_noise():
    reference, sample, means = pairs(0.1, own_noise=0.1)
    assert least_squares(reference, sample, means).float() == pytest.approx(GAIN, abs=0.01)
    assert variance_ratio(reference, sample, means).float() == pytest.approx(GAIN, abs=0.01)


def test_each_side_varies_about_its_own_mean():
    """References and samples whose means differ: a gain about the mean of the other, or about 0, is another gain."""
    reference, sample, means = pairs(mean=0.5)
    shift = torch.tensor([0.0, 1.0, -2.0, 3.0])
    assert variance_ratio(reference + shift[:, None, None], sample, means).float() == pytest.approx(GAIN, abs=1e-3)
    apart = sample + shift[:, None, None]
    assert variance_ratio(reference, apart, means + shift).float() == pytest.approx(GAIN, abs=1e-3)
    # by hand: about a mean that is off by d, samples of variance 1 have the mean square 1 + d²
    off = variance_ratio(reference, sample, means + shift).float()
    assert off == pytest.approx(GAIN / (1 + shift**2).sqrt(), abs=0.02)
    # least squares about the mean of the samples does not mind where the reference is
    assert least_squares(reference + shift[:, None, None], sample, sample.mean((0, 2, 3))).float() == pytest.approx(
        GAIN, abs=1e-3
    )


def test_least_squares_needs_pairs_and_the_ratio_does_not():
    reference, _, means = pairs()
    _, others, _ = pairs(seed=1)
    assert least_squares(reference, others, means).abs().max() < 0.05
    assert variance_ratio(reference, others, means).float() == pytest.approx(GAIN, abs=0.02)


def test_the_printed_equation_misses_the_known_gain():
    """Why it is no default: elements near 0 decide it, and the mask decides which."""
    reference, sample, means = pairs(0.1)
    masked, wide = paper_gain(reference, sample, means), paper_gain(reference, sample, means, smallest=1e-6)
    assert torch.isfinite(masked).all()
    assert (masked - GAIN).abs().max() > 0.05
    assert (wide - GAIN).abs().max() > 0.5
    reference[:, :, 0] = 0  # exact zeros divide nothing
    assert torch.isfinite(paper_gain(reference, sample, means)).all()


def test_the_printed_equation_by_hand():
    reference, sample = torch.tensor([[[2.0, 0.01, -1.0]]]), torch.tensor([[[1.0, 5.0, -2.0]]])
    mean = torch.tensor([0.5])
    above = 1.5 * 0.5 + -1.5 * -2.5 + 0.5 / 2 + -2.5 / -1
    below = 0.25 + 6.25 + 0.25 / 4 + 6.25 / 1
    assert paper_gain(reference, sample, mean).item() == pytest.approx(above / below)


def scheduler(name="ddpm"):
    return make_scheduler(name, {"num_train_timesteps": 1000, "clip_sample": False})


def reference_and_cached(name="ddpm", labels=LABELS, **run):
    """The trajectory of a random model, and that model quantized to 4 bits with a cache."""
    model = make_dit(num_layers=2)
    reference = record_trajectory(model, scheduler(name), labels, **{**RUN, **run})
    quantize_model(model, w_bits=4)
    apply_cache_to_dit(model, config=CacheConfig("delta", interval=3))
    return reference, model


def test_a_recorded_trajectory_is_that_of_the_loop():
    model = make_dit()
    reference = record_trajectory(model, scheduler(), LABELS, **RUN)
    assert reference.samples.shape == reference.noises.shape == (6, 4, 4, 8, 8)
    again = sample_latents(model, scheduler(), LABELS, seeds=range(4), **RUN)
    assert torch.equal(reference.samples[-1], again)


@pytest.mark.parametrize("target", ["sample", "noise"])
@pytest.mark.parametrize("form", ["least_squares", "variance_ratio"])
def test_of_the_same_model_the_gains_are_one(form, target):
    model = make_dit()
    reference = record_trajectory(model, scheduler(), LABELS, **RUN)
    found = fit_compensation(reference, model, scheduler(), form=form, target=target)
    assert found.gain == pytest.approx(torch.ones(6, 4), abs=1e-4)
    run = sample_latents(model, scheduler(), LABELS, seeds=range(4), compensation=found, **RUN)
    torch.testing.assert_close(run, reference.samples[-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_fitted_run_is_closer_at_every_step(name):
    """On the samples of the fit least squares can only gain, step by step; applied again it does the same."""
    reference, model = reference_and_cached(name)
    found = fit_compensation(reference, model, scheduler(name))
    assert found.gain.shape == found.mean.shape == (6, 4)
    assert (found.gain[:-1] != 1).any(1).all()
    seen = {"plain": [], "compensated": []}
    for key, compensation in (("plain", None), ("compensated", found)):
        sample_latents(
            model, scheduler(name), LABELS, seeds=range(4), compensation=compensation, **RUN,
            callback=lambda step, t, x, key=key: seen[key].append((x - reference.samples[step]).square().mean().item()),
        )  # fmt: skip
    assert seen["compensated"][0] <= seen["plain"][0]
    assert seen["compensated"][-1] < seen["plain"][-1]
    assert sum(seen["compensated"]) < sum(seen["plain"])


def test_gains_are_fitted_on_what_the_earlier_ones_made():
    """A model that is off by one factor at every step needs its inverse at every step, not powers of it."""
    model = make_dit()
    reference = record_trajectory(model, scheduler("ddim"), LABELS, **RUN)

    fitter = _Fitter(reference, "sample", least_squares, 0, 0.0)
    off = SimpleNamespace(noise=fitter.noise, sample=lambda step, latents: fitter.sample(step, latents * 0.9))
    sample_latents(model, scheduler("ddim"), LABELS, seeds=range(4), corrector=off, **RUN)
    assert torch.stack(fitter.gains) == pytest.approx(torch.full((6, 4), 1 / 0.9), abs=0.02)


@pytest.mark.parametrize("target", ["sample", "noise"])
@pytest.mark.parametrize("form", ["least_squares", "variance_ratio"])
def test_gains_are_fitted_and_applied_about_the_mean_of_the_samples(form, target):
    """The first step, where no gain has changed anything before: by definition, in float64."""
    reference, model = reference_and_cached("ddim")
    found = fit_compensation(reference, model, scheduler("ddim"), form=form, target=target)
    plain = record_trajectory(model, scheduler("ddim"), LABELS, **RUN)
    sample, wanted = (
        (run.samples if target == "sample" else run.noises)[0].double().transpose(0, 1).flatten(1)
        for run in (plain, reference)
    )
    mean = sample.mean(1)
    off, target_off = sample - mean[:, None], wanted - mean[:, None]
    if form == "least_squares":
        gain = (off * target_off).sum(1) / off.square().sum(1)
    else:
        gain = wanted.std(1, correction=0) / sample.std(1, correction=0)
    assert found.mean[0].double() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert found.gain[0].double() == pytest.approx(gain, rel=1e-5)
    x = (plain.samples if target == "sample" else plain.noises)[0]
    applied = (found.sample if target == "sample" else found.noise)(0, x)
    expected = mean[:, None] + gain[:, None] * off
    torch.testing.assert_close(applied.double().transpose(0, 1).flatten(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", ["sample", "noise"])
def test_a_gain_of_one_changes_no_bit(target, dtype, seeded):
    """Whatever the mean is, and beside channels that are changed: μ + (x - μ) would be rounded."""
    gain = torch.tensor([[1.0, 0.9, 1.0, 1.1]] * 3)
    mean = torch.tensor([[1e3, 0.5, -7.0, 0.0]] * 3)
    compensation = Compensation(gain, mean, target, "least_squares", FITTED)
    x = torch.randn(5, 4, 8, 8, generator=seeded).to(dtype)
    found = (compensation.sample if target == "sample" else compensation.noise)(1, x)
    assert found.dtype == dtype
    for channel in range(4):
        same = torch.equal(found[:, channel], x[:, channel])
        assert same == (gain[0, channel] == 1)
    expected = mean[1, 1] + gain[1, 1] * (x[:, 1].float() - mean[1, 1])
    assert torch.equal(found[:, 1], expected.to(dtype))


def test_a_run_with_gains_of_one_is_the_run_without(seeded):
    model = make_dit()
    reference = record_trajectory(model, scheduler(), LABELS, **RUN)
    fitted = fit_compensation(reference, model, scheduler(), shrinkage=1.0)
    assert (fitted.gain == 1).all()
    for target in ("sample", "noise"):
        same = replace(fitted, mean=torch.randn(6, 4, generator=seeded), target=target)
        found = sample_latents(model, scheduler(), LABELS, seeds=range(4), compensation=same, **RUN)
        assert torch.equal(found, reference.samples[-1])


def test_start_step_and_shrinkage():
    reference, model = reference_and_cached()
    full = fit_compensation(reference, model, scheduler())
    late = fit_compensation(reference, model, scheduler(), start_step=4)
    assert (late.gain[:4] == 1).all()
    assert (late.gain[4] != 1).any()
    half = fit_compensation(reference, model, scheduler(), shrinkage=0.5)
    assert half.gain[0] == pytest.approx(1 + 0.5 * (full.gain[0] - 1), abs=1e-5)
    none = fit_compensation(reference, model, scheduler(), shrinkage=1.0)
    assert (none.gain == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "best"}, "form 'best' is unknown; choose one of variance_ratio, least_squares, paper"),
        ({"target": "image"}, "target 'image' is unknown"),
        ({"start_step": 6}, "start_step is 6; the run has steps 0 to 5"),
    ],
)
def test_settings_are_checked(change, message):
    model = make_dit()
    reference = record_trajectory(model, scheduler(), [1], **RUN)
    with pytest.raises(ConfigError, match=message):
        fit_compensation(reference, model, scheduler(), **change)


def test_noise_and_scaling_are_applied_before_the_step():
    model = make_dit()
    fitted_for = fit_compensation(
        record_trajectory(model, scheduler("ddim"), LABELS, **RUN), model, scheduler("ddim")
    ).fitted_for
    scaled = epsilon_scaling(1.01, 4, fitted_for)

    divide = SimpleNamespace(noise=lambda step, noise: noise / 1.01, sample=lambda step, latents: latents)
    by_hand = sample_latents(model, scheduler("ddim"), LABELS, seeds=range(4), corrector=divide, **RUN)
    found = sample_latents(model, scheduler("ddim"), LABELS, seeds=range(4), compensation=scaled, **RUN)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="scale is 0"):
        epsilon_scaling(0, 4, fitted_for)


def test_in_the_vanilla_pipeline(pipeline_dir):
    """A scheduler that compensates gives DiTPipeline what our loop gives: DDIM, which draws no noise."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    reference = record_trajectory(pipe.transformer, pipe.scheduler, [7], guidance_scale=3.0, num_inference_steps=6)
    quantize_model(pipe.transformer, w_bits=4)
    apply_cache_to_dit(pipe.transformer, 3)
    for target in ("sample", "noise"):
        found = fit_compensation(reference, pipe.transformer, pipe.scheduler, target=target)
        run = {"num_inference_steps": 6, "guidance_scale": 3.0}
        latents = sample_latents(pipe.transformer, pipe.scheduler, [7], seeds=[0], compensation=found, **run)
        expected = decode_latents(pipe.vae, latents)
        plain = pipe.scheduler
        pipe.scheduler = compensated_scheduler(plain, found)
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        drawn = pipe(class_labels=[7], generator=torch.Generator().manual_seed(0), output_type="np", **run).images
        torch.testing.assert_close(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1, expected, atol=1e-3, rtol=1e-3)
        with pytest.raises(ConfigError, match=r"fitted for timesteps 6 steps.*this run has 4 steps"):
            pipe(class_labels=[7], num_inference_steps=4)
        pipe.scheduler = compensated_scheduler(copy.deepcopy(plain), found, force=True)
        pipe(class_labels=[7], num_inference_steps=4, output_type="np")
        with pytest.raises(ConfigError, match="gains for 6 steps and 4 channels; this run has 7 steps and 4 channels"):
            pipe.scheduler.set_timesteps(7)
        pipe.scheduler = plain


@pytest.mark.parametrize("target", ["sample", "noise"])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_compensated_step_may_return_a_tuple(name, target):
    """What follows the latents in it stays as it is."""
    fitted_for = FittedFor(type(scheduler(name)).__name__, (500, 0), 1.5, "a model")
    gain, mean = torch.tensor([[0.5, 1.0, 2.0, 3.0]] * 2), torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    compensation = Compensation(gain, mean, target, "least_squares", fitted_for)
    x, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, compensated = scheduler(name), compensated_scheduler(scheduler(name), compensation)
    for each in (plain, compensated):
        each.set_timesteps(2)
    seeds = [{"generator": torch.Generator().manual_seed(1)} for _ in range(3)]
    expected = plain.step(compensation.noise(0, noise), 500, x, return_dict=False, **seeds[0])
    found = compensated.step(noise, 500, x, return_dict=False, **seeds[1])
    assert isinstance(found, tuple)
    assert torch.equal(found[0], compensation.sample(0, expected[0]))
    assert not torch.equal(found[0], plain.step(noise, 500, x, **seeds[2]).prev_sample)
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_compensated_scheduler_draws_the_noise_of_each_image(name):
    reference, model = reference_and_cached(name)
    found = fit_compensation(reference, model, scheduler(name))
    call = {"seeds": range(4), **RUN}
    expected = sample_latents(model, scheduler(name), LABELS, compensation=found, **call)
    torch.testing.assert_close(
        sample_latents(model, compensated_scheduler(scheduler(name), found), LABELS, **call), expected
    )


def test_forced_upon_other_channels_it_is_refused():
    fitted_for = FittedFor("DDIMScheduler", (500, 0), 1.5, "a model")
    narrow = epsilon_scaling(1.01, 1, fitted_for)  # would be broadcast
    compensated = compensated_scheduler(scheduler("ddim"), narrow, force=True)
    with pytest.raises(ConfigError, match="timestep 500 is none of a run; none has begun: call set_timesteps"):
        compensated.step(torch.zeros(1, 4, 2, 2), 500, torch.zeros(1, 4, 2, 2))
    compensated.set_timesteps(2)
    with pytest.raises(ConfigError, match="2 steps and 1 channels; this run has 2 steps and 4 channels"):
        compensated.step(torch.zeros(1, 4, 2, 2), 500, torch.zeros(1, 4, 2, 2))


def test_a_compensated_scheduler_tells_fractions_of_timesteps_apart():
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=2)
    timesteps = (2.0, 1.75, 1.5, 1.25, 1.0)
    gain = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]).expand(5, 4).contiguous()
    fitted_for = FittedFor("FlowMatchEulerDiscreteScheduler", timesteps, 1.5, "a model")
    compensation = Compensation(gain, torch.zeros(5, 4), "sample", "least_squares", fitted_for)
    compensated = compensated_scheduler(flow, compensation)
    compensated.set_timesteps(5)
    x = torch.ones(1, 4, 2, 2)
    still = torch.zeros_like(x)  # without a velocity a step changes nothing but by its gain
    for i in (1, 2, 3, 4):  # from the second step on, as of an image that is given
        x = compensated.step(still, compensated.timesteps[i], x).prev_sample
    assert torch.equal(x, torch.full_like(x, 2 * 3 * 4 * 5))
    other = replace(compensation, fitted_for=replace(fitted_for, timesteps=(2, 1.75, 1.5, 1.25, 1.125)))
    with pytest.raises(
        ConfigError, match=r"fitted for timesteps 5 steps, 2 \.\. 1\.125; this run has 5 steps, 2 \.\. 1 "
    ):
        compensated_scheduler(flow, other).set_timesteps(5)
    with pytest.raises(ConfigError, match=r"timestep 0\.3 is none of the 5 of this run"):
        compensated.step(still, 0.3, x)


def test_runs_at_fractions_of_timesteps_are_described_by_them(tmp_path):
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler(num_train_timesteps=1000)
    model, seen = make_dit(num_layers=1), []
    run = {"num_inference_steps": 4, "guidance_scale": 1.0}
    reference = record_trajectory(model, euler, [1, 2], **run, callback=lambda step, t, x: seen.append(t))
    assert seen == [999, 666, 333, 0]
    assert all(type(t) is int for t in seen)
    reference = record_trajectory(model, euler, [1, 2], **{**run, "num_inference_steps": 5})
    found = fit_compensation(reference, model, euler)
    assert found.fitted_for.timesteps == (999, 749.25, 499.5, 249.75, 0)
    found.save(tmp_path / "gains.safetensors")
    assert Compensation.load(tmp_path / "gains.safetensors").fitted_for == found.fitted_for


def heun():
    from diffusers import HeunDiscreteScheduler

    return HeunDiscreteScheduler(num_train_timesteps=1000)


@pytest.mark.parametrize("target", ["sample", "noise"])
def test_a_scheduler_that_calls_the_model_twice_a_step(target):
    """A gain for each call of the model: 11 of 6 steps, applied by the loop and by a scheduler alike."""
    model = make_dit(num_layers=2)
    reference = record_trajectory(model, heun(), LABELS, **RUN)
    assert len(reference.samples) == len(reference.noises) == 11
    quantize_model(model, w_bits=4)
    found = fit_compensation(reference, model, heun(), target=target, start_step=8)
    assert found.gain.shape == (11, 4)
    assert (found.gain[:8] == 1).all()
    gain = 1 + 0.01 * torch.arange(44).view(11, 4)  # a step's gains are its own
    found = replace(found, gain=gain)
    run = {**RUN, "guidance_scale": 1.0}
    call = {"seeds": range(4), **run}
    expected = sample_latents(model, heun(), LABELS, compensation=found, force_compensation=True, **call)
    compensated = compensated_scheduler(heun(), found)
    for _ in range(2):
        torch.testing.assert_close(sample_latents(model, compensated, LABELS, **call), expected)


def test_a_reference_of_another_number_of_steps_is_refused_before_any_work():
    model = make_dit(num_layers=2)
    once, twice = (record_trajectory(model, kind, [1], **RUN) for kind in (scheduler("ddim"), heun()))
    model.forward = None
    with pytest.raises(ConfigError, match=r"reference has 6 steps, but with this scheduler .* 6 has 11"):
        fit_compensation(once, model, heun())
    with pytest.raises(ConfigError, match=r"reference has 11 steps, but with this scheduler .* 6 has 6"):
        fit_compensation(twice, model, scheduler("ddim"))


def test_other_runs_are_refused_unless_forced():
    reference, model = reference_and_cached()
    found = fit_compensation(reference, model, scheduler())
    call = {"seeds": range(4), "compensation": found}
    for changes, message in (
        ({"guidance_scale": 2.0}, "fitted for guidance_scale 1.5; this run has 2.0"),
        ({"num_inference_steps": 5}, "fitted for timesteps 6 steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample_latents(model, scheduler(), LABELS, **{**RUN, **changes}, **call)
    with pytest.raises(ConfigError, match="fitted for scheduler 'DDPMScheduler'; this run has 'DDIMScheduler'"):
        sample_latents(model, scheduler("ddim"), LABELS, **RUN, **call)
    with pytest.raises(ConfigError, match="fitted for scheduler"):
        compensated_scheduler(scheduler("ddim"), found)
    with pytest.raises(ConfigError, match=r"fitted for schemes \('W4A8 dynamic per-token',\); this run has \(\)"):
        sample_latents(make_dit(num_layers=2), scheduler(), LABELS, **RUN, **call)
    cache, attached = found.fitted_for.cache_schedule, get_cache(model).config
    remove_cache(model)
    apply_cache(model, config=CacheConfig(found.fitted_for.cache_mode, schedule=(*cache[:-1], not cache[-1])))
    with pytest.raises(ConfigError, match=r"fitted for cache_schedule C[C.]{5}; this run has C[C.]{5} \(fit it"):
        sample_latents(model, scheduler(), LABELS, **RUN, **call)
    remove_cache(model)
    apply_cache(model, config=CacheConfig(found.fitted_for.cache_mode, schedule=cache))  # said in other words
    sample_latents(model, scheduler(), LABELS, **RUN, **call)
    remove_cache(model)
    apply_cache(model, config=attached)
    call["force_compensation"] = True
    sample_latents(model, scheduler(), LABELS, **{**RUN, "guidance_scale": 2.0}, **call)
    with pytest.raises(ConfigError, match="gains for 6 steps and 4 channels; this run has 7 steps and 4 channels"):
        sample_latents(model, scheduler(), LABELS, **{**RUN, "num_inference_steps": 7}, **call)
    call["compensation"] = replace(found, gain=found.gain[:, :1], mean=found.mean[:, :1])
    with pytest.raises(ConfigError, match="6 steps and 1 channels; this run has 6 steps and 4 channels"):
        sample_latents(model, scheduler(), LABELS, **RUN, **{**call, "force_compensation": False})


FITTED = FittedFor("DDPMScheduler", (667, 334, 1), 1.5, "a model")
STORED = Compensation(torch.rand(3, 4), torch.rand(3, 4), "sample", "least_squares", FITTED)


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "vc.safetensors"
    STORED.save(path)
    loaded = Compensation.load(path)
    assert torch.equal(loaded.gain, STORED.gain)
    assert torch.equal(loaded.mean, STORED.mean)
    assert (loaded.target, loaded.form, loaded.fitted_for) == ("sample", "least_squares", FITTED)
    assert [p.name for p in tmp_path.iterdir()] == ["vc.safetensors"]


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "vc.safetensors"
    with pytest.raises(ConfigError, match="is no compensation"):
        Compensation.load(path)
    with pytest.raises(ConfigError, match=r"give one that ends in \.safetensors"):
        STORED.save(tmp_path / "vc.bin")
    with pytest.raises(OutputError, match="cannot write"):
        STORED.save(tmp_path / "no" / "vc.safetensors")
    STORED.save(path)
    tensors = {"gain": STORED.gain, "mean": STORED.mean}
    for changed, header, message in (
        (tensors, CompensationHeader("image", "paper", FITTED), "target 'image' is unknown"),
        ({"gain": STORED.gain}, STORED.header, "it has no 'mean'"),
        ({**tensors, "gain": -STORED.gain}, STORED.header, "which would mirror samples"),
        (tensors, {"target": "sample"}, "missing required field `form`"),
    ):
        FILE.write_tensors(path, changed, header)
        with pytest.raises((ConfigError, DataError), match=message):
            Compensation.load(path)
    STORED.save(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="is no compensation"):
        Compensation.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": torch.rand(2, 4)}, r"gain must be \[3 steps, channels\]"),
        ({"mean": torch.rand(3, 3)}, "must have one shape"),
        ({"gain": torch.full((3, 4), float("nan"))}, "gain holds NaN"),
        ({"gain": torch.full((3, 4), float("inf"))}, "gain holds NaN or inf"),
        ({"mean": torch.full((3, 4), float("nan"))}, "mean holds NaN"),
        ({"gain": torch.rand(3, 4).double()}, "must be .* float32; got .* float64"),
        ({"gain": torch.tensor([[1.0, 1.0, -0.25, 1.0]] * 3)}, r"gain holds -0\.25, which would mirror samples"),
    ],
)
def test_tensors_are_checked(change, message):
    values = {"gain": STORED.gain, "mean": STORED.mean, **change}
    with pytest.raises(DataError, match=message):
        Compensation(**values, target="sample", form="paper", fitted_for=FITTED)


def test_samples_of_other_channels_are_refused():
    one = Compensation(torch.rand(3, 1), torch.rand(3, 1), "sample", "least_squares", FITTED)
    with pytest.raises(ConfigError, match="has gains for 1 channels; these samples have 4"):
        one.sample(0, torch.zeros(2, 4, 8, 8))


def test_compensation_and_corrector_together_are_refused():
    with pytest.raises(ConfigError, match="not both"):
        sample_latents(make_dit(), scheduler(), [1], seeds=[0], compensation=STORED, corrector=STORED, **RUN)
