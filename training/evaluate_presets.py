"""Measure the settings that come with fashion-dit on many images, and what a compensation would add to them.

python training/evaluate_presets.py                                               # a minute on a GPU
python training/evaluate_presets.py --images 20 --fit 10 --device cpu --out /tmp/presets.json      # a try

Images are drawn as ``qandc generate`` draws its ten, from noise that nothing was fitted on. The likeness that it prints
beside theirs is that of the rows without compensation, which are copied to ``likeness.json`` of the settings.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline

from qandc import (
    fashion_dit_path,
    fashion_dit_preset,
    fit_compensation,
    fit_feature_compensation,
    fuse,
    make_scheduler,
    record_trajectory,
    sample_latents,
)
from qandc.cache import attached_cache
from qandc.evaluation.compare import ReferenceStatistics
from qandc.evaluation.metrics import (
    FeatureStatistics,
    class_accuracy,
    extract_features,
    frechet_distance,
    load_fashion_classifier,
    psnr,
)
from qandc.evaluation.networks import fashion_classifier_path
from qandc.experiments.report import measure_rows
from qandc.method.saved import LIKENESS, shipped_settings
from qandc.sampling.loop import decode_latents
from qandc.support.files import write_json
from quality import Out, command

FIRST, FIT = 50_000_000, 60_000_000  # seeds of the images, and of fits
BATCH = 500


def main(
    out: Out = Path("results/h200/presets.json"),
    images: Annotated[int, typer.Option(min=2, help="Images of a row.")] = 1000,
    fit: Annotated[int, typer.Option(min=1, help="Images that VC is fitted on; features on a fifth of them.")] = 200,
    device: str = "cuda",
) -> None:
    """Draw in full precision and with the settings of 8 and 4 bits, without and with each compensation."""
    pipe = DiTPipeline.from_pretrained(fashion_dit_path()).to(device)
    base, classifier = pipe.transformer, load_fashion_classifier(device)
    train = ReferenceStatistics.load(fashion_classifier_path() / "train-statistics.npz").features
    preset = fashion_dit_preset(8)
    scheduler = make_scheduler(preset.scheduler_name, pipe.scheduler.config)
    run: dict[str, Any] = {
        "num_inference_steps": preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale,
    }

    def draw(model: Any, compensation: Any = None) -> torch.Tensor:
        parts = []
        for first in range(0, images, BATCH):
            seeds = range(FIRST + first, FIRST + min(first + BATCH, images))
            labels = [(seed - FIRST) % 10 for seed in seeds]
            latents = sample_latents(model, scheduler, labels, seeds=seeds, compensation=compensation, **run)
            parts.append(decode_latents(pipe.vae, latents).cpu())
        return torch.cat(parts)

    full = draw(base)

    @functools.cache
    def models(w_bits: int) -> tuple[Any, Any]:
        """Return the model as it is fitted, and as it draws."""
        model = fashion_dit_preset(w_bits).quantize(copy.deepcopy(base))
        drawing = copy.deepcopy(model)
        return model, fuse(drawing) if device.startswith("cuda") else drawing

    @functools.cache
    def drawn(w_bits: int, kind: str) -> torch.Tensor:
        (model, drawing), config = models(w_bits), fashion_dit_preset(w_bits).schedule.config()
        labels, few = [i % 10 for i in range(fit)], -(-fit // 5)
        features = samples = None
        if kind == "features":
            noise = {"seeds": range(FIT, FIT + few), **run}
            fitted_on = functools.partial(sample_latents, model, scheduler, labels[:few], **noise)
            features = fit_feature_compensation(model, fitted_on, config=config)
        with attached_cache(drawing, config, features):
            if kind == "samples":
                trajectory = record_trajectory(base, scheduler, labels, seeds=range(FIT, FIT + fit), **run)
                samples = fit_compensation(trajectory, drawing, scheduler)
            return draw(drawing, samples)

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        pixels = drawn(row["w_bits"], row["compensation"])
        found = psnr(pixels, full)
        gained = found - psnr(drawn(row["w_bits"], "none"), full)
        maps, logits = extract_features(classifier, pixels)
        return {
            "images": images,
            "psnr_mean": float(found.mean()),
            "psnr_min": float(found.min()),
            "psnr_gained": float(gained.mean()),
            "psnr_gained_ci95": 1.96 * float(gained.std()) / images**0.5,
            "frechet_distance": frechet_distance(FeatureStatistics.of(maps), train),
            "class_accuracy": class_accuracy(logits, torch.arange(images) % 10),
        }

    rows = [{"w_bits": bits, "compensation": kind} for bits in (8, 4) for kind in ("none", "samples", "features")]
    settings = {"fit": fit, "scheduler": preset.scheduler_name, **run, "dtype": "float32", "first_seed": FIRST}
    measured = measure_rows(out, settings, rows, measure)
    if images >= 1000:
        kept = {row["w_bits"]: row for row in measured if row["compensation"] == "none"}
        names = ("images", "psnr_mean", "psnr_min")
        likeness = shipped_settings("fashion-dit", 8).parent / LIKENESS
        write_json(likeness, {f"w{bits}a8": {name: row[name] for name in names} for bits, row in kept.items()})


if __name__ == "__main__":
    command(main)
