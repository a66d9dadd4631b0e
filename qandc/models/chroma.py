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


class _Embedding(torch.nn.Module):
    time_proj: torch.nn.Module
    guidance_proj: torch.nn.Module
    mod_proj: torch.Tensor

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Embed timestep, guidance and number of each modulation as diffusers does, guidance 0 made on the device."""
        parts = [self.time_proj(timestep), self.guidance_proj(torch.zeros_like(timestep))]
        of_step = torch.cat([part.to(timestep.dtype) for part in parts], 1)[:, None]
        numbers = self.mod_proj.to(timestep).expand(len(timestep), -1, -1)
        return torch.cat([of_step.expand(-1, numbers.shape[1], -1), numbers], -1)


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
    captured=("time_text_embed", _Embedding),
)
