"""Cache mode ``first_block`` against its slow definition and diffusers' FirstBlockCache; where it is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from qandc import (
    CacheConfig,
    CacheError,
    ConfigError,
    apply_cache,
    calibrate_schedule,
    fit_compensation,
    fit_feature_compensation,
    fuse,
    get_cache,
    graph,
    make_scheduler,
    quantize_model,
    record_trajectory,
    remove_cache,
    sample_latents,
    schedule_from_run,
    unfuse,
)
from qandc.method.settings import CalibrationConfig
from tests.conftest import make_dit
from tests.definition import BRANCHES, CONFIGS, LENGTH, assert_equal_runs, of_image, step_of
from tests.test_families import FLUX, WAN, forwards, run_of
from tests.test_feature_compensation import exact, made_up
from tests.test_fused_dit import make_quantized
from tests.tiny_models import each_class, make_tiny, output_of

DIT, QWEN = "DiTTransformer2DModel", "QwenImageTransformer2DModel"
REFUSED = "mode 'first_block' decides at each step whether to compute it, so "


def change(step, before):
    """Return by how much the first block adds something else to the image than at another step."""
    now, then = (of_image(None, "delta", found.features)[0] for found in (step, before))
    return ((now - then).abs().mean() / then.abs().mean()).item()


def threshold_of(model, inputs):
    """Return a threshold between the changes from the first step to the third and to the fourth."""
    first, third, fourth = (step_of(model, inputs[step], "delta") for step in (0, 2, 3))
    return (change(third, first) + change(fourth, first)) / 2


def by_definition(model, inputs, threshold):
    """Return the outputs of all steps, and whether each was computed."""
    outputs, computed, kept = [], [], None
    for given in inputs:
        now = step_of(model, given, "delta")
        computed.append(kept is None or change(now, kept) > threshold)
        if computed[-1]:
            kept = now
        else:
            now = step_of(model, given, "delta", [now.features[0], *kept.features[1:]])
        outputs.append(now.output)
    return outputs, computed


def run(model, inputs, computes=lambda: False):
    """Return the outputs of all steps, and what ``computes`` says of each."""
    with torch.no_grad():
        outputs, said = zip(*((output_of(model, given), computes()) for given in inputs), strict=True)
    return list(outputs), list(said)


def counting(cache):
    """Make a function that tells whether a step was computed since it was called last."""
    counts = [0]

    def computes():
        counts.append(cache.compute_steps)
        return counts[-1] > counts[-2]

    return computes


@each_class(BRANCHES)
@pytest.mark.parametrize("quantized", [False, True], ids=["fp", "w8a8"])
def test_it_equals_the_definition(name, quantized):
    model, inputs = make_tiny(name), run_of(name)
    if quantized:
        quantize_model(model)
    plain, threshold = forwards(name, model)(), threshold_of(model, inputs)
    expected, computed = by_definition(model, inputs, threshold)
    assert computed[:4] == [True, False, False, True]
    cache = apply_cache(model, config=CacheConfig("first_block", threshold=threshold))
    found, said = run(model, inputs, counting(cache))
    assert said == computed
    assert_equal_runs(found, expected)
    assert (cache.compute_steps, cache.reuse_steps) == (sum(computed), LENGTH - sum(computed))
    assert not torch.allclose(found[2], plain[2], atol=1e-4)  # else nothing was reused
    assert_equal_runs(forwards(name, model)(), found, atol=0)  # another run
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_runs(forwards(name, other)(), found, atol=0)
    remove_cache(model)
    assert_equal_runs(forwards(name, model)(), plain, atol=0)


@pytest.mark.parametrize("quantized", [False, True], ids=["fp", "w8a8"])
@pytest.mark.parametrize("name", [FLUX, QWEN, pytest.param(WAN, marks=pytest.mark.slow)])
def test_it_decides_and_reuses_as_that_of_diffusers(name, quantized):
    from diffusers import FirstBlockCacheConfig

    model, inputs = make_tiny(name), run_of(name)
    if quantized:
        quantize_model(model)
    threshold = threshold_of(model, inputs)
    last = [block for blocks in BRANCHES[name] for block in getattr(model, blocks)][-1]
    entered = []
    handle = next(last.children()).register_forward_hook(lambda *_: entered.append(True))
    cache = apply_cache(model, config=CacheConfig("first_block", threshold=threshold))
    found, said = run(model, inputs, counting(cache))
    remove_cache(model)
    entered.clear()
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    with model.cache_context("cond"):
        expected, _ = run(model, inputs)
    model.disable_cache()
    handle.remove()
    assert len(entered) == sum(said) < LENGTH
    assert_equal_runs(found, expected, atol=1e-6)


@pytest.mark.parametrize(("threshold", "computed"), [(0.0, LENGTH), (1e9, 1)])
def test_thresholds_at_their_ends(threshold, computed):
    model = make_tiny(DIT)
    plain = forwards(DIT, model)()
    cache = apply_cache(model, config=CacheConfig("first_block", threshold=threshold))
    for runs in (1, 2):  # which share memory
        found = forwards(DIT, model)()
        assert cache.compute_steps == runs * computed
        assert_equal_runs(found[:computed], plain[:computed], atol=0)
    assert CacheConfig("first_block").threshold == 0.05


def test_nan_is_computed():
    inputs = run_of(DIT)[:3]
    inputs[1]["hidden_states"][:] = float("nan")
    model = make_tiny(DIT)
    cache = apply_cache(model, config=CacheConfig("first_block", threshold=1e9))
    _, said = run(model, inputs, counting(cache))
    assert said == [True, True, True]  # and with nothing is NaN compared as near


@pytest.mark.parametrize(("storage_dtype", "per_token"), [(None, 4 * 32), ("bfloat16", 2 * 32), ("int8", 32 + 4)])
def test_two_tensors_are_kept_whatever_the_depth(storage_dtype, per_token):
    model, inputs = make_dit(num_layers=4), run_of(DIT)
    threshold = threshold_of(model, inputs)
    expected, _ = by_definition(model, inputs, threshold)
    cache = apply_cache(model, config=CacheConfig("first_block", threshold=threshold, storage_dtype=storage_dtype))
    found, _ = run(model, inputs)
    assert cache.nbytes == 2 * 16 * (4 * 32 + per_token)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()


def test_runs_in_turns_decide_each_for_themselves():
    model, threshold = make_tiny(FLUX), threshold_of(make_tiny(FLUX), run_of(FLUX))
    runs = [run_of(FLUX), run_of(FLUX)[::-1]]
    for step, given in enumerate(runs[1]):
        given["timestep"] = runs[0][step]["timestep"]
    expected = [by_definition(model, inputs, threshold)[0] for inputs in runs]
    apply_cache(model, config=CacheConfig("first_block", threshold=threshold))
    found, _ = run(model, [given for both in zip(*runs, strict=True) for given in both])
    for which in (0, 1):
        assert_equal_runs(found[which::2], expected[which])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: 3}, f"{REFUSED}it has no {name}; choose one of delta") for name in (
            "interval", "warm_up_steps", "num_inference_steps")),
        ({"schedule": (True, False)}, f"{REFUSED}it has no schedule"),
        ({"last_step_computed": True}, f"{REFUSED}it has no last_step_computed"),
        ({"threshold": -0.1}, "threshold is -0.1; give a finite number >= 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"mode": "delta", "threshold": 0.1}, "threshold is for mode 'first_block'; mode 'delta' has an interval"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**{"mode": "first_block", **arguments})


def test_what_needs_to_know_the_steps_before_refuses_it():
    config, model = CacheConfig("first_block"), make_tiny(DIT)
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    ran = forwards(DIT, model)
    with pytest.raises(ConfigError, match=f"{REFUSED}it has no schedule"):
        config.of_steps(5)
    with pytest.raises(ConfigError, match=f"{REFUSED}its features cannot be compensated"):
        fit_feature_compensation(model, ran, config=config)
    with pytest.raises(ConfigError, match="fitted for mode 'branch'; this cache has 'first_block'"):
        apply_cache(model, config=config, compensation=made_up((2, 2), exact(CONFIGS["branch"])))
    with pytest.raises(ConfigError, match=f"{REFUSED}no schedule can be found for it"):
        schedule_from_run(model, lambda: pytest.fail("it ran"), mode="first_block", computed_steps=3)
    with pytest.raises(ConfigError, match=f"{REFUSED}it has no schedule"):
        calibrate_schedule(model, scheduler, [1], mode="first_block", computed_steps=3)
    with pytest.raises(ConfigError, match=f"{REFUSED}it has no interval"):
        CalibrationConfig(cache_mode="first_block")
    reference = record_trajectory(model, scheduler, [1], num_inference_steps=2, seeds=[0])
    apply_cache(model, config=config)
    with pytest.raises(ConfigError, match=f"{REFUSED}its samples cannot be compensated"):
        fit_compensation(reference, model, scheduler, callback=lambda *_: pytest.fail("it ran"))


def test_fused_kernels_and_graphs_refuse_it(caplog):
    config, model = CacheConfig("first_block"), make_quantized()
    apply_cache(model, config=config)
    with pytest.raises(ConfigError, match=rf"{REFUSED}it cannot run on fused kernels \(remove_cache first\)"):
        fuse(model)
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    sample_latents(model, scheduler, [1], num_inference_steps=3, seeds=[0], cuda_graph=True)
    assert "cache mode 'first_block' decides at each step whether to compute it" in caplog.text
    remove_cache(model)
    fuse(model)
    with pytest.raises(ConfigError, match=r"cannot run on fused kernels or from CUDA graphs \(unfuse or"):
        apply_cache(model, config=config)
    assert get_cache(model) is None
    apply_cache(unfuse(model), config=config)
    with pytest.raises(ConfigError, match=rf"{REFUSED}it cannot run from CUDA graphs \(remove_cache first\)"):
        graph(model)
    remove_cache(model)
    with pytest.raises(ConfigError, match="from CUDA graphs"):
        apply_cache(graph(model), config=config)


def test_what_a_controlnet_adds_between_blocks_is_refused():
    model = make_tiny(FLUX)
    apply_cache(model, config=CacheConfig("first_block"))
    with pytest.raises(CacheError, match="ControlNet"):
        model(**run_of(FLUX)[0], controlnet_block_samples=[torch.zeros(2, 16, 32)])
