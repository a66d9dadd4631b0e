"""The public matrix products. All are for inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.ops._checks import (
    check_int4_linear,
    check_int8_linear,
    check_int8_matmul,
    check_linear_gelu_quantize,
    check_quantized_linear,
    check_weight_only_linear,
)
from qandc_kernels.ops._register import register

__all__ = [
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "linear_gelu_quantize",
    "quantized_linear",
    "weight_only_linear",
]

Tensor = torch.Tensor
MaybeTensor = torch.Tensor | None


def _int8_matmul(xq: Tensor, wq: Tensor) -> Tensor:
    from qandc_kernels.triton.linear import multiply

    return multiply(_int8_matmul_fake(xq, wq), xq, wq, None, None)


def _int8_matmul_fake(xq: Tensor, wq: Tensor) -> Tensor:
    return xq.new_empty(*xq.shape[:-1], wq.shape[0], dtype=torch.int32)


def _linear(
    xq: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: MaybeTensor,
    x_zero_point: MaybeTensor,
    w_sum: MaybeTensor,
    out_dtype: torch.dtype,
) -> Tensor:
    from qandc_kernels.triton.linear import multiply

    out = xq.new_empty(*xq.shape[:-1], weight.shape[0], dtype=out_dtype)
    return multiply(out, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)


def _linear_fake(
    xq: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: MaybeTensor,
    x_zero_point: MaybeTensor,
    w_sum: MaybeTensor,
    out_dtype: torch.dtype,
) -> Tensor:
    return xq.new_empty(*xq.shape[:-1], weight.shape[0], dtype=out_dtype)


def _linear_gelu_quantize(
    xq: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    bias: MaybeTensor,
    out_zero_point: MaybeTensor,
    multiplier: MaybeTensor,
    x_zero_point: MaybeTensor,
    w_sum: MaybeTensor,
) -> Tensor:
    from qandc_kernels.triton.linear import multiply

    out = xq.new_empty(*xq.shape[:-1], weight.shape[0])
    return multiply(
        out, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum,
        out_scale=out_scale, out_zero_point=out_zero_point, multiplier=multiplier,
    )  # fmt: skip


def _same_dtype_fake(x: Tensor, weight: Tensor, *others: MaybeTensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _weight_only_linear(x: Tensor, weight: Tensor, w_scale: Tensor, bias: MaybeTensor) -> Tensor:
    if x.dtype == torch.float32:
        return reference.weight_only_linear(x, weight, w_scale, bias)
    from qandc_kernels.triton.linear import multiply

    return multiply(x.new_empty(*x.shape[:-1], weight.shape[0]), x, weight, None, w_scale, bias)


def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: MaybeTensor,
    act_scale: MaybeTensor,
    act_zero_point: MaybeTensor,
    w_sum: MaybeTensor,
    smoothing: MaybeTensor,
    bits: int,
    out_dtype: torch.dtype | None,
    nan_flag: MaybeTensor,
) -> Tensor:
    from qandc_kernels.triton.linear import quantize_multiply

    dtype = x.dtype if out_dtype is None else out_dtype
    return quantize_multiply(
        x, weight, w_scale, bias, act_scale, act_zero_point, w_sum, smoothing, bits, dtype, nan_flag
    )


def _quantized_linear_fake(x: Tensor, weight: Tensor, *others: object) -> Tensor:
    dtype = others[7]
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype if isinstance(dtype, torch.dtype) else x.dtype)


register("int8_matmul", "(Tensor xq, Tensor wq) -> Tensor", _int8_matmul, _int8_matmul_fake)
for _name in ("int8_linear", "int4_linear"):
    register(
        _name,
        "(Tensor xq, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor? bias, Tensor? x_zero_point, "
        "Tensor? w_sum, ScalarType out_dtype) -> Tensor",
        _linear,
        _linear_fake,
    )
register(
    "linear_gelu_quantize",
    "(Tensor xq, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor out_scale, Tensor? bias, "
    "Tensor? out_zero_point, Tensor? multiplier, Tensor? x_zero_point, Tensor? w_sum) -> Tensor",
    _linear_gelu_quantize,
    _same_dtype_fake,
)
register(
    "quantized_linear",
    "(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias, Tensor? act_scale, Tensor? act_zero_point, "
    "Tensor? w_sum, Tensor? smoothing, int bits, ScalarType? out_dtype, Tensor(a!)? nan_flag) -> Tensor",
    _quantized_linear,
    _quantized_linear_fake,
)
register(
    "weight_only_linear",
    "(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias) -> Tensor",
    _weight_only_linear,
    _same_dtype_fake,
)


def int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """The exact accumulators ``acc[..., n] = Σ_k xq[..., k] · wq[n, k]``.

    Args:
        xq: ``[..., K] int8``, K <= 65535.
        wq: ``[N, K] int8``.

    Returns:
        int32 ``[..., N]``.

    Raises:
        ArgumentError: a dtype, shape or device is not one of the above.
    """
    check_int8_matmul(xq, wq)
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

    The sum is exact in int32, scaled in float32 and cast last. The zero point of asymmetric activations costs nothing
    in the loop: ``Σ_k (xq - z) wq = Σ_k xq wq - z Σ_k wq``, and ``Σ_k wq`` is a constant of the layer.

    Args:
        xq: ``[..., K] int8`` activations, any strides, K <= 65535.
        wq: ``[N, K] int8`` weight.
        x_scale: float32, 0-d (per tensor; read on the device) or ``[...]`` (per token).
        w_scale: ``[N] float32``, per output channel.
        bias: ``[N]`` float16, bfloat16 or float32.
        x_zero_point: 0-d int32 in -128..127, per tensor.
        w_sum: ``[N] int32``, ``wq.sum(1)``; computed here if a zero point is given without it.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        ``[..., N]`` of ``out_dtype``, contiguous.

    Raises:
        ArgumentError: a dtype, shape or device is not one of the above.
    """
    check_int8_linear(xq, wq, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
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

    The weight is unpacked in registers, on its way to the tensor cores. With scales per group the integer sums of the
    groups are scaled and added in float32.

    Args:
        wq_packed: ``[N, K/2] uint8``; the layout is drawn in :mod:`qandc_kernels.packing`.
        w_scale: float32 ``[N]``, or ``[N, K/G]`` for groups of G = 32, 64 or 128 along K (then K a multiple of 64).
        w_sum: ``[N] int32``, the sums of the unpacked weight; with groups ``[N] float32``, sums of ``q · s_w``.

    All else is as in :func:`int8_linear`.
    """
    check_int4_linear(xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)
    return torch.ops.qandc.int4_linear(xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum, out_dtype)


def linear_gelu_quantize(
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer, GELU and quantization for the next layer: ``clip(round(gelu(y) · multiplier / s_out + z_out))``.

    ``y`` is that of :func:`int8_linear` or :func:`int4_linear`, in float32; GELU is the tanh form. Outputs equal those
    of float64 except where it comes within 1e-3 of a rounding boundary. NaN becomes -128.

    Args:
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        out_scale: 0-d float32 tensor, > 0, read on the device.
        out_zero_point: 0-d int32 tensor in -128..127.
        multiplier: ``[N] float32``, one factor per output channel, e.g. of smoothing.

    Returns:
        ``[..., N] int8``, contiguous. All else as :func:`int8_linear` and :func:`int4_linear`.

    Raises:
        ArgumentError: a dtype, shape or device is not one of the above.
    """
    check_linear_gelu_quantize(
        xq, weight, x_scale, w_scale, out_scale, bias, out_zero_point, multiplier, x_zero_point, w_sum
    )
    return torch.ops.qandc.linear_gelu_quantize(
        xq, weight, x_scale, w_scale, out_scale, bias, out_zero_point, multiplier, x_zero_point, w_sum
    )


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    act_scale: torch.Tensor | None = None,
    act_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
    smoothing: torch.Tensor | None = None,
    bits: int = 8,
    out_dtype: torch.dtype | None = None,
    nan_flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize activations and multiply: all that a quantized layer does, in one call.

    ``x · (1/smoothing)`` is quantized with a scale per token (:func:`quantize_per_token`) or, where there is an
    ``act_scale``, with that (:func:`quantize_per_tensor`), and multiplied as in :func:`int8_linear` or
    :func:`int4_linear`. On a GPU this costs the host half of what the two calls cost.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        act_scale, act_zero_point: 0-d float32 and int32, read on the device; None for a scale per token.
        smoothing: ``[K] float32``, > 0.
        bits: 2 to 8, of the activations.
        out_dtype: float16, bfloat16 or float32; None for that of ``x``.
        nan_flag: one element int32, set to 1 if NaN in ``x`` meets an ``act_scale``, which hides it.

    Returns:
        ``[..., N]`` of ``out_dtype``, contiguous. All else as :func:`int8_linear` and :func:`int4_linear`.

    Raises:
        ArgumentError: a dtype, shape, device or bit width is not one of the above.
    """
    operands = (x, weight, w_scale, bias, act_scale, act_zero_point, w_sum, smoothing, bits, out_dtype, nan_flag)
    if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or not x.is_cuda:
        check_quantized_linear(*operands)
        return torch.ops.qandc.quantized_linear(*operands)
    try:  # on a GPU operands of a kind are checked the first time
        return torch.ops.qandc.quantized_linear(*operands)
    except (TypeError, RuntimeError):
        check_quantized_linear(*operands)
        raise


def weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """W8A16 or W4A16 linear layer, for activations that must stay precise: ``y = Σ_k x wq · s_w + bias``.

    The weight is converted in registers, products are summed in float32 and cast last. There is no kernel for float32
    activations: torch multiplies them with a float32 copy of the weight, which lives as long as the call.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        w_scale: float32 ``[N]``, or for int4 ``[N, K/G]``, groups as in :func:`int4_linear`.
        bias: ``[N]`` float16, bfloat16 or float32.

    Returns:
        ``[..., N]`` of the dtype of ``x``, contiguous.

    Raises:
        ArgumentError: a dtype, shape or device is not one of the above.
    """
    check_weight_only_linear(x, weight, w_scale, bias)
    return torch.ops.qandc.weight_only_linear(x, weight, w_scale, bias)
