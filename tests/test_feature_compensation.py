"""Gains and offsets for reused features: found where known, applied as defined, refused where they do not fit."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch

from qandc import (
    CacheConfig,
    ConfigError,
    DataError,
    FeatureCompensation,
    ModelError,
    apply_cache,
    calibrate,
    fashion_dit_path,
    fit_feature_compensation,
    get_cache,
    quantize_model,
    remove_cache,
    sample_latents,
    schedule_from_run,
)
from qandc.caching.compensation import FeatureMoments
from qandc.caching.features import FeatureStore
from qandc.method.observation import Run
from qandc.models import FAMILIES
from tests.definition import CONFIGS, LENGTH, assert_equal_runs, by_definition, cases, of_image, step_of
from tests.test_families import STEPS, forwards, run_of, steps_known, timesteps_of
from tests.tiny_models import each_class, inputs_of, make_tiny

LEARN = {
    "compensation": lambda model, run: fit_feature_compensation(model, run, config=CacheConfig("branch")),
    "schedule": lambda model, run: schedule_from_run(model, run, computed_steps=3),
}
SHAPES = {  # [L, K] of features of small models, each of their stacks with two blocks
    "DiTTransformer2DModel": (2, 2),
    "PixArtTransformer2DModel": (2, 3),
    "FluxTransformer2DModel": (6, 1),
    "ChromaTransformer2DModel": (6, 1),
    "QwenImageTransformer2DModel": (2, 2),
    "SD3Transformer2DModel": (2, 2),
    "WanTransformer3DModel": (2, 3),
    "ZImageTransformer2DModel": (2, 2),
}


def exact(config, timesteps=STEPS):
    """Return the config of the same cache with a schedule for the given timesteps."""
    schedule = config.of_steps(len(timesteps))
    return CacheConfig(config.mode, schedule=schedule, order=config.order, timesteps=timesteps)


def made_up(of_model, config, channels=32):
    generator = torch.Generator().manual_seed(0)
    schedule = config.schedule
    of_model = of_model if config.per_branch else (1, 1)
    shape = (len(schedule) - sum(schedule), *of_model, channels)
    return FeatureCompensation(
        config, 1 + torch.randn(shape, generator=generator) / 10, torch.randn(shape, generator=generator) / 10
    )


def moments_of(f, g):
    moments = FeatureMoments(1, 1, f.shape[-1], f.device)
    for first in range(0, len(f), 2):
        moments.add(0, 0, f[first : first + 2], g[first : first + 2])
    return moments


def test_known_gains_and_offsets_are_found(seeded):
    f = torch.randn(6, 50, 4, generator=seeded) + 3
    gain, offset = torch.tensor([0.5, 1.0, 1.5, -2.0]), torch.tensor([0.0, 1.0, -4.0, 2.0])
    a, b = moments_of(f, gain * f + offset).solve("least_squares", 0.0)
    torch.testing.assert_close(a[0, 0], gain, atol=1e-5, rtol=0)
    torch.testing.assert_close(b[0, 0], offset, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pull", [0.0, 0.25, 1.0])
def test_a_pull_lies_between_least_squares_and_no_gain(pull, seeded):
    f, noise = torch.randn(2, 4, 30, 3, generator=seeded).unbind(0)
    g = 1.4 * f + 0.3 * noise - 2
    pairs_f, pairs_g = f.flatten(0, 1).double(), g.flatten(0, 1).double()
    fitted = torch.stack([torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y).solution for x, y in zip(
        pairs_f.T, pairs_g.T, strict=True)])  # fmt: skip
    a, b = moments_of(f, g).solve("least_squares", pull)
    expected = 1 + (1 - pull) * (fitted[:, 0] - 1)
    torch.testing.assert_close(a[0, 0].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(b[0, 0].double(), pairs_g.mean(0) - expected * pairs_f.mean(0), atol=1e-5, rtol=0)


def test_features_can_be_made_to_vary_as_true_ones_do(seeded):
    f, noise = torch.randn(2, 4, 30, 3, generator=seeded).unbind(0)
    g = 1.4 * f + 2 * noise - 2  # least squares would leave the noise out
    a, b = moments_of(f, g).solve("variance_ratio", 0.0)
    corrected = a * f + b
    torch.testing.assert_close(corrected.std((0, 1)), g.std((0, 1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(corrected.mean((0, 1)), g.mean((0, 1)), atol=1e-5, rtol=0)


def test_a_feature_that_never_varies_gets_the_offset_alone(seeded):
    f = torch.randn(2, 9, 3, generator=seeded)
    f[..., 0], f[..., 1] = 0, 1e4
    g = f + torch.tensor([0.5, -2.0, 0.0])
    a, b = moments_of(f, g).solve("least_squares", 0.0)
    assert torch.equal(a[0, 0, :2], torch.ones(2))
    torch.testing.assert_close(b[0, 0, :2], torch.tensor([0.5, -2.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value, seeded):
    f = torch.randn(2, 9, 3, generator=seeded)
    g = f.clone()
    g[1, 2, 1] = value
    with pytest.raises(DataError, match="NaN or infinite"):
        moments_of(f, g).solve("least_squares", 0.0)


@pytest.mark.parametrize(("name", "config"), cases(CONFIGS))
def test_a_compensated_cache_equals_the_definition(name, config):
    model = make_tiny(name)
    channels = FAMILIES[name].width(model)
    compensation = made_up(SHAPES[name], exact(config, timesteps_of(name)), channels)
    expected = by_definition(model, config, run_of(name), compensation, steps_known(name, config.mode))
    plain = by_definition(model, config, run_of(name), known=steps_known(name, config.mode))
    apply_cache(model, compensation=compensation)
    found = forwards(name, model)()
    assert_equal_runs(found, expected)
    for step, (mine, theirs) in enumerate(zip(found, plain, strict=True)):
        assert config.computes(step) or not torch.allclose(mine, theirs, atol=1e-3)  # else nothing was corrected


@each_class(FAMILIES)
@pytest.mark.parametrize("mode", ["delta", "branch", "taylor", pytest.param("crf", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [False, True], ids=["own", "full_precision"])
def test_moments_are_those_of_the_run_without_a_cache(name, mode, target):
    """The fit of one step, from features that hooks of the test collect."""
    full = make_tiny(name, num_layers=1)
    model = calibrate(quantize_model(copy.deepcopy(full)), [inputs_of(name)])
    config = CacheConfig(mode, interval=5)
    found = fit_feature_compensation(
        model, forwards(name, model), config=config, target=full if target else None, form="least_squares", pull=0.0
    )
    assert found.config.timesteps == timesteps_of(name)
    assert found.config.schedule == config.of_steps(LENGTH)
    step, computed = (2, [1, 0]) if mode in ("taylor", "crf") else (1, [0])
    inputs = run_of(name)
    of_steps = [step_of(model, inputs[s], mode) for s in (*computed, step)]
    if target:
        of_steps[-1] = step_of(full, inputs[step], mode)
    *reused, true = (of_image(model, mode, each.features) for each in of_steps)
    if not config.per_branch:
        reused, true = [[sum(features)] for features in reused], [sum(true)]
    if len(computed) == 2:
        reused = [[2 * new - old for new, old in zip(*reused, strict=True)]]
    gains, offsets = (t[0].flatten(0, 1) for t in (found.gains, found.offsets))
    for place, (f, g) in enumerate(zip(reused[0], true, strict=True)):
        f, g = (t.flatten(0, -2).double() for t in (f, g))
        gain = ((f - f.mean(0)) * (g - g.mean(0))).sum(0) / (f - f.mean(0)).square().sum(0)
        torch.testing.assert_close(gains[place].double(), gain, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(offsets[place].double(), g.mean(0) - gain * f.mean(0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("mode", "form", "pull"),
    [
        ("delta", "variance_ratio", 0.0),
        ("branch", "least_squares", 0.0),
        *((mode, "variance_ratio", 0.5) for mode in ("taylor", "hicache", "crf")),
    ],
)
def test_forms_and_pulls_that_are_not_given_are_those_of_the_mode(mode, form, pull):
    model, config = make_tiny("DiTTransformer2DModel"), CacheConfig(mode, interval=2)
    run = forwards("DiTTransformer2DModel", model)
    ours, theirs = (
        fit_feature_compensation(model, run, config=config, **how) for how in ({}, {"form": form, "pull": pull})
    )
    assert torch.equal(ours.gains, theirs.gains)
    assert torch.equal(ours.offsets, theirs.offsets)
    with pytest.raises(ConfigError, match="form 'ridge' is unknown; choose one of least_squares, variance_ratio"):
        fit_feature_compensation(model, run, config=config, form="ridge")


@pytest.mark.parametrize("mode", ["branch", "taylor"])
def test_two_runs_may_take_turns_and_those_before_are_forgotten(mode):
    """Fit on two runs whose steps alternate, and on the same runs one after the other: gains and offsets are equal."""
    name, config = "DiTTransformer2DModel", CacheConfig(mode, interval=4)
    model = make_tiny(name, num_layers=1)
    pairs = [[run_of(name) for _ in range(2)] for _ in range(3)]
    for number, steps in enumerate(steps for pair in pairs for steps in pair):
        labels = torch.full_like(steps[0]["class_labels"], number)
        for given in steps:
            given |= {"class_labels": labels, "hidden_states": given["hidden_states"] * (1 + number / 10)}
    stored = []

    def draw(take_turns):
        for first, second in pairs:
            for given in (
                (g for both in zip(first, second, strict=True) for g in both) if take_turns else first + second
            ):
                with torch.no_grad():
                    model(**given)
            gc.collect()
            stored.append(sum(found.nbytes for found in gc.get_objects() if isinstance(found, FeatureStore)))

    in_turns, in_order = (fit_feature_compensation(model, lambda t=t: draw(t), config=config) for t in (True, False))
    torch.testing.assert_close(in_turns.gains, in_order.gains, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_turns.offsets, in_order.offsets, rtol=1e-5, atol=1e-6)
    assert stored[0] == stored[1] == stored[2] > 0


@pytest.mark.parametrize(
    ("name", "mode"),
    [("DiTTransformer2DModel", mode) for mode in ("delta", "branch", "taylor")]
    + [("ChromaTransformer2DModel", "branch")],
)
def test_along_the_corrected_run_the_moments_are_those_of_what_the_cache_will_see(name, mode):
    """Fitted on one run and applied to the same, means of reused features are those of the blocks at every step."""
    model = make_tiny(name, num_layers=1)
    config = CacheConfig(mode, interval=4)
    drawn = []
    state = torch.randn(inputs_of(name)["hidden_states"].shape, generator=torch.Generator().manual_seed(5))

    def run():  # a loop whose latents depend on what the model predicts
        latents, inputs = state, inputs_of(name)
        drawn.clear()
        for timestep in timesteps_of(name):
            given = {**inputs, "hidden_states": latents, "timestep": torch.full_like(inputs["timestep"], timestep)}
            with torch.no_grad():
                drawn.append(model(**given)[0])
            latents = latents - 0.3 * drawn[-1][:, : latents.shape[1]]

    found = fit_feature_compensation(model, run, config=config, along="corrected", pull=0.0)
    fitted = list(drawn)
    apply_cache(model, compensation=found)
    run()
    assert_equal_runs(drawn, fitted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "decibels"), [("delta", 2), ("branch", 6), ("taylor", 2)])
def test_other_images_of_fashion_dit_come_closer(mode, decibels):
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline.from_pretrained(fashion_dit_path())
    model, scheduler = pipe.transformer, DDIMScheduler.from_config(pipe.scheduler.config)
    config = CacheConfig(mode, interval=4)

    def draw(seeds):
        classes = [seed % 10 for seed in seeds]
        return sample_latents(model, scheduler, classes, num_inference_steps=20, guidance_scale=1.5, seeds=seeds)

    found = fit_feature_compensation(model, lambda: draw(range(8)), config=config)
    others, errors = range(100, 104), []
    true = draw(others)
    for compensation in (None, found):
        apply_cache(model, config=config, compensation=compensation)
        errors.append((draw(others) - true).square().mean().log10() * 10)
        remove_cache(model)
    assert errors[0] - errors[1] > decibels


def of_five_runs(model):
    """Give a function that draws five times, and notes how many runs are held then."""
    name, held = "DiTTransformer2DModel", []

    def run():
        inputs = [run_of(name) for _ in range(5)]  # who calls may hold all labels, too
        for given in inputs:
            with torch.no_grad():
                [model(**step) for step in given]
            held.append(sum(isinstance(found, Run) for found in gc.get_objects()))

    return run, held


@pytest.mark.parametrize("learn", LEARN.values(), ids=LEARN)
def test_what_is_held_does_not_grow_with_images(learn):
    model = make_tiny("DiTTransformer2DModel")
    run, held = of_five_runs(model)
    gc.collect()
    learn(model, run)
    assert not any(isinstance(found, Run) for found in gc.get_objects())
    assert len(held) == 5
    assert max(held) <= 2  # another may take turns


@pytest.mark.parametrize("learn", LEARN.values(), ids=LEARN)
def test_nan_in_a_branch_is_told(learn):
    model = make_tiny("DiTTransformer2DModel")
    torch.nn.init.constant_(model.transformer_blocks[1].ff.net[2].bias, float("nan"))
    with pytest.raises(DataError, match=r"features of the blocks are NaN.*; check the weights and the dtype"):
        learn(model, forwards("DiTTransformer2DModel", model))


def test_a_branch_that_never_varies_gets_the_offset_alone():
    name = "DiTTransformer2DModel"
    model = make_tiny(name)
    constant = model.transformer_blocks[0].ff.net[2]
    torch.nn.init.zeros_(constant.weight)
    target = copy.deepcopy(model)
    with torch.no_grad():
        target.transformer_blocks[0].ff.net[2].bias += 0.5
    found = fit_feature_compensation(model, forwards(name, model), config=CacheConfig("branch"), target=target)
    assert torch.equal(found.gains[:, 0, 1], torch.ones(8, 32))
    torch.testing.assert_close(found.offsets[:, 0, 1], torch.full((8, 32), 0.5))
    assert not torch.equal(found.gains[:, 0, 0], torch.ones(8, 32))


def test_a_target_may_have_a_cache_or_be_the_model_itself():
    name = "FluxTransformer2DModel"
    model, target = quantize_model(make_tiny(name)), make_tiny(name)

    def fitted(target):
        return fit_feature_compensation(model, forwards(name, model), config=CONFIGS["branch"], target=target).gains

    alone = fitted(target)
    cache = apply_cache(target, config=CONFIGS["branch"])
    assert torch.equal(fitted(target), alone)
    assert get_cache(target) is cache
    assert torch.equal(fitted(model), fitted(None))


def test_gains_may_have_any_strides():
    name = "FluxTransformer2DModel"
    model = make_tiny(name)
    found = fit_feature_compensation(model, forwards(name, model), config=CONFIGS["branch"])
    apply_cache(model, compensation=found)
    expected = forwards(name, model)()
    remove_cache(model)
    strided = [t.transpose(0, 3).contiguous().transpose(0, 3) for t in (found.gains, found.offsets)]
    apply_cache(model, compensation=FeatureCompensation(found.config, *strided))
    assert_equal_runs(forwards(name, model)(), expected, atol=0)


def test_copies_and_pickles_are_compensated():
    name = "DiTTransformer2DModel"
    model = make_tiny(name)
    compensation = made_up(SHAPES[name], exact(CONFIGS["branch"]))
    apply_cache(model, compensation=compensation)
    expected = forwards(name, model)()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(get_cache(other).compensation.gains, compensation.gains)
        assert_equal_runs(forwards(name, other)(), expected, atol=0)


BRANCH = exact(CONFIGS["branch"])


@pytest.mark.parametrize("name", ["delta", "hicache 2 uneven"])
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    config = replace(exact(CONFIGS[name]), storage_dtype="int8")
    compensation = made_up((2, 2), config)
    compensation.save(tmp_path / "features.safetensors")
    loaded = FeatureCompensation.load(tmp_path / "features.safetensors")
    assert (loaded.config, loaded.config.timesteps) == (config, config.timesteps)
    assert torch.equal(loaded.gains, compensation.gains)
    assert torch.equal(loaded.offsets, compensation.offsets)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "features.safetensors"
    made_up((2, 2), BRANCH).save(path)
    whole = bytearray(path.read_bytes())
    for place in (9, 200, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="feature compensation"):
            FeatureCompensation.load(path)
    with pytest.raises(ConfigError, match="no feature compensation"):
        FeatureCompensation.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "taylor", "schedule": (True, *BRANCH.schedule[1:-1], True)}, "fitted for mode 'branch'; .* 'taylor'"),
        ({"schedule": (*BRANCH.schedule[:-1], not BRANCH.schedule[-1])}, "fitted for schedule"),
        ({"timesteps": tuple(t - 1 for t in STEPS)}, "fitted for timesteps"),
        ({"storage_dtype": "bfloat16"}, "fitted for storage_dtype None; .* 'bfloat16'"),
        ({"schedule": BRANCH.schedule[:-1], "timesteps": STEPS[1:]}, "has 9 steps and the run 10"),
    ],
    ids=["mode", "schedule", "timesteps", "storage", "length"],
)
def test_another_cache_is_refused_by_field(change, message):
    model = make_tiny("DiTTransformer2DModel")
    compensation = made_up((2, 2), BRANCH)
    if change.get("mode") == "taylor":
        change = {"mode": "taylor", "schedule": (True, True, *BRANCH.schedule[2:])}
    with pytest.raises(ConfigError, match=message):
        apply_cache(model, config=replace(BRANCH, **change), compensation=compensation)
    assert get_cache(model) is None


def test_another_model_is_refused():
    name = "DiTTransformer2DModel"
    for layers, channels in ((3, 32), (2, 48)):
        message = f"for {layers} blocks with 2 branches of {channels} channels; this model has 2 with 2 of 32"
        with pytest.raises(ConfigError, match=message):
            apply_cache(make_tiny(name), compensation=made_up((layers, 2), BRANCH, channels))


def test_an_interval_that_comes_to_the_same_steps_is_taken():
    model = make_tiny("DiTTransformer2DModel")
    compensation = made_up((2, 2), BRANCH)
    cache = apply_cache(model, config=CONFIGS["branch"], compensation=compensation)
    assert cache.config is compensation.config


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gains": torch.ones(6, 2, 2, 32).double()}, DataError, r"gains must be \[6, L, K, D\] float32"),
        ({"offsets": torch.ones(5, 2, 2, 32)}, DataError, r"offsets must be \[6, L, K, D\] float32"),
        ({"gains": torch.full((6, 2, 2, 32), float("nan"))}, DataError, "gains .* NaN or infinite"),
        ({"gains": torch.ones(6, 2, 2, 31)}, DataError, "give one shape"),
        ({"config": CacheConfig("branch", interval=3)}, ConfigError, "give a config with schedule"),
    ],
)
def test_what_is_no_compensation_is_refused(change, error, message):
    good = {"config": BRANCH, "gains": torch.ones(6, 2, 2, 32), "offsets": torch.zeros(6, 2, 2, 32)}
    FeatureCompensation(**good)
    with pytest.raises(error, match=message):
        FeatureCompensation(**{**good, **change})


def test_what_cannot_be_fitted_is_refused():
    name = "DiTTransformer2DModel"
    model = make_tiny(name)
    run = forwards(name, model)
    with pytest.raises(ConfigError, match="computes every step"):
        fit_feature_compensation(model, run, config=CacheConfig("branch", interval=1))
    with pytest.raises(ConfigError, match="3 steps, and the run more"):
        fit_feature_compensation(model, run, config=CacheConfig("branch", schedule=(True, False, False)))
    with pytest.raises(ConfigError, match="pull or held_out"):
        fit_feature_compensation(model, run, config=CacheConfig(), pull=0.5, held_out=lambda: torch.zeros(1))
    for drawn, found in ((torch.full((2,), float("nan")), "NaN or infinite"), ([torch.zeros(1)], "list")):
        with pytest.raises(DataError, match=f"held_out must return .* one finite tensor; got {found}"):
            fit_feature_compensation(model, run, config=CacheConfig(), held_out=lambda drawn=drawn: drawn)
    with pytest.raises(ConfigError, match="along is 'cached'"):
        fit_feature_compensation(model, run, config=CacheConfig(), along="cached")
    with pytest.raises(DataError, match="did not run"):
        fit_feature_compensation(model, lambda: None, config=CacheConfig())
    with pytest.raises(ModelError, match="features are known"):
        fit_feature_compensation(torch.nn.Linear(2, 2), run, config=CacheConfig())
    with pytest.raises(ModelError, match="target must be a DiTTransformer2DModel of 2 blocks"):
        fit_feature_compensation(model, run, config=CacheConfig(), target=make_tiny(name, num_layers=3))
    name = "SD3Transformer2DModel"
    model, target = make_tiny(name), make_tiny(name, dual_attention_layers=(0,))
    with pytest.raises(ModelError, match="of 2 blocks with the same branches; got a different SD3"):
        fit_feature_compensation(model, forwards(name, model), config=CacheConfig("branch"), target=target)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
