"""Make the settings that come with wardrobe, for W8A8 and W4A8, and measure their likeness to full precision.

python training/calibrate_wardrobe.py                                                          # minutes on a GPU
python training/calibrate_wardrobe.py --images 4 --pool-images 2 --device cpu --out /tmp/presets       # a try

They are calibrated on captions of scenes, and measured on others. The weights are quantized from the pipeline's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qandc import CacheConfig, Preset, QuantConfig, calibrate_on_prompts, load_pipeline, optimize, restore
from qandc.cli.terminal import stage_bars
from qandc.evaluation.metrics import psnr
from qandc.evaluation.scenes import SIZE, draw_scenes
from qandc.method.saved import LIKENESS, shipped_settings
from qandc.sampling.prompts import text_length
from qandc.support.files import write_json
from quality import command

CALIBRATION, OTHERS = 70_000_000, 80_000_000  # seeds of the scenes to calibrate on, and of scenes and noise to measure
BATCH = 50
PRESETS = shipped_settings("wardrobe", 8).parent


def main(
    out: Path = PRESETS,
    model: str = "wardrobe",
    images: Annotated[int, typer.Option(min=1, help="To measure likeness on.")] = 1000,
    pool_images: int = 64,
    samples: int = 512,
    steps: int = 28,
    cache_mode: str = "taylor",
    cache_interval: int = 3,
    compensation: Annotated[str | None, typer.Option(help="features, samples or none; default: features.")] = None,
    gptq: Annotated[bool, typer.Option(help="Round the weights of 4 bits with GPTQ, and keep them: 3.5 MB.")] = False,
    device: str = "cuda",
) -> None:
    """Calibrate, save, draw in full precision and with the settings."""
    run: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_inference_steps": steps}
    captions = [scene.caption for scene in draw_scenes(pool_images, CALIBRATION)]
    found_with: dict[str, Any] = {"pool_images": pool_images, "samples": samples, "compensation": compensation}
    found_with["conditioning"] = "W8A16"
    found_with["cache"] = CacheConfig(cache_mode, interval=cache_interval)
    for bits in (8, 4):
        pipe = load_pipeline(model, device)
        pipe.set_progress_bar_config(disable=True)
        keep = gptq and bits == 4
        with stage_bars() as show:
            found = calibrate_on_prompts(pipe, captions, w_bits=bits, gptq=keep, progress=show, **found_with, **run)
        Preset.of(
            found.model,
            QuantConfig(bits, 8, weight_clip="mse" if keep else "max", conditioning=found_with["conditioning"]),
            found.schedule,
            found.compensation,
            features=found.features,
            scheduler=type(pipe.scheduler).__name__,
            guidance_scale=1,
            keep_weights=keep,
            source="wardrobe",
        ).save(out / f"w{bits}a8")

    pipe = load_pipeline(model, device)
    pipe.set_progress_bar_config(disable=True)
    captions = [scene.caption for scene in draw_scenes(images, OTHERS)]

    def draw() -> torch.Tensor:
        parts = []
        for first in range(0, images, BATCH):
            texts = captions[first : first + BATCH]
            noise = [torch.Generator().manual_seed(OTHERS + first + i) for i in range(len(texts))]
            made = pipe(texts, generator=noise, output_type="pt", **text_length(pipe), **run).images
            parts.append(made.float().cpu() * 2 - 1)
        return torch.cat(parts)

    full, likeness = draw(), {}
    for bits in (8, 4):
        optimize(pipe, calibrated=out / f"w{bits}a8", cache=None)
        found = psnr(draw(), full)
        restore(pipe)
        likeness[f"w{bits}a8"] = {"images": images, "psnr_mean": float(found.mean()), "psnr_min": float(found.min())}
    write_json(out / LIKENESS, likeness)
    typer.echo(f"wrote {out}: {likeness}")


if __name__ == "__main__":
    command(main)
