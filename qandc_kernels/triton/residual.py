"""Do what a feature cache needs on a step that computes no block: sum all gated branch outputs in one pass.

A correction of features is folded into the gates first: loaded in the sum itself, by every few tokens anew, gains and
offsets took half as long again (docs/kernel-notes.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["corrected_gates_triton", "gated_sum_triton"]


@triton.jit
def _gated_sum_kernel(
    x_ptr, features_ptr, gates_ptr, weights_ptr, scales_ptr, offset_ptr, out_ptr,
    samples, tokens,
    stride_gate_l, stride_gate_k, stride_gate_s, stride_offset,
    D: tl.constexpr, SETS: tl.constexpr, LAYERS: tl.constexpr, BRANCHES: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_T)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    rows = sample * tokens + token
    offsets = rows * D + columns
    in_row = None if EVEN else token < tokens
    inside = None if EVEN else (token < tokens) & (columns < D)
    # each row loads its gates by itself: spreading a vector over a tile would take shared memory and barriers
    channels = columns + 0 * token
    gate_offsets = sample * stride_gate_s + channels
    of_branch = tl.full((), 1, tl.int64) * samples * tokens  # rows of a feature; samples can be a plain 1
    acc = tl.load(x_ptr + offsets, mask=inside).to(tl.float32)
    if offset_ptr is not None:
        acc += tl.load(offset_ptr + sample * stride_offset + channels, mask=inside)
    for s in tl.static_range(SETS):
        weight = 1.0
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + s)
        if weight != 0.0:  # what a weight of 0 stands at was never written
            for branch in tl.range(0, LAYERS * BRANCHES, num_stages=1, loop_unroll_factor=UNROLL):
                first = (s * LAYERS * BRANCHES + branch) * of_branch
                factor = weight
                if gates_ptr is not None:
                    gate = gates_ptr + branch // BRANCHES * stride_gate_l + branch % BRANCHES * stride_gate_k
                    factor = tl.load(gate + gate_offsets, mask=inside).to(tl.float32) * weight
                feature = tl.load(features_ptr + first * D + offsets, mask=inside).to(tl.float32)
                if scales_ptr is not None:
                    feature *= tl.load(scales_ptr + first + rows, mask=in_row)
                acc += feature * factor
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


def gated_sum_triton(
    x: torch.Tensor,
    features: torch.Tensor,
    gates: torch.Tensor | None,
    weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """Launch on contiguous ``x [samples, tokens, D]`` and ``features [S, L, K, samples, tokens, D]``.

    ``gates [L, K, samples, D]`` and ``offset`` have unit stride along D; all others are contiguous.
    """
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    sets, layers, branches, samples, tokens, width = features.shape
    block_t, block_d = 2, min(128, triton.next_power_of_2(width))
    grid = (samples * triton.cdiv(tokens, block_t), triton.cdiv(width, block_d))
    stride_gate_l, stride_gate_k, stride_gate_s = (0, 0, 0) if gates is None else gates.stride()[:3]
    _gated_sum_kernel[grid](
        x, features, gates, weights, scales, offset, out,
        samples, tokens,
        stride_gate_l, stride_gate_k, stride_gate_s, 0 if offset is None else offset.stride(0),
        D=width, SETS=sets, LAYERS=layers, BRANCHES=branches,
        EVEN=tokens % block_t == 0 and width % block_d == 0,
        BLOCK_T=block_t, BLOCK_D=block_d, UNROLL=4,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _corrected_gates_kernel(
    gates_ptr, gains_ptr, offsets_ptr, out_ptr, offset_ptr,
    samples, stride_gate_l, stride_gate_k, stride_gate_s,
    D: tl.constexpr, LAYERS: tl.constexpr, BRANCHES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in tl.static_range(0, LAYERS * BRANCHES, BLOCK_B):
        branch = (start + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        inside = (branch < LAYERS * BRANCHES) & (columns < D)
        at = branch // BRANCHES * stride_gate_l + branch % BRANCHES * stride_gate_k + sample * stride_gate_s
        gate = tl.load(gates_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(gains_ptr + branch * D + columns, mask=inside, other=0.0)
        total += gate * tl.load(offsets_ptr + branch * D + columns, mask=inside, other=0.0)
        out = out_ptr + (branch * samples + sample) * D + columns
        tl.store(out, (gate * gain).to(out_ptr.dtype.element_ty), mask=inside)
    summed = tl.sum(total, 0)[None, :]
    tl.store(offset_ptr + sample * D + columns, summed, mask=columns < D)


def corrected_gates_triton(
    gates: torch.Tensor, gains: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on ``gates [L, K, samples, D]`` of unit stride along D, contiguous ``gains`` and ``offsets [L, K, D]``."""
    layers, branches, samples, width = gates.shape
    out = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    offset = torch.empty(samples, width, dtype=torch.float32, device=gates.device)
    if offset.numel() == 0:
        return out, offset
    block_b, block_d = min(64, triton.next_power_of_2(layers * branches)), min(32, triton.next_power_of_2(width))
    stride_gate_l, stride_gate_k, stride_gate_s = gates.stride()[:3]
    _corrected_gates_kernel[samples, triton.cdiv(width, block_d)](
        gates, gains, offsets, out, offset,
        samples, stride_gate_l, stride_gate_k, stride_gate_s,
        D=width, LAYERS=layers, BRANCHES=branches,
        BLOCK_B=block_b, BLOCK_D=block_d,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out, offset
