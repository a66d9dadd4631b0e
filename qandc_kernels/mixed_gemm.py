"""Products whose weight changes in registers on its way to the tensor cores: W4A8, W4A16, W8A16.

The weight is the left operand, ``Yᵀ = W Xᵀ``: on that side the tensor cores take it from registers, so that it is
never written back to shared memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from qandc_kernels.epilogue import COMPILED, NO_EPILOGUE, Epilogue, start_early, store_tile, tile_position
from qandc_kernels.launch import Start, product_start
from qandc_kernels.tiles import GemmTile, gemm_tile

__all__ = ["mixed_gemm_start", "mixed_gemm_triton", "operands_of"]


@triton.jit
def _unpack(packed):
    """Low and high nibbles as int8, times 16: left where the sign bit is, they need no extension."""
    if COMPILED:  # four bytes in an instruction, which the compiler does not find by itself
        low, high = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }",
            "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = packed << 4, packed & -16
    return low, high


@triton.jit
def _unpack_to_float(packed, dtype: tl.constexpr):
    """Low and high nibbles as float16 or bfloat16.

    Conversions take four times as long as logic. A nibble with its sign bit flipped, under the exponent of 128
    (bfloat16) or 1024 (float16), is a float that is by 136 or 1032 too large.
    """
    if not COMPILED:
        low, high = (packed << 4 >> 4).to(dtype), (packed >> 4).to(dtype)
    elif dtype == tl.bfloat16:  # sm_80 subtracts pairs of bfloat16 by a multiply-add only
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, one, off;
            prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;
            shr.u32 c, a, 4; shr.u32 d, b, 4;
            and.b32 a, a, 0x000f000f; and.b32 b, b, 0x000f000f; and.b32 c, c, 0x000f000f; and.b32 d, d, 0x000f000f;
            xor.b32 a, a, 0x43084308; xor.b32 b, b, 0x43084308; xor.b32 c, c, 0x43084308; xor.b32 d, d, 0x43084308;
            mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308;
            fma.rn.bf16x2 $0, a, one, off; fma.rn.bf16x2 $1, b, one, off;
            fma.rn.bf16x2 $2, c, one, off; fma.rn.bf16x2 $3, d, one, off; }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, off;
            prmt.b32 a, $4, 0, 0x4140; prmt.b32 b, $4, 0, 0x4342;
            shr.u32 c, a, 4; shr.u32 d, b, 4;
            and.b32 a, a, 0x000f000f; and.b32 b, b, 0x000f000f; and.b32 c, c, 0x000f000f; and.b32 d, d, 0x000f000f;
            xor.b32 a, a, 0x64086408; xor.b32 b, b, 0x64086408; xor.b32 c, c, 0x64086408; xor.b32 d, d, 0x64086408;
            mov.b32 off, 0x64086408;
            sub.rn.f16x2 $0, a, off; sub.rn.f16x2 $1, b, off; sub.rn.f16x2 $2, c, off; sub.rn.f16x2 $3, d, off; }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def _to_float(w, dtype: tl.constexpr):
    """int8 as float16 or bfloat16, exactly, without conversions (:func:`_unpack_to_float`).

    bfloat16 has 7 bits of mantissa: under the exponent of 128 they hold 128 + (w & 127), from which 128 is taken, or
    256 where the sign bit is set.
    """
    if not COMPILED:
        return w.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, one;
            prmt.b32 a, $2, 0x43434343, 0x4140; prmt.b32 b, $2, 0x43434343, 0x4342;
            and.b32 c, a, 0xff80ff80; and.b32 d, b, 0xff80ff80; and.b32 a, a, 0xff7fff7f; and.b32 b, b, 0xff7fff7f;
            xor.b32 c, c, 0x80008000; xor.b32 d, d, 0x80008000; mov.b32 one, 0x3f803f80;
            fma.rn.bf16x2 $0, a, one, c; fma.rn.bf16x2 $1, b, one, d; }""",
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, off; xor.b32 b, $2, 0x80808080; mov.b32 off, 0x64806480;
            prmt.b32 a, b, 0x64646464, 0x4140; prmt.b32 b, b, 0x64646464, 0x4342;
            sub.rn.f16x2 $0, a, off; sub.rn.f16x2 $1, b, off; }""",
            "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _load_weight(ptrs, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inside[None, :], other=0)


@triton.jit
def operands_of(packed, second, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Two blocks of the weight in the type of the activations; int4 beside int8 is times 16."""
    if PACKED:
        if dtype == tl.int8:
            return _unpack(packed)
        else:
            return _unpack_to_float(packed, dtype)
    elif dtype == tl.int8:
        return packed, second
    else:
        return _to_float(packed, dtype), _to_float(second, dtype)


