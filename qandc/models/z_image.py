"""Know Z-Image (arXiv 2511.22699): image and text in one sequence, norms behind branches, gates within -1 and 1."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qandc.errors import CacheError
from qandc.models.family import Call, Family, Stack, only

__all__ = ["Z_IMAGE"]


def _gates(block: Any, call: Call) -> torch.Tensor:
    _, attention, _, mlp = block.adaLN_modulation(call["adaln_input"]).chunk(4, dim=1)
    return torch.stack([attention, mlp]).tanh()


def _named(call: Call) -> Call:
    """Return arguments with those of other classes, from lists with an item per sample and a time that rises."""
    images, texts = call["x"], call["cap_feats"]
    if isinstance(images[0], list):
        raise CacheError("a cache knows no images beside the one that is drawn (omni): call remove_cache(transformer)")
    latents = images[0].expand(len(images), *images[0].shape)
    return {**call, "hidden_states": latents, "timestep": 1 - call["t"], "first_text": texts[0], "last_text": texts[-1]}


_BLOCKS = Stack(
    "layers",
    ("attention_norm2", "ffn_norm2"),
    _gates,
    partial(only, "ZImageTransformerBlock"),
    ("x",),
    gated_by=("adaLN_modulation",),
)
Z_IMAGE = Family("ZImageTransformer2DModel", "first_text", (_BLOCKS,), run_mark="last_text", named=_named)
