"""Measure what quantization, caches, TAP and VC do to following a prompt, on wardrobe.

    python training/evaluate_wardrobe.py                                   # on a GPU; a file that is there is continued
    python training/evaluate_wardrobe.py --prompts 4 --seeds 0 --steps 6 --fit 2 --device cpu --out /tmp/wardrobe.json

The unmodified ``FluxPipeline`` draws every picture. All rows have the same prompts and the same noise, both new for
each seed, so that pictures are independent of each other (Wilson's intervals) and rows are compared picture by picture:
``*_lost`` is what full precision has right and the row has wrong, less the reverse. Speed is pictures a second, text
encoders and autoencoder included, of all batches but the first; what runs beside other things on a GPU tells none
(``--no-timed``).
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy.stats import binomtest

from fashion_mnist import DEFAULT_DIRECTORY, Data
from outliers import plant_outliers, set_per_token_behind_modulation
from qandc import (
    CacheConfig,
    RangeConfig,
    TapConfig,
    block_hessians,
    calibrate,
    compensated_scheduler,
    compensation_from_run,
    fit_feature_compensation,
    fuse,
    graph,
    load_pipeline,
    pool_from_run,
    quantize_model,
    schedule_from_run,
    smoothing_factors,
    trajectory_from_run,
    unfuse,
    ungraph,
)
from qandc.cache import attached_cache
from qandc.errors import QandCError
from qandc.evaluation.judge import Judge, score_scenes
from qandc.evaluation.metrics import FeatureStatistics, extract_features, frechet_distance, psnr
from qandc.evaluation.scenes import SIZE, Scene, draw_scenes, scene_arrays
from quality import Only, Out, Seconds, command, measure_chosen
from wardrobe_pictures import GarmentImages

logger = logging.getLogger("evaluate_wardrobe")
JudgeFile = Annotated[Path | None, typer.Option(help="Weights of the judge; by default those of the package.")]

SCENES, NOISE, FIT = 700_000_000, 710_000_000, 720_000_000  # first seeds: of scenes, of noise, of both for fits
MODEL_SEEDS = 5  # of the rows that say how good the model is
POOL_PICTURES, SAMPLES_PER_CLUSTER = 16, 8  # as in calibrate_on_prompts, whose samples are 128, too
RIGHT = ("objects", "colours", "places", "everything")
PLAIN: dict[str, Any] = {
    "scenes": "seen", "steps": None, "shift": None, "true_cfg_scale": None, "text_tokens": 64,
    "weights": "nearest", "ranges": "static", "smoothing": 0.5, "layers": "plan", "conditioning": None, "outliers": 1,
    "selection": "tap", "samples": 128, "repeat": 0, "pool": "uncached",
    "mode": "none", "interval": 1, "schedule": "uniform", "threshold": None,
    "corrected": "none", "form": "none", "fused": False,
}  # fmt: skip
NO_QUANTIZATION = dict.fromkeys(("weights", "ranges", "smoothing", "layers", "selection", "samples"), "none")
PRECISIONS: dict[str, dict[str, Any]] = {
    "FP": NO_QUANTIZATION, "FP32": NO_QUANTIZATION, "real": NO_QUANTIZATION, "autoencoded": NO_QUANTIZATION,
    "W8A8": {}, "W4A8": {"weights": "gptq"}, "W8A16": {"ranges": "none", "smoothing": None},
    "W4A16": {"weights": "gptq", "ranges": "none", "smoothing": None},
}  # fmt: skip
AS_ROUNDED = ("precision", "weights", "ranges", "smoothing", "layers", "conditioning", "outliers", "selection",
              "samples", "repeat", "pool")  # fmt: skip
MODES = ("delta", "branch", "taylor", "hicache", "crf")
SHIFT = 3.16  # of the timesteps of FLUX.1-dev at 1024 x 1024, e^1.15
LAYERS = {  # a group to the regular expression of the names of its layers
    "modulation, two streams": r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
    "modulation, one stream": r"single_transformer_blocks\.\d+\.norm\.linear",
    "modulation, first of one stream": r"single_transformer_blocks\.0\.norm\.linear",
    "embedders of latents and text": "(x|context)_embedder",
    "embedders of timestep and pooled text": r"time_text_embed\..*",
    "first block": r"transformer_blocks\.0\.(attn|ff).*",
    "last block": r"single_transformer_blocks\.{last}\.(attn|proj).*",
    "q, k, v": r".*\.attn\.(to_[qkv]|add_[qkv]_proj)",
    "out": r".*\.attn\.(to_out\.0|to_add_out)",
    "fc1": r".*\.ff(_context)?\.net\.0\.proj",
    "fc2": r".*\.ff(_context)?\.net\.2",
    "proj_mlp": r".*\.proj_mlp",
    "proj_out of blocks": r".*\.proj_out",
    "norm_out": r"norm_out\.linear",
    "proj_out": "proj_out",
    "all": "",
}


def row(part: str, precision: str = "W8A8", **changes: Any) -> dict[str, Any]:
    """Describe a row by its precision and by all that is not usual with it: "W8A8, taylor, interval 3"."""
    said = {"mode": "{}", "schedule": "{}", "corrected": "corrected {}", "form": "{}", "selection": "{}"}
    said |= {"scenes": "{} scenes", "steps": "{} steps", "fused": "fused"}
    parts = [
        f"no {name}" if value is None else said.get(name, name.replace("_", " ") + " {}").format(value)
        for name, value in changes.items()
    ]
    return {"part": part, "name": ", ".join([precision, *parts]), "precision": precision, **changes}


def settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a row, also those that are usual."""
    return {**PLAIN, **PRECISIONS[row["precision"]], **row}


