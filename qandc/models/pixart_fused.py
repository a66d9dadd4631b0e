"""Run the blocks of PixArt on fused kernels.

A block with static ranges is LayerNorm + modulate + quantize, one product for q, k and v, attention that stores int8, a
product that adds gate · y to the residual stream; then quantize, a product for q, attention to the caption, a product
that adds y; then the MLP in three launches. The caption, quantized for each block, and its k and v take two more.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from qandc.caching.features import Target
from qandc.models.attention import attend_quantized
from qandc.models.family import Call
from qandc.models.products import (
    Mlp,
    Product,
    divided,
    is_gelu_mlp,
    joined,
    modulated,
    plain_attention,
    plain_norm,
    product_of,
    quantized,
    why_not_layers,
    why_not_one_input,
    why_not_one_product,
)
from qandc.quantization.linear import QuantLinear
from qandc.support.attach import original_class

__all__ = ["FusedPixArtBlock"]

Tensor = torch.Tensor
IMAGE, CAPTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")
OTHERS = ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")


class FusedPixArtBlock:
    """Run a block of PixArt-alpha or -Sigma."""

    layers: ClassVar[tuple[str, ...]] = (*IMAGE, *CAPTION, *OTHERS)
    arguments: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "timestep",
    )

    def __init__(self, block: Any) -> None:
        image, caption = block.attn1, block.attn2
        self.table, self.eps, self.smoothing = block.scale_shift_table, block.norm1.eps, image.to_q.smoothing
        self.ungated = torch.ones_like(self.table[:1])
        self.heads, self.outs = image.heads, [(each.to_out[0], product_of(each.to_out[0])) for each in (image, caption)]
        self.q_layer, self.k_layer = caption.to_q, caption.to_k
        qkv, kv = [image.to_q, image.to_k, image.to_v], [caption.to_k, caption.to_v]
        self.qkv = joined(qkv).last_divided(image.to_out[0].smoothing)
        self.q, self.kv = product_of(caption.to_q), joined(kv).last_divided(caption.to_out[0].smoothing)
        self.mlp = Mlp(block.norm2, block.ff)

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        x, caption, mask, timestep = map(call.get, FusedPixArtBlock.arguments)
        if x is None or x.ndim != 3 or caption is None or timestep is None:
            return "it is called without hidden_states [B, tokens, D], encoder_hidden_states or timestep"
        if mask is not None and (mask.dtype != x.dtype or mask.shape != (len(x), 1, caption.shape[1])):
            return f"encoder_attention_mask is {mask.dtype} {list(mask.shape)}, not a bias [B, 1, keys] of its dtype"
        return None

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.attention import BasicTransformerBlock

        if original_class(block) is not BasicTransformerBlock or block.norm_type != "ada_norm_single":
            return f"the block is {original_class(block).__name__}, not one of PixArt"
        if block.attn2 is None or hasattr(block, "fuser") or block._chunk_size is not None:
            return "it has no attention to the caption, gated attention beside it, or a chunked feed-forward"
        if not plain_attention(block.attn1) or not plain_attention(block.attn2):
            return "its attention is not the plain one of PixArt"
        if not plain_norm(block.norm1) or not plain_norm(block.norm2):
            return "its norms have weights"
        if not is_gelu_mlp(block.ff):
            return "its activation is not tanh-GELU"
        reason = why_not_layers(block, cls.layers)
        for names in (IMAGE, CAPTION):
            reason = reason or why_not_one_product(block, names) or why_not_one_input(block, names)
        return reason

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> Tensor:
        given, mask = call["hidden_states"], call.get("encoder_attention_mask")
        modulation = (self.table + call["timestep"].reshape(len(given), 6, -1)).unbind(1)
        x = given.new_empty(given.shape)  # nothing is written into what it was given
        xq, qkv = modulated(given, modulation, self.qkv, self.smoothing, self.eps, x)
        q, k, v = self._heads(qkv(xq, x.dtype), 3)
        self._attend_(x, (q, k, v), self.outs[0], modulation[2], targets[0])
        xq, to_q = quantized(divided(x[:, :, None], self.q_layer), self.q, self.q_layer.nan_flag)
        (q,) = self._heads(to_q(xq, x.dtype), 1)
        caption = divided(call["encoder_hidden_states"][:, :, None], self.k_layer)
        xq, to_kv = quantized(caption, self.kv, self.k_layer.nan_flag)
        k, v = self._heads(to_kv(xq, x.dtype), 2)
        gate, bias = self.ungated.expand(len(x), -1), None if mask is None else mask[:, 0]
        self._attend_(x, (q, k, v), self.outs[1], gate, targets[1], bias)
        self.mlp.add_(x, modulation[3:], targets[2])
        return x

    def _heads(self, product: Tensor, parts: int) -> tuple[Tensor, ...]:
        return product.unflatten(2, (parts, self.heads, -1)).unbind(2)

    def _attend_(
        self,
        x: Tensor,
        qkv: tuple[Tensor, ...],
        out: tuple[QuantLinear, Product],
        gate: Tensor,
        target: Target | None,
        bias: Tensor | None = None,
    ) -> None:
        """Add attention behind its output layer to the stream, times the gate."""
        (q, k, v), (layer, product) = qkv, out
        xq, product = attend_quantized(q, k, v, product, layer.nan_flag, bias)
        product.gate_residual_(x, xq, gate, target)
