"""One forward of the models that people run, as called from Python: ours, bf16 and what rivals make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.conftest import WITHOUT_GPU, Measure
from benchmarks.families import (
    FAMILIES,
    clone,
    compiled,
    fused,
    fuses,
    inputs,
    model_of,
    quantized,
    torchao_fp8,
)
from benchmarks.models import tensor_bytes
from benchmarks.timing import Candidate, relative_error
from qandc import graph
from qandc.quantization.linear import QuantLinear

Model = Any
LAUNCHES = 5  # forwards behind one measurement
current: dict[str, Any] = {}  # the model of the candidate measured last; the next one's takes its place


CANDIDATES: dict[str, tuple[Callable[[Model, str], Model], float]] = {
    # how it is made from the bf16 model, and how far its output may be from that model's
    "bf16 eager": (lambda model, layer: clone(model), 0.02),
    "bf16 compiled": (lambda model, layer: compiled(clone(model)), 0.05),
    "QuantLinear W8A8": (lambda model, layer: quantized(model, layer, 8), 0.2),
    "QuantLinear W8A8, graph()": (lambda model, layer: graph(quantized(model, layer, 8)), 0.2),
    "QuantLinear W8A8, compiled": (lambda model, layer: compiled(quantized(model, layer, 8)), 0.2),
    "QuantLinear W8A8 + W8A16, compiled, graph()": (
        lambda model, layer: graph(compiled(quantized(model, layer, 8, "W8A16"))),
        0.2,
    ),
    "QuantLinear W8A8 + W8A16, fused, graph()": (lambda model, layer: fused(model, layer, 8), 0.2),
    "QuantLinear W8A8 + W8A16, per token, fused, graph()": (
        lambda model, layer: fused(model, layer, 8, calibrated=False),
        0.2,
    ),
    "QuantLinear W4A8 + W4A16": (lambda model, layer: quantized(model, layer, 4, "W4A16"), 0.6),
    "QuantLinear W4A8 + W4A16, compiled, graph()": (
        lambda model, layer: graph(compiled(quantized(model, layer, 4, "W4A16"))),
        0.6,
    ),
    "QuantLinear W4A8 + W4A16, fused, graph()": (lambda model, layer: fused(model, layer, 4), 0.6),
    "torchao fp8 rowwise, compiled": (
        lambda model, layer: torchao_fp8(model),
        0.3,
    ),
}
BY_TURNS = {  # what decides a claim, and what it takes turns with
    name: "bf16 compiled" if "compiled" in name or "fused" in name else "bf16 eager"
    for name in CANDIDATES
    if not name.startswith("bf16")
}


def _compared(layer: str, name: str) -> bool:
    if "torchao" in name:  # once: it takes long
        return layer == "FLUX.1-dev"
    if "fused" in name:
        return fuses(layer)
    return "compiled, graph()" not in name or not fuses(layer)  # which optimize does where there are no kernels


LAYERS = [layer for layer in FAMILIES if not layer.endswith("-512")]  # those are there for images
CASES = [(layer, name) for layer in LAYERS for name in CANDIDATES if _compared(layer, name)]


def output(model: Model, arguments: dict[str, Any]) -> torch.Tensor:
    found = model(**arguments)[0]
    return torch.stack(found) if isinstance(found, list) else found  # Z-Image takes and gives lists


def candidate(layer: str, name: str) -> Candidate:
    base = model_of(layer)
    arguments = inputs(layer)
    if current.get("key") != (layer, name):
        current.clear()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        make, bound = CANDIDATES[name]
        expected = output(base, arguments)
        current.update(key=(layer, name), model=make(base, layer), expected=expected, bound=bound)
    model, expected = current["model"], current["expected"]
    return _candidate(model, arguments, expected, current["bound"])


def rival(layer: str, name: str) -> Candidate:
    """Make what a candidate takes turns with: processors that others use, too, are fast and slow by turns."""
    make, bound = CANDIDATES[BY_TURNS[name]]
    return _candidate(make(model_of(layer), layer), inputs(layer), current["expected"], bound)


def _candidate(model: Model, arguments: dict[str, Any], expected: torch.Tensor, bound: float) -> Candidate:
    def launch(i: int) -> torch.Tensor:
        return output(model, arguments)

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, expected)

    return Candidate(launch, error, bound, LAUNCHES, wall_clock=True)


@pytest.mark.parametrize(("layer", "name"), CASES)
def test_forward(measure: Measure, request: pytest.FixtureRequest, layer: str, name: str) -> None:
    tokens = FAMILIES[layer].tokens
    row: dict[str, Any] = {"op": "models", "layer": layer, "m": tokens, "candidate": name}
    skip = WITHOUT_GPU
    if "torchao" in name and request.config.getoption("--rivals") == "none":
        skip = "rivals: none"
    against = (BY_TURNS[name], lambda: rival(layer, name)) if name in BY_TURNS else None
    measure(row, lambda: candidate(layer, name), skip, rival=against)
    if "median_us" not in row:
        return
    model = current["model"]
    row["model_bytes"] = tensor_bytes(model)
    row["quantized_layers"] = sum(isinstance(module, QuantLinear) for module in model.modules())
    if "graph()" in name:  # its memory is its own, whether it runs or not
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model(**inputs(layer))
    torch.cuda.synchronize()
    row["peak_bytes"] = row["model_bytes"] + torch.cuda.max_memory_allocated() - before
