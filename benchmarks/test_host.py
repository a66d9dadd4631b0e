"""Measure what a call costs the host: µs from Python to Python, with a GPU that is done before the next call comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.conftest import Measure
from benchmarks.goals import HOST_RIVALS, HOST_ROWS
from benchmarks.timing import DEVICE, Candidate, relative_error
from qandc import QuantLinear
from qandc_kernels import int4_linear, int8_linear, quantize_per_tensor, quantize_per_token

M, N, K = HOST_ROWS, 1024, 1024  # small: the GPU takes a few µs
LAUNCHES = 60  # behind one measurement: so few that what else runs slows ours and theirs alike


@cache
def operands() -> dict[str, Any]:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    static = {bits: QuantLinear.from_linear(linear, w_bits=bits) for bits in (8, 4)}
    for layer in static.values():
        scale = x.abs().max().float() / 127
        layer.set_static_range(scale, torch.zeros((), device=DEVICE, dtype=torch.int32))
    layers = {f"W{bits}": layer for bits, layer in static.items()}
    return {"x": x, "linear": linear, "dynamic": QuantLinear.from_linear(linear), **layers}


def product(bits: int) -> Callable[[], torch.Tensor]:
    layer, x = operands()[f"W{bits}"], operands()["x"]
    xq = quantize_per_tensor(x, layer.act_scale, layer.act_zero_point)
    op = int4_linear if bits == 4 else int8_linear
    rest = (layer.qweight, layer.act_scale, layer.weight_scale, layer.bias, layer.act_zero_point, layer.weight_sum)
    return lambda: op(xq, *rest)


def int_mm() -> Callable[[], torch.Tensor]:
    layer, x = operands()["W8"], operands()["x"]
    xq, weight = quantize_per_tensor(x, layer.act_scale, layer.act_zero_point), layer.qweight.t()
    return lambda: torch._int_mm(xq, weight)


def of_layer(name: str, compiled: bool = False) -> Callable[[], torch.Tensor]:
    layer, x = operands()[name], operands()["x"]
    if compiled:
        layer = torch.compile(layer, fullgraph=True, dynamic=False)
    return lambda: layer(x)


def quantize(static: bool) -> Callable[[], Any]:
    layer, x = operands()["W8"], operands()["x"]
    scale, zero = layer.act_scale, layer.act_zero_point
    return (lambda: quantize_per_tensor(x, scale, zero)) if static else lambda: quantize_per_token(x)


def started_by_triton() -> Callable[[], Any]:
    """Make the call where launches are watched, so that Triton's own start is taken."""
    from qandc_kernels.triton import _launch

    call, usual = quantize(True), _launch._usual

    def watched() -> Any:
        _launch._usual = lambda: False
        try:
            return call()
        finally:
            _launch._usual = usual

    return watched


CANDIDATES: dict[str, Callable[[], Callable[[], Any]]] = {
    "F.linear": lambda: lambda: F.linear(operands()["x"], operands()["linear"].weight, operands()["linear"].bias),
    "nn.Linear": lambda: of_layer("linear"),
    "nn.Linear, compiled": lambda: of_layer("linear", True),
    "torch._int_mm": int_mm,
    "int8_linear": lambda: product(8),
    "int4_linear": lambda: product(4),
    "quantize_per_tensor": lambda: quantize(True),
    "quantize_per_token": lambda: quantize(False),
    "quantize_per_tensor, started by Triton": started_by_triton,
    "QuantLinear W8A8 static": lambda: of_layer("W8"),
    "QuantLinear W4A8 static": lambda: of_layer("W4"),
    "QuantLinear W8A8 dynamic": lambda: of_layer("dynamic"),
    "QuantLinear W8A8 static, compiled": lambda: of_layer("W8", True),
}


def build(name: str) -> Candidate:
    call = CANDIDATES[name]()
    is_layer = "Linear" in name or name == "F.linear"
    expected = F.linear(operands()["x"], operands()["linear"].weight, operands()["linear"].bias)

    def error(result: Any, i: int) -> float:
        return relative_error(result, expected) if is_layer or name.endswith("_linear") else 0.0

    return Candidate(lambda i: call(), error, 0.2, LAUNCHES, wall_clock=True)


@pytest.mark.parametrize("name", CANDIDATES)
def test_call(measure: Measure, name: str) -> None:
    row: dict[str, Any] = {"op": "host", "layer": "a call", "m": M, "n": N, "k": K, "candidate": name}
    rival = HOST_RIVALS.get(name)
    measure(row, lambda: build(name), rival=rival and (rival, lambda: build(rival)))
