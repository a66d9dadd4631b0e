"""One forward of the models that people run, as called from Python: ours, bf16 and what rivals make of it."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.conftest import WITHOUT_GPU, Measure
from benchmarks.families import FAMILIES, inputs, model_of
from benchmarks.models import tensor_bytes
from benchmarks.rivals import library
from benchmarks.timing import Candidate, relative_error
from qandc import calibrate, graph, quantization_plan, quantize_model
from qandc.quantization.linear import QuantLinear

Model = Any
LAUNCHES = 5  # forwards behind one measurement
current: dict[str, Any] = {}  # the model of the candidate measured last; the next one's takes its place


def _clone(model: Model) -> Model:
    """Copy modules, not what they hold: two models of 40 GB would be too much for some GPUs."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def _compiled(model: Model) -> Model:
    """Regional compilation, as diffusers recommends it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.modules():
        if type(block).__name__.endswith("Block"):  # PixArt does not say which of its blocks repeat
            block.compile(fullgraph=True, dynamic=False)
    return model


def _quantized(model: Model, layer: str, w_bits: int, conditioning: str | None = None) -> Model:
    """The default plan with static ranges; modulation stays in bf16, or its weights alone are quantized.

    PixArt has none in its blocks.
    """
    quantized = quantize_model(_clone(model), w_bits=w_bits, conditioning=conditioning)
    return calibrate(quantized, [inputs(layer, timestep) for timestep in (900.0, 500.0, 100.0)])


def _torchao(model: Model, config: str, per_row: bool = False) -> Model:
    """Quantize by torchao the layers that ``quantize_model`` would, and compile the blocks."""
    library("torchao")
    quantization = importlib.import_module("torchao.quantization")
    names = {row.name for row in quantization_plan(model).quantized}
    options = {"granularity": quantization.PerRow()} if per_row else {}
    chosen, model = getattr(quantization, config)(set_inductor_config=False, **options), copy.deepcopy(model)
    quantization.quantize_(model, chosen, filter_fn=lambda module, name: name in names)
    return _compiled(model)


CANDIDATES: dict[str, tuple[Callable[[Model, str], Model], float]] = {
    # how it is made from the bf16 model, and how far its output may be from that model's
    "bf16 eager": (lambda model, layer: _clone(model), 0.02),
    "bf16 compiled": (lambda model, layer: _compiled(_clone(model)), 0.05),
    "QuantLinear W8A8": (lambda model, layer: _quantized(model, layer, 8), 0.2),
    "QuantLinear W8A8, graph()": (lambda model, layer: graph(_quantized(model, layer, 8)), 0.2),
    "QuantLinear W8A8, compiled": (lambda model, layer: _compiled(_quantized(model, layer, 8)), 0.2),
    "QuantLinear W8A8 + W8A16, compiled, graph()": (
        lambda model, layer: graph(_compiled(_quantized(model, layer, 8, "W8A16"))),
        0.2,
    ),
    "QuantLinear W4A8 + W4A16": (lambda model, layer: _quantized(model, layer, 4, "W4A16"), 0.6),
    "QuantLinear W4A8 + W4A16, compiled, graph()": (
        lambda model, layer: graph(_compiled(_quantized(model, layer, 4, "W4A16"))),
        0.6,
    ),
    "torchao fp8 rowwise, compiled": (
        lambda model, layer: _torchao(model, "Float8DynamicActivationFloat8WeightConfig", per_row=True),
        0.3,
    ),
    "torchao int8dq, compiled": (lambda model, layer: _torchao(model, "Int8DynamicActivationInt8WeightConfig"), 0.3),
}
BY_TURNS = {"QuantLinear W8A8": "bf16 eager", "QuantLinear W8A8, compiled": "bf16 compiled"}
CASES = [(layer, name) for layer in FAMILIES for name in CANDIDATES]


def candidate(layer: str, name: str) -> Candidate:
    base = model_of(layer)
    arguments = inputs(layer)
    if current.get("key") != (layer, name):
        current.clear()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        make, bound = CANDIDATES[name]
        expected = base(**arguments)[0]
        current.update(key=(layer, name), model=make(base, layer), expected=expected, bound=bound)
    model, expected = current["model"], current["expected"]
    return _candidate(model, arguments, expected, current["bound"])


def rival(layer: str, name: str) -> Candidate:
    """Make what a candidate takes turns with: processors that others use, too, are fast and slow by turns."""
    make, bound = CANDIDATES[BY_TURNS[name]]
    return _candidate(make(model_of(layer), layer), inputs(layer), current["expected"], bound)


def _candidate(model: Model, arguments: dict[str, Any], expected: torch.Tensor, bound: float) -> Candidate:
    def launch(i: int) -> torch.Tensor:
        return model(**arguments)[0]

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
    if name in BY_TURNS:
        row["rival"] = BY_TURNS[name]
    against = (lambda: rival(layer, name)) if name in BY_TURNS else None
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
