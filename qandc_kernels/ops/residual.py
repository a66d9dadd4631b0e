"""Define the public ops that add to the residual stream. For inference: results carry no gradient."""

from __future__ import annotations

import torch

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._register import launcher, public_op

__all__ = ["corrected_gates", "gated_sum", "linear_gate_residual_"]

multiply, gated_sum_triton = launcher("linear.multiply"), launcher("residual.gated_sum_triton")
corrected_gates_triton = launcher("residual.corrected_gates_triton")


def _along_rows(t):
    """Return a tensor, or None, with unit stride along its last dimension."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _linear_gate_residual_(residual, xq, weight, x_scale, w_scale, gate, bias, x_zero_point, w_sum, out_branch):
    gate, tokens = _along_rows(gate), xq.shape[1]
    multiply(residual, xq, weight, x_scale, w_scale, bias, x_zero_point, w_sum, out_branch, gate=gate, tokens=tokens)


def _gated_sum(x, features, gates, weights, scales, offset):
    with launching_on(x):
        return gated_sum_triton(x.contiguous(), features, _along_rows(gates), weights, scales, _along_rows(offset))


def _corrected_gates(gates, gains, offsets):
    with launching_on(gates):
        return corrected_gates_triton(_along_rows(gates), gains, offsets)


linear_gate_residual_ = public_op(
    reference.linear_gate_residual_, _linear_gate_residual_, lambda *given: None, writes=("residual", "out_branch")
)
gated_sum = public_op(reference.gated_sum, _gated_sum, lambda x, *others: x.new_empty(x.shape))
corrected_gates = public_op(
    reference.corrected_gates,
    _corrected_gates,
    lambda gates, *others: (gates.new_empty(gates.shape), gates.new_empty(gates.shape[2:], dtype=torch.float32)),
)
