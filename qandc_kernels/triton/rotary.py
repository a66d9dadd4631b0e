"""Normalize the heads of q and k and rotate them by their positions, in place, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["qk_norm_rope_triton"]


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,  # [B, S, 3, H, D], [D], [D], [S, D / PAIR] or None twice
    tokens, heads,
    stride_sample, stride_token, stride_part, stride_head,
    stride_cos_token, stride_cos, stride_sin_token, stride_sin,
    eps,
    D: tl.constexpr, PAIR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(heads, BLOCK_H)
    part = tl.program_id(0) % 2  # q, k
    head = tl.program_id(0) // 2 % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    row = (tl.program_id(0) // (2 * blocks)).to(tl.int64)
    sample, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    first = qkv_ptr + sample * stride_sample + token * stride_token + part.to(tl.int64) * stride_part
    x_ptr = first + head.to(tl.int64)[:, None] * stride_head + column[None, :]
    mask = (head < heads)[:, None] & inside[None, :]
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)
    y = (x * inverse[:, None] * weight[None, :]).to(qkv_ptr.dtype.element_ty).to(tl.float32)
    if cos_ptr is not None:
        angle = column // PAIR
        cos = tl.load(cos_ptr + token * stride_cos_token + angle * stride_cos, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + token * stride_sin_token + angle * stride_sin, mask=inside, other=0.0)
        even, odd = tl.split(tl.reshape(y, (BLOCK_H, BLOCK_D // 2, 2)))
        turned = tl.reshape(tl.join(-odd, even), (BLOCK_H, BLOCK_D))
        y = y * cos[None, :] + turned * sin[None, :]
    tl.store(x_ptr, y.to(qkv_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope_triton(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> None:
    """Launch on ``qkv [B, S, 3, H, D]`` and weights ``[D]``, unit stride along D; tables ``[S, D]`` or ``[S, D/2]``."""
    samples, tokens, _, heads, width = qkv.shape
    if qkv.numel() == 0:
        return
    strides = (0,) * 4 if cos is None or sin is None else (*cos.stride(), *sin.stride())
    block_d = triton.next_power_of_2(width)
    block_h = min(triton.next_power_of_2(heads), max(1, 1024 // block_d))
    _qk_norm_rope_kernel[(samples * tokens * triton.cdiv(heads, block_h) * 2,)](
        qkv, q_weight, k_weight, cos, sin,
        tokens, heads,
        *qkv.stride()[:4], *strides,
        eps,
        D=width, PAIR=1 if cos is None else width // cos.shape[1], BLOCK_H=block_h, BLOCK_D=block_d,
        num_warps=2, enable_fp_fusion=False,  # rounds as the reference does
    )  # fmt: skip
