"""Quantized models in a directory: loaded bit for bit without full-precision weights, refused where they changed."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import qandc
from qandc import (
    CalibratedSchedule,
    ConfigError,
    DeviceError,
    ModelError,
    OutputError,
    Preset,
    QuantLinear,
    RangeConfig,
    apply_cache_to_dit,
    calibrate,
    calibrate_steps,
    fashion_dit_preset,
    fuse_dit,
    get_cache,
    input_hessians,
    load,
    load_pipeline,
    quantization_report,
    quantize_model,
    sample_latents,
    save,
    smoothing_factors,
)
from qandc.fusion.fuse import Fused
from qandc.quantization.conversion import quant_layers
from qandc.variance_compensation import FittedFor, epsilon_scaling
from tests.conftest import FloatsMade, in_time, make_dit
from tests.test_calibration import dit_batches
from tests.test_saved import make_features
from tests.test_saved import rewrite as rewrite_manifest
from tests.tiny_models import make_tiny

FILES = {"qandc.json", "qandc.safetensors", "config.json", "diffusion_pytorch_model.safetensors"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
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
    save(static_model, tmp_path / "saved")
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
    save(model, tmp_path / "new" / "saved")
    found = load(tmp_path / "new" / "saved")
    assert (found.schedule, found.compensation, found.step_ranges) == (None, None, None)
    assert_same_model(model, found.model)
    assert torch.equal(output(found.model, dit_inputs), output(model, dit_inputs))
    assert str(quantization_report(found.model)) == str(quantization_report(model))
    assert not found.model.training
    assert {t.device.type for t in all_tensors(found.model).values()} == {"cpu"}
    assert {path.name for path in (tmp_path / "new" / "saved").iterdir()} == FILES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_layers_left_in_full_precision_and_other_structures(tmp_path, dit_inputs):
    model = make_dit(num_layers=2, attention_bias=False, patch_size=4, activation_fn="gelu")
    quantize_model(model, skip_patterns=["norm", "to_k", "transformer_blocks.1"])
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved").model
    assert quant_layers(loaded).keys() == quant_layers(model).keys()
    assert torch.equal(output(loaded, dit_inputs), output(model, dit_inputs))


@pytest.mark.parametrize("kind", ["as loaded", "all cast", "a module"])
def test_modules_that_have_a_precision_of_their_own_keep_it(tmp_path, kind):
    """diffusers keeps some of Wan in float32; whatever is cast besides comes back as it was saved."""
    model = make_tiny("WanTransformer3DModel")
    model.save_pretrained(tmp_path / "plain")
    model = type(model).from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16).eval()
    if kind == "all cast":
        nn.Module.to(model, torch.bfloat16)
    if kind == "a module":
        model.proj_out.float()
        with torch.no_grad():
            model.proj_out.weight.mul_(1.001)  # in no bfloat16
    quantize_model(model, skip_patterns=["proj_out", "patch_embedding", "condition_embedder"])
    save(model, tmp_path / "saved")
    found = load(tmp_path / "saved").model
    assert found.dtype == torch.bfloat16
    ours, theirs = model.state_dict(), found.state_dict()  # of buffers that no file holds nothing is known
    assert {name: tensor.dtype for name, tensor in theirs.items()} == {name: t.dtype for name, t in ours.items()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_another_dtype_leaves_the_scales_alone(tmp_path, dit_inputs):
    model = make_quantized(4, 8, ["static", "smoothing"])
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", dtype=torch.bfloat16).model
    for layer in quant_layers(loaded).values():
        assert layer.weight_scale.dtype == torch.float32
        assert layer.act_scale is None or layer.act_scale.dtype == torch.float32  # None where one row is seen
        assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert_same_model(model.to(torch.bfloat16), loaded)
    assert torch.equal(output(loaded, dit_inputs), output(model, dit_inputs))


def test_no_full_precision_weight_is_filled(tmp_path, monkeypatch):
    """diffusers allocates one at a time and throws it away: nothing is written to it."""
    model = make_quantized(heads=3, head_dim=8)
    save(model, tmp_path / "saved")
    kept = {t.numel() for t in all_tensors(model).values() if t.is_floating_point()}
    weights = {layer.in_features * layer.out_features for layer in quant_layers(model).values()} - kept
    assert weights == {24 * 96, 24 * 48}  # q, k and v are as large as a layer that stays: the patch below sees them

    def on_meta(self):
        assert self.weight.is_meta

    monkeypatch.setattr(nn.Linear, "reset_parameters", on_meta)
    with FloatsMade(leave_out=torch.ops.aten.empty) as made:
        load(tmp_path / "saved", dtype=torch.bfloat16)
    assert made.sizes
    assert not weights & made.sizes.keys()


@pytest.mark.parametrize(("w_bits", "limit"), [(8, 0.27), (4, 0.16)])
def test_size_of_the_quantized_layers(tmp_path, w_bits, limit):
    """All that is stored of them, against weight and bias in float32."""
    model = make_quantized(w_bits, heads=3, head_dim=64, num_layers=1)
    for layer in quant_layers(model).values():
        layer.set_static_range(torch.tensor(0.1), torch.tensor(3))
    save(model, tmp_path / "saved")
    stored, layers = load_file(tmp_path / "saved" / WEIGHTS), quant_layers(model)
    after = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[0] in layers)
    before = sum(4 * layer.out_features * (layer.in_features + 1) for layer in layers.values())
    assert 0.1 * before < after <= limit * before


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_belongs_to_the_model_comes_back_with_it(tmp_path, static_model, symmetric):
    model = static_model
    schedule = CalibratedSchedule((True, True, False), (900, 500, 100), "hicache", 1, 0.1, 0.2)
    compensation = epsilon_scaling(1.01, 4, FittedFor("DDIMScheduler", (900, 500, 100), 1.5, "W8A8"))
    ranges = calibrate_steps(model, dit_batches([900, 500, 100], rows=1), ranges=RangeConfig(symmetric=symmetric))
    features = make_features(replace(schedule, timesteps=(900, 500, 0)), 1)
    with pytest.raises(ConfigError, match=r"fitted for timesteps \(900.* 0.*\); this cache has"):
        save(model, tmp_path / "saved", schedule=schedule, features=features)
    features = make_features(schedule, 1)
    of_runs = {"schedule": schedule, "compensation": compensation, "step_ranges": ranges, "features": features}
    save(model, tmp_path / "saved", **of_runs)
    found = load(tmp_path / "saved")
    assert found.schedule == schedule
    assert found.compensation.fitted_for == compensation.fitted_for
    assert torch.equal(found.compensation.gain, compensation.gain)
    assert found.features.config == schedule.config()
    assert torch.equal(found.features.gains, features.gains)
    assert torch.equal(found.features.offsets, features.offsets)
    assert torch.equal(found.step_ranges.timesteps, ranges.timesteps)
    for theirs, ours in (
        (found.step_ranges.scales, ranges.scales),
        (found.step_ranges.zero_points, ranges.zero_points),
    ):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], values) for name, values in ours.items())
    assert bool(found.step_ranges.zero_points) is not symmetric
    rewrite_manifest(tmp_path / "saved", lambda content: content["features"].update(mode="branch"))
    with pytest.raises(ConfigError, match="fitted for mode 'branch'; this cache has 'hicache'"):
        load(tmp_path / "saved")
    save(found.model, tmp_path / "saved", overwrite=True)
    assert (load(tmp_path / "saved").schedule, load(tmp_path / "saved").features) == (None, None)
    save(found.model, tmp_path / "saved", overwrite=True, features=features)  # whose cache needs no schedule beside it
    found = load(tmp_path / "saved")
    apply_cache_to_dit(found.model, compensation=found.features)


def test_step_ranges_of_another_model_are_refused(tmp_path):
    model = make_quantized(num_layers=3)
    ranges = calibrate_steps(model, dit_batches([900, 100], rows=1))
    with pytest.raises(ConfigError, match=r"step_ranges names 'transformer_blocks\.2"):
        save(make_quantized(), tmp_path / "saved", step_ranges=ranges)
    assert not list(tmp_path.iterdir())


def test_cache_and_fusion_stay_and_are_not_saved(tmp_path, static_model, dit_inputs):
    model = copy.deepcopy(static_model)
    expected = output(model, dit_inputs)
    fuse_dit(model)
    cache = apply_cache_to_dit(model, 2)
    for _ in range(2):
        output(model, dit_inputs)
    save(model, tmp_path / "saved")
    assert get_cache(model) is cache
    assert cache.nbytes > 0
    assert Fused.of(model) is not None
    loaded = load(tmp_path / "saved").model
    assert type(loaded) is type(make_dit())
    assert Fused.of(loaded) is None
    assert torch.equal(output(loaded, dit_inputs), expected)


def test_a_model_that_has_sampled_is_saved(tmp_path):
    model = make_quantized(how=["static"])
    sample_latents(model, DDIMScheduler(), [1], seeds=[0], num_inference_steps=2)
    save(model, tmp_path / "saved")
    assert load(tmp_path / "saved").model.get_submodule(QKV).nan_flag is None


def test_tensors_that_share_memory_are_saved(tmp_path):
    """Parts of one weight, as a fused step has them; a full-precision layer that two blocks have in common."""
    model = make_quantized()
    model.transformer_blocks[1].norm1.emb = model.transformer_blocks[0].norm1.emb
    attention = model.transformer_blocks[0].attn1
    layers = [attention.to_q, attention.to_k, attention.to_v]
    whole = torch.cat([layer.qweight for layer in layers])
    for layer, part in zip(layers, whole.chunk(3), strict=True):
        layer.qweight = part
    model.transformer_blocks[1].attn1.to_k = model.transformer_blocks[0].attn1.to_k
    save(model, tmp_path / "saved")
    assert_same_model(model, load(tmp_path / "saved").model)


def test_a_directory_is_replaced_only_if_asked(tmp_path, saved, dit_inputs):
    model = make_quantized(4)
    with pytest.raises(OutputError, match=r"saved' holds a calibrated model; give another directory, or overw"):
        save(model, saved)
    save(model, saved, overwrite=True)
    assert torch.equal(output(load(saved).model, dit_inputs), output(model, dit_inputs))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert_same_model(model, load(tmp_path / "empty").model)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_stay(tmp_path, static_model, overwrite):
    """Keep files of other names beside a saved model; never replace those of its names, maybe the only copy."""
    static_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"holds 'config.json', which is no part of a calibrated model"):
        save(static_model, tmp_path, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "notes.txt").write_text("mine")
    for name in before:
        (tmp_path / name).unlink()
    save(static_model, tmp_path, overwrite=overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match=r"notes.txt' is a file; give another directory"):
        save(static_model, tmp_path / "notes.txt", overwrite=overwrite)


def test_files_beside_settings_stay(tmp_path, static_model):
    """Settings beside a model of one's own: what replaces them neither deletes nor overwrites that model."""
    preset = fashion_dit_preset()
    static_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    preset.save(tmp_path)
    preset.save(tmp_path)
    with pytest.raises(OutputError, match=r"holds 'config.json', which is no part of a calibrated model"):
        save(static_model, tmp_path, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert Preset.load(tmp_path).digest() == preset.digest()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["weights", "tensors"])
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
def test_a_full_disk_or_ctrl_c_changes_nothing(tmp_path, monkeypatch, saved, stage, old, error):
    target = saved if old else tmp_path / "new"
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def save_half(tensors, path, *args, **kwargs):
        if stage == "weights" or "diffusion" not in str(path):
            Path(path).write_bytes(b"half")
            raise error
        return save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", save_half)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        save(make_quantized(4), target, overwrite=old)
    assert not list(target.glob(".*"))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    monkeypatch.undo()
    load(saved)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}.*No such file|there is no qandc.json; load what"):
        load(saved)


