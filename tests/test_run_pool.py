"""The pool of a pipeline's runs: every call once, streamed to disk, and that calibration takes it."""

from __future__ import annotations

import gc
import json
import os
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from qandc import (
    ConfigError,
    DataError,
    OutputError,
    RunPool,
    TapConfig,
    apply_cache,
    calibrate,
    calibrate_steps,
    graph,
    input_hessians,
    pool_from_run,
    quantize_model,
    remove_cache,
    select_samples,
    smoothing_factors,
)
from qandc.models import FAMILIES
from qandc.quantization.conversion import quant_layers
from qandc.tap import spatial_similarity
from tests.conftest import recorded_calls
from tests.test_families import forwards, pipeline  # noqa: F401  (a fixture)
from tests.tiny_models import inputs_of, make_tiny, output_of

FLUX, PIXART, Z_IMAGE = "FluxTransformer2DModel", "PixArtTransformer2DModel", "ZImageTransformer2DModel"


def images(model, count=3, steps=6, **changes):
    """Give functions that draw an image each: two rows of noise and a text of its own."""
    name = type(model).__name__

    def draw(seed):
        text = inputs_of(name, seed=1000 + seed)["encoder_hidden_states"]
        for step in range(steps):
            given = inputs_of(name, time=0.9 - step / 8, seed=steps * seed + step)
            output_of(model, {**given, "encoder_hidden_states": text, **changes})

    return [partial(draw, seed) for seed in range(count)]


