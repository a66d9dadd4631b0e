"""Latency of the linear layers of DiT-XL/2: full precision, simulated quantization, other libraries, ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import NO_GPU, Measure
from benchmarks.goals import BF16, FP32, INT_MM, INT_MM_COMPILED
from benchmarks.problems import DIT_XL_2, ROWS, SQUARE, Problem, problem
from benchmarks.rivals import RIVALS
from benchmarks.timing import DEVICE, Candidate, relative_error
from qandc_kernels import int4_linear, int8_linear, quantize_per_tensor, quantize_per_token, weight_only_linear

Launch = Callable[[int], torch.Tensor]

FULL = BF16 if DEVICE == "cuda" else FP32
FLOAT_PRODUCT = {FULL, "simulated W8A8", "W8A16", "W4A16"}
INT8_INPUT = {"torch._int_mm", INT_MM, INT_MM_COMPILED, "W8A8", "W4A8", "W4A8 group 128"}
FAST_ROWS = 4096  # of --rivals fast
FLOAT_BOUND, INT8_BOUND, INT4_BOUND = 0.01, 0.03, 0.15
RIVAL_COPIES = 16


def full_precision(p: Problem) -> Launch:
    return lambda i: F.linear(p.x, p.w[i], p.bias)


def simulated(p: Problem) -> Launch:
    w_hat = p.w_hat

    def launch(i: int) -> torch.Tensor:
        x_hat = (p.x / p.x_scale).round().clamp(-128, 127) * p.x_scale
        return F.linear(x_hat, w_hat[i], p.bias)

    return launch


def int_mm(p: Problem) -> Launch:
    w, _ = p.int8
    return lambda i: torch._int_mm(p.xq, w[i].t())


def _dequantize(xq: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (torch._int_mm(xq, w.t()).float() * scale + bias).to(bias.dtype)


@cache
def _compiled_dequantize() -> Callable[..., torch.Tensor]:
    """One function, compiled once per shape whichever weight it is called with."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(_dequantize, fullgraph=True, dynamic=False)


def int_mm_dequantize(compiled: bool, p: Problem) -> Launch:
    w, w_scale = p.int8
    scale = w_scale * p.x_scale
    function = _compiled_dequantize() if compiled else _dequantize
    return lambda i: function(p.xq, w[i], scale[i], p.bias)


def quantized(bits: int, p: Problem, how: str = "", grouped: bool = False) -> Launch:
    """Our product; ``how`` says what is quantized in each call: nothing, with the given scale, or per token."""
    w, scale = p.int4_grouped if grouped else p.int4 if bits == 4 else p.int8
    op, x_scale = int4_linear if bits == 4 else int8_linear, p.x_scale
    if how == "static":
        return lambda i: op(quantize_per_tensor(p.x, x_scale), w[i], x_scale, scale[i], p.bias)
    if how == "dynamic":

        def launch(i: int) -> torch.Tensor:
            xq, token_scale = quantize_per_token(p.x)
            return op(xq, w[i], token_scale, scale[i], p.bias)

        return launch
    return lambda i: op(p.xq, w[i], x_scale, scale[i], p.bias)


def weight_only(bits: int, p: Problem) -> Launch:
    w, scale = p.int8 if bits == 8 else p.int4
    return lambda i: weight_only_linear(p.x, w[i], scale[i], p.bias)


def rival(name: str, p: Problem) -> Launch:
    layers = [RIVALS[name](p.w[i], p.bias) for i in range(RIVAL_COPIES)]
    return lambda i: layers[i](p.x)


Builder = Callable[[Problem], Launch]

CANDIDATES: dict[str, tuple[Builder, float]] = {
    FULL: (full_precision, FLOAT_BOUND),
    "simulated W8A8": (simulated, INT8_BOUND),
    INT_MM: (partial(int_mm_dequantize, False), INT8_BOUND),
    INT_MM_COMPILED: (partial(int_mm_dequantize, True), INT8_BOUND),
    "W8A8": (partial(quantized, 8), INT8_BOUND),
    "W4A8": (partial(quantized, 4), INT4_BOUND),
    "W4A8 group 128": (partial(quantized, 4, grouped=True), INT4_BOUND),
    "W8A16": (partial(weight_only, 8), INT8_BOUND),
    "W4A16": (partial(weight_only, 4), INT4_BOUND),
    "quantize + W8A8": (partial(quantized, 8, how="static"), INT8_BOUND),
    "quantize + W4A8": (partial(quantized, 4, how="static"), INT4_BOUND),
    "dynamic quantize + W8A8": (partial(quantized, 8, how="dynamic"), INT8_BOUND),
    "dynamic quantize + W4A8": (partial(quantized, 4, how="dynamic"), INT4_BOUND),
}
BUILDERS: dict[str, tuple[Builder, float]] = {**CANDIDATES, "torch._int_mm": (int_mm, INT8_BOUND)}
BUILDERS |= {name: (partial(rival, name), INT4_BOUND if "W4" in name else INT8_BOUND) for name in RIVALS}
ON_CPU = (FULL, "simulated W8A8")
OURS = ("W", "quantize +", "dynamic quantize +")
LAYER_CASES = [(layer, m) for layer in DIT_XL_2 for m in ROWS]
# the ceilings first; what tunes for minutes last
CASES = [("8192^3", SQUARE, name) for name in (FULL, "torch._int_mm", "W8A8")]
CASES += [(layer, m, name) for layer, m in LAYER_CASES for name in CANDIDATES]
CASES += [(layer, m, name) for layer, m in LAYER_CASES for name in RIVALS]


def candidate(layer: str, m: int, name: str) -> Candidate:
    p = problem(layer, m)
    build, bound = BUILDERS[name]
    launch = build(p)
    copies = min(p.copies, RIVAL_COPIES) if name in RIVALS else p.copies

    def error(y: torch.Tensor, i: int) -> float:
        i %= copies
        if y.dtype == torch.int32:
            y = y * (p.int8[1][i] * p.x_scale) + p.bias
        return relative_error(y, p.expected(i))

    return Candidate(lambda i: launch(i % copies), error, bound, p.launches)


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_linear(measure: Measure, request: pytest.FixtureRequest, layer: str, m: int, name: str) -> None:
    n, k = DIT_XL_2.get(layer, (SQUARE, SQUARE))
    row = {"op": "linear", "layer": layer, "m": m, "n": n, "k": k, "candidate": name}
    row["activations"] = "int8" if name in INT8_INPUT else "float"
    row["ceiling"] = "bf16" if name in FLOAT_PRODUCT else "int8"
    rivals = request.config.getoption("--rivals")
    skip = None
    if DEVICE == "cpu" and (layer not in DIT_XL_2 or name not in ON_CPU):
        skip = NO_GPU
    elif name in RIVALS and (rivals == "none" or (rivals == "fast" and m != FAST_ROWS)):
        skip = f"--rivals {rivals}"
    against = (FULL, lambda: candidate(layer, m, FULL)) if name.startswith(OURS) else None
    measure(row, lambda: candidate(layer, m, name), skip, rival=against, operations=2 * m * n * k)
