"""Define what kernels share: how they round and scale, the order of a product's tiles, and what becomes of its sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from qandc_kernels.reference import SMALLEST_AMAX

__all__ = [
    "NO_EPILOGUE",
    "Epilogue",
    "by_own_scale",
    "gelu_tanh",
    "magnitude",
    "scale_of",
    "start_early",
    "store_tile",
    "tile_position",
]

SMALLEST = tl.constexpr(SMALLEST_AMAX)
# Triton's interpreter knows neither assembly nor additions in memory; it takes the plain way to the same values
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


class Epilogue(NamedTuple):
    """Hold what follows a product: tensors in Python, pointers in a kernel, None where there is nothing.

    ``y = (acc - x_zero_point · w_sum) · x_scale · w_scale + bias`` is stored; or ``quantize(gelu(y) · multiplier)`` if
    there is an ``out_scale``; or ``gate · y`` is added to the output if there is a ``gate``. Vectors are contiguous.
    An int32 output takes the sums themselves.
    """

    x_scale: Any = None  # float32: one element, or [M]
    w_scale: Any = None  # [N] float32
    bias: Any = None  # [N] floating point
    x_zero_point: Any = None  # one element, int32
    w_sum: Any = None  # [N] in the type of the sums
    out_scale: Any = None  # one element, float32
    out_zero_point: Any = None  # one element, int32
    multiplier: Any = None  # [N] float32
    gate: Any = None  # [samples, N] floating point, unit stride along N
    gate_stride: int = 0
    tokens: int = 1  # rows per sample


NO_EPILOGUE = Epilogue()


@triton.jit
def to_int8(y):
    """Round -128 <= y <= 127 to integers, half to even."""
    # in the sum with 1.5 · 2^23 the low byte of the bits is the integer; a conversion would be slower
    return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def magnitude(y):
    """Return the bits of ``|y|``, float32: as integers in the order of the numbers, and NaN above all of them."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, QMAX: tl.constexpr):
    """Return the scale of numbers by their largest magnitude: NaN, which a product takes on, if one of them is NaN."""
    amax = largest.to(tl.float32, bitcast=True)
    return tl.where(amax == amax, tl.maximum(amax, SMALLEST) * (1.0 / QMAX), amax)


@triton.jit
def by_own_scale(y, scale):
    """Round ``y / scale``, a scale of these very numbers, so that none is clipped; 0 where it is NaN or infinite."""
    return tl.where(scale < float("inf"), to_int8(y * tl.div_rn(1.0, scale)), 0)


@triton.jit
def gelu_tanh(x):
    # x/2 · (1 + tanh(u)) = x / (1 + exp(-2u)) with u = √(2/π) · (x + 0.044715 x³); the constants hold -2 log2(e) √(2/π)
    u = x * (-2.3022081988 - 0.1029432396 * x * x)
    if COMPILED:  # without the care for denormals, which 1 + exp cannot be
        return x * tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x / (1.0 + tl.exp2(u))


