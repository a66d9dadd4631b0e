"""Define the public op for attention with an int8 output. For inference: the result carries no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._operands import HALF_DTYPES
from qandc_kernels.ops._register import launcher, public_op

__all__ = ["attention_quantize_per_tensor"]

HEAD_DIMS = range(16, 129, 8)
LARGEST_GRID = 65535  # along the second and third dimension
attention_quantize_triton = launcher("attention.attention_quantize_triton")


def _aligned(t):
    """Tell whether each head of a token begins at a multiple of 16 bytes, and int32 offsets within a sample suffice."""
    strides = t.stride()
    return (
        strides[3] == 1
        and all(stride % 8 == 0 for stride in strides[:3])
        and t.data_ptr() % 16 == 0
        and t.shape[1] * strides[1] < 2**31
    )


def _attention(q, k, v, out_scale, out_zero_point, nan_flag, key_bias):
    # of one key the kernel has no loop, which ptxas 12.8 turns into reads outside of shared memory
    batch, _, heads, width = q.shape
    if q.dtype not in HALF_DTYPES or width not in HEAD_DIMS or k.shape[1] <= 1 or max(batch, heads) > LARGEST_GRID:
        y = reference.attention(q, k, v, key_bias)
        out = torch.ops.qandc.quantize_per_tensor(y, out_scale, out_zero_point, 8, nan_flag)
        return out.masked_fill_(y.isnan(), -128)  # as the kernel and the reference
    q, k, v = (t if _aligned(t) else t.contiguous() for t in (q, k, v))
    with launching_on(q):
        return attention_quantize_triton(q, k, v, out_scale, out_zero_point, nan_flag, key_bias)


attention_quantize_per_tensor = public_op(
    reference.attention_quantize_per_tensor,
    _attention,
    lambda q, *others: q.new_empty(q.shape, dtype=torch.int8),
    writes=("nan_flag",),
)
