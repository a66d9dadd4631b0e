"""Starting the matrix products: which kernel takes the operands of an op, and as what."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qandc_kernels import reference
from qandc_kernels.epilogue import Epilogue
from qandc_kernels.int8_gemm import int8_gemm_start
from qandc_kernels.launch import Launches, Start
from qandc_kernels.library import rows_of
from qandc_kernels.mixed_gemm import mixed_gemm_start

__all__ = ["multiply"]

Tensor = torch.Tensor
MaybeTensor = torch.Tensor | None
_LAUNCHES = Launches()


def multiply(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    x_scale: MaybeTensor,
    w_scale: MaybeTensor,
    bias: MaybeTensor = None,
    x_zero_point: MaybeTensor = None,
    w_sum: MaybeTensor = None,
    branch: MaybeTensor = None,
    *,
    out_scale: MaybeTensor = None,
    out_zero_point: MaybeTensor = None,
    multiplier: MaybeTensor = None,
    gate: MaybeTensor = None,
    tokens: int = 1,
) -> Tensor:
    """Launch the kernel for these operands; ``out [..., N]`` is contiguous and returned."""
    if out.numel() == 0:
        return out
    if x_zero_point is not None and w_sum is None:
        assert w_scale is not None
        w_sum = reference.weight_sum(weight, w_scale)
    grouped = w_scale is not None and w_scale.ndim == 2
    groups, scales = (w_scale, None) if grouped else (None, w_scale)
    ending = (out_scale, out_zero_point, multiplier, gate)
    operands = (x, weight, out, branch, groups, x_scale, scales, bias, x_zero_point, w_sum, *ending)
    _LAUNCHES(operands, tokens, lambda: _start(operands, tokens))
    return out


def _start(operands: Sequence[MaybeTensor], tokens: int) -> tuple[Start, Sequence[MaybeTensor]]:
    """How a product is started, and its operands as matrices and vectors; copied where strides do not allow a view."""
    matrices, parameters = operands[:4], [None if t is None else t.contiguous() for t in operands[4:-1]]
    x, weight, out, branch = (None if t is None else rows_of(t) for t in matrices)
    assert x is not None
    assert weight is not None
    assert out is not None
    groups, x_scale, *others = parameters
    if x_scale is not None and x_scale.ndim:
        x_scale = x_scale.view(-1)
    gate = operands[-1]
    parameters = [x_scale, *others, gate]
    epilogue = Epilogue._make((*parameters, 0 if gate is None else gate.stride(0), tokens))
    if weight.dtype == x.dtype == torch.int8:
        start = int8_gemm_start(x, weight, out, epilogue, branch=branch)
    else:
        weight = weight.view(torch.int8)
        start = mixed_gemm_start(x, weight, out, epilogue, groups, branch=branch)
    return start, (x, weight, out, branch, groups, *epilogue[:-2])
