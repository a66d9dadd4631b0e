"""Weight-only products of a few rows: the time is that of reading the weight."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qandc_kernels.epilogue import Epilogue, start_early, store_tile
from qandc_kernels.launch import Start
from qandc_kernels.mixed_gemm import operands_of
from qandc_kernels.tiles import FewRowsTile, few_rows_tile

__all__ = ["FEW_ROWS", "few_rows_start"]

FEW_ROWS = 16


@triton.jit
def _few_rows_kernel(
    x, w, out,  # [M, K], [N, K] or [N, K/2] int8, [M, N]
    M, N,
    stride_xm, stride_xk, stride_wn, stride_wk,
    epilogue,
    K: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        start_early()
    column = tl.program_id(0) * BLOCK_N
    # columns beyond the edge read valid ones again; the store drops them
    columns = (column + tl.arange(0, BLOCK_N)) % N
    rows = tl.arange(0, BLOCK_M)
    # each warp has a part of K: with whole rows of the weight there would be too few warps to keep a GPU busy
    depth = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    DEPTH: tl.constexpr = K // 2 if PACKED else K
    STEP: tl.constexpr = PARTS * BLOCK_K
    x_ptrs = x + depth[:, :, None] * stride_xk + rows.to(tl.int64)[None, None, :] * stride_xm
    w_ptrs = w + columns.to(tl.int64)[None, :, None] * stride_wn + depth[:, None, :] * stride_wk
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, DEPTH, STEP):
        inside = depth < DEPTH - k
        x_inside = inside[:, :, None] & (rows < M)[None, None, :]
        weight = tl.load(w_ptrs) if DEPTH % STEP == 0 else tl.load(w_ptrs, mask=inside[:, None, :], other=0)
        first, second = operands_of(weight, weight, x.dtype.element_ty, PACKED)
        acc = tl.dot(first, tl.load(x_ptrs, mask=x_inside, other=0.0), acc)
        if PACKED:
            acc = tl.dot(second, tl.load(x_ptrs + DEPTH * stride_xk, mask=x_inside, other=0.0), acc)
        x_ptrs += STEP * stride_xk
        w_ptrs += STEP * stride_wk
    store_tile(tl.sum(acc, 0), out, None, 0, column, M, N, epilogue, False, False, False, True, 1)


def few_rows_start(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue,
    tile: FewRowsTile | None = None,
) -> Start:
    """Prepare the start of the kernel on 16-bit ``x [M, K]``, M <= 16, int8 ``w [N, K]`` or ``[N, K/2]`` of two int4.

    Both of any strides; ``out [M, N]`` is contiguous. Operands are those of :func:`mixed_gemm_start`, of which a branch
    and the scales of groups must be None.
    """
    (m, k), n = x.shape, w.shape[0]
    packed = w.shape[1] != k
    if tile is None:
        tile = few_rows_tile(m, k, packed, x.device)
    constants = {
        "K": k, "PACKED": packed,
        "BLOCK_M": 8 if m <= 8 else 16, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PARTS": tile.parts,
        "OVERLAP": tile.overlap > 0, "launch_pdl": tile.overlap > 0,
        "num_warps": tile.parts, "num_stages": tile.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    strides, last = (*x.stride(), *w.stride()), (epilogue.gate_stride, epilogue.tokens)

    def arrange(
        x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, branch: None, groups: None, *e: Any
    ) -> tuple[Any, ...]:
        return (x, w, out, m, n, *strides, Epilogue._make((*e, *last)))

    return Start(_few_rows_kernel, (triton.cdiv(n, tile.block_n), 1, 1), arrange, constants)
