"""Matrix products at the sizes of FLUX.1 and Qwen-Image: ours, bf16's and torch's fp8."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import Measure
from benchmarks.goals import BF16, FP8, LARGE_LAYERS, LARGE_ROWS, PER_TOKEN, STATIC
from benchmarks.problems import Problem, copies_beyond_l2
from benchmarks.timing import Candidate, relative_error
from qandc_kernels import int4_linear, int8_linear, quantize_per_tensor, quantize_per_token

Launch = Callable[[int], torch.Tensor]


@lru_cache(maxsize=1)
def large_problem(layer: str, m: int) -> Problem:
    n, k = LARGE_LAYERS[layer]
    return Problem(n, k, m, min(4, copies_beyond_l2(n * k / 2)))


def fp8(p: Problem) -> Launch:
    """One scale per row of the activations and per channel of the weight, as torchao's fastest fp8."""
    largest = torch.finfo(torch.float8_e4m3fn).max

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(-1, keepdim=True).float() / largest
        return (x / scale).to(torch.float8_e4m3fn), scale

    (x, x_scale), weights = quantize(p.x), [quantize(w) for w in p.w]
    operands = [(w.t(), scale.t()) for w, scale in weights]

    def launch(i: int) -> torch.Tensor:
        w, w_scale = operands[i]
        return torch._scaled_mm(x, w, x_scale, w_scale, p.bias, out_dtype=p.bias.dtype, use_fast_accum=True)

    return launch


def static(bits: int, p: Problem) -> Launch:
    """Build our product with one scale and zero point for all rows, as calibration gives them."""
    w, scale = p.int8 if bits == 8 else p.int4
    op = int8_linear if bits == 8 else int4_linear
    low, high = p.x.aminmax()
    x_scale = (high - low).float() / 255
    zero = (-128 - low / x_scale).round().to(torch.int32)
    xq, sums = quantize_per_tensor(p.x, x_scale, zero), [_sums(q) for q in w]
    return lambda i: op(xq, w[i], x_scale, scale[i], p.bias, zero, sums[i])


def _sums(q: torch.Tensor) -> torch.Tensor:
    if q.dtype == torch.int8:
        return q.sum(1, dtype=torch.int32)
    nibbles = torch.cat([q << 4, q & 0xF0], 1).view(torch.int8) >> 4
    return nibbles.sum(1, dtype=torch.int32)


def per_token(bits: int, p: Problem) -> Launch:
    w, scale = p.int8 if bits == 8 else p.int4
    op = int8_linear if bits == 8 else int4_linear
    xq, x_scale = quantize_per_token(p.x)
    return lambda i: op(xq, w[i], x_scale, scale[i], p.bias)


CANDIDATES: dict[str, tuple[Callable[[Problem], Launch], float]] = {
    BF16: (lambda p: lambda i: F.linear(p.x, p.w[i], p.bias), 0.01),
    FP8: (fp8, 0.06),
    STATIC: (lambda p: static(8, p), 0.03),
    PER_TOKEN: (lambda p: per_token(8, p), 0.03),
    "W4A8": (lambda p: static(4, p), 0.2),
    "W4A8 per token": (lambda p: per_token(4, p), 0.2),
}
CASES = [(layer, m, name) for layer in LARGE_LAYERS for m in LARGE_ROWS for name in CANDIDATES]


def candidate(layer: str, m: int, name: str) -> Candidate:
    p = large_problem(layer, m)
    build, bound = CANDIDATES[name]
    launch = build(p)

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, p.expected(i % p.copies))

    return Candidate(lambda i: launch(i % p.copies), error, bound, p.launches)


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_product(measure: Measure, layer: str, m: int, name: str) -> None:
    n, k = LARGE_LAYERS[layer]
    row = {"op": "products", "layer": layer, "m": m, "n": n, "k": k, "candidate": name}
    against = (FP8, lambda: candidate(layer, m, FP8)) if name.startswith("W") else None
    measure(row, lambda: candidate(layer, m, name), rival=against, operations=2 * m * n * k)
