"""The public ops that make int8 activations. All are for inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels.backend import launching_on
from qandc_kernels.ops._checks import (
    check_adaln_quantize_per_tensor,
    check_adaln_quantize_per_token,
    check_quantize_per_tensor,
    check_quantize_per_token,
)
from qandc_kernels.ops._register import register

__all__ = ["adaln_quantize_per_tensor", "adaln_quantize_per_token", "quantize_per_tensor", "quantize_per_token"]


def _quantize_per_tensor(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    nan_flag: torch.Tensor | None,
) -> torch.Tensor:
    from qandc_kernels.triton.quantize import quantize_per_tensor_triton

    return quantize_per_tensor_triton(x, scale, zero_point, bits, nan_flag)


def _per_tensor_fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _quantize_per_token(x: torch.Tensor, bits: int, token_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    from qandc_kernels.triton.quantize import quantize_per_token_triton

    return quantize_per_token_triton(x, bits, token_dims)


def _quantize_per_token_fake(x: torch.Tensor, bits: int, token_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[: x.ndim - token_dims], dtype=torch.float32)


def _adaln(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    q_scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from qandc_kernels.triton.adaln import adaln_quantize_triton

    samples, tokens, k = x.shape
    rows = x.reshape(samples * tokens, k)  # a view where rows are evenly spaced
    rows, shift, scale = (t if t.stride(1) == 1 or k == 1 else t.contiguous() for t in (rows, shift, scale))
    with launching_on(x):
        q, token_scale = adaln_quantize_triton(rows, tokens, shift, scale, q_scale, zero_point, eps)
    return q.view(x.shape), None if token_scale is None else token_scale.view(samples, tokens)


def _adaln_quantize_per_tensor(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    q_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return _adaln(x, shift, scale, q_scale, zero_point, eps)[0]


def _adaln_quantize_per_token(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, token_scale = _adaln(x, shift, scale, None, None, eps)
    assert token_scale is not None
    return q, token_scale


def _adaln_quantize_per_token_fake(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


register(
    "quantize_per_tensor",
    "(Tensor x, Tensor scale, Tensor? zero_point, int bits, Tensor(a!)? nan_flag) -> Tensor",
    _quantize_per_tensor,
    _per_tensor_fake,
)
register(
    "quantize_per_token",
    "(Tensor x, int bits, int token_dims) -> (Tensor, Tensor)",
    _quantize_per_token,
    _quantize_per_token_fake,
)
register(
    "adaln_quantize_per_tensor",
    "(Tensor x, Tensor shift, Tensor scale, Tensor q_scale, Tensor? zero_point, float eps) -> Tensor",
    _adaln_quantize_per_tensor,
    _per_tensor_fake,
)
register(
    "adaln_quantize_per_token",
    "(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    _adaln_quantize_per_token,
    _adaln_quantize_per_token_fake,
)


def quantize_per_tensor(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bits: int = 8,
    nan_flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize with one given scale: ``q = clip(round(x · (1/s)) + z, -2^(b-1), 2^(b-1) - 1)``.

    Source: Q&C (arXiv 2503.02508) Eq. 1, with the division written as a product so that all devices round alike.
    Rounding is half to even. NaN becomes the zero point; infinities saturate.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, K <= 65535. Any strides: the transposed output of attention is
            read as it is.
        scale: 0-d float32 tensor on the device of ``x``, > 0. Read on the device: no synchronization.
        zero_point: 0-d int32 tensor within -2^(b-1)..2^(b-1) - 1, or None for symmetric quantization.
        bits: 2 to 8; fewer than 8 still fill an int8 tensor.
        nan_flag: one int32 element on the device of ``x``, shape ``[]`` or ``[1]``: becomes 1 if ``x`` holds NaN, which
            the integers do not show; is left alone otherwise.

    Returns:
        int8, shape of ``x``, contiguous.

    Raises:
        ArgumentError: a dtype, shape, device or bit width is not one of the above.
    """
    check_quantize_per_tensor(x, scale, zero_point, bits, nan_flag)
    return torch.ops.qandc.quantize_per_tensor(x, scale, zero_point, bits, nan_flag)


def quantize_per_token(x: torch.Tensor, bits: int = 8, token_dims: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token with its own scale: ``s = max_k |x_k| / qmax``, ``q = round(x · (1/s))``, qmax = 2^(b-1) - 1.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        bits: 2 to 8.
        token_dims: how many trailing dimensions make one token: 1, or 2 for ``[batch, tokens, heads, head_dim]``.

    Returns:
        ``q`` int8, shape of ``x``, contiguous, and ``scale`` float32, shape of ``x`` without the dimensions of a token.
        A row of zeros gets zeros and a tiny positive scale, a row with NaN the scale NaN.

    Raises:
        ArgumentError: a dtype, shape or bit width is not one of the above.
    """
    check_quantize_per_token(x, bits, token_dims)
    return torch.ops.qandc.quantize_per_token(x, bits, token_dims)


def adaln_quantize_per_tensor(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    q_scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalize, modulate and quantize with one given scale, reading ``x`` once.

    ``y = (x - mean) / √(variance + eps) · (1 + scale) + shift`` over the last dimension (adaLN-Zero: DiT, arXiv
    2212.09748, Section 3.2), then ``clip(round(y / q_scale + z), -128, 127)``. NaN becomes -128. Outputs equal those
    of float64 except where it comes within about 1e-3 of a rounding boundary.

    Args:
        x: ``[samples, tokens, K]`` float16, bfloat16 or float32; a copy is made if rows are not evenly spaced.
        shift, scale: ``[samples, K]`` floating point, e.g. chunks of one ``[samples, 6 K]`` tensor.
        q_scale: 0-d float32 tensor, > 0, read on the device.
        zero_point: 0-d int32 tensor in -128..127, or None for symmetric quantization.
        eps: added to the variance.

    Returns:
        int8, shape of ``x``, contiguous.

    Raises:
        ArgumentError: a dtype, shape or device is not one of the above.
    """
    check_adaln_quantize_per_tensor(x, shift, scale, q_scale, zero_point, eps)
    return torch.ops.qandc.adaln_quantize_per_tensor(x, shift, scale, q_scale, zero_point, eps)


def adaln_quantize_per_token(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize and modulate as :func:`adaln_quantize_per_tensor`, quantize as :func:`quantize_per_token`.

    Returns:
        ``q`` int8, shape of ``x``, contiguous, and its scales ``[samples, tokens] float32``.

    Raises:
        ArgumentError: as :func:`adaln_quantize_per_tensor`.
    """
    check_adaln_quantize_per_token(x, shift, scale, eps)
    return torch.ops.qandc.adaln_quantize_per_token(x, shift, scale, eps)
