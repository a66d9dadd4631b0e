"""Multiply by weights that change in registers on their way to the tensor cores: W4A8, W4A16, W8A16.

The weight is the left operand, ``Yᵀ = W Xᵀ``: on that side the tensor cores take it from registers, so that it is
never written back to shared memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles.tables import GemmTile, gemm_tile
from qandc_kernels.triton._epilogue import COMPILED, NO_EPILOGUE, Epilogue, start_early, store_tile, tile_position
from qandc_kernels.triton._launch import Start, product_start

__all__ = ["mixed_gemm_start", "mixed_gemm_triton"]


@triton.jit
def _unpack(packed):
    """Return low and high nibbles as int8, times 16: left where the sign bit is, they need no extension."""
    if COMPILED:  # four bytes in an instruction, which the compiler does not find by itself
        low, high = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }",
            "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = packed << 4, packed & -16
    return low, high


@triton.jit
def _add_product(acc, w, x, group_scale_ptr, k, columns, K: tl.constexpr, GROUP: tl.constexpr):
    """Add a product, ``acc + w · x`` of one block of K; with groups times the scale of the group it lies in."""
    if GROUP == 0:
        if x.dtype == tl.int8:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w.to(x.dtype), x, acc)
    else:
        scale = tl.load(group_scale_ptr + columns * (K // GROUP) + k // GROUP)[:, None]
        if x.dtype == tl.int8:
            acc += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * scale
        else:
            acc += tl.dot(w.to(x.dtype), x) * scale
    return acc


@triton.jit
def _mixed_tile(
    tile, x, w, out, branch, M, N,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
    group_scale_ptr, epilogue,
    K: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr,
    PER_TOKEN: tl.constexpr, ONE_GATE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    block_row, block_column = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = block_row * BLOCK_M, block_column * BLOCK_N
    # rows and columns beyond the edge read valid ones again; the store drops them
    columns = (column + tl.arange(0, BLOCK_N)) % N
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    # Two products a step. With one, Triton (3.6, 3.9) lets it run on while its left operand's registers are refilled.
    # A packed row's byte k holds k and k + K/2; an int8 row gives two blocks one after the other.
    DEPTH: tl.constexpr = K // 2 if PACKED else K
    STEP: tl.constexpr = BLOCK_K if PACKED else 2 * BLOCK_K
    AHEAD: tl.constexpr = DEPTH if PACKED else BLOCK_K
    if TMA:
        for k in range(0, DEPTH, STEP):
            first = w.load([column, k])
            if PACKED:
                first, second = _unpack(first)
            else:
                second = w.load([column, k + AHEAD])
            acc = _add_product(acc, first, x.load([row, k]).T, group_scale_ptr, k, columns, K, GROUP)
            x_tile = x.load([row, k + AHEAD]).T
            acc = _add_product(acc, second, x_tile, group_scale_ptr, k + AHEAD, columns, K, GROUP)
    else:
        rows = (row + tl.arange(0, BLOCK_M)) % M
        depth = tl.arange(0, BLOCK_K)
        x_ptrs = x + rows.to(tl.int64)[None, :] * stride_xm + depth[:, None] * stride_xk  # [BLOCK_K, BLOCK_M]
        w_ptrs = w + columns.to(tl.int64)[:, None] * stride_wn + depth[None, :] * stride_wk  # [BLOCK_N, BLOCK_K]
        for k in range(0, DEPTH, STEP):
            inside = depth < DEPTH - k
            inside_second = inside if PACKED else depth < DEPTH - AHEAD - k
            first = tl.load(w_ptrs, mask=inside[None, :], other=0)
            if PACKED:
                first, second = _unpack(first)
            else:
                second = tl.load(w_ptrs + AHEAD * stride_wk, mask=inside_second[None, :], other=0)
            x_tile = tl.load(x_ptrs, mask=inside[:, None], other=0)
            acc = _add_product(acc, first, x_tile, group_scale_ptr, k, columns, K, GROUP)
            x_tile = tl.load(x_ptrs + AHEAD * stride_xk, mask=inside_second[:, None], other=0)
            acc = _add_product(acc, second, x_tile, group_scale_ptr, k + AHEAD, columns, K, GROUP)
            x_ptrs += STEP * stride_xk
            w_ptrs += STEP * stride_wk
    if PACKED:
        if INTEGER:
            acc >>= 4  # exact: multiples of 16
        else:
            acc *= 0.0625
    store_tile(acc, out, branch, row, column, M, N, stride_out, epilogue, PER_TOKEN, ONE_GATE, TMA, True, SUBTILES)


@triton.jit
def _mixed_gemm_kernel(
    x, w, out, branch,  # [M, K], [N, K] or [N, K/2] int8, [M, N] twice: tensor descriptors with TMA, else pointers
    M, N,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
    group_scale_ptr, epilogue,
    K: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr,
    PER_TOKEN: tl.constexpr, ONE_GATE: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        start_early()
    if PERSISTENT:
        # one program, many tiles: the loads of the next tile start while this one is stored
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _mixed_tile(
                tile, x, w, out, branch, M, N, stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
                group_scale_ptr, epilogue, K, PACKED, GROUP, INTEGER, PER_TOKEN, ONE_GATE, TMA,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
            )  # fmt: skip
    else:
        _mixed_tile(
            tl.program_id(0), x, w, out, branch, M, N, stride_xm, stride_xk, stride_wn, stride_wk, stride_out,
            group_scale_ptr, epilogue, K, PACKED, GROUP, INTEGER, PER_TOKEN, ONE_GATE, TMA,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
        )  # fmt: skip


def mixed_gemm_start(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue = NO_EPILOGUE,
    group_scale: torch.Tensor | None = None,
    tile: GemmTile | None = None,
    branch: torch.Tensor | None = None,
) -> Start:
    """Prepare the start of the kernel on int8 or 16-bit ``x [M, K]``, int8 ``w [N, K]`` or ``[N, K/2]`` of two int4.

    Both of any strides, ``out [M, N]`` of any between rows. ``group_scale [N, K/G] float32`` is contiguous. An int32
    ``out`` takes the sums. A ``branch [M, N]``, contiguous, takes what is added to it, before the gate.
    """
    (m, k), n = x.shape, w.shape[0]
    packed = w.shape[1] != k
    group = 0 if group_scale is None else k // group_scale.shape[1]
    if tile is None:
        family = ("int4" if packed else "int8") + ("a8" if x.dtype == torch.int8 else "a16") + ("g" if group else "")
        tile = gemm_tile(family, epilogue, m, n, k, x.device)
    if group:  # a block lies within one group, in both halves of a packed row
        tile = tile._replace(block_k=min(tile.block_k, math.gcd(group, k // 2 if packed else k)))
    if packed and x.dtype != torch.int8 and k // 2 % tile.block_k:
        tile = tile._replace(tma=0)  # the copy engine would let values of the second half meet zeros: inf · 0 is NaN
    integer = x.dtype == torch.int8 and group == 0
    constants = {"K": k, "PACKED": packed, "GROUP": group, "INTEGER": integer}
    out_block = [tile.block_m // tile.subtiles, tile.block_n]
    return product_start(_mixed_gemm_kernel, x, w, out, branch, epilogue, tile, out_block, constants, grouped=True)


def mixed_gemm_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue = NO_EPILOGUE,
    group_scale: torch.Tensor | None = None,
    tile: GemmTile | None = None,
    branch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch as :func:`mixed_gemm_start` says, with ``w`` also uint8; ``out`` is returned."""
    if out.numel():
        w = w.view(torch.int8)
        start = mixed_gemm_start(x, w, out, epilogue, group_scale, tile, branch)
        start((x, w, out, branch, group_scale, *epilogue[:-2]))
    return out
