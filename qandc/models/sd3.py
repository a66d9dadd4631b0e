"""Know Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two streams, in some blocks a second attention of the image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qandc.models.family import Call, Family, Modulated, Stack, adaln_gates, only
from qandc.models.sd3_fused import FusedJointBlock

__all__ = ["SD3"]


def _why_not(block: Any) -> str | None:
    chunked = getattr(block, "_chunk_size", None)
    return "needs feed-forwards that are not chunked" if chunked else only("JointTransformerBlock", block)


def _vector(transformer: Any, call: Call) -> torch.Tensor:
    return transformer.time_text_embed(call["timestep"], call.get("pooled_projections"))


_STREAMS = ("encoder_hidden_states", "hidden_states")
_BRANCHES = ("attn", "ff", "attn2")
_BLOCKS = Stack(
    "transformer_blocks",
    _BRANCHES,
    partial(adaln_gates, "norm1"),
    _why_not,
    _STREAMS,
    FusedJointBlock,
    ("norm1.linear", "norm1_context.linear"),
    gated_by=("norm1",),
)
SD3 = Family(
    "SD3Transformer2DModel",
    "encoder_hidden_states",
    (_BLOCKS,),
    uncached=("skip_layers",),
    modulated=Modulated(("pooled_projections",), 1, _vector),
)
