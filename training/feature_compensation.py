"""Measure what compensation of features is worth on fashion-dit in full precision: mode x interval x pull x schedule.

python training/feature_compensation.py --out results/cpu/feature-compensation.json --device cpu --fit 20 --images 20 \
    --steps 20 --intervals 3,4,5

On two cores, with few images; ``evaluate_feature_compensation.py`` is for a GPU, and for quantized models.

PSNR is that of latents of other noise than was fitted on, to those of the model without a cache. Without a schedule a
row has the uniform one, else one of as many compute steps: "calibrated" where errors are least, "calibrated,
compensated" where what compensation leaves of them is least.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DiTPipeline

from qandc import (
    CacheConfig,
    fashion_dit_path,
    fit_feature_compensation,
    sample_latents,
    schedule_from_run,
)
from qandc.cache import attached_cache
from qandc.caching.compensation import DEFAULT_PULL
from qandc.evaluation.metrics import psnr
from qandc.experiments.report import measure_rows
from quality import Out, Seconds, command

FORMS = (("delta", 1), ("branch", 1), ("taylor", 1), ("taylor", 2))
COMPENSATED = "calibrated, compensated"
FIRST_OF_OTHERS = 1_000_000  # seed


def main(
    out: Out,
    fit: Annotated[int, typer.Option(min=1, help="Images to fit on.")] = 40,
    images: Annotated[int, typer.Option(min=1, help="Images of other noise to compare.")] = 200,
    steps: int = 50,
    guidance_scale: float = 1.5,
    intervals: Annotated[str, typer.Option(help="Comma-separated.")] = "3,5,8",
    along: Annotated[str, typer.Option(help="uncached or corrected.")] = "uncached",
    seconds: Seconds = 1e9,
    device: str = "cuda",
) -> None:
    """Draw with each cache, plain and compensated."""
    pipe = DiTPipeline.from_pretrained(fashion_dit_path()).to(device)
    model, scheduler = pipe.transformer, DDIMScheduler.from_config(pipe.scheduler.config)

    def draw(first: int, count: int) -> torch.Tensor:
        seeds, run = range(first, first + count), {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        return sample_latents(model, scheduler, [seed % 10 for seed in seeds], seeds=seeds, **run)

    true = draw(FIRST_OF_OTHERS, images)
    peak = float(true.max() - true.min())

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        form, found = {"mode": row["mode"], "order": row["order"]}, None
        config = CacheConfig(interval=row["interval"], **form)
        if "schedule" in row:
            form |= {"computed_steps": sum(config.of_steps(steps)), "compensated": row["schedule"] == COMPENSATED}
            config = schedule_from_run(model, lambda: draw(0, fit), **form).config()
        if row["pull"] is not None:
            how = {"form": "least_squares", "along": along, "pull": row["pull"]}
            found = fit_feature_compensation(model, lambda: draw(0, fit), config=config, **how)
        with attached_cache(model, config, found):
            values = psnr(draw(FIRST_OF_OTHERS, images), true, peak)
        bytes_ = 0 if found is None else found.nbytes
        computed = "".join(".C"[step] for step in config.of_steps(steps))
        figures = {"psnr": float(values.mean()), "psnr_std": float(values.std()), "compensation_bytes": bytes_}
        return {**figures, "steps": computed}

    forms = [
        {"mode": mode, "order": order, "interval": int(interval)}
        for mode, order in FORMS
        for interval in intervals.split(",")
    ]
    rows: list[dict[str, Any]] = []
    for form in forms:
        corrected = {**form, "pull": DEFAULT_PULL[form["mode"]]}
        rows += [{**form, "pull": None}, corrected]
        rows += [{**corrected, "schedule": schedule} for schedule in ("calibrated", COMPENSATED)]
    rows += [{**form, "pull": pull} for form in forms for pull in (0.0, 0.5, 1.0)]
    settings = {"fit": fit, "images": images, "steps": steps, "guidance_scale": guidance_scale, "scheduler": "ddim"}
    measure_rows(out, {**settings, "along": along, "dtype": "float32"}, rows, measure, seconds=seconds)


if __name__ == "__main__":
    command(main)
