"""DiT (Peebles and Xie, arXiv 2212.09748): adaLN-Zero of timestep and class in each block."""

from __future__ import annotations

from typing import Any

import torch

from qandc.models.family import Call, Family

__all__ = ["DIT"]


def _gates(block: Any, call: Call) -> torch.Tensor:
    norm = block.norm1
    embedding = norm.emb(call.get("timestep"), call.get("class_labels"), hidden_dtype=call["hidden_states"].dtype)
    _, _, attention, _, _, mlp = norm.linear(norm.silu(embedding)).chunk(6, 1)
    return torch.stack([attention, mlp])


def _why_not(block: Any) -> str | None:
    if getattr(block, "norm_type", None) == "ada_norm_zero" and block.attn2 is None and not block._chunk_size:
        return None
    return "needs DiT's blocks (adaLN-Zero, no cross-attention, no chunked feed-forward)"


DIT = Family("DiTTransformer2DModel", "class_labels", ("attn1", "ff"), _gates, _why_not)
