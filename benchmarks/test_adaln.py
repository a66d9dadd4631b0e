"""LayerNorm, modulation and quantization, which wait for memory: bytes per second, against a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import Measure
from benchmarks.goals import ADALN, EAGER
from benchmarks.problems import DTYPE, HIDDEN, ROWS, TOKENS, copies_beyond_l2
from benchmarks.timing import DEVICE, Candidate, launches_for, relative_error
from qandc_kernels import adaln_quantize_per_tensor, adaln_quantize_per_token, reference

COMPILED, COMPILED_PER_TOKEN = "compiled torch", "compiled torch, per token"
ADALN_PER_TOKEN = "adaln_quantize_per_token"
COPIES = {"1 GiB": 2**29, "38 MB": 16384 * HIDDEN}  # elements of two bytes
BOUND, BF16_BOUND = 0.01, 0.03  # to the reference; torch rounds to bf16 on the way
EPS = 1e-6
FASTEST = 4e12  # bytes per second, to guess the time of a launch


def quantize_torch(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, q_scale: torch.Tensor) -> torch.Tensor:
    y = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]
    return (y.float() / q_scale).round().clamp(-128, 127).to(torch.int8)


def quantize_torch_per_token(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    y = (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]).float()
    token_scale = y.abs().amax(-1).clamp(min=1e-10) / 127
    return (y / token_scale[..., None]).round().clamp(-128, 127).to(torch.int8), token_scale


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, dynamic=False)


FUNCTIONS: dict[str, Callable[[], Callable[..., Any]]] = {
    EAGER: lambda: quantize_torch,
    COMPILED: lambda: compiled(quantize_torch),
    ADALN: lambda: adaln_quantize_per_tensor,
    COMPILED_PER_TOKEN: lambda: compiled(quantize_torch_per_token),
    ADALN_PER_TOKEN: lambda: adaln_quantize_per_token,
}
CASES = [("LN", m, name) for m in ROWS for name in FUNCTIONS]


def candidate(m: int, name: str) -> Candidate:
    """Inputs and outputs both rotate over so many tensors that all come from memory and go to it."""
    copies = copies_beyond_l2(2 * m * HIDDEN)
    samples = -(-m // TOKENS)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)

    x = normal(copies, samples, m // samples, HIDDEN)
    shift, scale = normal(samples, 6 * HIDDEN).chunk(6, dim=1)[:2]
    q_scale = torch.tensor(8 / 127, device=DEVICE)
    per_token = name in (COMPILED_PER_TOKEN, ADALN_PER_TOKEN)
    function = FUNCTIONS[name]()
    arguments = (shift, scale) if per_token else (shift, scale, q_scale)

    def launch(i: int) -> Any:
        return function(x[i % copies], *arguments)

    def error(result: Any, i: int) -> float:
        if not per_token:
            return relative_error(result, reference.adaln_quantize_per_tensor(x[i % copies], shift, scale, q_scale))
        expected, expected_scale = reference.adaln_quantize_per_token(x[i % copies], shift, scale)
        q, q_scales = result
        return relative_error(q * q_scales[..., None], expected * expected_scale[..., None])

    bound = BOUND if name in (ADALN, ADALN_PER_TOKEN) else BF16_BOUND
    return Candidate(launch, error, bound, launches_for(copies, 3 * m * HIDDEN / FASTEST), keep=copies)


def copy(elements: int) -> Candidate:
    """``torch.neg``: reads and writes every element, and is not handed to a copy engine."""
    copies = 2 if elements == COPIES["1 GiB"] else copies_beyond_l2(2 * elements)
    x = torch.randn(copies, elements, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)

    def launch(i: int) -> torch.Tensor:
        return torch.neg(x[i % copies], out=y[i % copies])

    def error(result: torch.Tensor, i: int) -> float:
        return float(not torch.equal(result, -x[i % copies]))

    return Candidate(launch, error, 0, launches_for(copies, 4 * elements / FASTEST))


@pytest.mark.parametrize("layer", COPIES)
def test_copy(measure: Measure, layer: str) -> None:
    elements = COPIES[layer]
    row: dict[str, Any] = {"op": "copy", "layer": layer, "m": None, "candidate": "torch.neg"}
    measure(row | {"ceiling": "copy"}, lambda: copy(elements), nbytes=4 * elements)


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_adaln(measure: Measure, layer: str, m: int, name: str) -> None:
    row: dict[str, Any] = {"op": "adaln", "layer": layer, "m": m, "k": HIDDEN, "candidate": name}
    measure(row | {"ceiling": "copy"}, lambda: candidate(m, name), nbytes=3 * m * HIDDEN)
