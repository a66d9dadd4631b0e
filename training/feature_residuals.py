"""Measure what is left of the error of reused features, by step and block, of fashion-dit in full precision.

python training/feature_residuals.py --out results/cpu/feature-residuals.json      # a minute on two cores

A row is one cache; its errors are ``|f - g| / |g|`` of what is reused, f, and what the branches of a block compute, g,
on other noise than was fitted on: plain, and corrected by a compensation. Along the run without a cache.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, DiTPipeline

from qandc import CacheConfig, fashion_dit_path, fit_feature_compensation, sample_latents
from qandc.caching.schedule import forecast_weights
from qandc.experiments.report import measure_rows
from quality import Out, command


def main(
    out: Out,
    images: Annotated[int, typer.Option(min=1, help="Images to fit on, and as many to measure.")] = 10,
    steps: int = 20,
    interval: int = 4,
    device: str = "cpu",
) -> None:
    """Record all features of a run, and compare those that caches would reuse."""
    pipe = DiTPipeline.from_pretrained(fashion_dit_path()).to(device)
    model, scheduler = pipe.transformer, DDIMScheduler.from_config(pipe.scheduler.config)
    blocks = model.transformer_blocks

    def draw(first: int) -> torch.Tensor:
        seeds = range(first, first + images)
        labels = [seed % 10 for seed in seeds]
        return sample_latents(model, scheduler, labels, seeds=seeds, num_inference_steps=steps, guidance_scale=1.5)

    seen: list[torch.Tensor] = []
    branches = [branch for block in blocks for branch in (block.attn1, block.ff)]
    handles = [branch.register_forward_hook(lambda module, args, output: seen.append(output)) for branch in branches]
    draw(1_000_000)
    for handle in handles:
        handle.remove()
    features = torch.stack(seen).unflatten(0, (steps, len(blocks), 2))

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        config = CacheConfig(row["mode"], interval=interval, order=row["order"])
        found = fit_feature_compensation(model, lambda: draw(0), config=config)
        schedule, errors = config.of_steps(steps), []
        reused = (step for step in range(steps) if not schedule[step])
        for step, gains, offsets in zip(reused, found.gains, found.offsets, strict=True):
            computed = [s for s in reversed(range(step)) if schedule[s]][: config.history]
            weights = forecast_weights(computed, step, config.history - 1)
            f, g = sum(w * features[s] for w, s in zip(weights, computed, strict=True)), features[step]
            corrected = gains[:, :, None, None] * f + offsets[:, :, None, None]
            size = g.flatten(1).norm(dim=1)
            of_blocks = [((x - g).flatten(1).norm(dim=1) / size).tolist() for x in (f, corrected)]
            errors.append({"step": step, "plain": of_blocks[0], "corrected": of_blocks[1]})
        return {"errors": errors}

    rows = [{"mode": "branch", "order": 1}, {"mode": "taylor", "order": 1}]
    settings = {"images": images, "steps": steps, "interval": interval, "scheduler": "ddim", "dtype": "float32"}
    measure_rows(out, settings, rows, measure)


if __name__ == "__main__":
    command(main)
