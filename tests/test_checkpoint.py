"""Quantized checkpoints: loaded bit for bit without full-precision weights, written whole or not at all."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler
from qandc.method.checkpoint import _digest, _outline
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from qandc import (
    CalibratedSchedule,
    ConfigError,
    DeviceError,
    ModelError,
    OutputError,
    QuantLinear,
    RangeConfig,
    apply_cache_to_dit,
    calibrate,
    calibrate_steps,
    fuse_dit,
    get_cache,
    input_hessians,
    load_quantized,
    quantization_report,
    quantize_model,
    sample_latents,
    save_quantized,
    smoothing_factors,
)
from qandc.fusion.fuse import FUSED
from qandc.quantization.conversion import quant_layers
from qandc.variance_compensation import FittedFor, epsilon_scaling
from tests.conftest import FloatsMade, in_time, make_dit
from tests.test_calibration import dit_batches
from tests.tiny_models import make_tiny

QKV = "transformer_blocks.0.attn1.to_q"


def make_quantized(w_bits=8, a_bits=8, how=(), dtype=torch.float32, **changes):
    """``how`` is any of static, symmetric, smoothing, GPTQ."""
    model = make_dit(**{"num_layers": 2, **changes}).to(dtype)
    batches = [{**b, "hidden_states": b["hidden_states"].to(dtype)} for b in dit_batches([900, 400], rows=1)]
    hessians = input_hessians(model, batches) if {"GPTQ", "smoothing"} & {*how} else {}
    extras = {"hessians": hessians} if "GPTQ" in how else {}
    if "smoothing" in how:
        extras["smoothing"] = smoothing_factors(model, batches, [name for name in hessians if "blocks" in name])
    quantize_model(model, w_bits, a_bits, **extras)
    if {"static", "symmetric"} & {*how}:
        calibrate(model, batches, symmetric="symmetric" in how)
    return model


def output(model, inputs):
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{**inputs, "hidden_states": inputs["hidden_states"].to(dtype)}).sample


def all_tensors(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


def assert_same_model(model, other):
    ours, theirs = all_tensors(model), all_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def static_model():
    """With static ranges; not to be changed."""
    return make_quantized(how=["static"])


@pytest.fixture
def saved(tmp_path, static_model):
    """A checkpoint to damage."""
    save_quantized(static_model, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("w_bits", "a_bits", "how", "dtype"),
    [
        (8, 8, [], torch.float32),
        (4, 6, [], torch.float32),
        (8, 8, ["static", "smoothing"], torch.float32),
        (4, 8, ["static", "GPTQ"], torch.float32),
        (8, 16, [], torch.bfloat16),
        (4, 16, ["GPTQ", "smoothing"], torch.float32),
        (4, 4, ["symmetric", "GPTQ", "smoothing"], torch.bfloat16),
    ],
    ids=lambda value: "+".join(value) or "dynamic" if isinstance(value, list) else str(value),
)
def test_a_loaded_model_is_the_saved_one(tmp_path, dit_inputs, w_bits, a_bits, how, dtype):
    model = make_quantized(w_bits, a_bits, how, dtype)
    save_quantized(model, tmp_path / "new" / "saved")
    found = load_quantized(tmp_path / "new" / "saved")
    assert (found.schedule, found.compensation, found.step_ranges) == (None, None, None)
    assert_same_model(model, found.model)
    assert torch.equal(output(found.model, dit_inputs), output(model, dit_inputs))
    assert str(quantization_report(found.model)) == str(quantization_report(model))
    assert not found.model.training
    assert {t.device.type for t in all_tensors(found.model).values()} == {"cpu"}
    assert {path.name for path in (tmp_path / "new" / "saved").iterdir()} == {"model.safetensors", "quantized.json"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_layers_left_in_full_precision_and_other_structures(tmp_path, dit_inputs):
    model = make_dit(num_layers=2, attention_bias=False, patch_size=4, activation_fn="gelu")
    quantize_model(model, skip_patterns=["norm", "to_k", "transformer_blocks.1"])
    save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved").model
    assert quant_layers(loaded).keys() == quant_layers(model).keys()
    assert torch.equal(output(loaded, dit_inputs), output(model, dit_inputs))


def test_another_dtype_leaves_the_scales_alone(tmp_path, dit_inputs):
    model = make_quantized(4, 8, ["static", "smoothing"])
    save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved", dtype=torch.bfloat16).model
    for layer in quant_layers(loaded).values():
        assert layer.weight_scale.dtype == torch.float32
        assert layer.act_scale is None or layer.act_scale.dtype == torch.float32  # None where one row is seen
        assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert_same_model(model.to(torch.bfloat16), loaded)
    assert quantization_report(loaded) == quantization_report(model)  # of the weights that were quantized
    assert torch.equal(output(loaded, dit_inputs), output(model, dit_inputs))


def test_no_full_precision_weight_is_made(tmp_path, monkeypatch):
    """Neither by an operation, nor by a linear layer that is thrown away."""
    model = make_quantized(heads=3, head_dim=8)
    save_quantized(model, tmp_path / "saved")
    kept = {t.numel() for t in all_tensors(model).values() if t.is_floating_point()}
    weights = {layer.in_features * layer.out_features for layer in quant_layers(model).values()} - kept
    assert weights == {24 * 96, 24 * 48}  # q, k and v are as large as a layer that stays: the patch below sees them

    def on_meta(self):
        assert self.weight.is_meta

    monkeypatch.setattr(nn.Linear, "reset_parameters", on_meta)
    with FloatsMade() as made:
        load_quantized(tmp_path / "saved", dtype=torch.bfloat16)
    assert made.sizes
    assert not weights & made.sizes.keys()


@pytest.mark.parametrize(("w_bits", "limit"), [(8, 0.27), (4, 0.16)])
def test_size_of_the_quantized_layers(tmp_path, w_bits, limit):
    """All that is stored of them, against weight and bias in float32."""
    model = make_quantized(w_bits, heads=3, head_dim=64, num_layers=1)
    for layer in quant_layers(model).values():
        layer.set_static_range(torch.tensor(0.1), torch.tensor(3))
    save_quantized(model, tmp_path / "saved")
    stored, layers = load_file(tmp_path / "saved" / "model.safetensors"), quant_layers(model)
    after = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[0] in layers)
    before = sum(4 * layer.out_features * (layer.in_features + 1) for layer in layers.values())
    assert 0.1 * before < after <= limit * before
    manifest = json.loads((tmp_path / "saved" / "quantized.json").read_text())
    assert (manifest["bytes_before"], manifest["bytes_after"]) == quantization_report(model).quantized_bytes
    assert manifest["files"]["model.safetensors"]["bytes"] == (tmp_path / "saved" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_belongs_to_the_model_comes_back_with_it(tmp_path, static_model, symmetric):
    model = static_model
    schedule = CalibratedSchedule((True, True, False), (900, 500, 100), "taylor", 1, 0.1, 0.2)
    compensation = epsilon_scaling(1.01, 4, FittedFor("DDIMScheduler", (900, 500, 100), 1.5, "W8A8"))
    ranges = calibrate_steps(model, dit_batches([900, 500, 100], rows=1), ranges=RangeConfig(symmetric=symmetric))
    save_quantized(model, tmp_path / "saved", schedule=schedule, compensation=compensation, step_ranges=ranges)
    found = load_quantized(tmp_path / "saved")
    assert found.schedule == schedule
    assert found.compensation.fitted_for == compensation.fitted_for
    assert torch.equal(found.compensation.gain, compensation.gain)
    assert torch.equal(found.step_ranges.timesteps, ranges.timesteps)
    for theirs, ours in (
        (found.step_ranges.scales, ranges.scales),
        (found.step_ranges.zero_points, ranges.zero_points),
    ):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], values) for name, values in ours.items())
    assert bool(found.step_ranges.zero_points) is not symmetric
    save_quantized(found.model, tmp_path / "saved", overwrite=True)
    assert load_quantized(tmp_path / "saved").schedule is None
    assert not (tmp_path / "saved" / "schedule.json").exists()
    schedule.save(tmp_path / "saved" / "schedule.json")  # has no checksum in the manifest
    assert load_quantized(tmp_path / "saved").schedule is None


def test_step_ranges_of_another_model_are_refused(tmp_path):
    model = make_quantized(num_layers=3)
    ranges = calibrate_steps(model, dit_batches([900, 100], rows=1))
    with pytest.raises(ConfigError, match=r"step_ranges names 'transformer_blocks\.2"):
        save_quantized(make_quantized(), tmp_path / "saved", step_ranges=ranges)
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_no_cache_can_follow_is_refused(tmp_path, static_model):
    schedule = CalibratedSchedule((True, False), (900, 100), "taylor", 1)
    with pytest.raises(ConfigError, match="needs 2 computed steps before the first reuse"):
        save_quantized(static_model, tmp_path / "saved", schedule=schedule)
    assert not list(tmp_path.iterdir())


def test_cache_and_fusion_stay_and_are_not_saved(tmp_path, static_model, dit_inputs):
    model = copy.deepcopy(static_model)
    expected = output(model, dit_inputs)
    fuse_dit(model)
    cache = apply_cache_to_dit(model, 2)
    for _ in range(2):
        output(model, dit_inputs)
    save_quantized(model, tmp_path / "saved")
    assert get_cache(model) is cache
    assert cache.nbytes > 0
    assert FUSED in model.__dict__
    loaded = load_quantized(tmp_path / "saved").model
    assert type(loaded) is type(make_dit())
    assert FUSED not in loaded.__dict__
    assert torch.equal(output(loaded, dit_inputs), expected)


def test_a_model_that_has_sampled_is_saved(tmp_path):
    model = make_quantized(how=["static"])
    sample_latents(model, DDIMScheduler(), [1], seeds=[0], num_inference_steps=2)
    save_quantized(model, tmp_path / "saved")
    assert load_quantized(tmp_path / "saved").model.get_submodule(QKV).nan_flag is None


def test_tensors_that_share_memory_are_saved(tmp_path):
    """Parts of one weight, as a fused step has them; a full-precision layer that two blocks have in common."""
    model = make_quantized()
    model.transformer_blocks[1].norm1.emb = model.transformer_blocks[0].norm1.emb
    attention = model.transformer_blocks[0].attn1
    layers = [attention.to_q, attention.to_k, attention.to_v]
    whole = torch.cat([layer.qweight for layer in layers])
    for layer, part in zip(layers, whole.chunk(3), strict=True):
        layer.qweight = part
    save_quantized(model, tmp_path / "saved")
    assert_same_model(model, load_quantized(tmp_path / "saved").model)


def test_a_directory_is_replaced_only_if_asked(tmp_path, saved, dit_inputs):
    model = make_quantized(4)
    with pytest.raises(OutputError, match=r"saved' holds a checkpoint; give another directory, or overwrite=True"):
        save_quantized(model, saved)
    save_quantized(model, saved, overwrite=True)
    assert torch.equal(output(load_quantized(saved).model, dit_inputs), output(model, dit_inputs))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "empty").mkdir()
    save_quantized(model, tmp_path / "empty")
    assert_same_model(model, load_quantized(tmp_path / "empty").model)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_deleted(saved, overwrite):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt', which is no part of a checkpoint"):
        save_quantized(make_quantized(), saved, overwrite=overwrite)
    assert (saved / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be a checkpoint: Not a directory"):
        save_quantized(make_quantized(), saved / "notes.txt", overwrite=overwrite)


def full(monkeypatch, stage):
    """The disk is full when the weights, the schedule or the manifest are written, or the directory renamed."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_half(tensors, path):
        Path(path).write_bytes(b"half")
        raise error

    def write_half(path, text):
        path.write_bytes(text[: len(text) // 2].encode())
        raise error

    rename = os.rename

    def rename_old_only(source, target):
        if str(source).endswith(".new"):
            raise error
        rename(source, target)

    if stage == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", save_half)
    elif stage == "rename":
        monkeypatch.setattr(os, "rename", rename_old_only)
    else:
        written = Path.write_text
        manifest = stage == "manifest"
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda path, text: (write_half if ("quantized" in path.name) is manifest else written)(path, text),
        )


@pytest.mark.parametrize("stage", ["weights", "schedule", "manifest", "rename"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, saved, stage, old):
    target = saved if old else tmp_path / "new"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    schedule = CalibratedSchedule((True, False), (900, 100), "block", 0)
    full(monkeypatch, stage)
    with pytest.raises(OutputError, match="No space left on device"):
        save_quantized(make_quantized(4), target, overwrite=old, schedule=schedule)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    monkeypatch.undo()
    load_quantized(saved)


def test_an_interrupt_leaves_no_fragment(tmp_path, monkeypatch):
    def interrupt(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    model = make_quantized()
    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "quantized.json", "schedule.json"])
@pytest.mark.parametrize("position", [0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_is_noticed(tmp_path, saved, name, position):
    model = load_quantized(saved).model
    schedule = CalibratedSchedule((True, False), (900, 100), "block", 0)
    save_quantized(model, tmp_path / "with schedule", schedule=schedule)
    path = tmp_path / "with schedule" / name
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"{name}' (is not as it was written \(checksum\)|is no part of a checkpoint)"
    ):
        load_quantized(path.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "quantized.json"])
def test_truncated_and_missing_files(saved, name):
    path = saved / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    message = (
        f"holds {size - 100:,} of {size:,} bytes; copy it again" if "model" in name else "is no part of a checkpoint"
    )
    with pytest.raises(ConfigError, match=message):
        load_quantized(saved)
    path.unlink()
    message = "model.safetensors' cannot be read: No such file" if "model" in name else "it lacks quantized.json"
    with pytest.raises(ConfigError, match=message):
        load_quantized(saved)


def test_other_paths_are_no_checkpoints(tmp_path, saved):
    for path in (tmp_path / "nothing", saved / "quantized.json"):
        with pytest.raises(ConfigError, match="is no checkpoint: it is no directory; give one that save_quantized"):
            load_quantized(path)
    with pytest.raises(ConfigError, match=r"it lacks quantized\.json; give one that"):
        load_quantized(tmp_path)
    make_quantized().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks quantized\.json; load what save_pretrained wrote by from_pre"):
        load_quantized(tmp_path)


def rewrite(directory, change_manifest=None, change_tensors=None):
    """Change a checkpoint and make its checksums true again."""
    path, weights = directory / "quantized.json", directory / "model.safetensors"
    manifest = json.loads(path.read_text())
    if change_tensors:
        tensors = load_file(weights)
        change_tensors(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, weights)
        content = weights.read_bytes()
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"]["model.safetensors"] = entry
    if change_manifest:
        change_manifest(manifest)
    del manifest["sha256"]
    manifest["sha256"] = _digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QKV}.act_scale"), r"to_q.act_scale in model.safetensors is missing; quantized.json has"),
        (lambda t: t.pop("proj_out_1.qweight"), r"proj_out_1.qweight in model.safetensors is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra, which quantized.json does not name"),
        (lambda t: t.update({f"{QKV}.bias": torch.zeros(3)}), r"is float32 \[3\]; quantized.json has float32 \[32\]"),
        (lambda t: t.update({f"{QKV}.weight_scale": torch.ones(32).half()}), r"is float16 \[32\]; .* float32 \[32\]"),
    ],
    ids=["optional missing", "missing", "surplus", "shape", "dtype"],
)
def test_tensors_that_the_manifest_does_not_describe(saved, change, message):
    rewrite(saved, change_tensors=change)
    with pytest.raises(ConfigError, match=message):
        load_quantized(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["layers"].pop(QKV), f"{QKV}.* is a tensor too many"),
        (lambda m: m["config"].update(num_layers=3), "transformer_blocks.2.* is missing"),
        (lambda m: m["config"].update(num_layers=1), "transformer_blocks.1.* is no linear layer"),
        (lambda m: m["config"].update(patch_size=4), r"pos_embed.* is \[.*\] instead of \[.*\]"),
    ],
    ids=["layer", "too few", "too many", "shape"],
)
def test_a_config_that_builds_another_model(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ModelError, match=message):
        load_quantized(saved)


