"""``fuse_qkv_projections`` of a quantized model: the same bits, the same bytes, one product."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from qandc import ModelError, calibrate, quantization_report, quantize_model
from qandc.quantization.conversion import quant_layers
from qandc.quantization.fused_projections import FusedProjection
from qandc.quantization.linear import QuantLinear
from tests.test_shared_products import alone, products  # noqa: F401 (fixtures)
from tests.tiny_models import each_class, inputs_of, make_tiny, output_of

FLUX = "FluxTransformer2DModel"
CLASSES = {  # fused layers, and whether unfusing removes them
    "PixArtTransformer2DModel": (4, False),
    "FluxTransformer2DModel": (6, True),
    "ChromaTransformer2DModel": (6, True),
    "AuraFlowTransformer2DModel": (6, False),
    "WanTransformer3DModel": (4, True),
    "CogVideoXTransformer3DModel": (2, False),
    "UNet2DConditionModel": (16, False),
}


def fused_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedProjection)}


def quantized(name, way="W8A8"):
    model = quantize_model(make_tiny(name), w_bits=4 if way == "W4A8" else 8)
    if way == "static":
        calibrate(model, [inputs_of(name)])
    return model


@each_class(CLASSES)
@pytest.mark.parametrize("way", ["W8A8", "W4A8", "static"])
def test_fusing_and_unfusing_change_no_bit(name, way, alone):  # noqa: F811
    model, inputs = quantized(name, way), inputs_of(name)
    wanted = alone(output_of, model, inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    number, removed = CLASSES[name]
    model.fuse_qkv_projections()
    assert len(fused_layers(model)) == number
    for _ in range(3):
        assert torch.equal(output_of(model, inputs), wanted)
    model.unfuse_qkv_projections()
    assert len(fused_layers(model)) == (0 if removed else number)
    for _ in range(3):
        assert torch.equal(output_of(model, inputs), wanted)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_one_product_for_each_fused_layer(products):  # noqa: F811
    model, inputs = quantized(FLUX), inputs_of(FLUX)
    output_of(model, inputs)
    unfused = len(products)
    model.fuse_qkv_projections()
    for _ in range(3):  # proj_mlp has met q, k and v, and sees that they do not come any more
        products.clear()
        output_of(model, inputs)
        assert len(products) <= unfused - 6 * 2
    assert len(products) == unfused - 6 * 2


def test_fused_weights_are_those_of_the_layers():
    model = quantized(FLUX)
    before = [str(quantization_report(model)), model.state_dict().keys(), sum(p.numel() for p in model.parameters())]
    model.fuse_qkv_projections()
    assert [
        str(quantization_report(model)),
        model.state_dict().keys(),
        sum(p.numel() for p in model.parameters()),
    ] == before
    for fused in fused_layers(model).values():
        for name in ("qweight", "weight_scale", "weight_sum", "bias"):
            whole = getattr(fused, name)
            assert whole.untyped_storage().nbytes() == whole.nbytes
            assert all(
                getattr(m, name).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                for m in fused.members
            )


@each_class(CLASSES)
def test_saved_while_fused_it_loads_unfused(name, tmp_path):
    model, inputs = quantized(name, "static"), inputs_of(name)
    wanted = output_of(model, inputs)
    model.save_pretrained(tmp_path / "before")
    model.fuse_qkv_projections()
    output_of(model, inputs)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "after")
    assert not fused_layers(loaded)
    assert torch.equal(output_of(loaded, inputs), wanted)
    loaded.fuse_qkv_projections()
    assert len(fused_layers(loaded)) == CLASSES[name][0]
    assert torch.equal(output_of(loaded, inputs), wanted)


def test_calibration_reaches_the_layers_of_a_fused_model(alone):  # noqa: F811
    model, inputs = quantized(FLUX), inputs_of(FLUX)
    other = quantized(FLUX, "static")
    model.fuse_qkv_projections()
    output_of(model, inputs)
    calibrate(model, [inputs])
    assert all(layer.act_scale is not None for name, layer in quant_layers(model).items() if "attn" in name)
    wanted = output_of(other, inputs)
    for _ in range(5):
        assert torch.equal(output_of(model, inputs), wanted)


@pytest.mark.parametrize("change", ["state", "assigned state", "buffers", "moved", "copy", "pickle"])
def test_what_happens_to_the_layers_happens_to_the_fused_one(change):
    model, inputs, other = quantized(FLUX), inputs_of(FLUX), make_tiny(FLUX)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    quantize_model(other)
    model.fuse_qkv_projections()
    output_of(model, inputs)
    if "state" in change:
        model.load_state_dict(other.state_dict(), assign=change != "state")
    elif change == "buffers":
        for name, layer in quant_layers(other).items():
            for buffer in ("qweight", "weight_scale", "weight_sum"):
                setattr(model.get_submodule(name), buffer, getattr(layer, buffer).clone())
        for name, parameter in other.named_parameters():
            model.get_parameter(name).data = parameter.data.clone()
    elif change == "moved":
        other = quantized(FLUX).to(torch.bfloat16)
        model.to(torch.bfloat16)
        inputs = {name: x if name.endswith("ids") else x.bfloat16() for name, x in inputs.items()}
    else:
        other = quantized(FLUX)
        model = copy.deepcopy(model) if change == "copy" else pickle.loads(pickle.dumps(model))
        for fused in fused_layers(model).values():
            assert fused.members[0] in set(model.modules())
            assert fused.qweight.data_ptr() == fused.members[0].qweight.data_ptr()
    wanted = output_of(other, inputs)
    for _ in range(3):
        assert torch.equal(output_of(model, inputs), wanted)
    for fused in fused_layers(model).values():
        assert fused.qweight.data_ptr() == fused.members[0].qweight.data_ptr()


def test_gradients_and_hooks_go_through_the_layers():
    model = quantized(FLUX)
    model.fuse_qkv_projections()
    fused = model.transformer_blocks[0].attn.to_qkv
    x = torch.randn(2, 32, requires_grad=True)
    fused(x).sum().backward()
    assert torch.allclose(x.grad, sum(m.weight.sum(0) for m in fused.members).expand_as(x), atol=1e-4)
    seen = []
    handle = fused.members[1].register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        fused(x)
    handle.remove()
    assert seen == [1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_is_one_product(backend):
    model = quantized(FLUX, "static")
    model.fuse_qkv_projections()
    fused = model.transformer_blocks[0].attn.to_qkv
    x = torch.randn(2, 5, 32)
    graphs = []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        wanted = fused(x)
        assert torch.equal(torch.compile(fused, backend=look, fullgraph=True)(x), wanted)
        assert torch.equal(torch.compile(fused, backend=backend, fullgraph=True)(x), wanted)
    assert sum("int8_linear" in target for target in graphs[0]) == 1


def test_a_model_that_is_not_quantized_is_fused_as_ever():
    quantized(FLUX).fuse_qkv_projections()  # the class has been changed by now
    model, inputs = make_tiny(FLUX), inputs_of(FLUX)
    wanted = output_of(model, inputs)
    model.fuse_qkv_projections()
    assert type(model.transformer_blocks[0].attn.to_qkv) is nn.Linear
    assert torch.equal(output_of(model, inputs), wanted)
    quantize_model(model)
    assert type(model.transformer_blocks[0].attn.to_qkv) is QuantLinear
    output_of(model, inputs)


def test_layers_that_are_not_quantized_are_fused_beside_those_that_are():
    model = quantize_model(make_tiny(FLUX), skip_patterns=["norm", "add_"])
    inputs = inputs_of(FLUX)
    wanted = output_of(model, inputs)
    model.fuse_qkv_projections()
    attention = model.transformer_blocks[0].attn
    assert type(attention.to_qkv) is FusedProjection
    assert type(attention.to_added_qkv) is nn.Linear
    assert torch.allclose(output_of(model, inputs), wanted, atol=1e-5)


def test_what_one_product_cannot_serve_is_refused_and_left_whole():
    model, inputs = quantized(FLUX, "static"), inputs_of(FLUX)
    wanted = output_of(model, inputs)
    attention = model.transformer_blocks[0].attn
    modules, k = list(attention.named_modules()), attention.to_k
    scale = k.act_scale.clone()
    k.set_static_range(scale * 2, k.act_zero_point)
    with pytest.raises(ModelError, match=r"to_qkv .* differently .*to_k: W8A8.*calibrate"):
        model.fuse_qkv_projections()
    assert not attention.fused_projections
    assert list(attention.named_modules()) == modules
    k.set_static_range(scale, k.act_zero_point)
    assert torch.equal(output_of(model, inputs), wanted)
    model = quantize_model(make_tiny(FLUX), skip_patterns=["norm", "to_k"])
    with pytest.raises(ModelError, match="to_k: not quantized"):
        model.fuse_qkv_projections()


def test_adapters_are_not_left_out_silently():
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    model = quantized(FLUX)
    attention = model.transformer_blocks[0].attn
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        setattr(attention, name, Adapter(getattr(attention, name)))
    with pytest.raises(ModelError, match=r"Adapter around a quantized layer.*delete_adapters"):
        model.fuse_qkv_projections()
    assert type(attention.to_q) is Adapter
