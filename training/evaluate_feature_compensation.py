"""Measure what compensation of features is worth on fashion-dit: precision x cache x schedule x what is corrected.

python training/evaluate_feature_compensation.py                                          # on a GPU: some 20 minutes
python training/evaluate_feature_compensation.py --images 20 --steps 10 --fit 10 --device cpu      # a try

Every row of a repeat denoises the same noise. PSNR is that of images and of latents to those of the full-precision
model without a cache, of the same scheduler, guidance and steps. Fits are made on other noise; those of samples (Eq. 9
of the paper) on 256 images. Speed is images per second, decoding left out, of all batches but the first. A file that is
there is continued.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DPMSolverMultistepScheduler

from qandc import (
    CacheConfig,
    FeatureCompensation,
    calibrate,
    fit_compensation,
    fit_feature_compensation,
    fuse,
    make_scheduler,
    quantize_model,
    record_trajectory,
    sample_latents,
    uniform_schedule,
)
from qandc.cache import attached_cache
from qandc.caching.compensation import DEFAULT_PULL
from qandc.caching.schedule import optimal_schedule
from qandc.evaluation.metrics import FeatureStatistics, extract_features, frechet_distance, psnr
from qandc.experiments.report import measure_rows
from qandc.method.schedule_calibration import feature_moments
from quality import Bench, Images, Out, Seconds, command

FORMS = (("delta", 1), ("branch", 1), ("taylor", 1))
PRECISIONS = {"FP": None, "W8A8": 8, "W4A8": 4}
FIT, POOL, SAMPLES = (
    30_000_000,
    31_000_000,
    32_000_000,
)  # first seeds of fits, of ranges and schedules, of the paper's VC
PLAIN: dict[str, Any] = {
    "part": "main", "repeat": 0, "precision": "W8A8", "mode": "branch", "order": 1, "interval": 5,
    "schedule": "uniform", "corrected": "none", "scheduler": "ddim", "guidance_scale": 1.5, "steps": 50,
    "fit": 40, "fitted_on": "as drawn", "target": "self", "along": "uncached", "form": "least_squares",
    "pull": None, "classes": "all",
}  # fmt: skip
NO_CACHE = {"mode": "none", "interval": 1}


def rows() -> Iterator[dict[str, Any]]:
    """Give the rows, the most important first; a key that is left out is that of :data:`PLAIN`."""
    forms = [{"mode": mode, "order": order} for mode, order in FORMS]
    none, samples, both = ({"corrected": what} for what in ("none", "samples", "both"))
    features = {"corrected": "features"}
    ratio = {**features, "form": "variance_ratio"}
    for precision in PRECISIONS:
        yield {"precision": precision, **NO_CACHE}
    for interval in (5, 8):
        for form in forms:
            for how in (none, features, samples, ratio):
                yield {**form, "interval": interval, **how}
    yield {"part": "ddpm", **NO_CACHE, "scheduler": "ddpm"}
    for interval in (3, 5):
        for form in forms:
            for how in (none, features, samples, ratio):
                yield {"part": "ddpm", **form, "interval": interval, **how, "scheduler": "ddpm"}
    for form in forms:
        for how in ({"along": "corrected"}, {"target": "full precision"}, {"pull": 0.0}, {"pull": 0.5}, {"pull": 1.0}):
            yield {"part": "how fitted", **form, **features, **how}
        yield {"part": "how fitted", **form, **features, "along": "corrected", "target": "full precision"}
        yield {"part": "how fitted", **form, **ratio, "target": "full precision"}
    for steps in (10, 17, 25):
        for scheduler in ("ddim", "dpm++ 2m"):
            yield {"part": "fewer steps", **NO_CACHE, "scheduler": scheduler, "steps": steps}
    for interval in (5, 8):
        for form in forms:
            for how in (none, features):
                yield {**form, "interval": interval, **how, "schedule": "calibrated"}
    for form in forms:
        yield {**form, **both}
    for precision in ("W4A8", "FP"):
        for form in forms:
            for how in (none, features, ratio) if precision == "W4A8" else (none, features):
                yield {"precision": precision, **form, **how}
            if precision == "W4A8":
                yield {"precision": precision, **form, **features, "target": "full precision"}
    for interval in (3, 2):
        for form in forms:
            for how in (none, features, samples):
                yield {**form, "interval": interval, **how}
    for form in forms[1:]:
        for fit in (5, 10, 160):
            yield {"part": "images fitted on", **form, **features, "fit": fit}
        other = {"part": "other guidance", **form, "guidance_scale": 4.0}
        yield from ({**other, **none}, {**other, **features}, {**other, **features, "fitted_on": "guidance 1.5"})
        other = {"part": "other classes", **form, "classes": "first five"}
        yield from ({**other, **none}, {**other, **features})
        yield {**other, **features, "fitted_on": "the other five classes"}
        yield {"part": "ddpm", **form, **features, "scheduler": "ddpm", "fitted_on": "ddim"}
    for interval in (8, 3, 2):
        for form in forms:
            yield {**form, "interval": interval, **both}
    for repeat in (1, 2):
        yield {"part": "repeat", "repeat": repeat, **NO_CACHE}
        for form in forms:
            for how in (none, features, samples):
                yield {"part": "repeat", "repeat": repeat, **form, **how}
    for repeat in (1, 2):
        for form in forms:
            for how in (none, features):
                yield {"part": "repeat", "repeat": repeat, **form, "interval": 8, **how}
    for precision in ("W4A8", "FP"):
        for interval in (8, 3, 2):
            for form in forms:
                for how in (none, features):
                    yield {"precision": precision, **form, "interval": interval, **how}


def goals(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the goals of W8A8 with uniform schedules, None where rows are missing; means over repeats with both."""

    def figures(metric: str, wanted: dict[str, Any]) -> dict[int, float]:
        wanted = {**PLAIN, **wanted}
        same = [name for name in PLAIN if name not in ("part", "repeat")]
        ours = [row for row in measured if row["part"] in ("main", "repeat")]
        return {row["repeat"]: row[metric] for row in ours if all(row[name] == wanted[name] for name in same)}

    found = []

    def goal(name: str, value: float | None, must: float, best: float | None, better: str = "higher") -> None:
        unit = "dB" if "psnr" in name else "1"
        found.append({"name": name, "value": value, "unit": unit, "better": better, "must": must, "goal": best})

    def gain(metric: str, best: dict[str, Any], base: dict[str, Any]) -> float | None:
        ours, theirs = figures(metric, best), figures(metric, base)
        both = ours.keys() & theirs.keys()
        return sum(ours[repeat] - theirs[repeat] for repeat in both) / len(both) if both else None

    for metric in ("psnr_to_fp", "psnr_latents"):
        for mode, must, best in (("branch", 4.0, 6.0), ("taylor", 3.0, 5.0)):
            value = gain(metric, {"mode": mode, "corrected": "features"}, {"mode": mode})
            goal(f"{metric}_gained_{mode}_5", value, must, best)
        value = gain(metric, {"interval": 8, "corrected": "features"}, {})
        goal(f"{metric}_of_branch_8_corrected_over_5_plain", value, 0.0, None)
    value = gain("frechet_distance", {"interval": 8, "corrected": "features"}, {})
    goal("frechet_distance_of_branch_8_corrected_over_5_plain", value, 0.0, None, "lower")
    for mode in ("delta", "branch"):
        opened = gain("frechet_distance", {"mode": mode}, NO_CACHE)
        closed = gain("frechet_distance", {"mode": mode}, {"mode": mode, "corrected": "features"})
        value = None if opened is None or closed is None or opened <= 0 else closed / opened
        goal(f"recovered_share_of_distance_{mode}_5", value, 0.5, 0.8)
    return found


