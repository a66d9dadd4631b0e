"""The public ops: argument checks, torch.library schemas, fake implementations, choice of Triton or reference.

All are for inference: results carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qandc_kernels import reference
from qandc_kernels.backend import select_backend
from qandc_kernels.packing import unpack_int4

__all__ = [
    "FLOAT_DTYPES",
    "LARGEST_K",
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "quantize_per_tensor",
    "quantize_per_token",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# |acc| <= 2 · K · 128 · 128 with the term of a zero point within int8: int32 holds it up to here
LARGEST_K = 65535


def _use_triton(x: torch.Tensor) -> bool:
    return select_backend(x.device).name == "triton"


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` as ``[M, K]``; a view where strides allow and the kernels' int32 offsets along K suffice."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x


# --- quantization -----------------------------------------------------------------------------------------------------


def _quantize_per_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    if not _use_triton(x):
        return reference.quantize_per_tensor(x, scale, zero_point, bits)
    from qandc_kernels.quantize import quantize_per_tensor_triton

    with torch.cuda.device(x.device):
        return quantize_per_tensor_triton(_rows(x), scale, zero_point, bits).view(x.shape)


def _quantize_per_tensor_fake(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _quantize_per_token(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not _use_triton(x):
        return reference.quantize_per_token(x, bits)
    from qandc_kernels.quantize import quantize_per_token_triton

    with torch.cuda.device(x.device):
        q, scale = quantize_per_token_triton(_rows(x), bits)
    return q.view(x.shape), scale.view(x.shape[:-1])


def _quantize_per_token_fake(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


# --- products ---------------------------------------------------------------------------------------------------------


def _int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    if not _use_triton(xq):
        return reference.int8_matmul(xq, wq)
    from qandc_kernels.int8_gemm import int8_gemm_triton

    with torch.cuda.device(xq.device):
        return int8_gemm_triton(_rows(xq), _rows(wq)).view(*xq.shape[:-1], wq.shape[0])


def _int8_matmul_fake(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    return xq.new_empty(*xq.shape[:-1], wq.shape[0], dtype=torch.int32)


def _int8_linear(
    xq: torch.Tensor,
    wq: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    w_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if not _use_triton(xq):
        return reference.int8_linear(xq, wq, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
    from qandc_kernels.int8_gemm import int8_gemm_triton

    if x_zero_point is not None and w_sum is None:
        w_sum = wq.sum(1, dtype=torch.int32)
    with torch.cuda.device(xq.device):
        out = int8_gemm_triton(
            _rows(xq),
            _rows(wq),
            x_scale if x_scale.ndim == 0 else x_scale.reshape(-1).contiguous(),
            w_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            x_zero_point,
            None if w_sum is None else w_sum.contiguous(),
            out_dtype,
        )
    return out.view(*xq.shape[:-1], wq.shape[0])


def _int4_linear(
    xq: torch.Tensor,
    wq_packed: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    w_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if not _use_triton(xq):
        return reference.int4_linear(xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
    # the product runs on the int8 kernel, after a pass that unpacks the weight in memory
    return _int8_linear(xq, unpack_int4(wq_packed), x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)


def _linear_fake(
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    w_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return xq.new_empty(*xq.shape[:-1], weight.shape[0], dtype=out_dtype)


_LINEAR_SCHEMA = (
    "(Tensor xq, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor? bias, Tensor? x_zero_point, Tensor? w_sum, "
    "ScalarType out_dtype) -> Tensor"
)
_OPS: list[tuple[str, str, Callable[..., Any], Callable[..., Any]]] = [
    (
        "quantize_per_tensor",
        "(Tensor x, Tensor scale, Tensor? zero_point, int bits) -> Tensor",
        _quantize_per_tensor,
        _quantize_per_tensor_fake,
    ),
    (
        "quantize_per_token",
        "(Tensor x, int bits) -> (Tensor, Tensor)",
        _quantize_per_token,
        _quantize_per_token_fake,
    ),
    ("int8_matmul", "(Tensor xq, Tensor wq) -> Tensor", _int8_matmul, _int8_matmul_fake),
    ("int8_linear", _LINEAR_SCHEMA, _int8_linear, _linear_fake),
    ("int4_linear", _LINEAR_SCHEMA, _int4_linear, _linear_fake),
]
_LIBRARY = torch.library.Library("qandc", "FRAGMENT")  # kept: its registrations end with it
for _name, _schema, _implementation, _fake in _OPS:
    torch.library.define(f"qandc::{_name}", _schema)
    torch.library.impl(f"qandc::{_name}", "default", _implementation)
    torch.library.register_fake(f"qandc::{_name}", _fake)
    # without this torch would mark results as differentiable and give zeros in the backward pass
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# --- argument checks --------------------------------------------------------------------------------------------------


def _check_tensor(
    op: str, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...] = ()
) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}; got {str(tensor.dtype).removeprefix('torch.')}")
    if shapes and not any(tensor.shape == shape for shape in shapes):
        allowed = " or ".join(str(tuple(s)) for s in shapes)
        raise ValueError(f"{op}: {name} must have shape {allowed}; got {tuple(tensor.shape)}")


def _check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {where}")


def _check_bits(op: str, bits: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits must be an integer from 2 to 8; got {bits!r}")


def _check_activations(op: str, x: torch.Tensor) -> None:
    _check_tensor(op, "x", x, FLOAT_DTYPES)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
    if x.shape[-1] > LARGEST_K:
        raise ValueError(f"{op}: the last dimension of x is {x.shape[-1]}; allowed are up to {LARGEST_K}")


def _check_linear(
    op: str,
    xq: torch.Tensor,
    weight: torch.Tensor,
    weight_dtype: torch.dtype,
    values_per_byte: int,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    w_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    _check_product(op, xq, weight, weight_dtype, values_per_byte)
    n = weight.shape[0]
    _check_tensor(op, "x_scale", x_scale, (torch.float32,), ((), xq.shape[:-1]))
    _check_tensor(op, "w_scale", w_scale, (torch.float32,), ((n,),))
    if bias is not None:
        _check_tensor(op, "bias", bias, FLOAT_DTYPES, ((n,),))
    if x_zero_point is not None:
        _check_tensor(op, "x_zero_point", x_zero_point, (torch.int32,), ((),))
    if w_sum is not None:
        _check_tensor(op, "w_sum", w_sum, (torch.int32,), ((n,),))
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be float16, bfloat16 or float32; got {out_dtype}")
    _check_devices(
        op, xq=xq, weight=weight, x_scale=x_scale, w_scale=w_scale, bias=bias, x_zero_point=x_zero_point, w_sum=w_sum
    )


def _check_product(
    op: str, xq: torch.Tensor, weight: torch.Tensor, weight_dtype: torch.dtype, values_per_byte: int
) -> None:
    _check_tensor(op, "xq", xq, (torch.int8,))
    name = "wq_packed" if values_per_byte == 2 else "wq"
    _check_tensor(op, name, weight, (weight_dtype,))
    if xq.ndim == 0 or weight.ndim != 2 or xq.shape[-1] != weight.shape[1] * values_per_byte:
        allowed = "[N, K/2]" if values_per_byte == 2 else "[N, K]"
        raise ValueError(
            f"{op}: xq [..., K] and {name} {allowed} must agree in K; got {tuple(xq.shape)} and {tuple(weight.shape)}"
        )
    if xq.shape[-1] > LARGEST_K:
        raise ValueError(f"{op}: K is {xq.shape[-1]}; int32 accumulators are exact up to K = {LARGEST_K}")


# --- public functions -------------------------------------------------------------------------------------------------


def quantize_per_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, bits: int = 8
) -> torch.Tensor:
    """Quantize with one given scale: ``q = clip(round(x · (1/s)) + z, -2^(b-1), 2^(b-1) - 1)``.

    Source: Q&C (arXiv 2503.02508) Eq. 1, with the division written as a product so that all devices round alike.
    Rounding is half to even. NaN becomes the zero point; infinities saturate.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        scale: 0-d float32 tensor on the device of ``x``, > 0. Read on the device: no synchronization.
        zero_point: 0-d int32 tensor within -2^(b-1)..2^(b-1) - 1, or None for symmetric quantization.
        bits: 2 to 8; fewer than 8 still fill an int8 tensor.

    Returns:
        int8, shape of ``x``, contiguous.

    Raises:
        TypeError, ValueError: a dtype, shape, device or bit width is not one of the above.
    """
    op = "quantize_per_tensor"
    _check_activations(op, x)
    _check_tensor(op, "scale", scale, (torch.float32,), ((),))
    if zero_point is not None:
        _check_tensor(op, "zero_point", zero_point, (torch.int32,), ((),))
    _check_bits(op, bits)
    _check_devices(op, x=x, scale=scale, zero_point=zero_point)
    return torch.ops.qandc.quantize_per_tensor(x, scale, zero_point, bits)


def quantize_per_token(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row with its own scale: ``s = max_k |x_k| / qmax``, ``q = round(x · (1/s))``, qmax = 2^(b-1) - 1.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        bits: 2 to 8.

    Returns:
        ``q [..., K] int8`` and ``scale [...] float32``. A row of zeros gets zeros and a tiny positive scale, a
        row with NaN the scale NaN.

    Raises:
        TypeError, ValueError: a dtype, shape or bit width is not one of the above.
    """
    op = "quantize_per_token"
    _check_activations(op, x)
    _check_bits(op, bits)
    return torch.ops.qandc.quantize_per_token(x, bits)