def test_files_that_diffusers_would_read_instead(saved):
    for name in ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin"):
        (saved / name).write_text("{}")
        with pytest.raises(ConfigError, match=rf"holds '{name}', which is no part of it; remove that file"):
            load(saved)
        (saved / name).unlink()
    load(saved)


def test_other_paths_are_no_calibrated_models(tmp_path, saved):
    for path in (tmp_path / "nothing", saved / "qandc.json"):
        with pytest.raises(ConfigError, match="holds no calibrated model: there is no such directory; give one that"):
            load(path)
    with pytest.raises(ConfigError, match=r"there is no qandc\.json; make one with qandc calibrate"):
        load(tmp_path)
    make_quantized().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no qandc\.json; load what save_pretrained wrote by from_pretrained"):
        load(tmp_path)


def rewrite(directory, change_config=None, change_tensors=None):
    """Change a model and make its checksums true again, as other hands could."""
    weights, config = directory / WEIGHTS, directory / "config.json"
    if change_tensors:
        tensors = load_file(weights)
        change_tensors(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, weights, {"format": "pt"})
    if change_config:
        values = json.loads(config.read_text())
        change_config(values)
        config.write_text(json.dumps(values))

    def measure(content):
        for path in (weights, config):
            data = path.read_bytes()
            content["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite_manifest(directory, measure)


def test_what_is_rewritten_as_it_was_is_read(saved, static_model):
    rewrite(saved, lambda config: None, lambda tensors: None)
    assert_same_model(load(saved).model, static_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("proj_out_1.qweight"), "proj_out_1.* is a tensor too many"),
        (lambda t: t.pop("proj_out_1.weight_sum"), "lacks 1 tensors, proj_out_1.weight_sum among them"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is a tensor too many"),
        (lambda t: t.update({f"{QKV}.bias": torch.zeros(3)}), r"to_q.bias is \[3\] instead of \[32\]"),
        (lambda t: t.pop("proj_out_2.bias"), "proj_out_2.bias is missing"),
        (lambda t: t.pop(f"{QKV}.act_scale"), r"to_q\.act_zero_point has no act_scale beside it"),
        (
            lambda t: t.update({f"{QKV}.weight_scale": torch.ones(32).half()}),
            "torch.float16; .*stored as torch.float32",
        ),
        (lambda t: t[f"{QKV}.weight_scale"].fill_(float("nan")), "not finite or not > 0"),
        (lambda t: t[f"{QKV}.act_scale"].fill_(-1), "not finite or not > 0"),
        (lambda t: t[f"{QKV}.act_zero_point"].fill_(128), "is 128; .*an integer from -128 to 127"),
        (lambda t: t[f"{QKV}.bits"].sub_(1), r"is W7A7; .*says W8A8"),
        (lambda t: t[f"{QKV}.weight_sum"].add_(1), "weight_sum is not the sum of its integers in channel 0"),
        (lambda t: t[f"{QKV}.qweight"][5].neg_(), "weight_sum is not the sum of its integers in channel 5"),
    ],
)
def test_tensors_that_no_quantization_gives(saved, change, message):
    rewrite(saved, None, change)
    with pytest.raises(ModelError, match=message):
        load(saved)
    if "to_q" in message or "weight_sum" in message:
        with pytest.raises((ModelError, RuntimeError, ValueError)):
            type(make_dit()).from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_layers=3), "transformer_blocks.2.* is missing"),
        (lambda c: c.update(num_layers=1), "transformer_blocks.1.* is no linear layer"),
        (lambda c: c.update(patch_size=4), r"pos_embed.* is \[.*\] instead of \[.*\]"),
        (lambda c: c.update(num_layers=1_000_000), "num_layers is 1000000; there are"),
        (lambda c: c.update(num_layers="2"), "num_layers is 2; there are"),
        (lambda c: c.update(patch_size=0), "config.json' is no calibrated model"),
        (lambda c: c.update(in_channels=-1), "config.json' is no calibrated model"),
        (lambda c: c.update(num_attention_heads="x"), "config.json' is no calibrated model"),
        (lambda c: c.pop("_class_name"), "it has no '_class_name'"),
        (lambda c: c.update(_class_name="DiTPipeline"), "its class 'DiTPipeline' is no model of diffusers"),
        (lambda c: c.update(_class_name=[1]), r"its class '\[1\]' is no model of diffusers"),
        (lambda c: c["quantization_config"].update(w_bits=4), "its quantization_config says W4A8"),
        (lambda c: c["quantization_config"].update(quant_method="none"), "config.json' is no calibrated model"),
        (lambda c: c.pop("quantization_config"), "config.json' is no calibrated model|lacks"),
        (lambda c: c["quantization_config"].update(skip_patterns=["norm", "to_q"]), "to_q"),
    ],
)
def test_a_config_that_builds_another_model(saved, change, message):
    rewrite(saved, change)
    with in_time(), pytest.raises((ConfigError, ModelError), match=message):
        load(saved)


