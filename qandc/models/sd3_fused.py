"""Run the blocks of Stable Diffusion 3.5 on fused kernels."""

from __future__ import annotations

from typing import Any, ClassVar

from qandc.models.family import Call
from qandc.models.two_streams import ADALN_IMAGE, ADALN_TEXT, Tables, TwoStreams, plain_adaln
from qandc.support.attach import original_class

__all__ = ["FusedJointBlock"]


class FusedJointBlock(TwoStreams):
    """Run a block of SD3.5, whose heads are normalized and not rotated, but for the last one, where the text ends."""

    text, image = ADALN_TEXT, ADALN_IMAGE
    layers: ClassVar[tuple[str, ...]] = (*text.layers, *image.layers)

    @staticmethod
    def tables_of(call: Call) -> tuple[Tables, Tables]:
        return (None, None), (None, None)

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.attention import JointTransformerBlock
        from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
        from diffusers.models.normalization import AdaLayerNormZero, RMSNorm

        if original_class(block) is not JointTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of SD3"
        if block.context_pre_only or block.use_dual_attention or block._chunk_size:
            return "it has a second attention, no MLP of the text (the last block), or chunked feed-forwards"
        if not all(plain_adaln(norm, AdaLayerNormZero) for norm in (block.norm1, block.norm1_context)):
            return "its norms are not those of SD3"
        attention = block.attn
        if original_class(attention) is not Attention or type(attention.processor) is not JointAttnProcessor2_0:
            return "its attention is not the plain one of SD3"
        return cls.why_not_streams(block, RMSNorm)
