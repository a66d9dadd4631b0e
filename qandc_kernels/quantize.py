"""Activations to int8: with a given scale per tensor, or with a scale per token found on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qandc_kernels.reference import SMALLEST_AMAX

__all__ = ["quantize_per_tensor_triton", "quantize_per_token_triton"]


@triton.jit
def _round_half_even(x):
    # adding and taking away 1.5 · 2^23 leaves |x| < 2^22 rounded to an integer, half to even, on every backend
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantize_per_tensor_kernel(
    x_ptr,
    q_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    scale_ptr,
    zero_point_ptr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0)
    y = x.to(tl.float32) * tl.div_rn(1.0, tl.load(scale_ptr))
    y = tl.where(y == y, y, 0.0)
    shift = 0.0
    if HAS_ZERO_POINT:
        shift = tl.load(zero_point_ptr).to(tl.float32)
    # clamped before rounded: the bounds are integers, and it keeps the rounding trick in range
    y = _round_half_even(tl.minimum(tl.maximum(y, QMIN - shift), QMAX - shift)) + shift
    tl.store(q_ptr + offs_m[:, None] * K + offs_k[None, :], y.to(tl.int8), mask=mask)


@triton.jit
def _quantize_per_token_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    QMAX: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST_AMAX) * (1.0 / QMAX)  # [BLOCK_M]
    # tl.max passes over NaN; a scale of NaN carries it to the output of the product
    scale = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), scale)
    y = x * tl.div_rn(1.0, scale)[:, None]
    y = tl.where(y == y, y, 0.0)
    y = _round_half_even(tl.minimum(tl.maximum(y, -QMAX), QMAX))
    tl.store(q_ptr + offs_m[:, None] * K + offs_k[None, :], y.to(tl.int8), mask=mask)
    tl.store(scale_ptr + offs_m, scale, mask=offs_m < M)


def quantize_per_tensor_triton(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, bits: int = 8
) -> torch.Tensor:
    """Launch on ``x [M, K]``, any strides; ``scale`` and ``zero_point`` hold one element on the device."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    if q.numel() == 0:
        return q
    block_k = min(triton.next_power_of_2(k), 1024)
    block_m = 4096 // block_k
    _quantize_per_tensor_kernel[(triton.cdiv(m, block_m), triton.cdiv(k, block_k))](
        x, q,
        m, k,
        x.stride(0), x.stride(1),  # stride_xm, stride_xk
        scale, zero_point,
        QMIN=-(1 << bits - 1), QMAX=(1 << bits - 1) - 1,
        HAS_ZERO_POINT=zero_point is not None,
        BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=4,
        enable_fp_fusion=False,  # rounds as the reference does
    )  # fmt: skip
    return q


def quantize_per_token_triton(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``x [M, K]``, any strides; each element is read once."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0:
        return q, scale
    block_k = triton.next_power_of_2(max(k, 1))
    block_m = max(1, 4096 // block_k)
    _quantize_per_token_kernel[(triton.cdiv(m, block_m),)](
        x, q, scale,
        m, k,
        x.stride(0), x.stride(1),  # stride_xm, stride_xk
        QMAX=(1 << bits - 1) - 1,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=4 if block_k <= 4096 else 8,
        enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale
