"""Measure what calibration, TAP and variance compensation are worth on fashion-dit, quantized and cached.

python training/ablate_fashion_dit.py                                                    # on a GPU: some 20 minutes
python training/ablate_fashion_dit.py --images 40 --steps 10 --pool-images 20 --samples 40 --repeats 0 --device cpu

A row is one configuration and one repeat. Repeats differ in the noise of the images, which is the same for all rows of
a repeat, and in the samples that are drawn to calibrate with. PSNR is to the images of the full-precision model without
a cache. A file that is there already is continued. EfficientNet's features are computed for repeat 0 alone.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from threadpoolctl import threadpool_limits

from qandc import (
    CacheConfig,
    CandidatePool,
    Compensation,
    TapConfig,
    calibrate,
    calibrate_steps,
    fit_compensation,
    fuse_dit,
    input_hessians,
    quantize_model,
    record_pool,
    record_trajectory,
    sample_latents,
    select_samples,
    smoothing_factors,
    uniform_schedule,
)
from qandc.cache import attached_cache
from qandc.caching.schedule import Errors, optimal_schedule
from qandc.experiments.report import measure_rows
from qandc.method.schedule_calibration import feature_moments
from qandc.quantization.ranges import RangeConfig
from qandc.variance_compensation import epsilon_scaling
from quality import Bench, Images, Out, Seconds, command

MODES, INTERVALS = ("block", "branch"), (3, 5)
SELECTIONS = ("uniform", "kmeans", "agglomerative", "dbscan")
FORMS: dict[str, dict[str, Any]] = {
    "least squares": {},
    "least squares, later half": {},
    "variance ratio (Eq. 9)": {"form": "variance_ratio"},
    "Eq. 12 as printed": {"form": "paper"},
    "least squares on the noise": {"target": "noise"},
    "variance ratio on the noise": {"target": "noise", "form": "variance_ratio"},
    "epsilon scaling": {"target": "noise"},  # by the mean of those gains
}
FIRST_SEED = 20_000_000  # of pools and fits; far from those of the images
STEP_GROUPS = 10
RANGES = {"static, symmetric": RangeConfig(symmetric=True), "static, least squared error": RangeConfig("mse")}
FP = "FP"  # the part of a repeat's full-precision images, which the others are compared with


@dataclass(frozen=True)
class Configuration:
    """Hold one configuration; the defaults are the naive one."""

    w_bits: int = 8
    mode: str = "none"
    interval: int = 1
    schedule: str = "uniform"
    pool: str = "cached"
    selection: str = "random"
    samples: int = 800
    ranges: str = "static, min-max"
    rounding: str = "nearest"
    smoothing: bool = False
    compensation: str = "none"

    def model(self) -> Configuration:
        """Return what the calibrated model depends on: not schedule and compensation; of the cache only the pool."""
        ours = replace(self, schedule="uniform", compensation="none")
        return replace(ours, mode="none", interval=1) if self.pool == "uncached" else ours


def configurations(part: str, samples: int, intervals: Sequence[int] = INTERVALS) -> Iterator[Configuration]:
    """Give the rows of one part, those of one model behind each other."""
    for w_bits in (8, 4):
        plain = Configuration(w_bits, samples=samples, rounding="gptq" if w_bits == 4 else "nearest")
        for mode in MODES:
            for interval in intervals:
                cached = replace(plain, mode=mode, interval=interval)
                if part == mode:
                    for selection in ("random", "tap"):
                        chosen = replace(cached, selection=selection)
                        yield chosen
                        yield replace(chosen, compensation="least squares")
                    yield replace(cached, pool="uncached")
                    yield replace(cached, selection="tap", schedule="calibrated")
                    yield replace(cached, selection="tap", schedule="calibrated", compensation="least squares")
                if part == f"selection {mode}" and interval == 3:
                    for selection in SELECTIONS:
                        yield replace(cached, selection=selection)
                    for selection in ("random", "tap"):  # where a choice should matter most
                        yield replace(cached, selection=selection, samples=max(20, samples // 20))
                if part == f"compensation {mode}" and w_bits == 8:
                    for form in ("none", *FORMS):
                        yield replace(cached, selection="tap", compensation=form)
        if part == "ranges":
            alone = replace(plain, pool="uncached")
            yield alone
            yield replace(alone, ranges="static, symmetric")
            yield replace(alone, ranges="static, least squared error")
            yield replace(alone, ranges=f"{STEP_GROUPS} groups of steps")
            yield replace(alone, ranges="dynamic, per token")
            yield replace(alone, smoothing=True)
            for rounding in ("nearest", "nearest, clipped", "gptq"):
                if rounding != plain.rounding:
                    yield replace(alone, rounding=rounding)


PARTS = ("ranges", *MODES, *(f"{what} {mode}" for what in ("compensation", "selection") for mode in MODES))


def importance(part: str, repeat: int, row: Configuration) -> int:
    """Rank a row: what is smaller is measured first, should time run out."""
    if part in MODES:
        return 0 if row.w_bits == 8 else 1 if repeat == 0 else 2
    return 3 + repeat if part.startswith("selection") or repeat else 1


def select(*args: Any, **kwargs: Any) -> np.ndarray:
    """Choose samples in a process of its own, on few threads: there are as many processes as cores allow."""
    with threadpool_limits(limits=2):
        return select_samples(*args, **kwargs)


def ablation_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the goals, None where a row is missing: distances relative to FP, and the share of a gap that closes.

    The gap is what naive quantization and a cache add to the distance of FP; means over the repeats that a row has.
    """

    def found(w_bits: int, **wanted: Any) -> list[dict[str, Any]]:
        wanted = {"w_bits": w_bits, **wanted}
        return [row for row in rows if all(row["row"].get(k) == v for k, v in wanted.items())]

    def mean(metric: str, w_bits: int, **wanted: Any) -> float | None:
        values = [row[metric] for row in found(w_bits, **wanted)]
        return sum(values) / len(values) if values else None

    plain = {"pool": "cached", "selection": "random", "schedule": "uniform", "compensation": "none"}
    full = {**plain, "selection": "tap", "compensation": "least squares"}
    fp = mean("frechet_distance", 16)
    goals = []
    for w_bits, must in ((8, 1.02), (4, 1.10)):
        alone = {"mode": "none", "ranges": "static, min-max", "smoothing": False}
        alone["rounding"] = "gptq" if w_bits == 4 else "nearest"
        ours = {row["repeat"]: row["frechet_distance"] for row in found(w_bits, **alone)}
        same = [row["frechet_distance"] for row in found(16) if row["repeat"] in ours]
        share = sum(ours.values()) / sum(same) if same and len(same) == len(ours) else None
        goals.append({"name": f"w{w_bits}a8_distance_over_fp", "value": share, "better": "lower", "must": must})
    likeness = mean("psnr_to_fp", 8, **{**alone, "rounding": "nearest"})
    goals.append({"name": "w8a8_psnr_to_fp", "value": likeness, "unit": "dB", "better": "higher", "must": 35.0})
    for name, settings in (("", full), ("_calibrated_schedule", {**full, "schedule": "calibrated"})):
        for mode in MODES:
            for interval in INTERVALS:
                cell = {"w_bits": 8, "mode": mode, "interval": interval, "samples": 800}
                naive = mean("frechet_distance", **cell, **plain)
                full_method = mean("frechet_distance", **cell, **settings)
                missing = naive is None or full_method is None or fp is None
                value = None if missing else (naive - full_method) / (naive - fp)  # type: ignore[operator]
                if value is not None and naive <= fp:  # type: ignore[operator]
                    value = None  # there is no gap
                name_of = f"recovered_share_of_gap_{mode}_{interval}{name}"
                goals.append({"name": name_of, "value": value, "better": "higher", "must": 0.5})
    return [{"unit": "1", "goal": None, **goal} for goal in goals]


