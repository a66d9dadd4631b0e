"""Register ops with torch.library; choose Triton or the reference per device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qandc_kernels import reference
from qandc_kernels.backend import backend_of

__all__ = ["register", "rows_of"]

_LIBRARY = torch.library.Library("qandc", "FRAGMENT")  # kept: its registrations end with it


def register(name: str, schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``torch.ops.qandc.<name>``, for inference: no result carries a gradient.

    ``launch`` runs where there are Triton kernels, the reference of that name elsewhere. Neither checks its arguments:
    the public op has.
    """
    definition = getattr(reference, name).__wrapped__
    returns = not schema.endswith("-> ()")

    def implementation(*arguments: Any) -> Any:
        result = (launch if backend_of(arguments[0].device).name == "triton" else definition)(*arguments)
        return result if returns else None

    torch.library.define(f"qandc::{name}", schema)
    torch.library.impl(f"qandc::{name}", "default", implementation)
    torch.library.register_fake(f"qandc::{name}", fake)
    # without this torch would mark results as differentiable and give zeros in the backward pass
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` as ``[M, K]``; a view where strides allow and the kernels' int32 offsets along K suffice."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x