@pytest.mark.parametrize(
    ("buffer", "change", "message"),
    [
        ("weight_scale", torch.Tensor.half, "torch.float16; in a .* layer it must be stored as torch.float32"),
        ("weight_sum", torch.Tensor.float, "torch.float32; .* must be stored as torch.int32"),
        ("weight_scale", lambda t: t * float("nan"), "not finite or not > 0"),
        ("bits", lambda t: t - 1, r"W\dA\d; in a W\dA\d"),
    ],
)
def test_layers_whose_tensors_mean_something_else(tmp_path, saved, buffer, change, message):
    """Written by other hands with a manifest that agrees with them, or in a model that is to be saved."""
    name = f"{QKV}.{buffer}"
    rewrite(
        saved,
        lambda manifest: manifest["tensors"].update({name: _outline(load_file(saved / "model.safetensors")[name])}),
        lambda tensors: tensors.update({name: change(tensors[name])}),
    )
    with pytest.raises(ModelError, match=f"{name} is {message}"):
        load_quantized(saved)
    model = make_quantized()
    layer = model.get_submodule(QKV)
    setattr(layer, buffer, change(getattr(layer, buffer)))
    with pytest.raises(ModelError, match=f"{name} is {message}"):
        save_quantized(model, tmp_path / "other")


