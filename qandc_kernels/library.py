"""How ops become known to torch, and which implementation they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qandc_kernels.backend import select_backend

__all__ = ["register", "rows_of", "use_triton"]

_LIBRARY = torch.library.Library("qandc", "FRAGMENT")  # kept: its registrations end with it


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``torch.ops.qandc.<name>``, for inference: no result carries a gradient."""
    torch.library.define(f"qandc::{name}", schema)
    torch.library.impl(f"qandc::{name}", "default", implementation)
    torch.library.register_fake(f"qandc::{name}", fake)
    # without this torch would mark results as differentiable and give zeros in the backward pass
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def use_triton(x: torch.Tensor) -> bool:
    return select_backend(x.device).name == "triton"


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` as ``[M, K]``; a view where strides allow and the kernels' int32 offsets along K suffice."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x
