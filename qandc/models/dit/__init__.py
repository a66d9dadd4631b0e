"""Know DiT (Peebles and Xie, arXiv 2212.09748): adaLN-Zero of timestep and class in each block."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch

from qandc.models.dit.fused import FusedStep
from qandc.models.family import Call, Family, Stack, zero_gates

__all__ = ["DIT", "older_names"]

T = TypeVar("T")


def _gates(block: Any, call: Call) -> torch.Tensor:
    norm = block.norm1
    embedding = norm.emb(call.get("timestep"), call.get("class_labels"), hidden_dtype=call["hidden_states"].dtype)
    return zero_gates(norm.linear(norm.silu(embedding)), call["hidden_states"].shape[-1])


def _why_not(block: Any) -> str | None:
    if getattr(block, "norm_type", None) == "ada_norm_zero" and block.attn2 is None and not block._chunk_size:
        return None
    return "needs DiT's blocks (adaLN-Zero, no cross-attention, no chunked feed-forward)"


def _classes(transformer: Any) -> int:
    return int(transformer.config.num_embeds_ada_norm)


_BLOCKS = Stack("transformer_blocks", ("attn1", "ff"), _gates, _why_not, gated_by=("norm1",))
DIT = Family("DiTTransformer2DModel", "class_labels", (_BLOCKS,), FusedStep, _classes)


def older_names(function: T) -> T:
    """Let a function, or a dataclass, take ``class_labels=`` for ``conditions=``: its name when DiT was alone."""
    named: Any = function
    if isinstance(named, type):
        named.__init__ = older_names(named.__init__)  # type: ignore[misc]
        named.class_labels = property(lambda self: self.conditions)  # type: ignore[attr-defined]
        return function

    @functools.wraps(named)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "class_labels" in kwargs:
            kwargs["conditions"] = kwargs.pop("class_labels")
        return named(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