@triton.jit
def quantize_static(y, factor, zero_point):
    """Quantize to int8, ``clip(round(y · factor) + zero_point, -128, 127)``; NaN becomes -128."""
    if COMPILED:  # one multiply-add clips (y · factor + zero_point + 128) / 255 to 0..1, one scales back and rounds
        bits = tl.inline_asm_elementwise(
            "{ .reg .f32 t; fma.rn.sat.f32 t, $1, $2, $3; fma.rn.f32 $0, t, 0f437F0000, 0f4B3FFF80; }",
            "=r,f,f,f", [y, factor * (1.0 / 255), (zero_point + 128.0) * (1.0 / 255)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return bits.to(tl.int8)
    else:
        y = tl.where(y == y, y * factor + zero_point, -128.0)
        return to_int8(tl.minimum(tl.maximum(y, -128.0), 127.0))


@triton.jit
def start_early():
    """Let the next kernel's programs start now, and wait for what the kernel before this one wrote."""
    if COMPILED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Find block row and column of a tile: down GROUP_M rows, then the next column; neighbours share tiles in L2."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * blocks_n)
    rows_in_group = min(blocks_m - group * GROUP_M, GROUP_M)
    tile_in_group = tile % (GROUP_M * blocks_n)
    return group * GROUP_M + tile_in_group % rows_in_group, tile_in_group // rows_in_group


@triton.jit
def _gate(e, rows, columns, ONE_GATE: tl.constexpr):
    """Load the gate, ``[1, columns]`` if all rows of a tile belong to one sample, else ``[rows, columns]``."""
    if ONE_GATE:
        gates = e.gate + (tl.min(rows) // e.tokens).to(tl.int64) * e.gate_stride + columns[None, :]
    else:
        gates = e.gate + (rows // e.tokens).to(tl.int64)[:, None] * e.gate_stride + columns[None, :]
    return tl.load(gates).to(tl.float32)


@triton.jit
def _apply(acc, e, rows, columns, PER_TOKEN: tl.constexpr, FOLD_GATE: tl.constexpr):
    """Apply the epilogue ``e`` to the sums at ``rows`` x ``columns``: float32, or int8 after a GELU.

    With FOLD_GATE, the gate of all rows, it is ``gate · y``; otherwise it leaves the gate to the caller.
    """
    if e.w_scale is not None:
        scale = tl.load(e.w_scale + columns)
    else:
        scale = tl.full(columns.shape, 1.0, tl.float32)
    if e.x_scale is not None and not PER_TOKEN:
        scale *= tl.load(e.x_scale)
    if e.bias is not None:
        bias = tl.load(e.bias + columns).to(tl.float32)
    else:
        bias = tl.zeros_like(scale)
    if e.x_zero_point is not None and e.out_scale is not None and not PER_TOKEN:
        # as part of the bias it needs no registers per column, which a third program on a multiprocessor has not
        bias -= (tl.load(e.x_zero_point) * tl.load(e.w_sum + columns)).to(tl.float32) * scale
    if FOLD_GATE:
        gate = tl.reshape(_gate(e, rows, columns, True), columns.shape)
        scale *= gate
        bias *= gate
    if e.x_zero_point is not None and (e.out_scale is None or PER_TOKEN):
        acc -= (tl.load(e.x_zero_point) * tl.load(e.w_sum + columns))[None, :]
    # int32 to float32 only here: float32 cannot hold the partial sums of a long row exactly
    y = acc.to(tl.float32)
    if PER_TOKEN:
        y *= tl.load(e.x_scale + rows)[:, None]
    y = y * scale[None, :] + bias[None, :]
    if e.out_scale is not None:
        factor = tl.full(scale.shape, tl.div_rn(1.0, tl.load(e.out_scale)), tl.float32)
        if e.multiplier is not None:
            factor *= tl.load(e.multiplier + columns)
        zero_point = 0.0
        if e.out_zero_point is not None:
            zero_point = tl.load(e.out_zero_point).to(tl.float32)
        return quantize_static(gelu_tanh(y), factor[None, :], zero_point)
    else:
        return y


@triton.jit
def store_tile(
    acc, out, branch, row, column, M, N, stride_out, e,
    PER_TOKEN: tl.constexpr, ONE_GATE: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """Finish the sums of the tile that begins at (row, column), in SUBTILES pieces: each needs fewer registers.

    Rows of ``out`` are ``stride_out`` apart, those of ``branch`` N.
    With a gate ``branch`` takes what is not gated yet, unless it is None.
    """
    if SUBTILES > 1:
        height: tl.constexpr = acc.shape[0]
        half: tl.constexpr = acc.shape[1] // 2
        first, second = tl.split(tl.permute(tl.reshape(acc, (height, 2, half)), (0, 2, 1)))
        store_tile(
            first, out, branch, row, column, M, N, stride_out, e,
            PER_TOKEN, ONE_GATE, TMA, TRANSPOSED, SUBTILES // 2,
        )  # fmt: skip
        if TRANSPOSED:
            row += half
        else:
            column += half
        store_tile(
            second, out, branch, row, column, M, N, stride_out, e,
            PER_TOKEN, ONE_GATE, TMA, TRANSPOSED, SUBTILES // 2,
        )  # fmt: skip
    else:
        if TRANSPOSED:
            acc = tl.trans(acc)
        rows = row + tl.arange(0, acc.shape[0])
        columns = column + tl.arange(0, acc.shape[1])
        dtype: tl.constexpr = out.dtype if TMA else out.dtype.element_ty
        if dtype != tl.int32:
            # rows and columns beyond the edge read valid parameters; the store drops their values
            fold: tl.constexpr = e.gate is not None and ONE_GATE and branch is None
            acc = _apply(acc, e, rows % M, columns % N, PER_TOKEN, fold)
            if branch is not None:
                if TMA:
                    branch.store([row, column], acc.to(branch.dtype))
                else:
                    inside = (rows[:, None] < M) & (columns[None, :] < N)
                    branch_ptrs = branch + rows.to(tl.int64)[:, None] * N + columns[None, :]
                    tl.store(branch_ptrs, acc.to(branch.dtype.element_ty), mask=inside)
            if e.gate is not None and not fold:
                acc *= _gate(e, rows % M, columns % N, ONE_GATE)
        if TMA:
            if e.gate is None:
                out.store([row, column], acc.to(dtype))
            elif COMPILED:  # added in the L2 cache: the residual never travels to the multiprocessor
                out.atomic_add([row, column], acc.to(dtype))
            else:
                out.store([row, column], (out.load([row, column]).to(tl.float32) + acc).to(dtype))
        else:
            mask = (rows[:, None] < M) & (columns[None, :] < N)
            out_ptrs = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
            if e.gate is not None:
                acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptrs, acc.to(dtype), mask=mask)
