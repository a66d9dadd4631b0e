"""The public ops that add to the residual stream. For inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels.backend import launching_on
from qandc_kernels.ops._checks import check_gated_sum, check_linear_gate_residual_
from qandc_kernels.ops._register import register

__all__ = ["gated_sum", "linear_gate_residual_"]


def _linear_gate_residual_(
    residual: torch.Tensor,
    xq: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    w_sum: torch.Tensor | None,
    branch: torch.Tensor | None,
) -> None:
    from qandc_kernels.triton.linear import multiply

    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    tokens = xq.shape[1]
    multiply(residual, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum, branch, gate=gate, tokens=tokens)


def _gated_sum(
    x: torch.Tensor,
    features: torch.Tensor,
    gates: torch.Tensor | None,
    weights: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    from qandc_kernels.triton.residual import gated_sum_triton

    if gates is not None and gates.stride(3) != 1:
        gates = gates.contiguous()
    with launching_on(x):
        return gated_sum_triton(x.contiguous(), features, gates, weights, scales)


def _gated_sum_fake(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


register(
    "linear_gate_residual_",
    "(Tensor(a!) residual, Tensor xq, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor gate, Tensor? bias, "
    "Tensor? x_zero_point, Tensor? w_sum, Tensor(b!)? branch) -> ()",
    _linear_gate_residual_,
    lambda *arguments: None,
)
register(
    "gated_sum",
    "(Tensor x, Tensor features, Tensor? gates, Tensor? weights, Tensor? scales) -> Tensor",
    _gated_sum,
    _gated_sum_fake,
)


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
    """Linear layer, gate and residual, in place: ``residual += gate · y``, one gate per sample (adaLN-Zero).

    ``y`` is that of :func:`int8_linear` or :func:`int4_linear`, in float32. On sm_90 and newer ``gate · y`` is cast to
    the dtype of the residual and added in the L2 cache; elsewhere it is added in float32 and cast last.

    Args:
        residual: ``[samples, tokens, N]`` float16, bfloat16 or float32, contiguous; changed in place.
        xq: ``[samples, tokens, K] int8``.
        weight: ``[N, K] int8``, or ``[N, K/2] uint8`` packed int4.
        gate: ``[samples, N]`` floating point, e.g. a chunk of one ``[samples, 6 N]`` tensor.
        branch: takes ``y``, what a feature cache keeps: as ``residual``, of any of those dtypes.

    Returns:
        ``residual``. All else as :func:`int8_linear` and :func:`int4_linear`.

    Raises:
        ArgumentError: a dtype, shape, stride or device is not one of the above.
    """
    check_linear_gate_residual_(residual, xq, weight, x_scale, w_scale, gate, bias, x_zero_point, w_sum, branch)
    torch.ops.qandc.linear_gate_residual_(
        residual, xq, weight, x_scale, w_scale, gate, bias, x_zero_point, w_sum, branch
    )
    return residual


def gated_sum(
    x: torch.Tensor,
    features: torch.Tensor,
    gates: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """A reuse step of a feature cache: ``y = x + Σ_s w_s Σ_(l, k) gate_(l, k) · f_(s, l, k)``, in one pass.

    f are the branch outputs of L blocks at S computed steps, K branches a block; the gates are those of the current
    step, the weights those of a forecast (FORA, arXiv 2407.01425: S = 1; TaylorSeer, arXiv 2503.06923). Summed
    in float32, cast last. Features whose weight is 0 are not read.

    Args:
        x: ``[samples, tokens, D]`` float16, bfloat16 or float32.
        features: ``[S, L, K, samples, tokens, D]``, one of those dtypes or int8, contiguous.
        gates: ``[L, K, samples, D]`` floating point, e.g. parts of ``[L, samples, 6 D]``; None for all 1.
        weights: ``[S] float32``; None for all 1.
        scales: ``[S, L, K, samples, tokens] float32``, contiguous, that int8 features are multiplied with.

    Returns:
        ``[samples, tokens, D]``, contiguous, dtype of ``x``.

    Raises:
        ArgumentError: a dtype, shape, stride or device is not one of the above, or only one of int8 features
            and scales is there.
    """
    check_gated_sum(x, features, gates, weights, scales)
    return torch.ops.qandc.gated_sum(x, features, gates, weights, scales)
