"""The public op for many small linear layers at once. For inference: the result carries no gradient."""

from __future__ import annotations

import torch

from qandc_kernels.backend import launching_on
from qandc_kernels.ops._checks import check_batched_linear
from qandc_kernels.ops._register import register

__all__ = ["batched_linear"]

LARGEST_ROWS = 64


def _batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float) -> torch.Tensor:
    if x.dtype == torch.float32 or x.shape[1] > LARGEST_ROWS:
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    from qandc_kernels.triton.batched import batched_gemm_triton

    x = x if x.stride(2) == 1 else x.contiguous()
    weight = weight if weight.stride()[1:] == (weight.shape[2], 1) else weight.contiguous()
    bias = bias if bias.stride(1) == 1 else bias.contiguous()
    with launching_on(x):
        return batched_gemm_triton(x, weight, bias, share)


def _batched_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[1]))


register(
    "batched_linear",
    "(Tensor x, Tensor weight, Tensor bias, float share) -> Tensor",
    _batched_linear,
    _batched_linear_fake,
)


def batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """``y[l] = x[l] weight[l]ᵀ + bias[l]``: the same layer of L blocks, which have a few rows each.

    The time is that of reading the weights. A kernel that fills the GPU would keep everything beside it waiting; this
    one takes a share of the multiprocessors, one small program on each, and so can run beside other work. On Triton
    kernels for 16-bit inputs of at most 64 rows; others take ``torch.baddbmm``.

    Args:
        x: ``[L, M, K]`` float16, bfloat16 or float32; a stride of 0 along L is read as it is. K <= 65535.
        weight: ``[L, N, K]`` of that dtype, any stride along L.
        bias: ``[L, N]`` of that dtype.
        share: programs per multiprocessor, > 0.

    Returns:
        ``[L, M, N]``, contiguous, dtype of ``x``; summed in float32, cast last.

    Raises:
        ArgumentError: a dtype, shape, device or share is not one of the above.
    """
    check_batched_linear(x, weight, bias, share)
    return torch.ops.qandc.batched_linear(x, weight, bias, share)
