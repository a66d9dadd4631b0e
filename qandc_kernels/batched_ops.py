"""The public op for many small linear layers at once. For inference: the result carries no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.checks import FLOAT_DTYPES, LARGEST_K, check_devices, check_tensor
from qandc_kernels.library import register, use_triton

__all__ = ["batched_linear"]

LARGEST_ROWS = 64


def _batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float) -> torch.Tensor:
    if not use_triton(x) or x.dtype == torch.float32 or x.shape[1] > LARGEST_ROWS:
        return reference.batched_linear(x, weight, bias, share)
    from qandc_kernels.batched_gemm import batched_gemm_triton

    x = x if x.stride(2) == 1 else x.contiguous()
    weight = weight if weight.stride()[1:] == (weight.shape[2], 1) else weight.contiguous()
    bias = bias if bias.stride(1) == 1 else bias.contiguous()
    with torch.cuda.device(x.device):
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
        TypeError, ValueError: a dtype, shape, device or share is not one of the above.
    """
    op = "batched_linear"
    check_tensor(op, "x", x, FLOAT_DTYPES)
    check_tensor(op, "weight", weight, (x.dtype,))
    if x.ndim != 3 or weight.ndim != 3 or x.shape[::2] != weight.shape[::2] or not 0 < x.shape[2] <= LARGEST_K:
        raise ValueError(
            f"{op}: x must be [L, M, K] and weight [L, N, K] with K from 1 to {LARGEST_K}; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_tensor(op, "bias", bias, (x.dtype,), (tuple(weight.shape[:2]),))
    if not (isinstance(share, int | float) and 0 < share < float("inf")):
        raise ValueError(f"{op}: share must be a finite number > 0; got {share!r}")
    check_devices(op, x=x, weight=weight, bias=bias)
    return torch.ops.qandc.batched_linear(x, weight, bias, float(share))
