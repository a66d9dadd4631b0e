"""Check the arguments of each public op before any work: ``check_<op>`` takes what that op takes, or anything else."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qandc_kernels.errors import ArgumentError
from qandc_kernels.ops._operands import (
    FLOAT32,
    FLOAT_DTYPES,
    INT8,
    INT32,
    LARGEST_K,
    LARGEST_NUMBER,
    SCALAR,
    UINT8,
    check_activations,
    check_devices,
    check_dtype,
    check_elements,
    check_integer,
    check_linear,
    check_nan_flag,
    check_number,
    check_product,
    check_rows,
    check_scales,
    check_tensor,
    check_written,
    check_zero_point,
)

Function = TypeVar("Function", bound=Callable[..., Any])

RAISES = """Raises:
    ArgumentError: an argument has another type, dtype, shape, stride, device or value than is said above.
"""
LINEAR_NAMES = "xq weight x_scale w_scale bias x_zero_point w_sum"
QUANTIZED_NAMES = "x weight w_scale bias act_scale act_zero_point w_sum smoothing"
LARGEST_HEAD = 1024
GELU_NAMES = f"{LINEAR_NAMES} out_scale out_zero_point multiplier beside nan_flag"
RESIDUAL_NAMES = f"{LINEAR_NAMES} gate out_branch residual"


def checked(definition: Function) -> Function:
    """Return a function that calls ``check_<its name>``, then ``definition``, which stays there as ``__wrapped__``.

    Its docstring ends with the error that all of them raise.
    """
    check = globals()[f"check_{definition.__name__}"]

    @functools.wraps(definition)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return definition(*args, **kwargs)

    wrapper.__doc__ = f"{inspect.getdoc(definition)}\n\n{RAISES}"
    return wrapper  # type: ignore[return-value]


def check_int8_matmul(xq, wq):
    check_product("int8_matmul", xq, wq, INT8)
    check_devices("int8_matmul", "xq wq", xq, wq)


def check_int8_linear(xq, wq, x_scale, w_scale, bias=None, x_zero_point=None, w_sum=None, out_dtype=torch.bfloat16):
    check_linear("int8_linear", xq, wq, x_scale, w_scale, bias, x_zero_point, w_sum, INT8)
    check_devices("int8_linear", LINEAR_NAMES, xq, wq, x_scale, w_scale, bias, x_zero_point, w_sum)
    check_dtype("int8_linear", "out_dtype", out_dtype)


def check_int4_linear(
    xq, wq_packed, x_scale, w_scale, bias=None, x_zero_point=None, w_sum=None, out_dtype=torch.bfloat16
):
    check_linear("int4_linear", xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum, UINT8)
    check_devices("int4_linear", LINEAR_NAMES, xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum)
    check_dtype("int4_linear", "out_dtype", out_dtype)


def check_linear_gelu_quantize(
    xq, weight, x_scale, w_scale, out_scale, bias=None, out_zero_point=None, multiplier=None, x_zero_point=None,
    w_sum=None, beside=None, nan_flag=None,
):  # fmt: skip
    op = "linear_gelu_quantize"
    check_linear(op, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)
    check_tensor(op, "out_scale", out_scale, FLOAT32, SCALAR)
    check_zero_point(op, "out_zero_point", out_zero_point)
    if multiplier is not None:
        check_tensor(op, "multiplier", multiplier, FLOAT32, ((weight.shape[0],),))
    if beside is not None:
        _check_beside(op, "xq", xq, beside)
        check_elements(op, "the result", xq.shape[:-1].numel() * weight.shape[0] + beside.numel())
    operands = (xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum, out_scale, out_zero_point, multiplier, beside)
    check_nan_flag(op, nan_flag, GELU_NAMES, *operands)
    check_devices(op, GELU_NAMES, *operands, nan_flag)


def _check_beside(op, name, x, beside):
    """Check heads that belong to the rows of ``x``, and count the channels of a token."""
    check_tensor(op, "beside", beside, FLOAT_DTYPES)
    if beside.ndim != x.ndim + 1 or beside.shape[:-2] != x.shape[:-1]:
        raise ArgumentError(f"{op}: beside must be [..., heads, D] as {name} [..., K]; got {tuple(beside.shape)}")
    return beside.shape[-2:].numel()


def check_linear_into_(out, xq, weight, x_scale, w_scale, bias=None, x_zero_point=None, w_sum=None):
    op, names = "linear_into_", f"{LINEAR_NAMES} out"
    check_linear(op, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)
    check_tensor(op, "out", out, FLOAT_DTYPES, ((*xq.shape[:-1], weight.shape[0]),))
    operands = (xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)
    check_written(op, "out", out, names, *operands, contiguous=False)
    check_devices(op, names, *operands, out)


def check_linear_gate_residual_(
    residual, xq, weight, x_scale, w_scale, gate, bias=None, x_zero_point=None, w_sum=None, out_branch=None
):
    op = "linear_gate_residual_"
    check_linear(op, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)
    if xq.ndim != 3:
        raise ArgumentError(f"{op}: xq must be [samples, tokens, K]; got {tuple(xq.shape)}")
    (samples, tokens, _), n = xq.shape, weight.shape[0]
    check_tensor(op, "gate", gate, FLOAT_DTYPES, ((samples, n),))
    check_tensor(op, "residual", residual, FLOAT_DTYPES, ((samples, tokens, n),))
    inputs = (xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum, gate)
    if out_branch is not None:
        check_tensor(op, "out_branch", out_branch, FLOAT_DTYPES, ((samples, tokens, n),))
        check_written(op, "out_branch", out_branch, RESIDUAL_NAMES, *inputs)
    check_written(op, "residual", residual, RESIDUAL_NAMES, *inputs, out_branch)
    check_devices(op, RESIDUAL_NAMES, *inputs, out_branch, residual)


def check_quantized_linear(
    x, weight, w_scale, bias=None, act_scale=None, act_zero_point=None, w_sum=None, smoothing=None, bits=8,
    out_dtype=None, nan_flag=None,
):  # fmt: skip
    op = "quantized_linear"
    check_product(op, x, weight, (torch.int8, torch.uint8), "x", FLOAT_DTYPES)
    check_scales(op, x, weight, w_scale, bias)
    if act_scale is not None:
        check_tensor(op, "act_scale", act_scale, FLOAT32, SCALAR)
    elif act_zero_point is not None:
        raise ArgumentError(f"{op}: act_zero_point needs an act_scale; give both, or neither for a scale per token")
    check_zero_point(op, "act_zero_point", act_zero_point)
    if w_sum is not None:
        check_tensor(op, "w_sum", w_sum, FLOAT32 if w_scale.ndim == 2 else INT32, ((weight.shape[0],),))
    if smoothing is not None:
        check_tensor(op, "smoothing", smoothing, FLOAT32, ((x.shape[-1],),))
    check_integer(op, "bits", bits, 2, 8)
    if out_dtype is not None:
        check_dtype(op, "out_dtype", out_dtype)
    operands = (x, weight, w_scale, bias, act_scale, act_zero_point, w_sum, smoothing)
    check_nan_flag(op, nan_flag, QUANTIZED_NAMES, *operands)
    check_devices(op, f"{QUANTIZED_NAMES} nan_flag", *operands, nan_flag)


def check_weight_only_linear(x, weight, w_scale, bias=None):
    op = "weight_only_linear"
    check_product(op, x, weight, (torch.int8, torch.uint8), "x", FLOAT_DTYPES)
    check_scales(op, x, weight, w_scale, bias)
    check_devices(op, "x weight w_scale bias", x, weight, w_scale, bias)


def check_quantize_per_tensor(x, scale, zero_point=None, bits=8, nan_flag=None):
    op = "quantize_per_tensor"
    check_activations(op, x)
    check_tensor(op, "scale", scale, FLOAT32, SCALAR)
    check_zero_point(op, "zero_point", zero_point)
    check_nan_flag(op, nan_flag, "x scale zero_point", x, scale, zero_point)
    check_integer(op, "bits", bits, 2, 8)
    check_devices(op, "x scale zero_point nan_flag", x, scale, zero_point, nan_flag)


def check_quantize_per_token(x, bits=8, token_dims=1):
    check_activations("quantize_per_token", x, token_dims)
    check_integer("quantize_per_token", "bits", bits, 2, 8)


def check_gelu_quantize_per_token(x, multiplier=None, beside=None):
    op, first = "gelu_quantize_per_token", 0
    check_activations(op, x)
    if multiplier is not None:
        check_tensor(op, "multiplier", multiplier, FLOAT32, (tuple(x.shape[-1:]),))
    if beside is not None:
        first = _check_beside(op, "x", x, beside)
    if first + x.shape[-1] > LARGEST_K:
        raise ArgumentError(f"{op}: a token has at most {LARGEST_K} channels; got {first} + {x.shape[-1]}")
    check_devices(op, "x multiplier beside", x, multiplier, beside)


def _check_adaln(op, x, shift, scale, eps, out_x, q_scale=None, zero_point=None):
    check_tensor(op, "x", x, FLOAT_DTYPES)
    if x.ndim != 3 or not 0 < x.shape[2] <= LARGEST_K:
        raise ArgumentError(f"{op}: x must be [samples, tokens, K] with K from 1 to {LARGEST_K}; got {tuple(x.shape)}")
    check_rows(op, "x", x.shape[:-1].numel())
    vectors = ((x.shape[0], x.shape[2]),)
    check_tensor(op, "shift", shift, FLOAT_DTYPES, vectors)
    check_tensor(op, "scale", scale, FLOAT_DTYPES, vectors)
    check_number(op, "eps", eps, 0.0, "a finite number >= 0")
    names, operands = "x shift scale q_scale zero_point", (x, shift, scale, q_scale, zero_point)
    if out_x is not None:
        check_tensor(op, "out_x", out_x, FLOAT_DTYPES, (tuple(x.shape),))
        check_written(op, "out_x", out_x, names, *operands)
    check_devices(op, f"{names} out_x", *operands, out_x)


def check_adaln_quantize_per_tensor(x, shift, scale, q_scale, zero_point=None, eps=1e-6, out_x=None):
    op = "adaln_quantize_per_tensor"
    check_tensor(op, "q_scale", q_scale, FLOAT32, SCALAR)
    check_zero_point(op, "zero_point", zero_point)
    _check_adaln(op, x, shift, scale, eps, out_x, q_scale, zero_point)


def check_adaln_quantize_per_token(x, shift, scale, eps=1e-6, out_x=None):
    _check_adaln("adaln_quantize_per_token", x, shift, scale, eps, out_x)


def check_attention_quantize_per_tensor(q, k, v, out_scale, out_zero_point=None, nan_flag=None, key_bias=None):
    op, names = "attention_quantize_per_tensor", "q k v out_scale out_zero_point key_bias"
    check_tensor(op, "q", q, FLOAT_DTYPES)
    if q.ndim != 4 or q.shape[3] == 0:
        raise ArgumentError(f"{op}: q must be [batch, tokens, heads, D] with D > 0; got {tuple(q.shape)}")
    check_rows(op, "q", q.shape[:3].numel())
    check_tensor(op, "k", k, (q.dtype,))
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ArgumentError(
            f"{op}: k must be [batch, keys, heads, D] of the batch, heads and D of q, {tuple(q.shape)}; "
            f"got {tuple(k.shape)}"
        )
    check_rows(op, "k", k.shape[:3].numel())
    check_tensor(op, "v", v, (q.dtype,), (tuple(k.shape),))
    check_tensor(op, "out_scale", out_scale, FLOAT32, SCALAR)
    check_zero_point(op, "out_zero_point", out_zero_point)
    if key_bias is not None:
        check_tensor(op, "key_bias", key_bias, FLOAT_DTYPES, (tuple(k.shape[:2]),))
    operands = q, k, v, out_scale, out_zero_point, key_bias
    check_nan_flag(op, nan_flag, names, *operands)
    check_devices(op, f"{names} nan_flag", *operands, nan_flag)


def check_qk_norm_rope_(qkv, q_weight, k_weight, cos, sin, eps=1e-6):
    op, names = "qk_norm_rope_", "q_weight k_weight cos sin qkv"
    check_tensor(op, "qkv", qkv, FLOAT_DTYPES)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] not in range(2, LARGEST_HEAD + 1, 2):
        raise ArgumentError(
            f"{op}: qkv must be [samples, tokens, 3, heads, D] with an even D from 2 to {LARGEST_HEAD}; "
            f"got {tuple(qkv.shape)}"
        )
    check_rows(op, "qkv", qkv.shape[:-1].numel())
    tokens, width = qkv.shape[1], qkv.shape[4]
    check_tensor(op, "q_weight", q_weight, FLOAT_DTYPES, ((width,),))
    check_tensor(op, "k_weight", k_weight, FLOAT_DTYPES, ((width,),))
    if cos is not None or sin is not None:
        check_tensor(op, "cos", cos, FLOAT32, ((tokens, width), (tokens, width // 2)))
        check_tensor(op, "sin", sin, FLOAT32, (tuple(cos.shape),))
    check_number(op, "eps", eps, 0.0, "a finite number >= 0")
    check_written(op, "qkv", qkv, names, q_weight, k_weight, cos, sin, contiguous=False)
    check_devices(op, names, q_weight, k_weight, cos, sin, qkv)


def check_corrected_gates(gates, gains, offsets):
    op = "corrected_gates"
    check_tensor(op, "gates", gates, FLOAT_DTYPES)
    if gates.ndim != 4:
        raise ArgumentError(f"{op}: gates must be [L, K, samples, D]; got {tuple(gates.shape)}")
    layers, branches, _, width = gates.shape
    for name, tensor in (("gains", gains), ("offsets", offsets)):
        check_tensor(op, name, tensor, FLOAT32, ((layers, branches, width),))
        if not tensor.is_contiguous():
            raise ArgumentError(f"{op}: {name} must be contiguous; got strides {tensor.stride()}")
    check_devices(op, "gates gains offsets", gates, gains, offsets)


def check_gated_sum(x, features, gates=None, weights=None, scales=None, offset=None):
    op = "gated_sum"
    check_tensor(op, "x", x, FLOAT_DTYPES)
    check_tensor(op, "features", features, (*FLOAT_DTYPES, torch.int8))
    if x.ndim != 3 or features.ndim != 6 or features.shape[3:] != x.shape:
        raise ArgumentError(
            f"{op}: x must be [samples, tokens, D] and features [S, L, K, samples, tokens, D]; "
            f"got {tuple(x.shape)} and {tuple(features.shape)}"
        )
    check_rows(op, "x", x.shape[:-1].numel())
    sets, layers, branches, samples, _, width = features.shape
    if gates is not None:
        check_tensor(op, "gates", gates, FLOAT_DTYPES, ((layers, branches, samples, width),))
    if weights is not None:
        check_tensor(op, "weights", weights, FLOAT32, ((sets,),))
    if (features.dtype == torch.int8) != (scales is not None):
        raise ArgumentError(f"{op}: int8 features need scales, and only they; got features of {features.dtype}")
    if scales is not None:
        check_tensor(op, "scales", scales, FLOAT32, (tuple(features.shape[:5]),))
    if offset is not None:
        check_tensor(op, "offset", offset, FLOAT32, ((samples, width),))
    for name, tensor in (("features", features), ("scales", scales), ("weights", weights)):
        if tensor is not None and not tensor.is_contiguous():
            raise ArgumentError(f"{op}: {name} must be contiguous; got strides {tensor.stride()}")
    check_devices(op, "x features gates weights scales offset", x, features, gates, weights, scales, offset)


def check_guided_step(prediction, latents, coefficients, guidance_scale=None):
    op = "guided_step"
    check_tensor(op, "latents", latents, FLOAT32)
    check_tensor(op, "prediction", prediction, FLOAT_DTYPES)
    rows = latents.shape[0] * (1 if guidance_scale is None else 2) if latents.ndim else 0
    if (
        latents.ndim != 4
        or prediction.ndim != 4
        or prediction.shape[::2] != (rows, latents.shape[2])
        or prediction.shape[3] != latents.shape[3]
        or prediction.shape[1] < latents.shape[1]
    ):
        times = "B" if guidance_scale is None else "2 B"
        raise ArgumentError(
            f"{op}: latents must be [B, C, H, W] and prediction [{times}, C or more, H, W]; "
            f"got {tuple(latents.shape)} and {tuple(prediction.shape)}"
        )
    check_rows(op, "prediction", prediction.shape[:-1].numel())
    check_tensor(op, "coefficients", coefficients, FLOAT32, ((3, latents.shape[1]),))
    if guidance_scale is not None:
        check_number(op, "guidance_scale", guidance_scale, -LARGEST_NUMBER, "a finite number or None")
    check_devices(op, "prediction latents coefficients", prediction, latents, coefficients)


def check_batched_linear(x, weight, bias, share=1.0):
    op = "batched_linear"
    check_tensor(op, "x", x, FLOAT_DTYPES)
    check_tensor(op, "weight", weight, (x.dtype,))
    if x.ndim != 3 or weight.ndim != 3 or x.shape[::2] != weight.shape[::2] or not 0 < x.shape[2] <= LARGEST_K:
        raise ArgumentError(
            f"{op}: x must be [L, M, K] and weight [L, N, K] with K from 1 to {LARGEST_K}; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_rows(op, "x", x.shape[:-1].numel())
    check_elements(op, "the result", x.shape[:-1].numel() * weight.shape[1])
    check_tensor(op, "bias", bias, (x.dtype,), (tuple(weight.shape[:2]),))
    check_number(op, "share", share, math.ulp(0.0), "a finite number > 0")
    check_devices(op, "x weight bias", x, weight, bias)
