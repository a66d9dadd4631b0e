"""What follows a product, in its kernel and after it: the same GEMM, storing bf16 or something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import Measure
from benchmarks.goals import GATE, GELU, PLAIN
from benchmarks.problems import DIT_XL_2, DTYPE, ROWS, TOKENS, Problem, problem
from benchmarks.timing import DEVICE, Candidate, relative_error
from qandc_kernels import (
    gelu_quantize_per_token,
    int8_linear,
    linear_gate_residual_,
    linear_gelu_quantize,
    quantize_per_tensor,
    reference,
)

GELU_AFTER = "W8A8, then GELU, then quantize"
GELU_PER_TOKEN = "W8A8, then gelu_quantize_per_token"
GATE_AFTER = "W8A8, then gate + residual"
OF_GELU, OF_GATE = (PLAIN, GELU, GELU_PER_TOKEN, GELU_AFTER), (PLAIN, GATE, GATE_AFTER)
CANDIDATES = {layer: OF_GELU if layer == "fc1" else OF_GATE for layer in DIT_XL_2}
CASES = [(layer, m, name) for layer in ("fc1", "out", "fc2") for m in ROWS for name in CANDIDATES[layer]]
BOUND = 0.01  # to the reference of the op: rounding to bf16, and few codes that differ by one


def plain(p: Problem) -> Candidate:
    w, scale = p.int8

    def launch(i: int) -> torch.Tensor:
        i %= p.copies
        return int8_linear(p.xq, w[i], p.x_scale, scale[i], p.bias)

    def error(y: torch.Tensor, i: int) -> float:
        i %= p.copies
        return relative_error(y, reference.int8_linear(p.xq, w[i], p.x_scale, scale[i], p.bias))

    return Candidate(launch, error, BOUND, p.launches)


def gelu(p: Problem, fused: bool) -> Candidate:
    """int8 activations of the next layer, with the zero point that a static calibration gives them."""
    w, scale = p.int8
    out_scale = torch.tensor(6.2 / 255, device=DEVICE)  # -0.2 to 6
    zero_point = torch.tensor(-120, dtype=torch.int32, device=DEVICE)

    def launch(i: int) -> torch.Tensor:
        i %= p.copies
        if fused:
            return linear_gelu_quantize(p.xq, w[i], p.x_scale, scale[i], out_scale, p.bias, zero_point)
        y = int8_linear(p.xq, w[i], p.x_scale, scale[i], p.bias)
        return quantize_per_tensor(F.gelu(y, approximate="tanh"), out_scale, zero_point)

    def error(q: torch.Tensor, i: int) -> float:
        i %= p.copies
        expected = reference.linear_gelu_quantize(p.xq, w[i], p.x_scale, scale[i], out_scale, p.bias, zero_point)
        return relative_error(q, expected)

    return Candidate(launch, error, BOUND, p.launches)


def gelu_per_token(p: Problem) -> Candidate:
    w, scale = p.int8

    def launch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        i %= p.copies
        return gelu_quantize_per_token(int8_linear(p.xq, w[i], p.x_scale, scale[i], p.bias))

    def error(result: tuple[torch.Tensor, torch.Tensor], i: int) -> float:
        i %= p.copies
        y = reference.int8_linear(p.xq, w[i], p.x_scale, scale[i], p.bias)
        (q, s), (expected, expected_s) = result, reference.gelu_quantize_per_token(y)
        return relative_error(q * s[..., None], expected * expected_s[..., None])

    return Candidate(launch, error, BOUND, p.launches)


def gate(p: Problem, fused: bool) -> Candidate:
    w, scale = p.int8
    samples = -(-p.m // TOKENS)
    generator = torch.Generator(DEVICE).manual_seed(1)
    residual = torch.randn(samples, p.m // samples, p.n, generator=generator, device=DEVICE, dtype=DTYPE)
    # one of the six parts of a sample's modulation, as adaLN-Zero cuts it
    gates = torch.randn(samples, 6 * p.n, generator=generator, device=DEVICE, dtype=DTYPE).chunk(6, dim=1)[2]
    xq = p.xq.view(samples, -1, p.k)
    before = residual.clone()

    def launch(i: int) -> torch.Tensor:
        i %= p.copies
        if fused:
            linear_gate_residual_(residual, xq, w[i], p.x_scale, scale[i], gates, p.bias)
            return residual
        return residual + gates[:, None] * int8_linear(xq, w[i], p.x_scale, scale[i], p.bias, out_dtype=DTYPE)

    def error(y: torch.Tensor, i: int) -> float:
        i %= p.copies
        expected = before.clone()
        reference.linear_gate_residual_(expected, xq, w[i], p.x_scale, scale[i], gates, p.bias)
        return relative_error(y, expected)

    return Candidate(launch, error, BOUND, p.launches, in_place=fused)


def candidate(layer: str, m: int, name: str) -> Candidate:
    p = problem(layer, m)
    if name == PLAIN:
        return plain(p)
    if name == GELU_PER_TOKEN:
        return gelu_per_token(p)
    return gelu(p, name == GELU) if layer == "fc1" else gate(p, name == GATE)


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_epilogue(measure: Measure, layer: str, m: int, name: str) -> None:
    n, k = DIT_XL_2[layer]
    row: dict[str, Any] = {"op": "epilogue", "layer": layer, "m": m, "n": n, "k": k, "candidate": name}
    row |= {"activations": "int8", "ceiling": "int8"}
    measure(row, lambda: candidate(layer, m, name), operations=2 * m * n * k)
