"""Which parts of a DiT can run on the fused kernels, and why others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from qandc.fused_step import StepRanges
from qandc.linear import QuantLinear

__all__ = ["BLOCK_LAYERS", "is_batchable", "touched", "why_not_block", "why_not_layer"]

QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
BLOCK_LAYERS = (*QKV, "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


def touched(module: nn.Module) -> str | None:
    """What someone has put around a module that calling its weights directly would leave out."""
    for name, part in module.named_modules():
        where = name or type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{where} has forward hooks"
        if "forward" in part.__dict__:
            return f"{where} has a replaced forward"
        if parametrize.is_parametrized(part):
            return f"{where} has parametrizations"
    return None


def why_not_layer(name: str, layer: Any, has_range: bool) -> str | None:
    if type(layer) is not QuantLinear:
        return f"{name} is {type(layer).__name__}, not a QuantLinear"
    if layer.a_bits != 8:
        return f"{name} quantizes activations to {layer.a_bits} bits, fused kernels to 8"
    if layer.act_scale is None and not has_range:
        return f"{name} has no static range (calibrate the model)"
    return None


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def why_not_block(block: Any, prefix: str, ranges: StepRanges | None) -> str | None:
    """Why a block can't run on the fused kernels, or None."""
    from diffusers.models.activations import GELU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    if type(block) is not BasicTransformerBlock or block.norm_type != "ada_norm_zero":
        return f"the block is {type(block).__name__}, not diffusers' adaLN-Zero block"
    attention, feed_forward = block.attn1, block.ff.net
    plain = (
        type(attention) is Attention
        and type(attention.processor) in (AttnProcessor, AttnProcessor2_0)
        and not any(getattr(attention, name, None) for name in ("norm_q", "norm_k", "spatial_norm", "group_norm"))
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )
    if not plain:
        return "its attention is not the plain one of DiT"
    if block.attn2 is not None or block.pos_embed is not None or block._chunk_size is not None:
        return "it has cross-attention, a position embedding or a chunked feed-forward"
    if block.norm3.elementwise_affine or block.norm1.norm.elementwise_affine:
        return "its LayerNorm has weights"
    if type(feed_forward[0]) is not GELU or feed_forward[0].approximate != "tanh":
        return "its activation is not tanh-GELU"
    around = touched(block)
    if around is not None:
        return around
    names = set() if ranges is None else {n.removeprefix(prefix) for n in ranges.scales if n.startswith(prefix)}
    for name in BLOCK_LAYERS:
        reason = why_not_layer(name, block.get_submodule(name), name in names)
        if reason is not None:
            return reason
    q, k, v = (block.get_submodule(name) for name in QKV)
    if not q.w_bits == k.w_bits == v.w_bits or len({layer.bias is None for layer in (q, k, v)}) > 1:
        return "q, k and v have different bits or biases"
    shared = ("smoothing",) if names else ("smoothing", "act_scale", "act_zero_point")
    if not all(_equal(getattr(q, name), getattr(layer, name)) for layer in (k, v) for name in shared):
        return "q, k and v, which see one input, have different ranges for it"
    return None


def is_batchable(blocks: list[Any]) -> bool:
    """Whether all embedders and adaLN layers are as diffusers made them, so that they can run as batched products."""
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
    from diffusers.models.normalization import AdaLayerNormZero

    def plain(norm: Any) -> bool:
        if type(norm) is not AdaLayerNormZero or type(norm.emb) is not CombinedTimestepLabelEmbeddings:
            return False
        time = norm.emb.timestep_embedder
        linears = (norm.linear, time.linear_1, time.linear_2)
        return (
            touched(norm) is None
            and all(type(linear) is nn.Linear and linear.bias is not None for linear in linears)
            and type(time.act) is nn.SiLU
            and time.cond_proj is None
            and time.post_act is None
        )

    shapes = {tuple(p.shape for p in block.norm1.parameters()) for block in blocks}
    return len(shapes) == 1 and all(plain(block.norm1) for block in blocks)
