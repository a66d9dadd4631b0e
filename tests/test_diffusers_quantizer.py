"""``quantization_config=QandCConfig(...)``: diffusers loads and saves what quantize_model makes, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn

import qandc
from qandc import (
    ConfigError,
    DataError,
    ModelError,
    QandCConfig,
    apply_cache_to_dit,
    fashion_dit_path,
    fuse_dit,
    load_pipeline,
    load_quantized,
    quantize_model,
    save_quantized,
)
from qandc.quantization import registration
from qandc.quantization.conversion import quant_layers
from qandc.quantization.diffusers_quantizer import QandCQuantizer
from tests.conftest import FloatsMade, make_dit
from tests.test_saved_models import all_tensors, assert_same_model, make_quantized, output

ROOT = Path(__file__).parents[1]
TO_Q = "transformer_blocks.0.attn1.to_q"


def load(path, **kwargs):
    return DiTTransformer2DModel.from_pretrained(path, **kwargs)


@pytest.fixture
def full(tmp_path):
    """A full-precision transformer in two files: all weights come before the first bias."""
    directory, tensors = tmp_path / "full", {}
    make_dit(num_layers=2).save_pretrained(directory, max_shard_size="200KB")
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, weights in enumerate((True, False), 1):
        part = {name: tensor for name, tensor in tensors.items() if name.endswith("weight") is weights}
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def saved(tmp_path):
    """A quantized one with static ranges, in one file, to damage."""
    make_quantized(4, how=["static"]).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def weights_of(directory):
    return directory / "diffusion_pytorch_model.safetensors"


def change_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("parallel", [False, True], ids=["", "in parallel"])
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"w_bits": 4, "a_bits": 6, "weight_clip": "mse"}, torch.bfloat16),
        ({"skip_patterns": ["norm", "to_k", "pos_embed"]}, torch.float32),
    ],
    ids=["W8A8", "W4A6 mse bfloat16", "patterns"],
)
def test_full_precision_weights_are_quantized_as_they_come(full, monkeypatch, settings, dtype, parallel):
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", parallel)
    model = load(full, quantization_config=QandCConfig(**settings), torch_dtype=dtype)
    expected = nn.Module.to(quantize_model(load(full), **settings), dtype)  # weights are rounded once
    expected.pos_embed.pos_embed = make_dit().pos_embed.pos_embed  # diffusers saves none, and makes it in float32
    assert quant_layers(model)
    assert_same_model(expected, model)
    assert not any(p.requires_grad for layer in quant_layers(model).values() for p in layer.parameters())
    config = json.loads(model.to_json_string())["quantization_config"]
    assert config == QandCConfig(**{"skip_patterns": ["pos_embed", "norm"], **settings}).to_dict()
    assert config == json.loads(expected.to_json_string())["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_rounded_once(full, dtype):
    """From the checkpoint's own precision, whatever the model is to compute in."""
    exact = quant_layers(quantize_model(load(full)))
    model = load(full, quantization_config=QandCConfig(), torch_dtype=dtype)
    for name, layer in quant_layers(model).items():
        assert torch.equal(layer.qweight, exact[name].qweight), name
        assert torch.equal(layer.weight_scale, exact[name].weight_scale), name
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.original_bytes == layer.in_features * layer.out_features * 2


def test_one_full_precision_weight_at_a_time(full, monkeypatch):
    """Each is let go before the next is quantized."""
    held = []
    create = QandCQuantizer.create_quantized_param

    def noting(self, model, *args, **kwargs):
        create(self, model, *args, **kwargs)
        held.append([name for name in self.bits if "weight" in dict(model.get_submodule(name).named_parameters())])
        held[-1] = [name for name in held[-1] if not model.get_submodule(name).weight.is_meta]

    monkeypatch.setattr(QandCQuantizer, "create_quantized_param", noting)
    load(full, quantization_config=QandCConfig())
    assert len(held) == 2 * 14  # weights and biases
    assert not any(held)


