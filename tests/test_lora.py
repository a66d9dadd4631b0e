"""LoRA adapters as users of diffusers and PEFT load, mix, switch and remove them, on quantized models."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from qandc import (
    ConfigError,
    ModelError,
    QandCConfig,
    QuantLinear,
    apply_cache,
    apply_cache_to_dit,
    calibrate,
    fuse,
    fuse_dit,
    quantize_model,
    remove_cache,
)
from qandc.models.dit.fusable import why_not_block
from qandc.quantization import registration
from qandc.quantization.conversion import quant_layers
from qandc.quantization.lora import lora_for_quantized
from qandc.support.watch import Watch
from tests.definition import CONFIGS, assert_equal_runs, by_definition
from tests.test_families import forwards, run_of
from tests.test_saved_models import make_quantized, output
from tests.tiny_models import TINY, inputs_of, make_tiny, output_of

pytestmark = [  # of PEFT, where a model gets a second adapter or loses the active one
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]
ROOT = Path(__file__).parents[1]
FLUX = "FluxTransformer2DModel"
TO_Q = "single_transformer_blocks.0.attn.to_q"
COMMON = [
    FLUX,
    "SD3Transformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
]
WITHOUT_PEFT = {"DiTTransformer2DModel", "PixArtTransformer2DModel", "HunyuanDiT2DModel", "StableAudioDiTModel"}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (it needs transformers)")


def lora_of(
    model, seed=1, rank=4, prefix="transformer.", parts=("att", "ff", "feed_forward", "proj_out"), strength=0.6
):
    """A state dict of diffusers' format for the quantized layers whose names hold one of ``parts``."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in quant_layers(model).items():
        if any(part in name for part in parts):
            name, scale = name.replace(".base_layer", ""), strength * (32 / layer.in_features) ** 0.5
            tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * scale
            tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.3
    assert len(tensors) > 4
    return tensors


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def with_hooks(model, adapter, scale, inputs):
    """The output of a model whose layers add scale · B A x, without PEFT."""

    def hook(layer, args, result, a, b):
        return result + torch.nn.functional.linear(torch.nn.functional.linear(args[0], a), b) * scale

    handles = []
    for key in adapter:
        if "lora_A" in key:
            hooked = functools.partial(hook, a=adapter[key], b=adapter[key.replace("lora_A", "lora_B")])
            layer = model.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            handles.append(layer.register_forward_hook(hooked))
    result = output_of(model, inputs)
    for handle in handles:
        handle.remove()
    return result


def flux_pipeline(transformer):
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **empty)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    prompt = {"prompt_embeds": torch.ones(1, 6, 48), "pooled_prompt_embeds": torch.ones(1, 32)}
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(**prompt, **size, generator=generator, **kwargs).images


def quantized_flux(**settings):
    return quantize_model(make_tiny(FLUX), **settings)


def loaded_by_diffusers(model, directory, **settings):
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory, quantization_config=QandCConfig(**settings)).eval()


def state_of(model):
    """Classes and tensors of all modules, by name."""
    classes = {name: type(module) for name, module in model.named_modules()}
    return classes, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "W8A8") for name in TINY if name not in WITHOUT_PEFT]
    + [(name, how) for name in COMMON for how in ("W4A8", "loaded")],
)
def test_an_adapter_loads_scales_and_goes(peft, name, how, tmp_path):
    """Each layer adds its product; the model is near that in full precision, and afterwards bit for bit as before."""
    inputs, full, model = inputs_of(name), make_tiny(name), make_tiny(name)
    if how == "loaded":
        model = loaded_by_diffusers(model, tmp_path)
    else:
        quantize_model(model, 4 if how == "W4A8" else 8)
    before, plain = state_of(model), output_of(model, inputs)
    adapter = lora_of(model)
    expected = {scale: with_hooks(model, adapter, scale, inputs) for scale in (1.0, 0.5)}
    for network in (full, model):
        network.load_lora_adapter(dict(adapter), adapter_name="style")
    for scale in (0.5, 1.0):
        for network in (full, model):
            network.set_adapters("style", scale)
        adapted = output_of(model, inputs)
        assert distance(adapted, expected[scale]) < 0.2 * distance(
            adapted, plain
        )  # sums in another order round to other integers at times
        assert distance(adapted, plain) > 0.04
        if how != "W4A8":
            assert distance(adapted, output_of(full, inputs)) < 0.25 * distance(adapted, plain)
    model.disable_lora()
    assert torch.equal(output_of(model, inputs), plain)
    model.enable_lora()
    assert torch.equal(output_of(model, inputs), adapted)
    model.unload_lora()
    assert_same_state(state_of(model), before)
    assert torch.equal(output_of(model, inputs), plain)


