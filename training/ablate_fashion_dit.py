"""Measures what calibration, TAP and variance compensation are worth on fashion-dit, quantized and cached.

python training/ablate_fashion_dit.py                                                    # on a GPU: some 20 minutes
python training/ablate_fashion_dit.py --images 40 --steps 10 --pool-images 20 --samples 40 --repeats 0 --device cpu

A row is one configuration and one repeat. Repeats differ in the noise of the images, which is the same for all rows of
a repeat, and in the samples that are drawn to calibrate with. PSNR is to the images of the full-precision model without
a cache. A file that is there already is continued; with several GPUs, several processes may each take some ``--parts``
and write a file of their own (``--merge`` joins them). EfficientNet's features are computed for repeat 0 alone.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiTPipeline
from threadpoolctl import threadpool_limits

from qandc import (
    CacheConfig,
    CandidatePool,
    Compensation,
    TapConfig,
    apply_cache_to_dit,
    calibrate,
    calibrate_steps,
    fashion_dit_path,
    fit_compensation,
    fuse_dit,
    input_hessians,
    make_scheduler,
    quantize_model,
    record_pool,
    record_trajectory,
    remove_cache,
    select_samples,
    smoothing_factors,
    uniform_schedule,
)
from qandc.caching.schedule import optimal_schedule
from qandc.method.schedule_calibration import feature_gram
from qandc.quantization.ranges import RangeConfig
from qandc.support.files import read_json, write_json
from qandc.support.results import result_header
from qandc.variance_compensation import epsilon_scaling
from quality import Judge, Sampler

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


@dataclass(frozen=True)
class Row:
    """One configuration; the defaults are the naive one."""

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

    def model(self) -> Row:
        """What the calibrated model depends on: not the schedule nor the compensation; of the cache only the pool."""
        ours = replace(self, schedule="uniform", compensation="none")
        return replace(ours, mode="none", interval=1) if self.pool == "uncached" else ours


def configurations(part: str, samples: int, intervals: Sequence[int] = INTERVALS) -> Iterator[Row]:
    """The rows of one part, those of one model behind each other."""
    for w_bits in (8, 4):
        plain = Row(w_bits, samples=samples, rounding="gptq" if w_bits == 4 else "nearest")
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


def row_key(row: dict[str, Any]) -> str:
    """What a measured row is known by."""
    return json.dumps({name: row[name] for name in ("part", "repeat", "row")}, sort_keys=True)


def importance(part: str, repeat: int, row: Row) -> int:
    """What comes first, should time run out: the smaller."""
    if part in MODES:
        return 0 if row.w_bits == 8 else 1 if repeat == 0 else 2
    return 3 + repeat if part.startswith("selection") or repeat else 1


def select(*args: Any, **kwargs: Any) -> np.ndarray:
    """In a process of its own, on few threads: there are as many processes as cores allow."""
    with threadpool_limits(limits=2):
        return select_samples(*args, **kwargs)


def ablation_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for, None where a row is missing: distances relative to FP, and the share of a gap that closes.

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


class Bench:
    """The full-precision model and all that is made from it once."""

    def __init__(self, device: str, steps: int, guidance_scale: float, pool_images: int, fit_images: int) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device.startswith("cuda") else torch.float32
        pipe = DiTPipeline.from_pretrained(fashion_dit_path()).to(device)
        self.base, self.vae = pipe.transformer.to(self.dtype).eval(), pipe.vae
        self.scheduler = make_scheduler("ddpm", pipe.scheduler.config)
        self.run: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        self.pool_images, self.fit_images = pool_images, fit_images
        self.grams: dict[tuple[int, str], np.ndarray] = {}  # of the first model of these bits, to find schedules
        self.executor = ProcessPoolExecutor(6, multiprocessing.get_context("spawn"))

    @cache  # noqa: B019
    def pool(self, mode: str, interval: int) -> CandidatePool:
        """Of the full-precision model, with a cache or ("none") without."""
        labels = [i % 10 for i in range(self.pool_images)]
        seeds = range(FIRST_SEED, FIRST_SEED + len(labels))
        if mode != "none":
            apply_cache_to_dit(self.base, config=CacheConfig(mode, interval=interval))
        try:
            return record_pool(self.base, self.scheduler, labels, seeds=seeds, batch_size=len(labels), **self.run)
        finally:
            if mode != "none":
                remove_cache(self.base)

    @cache  # noqa: B019
    def chosen(self, mode: str, interval: int, selection: str, samples: int, seed: int) -> Future[np.ndarray]:
        """Indices into the pool; in a process of its own, as clustering takes seconds."""
        pool = self.pool(mode, interval)
        config = TapConfig(clusters=min(100, max(2, samples // 8)))
        features, times = pool.hidden_states.flatten(1).numpy(), pool.steps.numpy()
        return self.executor.submit(select, features, times, samples, config, method=selection, seed=seed)

    def choose(self, row: Row, repeat: int) -> tuple[CandidatePool, Future[np.ndarray]]:
        of = ("none", 1) if row.pool == "uncached" else (row.mode, row.interval)
        return self.pool(*of), self.chosen(*of, row.selection, row.samples, repeat)

    @cache  # noqa: B019
    def reference(self) -> Any:
        """Trajectories of the full-precision model that compensations are fitted to."""
        labels = [i % 10 for i in range(self.fit_images)]
        first = FIRST_SEED + 1_000_000
        return record_trajectory(self.base, self.scheduler, labels, seeds=range(first, first + len(labels)), **self.run)

    def quantized(self, row: Row, repeat: int) -> Any:
        """The model of a row, fused if its ranges are static."""
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
        ranges = {
            "static, symmetric": RangeConfig(symmetric=True),
            "static, least squared error": RangeConfig("mse"),
        }.get(row.ranges, RangeConfig())
        if row.ranges == "dynamic, per token":
            return model
        calibrate(model, batches(), ranges=ranges)
        of_steps = None
        if "groups" in row.ranges:
            of_steps = calibrate_steps(model, batches(by_timestep=True), groups=STEP_GROUPS)
        if row.mode != "none" and (row.w_bits, row.mode) not in self.grams:
            labels = [i % 10 for i in range(30)]
            first = FIRST_SEED + 2_000_000
            seeds = range(first, first + len(labels))
            self.grams[row.w_bits, row.mode] = feature_gram(
                model, self.scheduler, labels, mode=row.mode, seeds=seeds, **self.run
            )
        return fuse_dit(model, step_ranges=of_steps)

    def compensation(self, model: Any, form: str) -> Compensation:
        start = self.run["num_inference_steps"] // 2 if form.endswith("later half") else 0
        fitted = fit_compensation(self.reference(), model, self.scheduler, start_step=start, **FORMS[form])
        if form == "epsilon scaling":
            scale = 1 / float(fitted.gain.mean())
            fitted = epsilon_scaling(scale, fitted.gain.shape[1], fitted.fitted_for)
        return fitted


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/h100/ablation.json"),
    images: Annotated[int, typer.Option(min=20, help="Samples of a row, class-balanced.")] = 10_000,
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
    references: Annotated[Path | None, typer.Option(help="Directory that keeps the full-precision images.")] = None,
    seconds: Annotated[float, typer.Option(help="Begin no row after so long.")] = 1e9,
    merge: Annotated[list[Path] | None, typer.Option(help="Join these files into one, and measure nothing.")] = None,
    device: str = "cuda",
) -> None:
    """Sample with every configuration and score."""
    if merge:
        files = [read_json(path, "result", "leave it out", names=("rows",)) for path in merge]
        rows = list({row_key(row): row for file in files for row in file["rows"]}.values())
        order = [(part, asdict(row)) for part in PARTS for row in configurations(part, samples)]
        rows.sort(key=lambda row: (row["repeat"], row["part"] != "FP" and order.index((row["part"], row["row"]))))
        write_json(out, {**files[0], "rows": rows, "goals": ablation_goals(rows)})
        return
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    bench = Bench(device, steps, guidance_scale, pool_images, fit_images)
    sample = Sampler(bench.vae, bench.scheduler, images, batch, steps, guidance_scale, device)
    judges = {True: Judge(device, efficientnet), False: Judge(device)}
    settings = {
        "images": images,
        "batch": batch,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": "ddpm",
        "pool_images": pool_images,
        "fit_images": fit_images,
        "features": ["fashion-classifier"] + (["EfficientNet-Lite0 at 112 x 112"] if efficientnet else []),
        "dtype": str(bench.dtype).removeprefix("torch."),
    }
    rows: list[dict[str, Any]] = []
    if out.exists():
        before = read_json(out, "result", "give another --out", names=("settings", "rows"))
        if before["settings"] != settings:
            raise typer.BadParameter(f"{out} was made with {before['settings']}; give another file or the same")
        rows = before["rows"]
    header = result_header(settings)
    done = {row_key(row) for row in rows}

    def add(part: str, repeat: int, row: dict[str, Any], pixels: torch.Tensor, reference: torch.Tensor) -> None:
        rows.append(
            {"part": part, "repeat": repeat, "row": row, **judges[repeat == 0](pixels, sample.labels, reference)}
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**header, "rows": rows, "goals": ablation_goals(rows)})
        said = " ".join(str(value) for value in row.values())
        numbers = " ".join(f"{value:.3f}" for value in list(rows[-1].values())[3:])
        typer.echo(f"{time.perf_counter() - started:5.0f} s  {part} {repeat}: {said}: {numbers}")

    work = [
        (part, repeat, row)
        for part in parts.split(",")
        for repeat in map(int, repeats.split(","))
        for row in configurations(part, samples, [int(n) for n in intervals.split(",")])
        if row_key({"part": part, "repeat": repeat, "row": asdict(row)}) not in done
    ]
    work.sort(key=lambda what: importance(*what))
    for _, repeat, row in work:
        bench.choose(row, repeat)  # clustering begins beside the GPU's work

    @cache
    def reference(repeat: int) -> torch.Tensor:
        path = None if references is None else references / f"{repeat}.pt"
        if path is not None and path.exists():
            pixels = torch.load(path, weights_only=True)
        else:
            pixels, _ = sample(bench.base, 1000 * repeat)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(pixels, path.with_suffix(f".{os.getpid()}"))
                os.replace(path.with_suffix(f".{os.getpid()}"), path)
        name = {"w_bits": 16}
        if row_key({"part": "FP", "repeat": repeat, "row": name}) not in done:
            add("FP", repeat, name, pixels, pixels)
        return pixels

    key: Any = None
    model: Any = None
    for part, repeat, row in work:
        if time.perf_counter() - started > seconds:
            typer.echo("out of time")
            break
        expected = reference(repeat)
        if key != (row.model(), repeat):
            key, model = (row.model(), repeat), None
            model = bench.quantized(row, repeat)
        config = None
        if row.mode != "none":
            config = CacheConfig(row.mode, interval=row.interval)
            if row.schedule == "calibrated":
                computed, gram = sum(uniform_schedule(steps, row.interval)), bench.grams[row.w_bits, row.mode]
                config = CacheConfig(row.mode, schedule=optimal_schedule(gram, computed, order=0, warm_up_steps=1))
            apply_cache_to_dit(model, config=config)
        try:
            corrector = None if row.compensation == "none" else bench.compensation(model, row.compensation)
            pixels, _ = sample(model, 1000 * repeat, corrector)
        finally:
            if config is not None:
                remove_cache(model)
        add(part, repeat, asdict(row), pixels, expected)
    bench.executor.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    typer.run(main)
