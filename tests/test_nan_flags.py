"""NaN behind static ranges is told after the run, with the layer that was given it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

import qandc.models.attention
from qandc import DataError, calibrate, fuse_dit, graph, quantize_model, sample_latents
from qandc.fusion.model_graph import Graphed
from qandc.quantization.linear import QuantLinear
from tests.conftest import make_dit

RUN = {"num_inference_steps": 2, "guidance_scale": 1.5, "seeds": [0]}


def make_static(device: str = "cpu"):
    model = quantize_model(make_dit())
    inputs = {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((4,), 500),
        "class_labels": torch.arange(4),
    }
    return torch.nn.Module.to(calibrate(model, [inputs]), device)


def overflow(layer):
    """Have a layer be given NaN in one place; returns the handle of the hook that does it."""

    def poison(module, args):
        x = args[0].clone()
        x[0, 0, 0] = float("nan")
        return (x, *args[1:])

    return layer.register_forward_pre_hook(poison)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_first_layer_is_named(device):
    model = make_static(device)
    expected = sample_latents(model, DDIMScheduler(), [1], **RUN)
    handles = [overflow(model.transformer_blocks[i].ff.net[2]) for i in (2, 1)]
    for _ in range(2):
        with pytest.raises(DataError, match=r"^transformer_blocks\.1\.ff\.net\.2 was given NaN"):
            sample_latents(model, DDIMScheduler(), [1], **RUN)
    for handle in handles:
        handle.remove()
    assert torch.equal(sample_latents(model, DDIMScheduler(), [1], **RUN), expected)  # what was told is forgotten


def test_flags_are_not_saved_and_move_along():
    model = make_static()
    names = set(model.state_dict())
    sample_latents(model, DDIMScheduler(), [1], **RUN)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert set(model.state_dict()) == names
    static = [layer for layer in layers if layer.act_scale is not None]
    assert len(static) == len(layers) - 1  # proj_out_1 sees a row per sample
    assert all(layer.nan_flag is not None and not layer.nan_flag.is_inference() for layer in static)
    meta = layers[0].to("meta")
    assert meta.nan_flag.is_meta
    assert meta(torch.empty(2, meta.in_features, device="meta")).is_meta


def test_attention_of_a_fused_block(fused_anywhere, monkeypatch):
    """The only place of a fused block where int8 hides NaN."""
    model = fuse_dit(make_static())
    expected = sample_latents(model, DDIMScheduler(), [1], **RUN)
    original = qandc.models.attention.attention_quantize_per_tensor
    calls = []

    def attention(q, k, v, *others):
        calls.append(0)
        v = v.clone()
        if len(calls) in (2, 3):  # blocks 1 and 2 of the first step
            v[0, 0, 0, 0] = float("nan")
        return original(q, k, v, *others)

    monkeypatch.setattr(qandc.models.attention, "attention_quantize_per_tensor", attention)
    with pytest.raises(DataError, match=r"^transformer_blocks\.1\.attn1\.to_out\.0 was given NaN"):
        sample_latents(model, DDIMScheduler(), [1], **RUN)
    assert torch.equal(sample_latents(model, DDIMScheduler(), [1], **RUN), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("whole_run", [False, True])
def test_in_graphs(whole_run):
    """Weights that overflow attention in float16, within a CUDA graph."""
    model = fuse_dit(torch.nn.Module.to(make_static("cuda"), torch.float16))
    sample_latents(model, DDIMScheduler(), [1], cuda_graph=whole_run, **RUN)
    value = model.transformer_blocks[1].attn1.to_v
    value.weight_scale = torch.full_like(value.weight_scale, 1e38)
    with pytest.raises(DataError, match=r"transformer_blocks\.1\.attn1\.to_out\.0 was given NaN|NaN or inf"):
        sample_latents(model, DDIMScheduler(), [1], cuda_graph=whole_run, **RUN)


@pytest.mark.gpu
def test_flags_of_a_graphed_model():
    model = graph(make_static("cuda"))
    sample_latents(model, DDIMScheduler(), [1], **RUN)
    sample_latents(model, DDIMScheduler(), [1], **RUN)
    captures = Graphed.of(model).graphs.captures
    sample_latents(model, DDIMScheduler(), [1], **RUN)
    assert Graphed.of(model).graphs.captures == captures
