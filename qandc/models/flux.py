"""Know FLUX.1 (Black Forest Labs, 2024): blocks of two streams, text and image, then blocks of both in one sequence."""

from __future__ import annotations

from functools import partial

from qandc.models.family import Family, Stack, adaln_gates, only
from qandc.models.flux_fused import FusedDoubleBlock, FusedSingleBlock

__all__ = ["FLUX"]

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
        ),
        Stack(
            "single_transformer_blocks",
            ("proj_out",),
            partial(adaln_gates, "norm"),
            partial(only, "FluxSingleTransformerBlock"),
            _STREAMS,
            FusedSingleBlock,
        ),
    ),
    run_mark="txt_ids",
)
