"""Quantize activations to int8: with a given scale per tensor, or with a scale per token found on the way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qandc_kernels.ops._register import rows_of
from qandc_kernels.reference import SMALLEST_AMAX
from qandc_kernels.triton._epilogue import by_own_scale, gelu_tanh, magnitude, scale_of
from qandc_kernels.triton._launch import Launches, Start

__all__ = [
    "gelu_quantize_per_token_triton",
    "per_tensor_start",
    "per_token_start",
    "quantize_per_tensor_triton",
    "quantize_per_token_triton",
]

_PER_TENSOR, _PER_TOKEN, _GELU_PER_TOKEN = Launches(), Launches(), Launches()


@triton.jit
def _offsets(i, inner, stride_outer, stride_inner):
    i = i.to(tl.int64)
    return i // inner * stride_outer + i % inner * stride_inner


@triton.jit
def _addresses(rows, columns, inner_rows, stride_0, stride_1, stride_2, stride_3, WIDTH: tl.constexpr):
    """Return offsets of ``[row // inner_rows, row % inner_rows, column // WIDTH, column % WIDTH]``: [rows, columns]."""
    of_rows = _offsets(rows, inner_rows, stride_0, stride_1)
    return of_rows[:, None] + _offsets(columns, WIDTH, stride_2, stride_3)[None, :]


@triton.jit
def _quantize_per_tensor_kernel(
    x_ptr, q_ptr,
    M, K, inner_rows,
    stride_0, stride_1, stride_2, stride_3, stride_q,
    scale_ptr, zero_point_ptr, nan_flag_ptr, smoothing_ptr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(K, BLOCK_K)
    rows = tl.program_id(0) // blocks_k * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < M) & (columns[None, :] < K)
    offsets = _addresses(rows, columns, inner_rows, stride_0, stride_1, stride_2, stride_3, WIDTH)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if nan_flag_ptr is not None:  # all who store here store the same
        tl.store(nan_flag_ptr, 1, mask=tl.max((x != x).to(tl.int32)) > 0)
    y = x.to(tl.float32)
    if smoothing_ptr is not None:
        y *= tl.div_rn(1.0, tl.load(smoothing_ptr + columns % CHANNELS))[None, :]
    y *= tl.div_rn(1.0, tl.load(scale_ptr))
    y = tl.where(y == y, y, 0.0)
    zero_point = 0
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr)
    # clamped before rounded: the bounds are integers, and it keeps the rounding in range
    shift = zero_point * 1.0
    y = tl.minimum(tl.maximum(y, QMIN - shift), QMAX - shift)
    q = ((y + 12582912.0).to(tl.int32, bitcast=True) + zero_point).to(tl.int8)  # as in to_int8
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * stride_q + columns[None, :], q, mask=mask)


@triton.jit
def _quantize_per_token_kernel(
    x_ptr, q_ptr, scale_ptr, smoothing_ptr,
    M, K, inner_rows,
    stride_0, stride_1, stride_2, stride_3,
    QMAX: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < M) & (columns[None, :] < K)
    offsets = _addresses(rows, columns, inner_rows, stride_0, stride_1, stride_2, stride_3, WIDTH)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if smoothing_ptr is not None:
        x *= tl.div_rn(1.0, tl.load(smoothing_ptr + columns, mask=columns < K, other=1.0))[None, :]
    scale = scale_of(tl.max(magnitude(x), axis=1), QMAX)  # [BLOCK_M]
    q = by_own_scale(x, scale[:, None])
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], q, mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@triton.jit
def _gelu_quantize_per_token_kernel(
    x_ptr, multiplier_ptr, beside_ptr, q_ptr, scale_ptr,
    stride_x, inner_rows, stride_0, stride_1, stride_2, stride_3,
    K: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_FIRST: tl.constexpr,
):  # fmt: skip
    # a row in two pieces, powers of two: 12288 = 8192 + 4096 leaves no lane idle
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    inside = tail < K
    x_row = x_ptr + row * stride_x
    y0 = gelu_tanh(tl.load(x_row + head).to(tl.float32))
    y1 = gelu_tanh(tl.load(x_row + tail, mask=inside, other=0.0).to(tl.float32))
    if multiplier_ptr is not None:
        y0 *= tl.load(multiplier_ptr + head)
        y1 *= tl.load(multiplier_ptr + tail, mask=inside, other=0.0)
    largest = tl.maximum(tl.max(magnitude(y0)), tl.max(magnitude(y1)))
    columns = tl.arange(0, BLOCK_FIRST)
    if beside_ptr is not None:
        at = _offsets(row, inner_rows, stride_0, stride_1) + _offsets(columns, WIDTH, stride_2, stride_3)
        beside = tl.load(beside_ptr + at, mask=columns < FIRST, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(beside)))
    scale = scale_of(largest, 127)
    tl.store(scale_ptr + row, scale)
    q_row = q_ptr + row * (FIRST + K)
    if beside_ptr is not None:
        tl.store(q_row + columns, by_own_scale(beside, scale), mask=columns < FIRST)
    tl.store(q_row + FIRST + head, by_own_scale(y0, scale))
    tl.store(q_row + FIRST + tail, by_own_scale(y1, scale), mask=inside)


