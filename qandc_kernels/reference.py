"""Define every op in plain torch: what the kernels must equal, the CPU path, and a baseline for benchmarks.

The public ops have their names, signatures and docstrings from here. Both raise
:class:`qandc_kernels.ArgumentError` for an argument of another type, dtype, shape, stride, device or value than its
docstring allows. Like the kernels these functions are for inference: no result carries a gradient.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import torch
import torch.nn.functional as F

from qandc_kernels.ops._checks import checked
from qandc_kernels.packing import unpack_int4

__all__ = [
    "adaln_quantize_per_tensor",
    "adaln_quantize_per_token",
    "attention_quantize_per_tensor",
    "batched_linear",
    "corrected_gates",
    "gated_sum",
    "gelu_quantize_per_token",
    "guided_step",
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "linear_gate_residual_",
    "linear_gelu_quantize",
    "linear_into_",
    "qk_norm_rope_",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantized_linear",
    "weight_only_linear",
]

# keeps the scale of a row of zeros positive and its reciprocal finite
SMALLEST_AMAX = 1e-10
# 1024 products of magnitude <= 128 · 128 sum to 2^24 at most: every partial sum is exact in fp32
EXACT_CHUNK = 1024


@checked
@torch.no_grad()
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
    """
    return _per_tensor(x, scale, zero_point, bits, nan_flag)


def _per_tensor(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    nan_flag: torch.Tensor | None,
) -> torch.Tensor:
    _tell_nan(x, nan_flag)
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    y = (x.to(torch.float32) * (1.0 / scale)).nan_to_num_(nan=0.0).round_()
    if zero_point is not None:
        y.add_(zero_point)
    return y.clamp_(qmin, qmax).to(torch.int8, memory_format=torch.contiguous_format)


def _tell_nan(x: torch.Tensor, nan_flag: torch.Tensor | None) -> None:
    """Store 1 in ``nan_flag`` if there is NaN in ``x``; nothing is read back."""
    if nan_flag is not None and x.numel():
        nan_flag.masked_fill_(x.amax().isnan(), 1)  # the largest of all is NaN if one is