def rows() -> Iterator[dict[str, Any]]:
    """Give the rows, the most important first."""
    for precision in ("real", "FP", "autoencoded"):
        yield row("model", precision)
        yield row("model", precision, scenes="held-out")
    yield row("precision", "FP")
    for precision in ("W8A8", "W4A8", "FP32", "W8A16", "W4A16"):
        yield row("precision", precision)
    for steps in (14, 10, 9, 7, 6):
        for precision in ("FP", "W8A8"):
            yield row("fewer steps", precision, steps=steps)
    for interval, mode in itertools.product((3, 2, 5), MODES):
        for schedule, corrected in itertools.product(("uniform", "calibrated"), (False, True)):
            more = {"corrected": "features"} if corrected else {}
            yield row("cache", mode=mode, interval=interval, schedule=schedule, **more)
        for schedule in ("uniform", "calibrated"):
            yield row("cache", "FP", mode=mode, interval=interval, schedule=schedule)
    for precision, threshold in itertools.product(("FP", "W8A8"), (0.05, 0.1, 0.2)):
        yield row("cache", precision, mode="first_block", threshold=threshold)
    yield row("precision", "FP", scenes="held-out")
    for precision in ("W8A8", "W4A8"):
        yield row("precision", precision, scenes="held-out")
        yield row("cache", precision, scenes="held-out", mode="taylor", interval=3)
        yield row("precision", precision, fused=True)
        yield row("cache", precision, mode="taylor", interval=3, fused=True)
        for changes in (
            {"ranges": "per token"}, {"ranges": "static, least error"}, {"smoothing": None},
            {"ranges": "per token", "smoothing": None},
            *({"conditioning": scheme} for scheme in ("W8A8", "W8A16", "W4A16")),
        ):  # fmt: skip
            yield row("precision", precision, **changes)
    for weights in ("nearest", "nearest, least error"):
        yield row("precision", "W4A8", weights=weights)
        yield row("precision", "W4A8", weights=weights, smoothing=None)
    for mode, interval in itertools.product(("delta", "branch", "taylor"), (3, 5)):
        yield row("cache", "W4A8", mode=mode, interval=interval)
    for scale in (1.5, 2.0, 3.0):
        yield row("guidance and text", "FP", true_cfg_scale=scale)
    yield row("guidance and text", "FP", text_tokens=512)
    yield row("guidance and text", text_tokens=512)
    yield row("shift", "FP", shift=SHIFT)
    yield row("shift", "FP", shift=SHIFT, steps=10)
    for mode, schedule in itertools.product(MODES, ("uniform", "calibrated")):
        yield row("shift", "FP", shift=SHIFT, mode=mode, interval=3, schedule=schedule)
    for precision, layers in itertools.product(("W8A8", "W4A8"), LAYERS):
        plainly = {"weights": "nearest, least error"} if precision == "W4A8" else {}
        yield row("layers", precision, layers=layers, ranges="per token", smoothing=None, **plainly)
    forms = [("samples", form) for form in ("least_squares", "variance_ratio", "paper")] + [("noise", "least_squares")]
    caches = [{}, *({"mode": mode, "interval": n} for mode in ("delta", "branch", "taylor") for n in (3, 5))]
    for cache, (corrected, form) in itertools.product(caches, forms):
        yield row("VC", **cache, corrected=corrected, form=form)
    for corrected, form in forms:
        yield row("VC", "W4A8", corrected=corrected, form=form)
    for samples, precision, repeat in itertools.product((16, 64), ("W8A8", "W4A8"), range(3)):
        for selection in ("tap", "random"):
            how = {"selection": selection, "samples": samples, "repeat": repeat, "pool": "cached"}
            yield row("TAP", precision, mode="branch", interval=3, **how)


