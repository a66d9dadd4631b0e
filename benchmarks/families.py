"""The models that people run, at real sizes with random weights, and what their pipelines pass to them.

Pictures are 1024², 512² where a name ends so, Wan's videos 81 frames of 832 x 480.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from benchmarks.rivals import library
from benchmarks.timing import DEVICE
from qandc import calibrate, fuse, graph, quantization_plan, quantize_model
from qandc.fusion.blocks import fuses_blocks
from qandc.models import FAMILIES as KNOWN

__all__ = [
    "FAMILIES",
    "Family",
    "clone",
    "compiled",
    "fused",
    "fuses",
    "inputs",
    "model_of",
    "quantized",
    "torchao_fp8",
]

Model = Any
TEXT = 512  # tokens of a prompt; SD3.5 has 77 more, Qwen-Image's prompt is shorter


class Family(NamedTuple):
    """A model class, its size, and the inputs of one forward."""

    name: str
    sizes: dict[str, Any]
    inputs: Callable[[Callable[..., torch.Tensor], torch.Tensor], dict[str, Any]]
    tokens: int


def _pixart(noise: Callable[..., torch.Tensor], timestep: torch.Tensor, side: int = 128) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, side, side),
        "encoder_hidden_states": noise(2, 300, 4096),
        "timestep": timestep.expand(2),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.ones(2, 300, device=DEVICE),
    }


def _sd3(noise: Callable[..., torch.Tensor], timestep: torch.Tensor, side: int = 128) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 16, side, side),
        "encoder_hidden_states": noise(2, 333, 4096),
        "pooled_projections": noise(2, 2048),
        "timestep": timestep.expand(2),
    }


def _flux(noise: Callable[..., torch.Tensor], timestep: torch.Tensor) -> dict[str, Any]:
    rows = torch.arange(64, device=DEVICE, dtype=torch.bfloat16)
    places = torch.stack(
        [torch.zeros(64, 64, device=DEVICE, dtype=torch.bfloat16), *torch.meshgrid(rows, rows, indexing="ij")], -1
    )
    return {
        "hidden_states": noise(1, 4096, 64),
        "encoder_hidden_states": noise(1, TEXT, 4096),
        "pooled_projections": noise(1, 768),
        "timestep": timestep / 1000,
        "guidance": torch.full((1,), 3.5, device=DEVICE),
        "img_ids": places.view(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3, device=DEVICE, dtype=torch.bfloat16),
    }


def _qwen(noise: Callable[..., torch.Tensor], timestep: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 4096, 64),
        "encoder_hidden_states": noise(1, 128, 3584),
        "timestep": timestep / 1000,
        "img_shapes": [[(1, 64, 64)]],
    }


def _z_image(noise: Callable[..., torch.Tensor], timestep: torch.Tensor) -> dict[str, Any]:
    return {
        "x": [noise(16, 1, 128, 128) for _ in range(2)],
        "t": (1 - timestep / 1000).expand(2),
        "cap_feats": [noise(128, 2560) for _ in range(2)],
    }


def _wan(noise: Callable[..., torch.Tensor], timestep: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 16, 21, 60, 104),
        "encoder_hidden_states": noise(1, TEXT, 4096),
        "timestep": timestep,
    }


FAMILIES = {
    "PixArt-Sigma": Family(
        "PixArtTransformer2DModel",
        {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096, "interpolation_scale": 2},
        _pixart,
        2 * 4096,
    ),
    "SD3.5-large": Family(
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64,
            "caption_projection_dim": 2432, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192, "qk_norm": "rms_norm",
        },
        _sd3,
        2 * (4096 + 333),
    ),
    "Qwen-Image": Family("QwenImageTransformer2DModel", {}, _qwen, 4096 + 128),
    "FLUX.1-dev": Family("FluxTransformer2DModel", {"guidance_embeds": True}, _flux, 4096 + TEXT),
    "Z-Image": Family("ZImageTransformer2DModel", {}, _z_image, 2 * (4096 + 128)),
    "Wan-2.1-1.3B": Family(
        "WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}, _wan, 21 * 30 * 52
    ),
    "PixArt-Sigma-512": Family(
        "PixArtTransformer2DModel",
        {"sample_size": 64, "use_additional_conditions": False, "caption_channels": 4096},
        partial(_pixart, side=64),
        2 * 1024,
    ),
    "SD3.5-medium-512": Family(
        "SD3Transformer2DModel",
        {
            "sample_size": 64, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64,
            "caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        },
        partial(_sd3, side=64),
        2 * (1024 + 333),
    ),
}  # fmt: skip


@cache
def _built(layer: str, **sizes: int) -> Model:
    import diffusers

    family = FAMILIES[layer]
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = getattr(diffusers, family.name)(**family.sizes, **sizes)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("bias"):
            parameter.data.normal_(std=0.02)
    return model.eval()


def model_of(layer: str, **sizes: int) -> Model:
    """The bf16 model, one at a time: it takes up to 40 GB. ``sizes`` are other ones than its own."""
    if _built.cache_info().currsize and layer not in _last:
        _built.cache_clear()
        torch.cuda.empty_cache()
    _last[:] = [layer]
    return _built(layer, **sizes)


_last: list[str] = []


def inputs(layer: str, timestep: float = 500.0) -> dict[str, Any]:
    """Random latents and text, as the pipeline passes them."""
    generator = torch.Generator(DEVICE).manual_seed(int(timestep))

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    arguments = FAMILIES[layer].inputs(noise, torch.tensor([timestep], device=DEVICE, dtype=torch.bfloat16))
    return {**arguments, "return_dict": False}


def clone(model: Model) -> Model:
    """Copy modules, not what they hold: two models of 40 GB would be too much for some GPUs."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def compiled(model: Model, fullgraph: bool = True) -> Model:
    """Regional compilation, as diffusers recommends it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.modules():
        if type(block).__name__.endswith("Block"):  # PixArt does not say which of its blocks repeat
            block.compile(fullgraph=fullgraph, dynamic=False)
    return model


def quantized(model: Model, layer: str, w_bits: int, conditioning: str | None = None, calibrated: bool = True) -> Model:
    """Quantize a model by the default plan, with static ranges or scales per token.

    Modulation stays in bf16, or its weights alone are quantized; PixArt has none in its blocks.
    """
    found = quantize_model(clone(model), w_bits=w_bits, conditioning=conditioning)
    if not calibrated:
        return found
    return calibrate(found, [inputs(layer, timestep) for timestep in (900.0, 500.0, 100.0)])


def fuses(layer: str) -> bool:
    """Tell whether there are fused blocks for a model."""
    return fuses_blocks(KNOWN[FAMILIES[layer].name])


def fused(model: Model, layer: str, w_bits: int, calibrated: bool = True) -> Model:
    """Quantize modulation too, its weights alone, and run blocks on fused kernels within a graph."""
    return graph(fuse(quantized(model, layer, w_bits, f"W{w_bits}A16", calibrated)))


def torchao_fp8(model: Model) -> Model:
    """Quantize by torchao to fp8 the layers that ``quantize_model`` would, a scale a row, and compile the blocks."""
    library("torchao")
    quantization = importlib.import_module("torchao.quantization")
    names = {row.name for row in quantization_plan(model).quantized}
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )
    model = copy.deepcopy(model)
    quantization.quantize_(model, config, filter_fn=lambda module, name: name in names)
    return compiled(model)
