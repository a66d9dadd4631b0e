"""Know FLUX.1 (Black Forest Labs, 2024): blocks of two streams, text and image, then blocks of both in one sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qandc.models.family import Call, Family, Modulated, Stack, adaln_gates, only
from qandc.models.flux_fused import FusedDoubleBlock, FusedSingleBlock

__all__ = ["FLUX"]


def _vector(transformer: Any, call: Call) -> torch.Tensor:
    times = (call["timestep"], call.get("guidance"))
    scaled = (time.to(call["hidden_states"].dtype) * 1000 for time in times if time is not None)
    return transformer.time_text_embed(*scaled, call.get("pooled_projections"))


_STREAMS = ("encoder_hidden_states", "hidden_states")
FLUX = Family(
    "FluxTransformer2DModel",
    "encoder_hidden_states",
    (
        Stack(
            "transformer_blocks",
            ("attn", "ff"),
            partial(adaln_gates, "norm1"),
            partial(only, "FluxTransformerBlock"),
            _STREAMS,
            FusedDoubleBlock,
            ("norm1.linear", "norm1_context.linear"),
            gated_by=("norm1",),
        ),
        Stack(
            "single_transformer_blocks",
            ("proj_out",),
            partial(adaln_gates, "norm"),
            partial(only, "FluxSingleTransformerBlock"),
            _STREAMS,
            FusedSingleBlock,
            ("norm.linear",),
            gated_by=("norm",),
        ),
    ),
    run_mark="txt_ids",
    modulated=Modulated(("guidance", "pooled_projections"), 1000, _vector),
)
