"""Model classes that people quantize, small: how near they stay, and that diffusers saves, loads and graphs them."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from diffusers import DiTPipeline, PipelineQuantizationConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from qandc import QandCConfig, calibrate, graph, quantization_plan, quantize_model, ungraph
from qandc.fusion.model_graph import Graphed
from qandc.quantization import plan as planning
from qandc.quantization.conversion import quant_layers
from qandc.quantization.linear import QuantLinear
from tests.test_saved_models import assert_same_model
from tests.tiny_models import TINY, each_class, inputs_of, make_tiny, output_of

CLASSES = pytest.mark.parametrize("name", TINY)
UNCAPTURED = {  # what in a forward of diffusers no CUDA graph can hold
    "Lumina2Transformer2DModel": "Cannot copy out of meta tensor",  # lengths of texts, read from their mask
    "HiDreamImageTransformer2DModel": "aten::bincount",  # tokens of each expert, read back
    "HunyuanVideo15Transformer3DModel": r"item\(\) cannot be called",  # lengths of texts
    "CogView4Transformer2DModel": "copied from the host",  # rotary tables
}
# schemes to what the error may be, as a share of what the layers quantized by default do to the output: 1.5 times the
# largest of all classes, which is that of Sana with static ranges and AuraFlow, FLUX.2 and Z-Image else
BOUNDS = {
    "W8A8": ({}, 0.03),
    "W8A8 static": ({}, 0.09),
    "W4A8": ({"w_bits": 4}, 0.24),
    "W8A8 + W8A16": ({"conditioning": "W8A16"}, 0.03),
    "W4A8 + W4A16": ({"w_bits": 4, "conditioning": "W4A16"}, 0.24),
}
WAYS = {
    "default": {},
    "W4A6 mse": {"w_bits": 4, "a_bits": 6, "weight_clip": "mse"},
    "weight-only": {"a_bits": 16},
    "conditioning": {"w_bits": 4, "conditioning": "W8A16"},
    "by hand": {"skip_patterns": [r"re:\.0\."]},
    "static, smoothing": {},
    "mixed": {},
}


def calibrated(model, name):
    return calibrate(model, [inputs_of(name, time, seed) for seed, time in enumerate((0.9, 0.5, 0.1), 1)])


def quantized(name, way):
    """Quantize a small model in one of ``WAYS``."""
    model, settings = make_tiny(name), WAYS[way]
    if way == "mixed":
        return quantize_model(quantize_model(model, 4, skip_patterns=[r"re:\.1\."]), 8, 6)
    if "smoothing" not in way:
        return quantize_model(model, **settings)
    names = [row.name for row in quantization_plan(model).quantized]
    factors = {key: torch.rand(model.get_submodule(key).in_features) + 0.5 for key in names}
    quantize_model(model, smoothing=factors)
    return calibrated(model, name)


@each_class(TINY)
def test_error_against_full_precision(name):
    model, inputs = make_tiny(name), inputs_of(name)
    expected = output_of(model, inputs)
    with torch.no_grad():
        for layer in quantization_plan(model).quantized:
            model.get_submodule(layer.name).weight.zero_()
    share = (output_of(model, inputs) - expected).norm()
    assert share > 0.01 * expected.norm()
    for scheme, (settings, bound) in BOUNDS.items():
        model = quantize_model(make_tiny(name), **settings)
        if "static" in scheme:
            calibrated(model, name)
        error = (output_of(model, inputs) - expected).norm() / share
        assert bound / 20 < error < bound, (scheme, error)


@pytest.mark.slow
@CLASSES
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_model_comes_back(name, way, tmp_path, monkeypatch):
    """In several files, bit for bit, by a plain from_pretrained, of a version that would choose other layers."""
    model, inputs = quantized(name, way), inputs_of(name)
    expected = output_of(model, inputs)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    note = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert QandCConfig.from_dict(note).to_dict() == note
    assert ("layers" in note) >= (way == "mixed")
    monkeypatch.setattr(planning, "BLOCKS", {name: "other_blocks"})
    monkeypatch.setattr(planning, "kept_layers", lambda model: {})
    for directory in ("saved", "again"):
        model = type(model).from_pretrained(tmp_path / directory)
        assert torch.equal(output_of(model, inputs), expected)
        assert json.loads(model.to_json_string())["quantization_config"] == note
        model.save_pretrained(tmp_path / "again")


@pytest.mark.slow
@CLASSES
def test_diffusers_quantizes_the_same(name, tmp_path):
    """By a pipeline or not; rounded to another dtype are the modules that it rounds in full precision."""
    others = {"vae": None, "scheduler": None}
    DiTPipeline(make_tiny(name), **others).save_pretrained(tmp_path)  # needs no transformers, and takes any model
    path, owner, given = tmp_path / "transformer", getattr(diffusers, name), QandCConfig(4, conditioning="W8A16")
    model = quantize_model(make_tiny(name), 4, conditioning="W8A16")
    loaded = owner.from_pretrained(path, quantization_config=given)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": given})
    pipe = DiTPipeline.from_pretrained(tmp_path, quantization_config=config, **others)
    assert given == QandCConfig(4, conditioning="W8A16")  # it may serve another model
    for each in (loaded, pipe.transformer):
        assert_same_model(model, each)
        assert torch.equal(output_of(each, inputs_of(name)), output_of(model, inputs_of(name)))
    notes = [json.loads(each.to_json_string())["quantization_config"] for each in (model, loaded, pipe.transformer)]
    assert notes[0] == notes[1] == notes[2]

    full = owner.from_pretrained(path, torch_dtype=torch.bfloat16)
    loaded = owner.from_pretrained(path, torch_dtype=torch.bfloat16, quantization_config=given)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiTPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16, **others).transformer
    for each in (loaded, again):
        for key, tensor in full.state_dict().items():
            layer = each.get_submodule(key.rpartition(".")[0])
            assert (layer.weight if isinstance(layer, QuantLinear) else each.state_dict()[key]).dtype == tensor.dtype
    assert_same_model(loaded, again)


def test_weights_of_wan_that_stay_in_float32_do_so_when_quantized(tmp_path):
    """Other layers of them than the default ones too."""
    make_tiny("WanTransformer3DModel").save_pretrained(tmp_path / "full")
    load = diffusers.WanTransformer3DModel.from_pretrained
    model = load(tmp_path / "full", torch_dtype=torch.bfloat16, quantization_config=QandCConfig(skip_patterns=[]))
    model.save_pretrained(tmp_path / "saved")
    for each in (model, load(tmp_path / "saved", torch_dtype=torch.bfloat16)):
        dtypes = {key: layer.weight.dtype for key, layer in quant_layers(each).items()}
        exempt = {key for key, dtype in dtypes.items() if dtype == torch.float32}
        assert exempt == {f"condition_embedder.time_embedder.linear_{i}" for i in (1, 2)}
        assert {dtypes[key] for key in dtypes.keys() - exempt} == {torch.bfloat16}


def test_a_checkpoint_from_before_layers_were_kept_back_loads(tmp_path, monkeypatch):
    """Its attention pooling was quantized, to no effect, since it reads the weights."""
    name = "HunyuanDiT2DModel"
    with monkeypatch.context() as before:
        before.setattr(planning, "kept_layers", lambda model: {})
        model = quantize_model(make_tiny(name), skip_patterns=["norm"])
    assert "time_extra_emb.pooler.q_proj" in quant_layers(model)
    assert "layers" not in model.config.quantization_config
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output_of(again, inputs_of(name)), output_of(model, inputs_of(name)))


class HostCopies(TorchDispatchMode):
    """Raise where a tensor of the host, more than a number, meets those of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
        if any(t.is_meta for t in tensors) and any(t.device.type == "cpu" and t.dim() for t in tensors):
            raise RuntimeError(f"copied from the host: {function}")
        return output


