"""Know Qwen-Image (arXiv 2508.02324): blocks of two streams, text and image, modulated by the timestep alone."""

from __future__ import annotations

from typing import Any

import torch

from qandc.models.family import Call, Family, Modulated, Stack, only, zero_gates
from qandc.models.qwen_fused import FusedQwenBlock

__all__ = ["QWEN_IMAGE"]


def _gates(block: Any, call: Call) -> torch.Tensor:
    return zero_gates(block.img_mod(call["temb"]), call["hidden_states"].shape[-1])


def _why_not(block: Any) -> str | None:
    if getattr(block, "zero_cond_t", False):  # of some editing models: tokens of their input have gates of their own
        return "needs one modulation for all tokens (zero_cond_t=False)"
    return only("QwenImageTransformerBlock", block)


def _vector(transformer: Any, call: Call) -> torch.Tensor:
    x = call["hidden_states"]
    return transformer.time_text_embed(call["timestep"].to(x.dtype), x, call.get("additional_t_cond"))


_STREAMS = ("encoder_hidden_states", "hidden_states")
_BLOCKS = Stack(
    "transformer_blocks",
    ("attn", "img_mlp"),
    _gates,
    _why_not,
    _STREAMS,
    FusedQwenBlock,
    ("img_mod.1", "txt_mod.1"),
    gated_by=("img_mod",),
)
QWEN_IMAGE = Family(
    "QwenImageTransformer2DModel",
    "encoder_hidden_states",
    (_BLOCKS,),
    modulated=Modulated(("additional_t_cond",), 1000, _vector),
)
