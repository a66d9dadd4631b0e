"""W8A8 matrix product with the dequantization in its epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles import GemmTile, int8_gemm_tile

__all__ = ["int8_gemm_triton"]


@triton.jit
def _int8_gemm_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    M,
    N,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    x_zero_point_ptr,
    w_sum_ptr,
    K: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # programs walk down GROUP_M row blocks before the next column, so that neighbours share weight tiles in L2
    pid = tl.program_id(0)
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * num_n)
    rows_in_group = min(num_m - group * GROUP_M, GROUP_M)
    pid_in_group = pid % (GROUP_M * num_n)
    pid_m = group * GROUP_M + pid_in_group % rows_in_group
    pid_n = pid_in_group // rows_in_group

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # rows and columns beyond the edge read valid ones again; the store drops them
    row_m = (offs_m % M).to(tl.int64)
    row_n = (offs_n % N).to(tl.int64)
    x_ptrs = x_ptr + row_m[:, None] * stride_xm + offs_k[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + row_n[None, :] * stride_wn + offs_k[:, None] * stride_wk  # [BLOCK_K, BLOCK_N]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if DEQUANTIZE:
        if HAS_ZERO_POINT:
            acc -= tl.load(x_zero_point_ptr) * tl.load(w_sum_ptr + row_n)[None, :]
        # int32 to fp32 only here: fp32 cannot hold the partial sums of a long row exactly
        y = acc.to(tl.float32)
        y *= tl.load(x_scale_ptr + row_m)[:, None] if PER_TOKEN else tl.load(x_scale_ptr)
        y *= tl.load(w_scale_ptr + row_n)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + row_n).to(tl.float32)[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptrs, acc, mask=mask)


def int8_gemm_triton(
    xq: torch.Tensor,
    wq: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.int32,
    tile: GemmTile | None = None,
) -> torch.Tensor:
    """Launch the kernel on ``xq [M, K]`` and ``wq [N, K]``, any strides; vectors must be contiguous.

    Without scales the int32 accumulators are returned.
    """
    (m, k), n = xq.shape, wq.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=xq.device)
    if out.numel() == 0:
        return out
    if tile is None:
        capability = torch.cuda.get_device_capability(xq.device) if xq.is_cuda else (9, 0)
        tile = int8_gemm_tile(m, n, capability)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    _int8_gemm_kernel[grid](
        xq, wq, out,
        m, n,
        xq.stride(0), xq.stride(1), wq.stride(0), wq.stride(1),  # stride_xm, stride_xk, stride_wn, stride_wk
        x_scale, w_scale, bias, x_zero_point, w_sum,
        K=k,
        DEQUANTIZE=x_scale is not None,
        PER_TOKEN=x_scale is not None and x_scale.ndim == 1,
        HAS_BIAS=bias is not None,
        HAS_ZERO_POINT=x_zero_point is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        enable_fp_fusion=False,  # rounds as the reference does
    )  # fmt: skip
    return out
