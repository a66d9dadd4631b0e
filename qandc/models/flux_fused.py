"""Run the blocks of FLUX.1 on fused kernels: those of two streams, text and image, and those of one sequence of both.

A block of one sequence is LayerNorm + modulate + quantize, one product for q, k and v, norms and rotation of their
heads, attention, its quantization, a product that applies GELU and quantizes (without a static range another kernel
does both), and one that adds gate · y to the residual stream. What a block is given is left alone, as others may hold
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qandc.caching.features import Target
from qandc.models.attention import attend
from qandc.models.family import Call
from qandc.models.products import (
    divided,
    product_of,
    why_not_layers,
    why_not_one_input,
    why_not_one_product,
)
from qandc.models.two_streams import (
    ADALN_IMAGE,
    ADALN_TEXT,
    ARGUMENTS,
    HEAD_NORMS,
    QKV,
    Projection,
    Tables,
    TwoStreams,
    clip_,
    outer_mask,
    plain_adaln,
    why_not_heads,
    why_not_rotary,
)
from qandc.support.attach import original_class

__all__ = ["FusedDoubleBlock", "FusedSingleBlock", "why_not_attention"]


class _FluxBlock:
    """Know which calls of a block of FLUX.1 can run fused."""

    arguments: ClassVar[tuple[str, ...]] = ARGUMENTS

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        return why_not_rotary(call, torch.float32)


class FusedSingleBlock(_FluxBlock):
    """Run a block of one sequence, text and image."""

    layers: ClassVar[tuple[str, ...]] = (*QKV, "proj_mlp", "proj_out")

    def __init__(self, block: Any) -> None:
        self.modulation: Any = getattr(block.norm, "linear", None)  # None where a block is given modulations
        self.out_layer = block.proj_out
        self.project = Projection(block, block.norm.norm, QKV, HEAD_NORMS)
        self.processor, self.heads = block.attn.processor, block.attn.heads
        self.mlp, self.out = product_of(block.proj_mlp), product_of(block.proj_out)
        smoothing = block.proj_out.smoothing
        self.multiplier = None if smoothing is None else 1 / smoothing[-block.proj_mlp.out_features :]

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.normalization import AdaLayerNormZeroSingle
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

        if original_class(block) is not FluxSingleTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of FLUX.1"
        if not plain_adaln(block.norm, AdaLayerNormZeroSingle):
            return "its norm is not that of FLUX.1"
        return cls.why_not_parts(block)

    @classmethod
    def why_not_parts(cls, block: Any) -> str | None:
        """Say why activation, attention or layers of a block can't run fused, or None."""
        if type(block.act_mlp) is not nn.GELU or block.act_mlp.approximate != "tanh":
            return "its activation is not tanh-GELU"
        return (
            why_not_attention(block)
            or why_not_heads(block.attn, (HEAD_NORMS,), nn.RMSNorm)
            or why_not_layers(block, cls.layers)
            or why_not_one_product(block, QKV)
            or why_not_one_input(block, (*QKV, "proj_mlp"))
        )

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> tuple[Tensor, Tensor]:
        text, image = call["encoder_hidden_states"], call["hidden_states"]
        given = _side_by_side(text, image)
        modulation = self.modulation(F.silu(call["temb"])).chunk(3, 1)
        joined = torch.cat([text, image], 1) if given is None else given
        x = self.run(joined, modulation, call, targets[0], in_place=given is None)
        return x[:, : text.shape[1]], x[:, text.shape[1] :]

    def run(
        self, given: Tensor, modulation: Sequence[Tensor], call: Call, target: Target | None, *, in_place: bool = False
    ) -> Tensor:
        """Return the sequence ``given [B, tokens, D]`` with what the block adds."""
        x = given if in_place else torch.empty_like(given)
        modulation = [part.expand(len(x), -1) for part in modulation]
        qkv = x.new_empty(*x.shape[:2], 3 * x.shape[2])
        xq, x_scale = self.project(given, modulation, call["image_rotary_emb"], qkv, None if in_place else x)
        mask = outer_mask(call.get("attention_mask"))
        attended = divided(attend(qkv.unflatten(2, (3, self.heads, -1)), self.processor, mask), self.out_layer)
        mlp = self.mlp._replace(x_scale=x_scale)
        both, out = mlp.gelu_quantize(xq, self.out, self.multiplier, x.dtype, attended, self.out_layer.nan_flag)
        out.gate_residual_(x, both, modulation[2], target)
        clip_(x)
        return x


class FusedDoubleBlock(_FluxBlock, TwoStreams):
    """Run a block of two streams."""

    text, image = ADALN_TEXT, ADALN_IMAGE
    layers: ClassVar[tuple[str, ...]] = (*text.layers, *image.layers)

    @staticmethod
    def tables_of(call: Call) -> tuple[Tables, Tables]:
        tokens = call["encoder_hidden_states"].shape[1]
        cos, sin = call["image_rotary_emb"]
        return (cos[:tokens], sin[:tokens]), (cos[tokens:], sin[tokens:])

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.normalization import AdaLayerNormZero
        from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

        if original_class(block) is not FluxTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of FLUX.1"
        if not all(plain_adaln(norm, AdaLayerNormZero) for norm in (block.norm1, block.norm1_context)):
            return "its norms are not those of FLUX.1"
        return why_not_attention(block) or cls.why_not_streams(block, nn.RMSNorm)


def _side_by_side(text: Tensor, image: Tensor) -> Tensor | None:
    """Return two streams as one sequence if they lie so in memory, as those from a fused block do, or None."""
    tokens, same = text.shape[1], text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    behind = image.storage_offset() == text.storage_offset() + tokens * text.stride(1)
    if not same or not behind or text.stride() != image.stride():
        return None
    return text.as_strided((text.shape[0], tokens + image.shape[1], text.shape[2]), text.stride())


def why_not_attention(block: Any) -> str | None:
    """Say why the attention of a block is not the plain one of FLUX.1, or None."""
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

    plain = original_class(block.attn) is FluxAttention and type(block.attn.processor) is FluxAttnProcessor
    return None if plain else "its attention is not the plain one of FLUX.1 (an IP-Adapter, for example)"
