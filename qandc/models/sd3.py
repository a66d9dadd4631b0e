"""Know Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two streams, in some blocks a second attention of the image."""

from __future__ import annotations

from functools import partial
from typing import Any

from qandc.models.family import Family, Stack, adaln_gates, only
from qandc.models.sd3_fused import FusedJointBlock

__all__ = ["SD3"]


def _why_not(block: Any) -> str | None:
    chunked = getattr(block, "_chunk_size", None)
    return "needs feed-forwards that are not chunked" if chunked else only("JointTransformerBlock", block)


_STREAMS = ("encoder_hidden_states", "hidden_states")
_BRANCHES = ("attn", "ff", "attn2")
_BLOCKS = Stack("transformer_blocks", _BRANCHES, partial(adaln_gates, "norm1"), _why_not, _STREAMS, FusedJointBlock)
SD3 = Family("SD3Transformer2DModel", "encoder_hidden_states", (_BLOCKS,), uncached=("skip_layers",))
