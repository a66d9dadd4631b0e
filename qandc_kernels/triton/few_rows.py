"""Multiply a few rows with an int8 or int4 weight: the time is that of reading the weight."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles.tables import few_rows_tile
from qandc_kernels.triton._epilogue import COMPILED, Epilogue, start_early, store_tile
from qandc_kernels.triton._launch import Start

__all__ = ["FEW_ROWS", "few_rows_start"]

FEW_ROWS = 16


@triton.jit
def _unpack_to_float(packed, dtype: tl.constexpr):
    """Return low and high nibbles as float16 or bfloat16.

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
    """Convert int8 to float16 or bfloat16, exactly, without conversions (:func:`_unpack_to_float`).

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
        x_tile = tl.load(x_ptrs, mask=x_inside, other=0.0)
        if not PACKED:
            acc = tl.dot(_to_float(weight, x_tile.dtype), x_tile, acc)
        else:
            first, second = _unpack_to_float(weight, x_tile.dtype)
            acc = tl.dot(first, x_tile, acc)
            acc = tl.dot(second, tl.load(x_ptrs + DEPTH * stride_xk, mask=x_inside, other=0.0), acc)
        x_ptrs += STEP * stride_xk
        w_ptrs += STEP * stride_wk
    store_tile(tl.sum(acc, 0), out, None, 0, column, M, N, N, epilogue, False, False, False, True, 1)


def few_rows_start(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> Start:
    """Prepare the start of the kernel on 16-bit ``x [M, K]``, M <= 16, int8 ``w [N, K]`` or ``[N, K/2]`` of two int4.

    Both of any strides; ``out [M, N]`` is contiguous. Operands are those of :func:`mixed_gemm_start`, of which a branch
    and the scales of groups must be None.
    """
    (m, k), n = x.shape, w.shape[0]
    packed = w.shape[1] != k
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