def on_device(value, device):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


@each_class(TINY)
def test_a_forward_can_be_captured(name):
    """Run each class on the meta device, as on a GPU: a second forward neither copies from the host nor reads back."""
    model, inputs = graph(make_tiny(name).to("meta")), on_device(inputs_of(name), "meta")

    def forward():
        with torch.no_grad():
            model(**inputs)
            with HostCopies():
                model(**inputs)

    if name in UNCAPTURED:
        with pytest.raises((NotImplementedError, RuntimeError), match=UNCAPTURED[name]):
            forward()
    else:
        forward()


@pytest.mark.gpu
@CLASSES
def test_graphs(name):
    """Outputs of a graph are those of the model as called, bit for bit, for inputs other than it was captured with."""
    model = quantize_model(make_tiny(name), conditioning="W8A16").cuda()
    batches = [on_device(inputs_of(name, time, seed), "cuda") for seed, time in enumerate((0.9, 0.5, 0.1))]
    expected = [output_of(model, batch) for batch in batches]
    graph(model)
    for _ in range(2):
        assert all(
            torch.equal(output_of(model, batch), wanted) for batch, wanted in zip(batches, expected, strict=True)
        )
    assert Graphed.of(model).graphs.replays >= (0 if name in UNCAPTURED else 3)
    ungraph(model)
    assert torch.equal(output_of(model, batches[0]), expected[0])
