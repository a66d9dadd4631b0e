"""Know Chroma (Lodestone Rock, 2025): FLUX.1 with the modulations of all blocks made outside of them, at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qandc.models.chroma_fused import FusedChromaDoubleBlock, FusedChromaSingleBlock
from qandc.models.family import Call, Family, Stack, only

__all__ = ["CHROMA"]


def _gates(block: Any, call: Call) -> torch.Tensor:
    return call["temb"][:, 2:6:3].transpose(0, 1)  # of shift, scale and gate; those of the text come behind six


_STREAMS = ("encoder_hidden_states", "hidden_states")
CHROMA = Family(
    "ChromaTransformer2DModel",
    "encoder_hidden_states",
    (
        Stack(
            "transformer_blocks",
            ("attn", "ff"),
            _gates,
            partial(only, "ChromaTransformerBlock"),
            _STREAMS,
            FusedChromaDoubleBlock,
        ),
        Stack(
            "single_transformer_blocks",
            ("proj_out",),
            _gates,
            partial(only, "ChromaSingleTransformerBlock"),
            fused=FusedChromaSingleBlock,
        ),
    ),
    run_mark="txt_ids",
)
