"""Plain-torch definition of every op: what the kernels must equal, the CPU path, and a baseline for benchmarks.

The functions carry the names and signatures of the public ops. They check nothing: the public ops do. Like the kernels
they are for inference: no result carries a gradient.
"""

from __future__ import annotations

import torch

from qandc_kernels.packing import unpack_int4

__all__ = ["int4_linear", "int8_linear", "int8_matmul", "quantize_per_tensor", "quantize_per_token"]

# keeps the scale of a row of zeros positive and its reciprocal finite
SMALLEST_AMAX = 1e-10
# 1024 products of magnitude <= 128 · 128 sum to 2^24 at most: every partial sum is exact in fp32
EXACT_CHUNK = 1024


@torch.no_grad()
def quantize_per_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, bits: int = 8
) -> torch.Tensor:
    """``q = clip(round(x · (1/s)) + z, -2^(b-1), 2^(b-1) - 1)``, rounding half to even; NaN becomes ``z``."""
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    shift = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
    y = (x.to(torch.float32) * (1.0 / scale)).nan_to_num_(nan=0.0)
    y.clamp_(qmin - shift, qmax - shift).round_().add_(shift)
    return y.to(torch.int8, memory_format=torch.contiguous_format)


@torch.no_grad()
def quantize_per_token(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = max|x| / qmax`` over the last dimension, ``q = round(x · (1/s))``: int8 ``[..., K]``, float32 ``[...]``.

    A row with NaN gets the scale NaN, so that the NaN reaches the output of the product.
    """
    qmax = (1 << bits - 1) - 1
    y = x.to(torch.float32)
    amax = y.abs().amax(-1) if x.shape[-1] else y.new_zeros(x.shape[:-1])
    scale = amax.clamp(min=SMALLEST_AMAX) * (1.0 / qmax)
    y = (y * (1.0 / scale)[..., None]).nan_to_num_(nan=0.0)
    y.clamp_(-qmax, qmax).round_()
    return y.to(torch.int8, memory_format=torch.contiguous_format), scale


@torch.no_grad()
def int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """``acc[..., n] = Σ_k xq[..., k] · wq[n, k]``, exact: int8 ``[..., K]`` and ``[N, K]`` to int32 ``[..., N]``."""
    acc = torch.zeros(*xq.shape[:-1], wq.shape[0], dtype=torch.int32, device=xq.device)
    with torch.autocast(xq.device.type, enabled=False):  # bfloat16 sums would not be exact
        for x, w in zip(xq.split(EXACT_CHUNK, -1), wq.split(EXACT_CHUNK, -1), strict=True):
            acc += torch.matmul(x.to(torch.float32), w.to(torch.float32).t()).to(torch.int32)
    return acc


@torch.no_grad()
def int8_linear(
    xq: torch.Tensor,
    wq: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``y = (Σ_k xq wq - z Σ_k wq) · s_x · s_w + bias``, int32 inside, scaled in fp32, cast last."""
    acc = int8_matmul(xq, wq)
    if x_zero_point is not None:
        acc -= x_zero_point * (wq.sum(1, dtype=torch.int32) if w_sum is None else w_sum)
    y = acc.to(torch.float32).mul_(x_scale if x_scale.ndim == 0 else x_scale[..., None]).mul_(w_scale)
    if bias is not None:
        y += bias
    return y.to(out_dtype)


def int4_linear(
    xq: torch.Tensor,
    wq_packed: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """:func:`int8_linear` of the unpacked weight."""
    return int8_linear(xq, unpack_int4(wq_packed), x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
