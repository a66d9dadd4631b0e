"""Time one fused forward op by op (random weights, 1024 x 1024).

python -m training.measure_parts --layer FLUX.1-dev --w-bits 8   # on a GPU: a minute or two
python -m training.measure_parts --out results/h200/parts.json   # a row of a file that others continue
python -m training.measure_parts --per-token                     # scales per token, as without calibration
python -m training.measure_parts --tiny                          # a try, on a CPU too, where nothing is fused
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.families import inputs, model_of, quantized
from benchmarks.timing import DEVICE, capture
from qandc import fuse
from qandc.support.files import write_json
from qandc.support.results import measured_rows, result_header

TINY = {"num_layers": 1, "num_attention_heads": 2}
HEAD_START = 100_000_000  # cycles that the GPU spins while the host launches some ops ahead of it
AHEAD = 200  # ops; with their events fewer than the launches that a stream queues before the host has to wait


class _Clock(TorchDispatchMode):
    """Note a span of time for each op that launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or "empty" in func.__name__:
            return func(*args, **(kwargs or {}))
        if DEVICE == "cuda" and len(self.spans) % AHEAD == 0:
            torch.cuda.synchronize()
            torch.cuda._sleep(HEAD_START)
        begin = _now()
        result = func(*args, **(kwargs or {}))
        parts = [part for value in args for part in (value if isinstance(value, list | tuple) else [value])]
        shapes = ["x".join(map(str, p.shape)) for p in parts if isinstance(p, torch.Tensor) and p.ndim > 1]
        self.spans.append((" ".join([str(func).removesuffix(".default"), *shapes]), begin, _now()))
        return result


def _now() -> Any:
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if DEVICE == "cpu" else begin.elapsed_time(end)


@torch.no_grad()
def parts(layer: str, w_bits: int, per_token: bool = False, **sizes: Any) -> tuple[dict[str, tuple[int, float]], float]:
    """Return how often each op runs in a forward with how many ms in all, and the ms of a graph of the forward."""
    model = fuse(quantized(model_of(layer, **sizes), layer, w_bits, f"W{w_bits}A16", not per_token))
    arguments = inputs(layer)
    for _ in range(2):
        model(**arguments)
    with _Clock() as clock:
        model(**arguments)
    if DEVICE == "cpu":
        whole = sum(_milliseconds(*span[1:]) for span in clock.spans)
    else:
        torch.cuda.synchronize()
        graph = capture(lambda i: model(**arguments)[0], 1, 1)
        whole = min(1e3 * graph.seconds() for _ in range(10))
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for name, begin, end in clock.spans:
        count, total = found[name]
        found[name] = count + 1, total + _milliseconds(begin, end)
    return dict(sorted(found.items(), key=lambda item: -item[1][1])), whole


def main(
    layer: str = "FLUX.1-dev", w_bits: int = 8, per_token: bool = False, tiny: bool = False, out: Path | None = None
) -> None:
    """Print the ops of a forward, those that take longest first."""
    header = result_header({"tiny": tiny})
    rows = measured_rows(out, header) if out else []
    found, whole = parts(layer, w_bits, per_token, **(TINY if tiny else {}))
    launches, total = sum(count for count, _ in found.values()), sum(ms for _, ms in found.values())
    if out:
        key = {"layer": layer, "w_bits": w_bits, "per_token": per_token}
        ops = [{"op": name, "count": count, "ms": ms} for name, (count, ms) in found.items()]
        rows = [row for row in rows if not key.items() <= row.items()]
        write_json(out, {**header, "rows": [*rows, {**key, "graph_ms": whole, "ops": ops}], "goals": []})
    typer.echo(f"{layer} W{w_bits}A8 fused: {whole:.2f} ms as a graph, {total:.2f} in {launches} ops")
    for name, (count, ms) in found.items():
        typer.echo(f"{ms:8.3f} ms {count:4d} x {1e3 * ms / count:8.1f} µs  {name}")


if __name__ == "__main__":
    typer.run(main)
