"""Know PixArt-alpha and -Sigma (arXiv 2310.00426, 2403.04692): one modulation for all blocks, text by attention."""

from __future__ import annotations

from typing import Any

import torch

from qandc.models.family import Call, Family, Stack
from qandc.models.pixart_fused import FusedPixArtBlock

__all__ = ["PIXART"]


def _gates(block: Any, call: Call) -> torch.Tensor:
    x = call["hidden_states"]
    modulation = block.scale_shift_table + call["timestep"].reshape(len(x), 6, -1)
    _, _, attention, _, _, mlp = modulation.to(x.dtype).unbind(1)
    return torch.stack([attention, torch.ones_like(mlp), mlp])  # what attends to the text has no gate


def _why_not(block: Any) -> str | None:
    if getattr(block, "norm_type", None) == "ada_norm_single" and block.attn2 is not None and not block._chunk_size:
        return None
    return "needs PixArt's blocks (adaLN-single, cross-attention, no chunked feed-forward)"


_BLOCKS = Stack("transformer_blocks", ("attn1", "attn2", "ff"), _gates, _why_not, fused=FusedPixArtBlock)
PIXART = Family("PixArtTransformer2DModel", "encoder_hidden_states", (_BLOCKS,))