def test_a_zero_point_without_its_scale(saved):
    name = f"{QKV}.act_scale"
    rewrite(saved, lambda manifest: manifest["tensors"].pop(name), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=r"to_q\.act_zero_point has no act_scale beside it"):
        load_quantized(saved)


def test_a_newer_version(saved):
    rewrite(saved, lambda manifest: manifest.update(version=2))
    with pytest.raises(ConfigError, match=r"quantized.json' has version 2, known is 1; update qandc"):
        load_quantized(saved)
    (saved / "quantized.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no part of a checkpoint: it holds list, not an object"):
        load_quantized(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["files"].update({"../secret": m["files"]["model.safetensors"]}),
            "names the file '../secret'; those",
        ),
        (lambda m: m["files"].update({"/dev/zero": m["files"]["model.safetensors"]}), "names the file '/dev/zero'"),
        (lambda m: m["files"].update({"quantized.json": {}}), "names the file 'quantized.json'"),
        (lambda m: m["files"].pop("model.safetensors"), "it has no 'model.safetensors'"),
        (lambda m: m["files"].update({"compensation.safetensors": {}}), "it has no 'compensation.json'"),
        (
            lambda m: m["files"].update({"schedule.json": {"bytes": 1.0, "sha256": ""}}),
            "of schedule.json must be a text",
        ),
        (lambda m: m.pop("files"), "it has no 'files'"),
        (lambda m: m.update(files=[]), "must be objects"),
        (lambda m: m["layers"].update({QKV: 1}), "must be an object"),
        (lambda m: m["layers"][QKV].pop("in_features"), "it has no 'in_features'"),
        (lambda m: m["layers"][QKV].update(dtype="nn"), "has dtype 'nn'"),
        (lambda m: m["layers"][QKV].update(dtype=[]), "has dtype []"),
        (lambda m: m["config"].update(num_layers=1_000_000), "num_layers is 1000000; there are"),
        (lambda m: m["config"].update(num_layers="2"), "num_layers is 2; there are"),
        (lambda m: m["config"].update(patch_size=0), ""),
        (lambda m: m["config"].update(in_channels=-1), ""),
        (lambda m: m["config"].update(num_attention_heads="x"), ""),
    ],
)
def test_a_manifest_that_was_never_written(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ConfigError, match=f"quantized.json' is no part of a checkpoint: .*{re.escape(message)}"):
        load_quantized(saved)