@pytest.mark.parametrize("name", sorted(WITHOUT_PEFT))
def test_classes_that_diffusers_gives_no_adapters_take_those_of_peft(peft, name):
    """Inject adapters by PEFT into a quantized model, with a config that says nothing of quantization."""
    inputs, full, model = inputs_of(name), make_tiny(name), quantize_model(make_tiny(name))
    plain = output_of(model, inputs)
    adapter = lora_of(model, prefix="")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=[key[:-14] for key in adapter if "lora_A" in key])
    for network in (full, model):
        peft.inject_adapter_in_model(config, network).eval()
        result = peft.set_peft_model_state_dict(network, adapter)
        assert not result.unexpected_keys
    adapted = output_of(model, inputs)
    assert distance(adapted, plain) > 0.05
    assert distance(adapted, output_of(full, inputs)) < 0.25 * distance(adapted, plain)


def test_a_pipeline_of_flux_with_two_adapters(peft):
    """Load a LoRA into quantized FLUX, whose loader looks up weight shapes that quantized layers do not store."""
    pipe, full = flux_pipeline(quantized_flux()), flux_pipeline(make_tiny(FLUX))
    before, plain = state_of(pipe.transformer), latents_of(pipe)
    styles = lora_of(pipe.transformer), lora_of(pipe.transformer, 2, rank=8, parts=["single_transformer_blocks"])
    styles[1].update({f"{key[:-14]}.alpha": torch.tensor(16.0) for key in [*styles[1]] if "lora_A" in key})
    for each in (full, pipe):
        each.load_lora_weights(dict(styles[0]), adapter_name="first")
        each.load_lora_weights(dict(styles[1]), adapter_name="second")
    outputs = []
    for names, scales in ((["first"], [1.0]), (["second"], [0.7]), (["first", "second"], [0.5, 0.25])):
        for each in (full, pipe):
            each.set_adapters(names, scales)
        outputs.append(latents_of(pipe))
        assert distance(outputs[-1], latents_of(full)) < 0.25 * distance(outputs[-1], plain)
    assert min(distance(a, b) for i, a in enumerate(outputs) for b in [plain, *outputs[:i]]) > 0.05
    halved = latents_of(pipe, joint_attention_kwargs={"scale": 0.5})
    assert distance(halved, latents_of(full, joint_attention_kwargs={"scale": 0.5})) < 0.05
    pipe.set_adapters(["first", "second"], [0.25, 0.125])
    torch.testing.assert_close(halved, latents_of(pipe))
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    pipe.set_adapters("first")
    pipe.delete_adapters("second")
    assert distance(latents_of(pipe), outputs[0]) == 0
    pipe.unload_lora_weights()
    assert_same_state(state_of(pipe.transformer), before)
    assert torch.equal(latents_of(pipe), plain)


