"""The public op for attention with an int8 output. For inference: the result carries no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._checks import check_attention_quantize_per_tensor
from qandc_kernels.ops._operands import HALF_DTYPES
from qandc_kernels.ops._register import register

__all__ = ["attention_quantize_per_tensor"]

HEAD_DIMS = range(16, 129, 8)
LARGEST_GRID = 65535  # along the second and third dimension


def _aligned(t: torch.Tensor) -> bool:
    """Whether every head of every token begins at a multiple of 16 bytes, and int32 offsets within a sample suffice."""
    strides = t.stride()
    return (
        strides[3] == 1
        and all(stride % 8 == 0 for stride in strides[:3])
        and t.data_ptr() % 16 == 0
        and t.shape[1] * strides[1] < 2**31
    )


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor | None,
    nan_flag: torch.Tensor | None,
) -> torch.Tensor:
    # of one token the kernel has no loop, which ptxas 12.8 turns into reads outside of shared memory
    batch, tokens, heads, width = q.shape
    if q.dtype not in HALF_DTYPES or width not in HEAD_DIMS or tokens == 1 or max(batch, heads) > LARGEST_GRID:
        y = reference.attention(q, k, v)
        out = torch.ops.qandc.quantize_per_tensor(y, out_scale, out_zero_point, 8, nan_flag)
        return out.masked_fill_(y.isnan(), -128)  # as the kernel and the reference
    from qandc_kernels.triton.attention import attention_quantize_triton

    q, k, v = (t if _aligned(t) else t.contiguous() for t in (q, k, v))
    with launching_on(q):
        return attention_quantize_triton(q, k, v, out_scale, out_zero_point, nan_flag)


def _attention_fake(q: torch.Tensor, *others: object) -> torch.Tensor:
    return q.new_empty(q.shape, dtype=torch.int8)


register(
    "attention_quantize_per_tensor",
    "(Tensor q, Tensor k, Tensor v, Tensor out_scale, Tensor? out_zero_point, Tensor(a!)? nan_flag) -> Tensor",
    _attention,
    _attention_fake,
)


def attention_quantize_per_tensor(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor | None = None,
    nan_flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention without a mask, stored as int8: ``clip(round(softmax(q kᵀ / √D) v / s + z), -128, 127)`` per head.

    On Triton kernels the sums are float32, the softmax is rounded to the inputs' dtype before it meets v, as in
    FlashAttention-2 (arXiv 2307.08691), and nothing but the integers is written. That needs 16-bit inputs, a D that is
    a multiple of 8 from 16 to 128, and more than one token; others take torch's ``scaled_dot_product_attention``, then
    :func:`quantize_per_tensor`. NaN becomes -128.

    Args:
        q, k, v: ``[batch, tokens, heads, D]`` float16, bfloat16 or float32, all of one shape, e.g. the three parts of
            ``[batch, tokens, 3, heads, D]``, which are read where they are. Copied if a head does not begin at a
            multiple of 16 bytes.
        out_scale: 0-d float32 tensor, > 0, read on the device.
        out_zero_point: 0-d int32 tensor in -128..127, or None for symmetric quantization.
        nan_flag: one int32 element on the device of ``q``, shape ``[]`` or ``[1]``: becomes 1 if there is NaN in what
            is quantized; is left alone otherwise.

    Returns:
        int8 ``[batch, tokens, heads, D]``, contiguous.

    Raises:
        ArgumentError: a dtype, shape or device is not one of the above.
    """
    check_attention_quantize_per_tensor(q, k, v, out_scale, out_zero_point, nan_flag)
    return torch.ops.qandc.attention_quantize_per_tensor(q, k, v, out_scale, out_zero_point, nan_flag)
