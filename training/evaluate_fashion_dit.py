"""Measures fashion-dit unquantized (float32, TF32 products): Fréchet distance, inception score, class accuracy, floors.

python training/evaluate_fashion_dit.py --assets qandc/assets --out results/h200/fashion-dit.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline
from safetensors.torch import load_file

from fashion_mnist import DEFAULT_DIRECTORY, load_split
from qandc.evaluation.metrics import (
    FashionClassifier,
    FeatureStatistics,
    class_accuracy,
    extract_features,
    frechet_distance,
    inception_score,
    load_statistics,
)
from qandc.evaluation.pixels import to_float
from qandc.sampling.loop import decode_latents, make_scheduler, sample_latents
from qandc.support.files import write_json
from qandc.support.results import result_header


def main(
    assets: Annotated[Path, typer.Option(help="Directory with fashion-dit and fashion-classifier.")] = Path(
        "qandc/assets"
    ),
    data: Annotated[Path, typer.Option(help="Directory with the IDX files of Fashion-MNIST.")] = DEFAULT_DIRECTORY,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/h200/fashion-dit.json"),
    images: Annotated[int, typer.Option(min=20, help="Number of samples, class-balanced.")] = 10_000,
    batch: int = 2500,
    steps: int = 50,
    guidance_scale: float = 1.5,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other noise for the main row.")] = 2,
    variants: Annotated[bool, typer.Option(help="Also DDIM and other timestep spacings.")] = False,
    device: str = "cuda",
) -> None:
    """Sample class-balanced images and score them."""
    torch.set_float32_matmul_precision("high")
    pipe = DiTPipeline.from_pretrained(assets / "fashion-dit").to(device)
    classifier = FashionClassifier().eval().to(device)
    classifier.load_state_dict(load_file(assets / "fashion-classifier" / "classifier.safetensors"))
    train = load_statistics(assets / "fashion-classifier" / "train-statistics.npz")
    rows: list[dict[str, Any]] = []

    def score(name: str, pixels: torch.Tensor, labels: torch.Tensor, **extra: Any) -> None:
        features, logits = extract_features(classifier, pixels)
        rows.append(
            {
                "name": name,
                "count": len(pixels),
                "frechet_distance": frechet_distance(FeatureStatistics.of(features), train),
                "inception_score": inception_score(logits),
                "class_accuracy": class_accuracy(logits, labels),
                **extra,
            }
        )
        typer.echo(
            "{name:28} n {count:6} frechet {frechet_distance:.4f} IS {inception_score:.3f} accuracy "
            "{class_accuracy:.4f}".format(**rows[-1])
        )

    test_images, test_labels = load_split(data, "t10k")
    score("test images", test_images, test_labels)
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        chunk = to_float(test_images)
        decoded = [
            decode_latents(pipe.vae, pipe.vae.encode(part.to(device)).latent_dist.sample(generator))
            for part in chunk.split(1000)
        ]
    score("test images, autoencoded", torch.cat(decoded), test_labels)

    base = pipe.scheduler.config
    runs = [("ddpm", {}, 1_000_000 * repeat) for repeat in range(seeds)]
    if variants:
        runs += [("ddim", {}, 0), ("ddpm", {"timestep_spacing": "trailing"}, 0)]
        runs += [("ddpm", {"variance_type": "fixed_large"}, 0)]
    labels = torch.arange(images) % 10
    for scheduler_name, changes, first_seed in runs:
        started = time.perf_counter()
        pixels = []
        for part in torch.arange(images).split(batch):
            latents = sample_latents(
                pipe.transformer,
                make_scheduler(scheduler_name, {**base, **changes}),
                labels[part].tolist(),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                seeds=[first_seed + int(i) for i in part],
            )
            pixels.append(decode_latents(pipe.vae, latents))
        name = " ".join([scheduler_name, str(steps), *(str(v) for v in changes.values())])
        seconds = time.perf_counter() - started
        score(name, torch.cat(pixels), labels, first_seed=first_seed, guidance_scale=guidance_scale, seconds=seconds)

    main_rows = [row for row in rows if row["name"] == f"ddpm {steps}"]
    goals = [
        {"name": "frechet_distance", "unit": "1", "better": "lower", "must": 0.535, "goal": 0.45},
        {"name": "class_accuracy", "unit": "1", "better": "higher", "must": 0.95, "goal": 0.95},
    ]
    for goal in goals:
        goal["value"] = sum(row[goal["name"]] for row in main_rows) / len(main_rows)
    settings = {
        "images": images,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "features": "fashion-classifier",
        "batch": batch,
        "seeds": seeds,
        "dtype": "float32, products in TF32",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**result_header(settings), "rows": rows, "goals": goals})


if __name__ == "__main__":
    typer.run(main)
