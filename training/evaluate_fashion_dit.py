"""Measure fashion-dit unquantized (float32, TF32 products): Fréchet distance, inception score, class accuracy, floors.

python training/evaluate_fashion_dit.py --out results/h200/fashion-dit.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fashion_mnist import DEFAULT_DIRECTORY, Data, load_split
from qandc.evaluation.pixels import to_float
from qandc.experiments.report import measure_rows
from qandc.sampling.loop import decode_latents, make_scheduler
from quality import Bench, Images, Out, command

TEST, AUTOENCODED = "test images", "test images, autoencoded"
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}),
    ("ddpm", {"timestep_spacing": "trailing"}),
    ("ddpm", {"variance_type": "fixed_large"}),
)
GOALS: tuple[dict[str, Any], ...] = (
    {"name": "frechet_distance", "unit": "1", "better": "lower", "must": 0.535, "goal": 0.45},
    {"name": "class_accuracy", "unit": "1", "better": "higher", "must": 0.95, "goal": 0.95},
)


def main(
    assets: Annotated[Path, typer.Option(help="Directory with fashion-dit.")] = Path("qandc/assets"),
    data: Data = DEFAULT_DIRECTORY,
    out: Out = Path("results/h200/fashion-dit.json"),
    images: Images = 10_000,
    batch: int = 2500,
    steps: int = 50,
    guidance_scale: float = 1.5,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other noise for the main row.")] = 2,
    variants: Annotated[bool, typer.Option(help="Also DDIM and other timestep spacings.")] = False,
    device: str = "cuda",
) -> None:
    """Sample class-balanced images and score them."""
    dit = assets / "fashion-dit"
    bench = Bench(device, images, batch, steps, guidance_scale, dtype=torch.float32, pipeline=dit)
    runs = [("ddpm", {}, 1_000_000 * repeat) for repeat in range(seeds)]
    runs += [(*variant, 0) for variant in VARIANTS if variants]
    names = [" ".join([scheduler, str(steps), *map(str, changes.values())]) for scheduler, changes, _ in runs]
    drawn = [{"name": name, "first_seed": first} for name, (*_, first) in zip(names, runs, strict=True)]

    @torch.inference_mode()
    def autoencoded(pixels: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        parts = to_float(pixels).split(1000)
        latents = (bench.vae.encode(part.to(device)).latent_dist.sample(generator) for part in parts)
        return torch.cat([decode_latents(bench.vae, part) for part in latents])

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        if row["name"] in (TEST, AUTOENCODED):
            pixels, labels = load_split(data, "t10k")
            pixels = autoencoded(pixels) if row["name"] == AUTOENCODED else pixels
            return {"count": len(pixels), **bench.score(pixels, labels=labels)}
        name, changes, first_seed = runs[drawn.index(row)]
        started = time.perf_counter()
        scheduler = make_scheduler(name, {**bench.scheduler.config, **changes})
        pixels, _ = bench.sample(bench.base, first_seed, scheduler=scheduler)
        seconds = time.perf_counter() - started
        return {"count": images, **bench.score(pixels), "guidance_scale": guidance_scale, "seconds": seconds}

    def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ours = [row for row in rows if row["name"] == f"ddpm {steps}"]
        return [{**goal, "value": sum(row[goal["name"]] for row in ours) / len(ours)} for goal in GOALS if ours]

    settings = {**bench.settings, "seeds": seeds, "dtype": "float32, products in TF32"}
    measure_rows(out, settings, [{"name": TEST}, {"name": AUTOENCODED}, *drawn], measure, goals=goals)


if __name__ == "__main__":
    command(main)
