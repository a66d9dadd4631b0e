"""Measure feature caches on fashion-dit: mode x interval x schedule, in full precision, W8A8 and W4A8.

python training/evaluate_cache.py                                          # all of it, on a GPU: some minutes
python training/evaluate_cache.py --images 40 --steps 10 --device cpu      # a try

Every configuration denoises the same noise, of the start and of every DDPM step. Quality is measured on features of the
shipped classifier; PSNR is to the images of the full-precision model without a cache. Speed is images per second,
decoding left out, of all batches but the first, in which graphs are captured. A file that is there is continued.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer

from qandc import CacheConfig, calibrate, fuse_dit, quantize_model, sample_latents, uniform_schedule
from qandc.cache import attached_cache
from qandc.caching.schedule import optimal_schedule, schedule_error
from qandc.experiments.report import measure_rows
from qandc.method.schedule_calibration import feature_moments
from quality import Bench, Images, Out, Seconds, command

INTERVALS = (2, 3, 4, 5, 8)
FORMS = (("block", 0), ("branch", 0), ("taylor", 1), ("taylor", 2))
PRECISIONS = {"FP": None, "W8A8": 8, "W4A8": 4}
LABELS = tuple(range(10)) * 3  # of the runs to calibrate with
SEEDS = range(10_000_000, 10_000_000 + len(LABELS))

ROWS = [
    {"precision": precision, **row}
    for precision in PRECISIONS
    for row in (
        {"mode": "none", "order": 0, "interval": 1, "schedule": "all"},
        *(
            {"mode": mode, "order": order, "interval": interval, "schedule": schedule}
            for interval in INTERVALS
            for mode, order in FORMS
            for schedule in ("uniform", "calibrated")
        ),
    )
]


def main(
    out: Out = Path("results/h100/cache.json"),
    images: Images = 10_000,
    batch: int = 2500,
    steps: int = 50,
    guidance_scale: float = 1.5,
    scheduler: str = "ddpm",
    precisions: Annotated[str, typer.Option(help="Comma-separated, of FP, W8A8, W4A8.")] = ",".join(PRECISIONS),
    seconds: Seconds = 1e9,
    device: str = "cuda",
) -> None:
    """Sample with every configuration and score."""
    bench = Bench(device, images, batch, steps, guidance_scale, scheduler)
    reference, _ = bench.sample(bench.base)

    @lru_cache(1)
    def model_of(precision: str) -> tuple[Any, dict[str, Any]]:
        """Make the model, with static min-max ranges of one run without a cache, and what schedules are found from."""
        model, w_bits = bench.base, PRECISIONS[precision]
        if w_bits is not None:
            model = quantize_model(copy.deepcopy(model), w_bits=w_bits)

        def run() -> None:
            sample_latents(model, bench.scheduler, LABELS, seeds=SEEDS, **bench.run)

        if w_bits is not None:
            calibrate(model, run)
        errors = {mode: feature_moments(model, run, mode)[0].errors for mode in ("block", "branch")}
        return model if w_bits is None else fuse_dit(model), errors

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        model, of_modes = model_of(row["precision"])
        mode, order, config, schedule = row["mode"], row["order"], None, {}
        if mode != "none":
            errors, warm_up = of_modes["block" if mode == "block" else "branch"], order + 1
            computed = uniform_schedule(steps, row["interval"], warm_up_steps=warm_up)
            if row["schedule"] == "calibrated":
                computed = optimal_schedule(errors, steps, sum(computed), order=order, warm_up_steps=warm_up)
            config = CacheConfig(mode, schedule=computed, order=max(1, order))
            schedule = {"compute_steps": sum(computed), "steps": "".join(".C"[step] for step in computed)}
            schedule["feature_error"] = schedule_error(errors, computed, order)
        with attached_cache(model, config) as cache:
            pixels, seconds_per_image = bench.sample(model)
            nbytes = 0 if cache is None else cache.nbytes
        figures = bench.score(pixels, reference)
        return {**schedule, **figures, "images_per_second": 1 / seconds_per_image, "cache_bytes": nbytes}

    settings = {**bench.settings, "ranges": "static per tensor, min-max, from one run without cache"}
    rows = [row for row in ROWS if row["precision"] in precisions.split(",")]
    measure_rows(out, settings, rows, measure, seconds=seconds)


if __name__ == "__main__":
    command(main)