@pytest.mark.parametrize(
    ("w_bits", "how", "dtype"),
    [
        (8, ["static", "smoothing"], torch.float32),
        (4, ["static", "GPTQ"], torch.bfloat16),
        (4, ["symmetric"], torch.float32),
        (8, [], torch.float16),
    ],
    ids=lambda value: "+".join(value) or "dynamic" if isinstance(value, list) else str(value),
)
def test_a_saved_model_comes_back(tmp_path, dit_inputs, w_bits, how, dtype):
    """By save_pretrained and a plain from_pretrained, with ranges, smoothing and float32 scales."""
    model = make_quantized(w_bits, how=how, dtype=dtype)
    model.pos_embed.pos_embed = make_dit().pos_embed.pos_embed  # diffusers saves none, and makes it in float32
    model.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    found = load(tmp_path / "saved", torch_dtype=dtype)
    assert_same_model(model, found)
    assert not found.training
    assert torch.equal(output(found, dit_inputs), output(model, dit_inputs))
    found.save_pretrained(tmp_path / "again", max_shard_size="200KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_same_model(model, load(tmp_path / "again", torch_dtype=dtype))


def test_layers_with_bits_of_their_own(tmp_path):
    model = make_dit(num_layers=2)
    quantize_model(model, 4, skip_patterns=["norm", "pos_embed", "ff"])
    quantize_model(model, 8, 6, skip_patterns=["norm", "transformer_blocks.1"])
    quantize_model(model, 8, 16, skip_patterns=["emb", "norm_out", "proj_out", "transformer_blocks.1"])
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["layers"][TO_Q] == "W4A8"
    assert config["layers"]["transformer_blocks.0.norm1.linear"] == "W8A16"
    assert config["layers"]["transformer_blocks.0.ff.net.2"] == "W8A6"
    assert "transformer_blocks.1.ff.net.2" not in config["layers"]
    assert_same_model(model, load(tmp_path / "saved"))


def test_cache_and_fusion_are_not_saved(tmp_path, dit_inputs):
    model = make_quantized(how=["static"])
    expected = output(model, dit_inputs)
    apply_cache_to_dit(fuse_dit(model), 2)
    model.save_pretrained(tmp_path / "saved")
    found = load(tmp_path / "saved")
    assert type(found) is DiTTransformer2DModel
    assert torch.equal(output(found, dit_inputs), expected)


def test_through_our_own_checkpoint(tmp_path, saved):
    """Both ways of saving know the models of the other."""
    save_quantized(load(saved), tmp_path / "ours")
    model = load_quantized(tmp_path / "ours").model
    model.save_pretrained(tmp_path / "theirs")
    assert_same_model(load(saved), load(tmp_path / "theirs"))


def test_no_full_precision_weight_is_made(tmp_path, monkeypatch):
    monkeypatch.undo()  # of the fixture that fills what torch.empty returns
    model = make_quantized(heads=3, head_dim=8)
    model.save_pretrained(tmp_path / "saved")
    kept = {t.numel() for t in all_tensors(model).values() if t.is_floating_point()}
    weights = {layer.in_features * layer.out_features for layer in quant_layers(model).values()} - kept
    assert weights
    with FloatsMade(leave_out=torch.ops.aten.empty) as made:  # diffusers makes some that it does not fill
        load(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert made.sizes
    assert not weights & made.sizes.keys()
    with FloatsMade(leave_out=torch.ops.aten.empty) as made:  # the same eyes see them where they are
        make_quantized(heads=3, head_dim=8)
    assert weights <= made.sizes.keys()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded pipeline loaded with a config, and where it was saved."""
    config = PipelineQuantizationConfig(quant_mapping={"transformer": QandCConfig(w_bits=8)})
    pipe = DiTPipeline.from_pretrained(fashion_dit_path(), quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    directory = tmp_path_factory.mktemp("pipeline") / "saved"
    pipe.save_pretrained(directory)
    return pipe, directory


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # the pipeline hands no generator to its scheduler
    return pipe([3], guidance_scale=1.5, num_inference_steps=2, output_type="np").images


@pytest.mark.slow
def test_the_embedded_pipeline(embedded):
    pipe, directory = embedded
    assert len(quant_layers(pipe.transformer)) == 74
    assert_same_model(quantize_model(load_pipeline().transformer), pipe.transformer)
    again = DiTPipeline.from_pretrained(directory)
    assert_same_model(pipe.transformer, again.transformer)
    assert (images(again) == images(pipe)).all()
    assert_same_model(pipe.transformer, load_pipeline(directory).transformer)


PLAIN = """
{imports}
import torch
transformer = DiTPipeline.from_pretrained({directory!r}).transformer
print(sum(int(buffer.long().sum()) for name, buffer in transformer.named_buffers() if name.endswith("qweight")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["import qandc", "import diffusers.quantizers.auto; import qandc"])
def test_importing_qandc_is_enough(embedded, imports):
    """Before diffusers or after it, in a process that knows nothing else of qandc."""
    pipe, directory = embedded
    code = PLAIN.format(imports=f"{imports}; from diffusers import DiTPipeline", directory=str(directory))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = sum(int(layer.qweight.long().sum()) for layer in quant_layers(pipe.transformer).values())
    assert int(done.stdout) == expected


def test_bits_may_be_given_where_a_quantized_checkpoint_is_loaded(saved):
    """diffusers warns, and takes those of the checkpoint."""
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(saved, quantization_config=QandCConfig(w_bits=8))
    assert {layer.w_bits for layer in quant_layers(model).values()} == {4}


PARTS = ("pos_embed", "transformer_blocks.0", "transformer_blocks.1", "norm_out", "proj_out_1", "proj_out_2")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, dict.fromkeys(PARTS, "cpu")], ids=["name", "all", "parts"])
def test_device_maps(full, saved, device_map):
    kwargs = {"device_map": device_map}
    assert_same_model(load(saved), load(saved, **kwargs))
    expected = load(full, quantization_config=QandCConfig())
    assert_same_model(expected, load(full, quantization_config=QandCConfig(), **kwargs))


def test_layers_on_the_disk_are_refused(full, saved, tmp_path):
    device_map = {**dict.fromkeys(PARTS, "cpu"), "transformer_blocks.1": "disk"}
    for path, config in ((saved, {}), (full, {"quantization_config": QandCConfig()})):
        with pytest.raises(ModelError, match=r"device_map sends layers to the disk.*allow more memory"):
            load(path, device_map=device_map, offload_folder=tmp_path / "offload", **config)


def test_without_accelerate(saved, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ModelError, match="through accelerate, which is not here; install it"):
        load(saved)


def damage(directory, change):
    tensors = load_file(weights_of(directory))
    change(tensors)
    save_file(tensors, weights_of(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{TO_Q}.qweight"), r"lacks 1 tensors, transformer_blocks\.0\.attn1\.to_q\.qweight"),
        (lambda t: t.pop("pos_embed.proj.weight"), r"lacks 1 tensors, pos_embed\.proj\.weight"),
        (lambda t: t.update({f"{TO_Q}.bits": torch.tensor([4, 5], dtype=torch.uint8)}), "bits is W4A5; .* says W4A8"),
        (
            lambda t: t.update({f"{TO_Q}.weight_scale": t[f"{TO_Q}.weight_scale"].half()}),
            r"weight_scale is torch\.float16; .*stored as torch\.float32",
        ),
        (
            lambda t: t.update({f"{TO_Q}.weight_scale": t[f"{TO_Q}.weight_scale"] * float("nan")}),
            r"weight_scale is not finite or not > 0; .*finite numbers > 0",
        ),
        (lambda t: t.update({f"{TO_Q}.act_scale": torch.tensor(-1.0)}), r"act_scale is not finite or not > 0"),
        (lambda t: t.update({f"{TO_Q}.act_zero_point": torch.tensor(999, dtype=torch.int32)}), "act_zero_point is 999"),
        (lambda t: t.update({f"{TO_Q}.weight_sum": t[f"{TO_Q}.weight_sum"].float()}), r"weight_sum is torch\.float32"),
        (lambda t: t.update({f"{TO_Q}.weight_sum": t[f"{TO_Q}.weight_sum"][1:]}), r"weight_sum is of shape \[31\]"),
        (lambda t: t.update({f"{TO_Q}.qweight": t[f"{TO_Q}.qweight"].char()}), r"qweight is torch\.int8"),
        (lambda t: t.pop(f"{TO_Q}.act_scale"), "act_zero_point has no act_scale beside it"),
    ],
    ids=[
        "packed weight", "other weight", "bits", "scales in half", "NaN", "negative range", "zero point outside",
        "float sums", "short sums", "unpacked", "zero point alone",
    ],
)  # fmt: skip
def test_damaged_checkpoints(saved, change, message):
    damage(saved, change)
    with pytest.raises(ModelError, match=message):
        load(saved)


def test_a_config_that_is_not_that_of_the_weights(saved):
    change_config(saved, skip_patterns=["norm", "pos_embed", "to_q"])
    with pytest.raises(ModelError, match=r"lacks 2 tensors, transformer_blocks\.0\.attn1\.to_q\.weight"):
        load(saved)
    change_config(saved, layers={"transformer_blocks.9": "W8A8"})
    with pytest.raises(ModelError, match=r"names transformer_blocks\.9, no linear layer of DiTTransformer2DModel"):
        load(saved)
    change_config(saved, group_size=64)
    with pytest.raises(ConfigError, match=r"got group_size=64; it knows .*update qandc"):
        load(saved)


def test_weights_that_cannot_be_quantized(full):
    for path in full.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{TO_Q}.weight" in tensors:
            tensors[f"{TO_Q}.weight"][0, 0] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"attn1\.to_q\.weight holds 1 values that are NaN or inf"):
        load(full, quantization_config=QandCConfig())
    with pytest.raises(ModelError, match="exclude all"):
        load(full, quantization_config=QandCConfig(skip_patterns=["o", "n"]))


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_a_loader_that_brings_no_weights(pre_quantized):
    """Others than from_pretrained do not say what is missing; a layer without a weight must not get through."""
    quantizer = QandCQuantizer(QandCConfig(), pre_quantized=pre_quantized)
    model = quantizer.preprocess_model(make_dit())
    with pytest.raises(ModelError, match=r"no weight came for transformer_blocks\.0\.attn1\.to_q; .*from_pretrained"):
        quantizer.postprocess_model(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_bits": 3}, "w_bits is 3; allowed are 4 and 8"),
        ({"a_bits": 12}, "a_bits is 12; allowed"),
        ({"weight_clip": "hinge"}, "weight_clip 'hinge' is unknown"),
        ({"skip_patterns": "norm"}, "skip_patterns is 'norm'; give a list"),
        ({"bits": 8}, "QandCConfig got bits=8; it knows w_bits"),
        ({"quant_method": "quanto"}, "got quant_method='quanto'"),
        ({"layers": {"proj": "int8"}}, "the scheme of proj: 'int8' is no scheme; give bits"),
        ({"layers": {"proj": "W5A8"}}, "w_bits is 5"),
        ({"conditioning": "int8"}, "'int8' is no scheme"),
        ({"layers": {"proj": "W8A12"}}, "a_bits is 12"),
        ({"layers": {}}, "layers must map names of layers to schemes"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        QandCConfig(**settings)


def test_configs_compare_and_print():
    assert QandCConfig(4) == QandCConfig.from_dict(json.loads(QandCConfig(4).to_json_string()))
    assert QandCConfig(4) != QandCConfig(8)
    assert '"w_bits": 4' in repr(QandCConfig(4))


def test_what_a_quantized_model_refuses(saved):
    model = load(saved)
    with pytest.raises(ModelError, match="quantized weights do not turn back"):
        model.dequantize()


def test_a_loaded_model_is_cast_as_another(saved):
    model = load(saved).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {layer.weight_scale.dtype for layer in quant_layers(model).values()} == {torch.float32}


def test_a_registry_that_is_not_where_we_know_it(monkeypatch, caplog):
    changed = ModuleType(registration.REGISTRY)
    monkeypatch.setitem(sys.modules, registration.REGISTRY, changed)
    message = r"diffusers \d+\.\d+.* \(.*AUTO_QUANTIZATION_CONFIG_MAPPING.*\); install a version from 0\.35 to"
    with pytest.raises(ModelError, match=message):
        _ = qandc.QandCConfig
    with caplog.at_level(logging.WARNING, "qandc"):
        registration.register_when_imported()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "AUTO_QUANTIZATION_CONFIG_MAPPING" in caplog.text
    monkeypatch.setitem(sys.modules, registration.REGISTRY, None)
    with pytest.raises(ModelError, match="QandCConfig cannot be registered with diffusers"):
        _ = qandc.QandCConfig
    with pytest.raises(AttributeError, match="has no attribute 'QandConfig'"):
        _ = qandc.QandConfig


@pytest.mark.slow
def test_another_diffusers_still_imports(tmp_path):
    """One that has renamed its mappings: one warning when it is imported, and it works as without us."""
    package = tmp_path / "diffusers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "diffusers" / "__init__.py").write_text("__version__ = '9.0'")
    (package / "__init__.py").write_text("from .auto import QUANTIZERS")
    (package / "auto.py").write_text("QUANTIZERS = {}")
    code = "import qandc; import diffusers.quantizers; print(diffusers.quantizers.QUANTIZERS)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("QandCConfig cannot be registered with diffusers 9.0") == 1