class Study(Bench):
    """Draw rows, and keep the latents of what was drawn last."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.latents: list[torch.Tensor] = []
        config = self.scheduler.config
        self.schedulers = {name: make_scheduler(name, config) for name in ("ddim", "ddpm")}
        self.schedulers["dpm++ 2m"] = DPMSolverMultistepScheduler.from_config(config)
        self.all_labels = self.labels

    def denoise(self, *args: Any) -> torch.Tensor:
        self.latents.append(super().denoise(*args).cpu())
        return self.latents[-1].to(self.device)

    def set(self, row: dict[str, Any]) -> None:
        """Take scheduler, steps, guidance and classes of a row."""
        self.scheduler = self.schedulers[row["scheduler"]]
        self.run = {"num_inference_steps": row["steps"], "guidance_scale": row["guidance_scale"]}
        self.labels = self.all_labels if row["classes"] == "all" else self.all_labels % 5

    def draw(self, model: Any, repeat: int, corrector: Any = None) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return pixels, latents and seconds per image."""
        self.latents = []
        pixels, seconds = self.sample(model, 1000 * repeat, corrector)
        return pixels, torch.cat(self.latents), seconds


def main(
    out: Out = Path("results/h200/feature-compensation.json"),
    images: Images = 10_000,
    fit: Annotated[int, typer.Option(help="Images of a fit, where a row says nothing else.")] = 40,
    batch: int = 2500,
    steps: int = 50,
    efficientnet: Annotated[
        Path | None, typer.Option(help="Its statistics of the training images, .npz; made if missing.")
    ] = None,
    seconds: Seconds = 1e9,
    device: str = "cuda",
) -> None:
    """Draw with every configuration and score."""
    work = [{**PLAIN, "fit": fit, "steps": steps, **row} for row in rows()]
    bench = Study(device, images, batch, steps, 1.5, "ddim", efficientnet=efficientnet)

    def statistics(pixels: torch.Tensor) -> FeatureStatistics:
        return FeatureStatistics.of(extract_features(bench.classifier, pixels)[0])

    @lru_cache(3)
    def reference(of_run: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, FeatureStatistics]:
        pixels, latents, _ = bench.draw(bench.base, of_run[0])
        return pixels, latents, statistics(pixels)

    def runs(model: Any, count: int, first: int, labels: range = range(10)) -> Any:
        chosen = [labels[i % len(labels)] for i in range(count)]
        seeds = range(first, first + count)
        return functools.partial(sample_latents, model, bench.scheduler, chosen, seeds=seeds, **bench.run)

    @cache
    def models(precision: str) -> tuple[Any, Any, dict[str, Any]]:
        """Make the model as it is fitted, as it draws, and what schedules are found from."""
        bench.set({**PLAIN, "steps": steps})
        model, w_bits = bench.base, PRECISIONS[precision]
        if w_bits is not None:
            model = quantize_model(copy.deepcopy(model), w_bits=w_bits)
            calibrate(model, runs(model, 30, POOL))
        moments = {mode: feature_moments(model, runs(model, 30, POOL), mode)[0] for mode in ("delta", "branch")}
        return model, model if w_bits is None else fuse(copy.deepcopy(model)), moments

    def config_of(row: dict[str, Any]) -> CacheConfig:
        warm_up = 2 if row["mode"] == "taylor" else 1
        computed = uniform_schedule(row["steps"], row["interval"], warm_up_steps=warm_up)
        if row["schedule"] == "calibrated":
            moments = models(row["precision"])[2]["delta" if row["mode"] == "delta" else "branch"]
            pull = DEFAULT_PULL[row["mode"]] if row["corrected"] in ("features", "both") else None
            errors = functools.partial(moments.errors, pull=pull)
            computed = optimal_schedule(errors, steps, sum(computed), order=warm_up - 1, warm_up_steps=warm_up)
        return CacheConfig(row["mode"], schedule=computed, order=row["order"])

    @lru_cache(8)
    def fitted(key: str) -> FeatureCompensation:
        row = json.loads(key)
        model, first, labels = models(row["precision"])[0], FIT + 1_000_000 * row["repeat"], range(10)
        fitted_on, drawn = row["fitted_on"], {}
        if fitted_on == "guidance 1.5":
            drawn = {"guidance_scale": 1.5}
        elif fitted_on == "ddim":
            drawn = {"scheduler": "ddim"}
        elif row["classes"] != "all":
            labels = range(5, 10) if fitted_on == "the other five classes" else range(5)
        bench.set({**row, **drawn})
        target = bench.base if row["target"] == "full precision" and model is not bench.base else None
        try:
            return fit_feature_compensation(
                model, runs(model, row["fit"], first, labels),
                config=config_of(row), target=target, along=row["along"], form=row["form"], pull=row["pull"],
            )  # fmt: skip
        finally:
            bench.set(row)

    @lru_cache(2)
    def trajectories(scheduler: str) -> Any:
        labels, seeds = [i % 10 for i in range(256)], range(SAMPLES, SAMPLES + 256)
        return record_trajectory(bench.base, bench.scheduler, labels, seeds=seeds, **bench.run)

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        fused, corrected, corrector, found = models(row["precision"])[1], row["corrected"], None, {}
        full = row if row["part"] != "fewer steps" else {**row, "scheduler": "ddim", "steps": steps}
        bench.set(full)
        of_run = ("repeat", "scheduler", "steps", "guidance_scale", "classes")
        pixels_of_full, latents_of_full, statistics_of_full = reference(tuple(full[name] for name in of_run))
        bench.set(row)
        config = features = None
        if row["mode"] != "none":
            if corrected in ("features", "both"):
                features = fitted(json.dumps({**row, "part": "", "corrected": "features"}, sort_keys=True))
                found["compensation_bytes"] = features.nbytes
            config = config_of(row) if features is None else features.config
            found["compute_steps"] = sum(config.of_steps(row["steps"]))
        with attached_cache(fused, config, features):
            if config is not None and corrected in ("samples", "both"):
                given = trajectories(row["scheduler"])
                corrector = fit_compensation(given, fused, bench.scheduler, form="variance_ratio")
            pixels, latents, seconds_per_image = bench.draw(fused, row["repeat"], corrector)
        peak = float(latents_of_full.max() - latents_of_full.min())
        likeness = psnr(latents, latents_of_full, peak).clamp(max=100)
        found |= {
            "psnr_latents": float(likeness.mean()),
            "frechet_distance_to_fp": frechet_distance(statistics(pixels), statistics_of_full),
            "images_per_second": 1 / seconds_per_image,
        }
        second = row["part"] == "main" and row["precision"] == "W8A8" and row["interval"] >= 5
        return {**found, **bench.score(pixels, pixels_of_full, bench.labels, second=second)}

    settings = {**bench.settings, "ranges": "static per tensor, min-max, from one run without cache"}
    measure_rows(out, settings, work, measure, goals=goals, seconds=seconds)


if __name__ == "__main__":
    command(main)
