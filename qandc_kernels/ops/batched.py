"""Define the public op for many small linear layers at once. For inference: the result carries no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._register import launcher, public_op

__all__ = ["batched_linear"]

LARGEST_ROWS = 64
batched_gemm_triton = launcher("batched.batched_gemm_triton")


def _batched_linear(x, weight, bias, share):
    if x.dtype == torch.float32 or x.shape[1] > LARGEST_ROWS:
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    x = x if x.stride(2) == 1 else x.contiguous()
    weight = weight if weight.stride()[1:] == (weight.shape[2], 1) else weight.contiguous()
    bias = bias if bias.stride(1) == 1 else bias.contiguous()
    with launching_on(x):
        return batched_gemm_triton(x, weight, bias, share)


batched_linear = public_op(
    reference.batched_linear,
    _batched_linear,
    lambda x, weight, *others: x.new_empty((x.shape[0], x.shape[1], weight.shape[1])),
)