@pytest.mark.parametrize(
    ("buffer", "change", "message"),
    [
        ("weight_scale", torch.Tensor.half, "torch.float16; in a .* layer it must be stored as torch.float32"),
        ("weight_sum", torch.Tensor.float, "torch.float32; .* must be stored as torch.int32"),
        ("weight_scale", lambda t: t * float("nan"), "not finite or not > 0"),
    ],
)
def test_layers_whose_tensors_mean_something_else_are_not_saved(tmp_path, buffer, change, message):
    model = make_quantized()
    layer = model.get_submodule(QKV)
    setattr(layer, buffer, change(getattr(layer, buffer)))
    with pytest.raises(ModelError, match=f"{QKV}.{buffer} is {message}"):
        save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_where_and_as_what_it_is_loaded(saved):
    with pytest.raises(ConfigError, match=r"dtype is torch.int8; allowed are torch.float16"):
        load(saved, dtype=torch.int8)
    with pytest.raises(ConfigError, match="device is 'abacus'; give a device such as 'cpu'"):
        load(saved, device="abacus")
    with pytest.raises(DeviceError, match="device is 'cuda:99'; give a device that is here"):
        load(saved, device="cuda:99")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: make_dit(), "this DiTTransformer2DModel is not quantized; quantize_model it"),
        (lambda model: QuantLinear(4, 4), "writes models of diffusers; got QuantLinear: of a pipeline, pass"),
        (lambda model: torch.compile(model), "got OptimizedModule: .*the model before torch.compile"),
        (with_parametrization, r"proj_out_1.parametrizations.*remove LoRA, parametrizations"),
        (with_lora, rf"{QKV}.lora_A.weight is a tensor too many; .*remove LoRA"),
        (around_a_layer, rf"{QKV}.0 is no linear layer"),
        (lambda model: model.to("meta"), "is on the meta device and has no values"),
    ],
    ids=["not quantized", "no model", "compiled", "parametrization", "LoRA", "wrapped", "meta"],
)
def test_models_that_cannot_be_saved(tmp_path, change, message):
    model = change(make_quantized())
    with pytest.raises(ModelError, match=message):
        save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_copy_elsewhere_is_as_good(tmp_path, saved):
    """Nothing in it depends on where it is, nor stays bound to where it was loaded from."""
    shutil.copytree(saved, tmp_path / "copy")
    loaded = load(tmp_path / "copy").model
    shutil.rmtree(tmp_path / "copy")
    assert_same_model(loaded, load(saved).model)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in saved.iterdir())


def test_any_model_of_diffusers_is_saved_with_its_schedule(tmp_path):
    model = quantize_model(make_tiny("FluxTransformer2DModel"))
    schedule = CalibratedSchedule((True, False), (900, 100), "delta", 0)
    save(model, tmp_path / "saved", schedule=schedule)
    found = load(tmp_path / "saved")
    assert found.schedule == schedule
    assert_same_model(found.model, model)


@pytest.mark.slow
def test_settings_without_a_model_quantize_the_one_they_name():
    """Check the shipped settings, which are for the embedded pipeline."""
    directory = Path(qandc.__file__).parent / "assets" / "fashion-dit-presets" / "w4a8"
    found = load(directory)
    preset = fashion_dit_preset(4)
    assert_same_model(found.model, preset.quantize(load_pipeline().transformer).eval())
    assert found.schedule == preset.schedule
    for ours, theirs in ((found.compensation, preset.compensation), (found.features, preset.features)):
        assert (ours is None) == (theirs is None)
        assert ours is None or all(torch.equal(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items())
    assert load(directory, dtype=torch.bfloat16).model.dtype == torch.bfloat16
