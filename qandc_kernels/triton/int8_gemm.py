"""Multiply int8 by int8 (W8A8); dequantization and what follows it run in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles.tables import GemmTile, gemm_tile
from qandc_kernels.triton._epilogue import NO_EPILOGUE, Epilogue, start_early, store_tile, tile_position
from qandc_kernels.triton._launch import Start, product_start

__all__ = ["int8_gemm_start", "int8_gemm_triton"]


@triton.jit
def _int8_tile(
    tile, x, w, out, branch, M, N,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
    epilogue,
    K: tl.constexpr, PER_TOKEN: tl.constexpr, ONE_GATE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    block_row, block_column = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = block_row * BLOCK_M, block_column * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([row, k])
            w_tile = w.load([column, k])
            acc = tl.dot(x_tile, w_tile.T, acc, out_dtype=tl.int32)
    else:
        # rows and columns beyond the edge read valid ones again; the store drops them
        rows = (row + tl.arange(0, BLOCK_M)) % M
        columns = (column + tl.arange(0, BLOCK_N)) % N
        depth = tl.arange(0, BLOCK_K)
        x_ptrs = x + rows.to(tl.int64)[:, None] * stride_xm + depth[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
        w_ptrs = w + columns.to(tl.int64)[None, :] * stride_wn + depth[:, None] * stride_wk  # [BLOCK_K, BLOCK_N]
        for k in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x_tile = tl.load(x_ptrs)
                w_tile = tl.load(w_ptrs)
            else:
                x_tile = tl.load(x_ptrs, mask=depth[None, :] < K - k, other=0)
                w_tile = tl.load(w_ptrs, mask=depth[:, None] < K - k, other=0)
            acc = tl.dot(x_tile, w_tile, acc, out_dtype=tl.int32)
            x_ptrs += BLOCK_K * stride_xk
            w_ptrs += BLOCK_K * stride_wk
    store_tile(acc, out, branch, row, column, M, N, stride_out, epilogue, PER_TOKEN, ONE_GATE, TMA, False, SUBTILES)


@triton.jit
def _int8_gemm_kernel(
    x, w, out, branch,  # [M, K] int8, [N, K] int8, [M, N] twice: tensor descriptors with TMA, pointers without
    M, N,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
    epilogue,
    K: tl.constexpr, PER_TOKEN: tl.constexpr, ONE_GATE: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        start_early()
    if PERSISTENT:
        # one program, many tiles: the loads of the next tile start while this one is stored
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _int8_tile(
                tile, x, w, out, branch, M, N, stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
                epilogue, K, PER_TOKEN, ONE_GATE, TMA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
            )  # fmt: skip
    else:
        _int8_tile(
            tl.program_id(0), x, w, out, branch, M, N, stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
            epilogue, K, PER_TOKEN, ONE_GATE, TMA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
        )  # fmt: skip


def int8_gemm_start(
    xq: torch.Tensor,
    wq: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue = NO_EPILOGUE,
    tile: GemmTile | None = None,
    branch: torch.Tensor | None = None,
) -> Start:
    """Prepare the start of the kernel on ``xq [M, K]`` and ``wq [N, K]``, any strides, and ``out [M, N]``, any rows.

    An int32 ``out`` takes the sums. A ``branch`` as ``out`` takes what is added to it, before the gate.
    """
    (m, k), n = xq.shape, wq.shape[0]
    if tile is None:
        tile = gemm_tile("int8", epilogue, m, n, k, xq.device)
    out_block = [tile.block_m, tile.block_n // tile.subtiles]
    return product_start(_int8_gemm_kernel, xq, wq, out, branch, epilogue, tile, out_block, {"K": k})


def int8_gemm_triton(
    xq: torch.Tensor,
    wq: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue = NO_EPILOGUE,
    tile: GemmTile | None = None,
    branch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch as :func:`int8_gemm_start` says; ``out`` is returned."""
    if out.numel():
        int8_gemm_start(xq, wq, out, epilogue, tile, branch)((xq, wq, out, branch, None, *epilogue[:-2]))
    return out