def test_adapters_of_flux_that_lack_columns_are_filled_up(peft):
    """As diffusers does it with those that were trained on FLUX without control images."""
    pipe, full = flux_pipeline(quantized_flux()), flux_pipeline(make_tiny(FLUX))
    adapter = lora_of(pipe.transformer)
    key = f"transformer.{TO_Q}.lora_A.weight"
    adapter[key] = adapter[key][:, :20]
    for each in (full, pipe):
        each.load_lora_weights(dict(adapter))
        found = each.transformer.get_submodule(TO_Q).lora_A["default_0"].weight
        assert torch.equal(found, torch.nn.functional.pad(adapter[key], (0, 12)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_loaded_and_exchanged(peft, tmp_path, low_cpu_mem_usage):
    model, inputs = quantized_flux(), inputs_of(FLUX)
    first, second = lora_of(model), lora_of(model, 2)
    model.load_lora_adapter(dict(second), adapter_name="style", low_cpu_mem_usage=low_cpu_mem_usage)
    expected = output_of(model, inputs)
    model.save_lora_adapter(tmp_path, "style")
    other = quantized_flux()
    other.load_lora_adapter(dict(first), adapter_name="style")
    assert distance(output_of(other, inputs), expected) > 0.1
    other.load_lora_adapter(
        tmp_path, prefix=None, adapter_name="style", hotswap=True, weight_name="pytorch_lora_weights.safetensors"
    )
    assert torch.equal(output_of(other, inputs), expected)


def test_a_quantized_model_is_saved_without_adapters(peft, tmp_path):
    """Those in layers of full precision too; diffusers would write what it cannot load."""
    model, inputs = quantized_flux(skip_patterns=["single_transformer_blocks"]), inputs_of(FLUX)
    plain, adapter = output_of(model, inputs), lora_of(quantized_flux(), parts=["single_transformer_blocks.0"])
    pipe = flux_pipeline(model)
    pipe.load_lora_weights(dict(adapter), adapter_name="style")
    for save in (model.save_pretrained, pipe.save_pretrained):
        with pytest.raises(
            ModelError, match=r"_blocks\.0\.proj_mlp and 4 other .*save_lora_adapter\), call unload_lora"
        ):
            save(tmp_path / "saved")
    adapted = output_of(model, inputs)
    model.save_lora_adapter(tmp_path / "style", "style")
    model.unload_lora()
    model.save_pretrained(tmp_path / "saved")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(output_of(again, inputs), plain)
    again.load_lora_adapter(tmp_path / "style", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(output_of(again, inputs), adapted)


@pytest.mark.parametrize("conditioning", [None, "W8A16"])
def test_quantized_with_adapters_and_saved_without_them(peft, conditioning, tmp_path):
    """Where layers are listed by name, it is their name when the adapters are gone."""
    model, adapter = make_tiny(FLUX), lora_of(quantized_flux())
    model.load_lora_adapter(adapter)
    quantize_model(model, conditioning=conditioning)
    model.unload_lora()
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output_of(again, inputs_of(FLUX)), output_of(model, inputs_of(FLUX)))
    notes = [each.config.quantization_config for each in (quantized_flux(conditioning=conditioning), model)]
    assert notes[0].get("layers") == notes[1].get("layers")


def test_compiled_blocks_with_adapters(peft):
    """``fullgraph``: no break; what is loaded, scaled or removed after compilation is seen."""
    torch._dynamo.reset()
    model, eager = (quantize_model(make_tiny(FLUX, num_layers=1, num_single_layers=1)) for _ in range(2))
    inputs, adapter = inputs_of(FLUX), lora_of(model, parts=["attn.to_", "proj_mlp"])
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    changes = {
        "nothing": lambda network: None,
        "load": lambda network: network.load_lora_adapter(dict(adapter), adapter_name="style"),
        "scale": lambda network: network.set_adapters("style", 0.5),
        "unload": lambda network: network.unload_lora(),
    }
    seen = []
    for name, change in changes.items():
        change(model)
        change(eager)
        seen.append(output_of(eager, inputs))
        torch.testing.assert_close(output_of(model, inputs), seen[-1], atol=1e-4, rtol=1e-4, msg=name)
    assert torch.equal(seen[3], seen[0])
    assert min(distance(seen[i], seen[j]) for i, j in ((1, 0), (2, 0), (2, 1))) > 0.02
    torch._dynamo.reset()


def test_fuse_lora_refuses_before_it_changes_anything(peft):
    """Layers in full precision, which could take their part, included; and there is nothing to unfuse."""
    model = quantized_flux(skip_patterns=["transformer_blocks.0"])
    adapter = lora_of(quantized_flux())
    pipe, inputs = flux_pipeline(model), inputs_of(FLUX)
    plain = output_of(model, inputs)
    pipe.load_lora_weights(adapter)
    assert isinstance(model.transformer_blocks[0].attn.to_q, peft.tuners.lora.Linear)
    before, adapted = state_of(model), output_of(model, inputs)
    for method in (pipe.fuse_lora, model.fuse_lora):
        with pytest.raises(ModelError, match=r"take no adapter in .*set_adapters scales it.*fuse_lora\) before quant"):
            method(lora_scale=0.5)
    assert_same_state(state_of(model), before)
    assert torch.equal(output_of(model, inputs), adapted)
    with pytest.warns(UserWarning, match="Already unmerged"):  # PEFT says so on any model
        pipe.unfuse_lora()
    assert torch.equal(output_of(model, inputs), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(output_of(model, inputs), plain)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_peft_models_refuse_to_merge_before_they_change_anything(peft, merge, seeded):
    model = quantize_model(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), skip_patterns=["0"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
    weight, x = adapted.model[0].weight.clone(), torch.randn(4, 32, generator=seeded)
    expected = adapted.eval()(x)
    with pytest.raises(ModelError, match="take no adapter in"):
        getattr(adapted, merge)()
    assert torch.equal(adapted.model[0].weight, weight)
    assert torch.equal(adapted(x), expected)
    assert isinstance(adapted.unload()[1], QuantLinear)


WEIGHTS_NEEDED = [
    ({"use_dora": True}, "use_dora=True reads or changes the weights"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' may change the weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' may change the weights"),
    ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' may change the weights"),
    ({"use_bdlora": True}, "use_bdlora=.* reads or changes the weights"),
]


@pytest.mark.parametrize(("settings", "message"), WEIGHTS_NEEDED)
def test_adapters_that_need_the_weights_are_refused(peft, settings, message):
    """Before any layer is touched, also one in full precision that stands before the first quantized one."""
    model = quantized_flux(skip_patterns=["transformer_blocks.0"])
    before = state_of(model)
    if "use_bdlora" in settings:
        settings = {"use_bdlora": peft.tuners.lora.config.BdLoraConfig()}
    config = peft.LoraConfig(r=4, target_modules=["to_q"], **settings)
    for attach in (model.add_adapter, lambda c: peft.inject_adapter_in_model(c, model), lora_for_quantized):
        with pytest.raises(ConfigError, match=message):
            attach(copy.deepcopy(config))
        assert_same_state(state_of(model), before)
    with pytest.raises(ConfigError, match=message):
        peft.get_peft_model(model, config)
    assert_same_state(state_of(model), before)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q"]), model)  # plain ones go


def test_fused_projections_would_leave_adapters_out(peft):
    model, inputs = quantized_flux(), inputs_of(FLUX)
    adapter = lora_of(model)
    model.fuse_qkv_projections()
    before = state_of(model)
    with pytest.raises(ModelError, match=r"attn runs q, k and v as one fused.*call unfuse_qkv_projections\(\) first"):
        model.load_lora_adapter(dict(adapter), adapter_name="style")
    assert_same_state(state_of(model), before)
    model.unfuse_qkv_projections()
    model.load_lora_adapter(dict(adapter), adapter_name="style")
    expected = quantized_flux()
    expected.load_lora_adapter(dict(adapter), adapter_name="style")
    assert torch.equal(output_of(model, inputs), output_of(expected, inputs))


def test_a_file_with_dora_is_refused(peft):
    model, inputs = quantized_flux(), inputs_of(FLUX)
    plain, adapter = output_of(model, inputs), lora_of(model)
    magnitudes = {f"{k[:-14]}.lora_magnitude_vector": torch.ones(len(v)) for k, v in adapter.items() if "lora_B" in k}
    with pytest.raises(ConfigError, match="use_dora=True reads or changes the weights"):
        model.load_lora_adapter(adapter | magnitudes, adapter_name="style")
    assert torch.equal(output_of(model, inputs), plain)
    model.load_lora_adapter(adapter, adapter_name="style")
    assert distance(output_of(model, inputs), plain) > 0.1


def test_models_without_quantized_layers_are_left_to_peft(peft):
    model, inputs = make_tiny(FLUX), inputs_of(FLUX)
    adapter = lora_of(quantized_flux())
    model.load_lora_adapter(adapter, adapter_name="style")
    adapted = output_of(model, inputs)
    assert model.peft_config["style"]._custom_modules is None
    model.fuse_lora()
    assert model.get_submodule(TO_Q).merged
    torch.testing.assert_close(output_of(model, inputs), adapted, atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    model.unload_lora()
    for settings, _ in WEIGHTS_NEEDED[:3]:
        name = next(iter(settings))
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q"], **settings), model, name)


def failure(model, adapter):
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is the question)
        model.load_lora_adapter(adapter, adapter_name="style")
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("fault", ["a layer that does not exist", "A and B of two ranks", "another size"])
def test_errors_of_peft_are_its_own(peft, fault):
    """Word for word those of the model in full precision, which quantized ones survive as well."""
    model, full, inputs = quantized_flux(), make_tiny(FLUX), inputs_of(FLUX)
    plain, adapter = output_of(model, inputs), lora_of(model)
    wrong = dict(adapter)
    if fault == "a layer that does not exist":
        wrong = {key.replace("to_q", "to_z"): tensor for key, tensor in adapter.items() if "to_q" in key}
    elif fault == "A and B of two ranks":
        wrong[f"transformer.{TO_Q}.lora_A.weight"] = torch.ones(7, 32)
    else:
        wrong[f"transformer.{TO_Q}.lora_A.weight"] = torch.ones(4, 40)
    assert failure(model, dict(wrong)) == failure(full, dict(wrong))
    assert torch.equal(output_of(model, inputs), plain)


def test_adapters_that_were_there_before_stay_in_full_precision(peft):
    """Beside quantized layers; they can be scaled, switched off and removed as before, and take more adapters."""
    inputs, adapter = inputs_of(FLUX), lora_of(quantized_flux())
    model = make_tiny(FLUX)
    model.load_lora_adapter(dict(adapter), adapter_name="style")
    full = output_of(model, inputs)
    tensors = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    quantize_model(model)
    assert len(tensors) == len(adapter)
    assert not [name for name in quant_layers(model) if "lora_" in name]
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tensors.items())
    assert isinstance(model.get_submodule(TO_Q).base_layer, QuantLinear)
    assert distance(output_of(model, inputs), full) < 0.05
    later = quantized_flux()
    later.load_lora_adapter(dict(adapter), adapter_name="style")
    assert torch.equal(output_of(model, inputs), output_of(later, inputs))
    with pytest.raises(ModelError, match="take no adapter in"):
        model.fuse_lora()
    for each in (model, later):
        each.load_lora_adapter(lora_of(each, 2), adapter_name="other")
        each.set_adapters(["style", "other"], [0.5, 0.5])
    assert torch.equal(output_of(model, inputs), output_of(later, inputs))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unfuse_lora()
    model.unload_lora()
    assert_same_state(state_of(model), state_of(quantized_flux()))


def test_adapters_that_were_fused_before_stay_in_the_weights(peft):
    model, inputs = make_tiny(FLUX), inputs_of(FLUX)
    model.load_lora_adapter(lora_of(quantized_flux()))
    full = output_of(model, inputs)
    model.fuse_lora()
    quantize_model(model)
    assert distance(output_of(model, inputs), full) < 0.05
    with pytest.raises(ModelError, match="give none back"):
        model.unfuse_lora()
    model.unload_lora()
    assert distance(output_of(model, inputs), full) < 0.05


def test_all_linear_means_quantized_layers_too(peft):
    model, full = quantized_flux(), make_tiny(FLUX)
    expected = {name for name, module in full.named_modules() if type(module) is nn.Linear}
    for name in ("first", "second"):  # the second finds layers of the first
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        peft.inject_adapter_in_model(config, model, name)
        found = {key for key, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
        assert found == expected
        assert all(name in model.get_submodule(key).lora_A for key in expected)


def test_copies_and_pickles_keep_their_adapters(peft):
    model, inputs = quantized_flux(), inputs_of(FLUX)
    model.load_lora_adapter(lora_of(model), adapter_name="style")
    expected = output_of(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(copied, inputs), expected)
        copied.load_lora_adapter(lora_of(model, 2), adapter_name="other")
        copied.set_adapters("other")
        assert distance(output_of(copied, inputs), expected) > 0.1
        copied.unload_lora()
    assert torch.equal(output_of(model, inputs), expected)


def test_graphs_notice_every_change_of_adapters(peft):
    """What qandc.graph compares before it replays a graph."""
    model = quantized_flux()
    changes = {
        "load": lambda: model.load_lora_adapter(lora_of(model), adapter_name="first"),
        "second": lambda: model.load_lora_adapter(lora_of(model, 2), adapter_name="second"),
        "choose": lambda: model.set_adapters("second"),
        "scale": lambda: model.set_adapters("second", 0.5),
        "disable": model.disable_lora,
        "enable": model.enable_lora,
        "delete": lambda: model.delete_adapters("second"),
        "unload": model.unload_lora,
    }
    for name, change in changes.items():
        for _ in range(3):  # layers that share a product find each other again
            output_of(model, inputs_of(FLUX))
        watch = Watch(model)
        output_of(model, inputs_of(FLUX))
        assert watch.unchanged(), name
        change()
        assert not watch.unchanged(), name


@pytest.mark.parametrize("order", ["import peft, qandc", "import qandc, peft"])
def test_the_order_of_imports_does_not_matter(peft, order):
    code = f"""{order}
import torch, warnings
warnings.simplefilter("error")
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
import peft, qandc
qandc.quantize_model(model)
config = peft.LoraConfig(target_modules=["0"])
print(type(peft.get_peft_model(model, config).model[0]).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LoraQuantLinear"


def test_a_peft_that_is_not_as_we_know_it(monkeypatch, caplog):
    """One warning that names it, and it works as without us."""
    name = "peft.tuners.lora.model"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with caplog.at_level(logging.WARNING, "qandc"):
        registration.register_when_imported()
    (record,) = caplog.records
    assert "LoRA adapters may not load on quantized models: peft.tuners.lora.model" in record.message
    assert "'LoraModel'); install peft 0.21 or later" in record.message


def test_nothing_is_extended_twice(peft):
    method = FluxTransformer2DModel.fuse_lora
    registration.register_when_imported()
    assert FluxTransformer2DModel.fuse_lora is method


def test_lora_without_peft(monkeypatch):
    monkeypatch.delitem(sys.modules, "qandc.quantization.lora_layer", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", None)
    with pytest.raises(ModelError, match="LoRA adapters come from peft, which does not import"):
        lora_for_quantized(object())


def with_adapters(peft, model, targets=("to_q", "net.2"), **changes):
    """Random adapters, the same each time, which change something from the start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **changes)
    return peft.inject_adapter_in_model(config, model).eval()


@pytest.mark.parametrize(
    ("w_bits", "how"), [(8, []), (4, ["static", "smoothing"])], ids=["W8A8 dynamic", "W4A8 static smoothing"]
)
def test_lora_beside_a_quantized_layer(peft, w_bits, how, seeded):
    model = make_quantized(w_bits, how=how)
    plain = copy.deepcopy(model)
    with_adapters(peft, model)
    x = torch.randn(3, 7, 32, generator=seeded)
    for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"):
        adapted, layer = model.get_submodule(name), plain.get_submodule(name)
        a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        with torch.no_grad():
            added = adapted.scaling["default"] * (x @ a.T @ b.T)
            assert added.abs().max() > 0.01
            torch.testing.assert_close(adapted(x), layer(x) + added)


def test_adapters_on_a_cached_and_calibrated_dit(peft, dit_inputs):
    """Loaded after the cache was attached, or before: a compute step is that of the model without a cache."""
    model = make_quantized(how=["static"])
    plain, before = output(model, dit_inputs), with_adapters(peft, copy.deepcopy(model))
    adapted = output(before, dit_inputs)
    assert distance(adapted, plain) > 0.05
    apply_cache_to_dit(model, 2)
    apply_cache_to_dit(before, 2)
    for each in (with_adapters(peft, model), before):
        assert torch.equal(output(each, dit_inputs), adapted)
        remove_cache(each)
        for module in each.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.enable_adapters(False)
        assert torch.equal(output(each, dit_inputs), plain)


def test_blocks_with_lora_are_not_fused(peft, dit_inputs):
    model = make_quantized(how=["static"])
    with_adapters(peft, model, targets=["transformer_blocks.1.attn1.to_q"])
    reasons = [
        why_not_block(block, f"transformer_blocks.{i}.", None) for i, block in enumerate(model.transformer_blocks)
    ]
    assert reasons == [None, "attn1.to_q is LoraQuantLinear, not a QuantLinear"]
    changed = output(model, dit_inputs)
    assert torch.equal(output(fuse_dit(model), dit_inputs), changed)


def test_a_block_of_flux_with_lora_is_not_fused(peft, fused_anywhere, caplog):
    """Loaded before or since, it counts; the other blocks run fused."""
    inputs = inputs_of(FLUX)
    model = calibrate(quantize_model(make_tiny(FLUX)), [inputs])
    plain = output_of(model, inputs)
    for fuse_first in (True, False):
        changed, fused = copy.deepcopy(model), copy.deepcopy(model)
        with_adapters(peft, changed, targets=[TO_Q])
        expected = output_of(changed, inputs)
        if fuse_first:
            output_of(fuse(fused), inputs)
        with_adapters(peft, fused, targets=[TO_Q])
        if not fuse_first:
            fuse(fused)
        torch.testing.assert_close(output_of(fused, inputs), expected, atol=0.01, rtol=0.01)
        assert not torch.allclose(expected, plain, atol=0.02)
        assert "attn.to_q is LoraQuantLinear, not a QuantLinear" in caplog.text
        caplog.clear()


@pytest.mark.gpu
def test_lora_and_fusion_on_a_gpu(peft, dit_inputs):
    model = with_adapters(peft, make_quantized(how=["static"]).cuda(), targets=["transformer_blocks.1.attn1.to_q"])
    inputs = {name: tensor.cuda() for name, tensor in dit_inputs.items()}
    changed = output(model, inputs)
    torch.testing.assert_close(output(fuse_dit(model), inputs), changed, atol=0.05, rtol=0.05)


def test_adapters_train_through_quantized_layers(peft, seeded):
    """Those of the first layer too, whose gradient comes through the second: as with dequantized weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
    quantize_model(model)
    plain = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
    for i in (0, 2):
        plain[i].load_state_dict({"weight": model[i].weight, "bias": model[i].bias})
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0", "2"]), plain)
    ours = {name: p for name, p in model.named_parameters() if "lora" in name}
    theirs = {name: p for name, p in plain.named_parameters() if "lora" in name}
    x = torch.randn(16, 32, generator=seeded)
    for name, parameter in theirs.items():
        parameter.data.copy_(ours[name].data)
    for network in (model, plain):
        network(x).square().sum().backward()
    for name, parameter in theirs.items():
        assert parameter.grad.norm() > 0
        assert (ours[name].grad - parameter.grad).norm() < 0.05 * parameter.grad.norm(), name


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_that_were_there_before(peft, merged, seeded):
    """They stay beside the quantized layer, or in it, and neither way is one lost or counted twice later."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), model).eval()
    if merged:
        model[0].merge()
    x = torch.randn(16, 32, generator=seeded)
    expected = model(x)
    adapter = model[0].lora_A["default"]
    quantize_model(model)
    assert type(model[0].base_layer) is QuantLinear
    assert model[0].lora_A["default"] is adapter
    changed = model(x)
    assert (changed - expected).norm() < 0.03 * expected.norm()
    refused = [model[0].merge, copy.deepcopy(model)[0].merge]
    for change in refused + ([model[0].unmerge, copy.deepcopy(model)[0].unmerge] if merged else []):
        with pytest.raises(ModelError, match="quantized weights take no adapter in"):
            change()
    assert torch.equal(model(x), changed)


def test_an_adapter_loaded_since_a_cache_was_attached_is_in_its_features(peft):
    """Load an adapter for the output layer of a single block of FLUX, whose output the cache keeps."""
    name, config = "FluxTransformer2DModel", CONFIGS["branch"]

    def with_adapter(model):
        torch.manual_seed(2)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_out", "to_q"], init_lora_weights=False))
        return model

    model = make_tiny(name)
    apply_cache(model, config=config)
    expected = by_definition(with_adapter(make_tiny(name)), config, run_of(name))
    assert_equal_runs(forwards(name, with_adapter(model))(), expected)
    remove_cache(model)
    assert not any("_qandc" in key for module in model.modules() for key in vars(module))
