"""Run linear layers of many blocks at once for a few rows each: weights pass once, a part of the GPU is enough."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles.tables import gpu_of

__all__ = ["batched_gemm_triton"]


@triton.jit
def _batched_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr,  # [L, M, K], [L, N, K], [L, N], [L, M, N]
    L, M, N,
    stride_xl, stride_xm, stride_wl, stride_bl,
    K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_n = tl.cdiv(N, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), L * blocks_n, tl.num_programs(0)):
        layer = (tile // blocks_n).to(tl.int64)
        columns = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_rows = x_ptr + layer * stride_xl + rows.to(tl.int64)[:, None] * stride_xm
        w_rows = w_ptr + layer * stride_wl + columns.to(tl.int64)[:, None] * K
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
            if EVEN_N and EVEN_K:
                w = tl.load(w_rows + k[None, :])
            else:
                w = tl.load(w_rows + k[None, :], mask=inside[:, None] & (k[None, :] < K), other=0.0)
            acc = tl.dot(x, tl.trans(w), acc)
        bias = tl.load(bias_ptr + layer * stride_bl + columns, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + (layer * M + rows[:, None]) * N + columns[None, :]
        tl.store(out, acc + bias[None, :], mask=(rows[:, None] < M) & inside[None, :])


def batched_gemm_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float) -> torch.Tensor:
    """Launch on 16-bit ``x [L, M, K]``, ``weight [L, N, K]`` and ``bias [L, N]``, contiguous but for L and M."""
    (layers, m, k), n = x.shape, weight.shape[1]
    out = torch.empty(layers, m, n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_m, block_n, block_k = max(16, triton.next_power_of_2(m)), 64, 128
    programs = max(1, round(share * gpu_of(x.device).multiprocessors))
    _batched_gemm_kernel[(min(programs, layers * triton.cdiv(n, block_n)),)](
        x, weight, bias, out,
        layers, m, n,
        x.stride(0), x.stride(1), weight.stride(0), bias.stride(0),
        K=k, EVEN_N=n % block_n == 0, EVEN_K=k % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, num_stages=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