def assert_same(found, expected):
    """Compare arguments: their types, and tensors by dtype and bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list | tuple):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == expected


def assert_holds(pool, calls):
    """Compare a pool with what hooks have seen, positions by name."""
    assert len(pool) == len(calls)
    for found, (args, expected) in zip(pool.batches(), calls, strict=True):
        names = [name for name in found if name not in expected]
        assert_same(found, {**dict(zip(names, args, strict=True)), **expected})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_call_is_held_as_it_was(name):
    model = make_tiny(name)
    run = forwards(name, model, (900, 600, 300))
    assert_holds(pool_from_run(model, run), recorded_calls(model, run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_dtypes_are_kept(dtype):
    model = make_tiny(FLUX).to(dtype)
    given = {name: value.to(dtype) for name, value in inputs_of(FLUX).items()}
    expected = {name: value.clone() for name, value in given.items()}

    def run():
        output_of(model, given)
        given["hidden_states"].zero_()  # as by a scheduler that steps in place

    (found,) = pool_from_run(model, run).batches()
    assert {value.dtype for value in found.values() if isinstance(value, torch.Tensor)} == {dtype}
    assert_same(found, {**expected, "return_dict": False})


def test_runs_of_an_unmodified_pipeline(pipeline, tmp_path):  # noqa: F811
    """Conditional and unconditional calls are both there; what all steps share is stored once."""
    pipe, draw, turns = pipeline
    runs = [partial(draw, seed) for seed in range(2)]
    calls = recorded_calls(pipe.transformer, lambda: [run() for run in runs])
    pool = pool_from_run(pipe.transformer, runs, tmp_path)
    assert_holds(pool, calls)
    assert len(pool) == 2 * 6 * turns
    assert len(np.unique(pool.timesteps)) == 6
    stored = load_file(tmp_path / "run-000000.safetensors")
    seen = [leaf for args, kwargs in calls[: 6 * turns] for leaf in tree_leaves((args, kwargs))]
    different = {(x.shape, x.dtype, x.numpy().tobytes()) for x in seen if isinstance(x, torch.Tensor)}
    assert len(stored) == len(different)
    assert sum(x.shape[-1] == 48 for x in stored.values()) <= 4  # embeddings of two prompts, conditional or not
    model = quantize_model(pipe.transformer, smoothing=smoothing_factors(pipe.transformer, pool.batches()))
    calibrate(model, pool.batches(pool.select(8, TapConfig(clusters=2, rate=1.0))))
    assert sum(layer.act_scale is not None for layer in quant_layers(model).values()) >= 12
    draw()


@pytest.mark.slow
def test_packed_tokens_end_to_end_as_collected_by_hand():
    """Smoothing, Hessians, static ranges and ranges per step are those of the same calls collected by a hook."""
    models, found = [make_tiny(FLUX), make_tiny(FLUX)], []
    runs = images(models[0])
    calls = recorded_calls(models[0], lambda: [run() for run in runs])
    pool = pool_from_run(models[0], runs)
    chosen = pool.select(7, TapConfig(clusters=3, rate=1.0))
    by_hand = [calls[i][1] for i in chosen]
    for model, batches in zip(models, (lambda: pool.batches(chosen), lambda: by_hand), strict=True):
        smoothing, hessians = smoothing_factors(model, batches()), input_hessians(model, batches())
        calibrate(quantize_model(model, smoothing=smoothing), batches())
        ranges = {name: layer.act_scale for name, layer in quant_layers(model).items() if layer.act_scale is not None}
        steps = calibrate_steps(model, batches())
        found.append((smoothing, hessians, ranges, steps.scales, steps.timesteps))
    assert min(map(len, found[0][:4])) >= 12
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0][-1].tolist() == sorted({call["timestep"][0].item() for call in by_hand}, reverse=True)


def test_selection_is_that_of_tap_over_latents_and_steps():
    model = make_tiny(FLUX)
    runs = images(model)
    calls = recorded_calls(model, lambda: [run() for run in runs])
    pool, config = pool_from_run(model, runs), TapConfig(clusters=3, rate=1.0)
    looks = torch.stack([call["hidden_states"].flatten() for _, call in calls]).numpy()
    for method in ("tap", "kmeans", "random", "uniform"):
        found = pool.select(9, config, method=method, seed=4)
        assert (found == select_samples(looks, np.tile(np.arange(6), 3), 9, config, method=method, seed=4)).all()
    with pytest.raises(ConfigError, match="method 'nearest' is unknown"):
        pool.select(9, method="nearest")


def test_large_latents_are_compared_by_a_projection(monkeypatch):
    """A projection to k numbers keeps cosines to about 1 / √k, also those of latents with a mean."""
    seen = []
    monkeypatch.setattr("qandc.method.run_pool.select_samples", lambda looks, *args, **kwargs: seen.append(looks))
    monkeypatch.setattr("qandc.method.run_pool.LOOKS", 256)
    model, given = make_tiny(FLUX), inputs_of(FLUX)
    whole = torch.randn(18, 2, 16, 16, generator=torch.Generator().manual_seed(0)) + 1
    pool = pool_from_run(model, lambda: [output_of(model, {**given, "hidden_states": x}) for x in whole])
    pool.select(9)
    assert seen[0].shape == (18, 256)
    found, expected = (spatial_similarity(x, x) * 2 - 1 for x in (seen[0], whole.flatten(1).numpy()))
    assert np.abs(found - expected).max() < 3.5 / 256**0.5


def test_images_of_several_sizes_can_be_drawn_by_chance_alone():
    model = make_tiny(PIXART)

    def run():
        for size in (8, 4):
            given = inputs_of(PIXART)
            output_of(model, {**given, "hidden_states": given["hidden_states"][..., :size]})

    pool = pool_from_run(model, run)
    with pytest.raises(DataError, match=r"needs one size; it has \[\[2, 4, 8, 8\]\] and \[\[2, 4, 8, 4\]\] .*'random'"):
        pool.select(1, TapConfig(clusters=1))
    assert len(pool.select(1, method="random")) == 1


def test_latents_may_be_a_list():
    model = make_tiny(Z_IMAGE)
    pool = pool_from_run(model, forwards(Z_IMAGE, model))
    calls = recorded_calls(model, forwards(Z_IMAGE, model))
    looks = torch.stack([torch.cat([x.flatten() for x in call["x"]]) for _, call in calls]).numpy()
    config = TapConfig(clusters=2, rate=1.0)
    assert (pool.select(4, config) == select_samples(looks, np.arange(10.0), 4, config)).all()


def test_only_one_run_is_in_memory(tmp_path):
    """Count the latents that are alive: those of one run, whatever the number of images."""
    most = []
    for count in (2, 6):
        model = make_tiny(FLUX)
        alive = []

        def look(count=alive):
            count.append(sum(type(x) is torch.Tensor and x.shape == (2, 16, 16) for x in gc.get_objects()))

        runs = images(model, count)
        pool = pool_from_run(
            model, [partial(lambda run: (look(), run(), look()), run) for run in runs], tmp_path / f"{count}"
        )
        for _ in pool.batches(pool.select(9, TapConfig(clusters=2, rate=1.0))):
            look()
        most.append(max(alive))
    assert 6 <= most[0] <= 8
    assert 6 <= most[1] <= 8


def test_calls_are_those_of_a_cached_model():
    model = make_tiny(FLUX)
    apply_cache(model, cache_interval=3)
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))

    def run():
        given, x = inputs_of(FLUX), latents
        for step in range(4):
            given = {**given, "hidden_states": x, "timestep": torch.full((2,), 0.9 - step / 8)}
            x = x - output_of(model, given) / 8

    cached = list(pool_from_run(model, run).batches())
    remove_cache(model)
    same = [
        torch.equal(a["hidden_states"], b["hidden_states"])
        for a, b in zip(cached, pool_from_run(model, run).batches(), strict=True)
    ]
    assert same == [True, True, False, False]  # step 1 is the first to reuse; step 2 sees it


def test_a_graphed_model_is_recorded():
    model = make_tiny(FLUX)
    expected = recorded_calls(model, lambda: [run() for run in images(model)])
    assert_holds(pool_from_run(graph(model), images(model)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "compile()"])
def test_a_compiled_model_is_recorded(whole):
    model = make_tiny(FLUX)
    expected = recorded_calls(model, lambda: [run() for run in images(model)])
    compiled = torch.compile(model, backend="eager") if whole else model
    model.compile(backend="eager")

    def run():
        for _, given in expected:
            compiled(**given)

    with torch.no_grad():
        run()  # compiled before there is a hook
    assert_holds(pool_from_run(compiled, run), expected)


class Interrupted(Exception):  # noqa: N818
    pass


def test_an_interrupted_recording_goes_on(tmp_path):
    model, ran = make_tiny(FLUX), []
    runs = images(model)
    expected = recorded_calls(model, lambda: [run() for run in runs])

    def interrupted():
        runs[1]()
        raise Interrupted

    with pytest.raises(Interrupted):
        pool_from_run(model, [runs[0], interrupted, runs[2]], tmp_path, about="three")
    assert sorted(os.listdir(tmp_path)) == ["run-000000.safetensors", "runs.json"]
    with pytest.raises(DataError, match=r"run-000001.* is no recorded run"):
        RunPool(tmp_path)
    counted = [partial(lambda i: (ran.append(i), runs[i]()), i) for i in range(3)]
    assert_holds(pool_from_run(model, counted, tmp_path, about="three"), expected)
    assert ran == [1, 2]
    assert_holds(pool_from_run(model, counted, tmp_path, about="three"), expected)
    assert_holds(RunPool(tmp_path), expected)
    assert ran == [1, 2]
    assert json.loads((tmp_path / "runs.json").read_text())["about"] == "three"


def test_other_recordings_are_refused(tmp_path):
    model = make_tiny(FLUX)
    runs = images(model, 2)
    pool_from_run(model, runs, tmp_path)
    for given, changes, message in (
        (runs[:1], {}, "holds a pool of runs 2; this one would have 1"),
        (runs, {"about": "coats"}, "holds a pool of about ; this one would have coats"),
    ):
        with pytest.raises(ConfigError, match=message):
            pool_from_run(model, given, tmp_path, **changes)
    apply_cache(model)
    with pytest.raises(ConfigError, match="holds a pool of cache None"):
        pool_from_run(model, runs, tmp_path)
    remove_cache(model)
    with torch.no_grad():
        model.proj_out.bias[1] += 1e-3
    with pytest.raises(ConfigError, match=r"holds a pool of weights_sha256 \w+; this one would have \w+"):
        pool_from_run(model, runs, tmp_path)


def test_what_cannot_be_recorded_is_refused(tmp_path):
    model = make_tiny(FLUX)
    with pytest.raises(DataError, match="the function did not run this FluxTransformer2DModel"):
        pool_from_run(model, lambda: None)
    with pytest.raises(ConfigError, match="run is an empty list"):
        pool_from_run(model, [])
    with pytest.raises(DataError, match=r"given joint_attention_kwargs with a object; tensors, .* can be recorded"):
        pool_from_run(model, images(model, joint_attention_kwargs={"mask": object()}))
    with pytest.raises(DataError, match="without hidden_states or one of timestep, timesteps, t is no step"):
        pool_from_run(model, lambda: model(inputs_of(FLUX)["hidden_states"]))
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(DataError, match="a call of this Linear without input or one of timestep"):
        pool_from_run(layer, lambda: layer(torch.ones(1, 2)))
    assert not model._forward_pre_hooks
    with pytest.raises(ConfigError, match=r"is no record of runs: No such file.*that pool_from_run has written"):
        RunPool(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        pool_from_run(model, images(model), tmp_path / "file" / "pool")
    pool = pool_from_run(model, images(model, 1), tmp_path / "pool")
    with pytest.raises(ConfigError, match="index 6 is out of range; the pool has samples 0 to 5"):
        pool.batches([0, 6])
    path = tmp_path / "pool" / "run-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is no recorded run: .*; delete it to have it recorded again"):
        pool.select(2, TapConfig(clusters=1))


def test_a_pool_without_a_directory_leaves_nothing_behind():
    model = make_tiny(FLUX)
    pool = pool_from_run(model, images(model, 1))
    directory = pool.directory
    assert os.path.isdir(directory)
    del pool
    gc.collect()
    assert not os.path.exists(directory)