@pytest.mark.parametrize("name", ["quantized.json", "model.safetensors"])
def test_a_part_that_is_no_regular_file(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with in_time(), pytest.raises(ConfigError, match=r"no regular file|lacks quantized\.json"):
        load_quantized(saved)


def test_where_and_as_what_it_is_loaded(saved):
    with pytest.raises(ConfigError, match=r"dtype is torch.int8; allowed are torch.float16"):
        load_quantized(saved, dtype=torch.int8)
    with pytest.raises(ConfigError, match="device is 'abacus'; give a device such as 'cpu'"):
        load_quantized(saved, device="abacus")
    with pytest.raises(DeviceError, match="device is 'cuda:99'; give a device that is here"):
        load_quantized(saved, device="cuda:99")


def with_parametrization(model):
    parametrize.register_parametrization(model.proj_out_1, "weight_scale", nn.Identity())
    return model


def with_lora(model):
    layer = model.get_submodule(QKV)
    layer.lora_A = nn.Linear(32, 2, bias=False)
    return model


def around_a_layer(model):
    model.transformer_blocks[0].attn1.to_q = nn.Sequential(model.transformer_blocks[0].attn1.to_q)
    return model


def with_a_tied_layer(model):
    model.transformer_blocks[1].attn1.to_q = model.transformer_blocks[0].attn1.to_q
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: make_dit(), "this DiTTransformer2DModel is not quantized; call quantize_model first"),
        (
            lambda model: QuantLinear(4, 4),
            r"writes diffusers' DiTTransformer2DModel alone; got QuantLinear: of",
        ),
        (
            lambda model: quantize_model(make_tiny("FluxTransformer2DModel")),
            r"got FluxTrans\w+: save it by model.save_pretrained\(directory\), .* by FluxTrans\w+.from_pretrained\(",
        ),
        (lambda model: torch.compile(model), "got OptimizedModule: .*the model before torch.compile"),
        (with_parametrization, r"proj_out_1.parametrizations.*remove LoRA, parametrizations"),
        (with_lora, rf"{QKV}.lora_A.weight is a tensor too many; .*remove LoRA"),
        (around_a_layer, rf"{QKV}.0 is no linear layer"),
        (with_a_tied_layer, r"transformer_blocks.1.attn1.to_q.* is a tensor too many"),
        (lambda model: model.to("meta"), "is on the meta device and has no values"),
    ],
    ids=["not quantized", "no DiT", "other class", "compiled", "parametrization", "LoRA", "wrapped", "tied", "meta"],
)
def test_models_that_cannot_be_saved(tmp_path, change, message):
    model = change(make_quantized())
    with pytest.raises(ModelError, match=message):
        save_quantized(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_copy_elsewhere_is_as_good(tmp_path, saved):
    """Nothing in it depends on where it is, nor stays bound to where it was loaded from."""
    shutil.copytree(saved, tmp_path / "copy")
    loaded = load_quantized(tmp_path / "copy").model
    shutil.rmtree(tmp_path / "copy")
    assert_same_model(loaded, load_quantized(saved).model)
    assert str(tmp_path) not in (saved / "quantized.json").read_text()
