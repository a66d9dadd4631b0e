"""One denoising step of DiT-XL/2, as a whole: ours, bf16, and what others make of it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks.conftest import WITHOUT_GPU, Measure
from benchmarks.goals import CALLED, COMPILED, DROP_IN, FUSED_CALLED, INT8DQ
from benchmarks.models import CANDIDATES, block_linear_bytes, dit_xl_2, floor_seconds, inputs, operations, tensor_bytes
from benchmarks.timing import Candidate, launches_for, relative_error
from qandc import prepare_run

SIZES = {256: (32, (2, 16, 64)), 512: (64, (2, 16))}  # pixels: latent size, rows of a batch
CASES = [
    (f"DiT-XL/2-{pixels}", m, name)
    for pixels, (_, rows) in SIZES.items()
    for name in CANDIDATES
    for m in rows
    if name != INT8DQ or (pixels, m) == (256, 16)  # minutes of tuning for each size
]
BY_TURNS = {  # what decides a claim, and what it takes turns with
    **{name: COMPILED for name in CANDIDATES if name.startswith("fused") or name == DROP_IN},
    FUSED_CALLED: CALLED,
    **dict.fromkeys((f"{DROP_IN}, called", f"{DROP_IN}, graph(), called"), f"{COMPILED}, called"),
}
IMAGES_STEPS = 50
PARTS = ("adaLN 1", "qkv", "attention", "out + gate", "adaLN 2", "fc1 + GELU", "fc2 + gate")
KERNELS = ("_adaln_quantize_kernel", "_int8_gemm_kernel", "_mixed_gemm_kernel", "_attention_quantize_kernel")

current: dict[str, Any] = {}  # the model of the candidate measured last; the next one's takes its place


def base_of(layer: str) -> Any:
    latent, _ = SIZES[int(layer.rpartition("-")[2])]
    return dit_xl_2(latent)


def model_of(layer: str, name: str) -> Any:
    if current.get("key") != (layer, name):
        current.clear()
        torch._dynamo.reset()  # blocks of other models would be looked through at each call
        torch.cuda.empty_cache()
        with torch.no_grad():
            current.update(key=(layer, name), model=CANDIDATES[name][0](base_of(layer)))
    return current["model"]


def inputs_of(layer: str, m: int, name: str) -> dict[str, Any]:
    arguments = inputs(base_of(layer), m)
    if name.endswith("prepared run"):  # as qandc.sample_latents does it
        labels = arguments["class_labels"]
        arguments["timestep"] = prepare_run(model_of(layer, name), arguments["timestep"][:1], labels)[0]
    return arguments


def candidate(layer: str, m: int, name: str) -> Candidate:
    return _candidate(layer, m, name, model_of(layer, name), inputs_of(layer, m, name))


def rival(layer: str, m: int, name: str) -> Candidate:
    """Make what a candidate takes turns with; it stays beside the model measured last."""
    if "rival" not in current:
        current["rival"] = CANDIDATES[name][0](base_of(layer))
    return _candidate(layer, m, name, current["rival"], inputs(base_of(layer), m))


def _candidate(layer: str, m: int, name: str, model: Any, arguments: dict[str, Any]) -> Candidate:
    base = base_of(layer)
    expected = base(**inputs(base, m))[0]

    def launch(i: int) -> torch.Tensor:
        return model(**arguments)[0]

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, expected)

    launches = launches_for(1, 2 * sum(operations(base, m)) / 1e15)
    return Candidate(launch, error, CANDIDATES[name][1], launches, wall_clock=name.endswith("called"))


def breakdown(model: Any, arguments: dict[str, Any]) -> dict[str, float]:
    """µs of each part of a step, launched kernel by kernel, summed over the blocks; conditioning and ends: "rest"."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad():
        model(**arguments)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            model(**arguments)
            torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type.name == "CUDA" and event.device_time > 0]
    kernels.sort(key=lambda event: event.time_range.start)
    ours = [event for event in kernels if event.name in KERNELS]
    times: dict[str, float] = defaultdict(float)
    first = next(i for i, event in enumerate(ours) if event.name == KERNELS[0])
    blocks = len(model.transformer_blocks) * len(PARTS)
    for i, event in enumerate(ours[first : first + blocks]):
        times[PARTS[i % len(PARTS)]] += event.device_time
    times["rest"] = sum(event.device_time for event in kernels) - sum(times.values())
    return dict(times)


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_step(measure: Measure, request: pytest.FixtureRequest, layer: str, m: int, name: str) -> None:
    row: dict[str, Any] = {"op": "model", "layer": layer, "m": m, "candidate": name}
    skip = WITHOUT_GPU
    if "torchao" in name and request.config.getoption("--rivals") == "none":
        skip = "rivals: none"
    against = (BY_TURNS[name], lambda: rival(layer, m, BY_TURNS[name])) if name in BY_TURNS else None
    measure(row, lambda: candidate(layer, m, name), skip, rival=against)
    if "median_us" not in row:
        return
    base, model = base_of(layer), model_of(layer, name)
    weight_bits = 4 if "W4" in name else 8 if any(part in name for part in ("W8", "int8", "fp8")) else 16
    activation_bits = 16 if "bf16" in name or "simulated" in name else 8
    seconds = row["median_us"] / 1e6
    row["images_per_s"] = m / 2 / (IMAGES_STEPS * seconds)
    row["tops"] = sum(operations(base, m)) / seconds / 1e12
    row["floor_us"] = 1e6 * floor_seconds(base, m, weight_bits, activation_bits)
    row["share_of_floor"] = row["floor_us"] / row["median_us"]
    row["model_bytes"], row["block_linear_bytes"] = tensor_bytes(model), block_linear_bytes(model)
    # a graph keeps its memory to itself; the row of the same step without one has the figure
    if name.endswith("called"):
        return
    arguments = inputs_of(layer, m, name)
    with torch.no_grad():
        model(**arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**arguments)
        torch.cuda.synchronize()
    row["peak_bytes"] = row["model_bytes"] + torch.cuda.max_memory_allocated() - before
    if name in ("fused W8A8", "fused W4A8"):
        row["kernels_us"] = breakdown(model, arguments)
