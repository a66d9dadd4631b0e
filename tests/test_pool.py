"""The candidate pool: what it holds, how it is stored and resumed, and that calibration takes it."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qandc import (
    ConfigError,
    DataError,
    OutputError,
    TapConfig,
    apply_cache_to_dit,
    calibrate,
    calibrate_steps,
    make_scheduler,
    quantize_model,
    record_pool,
    record_trajectory,
    remove_cache,
    select_samples,
)
from qandc.method.pool import SHARD
from qandc.quantization.conversion import quant_layers

RUN = {"num_inference_steps": 6, "guidance_scale": 2.0}
LABELS = [3, 5, 8, 3, 1]


@pytest.fixture
def scheduler():
    return make_scheduler("ddpm", {"clip_sample": False})


def record(dit, scheduler, **changes):
    return record_pool(dit, scheduler, LABELS, **{**RUN, "batch_size": 2, **changes})


def test_holds_every_input_of_every_run(dit, scheduler):
    pool = record(dit, scheduler)
    trajectory = record_trajectory(dit, scheduler, LABELS, **RUN)
    assert len(pool) == 30
    for i, label in enumerate(LABELS):
        shard, first = (i // 2, i % 2)
        size = min(2, len(LABELS) - 2 * shard)
        of_image = [shard * 12 + step * size + first for step in range(6)]
        assert pool.conditions[of_image].tolist() == [label] * 6
        assert pool.steps[of_image].tolist() == list(range(6))
        assert pool.timesteps[of_image].tolist() == scheduler.timesteps.tolist()
        # the input of a step is what the step before it ended with
        torch.testing.assert_close(pool.hidden_states[of_image[1:]], trajectory.samples[:-1, i], rtol=1e-4, atol=1e-4)
    assert pool.null_label == 1000


def test_without_guidance_there_are_no_unconditional_rows(dit, scheduler):
    pool = record(dit, scheduler, guidance_scale=1.0)
    assert pool.null_label is None
    assert len(next(pool.batches(batch_size=7))["hidden_states"]) == 7


def test_a_cache_changes_what_is_recorded_after_its_first_reuse_step(dit, scheduler):
    without = record(dit, scheduler)
    apply_cache_to_dit(dit, cache_interval=3)
    cached = record(dit, scheduler)
    remove_cache(dit)
    same = [
        torch.equal(without.hidden_states[without.steps == step], cached.hidden_states[cached.steps == step])
        for step in range(6)
    ]
    assert same == [True, True, False, False, False, False]  # step 1 is the first to reuse; step 2 sees it


def test_batches_are_inputs_of_the_transformer(dit, scheduler):
    pool = record(dit, scheduler)
    chosen = np.array([29, 0, 7, 11])
    batches = list(pool.batches(chosen, batch_size=3, dtype=torch.bfloat16))
    assert [len(batch["timestep"]) for batch in batches] == [6, 2]
    first = batches[0]
    assert first["hidden_states"].dtype == torch.bfloat16
    assert torch.equal(first["hidden_states"][:3], pool.hidden_states[[29, 0, 7]].bfloat16())
    assert torch.equal(first["hidden_states"][:3], first["hidden_states"][3:])
    assert torch.equal(first["timestep"], pool.timesteps[[29, 0, 7, 29, 0, 7]])
    assert first["class_labels"].tolist() == [*pool.conditions[[29, 0, 7]].tolist(), 1000, 1000, 1000]
    dit.bfloat16()(**first)


def test_batches_of_one_timestep_each(dit, scheduler):
    pool = record(dit, scheduler)
    batches = list(pool.batches(by_timestep=True, batch_size=3))
    assert all(len(set(batch["timestep"].tolist())) == 1 for batch in batches)
    assert sum(len(batch["timestep"]) for batch in batches) == 2 * len(pool)
    ranges = calibrate_steps(quantize_model(dit), batches, groups=2)
    assert len(ranges.timesteps) == 6


def test_fractions_of_timesteps_are_kept(dit, tmp_path):
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler(num_train_timesteps=4)
    run = {"num_inference_steps": 3, "guidance_scale": 1.0, "directory": tmp_path}
    pool = record(dit, euler, **run)
    assert sorted(set(pool.timesteps.tolist()), reverse=True) == [3, 1.5, 0]
    assert torch.equal(record(dit, euler, **run).timesteps, pool.timesteps)
    batches = list(pool.batches(by_timestep=True, batch_size=9))
    assert [batch["timestep"].unique().tolist() for batch in batches] == [[0], [1.5], [3]]
    with pytest.raises(DataError, match=r"timesteps of a pool of 15 samples are \[15\] finite numbers"):
        replace(pool, timesteps=pool.timesteps / 0)


def test_select_is_that_of_tap_over_looks_and_steps(dit, scheduler):
    pool = record(dit, scheduler)
    config = TapConfig(clusters=3, rate=1.0)
    for method in ("tap", "random", "uniform"):
        found = pool.select(9, config, method=method, seed=4)
        looks = pool.hidden_states.flatten(1).numpy()
        assert (found == select_samples(looks, pool.steps.numpy(), 9, config, method=method, seed=4)).all()
        half = replace(pool, hidden_states=pool.hidden_states.bfloat16())
        looks = half.hidden_states.flatten(1).float().numpy()
        chosen = select_samples(looks, pool.steps.numpy(), 9, config, method=method, seed=4)
        assert (half.select(9, config, method=method, seed=4) == chosen).all()


def test_calibrates_a_model(dit, scheduler):
    pool = record(dit, scheduler)
    calibrate(quantize_model(dit), pool.batches(pool.select(10, method="random")))
    assert [name for name, layer in quant_layers(dit).items() if layer.act_scale is None] == ["proj_out_1"]


class Interrupted(Exception):  # noqa: N818
    pass


def test_an_interrupted_recording_goes_on(dit, scheduler, tmp_path):
    expected = record(dit, scheduler)
    calls = []

    def interrupt(step, timestep, latents):
        calls.append(step)
        if len(calls) == 9:  # in the second of three batches
            raise Interrupted

    with pytest.raises(Interrupted):
        record(dit, scheduler, directory=tmp_path / "pool", callback=interrupt)
    assert len(list((tmp_path / "pool").glob("*.safetensors"))) == 1
    steps = []
    found = record(dit, scheduler, directory=tmp_path / "pool", callback=lambda step, *_: steps.append(step))
    assert len(steps) == 12
    again = record(dit, scheduler, directory=tmp_path / "pool", callback=lambda *_: pytest.fail("sampled again"))
    for pool in (found, again):
        for name in ("hidden_states", "timesteps", "steps", "conditions"):
            assert torch.equal(getattr(pool, name), getattr(expected, name))
    assert not [name for name in os.listdir(tmp_path / "pool") if name.endswith("partial")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 3.0}, r"guidance_scale 2\.0; this one would have 3\.0"),
        ({"num_inference_steps": 5}, "timesteps"),
        ({"seeds": [9, 8, 7, 6, 5]}, r"seeds \[0, 1, 2, 3, 4\]; this one would have \[9"),
        ({"batch_size": 3}, "batch_size 2"),
    ],
)
def test_a_pool_of_other_settings_is_refused(changes, message, dit, scheduler, tmp_path):
    record(dit, scheduler, directory=tmp_path)
    with pytest.raises(ConfigError, match=message):
        record(dit, scheduler, directory=tmp_path, **changes)


def test_a_pool_of_another_cache_is_refused_with_both_named(dit, scheduler, tmp_path):
    apply_cache_to_dit(dit, cache_interval=2)
    record(dit, scheduler, directory=tmp_path)
    remove_cache(dit)
    apply_cache_to_dit(dit, cache_interval=3)
    with pytest.raises(ConfigError, match=r"holds a pool of cache_schedule \[True, .*; this one would have \[True"):
        record(dit, scheduler, directory=tmp_path)


@pytest.mark.parametrize("part", ["transformer_blocks.1.ff.net.2.weight", "proj_out_2.bias"])
def test_a_pool_of_other_weights_is_refused(part, dit, scheduler, tmp_path):
    """Also if one weight alone differs, and only by a little; the same weights go on where they stopped."""
    record(dit, scheduler, directory=tmp_path)
    fail = lambda *step: pytest.fail("sampled again")  # noqa: E731
    record(dit, scheduler, directory=tmp_path, callback=fail)
    with torch.no_grad():
        dit.get_parameter(part).view(-1)[3] += 1e-3
    with pytest.raises(ConfigError, match=r"holds a pool of weights_sha256 \w+; this one would have \w+"):
        record(dit, scheduler, directory=tmp_path, callback=fail)


def test_a_pool_whose_settings_or_shards_lack_something_is_refused(dit, scheduler, tmp_path):
    """As one of a version that did not write it."""
    record(dit, scheduler, directory=tmp_path)
    path = tmp_path / "pool.json"
    values = json.loads(path.read_text())
    known = {"weights_sha256", "scheduler_config", "seeds", "batch_size", "guidance_scale", "timesteps", "cache_mode"}
    assert known < set(values)
    for name in values:
        path.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
        with pytest.raises(ConfigError, match=f"another version of qandc: pool.json has no '{name}'"):
            record(dit, scheduler, directory=tmp_path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="is no record of settings"):
        record(dit, scheduler, directory=tmp_path)
    path.write_text(json.dumps(values))
    shard = min(tmp_path.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file(tensors, shard)
    with pytest.raises(DataError, match="has version 0, known is 1; delete it"):
        record(dit, scheduler, directory=tmp_path)
    del tensors["steps"]
    SHARD.write_tensors(shard, tensors, {})
    with pytest.raises(DataError, match="has no steps; delete it"):
        record(dit, scheduler, directory=tmp_path)


def test_labels_and_seeds_are_checked_before_any_work(dit, scheduler, tmp_path):
    for labels, seeds, message in (
        ([], None, "no class ids given"),
        ([1, 1000], None, "class id 1000 is out of range"),
        ([1, 2, 3], [1, 2], "3 class ids need as many seeds; got 2"),
        ([1, 2], [1, 2, 3], "2 class ids need as many seeds; got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            record_pool(dit, scheduler, labels, seeds=seeds, directory=tmp_path / "pool", **RUN)
    assert not (tmp_path / "pool").exists()
    labels = torch.tensor(LABELS)
    expected = record(dit, scheduler)
    found = record_pool(dit, scheduler, labels, batch_size=2, **RUN)
    assert torch.equal(found.hidden_states, expected.hidden_states)
    assert torch.equal(found.conditions, expected.conditions)


def test_damaged_and_unwritable(dit, scheduler, tmp_path):
    record(dit, scheduler, directory=tmp_path / "pool")
    shard = min((tmp_path / "pool").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"is no shard of a pool: .* delete it"):
        record(dit, scheduler, directory=tmp_path / "pool")
    (tmp_path / "pool" / "pool.json").write_text("{")
    with pytest.raises(ConfigError, match="is no record of settings"):
        record(dit, scheduler, directory=tmp_path / "pool")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        record(dit, scheduler, directory=tmp_path / "file" / "pool")


def test_a_full_disk_leaves_no_fragment(dit, scheduler, tmp_path, monkeypatch):
    def full(source, target):
        if target.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*pool-000000.*No space left"):
        record(dit, scheduler, directory=tmp_path)
    assert os.listdir(tmp_path) == ["pool.json"]
