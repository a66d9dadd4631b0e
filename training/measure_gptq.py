"""Measure time and memory of rounding FLUX.1-dev to 4 bits by GPTQ, block by block (random weights, 1024 x 1024).

python -m training.measure_gptq                        # on a GPU: a few minutes, 40 GB
python -m training.measure_gptq --offload              # weights on the CPU, blocks brought one by one: 24 GB
python -m training.measure_gptq --tiny --samples 2     # a try, on a CPU too
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.families import clone, inputs, model_of
from benchmarks.timing import DEVICE
from qandc import quantization_report, quantize_model
from qandc.experiments.report import measure_rows
from qandc.method.block_hessians import BlockHessians
from qandc.quantization.observe import unquantized

logger = logging.getLogger("measure_gptq")

MODEL = "FLUX.1-dev"
TINY = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}


def now() -> float:
    """Read the clock when the GPU has done its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed(BlockHessians):
    """Add up the seconds that Hessians take, and tell how far the work is."""

    seconds, asked = 0.0, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        asked = now()
        if not self.asked:
            self.started = asked
        found = super().__getitem__(name)
        done = now()
        self.seconds += done - asked
        self.asked += 1
        logger.info(
            "%d of %d layers, hessians %.1f s, rounding %.1f s: %s",
            *(self.asked, len(self), self.seconds, done - self.started - self.seconds, name),
        )
        return found


def measure(samples: int, tiny: bool, offload: bool) -> dict[str, Any]:
    """Round all layers of the plan with Hessians of so many calls of the transformer."""
    model = clone(model_of(MODEL, **(TINY if tiny else {})))
    batches = [inputs(MODEL, 1000 * (1 - i / samples)) for i in range(samples)]
    if offload:
        model.enable_group_offload(
            torch.device(DEVICE), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    hessians = Timed(model, lambda: batches, unquantized(model, None, "gather Hessians"))
    quantize_model(model, w_bits=4, weight_clip="mse", hessians=hessians)
    seconds = now() - hessians.started
    report = quantization_report(model)
    before, after = report.quantized_bytes
    return {
        "seconds": seconds,
        "seconds_hessians": hessians.seconds,
        "seconds_rounding": seconds - hessians.seconds,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "layers": len(report.quantized),
        "quantized_bytes_before": before,
        "quantized_bytes_after": after,
    }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare 16 samples with what was asked for."""
    whole, offloaded = (
        next((row for row in rows if row["samples"] == 16 and row["offload"] is offload), {})
        for offload in (False, True)
    )
    asked = {
        "seconds_16_samples": (whole.get("seconds"), "s", 240),
        "peak_bytes_16_samples": (whole.get("peak_gpu_bytes"), "B", 40e9),
        "peak_bytes_16_samples_offloaded": (offloaded.get("peak_gpu_bytes"), "B", 24e9),
    }
    rest = {"better": "lower", "goal": None}
    return [{"name": name, "value": v, "unit": unit, "must": must, **rest} for name, (v, unit, must) in asked.items()]


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; one that is there is continued.")] = Path(
        "results/h200/gptq.json"
    ),
    samples: str = "16,64",
    offload: Annotated[bool, typer.Option("--offload", help="Keep weights on the CPU between blocks.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="One block of each kind, two heads.")] = False,
) -> None:
    """Measure each number of samples; the same command goes on where it was cut off."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = [{"samples": int(count), "offload": offload} for count in samples.split(",")]
    settings = {"model": f"{MODEL}, random weights", "tiny": tiny, "device": DEVICE, "tokens": 512 + 4096}
    measure_rows(out, settings, rows, lambda row: measure(row["samples"], tiny, row["offload"]), goals=goals)


if __name__ == "__main__":
    typer.run(main)
