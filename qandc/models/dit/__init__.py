"""DiT (Peebles and Xie, arXiv 2212.09748): adaLN-Zero of timestep and class in each block."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch

from qandc.models.dit.fused import FusedStep
from qandc.models.family import Call, Family

__all__ = ["DIT", "takes_class_labels"]

T = TypeVar("T")


def _gates(block: Any, call: Call) -> torch.Tensor:
    norm = block.norm1
    embedding = norm.emb(call.get("timestep"), call.get("class_labels"), hidden_dtype=call["hidden_states"].dtype)
    _, _, attention, _, _, mlp = norm.linear(norm.silu(embedding)).chunk(6, 1)
    return torch.stack([attention, mlp])


def _why_not(block: Any) -> str | None:
    if getattr(block, "norm_type", None) == "ada_norm_zero" and block.attn2 is None and not block._chunk_size:
        return None
    return "needs DiT's blocks (adaLN-Zero, no cross-attention, no chunked feed-forward)"


DIT = Family("DiTTransformer2DModel", "class_labels", ("attn1", "ff"), _gates, _why_not, FusedStep)


def takes_class_labels(function: T) -> T:
    """Let a function, or a dataclass, take ``class_labels=`` for ``conditions=``, as it was called for DiT alone."""
    named: Any = function
    if isinstance(named, type):
        named.__init__ = takes_class_labels(named.__init__)  # type: ignore[misc]
        named.class_labels = property(lambda self: self.conditions)  # type: ignore[attr-defined]
        return function

    @functools.wraps(named)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "class_labels" in kwargs:
            return named(*args, conditions=kwargs.pop("class_labels"), **kwargs)
        return named(*args, **kwargs)

    return wrapper  # type: ignore[return-value]
