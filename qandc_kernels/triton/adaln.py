"""Normalize, modulate and quantize in one pass: what adaLN-Zero puts before a product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qandc_kernels.tiles.tables import gpu_of
from qandc_kernels.triton._epilogue import by_own_scale, magnitude, quantize_static, scale_of, start_early

__all__ = ["adaln_quantize_triton"]


@triton.jit
def _load_modulation(shift_ptr, scale_ptr, sample, stride_shift, stride_scale, columns, K: tl.constexpr):
    shift = tl.load(shift_ptr + sample * stride_shift + columns, mask=columns < K, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * stride_scale + columns, mask=columns < K, other=0.0).to(tl.float32)
    return shift, 1.0 + scale


@triton.jit
def _adaln_quantize_kernel(
    x_ptr, shift_ptr, scale_ptr,  # [M, K], [samples, K], [samples, K], unit stride along K
    q_ptr, copy_ptr, token_scale_ptr,  # [M, K] int8, [M, K] or None, [M] float32 or None
    M, tokens,
    stride_xm, stride_shift, stride_scale,
    q_scale_ptr, zero_point_ptr, eps,
    K: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # a row in two pieces, powers of two: 1152 = 1024 + 128 leaves no lane idle
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    inside = tail < K
    first = tl.program_id(0).to(tl.int64) * ROWS
    if OVERLAP:
        start_early()
    zero_point = 0.0
    factor = 1.0
    if q_scale_ptr is not None:
        factor = tl.div_rn(1.0, tl.load(q_scale_ptr))
        if zero_point_ptr is not None:
            zero_point = tl.load(zero_point_ptr).to(tl.float32)
    if ONE_SAMPLE:
        sample = first // tokens
        shift0, scale0 = _load_modulation(shift_ptr, scale_ptr, sample, stride_shift, stride_scale, head, K)
        shift1, scale1 = _load_modulation(shift_ptr, scale_ptr, sample, stride_shift, stride_scale, tail, K)
    for row in tl.range(first, min(first + ROWS, M), num_stages=STAGES):
        x_row = x_ptr + row * stride_xm
        x0 = tl.load(x_row + head)
        x1 = tl.load(x_row + tail, mask=inside, other=0.0)
        if copy_ptr is not None:
            tl.store(copy_ptr + row * K + head, x0)
            tl.store(copy_ptr + row * K + tail, x1, mask=inside)
        x0 = x0.to(tl.float32)
        x1 = x1.to(tl.float32)
        if not ONE_SAMPLE:
            sample = row // tokens
            shift0, scale0 = _load_modulation(shift_ptr, scale_ptr, sample, stride_shift, stride_scale, head, K)
            shift1, scale1 = _load_modulation(shift_ptr, scale_ptr, sample, stride_shift, stride_scale, tail, K)
        mean = tl.div_rn(tl.sum(x0) + tl.sum(x1), K * 1.0)  # exact for a constant row
        x0 -= mean
        x1 = tl.where(inside, x1 - mean, 0.0)
        variance = (tl.sum(x0 * x0) + tl.sum(x1 * x1)) * (1.0 / K)
        inverse = tl.rsqrt(variance + eps)
        y0 = x0 * inverse * scale0 + shift0
        y1 = x1 * inverse * scale1 + shift1
        q_row = q_ptr + row * K
        if q_scale_ptr is not None:
            q0 = quantize_static(y0, factor, zero_point)
            q1 = quantize_static(y1, factor, zero_point)
        else:
            scale = scale_of(tl.maximum(tl.max(magnitude(y0)), tl.max(magnitude(y1))), 127)  # beyond the edge y1 is 0
            tl.store(token_scale_ptr + row, scale)
            q0 = by_own_scale(y0, scale)
            q1 = by_own_scale(y1, scale)
        tl.store(q_row + head, q0)
        tl.store(q_row + tail, q1, mask=inside)


def adaln_quantize_triton(
    x: torch.Tensor,
    tokens: int,
    shift: torch.Tensor,
    scale: torch.Tensor,
    q_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    eps: float,
    copy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch on ``x [M, K]``, ``tokens`` rows per sample; ``shift`` and ``scale [samples, K]``; unit strides along K.

    Without ``q_scale`` each row gets its own scale, returned beside the integers. ``copy``, contiguous, takes ``x``.
    """
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    token_scale = None
    if q_scale is None:
        token_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, token_scale
    # with programs enough for all multiprocessors, one hides the reductions of a row behind the loads of the next three
    gpu = gpu_of(x.device)
    multiprocessors = gpu.multiprocessors
    overlap = gpu.capability[0] >= 9 and m <= 8 * multiprocessors
    rows = 4 if m >= 24 * multiprocessors else 1
    head = max(1, triton.next_power_of_2(k) // 2)
    tail = triton.next_power_of_2(max(1, k - head))
    _adaln_quantize_kernel[(triton.cdiv(m, rows),)](
        x, shift, scale,
        q, copy, token_scale,
        m, tokens,
        x.stride(0), shift.stride(0), scale.stride(0),  # stride_xm, stride_shift, stride_scale
        q_scale, zero_point, eps,
        K=k, ONE_SAMPLE=tokens % rows == 0,
        ROWS=rows, HEAD=head, TAIL=tail, STAGES=3 if k <= 4096 else 1,
        OVERLAP=overlap, launch_pdl=overlap,
        num_warps=4 if m <= 8 * multiprocessors else min(8, max(1, head // 1024)),
        enable_fp_fusion=True,
    )  # fmt: skip
    return q, token_scale
