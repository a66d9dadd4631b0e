"""Run the blocks of Stable Diffusion 3.5 on fused kernels."""

from __future__ import annotations

from typing import Any, ClassVar

from qandc.models.family import Call
from qandc.models.products import why_not_layers, why_not_one_input, why_not_one_product
from qandc.models.two_streams import (
    ADALN_IMAGE,
    ADALN_TEXT,
    HEAD_NORMS,
    SelfAttention,
    Tables,
    TwoStreams,
    plain_adaln,
    why_not_heads,
)
from qandc.support.attach import original_class

__all__ = ["FusedJointBlock"]

QKV, OUT = ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.to_out.0"  # of the second attention, where there is one


class FusedJointBlock(TwoStreams):
    """Run a block of SD3.5, whose heads are normalized and not rotated, but for the last one, where the text ends.

    Of the medium size half of the blocks attend twice, the second time among the tokens of the image alone.
    """

    text, image = ADALN_TEXT, ADALN_IMAGE
    layers: ClassVar[tuple[str, ...]] = (*text.layers, *image.layers, *QKV, OUT)

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        if block.use_dual_attention:
            self.beside = SelfAttention(block, block.norm1.norm, QKV, OUT)

    @staticmethod
    def tables_of(call: Call) -> tuple[Tables, Tables]:
        return (None, None), (None, None)

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.attention import JointTransformerBlock
        from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
        from diffusers.models.normalization import AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX

        if original_class(block) is not JointTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of SD3"
        if block.context_pre_only or block._chunk_size:
            return "it has no MLP of the text (the last block), or chunked feed-forwards"
        twice = block.use_dual_attention
        of_image = SD35AdaLayerNormZeroX if twice else AdaLayerNormZero
        if not (plain_adaln(block.norm1, of_image) and plain_adaln(block.norm1_context, AdaLayerNormZero)):
            return "its norms are not those of SD3"
        for attention in (block.attn, block.attn2) if twice else (block.attn,):
            if original_class(attention) is not Attention or type(attention.processor) is not JointAttnProcessor2_0:
                return "its attention is not the plain one of SD3"
        reason = cls.why_not_streams(block, RMSNorm)
        if reason is not None or not twice:
            return reason
        return (
            why_not_heads(block.attn2, (HEAD_NORMS,), RMSNorm)
            or why_not_layers(block, (*QKV, OUT))
            or why_not_one_product(block, QKV)
            or why_not_one_input(block, QKV)
        )