@checked
@torch.no_grad()
def quantize_per_token(x: torch.Tensor, bits: int = 8, token_dims: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token with its own scale: ``s = max|x| / qmax``, ``q = round(x · (1/s))``, qmax = 2^(b-1) - 1.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        bits: 2 to 8.
        token_dims: how many trailing dimensions make one token: 1, or 2 for ``[batch, tokens, heads, head_dim]``.

    Returns:
        ``q`` int8, shape of ``x``, contiguous, and ``scale`` float32, shape of ``x`` without the dimensions of a token.
        A row of zeros gets zeros and a tiny positive scale, a row with NaN the scale NaN.
    """
    return _per_token(x, bits, token_dims)


def _per_token(x: torch.Tensor, bits: int, token_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    qmax = (1 << bits - 1) - 1
    y = x.to(torch.float32).flatten(x.ndim - token_dims)
    amax = y.abs().amax(-1) if y.shape[-1] else y.new_zeros(y.shape[:-1])
    scale = amax.clamp(min=SMALLEST_AMAX) * (1.0 / qmax)
    y = (y * (1.0 / scale)[..., None]).nan_to_num_(nan=0.0)
    y.clamp_(-qmax, qmax).round_()
    return y.to(torch.int8, memory_format=torch.contiguous_format).view(x.shape), scale


@checked
@torch.no_grad()
def gelu_quantize_per_token(
    x: torch.Tensor, multiplier: torch.Tensor | None = None, beside: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply GELU and quantize each token with its own scale: ``s = max|y| / 127``, ``q = round(y · (1/s))``.

    ``y`` is ``gelu(x) · multiplier`` in float32, GELU the tanh form, behind ``beside``. Integers equal those of float64
    except where ``y / s`` comes within 1e-3 of a rounding boundary.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32: what a product gave.
        multiplier: ``[K] float32``, one factor per channel, e.g. of smoothing.
        beside: ``[..., heads, D]`` of those dtypes, any strides, from attention, where the next layer takes both.

    Returns:
        ``q`` int8 ``[..., K]``, or ``[..., heads · D + K]``, contiguous, of at most 65535 channels, and ``scale``
        float32 ``[...]``. A token of zeros gets zeros and a tiny positive scale, one with NaN the scale NaN.
    """
    y = F.gelu(x.to(torch.float32), approximate="tanh")
    if multiplier is not None:
        y *= multiplier
    if beside is not None:
        y = torch.cat([beside.to(torch.float32).flatten(-2), y], -1)
    return _per_token(y, 8, 1)


@torch.no_grad()
def _adaln(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute ``(x - mean) / √(variance + eps) · (1 + scale) + shift`` in float32, one shift and scale per sample."""
    y = F.layer_norm(x.to(torch.float32), x.shape[-1:], eps=eps)
    return y * (1 + scale.to(torch.float32)[:, None]) + shift.to(torch.float32)[:, None]


@torch.no_grad()
def _quantize_static(y: torch.Tensor, factor: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """Quantize to int8, ``clip(round(y · factor + z), -128, 127)``; NaN becomes -128."""
    y = y * factor if zero_point is None else y * factor + zero_point
    return y.nan_to_num_(nan=-128.0).clamp_(-128, 127).round_().to(torch.int8)


@checked
@torch.no_grad()
def adaln_quantize_per_tensor(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    q_scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_x: torch.Tensor | None = None,
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
        out_x: takes a copy of ``x``, to which a block adds what it computes: floating point of its shape, contiguous.

    Returns:
        int8, shape of ``x``, contiguous.
    """
    if out_x is not None:
        out_x.copy_(x)
    return _quantize_static(_adaln(x, shift, scale, eps), 1.0 / q_scale, zero_point)


@checked
@torch.no_grad()
def adaln_quantize_per_token(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    out_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize and modulate as :func:`adaln_quantize_per_tensor`, quantize as :func:`quantize_per_token`.

    Returns:
        ``q`` int8, shape of ``x``, contiguous, and its scales ``[samples, tokens] float32``.
    """
    if out_x is not None:
        out_x.copy_(x)
    return _per_token(_adaln(x, shift, scale, eps), 8, 1)


@torch.no_grad()
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``softmax(q kᵀ / √D + key_bias) v`` of ``[batch, tokens, heads, D]``, in their dtype."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if key_bias is None else key_bias[:, None, None].to(q.dtype)
    # torch's attention on a CPU gives 0 instead of NaN where all scores of a query are NaN
    lost = ~q.isfinite().all(-1, keepdim=True) | k.isnan().any(-1, keepdim=True).any(-2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, mask).masked_fill_(lost, float("nan")).transpose(1, 2)


@checked
@torch.no_grad()
def attention_quantize_per_tensor(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor | None = None,
    nan_flag: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention as int8, per head: ``clip(round(softmax(q kᵀ / √D + key_bias) v / s + z), -128, 127)``.

    On Triton kernels the sums are float32, the softmax is rounded to the inputs' dtype before it meets v, as in
    FlashAttention-2 (arXiv 2307.08691), and nothing but the integers is written. That needs 16-bit inputs, a D that is
    a multiple of 8 from 16 to 128, and more than one key; others take torch's ``scaled_dot_product_attention``, then
    :func:`quantize_per_tensor`. NaN becomes -128.

    Args:
        q: ``[batch, tokens, heads, D]`` float16, bfloat16 or float32.
        k, v: ``[batch, keys, heads, D]``, the dtype of ``q``. All three are read where they are, e.g. as parts of
            ``[batch, tokens, 3, heads, D]``, but copied if a head does not begin at a multiple of 16 bytes.
        out_scale: 0-d float32 tensor, > 0, read on the device.
        out_zero_point: 0-d int32 tensor in -128..127, or None for symmetric quantization.
        nan_flag: one int32 element on the device of ``q``, shape ``[]`` or ``[1]``: becomes 1 if there is NaN in what
            is quantized; is left alone otherwise.
        key_bias: ``[batch, keys]`` float16, bfloat16 or float32, added to the scores of all queries of a sample, as a
            mask of its keys is: 0 keeps one, -inf leaves it out. A sample with all keys left out becomes 0.

    Returns:
        int8 ``[batch, tokens, heads, D]``, contiguous.
    """
    q, k, v = (t.to(torch.float32) for t in (q, k, v))
    y = attention(q, k, v, key_bias).contiguous()
    _tell_nan(y, nan_flag)
    return _quantize_static(y, 1.0 / out_scale, out_zero_point)


@checked
@torch.no_grad()
def qk_norm_rope_(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalize each head of q and k and rotate it by its position, in place; v stays as it is.

    RMSNorm (arXiv 1910.07467), ``y = x / √(mean x² + eps) · weight``, then rotary embedding of neighbouring pairs
    (RoFormer, arXiv 2104.09864): ``(y_0 cos_0 - y_1 sin_0, y_1 cos_1 + y_0 sin_1)``. Both are computed in float32 and
    rounded to the dtype of ``qkv``, as diffusers does with FLUX.1: between norm and rotation, and at the end.

    Args:
        qkv: ``[samples, tokens, 3, heads, D]`` float16, bfloat16 or float32, D even, at most 1024, unit stride along D;
            other strides may be any without overlap, e.g. those of some tokens of a joint sequence.
        q_weight, k_weight: ``[D]`` floating point.
        cos, sin: ``[tokens, D] float32``, of the angle of each value's pair, or ``[tokens, D/2]``, once for each pair;
            both None for no rotation.
        eps: added to the mean square.

    Returns:
        ``qkv``.
    """
    tables = None if cos is None or sin is None else (cos, sin)
    if tables is not None and tables[0].shape[1] != qkv.shape[-1]:
        tables = tables[0].repeat_interleave(2, 1), tables[1].repeat_interleave(2, 1)
    for x, weight in zip(qkv.unbind(2)[:2], (q_weight, k_weight), strict=True):
        y = F.rms_norm(x.to(torch.float32), x.shape[-1:], weight.to(torch.float32), eps)
        y = y.to(x.dtype).to(torch.float32)
        if tables is not None:
            turned = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
            y = y * tables[0][:, None] + turned * tables[1][:, None]
        x.copy_(y)
    return qkv


@checked
@torch.no_grad()
def batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """Compute one layer of L blocks at once, a few rows each: ``y[l] = x[l] weight[l]ᵀ + bias[l]``.

    The time is that of reading the weights. A kernel that fills the GPU would keep everything beside it waiting; this
    one takes a share of the multiprocessors, one small program on each, and so can run beside other work. On Triton
    kernels for 16-bit inputs of at most 64 rows; others take ``torch.baddbmm``.

    Args:
        x: ``[L, M, K]`` float16, bfloat16 or float32; a stride of 0 along L is read as it is. K <= 65535.
        weight: ``[L, N, K]`` of that dtype, any stride along L.
        bias: ``[L, N]`` of that dtype.
        share: programs per multiprocessor, > 0.

    Returns:
        ``[L, M, N]``, contiguous, dtype of ``x``; summed in float32, cast last.
    """
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


@checked
@torch.no_grad()
def int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """Compute the exact accumulators ``acc[..., n] = Σ_k xq[..., k] · wq[n, k]``.

    Args:
        xq: ``[..., K] int8``, K <= 65535.
        wq: ``[N, K] int8``.

    Returns:
        int32 ``[..., N]``.
    """
    return _exact_sums(xq, wq).to(torch.int32)


def _no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@functools.cache
def _cpu_multiplies_int8() -> bool:
    """Tell whether torch multiplies int8 exactly on this CPU: without VNNI it does so slowly, and pairs saturate."""
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    x = torch.tensor([[127], [-128]], dtype=torch.int8).repeat(1, EXACT_CHUNK)
    expected = torch.tensor([[127 * 127, 127 * -128], [127 * -128, 128 * 128]], dtype=torch.int32) * EXACT_CHUNK
    return torch.equal(torch._int_mm(x, x.t()), expected)


def _exact_sums(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """Sum products of int8 as int32, or as float32 where that holds every sum and saves converting it."""
    if xq.device.type == "cpu" and xq.numel() and wq.numel() and _cpu_multiplies_int8():
        return torch._int_mm(xq.reshape(-1, xq.shape[-1]), wq.t()).view(*xq.shape[:-1], wq.shape[0])
    chunks = zip(xq.split(EXACT_CHUNK, -1), wq.split(EXACT_CHUNK, -1), strict=True)
    with _no_autocast(xq):  # bfloat16 sums would not be exact
        sums = (torch.matmul(x.to(torch.float32), w.to(torch.float32).t()) for x, w in chunks)
        if xq.shape[-1] <= EXACT_CHUNK:
            return next(sums)
        return functools.reduce(torch.Tensor.add_, (part.to(torch.int32) for part in sums))


def weight_sum(weight: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Sum a weight along K, for zero points: ``Σ_k q`` int32, or with groups ``Σ_k q · s_w`` float32."""
    wq = unpack_int4(weight) if weight.dtype == torch.uint8 else weight
    if w_scale.ndim == 1:
        return wq.sum(1, dtype=torch.int32)
    return (wq * w_scale.repeat_interleave(wq.shape[1] // w_scale.shape[1], 1)).sum(1)


@torch.no_grad()
def _linear(
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply a quantized layer, ``(Σ_k x q - z Σ_k q) · s_x · s_w + bias`` in float32; sums of integers are exact."""
    wq = unpack_int4(weight) if weight.dtype == torch.uint8 else weight
    if w_scale.ndim == 2:  # one scale per group of K: Σ_g s_w[g] Σ_(k in g) x q
        y = torch.zeros(*xq.shape[:-1], wq.shape[0], device=xq.device)
        group = wq.shape[1] // w_scale.shape[1]
        for x, w, scale in zip(xq.split(group, -1), wq.split(group, -1), w_scale.unbind(1), strict=True):
            y += _sums(x, w) * scale
        if x_zero_point is not None:
            y -= x_zero_point * (weight_sum(weight, w_scale) if w_sum is None else w_sum)
    else:
        acc = _sums(xq, wq)
        if x_zero_point is not None:
            acc -= x_zero_point * (weight_sum(weight, w_scale) if w_sum is None else w_sum)
        y = acc.to(torch.float32)
    if x_scale is not None:
        y *= x_scale if x_scale.ndim == 0 else x_scale[..., None]
    if w_scale.ndim == 1:
        y *= w_scale
    return y if bias is None else y.add_(bias)


def _sums(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.int8:
        return _exact_sums(x, w)
    with _no_autocast(x):
        return torch.matmul(x.to(torch.float32), w.to(torch.float32).t())


@checked
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
    """Compute a W8A8 linear layer: ``y[..., n] = (Σ_k xq wq - z Σ_k wq) · s_x · s_w[n] + bias[n]``.

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
    """
    return _linear(xq, wq, x_scale, w_scale, bias, x_zero_point, w_sum).to(out_dtype)


@checked
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
    """Compute a W4A8 linear layer, :func:`int8_linear` with a weight packed by :func:`qandc_kernels.pack_int4`.

    The weight is unpacked in registers, on its way to the tensor cores. With scales per group the integer sums of the
    groups are scaled and added in float32.

    Args:
        wq_packed: ``[N, K/2] uint8``; the layout is drawn in :mod:`qandc_kernels.packing`.
        w_scale: float32 ``[N]``, or ``[N, K/G]`` for groups of G = 32, 64 or 128 along K (then K a multiple of 64).
        w_sum: ``[N] int32``, the sums of the unpacked weight; with groups ``[N] float32``, sums of ``q · s_w``.

    All else is as in :func:`int8_linear`.
    """
    return _linear(xq, wq_packed, x_scale, w_scale, bias, x_zero_point, w_sum).to(out_dtype)


@checked
@torch.no_grad()
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
    beside: torch.Tensor | None = None,
    nan_flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a linear layer, GELU and int8 for the next layer: ``clip(round(gelu(y) · multiplier / s_out + z_out))``.

    ``y`` is that of :func:`int8_linear` or :func:`int4_linear`, in float32; GELU is the tanh form. Outputs equal those
    of float64 except where it comes within 1e-3 of a rounding boundary. NaN becomes -128.

    Args:
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        out_scale: 0-d float32 tensor, > 0, read on the device.
        out_zero_point: 0-d int32 tensor in -128..127.
        multiplier: ``[N] float32``, one factor per output channel, e.g. of smoothing.
        beside: ``[..., heads, D]`` floating point of any strides, from attention: quantized as by
            :func:`quantize_per_tensor` with the same scale, in front of the result, where the next layer takes both.
        nan_flag: of ``beside``, as in :func:`quantize_per_tensor`.

    Returns:
        ``[..., N] int8``, or ``[..., heads · D + N]``, contiguous. All else as :func:`int8_linear` and
        :func:`int4_linear`.
    """
    y = F.gelu(_linear(xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum), approximate="tanh")
    factor = 1.0 / out_scale
    q = _quantize_static(y, factor if multiplier is None else multiplier * factor, out_zero_point)
    if beside is None:
        return q
    first = quantize_per_tensor(beside, out_scale, out_zero_point, 8, nan_flag)
    return torch.cat([first.flatten(-2), q], -1)


@checked
@torch.no_grad()
def linear_into_(
    out: torch.Tensor,
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write a linear layer where the next one reads it, e.g. into some tokens of a joint sequence.

    Args:
        out: ``[..., N]`` float16, bfloat16 or float32, unit stride along N; takes :func:`int8_linear` or
            :func:`int4_linear` of its dtype. Written sample by sample, or through a copy, if rows
            are not evenly spaced.
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.

    Returns:
        ``out``. All else as :func:`int8_linear` and :func:`int4_linear`.
    """
    return out.copy_(_linear(xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum))


@checked
@torch.no_grad()
def linear_gate_residual_(
    residual: torch.Tensor,
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    w_sum: torch.Tensor | None = None,
    out_branch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a gated linear layer to the residual, in place: ``residual += gate · y``, one gate per sample (adaLN-Zero).

    ``y`` is that of :func:`int8_linear` or :func:`int4_linear`, in float32. ``gate · y`` is cast to the dtype of the
    residual, then added, on sm_90 and newer in the L2 cache; kernels on older GPUs add in float32 and cast last.

    Args:
        residual: ``[samples, tokens, N]`` float16, bfloat16 or float32, contiguous; changed in place.
        xq: ``[samples, tokens, K] int8``.
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        gate: ``[samples, N]`` floating point, e.g. a chunk of one ``[samples, 6 N]`` tensor.
        out_branch: takes ``y``, what a feature cache keeps: as ``residual``, of any of those dtypes.

    Returns:
        ``residual``. All else as :func:`int8_linear` and :func:`int4_linear`.
    """
    y = _linear(xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)
    if out_branch is not None:
        out_branch.copy_(y)
    return residual.add_((y * gate.to(torch.float32)[:, None]).to(residual.dtype))


@checked
@torch.no_grad()
def corrected_gates(
    gates: torch.Tensor, gains: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a correction of features into gates and one offset: ``Σ gate (a f + b) = Σ (gate a) f + b'``.

    Args:
        gates: ``[L, K, samples, D]`` floating point, as :func:`gated_sum` takes them.
        gains: a, ``[L, K, D] float32``, contiguous.
        offsets: b, likewise.

    Returns:
        Both as :func:`gated_sum` takes them: ``gate · a``, contiguous, dtype of ``gates``; ``b' = Σ_(l, k) gate · b``,
        ``[samples, D] float32``.
    """
    factors = gates.to(torch.float32)
    return (factors * gains[:, :, None]).to(gates.dtype).contiguous(), (factors * offsets[:, :, None]).sum((0, 1))


@checked
@torch.no_grad()
def gated_sum(
    x: torch.Tensor,
    features: torch.Tensor,
    gates: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a reuse step of a feature cache: ``y = x + b + Σ_s w_s Σ_(l, k) gate_(l, k) · f_(s, l, k)``, in one pass.

    f are the branch outputs of L blocks at S computed steps, K branches a block; the gates are those of the current
    step, the weights those of a forecast (FORA, arXiv 2407.01425: S = 1; TaylorSeer, arXiv 2503.06923); b is an offset
    of each channel. Summed in float32, cast last. Features whose weight is 0 are not read.

    Args:
        x: ``[samples, tokens, D]`` float16, bfloat16 or float32.
        features: ``[S, L, K, samples, tokens, D]``, one of those dtypes or int8, contiguous.
        gates: ``[L, K, samples, D]`` floating point, e.g. parts of ``[L, samples, 6 D]``; None for all 1.
        weights: ``[S] float32``; None for all 1.
        scales: ``[S, L, K, samples, tokens] float32``, contiguous, that int8 features, and only they, are multiplied
            with.
        offset: ``[samples, D] float32``; None for 0.

    Returns:
        ``[samples, tokens, D]``, contiguous, dtype of ``x``.
    """
    y = x.to(torch.float32, copy=True)
    if offset is not None:
        y += offset[:, None]
    for s in range(features.shape[0]):
        if weights is not None and not weights.is_meta and weights[s] == 0:
            continue  # what a weight of 0 stands at was never written
        for layer, branch in itertools.product(range(features.shape[1]), range(features.shape[2])):
            part = features[s, layer, branch].to(torch.float32)
            if scales is not None:
                part = part * scales[s, layer, branch][..., None]
            if gates is not None:
                part = part * gates[layer, branch].to(torch.float32)[:, None]
            y += part if weights is None else part * weights[s]
    return y.to(x.dtype)


@checked
@torch.no_grad()
def guided_step(
    prediction: torch.Tensor, latents: torch.Tensor, coefficients: torch.Tensor, guidance_scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a deterministic step of a first-order sampler, ``x' = a · x + b · ε + d``; give the next forward's input.

    ``ε = ε_uncond + guidance_scale · (ε_cond - ε_uncond)`` (classifier-free guidance, Ho and Salimans 2022), or the
    prediction itself. A DDIM step (Song et al. 2021, Eq. 12, η = 0) has ``a = √(ᾱ'/ᾱ)`` and
    ``b = √(1 - ᾱ') - a √(1 - ᾱ)``; variance compensation (Q&C, arXiv 2503.02508, Sec. 3.2) is a gain and a mean per
    channel, which a, b and d take in. In float32.

    Args:
        prediction: ``[2 B, C', H, W]`` float16, bfloat16 or float32, conditional rows first; ``[B, C', H, W]`` without
            guidance. Channels beyond the C of the latents are not read.
        latents: x, ``[B, C, H, W] float32``.
        coefficients: a, b and d, ``[3, C] float32``.
        guidance_scale: finite; None for no guidance.

    Returns:
        ``x'`` as ``latents``, contiguous; and the same in the dtype of ``prediction``, once for each of its rows.
    """
    epsilon = prediction[:, : latents.shape[1]].to(torch.float32)
    if guidance_scale is not None:
        cond, uncond = epsilon.chunk(2)
        epsilon = uncond + float(guidance_scale) * (cond - uncond)
    a, b, d = coefficients[:, None, :, None, None].unbind(0)
    y = (a * latents + b * epsilon + d).contiguous()
    return y, y.to(prediction.dtype).repeat(1 if guidance_scale is None else 2, 1, 1, 1)


@checked
@torch.no_grad()
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
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    y = x if smoothing is None else x.to(torch.float32) * (1.0 / smoothing)
    if act_scale is None:
        xq, x_scale = _per_token(y, bits, 1)
    else:
        xq, x_scale = _per_tensor(y, act_scale, act_zero_point, bits, nan_flag), act_scale
    return _linear(xq, weight, x_scale, w_scale, bias, act_zero_point, w_sum).to(dtype)


@checked
def weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute a W8A16 or W4A16 linear layer, for activations that must stay precise: ``y = Σ_k x wq · s_w + bias``.

    The weight is converted in registers, products are summed in float32 and cast last. There is no kernel for float32
    activations: torch multiplies them with a float32 copy of the weight, which lives as long as the call.

    Args:
        x: ``[..., K]`` float16, bfloat16 or float32, any strides, K <= 65535.
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        w_scale: float32 ``[N]``, or for int4 ``[N, K/G]``, groups as in :func:`int4_linear`.
        bias: ``[N]`` float16, bfloat16 or float32.

    Returns:
        ``[..., N]`` of the dtype of ``x``, contiguous.
    """
    return _linear(x, weight, None, w_scale, bias).to(x.dtype)