def int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """The exact accumulators ``acc[..., n] = Σ_k xq[..., k] · wq[n, k]``.

    Args:
        xq: ``[..., K] int8``, K <= 65535.
        wq: ``[N, K] int8``.

    Returns:
        int32 ``[..., N]``.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not one of the above.
    """
    _check_product("int8_matmul", xq, wq, torch.int8, 1)
    _check_devices("int8_matmul", xq=xq, wq=wq)
    return torch.ops.qandc.int8_matmul(xq, wq)


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
    """W8A8 linear layer: ``y[..., n] = (Σ_k xq wq - z Σ_k wq) · s_x · s_w[n] + bias[n]``.

    The sum is exact in int32, scaled in float32 and cast last. The zero point of asymmetric activations costs one
    multiply per output: ``Σ_k (xq - z) wq = Σ_k xq wq - z Σ_k wq``, and ``Σ_k wq`` is a constant of the layer.

    Args:
        xq: ``[..., K] int8`` activations, any strides, K <= 65535.
        wq: ``[N, K] int8`` weight.
        x_scale: float32, 0-d (per tensor) or ``[...]`` (per token).
        w_scale: ``[N] float32``, per output channel.
        bias: ``[N]`` float16, bfloat16 or float32.
        x_zero_point: 0-d int32 in -128..127, per tensor.
        w_sum: ``[N] int32``, ``wq.sum(1)``; computed here if a zero point is given without it.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        ``[..., N]`` of ``out_dtype``, contiguous.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not one of the above.
    """
    _check_linear("int8_linear", xq, wq, torch.int8, 1, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
    return torch.ops.qandc.int8_linear(xq, wq, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)


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
    """W4A8 linear layer: :func:`int8_linear` with a weight packed by :func:`qandc_kernels.pack_int4`.

    Args:
        wq_packed: ``[N, K/2] uint8``; the layout is drawn in :mod:`qandc_kernels.packing`.

    All else, results and errors are those of :func:`int8_linear`. The weight is unpacked to int8 in memory before the
    product.
    """
    _check_linear("int4_linear", xq, wq_packed, torch.uint8, 2, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
    return torch.ops.qandc.int4_linear(xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