class Method(Bench):
    """Hold the full-precision model and all that is made from it once."""

    def __init__(self, *args: Any, pool_images: int, fit_images: int, **others: Any) -> None:
        super().__init__(*args, **others)
        self.pool_images, self.fit_images = pool_images, fit_images
        self.settings |= {"pool_images": pool_images, "fit_images": fit_images}
        self.errors: dict[tuple[int, str], Errors] = {}  # of the first model of these bits, to find schedules
        self.executor = ProcessPoolExecutor(6, multiprocessing.get_context("spawn"))

    def runs(self, images: int, first: int = FIRST_SEED) -> tuple[list[int], range]:
        """Give labels and seeds of runs to calibrate with."""
        return [i % 10 for i in range(images)], range(first, first + images)

    @cache  # noqa: B019
    def pool(self, mode: str, interval: int) -> CandidatePool:
        """Record candidates of the full-precision model, with a cache or ("none") without."""
        labels, seeds = self.runs(self.pool_images)
        with attached_cache(self.base, None if mode == "none" else CacheConfig(mode, interval=interval)):
            return record_pool(self.base, self.scheduler, labels, seeds=seeds, batch_size=len(labels), **self.run)

    @cache  # noqa: B019
    def chosen(self, mode: str, interval: int, selection: str, samples: int, seed: int) -> Future[np.ndarray]:
        """Choose indices into the pool, in a process of its own, as clustering takes seconds."""
        pool = self.pool(mode, interval)
        config = TapConfig(clusters=min(100, max(2, samples // 8)))
        features, times = pool.hidden_states.flatten(1).numpy(), pool.steps.numpy()
        return self.executor.submit(select, features, times, samples, config, method=selection, seed=seed)

    def choose(self, row: Configuration, repeat: int) -> tuple[CandidatePool, Future[np.ndarray]]:
        of = ("none", 1) if row.pool == "uncached" else (row.mode, row.interval)
        return self.pool(*of), self.chosen(*of, row.selection, row.samples, repeat)

    @cache  # noqa: B019
    def trajectories(self) -> Any:
        """Record the trajectories of the full-precision model that compensations are fitted to."""
        labels, seeds = self.runs(self.fit_images, FIRST_SEED + 1_000_000)
        return record_trajectory(self.base, self.scheduler, labels, seeds=seeds, **self.run)

    def quantized(self, row: Configuration, repeat: int) -> Any:
        """Make the model of a row, fused if its ranges are static."""
        pool, future = self.choose(row, repeat)
        indices = future.result()

        def batches(**how: Any) -> Iterator[dict[str, Any]]:
            return pool.batches(indices, batch_size=200, device=self.device, dtype=self.dtype, **how)

        smoothing = hessians = None
        if row.smoothing:
            names = [
                name
                for name, module in self.base.named_modules()
                if type(module) is torch.nn.Linear and name.startswith("transformer_blocks") and "norm" not in name
            ]
            smoothing = smoothing_factors(self.base, batches(), names)
        if row.rounding == "gptq":
            hessians = input_hessians(self.base, batches())
        clip = "max" if row.rounding == "nearest" else "mse"
        model = copy.deepcopy(self.base)
        quantize_model(model, row.w_bits, weight_clip=clip, smoothing=smoothing, hessians=hessians)
        if row.ranges == "dynamic, per token":
            return model
        calibrate(model, batches(), ranges=RANGES.get(row.ranges, RangeConfig()))
        of_steps = None
        if "groups" in row.ranges:
            of_steps = calibrate_steps(model, batches(by_timestep=True), groups=STEP_GROUPS)
        if row.mode != "none" and (row.w_bits, row.mode) not in self.errors:
            labels, seeds = self.runs(30, FIRST_SEED + 2_000_000)
            run = functools.partial(sample_latents, model, self.scheduler, labels, seeds=seeds, **self.run)
            self.errors[row.w_bits, row.mode] = feature_moments(model, run, row.mode)[0].errors
        return fuse_dit(model, step_ranges=of_steps)

    def cache_of(self, row: Configuration) -> CacheConfig | None:
        if row.mode == "none":
            return None
        if row.schedule == "uniform":
            return CacheConfig(row.mode, interval=row.interval)
        steps, errors = self.run["num_inference_steps"], self.errors[row.w_bits, row.mode]
        computed = sum(uniform_schedule(steps, row.interval))
        return CacheConfig(row.mode, schedule=optimal_schedule(errors, steps, computed))

    def compensation(self, model: Any, form: str) -> Compensation:
        start = self.run["num_inference_steps"] // 2 if form.endswith("later half") else 0
        fitted = fit_compensation(self.trajectories(), model, self.scheduler, start_step=start, **FORMS[form])
        if form == "epsilon scaling":
            scale = 1 / float(fitted.gain.mean())
            fitted = epsilon_scaling(scale, fitted.gain.shape[1], fitted.fitted_for)
        return fitted


def main(
    out: Out = Path("results/h100/ablation.json"),
    images: Images = 10_000,
    repeats: Annotated[str, typer.Option(help="Numbers of the repeats, in the order they are measured.")] = "0,1,2",
    batch: int = 2500,
    steps: int = 50,
    guidance_scale: float = 1.5,
    pool_images: Annotated[int, typer.Option(help="Trajectories of a candidate pool; times steps candidates.")] = 200,
    samples: Annotated[int, typer.Option(help="Chosen of a pool.")] = 800,
    fit_images: Annotated[int, typer.Option(help="Samples a compensation is fitted with.")] = 256,
    parts: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PARTS)}.")] = ",".join(PARTS),
    intervals: str = ",".join(map(str, INTERVALS)),
    efficientnet: Annotated[
        Path | None, typer.Option(help="Its statistics of the training images, .npz; made if missing.")
    ] = None,
    seconds: Seconds = 1e9,
    device: str = "cuda",
) -> None:
    """Sample with every configuration and score."""
    bench = Method(
        device, images, batch, steps, guidance_scale,
        pool_images=pool_images, fit_images=fit_images, efficientnet=efficientnet,
    )  # fmt: skip
    numbers = [int(repeat) for repeat in repeats.split(",")]
    work = [
        (part, repeat, row)
        for part in parts.split(",")
        for repeat in numbers
        for row in configurations(part, samples, [int(n) for n in intervals.split(",")])
    ]
    work.sort(key=lambda what: importance(*what))
    for _, repeat, row in work:
        bench.choose(row, repeat)  # clustering begins beside the GPU's work

    @cache
    def full_precision(repeat: int) -> torch.Tensor:
        return bench.sample(bench.base, 1000 * repeat)[0]

    quantized = lru_cache(1)(bench.quantized)

    def draw(row: Configuration, repeat: int) -> torch.Tensor:
        model = quantized(row.model(), repeat)
        with attached_cache(model, bench.cache_of(row)):
            corrector = None if row.compensation == "none" else bench.compensation(model, row.compensation)
            return bench.sample(model, 1000 * repeat, corrector)[0]

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        repeat, full = row["repeat"], full_precision(row["repeat"])
        pixels = full if row["part"] == FP else draw(Configuration(**row["row"]), repeat)
        return bench.score(pixels, full, second=repeat == 0)

    rows = [{"part": FP, "repeat": repeat, "row": {"w_bits": 16}} for repeat in numbers]
    rows += [{"part": part, "repeat": repeat, "row": asdict(row)} for part, repeat, row in work]
    measure_rows(out, bench.settings, rows, measure, goals=ablation_goals, seconds=seconds)
    bench.executor.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    command(main)