def _merge(sizes: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Return size and stride of the fewest dimensions that walk the same elements in the same order."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _as_matrix(x: torch.Tensor, token_dims: int) -> tuple[torch.Tensor, tuple[int, int, int, tuple[int, ...], int]]:
    """Return ``x`` and how to walk it: M, K, inner rows, four strides, width.

    Rows and columns may have two strides each, which covers what attention returns; anything wilder is copied first.
    """
    split = x.ndim - token_dims
    rows = _merge(list(x.shape[:split]), list(x.stride()[:split]))
    columns = _merge(list(x.shape[split:]), list(x.stride()[split:]))
    if len(rows) > 2 or len(columns) > 2:
        return _as_matrix(x.contiguous(), token_dims)
    (outer_rows, stride_0), (inner_rows, stride_1) = [(1, 0)] * (2 - len(rows)) + rows
    (outer_columns, stride_2), (width, stride_3) = [(1, 0)] * (2 - len(columns)) + columns
    strides = (stride_0, stride_1, stride_2, stride_3)
    return x, (outer_rows * inner_rows, outer_columns * width, inner_rows, strides, width)


def per_tensor_start(
    x: torch.Tensor, bits: int, channels: int, token_dims: int | None = None, stride_q: int | None = None
) -> tuple[torch.Tensor, Start]:
    """Return ``x``, or a copy with strides that the kernel can walk, and how the kernel is started on it.

    Its operands are x, q, scale, zero_point, nan_flag and smoothing ``[channels]``. Rows of q, contiguous if nothing is
    said, are the last ``token_dims`` dimensions of x, and ``stride_q`` apart.
    """
    view, (m, k, inner_rows, strides, width) = _as_matrix(x, token_dims or min(x.ndim, max(1, x.ndim - 2)))
    block_k = min(triton.next_power_of_2(k), 1024)
    block_m = 4096 // block_k

    def arrange(x: Any, q: Any, scale: Any, zero_point: Any, nan_flag: Any, smoothing: Any) -> tuple[Any, ...]:
        return (x, q, m, k, inner_rows, *strides, stride_q or k, scale, zero_point, nan_flag, smoothing)

    constants = {
        "QMIN": -(1 << bits - 1),
        "QMAX": (1 << bits - 1) - 1,
        "CHANNELS": channels,
        "WIDTH": width,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "num_warps": 4,
        "enable_fp_fusion": False,  # rounds as the reference does
    }
    grid = (triton.cdiv(m, block_m) * triton.cdiv(k, block_k), 1, 1)
    return view, Start(_quantize_per_tensor_kernel, grid, arrange, constants)


def per_token_start(x: torch.Tensor, bits: int, token_dims: int) -> tuple[torch.Tensor, Start]:
    """Return ``x``, or a copy with strides that the kernel can walk, and how the kernel is started on it.

    Its operands are x, q, scale and smoothing ``[K]``. Each element of ``x`` is read once.
    """
    view, (m, k, inner_rows, strides, width) = _as_matrix(x, token_dims)
    block_k = triton.next_power_of_2(k)
    block_m = max(1, 2048 // block_k)

    def arrange(x: Any, q: Any, scale: Any, smoothing: Any) -> tuple[Any, ...]:
        return (x, q, scale, smoothing, m, k, inner_rows, *strides)

    constants = {
        "QMAX": (1 << bits - 1) - 1,
        "WIDTH": width,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "num_warps": min(8, max(1, block_k // 2048)),
        "enable_fp_fusion": False,
    }
    return view, Start(_quantize_per_token_kernel, (triton.cdiv(m, block_m), 1, 1), arrange, constants)


def quantize_per_tensor_triton(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bits: int = 8,
    nan_flag: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch on ``x`` of any shape and strides; the others hold one element on the device.

    ``out [..., heads · D]`` takes those of ``x [..., heads, D]`` if it is given: columns of a contiguous tensor.
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device) if out is None else out
    if q.numel() == 0:
        return q

    def prepare() -> tuple[tuple[Start, ...], tuple[torch.Tensor | None, ...]]:
        row = () if out is None else (2, out.stride(-2) if out.ndim > 1 else None)
        view, start = per_tensor_start(x, bits, 1, *row)
        return (start,), (view, q, scale, zero_point, nan_flag, None)

    _PER_TENSOR((x, q, scale, zero_point, nan_flag, None), bits, prepare)
    return q


def quantize_per_token_triton(x: torch.Tensor, bits: int = 8, token_dims: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``x`` of any strides, whose last ``token_dims`` dimensions are one token."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[: x.ndim - token_dims], dtype=torch.float32, device=x.device)
    if scale.numel() == 0:
        return q, scale
    if q.numel() == 0:
        return q, scale.fill_(SMALLEST_AMAX * (1.0 / ((1 << bits - 1) - 1)))

    def prepare() -> tuple[tuple[Start, ...], tuple[torch.Tensor | None, ...]]:
        view, start = per_token_start(x, bits, token_dims)
        return (start,), (view, q, scale, None)

    _PER_TOKEN((x, q, scale, None), (bits, token_dims), prepare)
    return q, scale


def gelu_quantize_per_token_triton(
    x: torch.Tensor, multiplier: torch.Tensor | None = None, beside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``x [..., K]`` and ``beside [..., heads, D]`` of any strides, a program for each token."""
    k, first = x.shape[-1], 0 if beside is None else beside.shape[-2:].numel()
    q = torch.empty((*x.shape[:-1], first + k), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if scale.numel() == 0:
        return q, scale
    if k == 0:
        return quantize_per_token_triton(x if beside is None else beside.flatten(-2))
    if first == 0:
        beside = None

    def prepare() -> tuple[tuple[Start, ...], tuple[torch.Tensor | None, ...]]:
        rows, heads = rows_of(x), beside
        walk: tuple[int, ...] = (1, 0, 0, 0, 0, 1)
        rows = rows if rows.stride(1) == 1 or k == 1 else rows.contiguous()
        if beside is not None:
            heads, (_, _, inner_rows, strides, width) = _as_matrix(beside, 2)
            walk = (inner_rows, *strides, width)
        start = _gelu_start(rows, first, walk)
        vector = None if multiplier is None else multiplier.contiguous()
        return (start,), (rows, vector, heads, q, scale)

    _GELU_PER_TOKEN((x, multiplier, beside, q, scale), None, prepare)
    return q, scale


def _gelu_start(x: torch.Tensor, first: int, walk: tuple[int, ...]) -> Start:
    *strides, width = walk
    k = x.shape[1]
    head, block_first = max(1, triton.next_power_of_2(k) // 2), triton.next_power_of_2(max(1, first))

    def arrange(x_row: Any, multiplier: Any, beside: Any, q: Any, scale: Any) -> tuple[Any, ...]:
        return (x_row, multiplier, beside, q, scale, x.stride(0), *strides)

    constants = {
        "K": k,
        "FIRST": first,
        "WIDTH": width,
        "HEAD": head,
        "TAIL": triton.next_power_of_2(max(1, k - head)),
        "BLOCK_FIRST": block_first,
        "num_warps": min(16, max(1, max(head, block_first) // 1024)),
        "enable_fp_fusion": True,
    }
    return Start(_gelu_quantize_per_token_kernel, (len(x), 1, 1), arrange, constants)