@triton.jit
def _add_product(acc, w, x, group_scale_ptr, k, columns, K: tl.constexpr, GROUP: tl.constexpr):
    """``acc + w · x`` of one block of K; with groups times the scale of the group it lies in."""
    if GROUP == 0:
        acc = tl.dot(w, x, acc, out_dtype=acc.dtype)
    else:
        scale = tl.load(group_scale_ptr + columns * (K // GROUP) + k // GROUP)[:, None]
        acc += tl.dot(w, x, out_dtype=tl.int32 if x.dtype == tl.int8 else tl.float32).to(tl.float32) * scale
    return acc


@triton.jit
def _mixed_tile(
    tile, x, w, out, branch, M, N,
    stride_xm, stride_xk, stride_wn, stride_wk,
    group_scale_ptr, epilogue,
    K: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, INTEGER: tl.constexpr,
    PER_TOKEN: tl.constexpr, ONE_GATE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    block_row, block_column = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, column = block_row * BLOCK_M, block_column * BLOCK_N
    # columns beyond the edge read valid ones again; the store drops them
    columns = (column + tl.arange(0, BLOCK_N)) % N
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    # Two products a step. With one, Triton (3.6, 3.9) lets it run on while its left operand's registers are refilled.
    # A packed row's byte k holds k and k + K/2; an int8 row gives two blocks one after the other.
    DEPTH: tl.constexpr = K // 2 if PACKED else K
    STEP: tl.constexpr = BLOCK_K if PACKED else 2 * BLOCK_K
    AHEAD: tl.constexpr = DEPTH if PACKED else BLOCK_K
    dtype: tl.constexpr = x.dtype if TMA else x.dtype.element_ty
    if TMA:
        for k in range(0, DEPTH, STEP):
            first = w.load([column, k])
            second = first if PACKED else w.load([column, k + AHEAD])
            first, second = operands_of(first, second, dtype, PACKED)
            acc = _add_product(acc, first, x.load([row, k]).T, group_scale_ptr, k, columns, K, GROUP)
            x_tile = x.load([row, k + AHEAD]).T
            acc = _add_product(acc, second, x_tile, group_scale_ptr, k + AHEAD, columns, K, GROUP)
    else:
        rows = row + tl.arange(0, BLOCK_M)
        depth = tl.arange(0, BLOCK_K)
        x_ptrs = x + rows.to(tl.int64)[None, :] * stride_xm + depth[:, None] * stride_xk  # [BLOCK_K, BLOCK_M]
        w_ptrs = w + columns.to(tl.int64)[:, None] * stride_wn + depth[None, :] * stride_wk  # [BLOCK_N, BLOCK_K]
        for k in range(0, DEPTH, STEP):
            inside = depth < DEPTH - k
            inside_second = inside if PACKED else depth < DEPTH - AHEAD - k
            first = _load_weight(w_ptrs, inside, DEPTH % STEP == 0)
            second = first
            if not PACKED:
                second = _load_weight(w_ptrs + AHEAD * stride_wk, inside_second, DEPTH % STEP == 0)
            first, second = operands_of(first, second, dtype, PACKED)
            # few rows are not read again in the place of those that a tile has beside them
            x_tile = tl.load(x_ptrs, mask=inside[:, None] & (rows < M)[None, :], other=0)
            acc = _add_product(acc, first, x_tile, group_scale_ptr, k, columns, K, GROUP)
            x_tile = tl.load(x_ptrs + AHEAD * stride_xk, mask=inside_second[:, None] & (rows < M)[None, :], other=0)
            acc = _add_product(acc, second, x_tile, group_scale_ptr, k + AHEAD, columns, K, GROUP)
            x_ptrs += STEP * stride_xk
            w_ptrs += STEP * stride_wk
    if PACKED and dtype == tl.int8:
        if INTEGER:
            acc >>= 4  # exact: multiples of 16
        else:
            acc *= 0.0625
    store_tile(acc, out, branch, row, column, M, N, epilogue, PER_TOKEN, ONE_GATE, TMA, True, SUBTILES)


@triton.jit
def _mixed_gemm_kernel(
    x, w, out, branch,  # [M, K], [N, K] or [N, K/2] int8, [M, N] twice: tensor descriptors with TMA, else pointers
    M, N,
    stride_xm, stride_xk, stride_wn, stride_wk,
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
                tile, x, w, out, branch, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
                group_scale_ptr, epilogue, K, PACKED, GROUP, INTEGER, PER_TOKEN, ONE_GATE, TMA,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
            )  # fmt: skip
    else:
        _mixed_tile(
            tl.program_id(0), x, w, out, branch, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
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

    Both of any strides. ``group_scale [N, K/G] float32`` and ``out [M, N]`` are contiguous. An int32 ``out`` takes the
    sums. A ``branch`` as ``out`` takes what is added to it, before the gate.
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
