"""Measure time and memory of rounding FLUX.1-dev to 4 bits by GPTQ, block by block (random weights, 1024 x 1024).

python training/measure_gptq.py                                     # on a GPU: a few minutes
python training/measure_gptq.py --tiny --device cpu --samples 2     # a try
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qandc import block_hessians, quantization_report, quantize_model
from qandc.experiments.report import measure_rows


def make(tiny: bool, device: str) -> Any:
    from diffusers import FluxTransformer2DModel

    small: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2} if tiny else {}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        return FluxTransformer2DModel(guidance_embeds=True, **small).eval()


def samples_of(count: int, side: int, device: str) -> list[dict[str, Any]]:
    """Make inputs of random latents and text at timesteps from 1 to 0."""
    rows = torch.arange(side, device=device, dtype=torch.bfloat16)
    places = torch.stack([torch.zeros(side, side, device=device), *torch.meshgrid(rows, rows, indexing="ij")], -1)
    fixed = {
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": places.view(-1, 3).bfloat16(),
        "txt_ids": torch.zeros(512, 3, device=device),
        "return_dict": False,
    }
    found = []
    for i in range(count):
        noise = {
            name: torch.randn(1, *shape, device=device)
            for name, shape in (
                ("hidden_states", (side * side, 64)),
                ("encoder_hidden_states", (512, 4096)),
                ("pooled_projections", (768,)),
            )
        }
        found.append({**fixed, **noise, "timestep": torch.full((1,), 1 - i / count, device=device)})
    return found


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; one that is there is continued.")] = Path(
        "results/h200/gptq.json"
    ),
    samples: str = "16,64",
    device: str = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="One block of each kind, 64 tokens.")] = False,
) -> None:
    """Round all layers of the plan, with Hessians of so many calls of the transformer."""

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        model = make(tiny, device)
        batches = samples_of(row["samples"], 8 if tiny else 64, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        quantize_model(model, w_bits=4, weight_clip="mse", hessians=block_hessians(model, batches))
        report = quantization_report(model)  # waits for the GPU
        seconds = time.perf_counter() - started
        before, after = report.quantized_bytes
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {
            "seconds": seconds,
            "peak_gpu_bytes": peak,
            "layers": len(report.quantized),
            "quantized_bytes_before": before,
            "quantized_bytes_after": after,
        }

    settings = {"model": "FLUX.1-dev, random weights", "tiny": tiny, "device": device, "tokens": 512 + 4096}
    measure_rows(out, settings, [{"samples": int(count)} for count in samples.split(",")], measure)


if __name__ == "__main__":
    typer.run(main)