def skip_patterns(layers: str, model: Any) -> list[str] | None:
    """Return patterns of all layers of a model but those of a group; None for the usual plan."""
    if layers == "plan":
        return None
    group = LAYERS[layers].replace("{last}", str(len(model.single_transformer_blocks) - 1))
    return [f"re:^(?!({group})$)"] if group else []


def wilson(right: int, count: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share, ``right`` of ``count`` independent pictures (Wilson 1927)."""
    low, high = binomtest(right, count).proportion_ci(method="wilson")
    return float(low), float(high)


def lost(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Compute by how much fewer of ``ours [N]`` are right than of ``theirs``, picture by picture; half its 95 %."""
    difference = theirs.double() - ours.double()
    return float(difference.mean()), 1.959964 * float(difference.std()) / math.sqrt(len(difference))


def likeness(pixels: torch.Tensor, full: torch.Tensor) -> dict[str, float]:
    """Compute the mean PSNR of pictures to those of full precision, half its 95 % interval, and the worst."""
    found = psnr(pixels, full).clamp(max=100)
    half = 1.959964 * float(found.std()) / math.sqrt(len(found))
    return {"psnr_to_fp": float(found.mean()), "psnr_to_fp_ci95": half, "psnr_to_fp_worst": float(found.min())}


def goals(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the goals, None where rows are missing."""
    known = {(row["part"], row["name"]): row for row in measured if "everything" in row}
    found = []

    def goal(name: str, value: float | None, unit: str, better: str, must: float, best: float | None = None) -> None:
        found.append({"name": name, "value": value, "unit": unit, "better": better, "must": must, "goal": best})

    def points(part: str, name: str) -> float | None:
        return 100 * known[part, name]["everything_lost"] if (part, name) in known else None

    for scenes, must, best in (("", 0.85, 0.93), (", held-out scenes", 0.7, 0.85)):
        full, real = (known.get(("model", precision + scenes)) for precision in ("FP", "real"))
        value = full["everything"] / real["everything"] if full and real and real["everything"] else None
        goal(f"all right over real scenes{scenes}", value, "1", "higher", must, best)
    for precision, must in (("W8A8", 1.0), ("W4A8", 3.0)):
        goal(f"all right lost with {precision}", points("precision", precision), "points", "lower", must)
    third = {"part": "cache", "precision": "W8A8", "interval": 3}.items()
    ours = [row for row in known.values() if row.items() >= third and not {"scenes", "fused"} & row.keys()]
    best_third = min((100 * row["everything_lost"] for row in ours), default=None)
    goal("all right lost with W8A8 and the best cache, 1/3 of the steps", best_third, "points", "lower", 2.0)
    fewer = points("fewer steps", "W8A8, 10 steps")
    gained = None if fewer is None or best_third is None else fewer - best_third
    goal("all right gained by that over 10 steps without a cache", gained, "points", "higher", 5.0)
    return found


class Wardrobe:
    """Draw and score what any row asks for.

    Args:
        model: name or directory of the pipeline.
        judge: file of weights; None: those of the package.
        seeds: of scenes and noise; the rows of part "model" have further ones.
        prompts: of each seed.
        fit: pictures of a schedule or compensation of features; of VC four times as many.
        timed: tell speed.
    """

    def __init__(
        self, model: str, judge: Path | None, data: Path, seeds: list[int], prompts: int, steps: int,
        batch: int, fit: int, true_cfg_scale: float, device: str, dtype: torch.dtype | None = None, timed: bool = True,
    ) -> None:  # fmt: skip
        torch.set_float32_matmul_precision("high")
        self.cuda = device.startswith("cuda")
        self.model, self.device, self.prompts, self.batch, self.fit = model, device, prompts, batch, fit
        self.seeds, self.steps, self.scale, self.timed = seeds, steps, true_cfg_scale, timed
        self.dtype = dtype or (torch.bfloat16 if self.cuda else torch.float32)
        self.settings = {"model": model, "seeds": seeds, "prompts": prompts, "steps": steps, "batch": batch, "fit": fit}
        self.settings |= {"true_cfg_scale": true_cfg_scale, "dtype": str(self.dtype).removeprefix("torch.")}
        self.settings |= {"usual": PLAIN, "precisions": PRECISIONS}
        self.judge = Judge.load(judge, device)
        self.garments = GarmentImages.load(data, "t10k", device)
        for name in ("pipe", "scenes", "reference", "real_features", "pool", "rounded", "trajectory", "cache_of"):
            setattr(self, name, functools.lru_cache(16)(getattr(self, name)))
        self.base = self.pipe(self.dtype).transformer

    def pipe(self, dtype: torch.dtype) -> Any:
        pipe = load_pipeline(self.model, self.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def scenes(self, kind: str, seed: int) -> list[Scene]:
        return draw_scenes(self.prompts, SCENES + seed, held_out=kind == "held-out")

    def call(self, pipe: Any, captions: list[str], noise: torch.Tensor, row: dict[str, Any], output: str) -> Any:
        """Call the pipeline as anybody would."""
        scale = row["true_cfg_scale"] or self.scale
        guided = {"true_cfg_scale": scale, "negative_prompt": [""] * len(captions)} if scale > 1 else {}
        return pipe(
            captions, height=SIZE, width=SIZE, num_inference_steps=row["steps"] or self.steps, latents=noise,
            max_sequence_length=row["text_tokens"], output_type=output, return_dict=False, **guided,
        )[0]  # fmt: skip

    def noise(self, count: int, seed: int) -> torch.Tensor:
        tokens = (SIZE // (2 * self.pipe(self.dtype).vae_scale_factor)) ** 2
        shape = (count, tokens, self.base.config.in_channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @contextmanager
    def using(
        self, model: Any, scheduler: Any = None, dtype: torch.dtype | None = None, shift: float | None = None
    ) -> Iterator[Any]:
        """Give the pipeline another transformer, and scheduler or shift of its own, for the block."""
        pipe = self.pipe(dtype or self.dtype)
        before = pipe.transformer, pipe.scheduler
        if shift is not None:
            scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift)
        pipe.transformer, pipe.scheduler = model, scheduler or pipe.scheduler
        try:
            yield pipe
        finally:
            pipe.transformer, pipe.scheduler = before

    def runs(self, pipe: Any, count: int, first: int = 0) -> Callable[[], Any]:
        """Make a function that draws latents to fit something on, in one call."""
        captions = [scene.caption for scene in draw_scenes(count, FIT + first)]
        return functools.partial(self.call, pipe, captions, self.noise(count, FIT + first), PLAIN, "latent")

    def pool(self, cached: bool) -> Any:
        """Record calls of the model in full precision, one picture a run."""
        config = CacheConfig("branch", interval=3) if cached else None
        with self.using(self.base) as pipe, attached_cache(self.base, config):
            return pool_from_run(self.base, [self.runs(pipe, 1, i) for i in range(min(POOL_PICTURES, self.fit))])

    def rounded(self, settings: tuple[Any, ...]) -> Any:
        """Make the model of a row, without its cache."""
        how = dict(zip(AS_ROUNDED, settings, strict=True))
        if how["precision"] == "FP32":
            return self.pipe(torch.float32).transformer
        if how["precision"] == "FP":
            return self.base
        model = copy.deepcopy(self.base)
        if how["outliers"] > 1:
            plant_outliers(model, how["outliers"])
        pool = self.pool(how["pool"] == "cached")
        count = min(how["samples"], len(pool))
        config = TapConfig(max(1, count // SAMPLES_PER_CLUSTER))
        chosen = pool.select(count, config, method=how["selection"], seed=how["repeat"])
        batches = functools.partial(pool.batches, chosen, device=self.device)
        bits, smoothing = [int(number) for number in re.findall(r"\d+", how["precision"])], how["smoothing"]
        quantize_model(
            model, *bits, skip_patterns(how["layers"], model), conditioning=how["conditioning"],
            weight_clip="max" if how["weights"] == "nearest" else "mse",
            smoothing=None if smoothing is None else smoothing_factors(model, batches(), alpha=smoothing),
            hessians=block_hessians(model, batches) if how["weights"] == "gptq" else None,
        )  # fmt: skip
        if how["ranges"].startswith("static"):
            calibrate(model, batches(), ranges=RangeConfig("mse" if "error" in how["ranges"] else "minmax"))
        if "behind modulation" in how["ranges"]:
            set_per_token_behind_modulation(model)
        return model

    def cache_of(
        self, settings: tuple[Any, ...], mode: str, interval: int, schedule: str, shift: float | None, corrected: bool
    ) -> Any:
        """Find which cache a row has, and what corrects its features."""
        model, features = self.rounded(settings), None
        config = CacheConfig(mode, interval=interval)
        with self.using(model, shift=shift) as pipe:
            if schedule == "calibrated":
                found = schedule_from_run(
                    model, self.runs(pipe, self.fit), mode=mode, compensated=corrected,
                    computed_steps=sum(config.of_steps(self.steps)),
                )  # fmt: skip
                config = found.config()
            if corrected:
                features = fit_feature_compensation(model, self.runs(pipe, self.fit, 1), config=config)
                config = features.config
        return config, features

    def trajectory(self) -> Any:
        """Record the latents of full precision that VC is fitted to."""
        with self.using(self.base) as pipe:
            return trajectory_from_run(pipe, self.runs(pipe, 4 * self.fit, 2))

    @contextmanager
    def prepared(self, row: dict[str, Any]) -> Iterator[Any]:
        """Give the pipeline as a row asks for: quantized, cached, corrected, in CUDA graphs where there is a GPU."""
        settings = tuple(row[name] for name in AS_ROUNDED)
        model, config, features = self.rounded(settings), None, None
        reference = self.trajectory() if row["corrected"] in ("samples", "noise") else None
        if row["mode"] == "first_block":
            config = CacheConfig("first_block", threshold=row["threshold"])
        elif row["mode"] != "none":
            how = (row[name] for name in ("mode", "interval", "schedule", "shift"))
            config, features = self.cache_of(settings, *how, row["corrected"] == "features")
        dtype = torch.float32 if row["precision"] == "FP32" else self.dtype
        with self.using(model, dtype=dtype, shift=row["shift"]) as pipe, ExitStack() as stack:
            stack.enter_context(attached_cache(model, config, features))
            if reference is not None:
                target = "sample" if row["corrected"] == "samples" else "noise"
                run = self.runs(pipe, 4 * self.fit, 2)
                found = compensation_from_run(pipe, run, reference, form=row["form"], target=target)
                stack.enter_context(self.using(model, compensated_scheduler(pipe.scheduler, found)))
            if row["fused"]:
                fuse(model)
                stack.callback(unfuse, model)
            if self.cuda and row["mode"] != "first_block":
                graph(model)
                stack.callback(ungraph, model)
            yield pipe, config

    @torch.no_grad()
    def real(self, kind: str, seeds: tuple[int, ...], first_seed: int, autoencoded: bool = False) -> torch.Tensor:
        """Draw the true pictures of scenes, from images that nothing was trained on."""
        vae, pictures = self.pipe(self.dtype).vae, []
        for seed in seeds:
            generator = torch.Generator(self.device).manual_seed(first_seed + seed)
            for first in range(0, self.prompts, self.batch):
                arrays = scene_arrays(self.scenes(kind, seed)[first : first + self.batch])
                drawn = self.garments.draw(*(array.to(self.device) for array in arrays), generator)
                if autoencoded:
                    drawn = vae.decode(vae.encode(drawn.to(vae.dtype)).latent_dist.mode()).sample.float()
                pictures.append(drawn.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(pictures)

    def real_features(self, kind: str, seeds: tuple[int, ...]) -> FeatureStatistics:
        """Compute the statistics of other true pictures of the same scenes than those that are scored."""
        return self.look(self.real(kind, seeds, FIT), kind, seeds)[1]

    @torch.no_grad()
    def draw(self, row: dict[str, Any], seeds: tuple[int, ...]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Draw pictures ``[N, 3, 64, 64] uint8``; also what is known of how."""
        pictures, times = [], []
        synchronize = torch.cuda.synchronize if self.cuda else lambda: None
        with self.prepared(row) as (pipe, config):
            for seed in seeds:
                captions = [scene.caption for scene in self.scenes(row["scenes"], seed)]
                noise = self.noise(self.prompts, NOISE + seed)
                for first in range(0, self.prompts, self.batch):
                    part = slice(first, first + self.batch)
                    synchronize()
                    begun = time.perf_counter()
                    drawn = self.call(pipe, captions[part], noise[part], row, "pt")
                    synchronize()
                    times.append((time.perf_counter() - begun) / len(drawn))
                    pictures.append(drawn.float().mul(255).round().clamp(0, 255).to(torch.uint8))
            steps = row["steps"] or self.steps
            found: dict[str, Any] = {"computed_steps": steps}
            if config is not None:
                found["computed_steps"] = sum(config.of_steps(steps)) if config.planned else None
        if self.timed:
            later = times[1:] or times
            found["images_per_second"] = len(later) / sum(later)
        return torch.cat(pictures), found

    def reference(self, kind: str, shift: float | None, seeds: tuple[int, ...]) -> tuple[Any, ...]:
        """Draw in full precision; return pictures, what is known of how, scores and features."""
        pixels, found = self.draw(settings_of(row("", "FP", scenes=kind, shift=shift)), seeds)
        return pixels, found, *self.look(pixels, kind, seeds)

    def look(self, pixels: torch.Tensor, kind: str, seeds: tuple[int, ...]) -> tuple[dict[str, Any], FeatureStatistics]:
        """Have the judge look at pictures: which are right ``[N]``, by what; and the statistics of its features."""
        scenes = [scene for seed in seeds for scene in self.scenes(kind, seed)]
        scores = score_scenes(self.judge, pixels, scenes)
        right = {what: torch.from_numpy(getattr(scores, what)) for what in RIGHT}
        return right, FeatureStatistics.of(extract_features(self.judge, pixels)[0])

    def measure(self, row: dict[str, Any]) -> dict[str, Any]:
        """Draw and score a row; one that is refused says why."""
        row = settings_of(row)
        kind, seeds = row["scenes"], tuple(self.seeds)
        if row["part"] == "model":
            more = (seed for seed in itertools.count() if seed not in self.seeds)
            seeds = (*seeds, *itertools.islice(more, max(0, MODEL_SEEDS - len(seeds))))
        same = {name: row[name] for name in ("scenes", "shift")}
        full, of_full, right_of_full, features_of_full = self.reference(*same.values(), seeds)
        try:
            if row["precision"] in ("real", "autoencoded"):
                pixels, found = self.real(kind, seeds, NOISE, row["precision"] == "autoencoded"), {}
            elif row.items() >= {**PLAIN, **PRECISIONS["FP"], "precision": "FP", **same}.items():  # the reference
                pixels, found = full, of_full
            else:
                pixels, found = self.draw(row, seeds)
        except QandCError as error:
            logger.warning("%s is refused: %s", row["name"], error)
            return {"refused": str(error)}
        right, features = self.look(pixels, kind, seeds)
        found = {"images": len(pixels), **found}
        for what in RIGHT:
            count = int(right[what].sum())
            found[what], found[f"{what}_ci95"] = count / len(pixels), wilson(count, len(pixels))
            found[f"{what}_lost"], found[f"{what}_lost_ci95"] = lost(right[what], right_of_full[what])
        found["frechet_distance"] = frechet_distance(features, self.real_features(kind, seeds))
        found["frechet_distance_to_fp"] = frechet_distance(features, features_of_full)
        if row["precision"] not in ("real", "autoencoded"):
            found |= likeness(pixels, full)
        return found


def main(
    model: Annotated[str, typer.Option(help="Pipeline directory, or the name of the shipped one.")] = "wardrobe",
    judge: JudgeFile = None,
    out: Out = Path("results/h200/wardrobe.json"),
    data: Data = DEFAULT_DIRECTORY,
    seeds: Annotated[str, typer.Option(help="Of scenes and noise, separated by commas.")] = "0,1,2",
    prompts: Annotated[int, typer.Option(min=2, help="Of each seed.")] = 2000,
    steps: int = 28,
    true_cfg_scale: Annotated[float, typer.Option(help="Of all rows that say no other; 1 is without guidance.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of a call.")] = 1000,
    fit: Annotated[int, typer.Option(min=1, help="Pictures that schedules and compensations are fitted on.")] = 64,
    only: Only = "",
    seconds: Seconds = 1e9,
    timed: Annotated[bool, typer.Option(help="Tell speed, too.")] = True,
    device: str = "cuda",
) -> None:
    """Measure what a row changes; a row that fails is logged, and the rest go on."""
    numbers = [int(seed) for seed in seeds.split(",")]
    bench = Wardrobe(model, judge, data, numbers, prompts, steps, batch, fit, true_cfg_scale, device, timed=timed)
    measure_chosen(out, bench.settings, rows(), bench.measure, goals, only, seconds)


if __name__ == "__main__":
    command(main)
