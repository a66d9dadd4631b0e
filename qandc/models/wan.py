"""Know Wan 2.1 and 2.2 (arXiv 2503.20314): video, from text or an image too, one modulation for all blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qandc.errors import CacheError
from qandc.models.family import Call, Family, Stack, only

__all__ = ["WAN"]


def _gates(block: Any, call: Call) -> torch.Tensor:
    temb = call["temb"]
    if temb.ndim == 4:  # the 5B model of Wan 2.2, whose pipelines give every token a timestep
        raise CacheError("a timestep for each token (expand_timesteps=True) needs cache mode 'delta' or 'crf'")
    _, _, attention, _, _, mlp = (block.scale_shift_table + temb.float()).unbind(1)
    return torch.stack([attention, torch.ones_like(mlp), mlp])  # what attends to the text has no gate


def _named(call: Call) -> Call:
    """Return arguments with one timestep for each sample: the latest of its tokens, since a given image has 0."""
    timestep = call.get("timestep")
    if isinstance(timestep, torch.Tensor) and timestep.ndim == 2:
        return {**call, "timestep": timestep.amax(1)}
    return call


_BLOCKS = Stack("blocks", ("attn1", "attn2", "ffn"), _gates, partial(only, "WanTransformerBlock"))
WAN = Family(
    "WanTransformer3DModel", "encoder_hidden_states", (_BLOCKS,), run_mark="encoder_hidden_states_image", named=_named
)
