"""Define the public ops that make int8 activations. All are for inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._register import launcher, public_op

__all__ = [
    "adaln_quantize_per_tensor",
    "adaln_quantize_per_token",
    "gelu_quantize_per_token",
    "quantize_per_tensor",
    "quantize_per_token",
]


adaln_quantize_triton = launcher("adaln.adaln_quantize_triton")


def _adaln(x, shift, scale, q_scale, zero_point, eps, out_x=None):
    samples, tokens, k = x.shape
    rows = x.reshape(samples * tokens, k)  # a view where rows are evenly spaced
    rows, shift, scale = (t if t.stride(1) == 1 or k == 1 else t.contiguous() for t in (rows, shift, scale))
    with launching_on(x):
        q, token_scale = adaln_quantize_triton(rows, tokens, shift, scale, q_scale, zero_point, eps, out_x)
    return q.view(x.shape), None if token_scale is None else token_scale.view(samples, tokens)


def _per_tensor(x, *others):
    return x.new_empty(x.shape, dtype=torch.int8)


def _per_token(x, token_dims=1):
    return _per_tensor(x), x.new_empty(x.shape[: x.ndim - token_dims], dtype=torch.float32)


def _gelu_per_token(x, multiplier, beside):
    first = 0 if beside is None else beside.shape[-2:].numel()
    return _per_token(x.new_empty((*x.shape[:-1], first + x.shape[-1])))


quantize_per_tensor = public_op(
    reference.quantize_per_tensor, launcher("quantize.quantize_per_tensor_triton"), _per_tensor, writes=("nan_flag",)
)
quantize_per_token = public_op(
    reference.quantize_per_token,
    launcher("quantize.quantize_per_token_triton"),
    lambda x, bits, token_dims: _per_token(x, token_dims),
)
gelu_quantize_per_token = public_op(
    reference.gelu_quantize_per_token, launcher("quantize.gelu_quantize_per_token_triton"), _gelu_per_token
)
adaln_quantize_per_tensor = public_op(
    reference.adaln_quantize_per_tensor, lambda *given: _adaln(*given)[0], _per_tensor, writes=("out_x",)
)
adaln_quantize_per_token = public_op(
    reference.adaln_quantize_per_token,
    lambda x, shift, scale, eps, out_x: _adaln(x, shift, scale, None, None, eps, out_x),
    lambda x, *others: _per_token(x),
    writes=("out_x",),
)
