"""Plain-torch definition of every op: what the kernels must equal, the CPU path, and a baseline for benchmarks.

The functions carry the names and signatures of the public ops, and check their arguments as those do. Like the kernels
they are for inference: no result carries a gradient.
"""

from __future__ import annotations

import contextlib
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
    "gated_sum",
    "guided_step",
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "linear_gate_residual_",
    "linear_gelu_quantize",
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
    """``q = clip(round(x · (1/s)) + z, -2^(b-1), 2^(b-1) - 1)``, rounding half to even; NaN becomes ``z``."""
    _tell_nan(x, nan_flag)
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    shift = torch.zeros_like(scale) if zero_point is None else zero_point.to(torch.float32)
    y = (x.to(torch.float32) * (1.0 / scale)).nan_to_num_(nan=0.0)
    y.clamp_(qmin - shift, qmax - shift).round_().add_(shift)
    return y.to(torch.int8, memory_format=torch.contiguous_format)


def _tell_nan(x: torch.Tensor, nan_flag: torch.Tensor | None) -> None:
    """Store 1 in ``nan_flag`` if there is NaN in ``x``; nothing is read back."""
    if nan_flag is not None:
        nan_flag.masked_fill_(x.isnan().any(), 1)


@checked
@torch.no_grad()
def quantize_per_token(x: torch.Tensor, bits: int = 8, token_dims: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = max|x| / qmax`` over the last dimensions, ``q = round(x · (1/s))``: int8 as ``x``, float32 ``[...]``.

    A token with NaN gets the scale NaN, so that the NaN reaches the output of the product.
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


@torch.no_grad()
def _adaln(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """``(x - mean) / √(variance + eps) · (1 + scale) + shift`` in float32, one shift and scale per sample."""
    y = F.layer_norm(x.to(torch.float32), x.shape[-1:], eps=eps)
    return y * (1 + scale.to(torch.float32)[:, None]) + shift.to(torch.float32)[:, None]


@torch.no_grad()
def _quantize_static(y: torch.Tensor, factor: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """``clip(round(y · factor + z), -128, 127)``; NaN becomes -128."""
    y = y * factor if zero_point is None else y * factor + zero_point
    return y.nan_to_num_(nan=-128.0).clamp_(-128, 127).round_().to(torch.int8)


@checked
def adaln_quantize_per_tensor(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    q_scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """LayerNorm, modulation, quantization with one given scale."""
    return _quantize_static(_adaln(x, shift, scale, eps), 1.0 / q_scale, zero_point)


@checked
@torch.no_grad()
def adaln_quantize_per_token(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm, modulation, quantization of each token with its own scale."""
    return _per_token(_adaln(x, shift, scale, eps), 8, 1)


@torch.no_grad()
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return ``softmax(q kᵀ / √D) v`` of ``[batch, tokens, heads, D]``, in their dtype."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # torch's attention on a CPU gives 0 instead of NaN where all scores of a query are NaN
    lost = ~q.isfinite().all(-1, keepdim=True) | k.isnan().any(-1, keepdim=True).any(-2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v).masked_fill_(lost, float("nan")).transpose(1, 2)


@checked
@torch.no_grad()
def attention_quantize_per_tensor(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor | None = None,
    nan_flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """``clip(round(softmax(q kᵀ / √D) v / s + z), -128, 127)`` of ``[batch, tokens, heads, D]``, in float32.

    NaN becomes -128.
    """
    y = attention(*(t.to(torch.float32) for t in (q, k, v))).contiguous()
    _tell_nan(y, nan_flag)
    return _quantize_static(y, 1.0 / out_scale, out_zero_point)


@checked
@torch.no_grad()
def batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """``y[l] = x[l] weight[l]ᵀ + bias[l]``; ``share`` says how much of a GPU to take."""
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


@checked
@torch.no_grad()
def int8_matmul(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """``acc[..., n] = Σ_k xq[..., k] · wq[n, k]``, exact: int8 ``[..., K]`` and ``[N, K]`` to int32 ``[..., N]``."""
    return _exact_sums(xq, wq)


def _no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _exact_sums(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    acc = torch.zeros(*xq.shape[:-1], wq.shape[0], dtype=torch.int32, device=xq.device)
    with _no_autocast(xq):  # bfloat16 sums would not be exact
        for x, w in zip(xq.split(EXACT_CHUNK, -1), wq.split(EXACT_CHUNK, -1), strict=True):
            acc += torch.matmul(x.to(torch.float32), w.to(torch.float32).t()).to(torch.int32)
    return acc


def weight_sum(weight: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """What a zero point is multiplied with: ``Σ_k q`` int32, or with groups ``Σ_k q · s_w`` float32."""
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
    """``(Σ_k x q - z Σ_k q) · s_x · s_w + bias`` in float32; sums of integers are exact."""
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
    return y if bias is None else y + bias


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
    """``y = (Σ_k xq wq - z Σ_k wq) · s_x · s_w + bias``, int32 inside, scaled in fp32, cast last."""
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
    """:func:`int8_linear` of the unpacked weight, with scales per channel or per group."""
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
) -> torch.Tensor:
    """``clip(round(gelu(y) · multiplier / s_out + z_out))`` of the linear layer's ``y``."""
    y = F.gelu(_linear(xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum), approximate="tanh")
    factor = 1.0 / out_scale
    return _quantize_static(y, factor if multiplier is None else multiplier * factor, out_zero_point)


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
    branch: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual += gate · y``, one gate per sample, ``gate · y`` cast before it is added; ``branch`` becomes ``y``."""
    y = _linear(xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum)
    if branch is not None:
        branch.copy_(y)
    return residual.add_((y * gate.to(torch.float32)[:, None]).to(residual.dtype))


@checked
@torch.no_grad()
def gated_sum(
    x: torch.Tensor,
    features: torch.Tensor,
    gates: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x + Σ_s weights[s] Σ_(l, k) gates[l, k] · features[s, l, k] · scales[s, l, k]`` in float32, cast last."""
    y = x.to(torch.float32, copy=True)
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
    """``a · x + b · ε + d`` per channel, with the guided ε; and that for each row of the prediction, in its dtype."""
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
    """``x · (1/smoothing)`` quantized per token, or with one given scale, then multiplied as in ``int8_linear``."""
    dtype = x.dtype if out_dtype is None else out_dtype
    y = x if smoothing is None else x.to(torch.float32) * (1.0 / smoothing)
    if act_scale is None:
        xq, x_scale = _per_token(y, bits, 1)
    else:
        xq, x_scale = quantize_per_tensor(y, act_scale, act_zero_point, bits, nan_flag), act_scale
    linear = int4_linear if weight.dtype == torch.uint8 else int8_linear
    return linear(xq, weight, x_scale, w_scale, bias, act_zero_point, w_sum, dtype)


@checked
def weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``y = Σ_k x · wq · s_w + bias`` with activations as they are, summed in fp32, cast last."""
    return _linear(x, weight, None, w_scale, bias).to(x.dtype)
