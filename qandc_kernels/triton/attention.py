"""Compute attention whose output is int8: softmax(q kᵀ / √D + bias of a key) v, quantized before it is stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles.tables import Gpu, gpu_of
from qandc_kernels.triton._epilogue import quantize_static, start_early

__all__ = ["attention_quantize_triton"]


class AttentionTile(NamedTuple):
    """Hold queries and keys per step, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    overlap: int = 0


@triton.jit
def _load_rows(ptr, rows, stride, columns, S, D: tl.constexpr, EVEN: tl.constexpr):
    """Load ``[rows, columns]`` of one head, zero beyond S rows and D columns."""
    ptrs = ptr + rows[:, None] * (stride * 8) + columns[None, :]
    if EVEN:
        return tl.load(ptrs, mask=columns[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs, mask=(rows[:, None] < S) & (columns[None, :] < D), other=0.0)


@triton.jit
def _attention_quantize_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # [B, S, H, D], k and v [B, T, H, D], unit stride along D; out contiguous int8
    key_bias_ptr,  # [B, T] contiguous, or None
    S, T,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    out_scale_ptr, out_zero_point_ptr, nan_flag_ptr, softmax_scale, bias_scale,
    H: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # a head in two pieces: 72 = 64 + 8, the 8 padded to the 16 that a product needs, where 72 would be padded to 128
    head = tl.arange(0, HEAD)
    sample = tl.program_id(2).to(tl.int64)
    # strides come divided by 8, or the compiler would not know that loads are aligned
    q_ptr += (sample * stride_qb + tl.program_id(1) * stride_qh) * 8
    k_ptr += (sample * stride_kb + tl.program_id(1) * stride_kh) * 8
    v_ptr += (sample * stride_vb + tl.program_id(1) * stride_vh) * 8
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if OVERLAP:
        start_early()
    q0 = _load_rows(q_ptr, rows, stride_qs, head, S, D, EVEN_M)
    acc0 = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL > 0:
        tail = HEAD + tl.arange(0, TAIL)
        q1 = _load_rows(q_ptr, rows, stride_qs, tail, S, D, EVEN_M)
        acc1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if key_bias_ptr is not None:
        key_bias_ptr += sample * T
        largest = tl.full((BLOCK_M,), -1e38, tl.float32)  # -inf - -inf of keys left out would make NaN
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        scores = tl.dot(q0, tl.trans(_load_rows(k_ptr, keys, stride_ks, head, T, D, EVEN_N)))
        if TAIL > 0:
            scores = tl.dot(q1, tl.trans(_load_rows(k_ptr, keys, stride_ks, tail, T, D, EVEN_N)), scores)
        if key_bias_ptr is not None:
            bias = tl.load(key_bias_ptr + keys, mask=keys < T, other=float("-inf")).to(tl.float32)
            scores += bias[None, :] * bias_scale
        elif not EVEN_N:
            scores = tl.where(keys[None, :] < T, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1) * softmax_scale)
        p = tl.exp2(scores * softmax_scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, axis=1)
        largest = new_largest
        p = p.to(v_ptr.dtype.element_ty)
        acc0 = tl.dot(p, _load_rows(v_ptr, keys, stride_vs, head, T, D, EVEN_N), acc0 * shrink[:, None])
        if TAIL > 0:
            acc1 = tl.dot(p, _load_rows(v_ptr, keys, stride_vs, tail, T, D, EVEN_N), acc1 * shrink[:, None])
    if key_bias_ptr is not None:
        total = tl.where(total == 0, 1.0, total)  # all keys left out
    factor = tl.div_rn(1.0, tl.load(out_scale_ptr)) / total[:, None]
    zero_point = 0.0
    if out_zero_point_ptr is not None:
        zero_point = tl.load(out_zero_point_ptr).to(tl.float32)
    out_rows = out_ptr + (sample * S * H + tl.program_id(1)) * D + rows[:, None] * (H * D)
    inside = rows[:, None] < S
    tl.store(out_rows + head[None, :], quantize_static(acc0, factor, zero_point), mask=inside & (head[None, :] < D))
    if nan_flag_ptr is not None:  # of rows beyond the edge 0 times an infinite key makes NaN
        tl.store(nan_flag_ptr, 1, mask=tl.max((inside & (acc0 != acc0)).to(tl.int32)) > 0)
    if TAIL > 0:
        mask = inside & (tail[None, :] < D)
        if nan_flag_ptr is not None:
            tl.store(nan_flag_ptr, 1, mask=tl.max((mask & (acc1 != acc1)).to(tl.int32)) > 0)
        tl.store(out_rows + tail[None, :], quantize_static(acc1, factor, zero_point), mask=mask)


def heuristic_tile(batch: int, tokens: int, heads: int, width: int, gpu: Gpu) -> AttentionTile:
    """Choose a tile: measured on an H200 at D = 72; elsewhere what fits every shared memory and all registers."""
    if gpu.capability[0] != 9:
        return AttentionTile(128, 64, 8, 2)
    if width > 80:
        return AttentionTile(128, 64, 8, 2, overlap=1)
    if batch * heads * triton.cdiv(tokens, 128) < gpu.multiprocessors:
        return AttentionTile(64, 128, 4, 3, overlap=1)
    return AttentionTile(128, 64, 4 if tokens < 1024 else 8, 3, overlap=1)


def attention_quantize_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor | None,
    nan_flag: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Launch on ``q [B, S, H, D]`` and ``k, v [B, T, H, D]``, unit stride along D, 16-bit, D of 16, 24, ... 128."""
    batch, tokens, heads, width = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    if out.numel() == 0:
        return out
    tile = tile or heuristic_tile(batch, tokens, heads, width, gpu_of(q.device))
    head = max(16, 1 << width.bit_length() - 1)
    tail = max(16, triton.next_power_of_2(width - head)) if width > head else 0
    _attention_quantize_kernel[(triton.cdiv(tokens, tile.block_m), heads, batch)](
        q, k, v, out,
        None if key_bias is None else key_bias.contiguous(),
        tokens, keys,
        *(stride // 8 for t in (q, k, v) for stride in t.stride()[:3]),
        out_scale, out_zero_point, nan_flag, width**-0.5 * 1.4426950408889634, width**0.5,
        H=heads, D=width, HEAD=head, TAIL=tail,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN_M=tokens % tile.block_m == 0, EVEN_N=keys % tile.block_n == 0,
        OVERLAP=tile.overlap > 0, launch_pdl=tile.overlap > 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
