"""Define the public matrix products. All are for inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.ops._register import launcher, public_op

__all__ = [
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "linear_gelu_quantize",
    "linear_into_",
    "quantized_linear",
    "weight_only_linear",
]

LONG_ENOUGH = 256  # tokens, for a launch of each sample to be better than a copy
multiply, quantize = launcher("linear.multiply"), launcher("quantize.quantize_per_tensor_triton")


def _output(x, weight, *others, dtype=None):
    """Make memory for a product, ``[..., N]``, of the dtype of ``x`` if none is given."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _int8_matmul(xq, wq):
    return multiply(_output(xq, wq, dtype=torch.int32), xq, wq, None, None)


def _linear(xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype):
    out = _output(xq, weight, dtype=out_dtype)
    return multiply(out, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)


def _linear_gelu_quantize(
    xq, weight, x_scale, w_scale, out_scale, bias, out_zero_point, multiplier, x_zero_point, w_sum, beside, nan_flag
):
    out = _beside(xq, weight, beside, nan_flag)
    first = out.shape[-1] - weight.shape[0]
    if first:
        quantize(beside, out_scale, out_zero_point, 8, nan_flag, out[..., :first])
    multiply(
        out[..., first:], xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum,
        out_scale=out_scale, out_zero_point=out_zero_point, multiplier=multiplier,
    )  # fmt: skip
    return out


def _beside(xq, weight, *others):
    """Make memory for a product and the heads in front of it, the last of ``others`` but one."""
    first = 0 if others[-2] is None else others[-2].shape[-2:].numel()
    return xq.new_empty((*xq.shape[:-1], first + weight.shape[0]))


def _linear_into_(out, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum):
    operands = xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:  # not evenly spaced, as some tokens of several samples
        if out.ndim == 3 and out.shape[1] >= LONG_ENOUGH and not x_scale.ndim:
            for part, x in zip(out, xq, strict=True):
                multiply(part, x, *operands[1:])
        else:
            out.copy_(_linear(*operands, out_dtype=out.dtype))
    else:
        multiply(rows, *operands)


def _weight_only_linear(x, weight, w_scale, bias):
    if x.dtype == torch.float32:
        return reference.weight_only_linear(x, weight, w_scale, bias)
    return multiply(_output(x, weight), x, weight, None, w_scale, bias)


def _cast(x, weight, *others):
    return _output(x, weight, dtype=others[-1])


int8_matmul = public_op(reference.int8_matmul, _int8_matmul, lambda xq, wq: _output(xq, wq, dtype=torch.int32))
int8_linear = public_op(reference.int8_linear, _linear, _cast)
int4_linear = public_op(reference.int4_linear, _linear, _cast)
linear_gelu_quantize = public_op(reference.linear_gelu_quantize, _linear_gelu_quantize, _beside, writes=("nan_flag",))
linear_into_ = public_op(reference.linear_into_, _linear_into_, lambda *given: None, writes=("out",))
quantized_linear = public_op(
    reference.quantized_linear,
    launcher("linear.quantize_multiply"),
    lambda *given: _cast(*given[:-1]),
    writes=("nan_flag",),
    late_check=True,
)
weight_only_linear = public_op(reference.weight_only_linear, _weight_only_linear, _output)
