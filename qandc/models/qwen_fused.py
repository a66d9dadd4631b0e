"""Run the blocks of Qwen-Image on fused kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from qandc.models.family import Call
from qandc.models.two_streams import (
    ADDED_HEAD_NORMS,
    ADDED_QKV,
    ARGUMENTS,
    HEAD_NORMS,
    QKV,
    Stream,
    Tables,
    TwoStreams,
    why_not_rotary,
)
from qandc.support.attach import original_class

__all__ = ["FusedQwenBlock"]


def _pairs(angles: torch.Tensor) -> Tables:
    """Return cosines and sines of complex numbers ``[tokens, D/2]``, where they are."""
    cos, sin = torch.view_as_real(angles).unbind(-1)
    return cos, sin


def _masks_are_read() -> bool:
    """Tell whether attention reads the mask of padded prompts; before diffusers 0.37 it is given one and does not."""
    from diffusers.models.transformers import transformer_qwenimage

    return hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")


class FusedQwenBlock(TwoStreams):
    """Run a block of Qwen-Image."""

    text = Stream(
        ("txt_norm1", "txt_norm2"),
        "txt_mod.1",
        ADDED_QKV,
        ADDED_HEAD_NORMS,
        "attn.to_add_out",
        "txt_mlp",
    )
    image = Stream(("img_norm1", "img_norm2"), "img_mod.1", QKV, HEAD_NORMS, "attn.to_out.0", "img_mlp")
    layers: ClassVar[tuple[str, ...]] = (*text.layers, *image.layers)
    arguments: ClassVar[tuple[str, ...]] = (*ARGUMENTS, "encoder_hidden_states_mask")

    @staticmethod
    def tables_of(call: Call) -> tuple[Tables, Tables]:
        image, text = call["image_rotary_emb"]
        return _pairs(text), _pairs(image)

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        if call.get("encoder_hidden_states_mask") is not None and _masks_are_read():
            return "prompts are padded: attention takes a mask (draw them one by one, or of one length)"
        return why_not_rotary(call, torch.complex64)

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.attention_processor import Attention
        from diffusers.models.normalization import RMSNorm
        from diffusers.models.transformers.transformer_qwenimage import (
            QwenDoubleStreamAttnProcessor2_0,
            QwenImageTransformerBlock,
        )

        if original_class(block) is not QwenImageTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of Qwen-Image"
        if getattr(block, "zero_cond_t", False):
            return "tokens have modulations of their own (zero_cond_t)"
        if any(type(mod) is not nn.Sequential or type(mod[0]) is not nn.SiLU for mod in (block.txt_mod, block.img_mod)):
            return "its modulation is not that of Qwen-Image"
        attention = block.attn
        plain = type(attention.processor) is QwenDoubleStreamAttnProcessor2_0
        if original_class(attention) is not Attention or not plain:
            return "its attention is not the plain one of Qwen-Image"
        return cls.why_not_streams(block, RMSNorm)
