"""Measures feature caches on fashion-dit: mode x interval x schedule, in full precision, W8A8 and W4A8.

python training/evaluate_cache.py                                          # all of it, on a GPU: some minutes
python training/evaluate_cache.py --images 40 --steps 10 --device cpu      # a try

Every configuration denoises the same noise, of the start and of every DDPM step, from one generator per batch.
Quality is measured on features of the shipped classifier; PSNR is to the images of the full-precision model without a
cache. Speed is images per second, decoding left out, of all batches but the first, in which graphs are captured. A file
that is there already is continued.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline

from qandc import (
    CacheConfig,
    apply_cache_to_dit,
    calibrate,
    fashion_dit_path,
    fuse_dit,
    make_scheduler,
    quantize_model,
    remove_cache,
    sample_latents,
    uniform_schedule,
)
from qandc.caching.schedule import optimal_schedule, schedule_error
from qandc.method.schedule_calibration import feature_gram
from qandc.support.files import read_json, write_json
from qandc.support.results import result_header
from quality import Judge, Sampler

INTERVALS = (2, 3, 4, 5, 8)
FORMS = (("block", 0), ("branch", 0), ("taylor", 1), ("taylor", 2))
PRECISIONS = {"FP": None, "W8A8": 8, "W4A8": 4}
KEYS = ("precision", "mode", "order", "interval", "schedule")
CALIBRATION_LABELS = tuple(range(10)) * 3
CALIBRATION_SEED = 10_000_000


def quantized(base: Any, w_bits: int, scheduler: Any, steps: int, guidance_scale: float) -> Any:
    """Static ranges, min-max over one run of a few samples without a cache."""
    model = quantize_model(copy.deepcopy(base), w_bits=w_bits)
    batches: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append({"hidden_states": args[0].clone(), **kwargs}), with_kwargs=True
    )
    seeds = [CALIBRATION_SEED + i for i in range(len(CALIBRATION_LABELS))]
    sample_latents(
        model, scheduler, CALIBRATION_LABELS, num_inference_steps=steps, guidance_scale=guidance_scale, seeds=seeds
    )
    handle.remove()
    return calibrate(model, batches)


def configurations(grams: dict[str, Any], steps: int) -> Iterator[tuple[dict[str, Any], CacheConfig | None]]:
    """Description and cache of every row of one precision."""
    yield {"mode": "none", "order": 0, "interval": 1, "schedule": "all"}, None
    for interval in INTERVALS:
        for mode, order in FORMS:
            warm_up = order + 1
            uniform = uniform_schedule(steps, interval, warm_up_steps=warm_up)
            gram = grams["block" if mode == "block" else "branch"]
            best = optimal_schedule(gram, sum(uniform), order=order, warm_up_steps=warm_up)
            for kind, schedule in (("uniform", uniform), ("calibrated", best)):
                row = {"mode": mode, "order": order, "interval": interval, "schedule": kind}
                row["compute_steps"], row["steps"] = sum(schedule), "".join(".C"[computed] for computed in schedule)
                row["feature_error"] = schedule_error(gram, schedule, order)
                yield row, CacheConfig(mode, schedule=schedule, order=max(1, order))


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/h100/cache.json"),
    images: Annotated[int, typer.Option(min=20, help="Samples, class-balanced.")] = 10_000,
    batch: int = 2500,
    steps: int = 50,
    guidance_scale: float = 1.5,
    scheduler_name: Annotated[str, typer.Option("--scheduler")] = "ddpm",
    precisions: Annotated[str, typer.Option(help="Comma-separated, of FP, W8A8, W4A8.")] = ",".join(PRECISIONS),
    seconds: Annotated[float, typer.Option(help="Begin no configuration after so long.")] = 1e9,
    device: str = "cuda",
) -> None:
    """Sample with every configuration and score."""
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipe = DiTPipeline.from_pretrained(fashion_dit_path()).to(device)
    base, vae = pipe.transformer.to(dtype).eval(), pipe.vae
    scheduler = make_scheduler(scheduler_name, pipe.scheduler.config)
    sample, judge = Sampler(vae, scheduler, images, batch, steps, guidance_scale, device), Judge(device)
    rows: list[dict[str, Any]] = []
    reference: torch.Tensor | None = None

    def add(precision: str, row: dict[str, Any], pixels: torch.Tensor, seconds_per_image: float, nbytes: int) -> None:
        assert reference is not None
        rows.append(
            {
                "precision": precision,
                **row,
                **judge(pixels, sample.labels, reference),
                "images_per_second": 1 / seconds_per_image,
                "cache_bytes": nbytes,
            }
        )
        typer.echo(
            "{precision:5} {mode:7}{order} N {interval} {schedule:10} frechet {frechet_distance:.3f} IS "
            "{inception_score:.3f} accuracy {class_accuracy:.4f} psnr {psnr_to_fp:.2f} {images_per_second:.0f}/s "
            "at {compute_steps}".format(**{"compute_steps": steps, **rows[-1]})
        )
        write()

    settings = {
        "images": images,
        "batch": batch,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler_name,
        "features": "fashion-classifier",
        "dtype": str(dtype).removeprefix("torch."),
        "ranges": "static per tensor, min-max, from one run without cache",
    }
    if out.exists():
        before = read_json(out, "result", "give another --out", names=("settings", "rows"))
        if before["settings"] != settings:
            raise typer.BadParameter(
                f"{out} was made with {before['settings']}; give another file or the same settings"
            )
        rows = before["rows"]
    done = {tuple(row[key] for key in KEYS) for row in rows}

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**result_header(settings), "rows": rows, "goals": []})

    reference, speed = sample(base)
    for precision in precisions.split(","):
        w_bits = PRECISIONS[precision]
        model = base if w_bits is None else quantized(base, w_bits, scheduler, steps, guidance_scale)
        calibration = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        seeds = [CALIBRATION_SEED + i for i in range(len(CALIBRATION_LABELS))]
        grams = {
            mode: feature_gram(model, scheduler, CALIBRATION_LABELS, mode=mode, seeds=seeds, **calibration)
            for mode in ("block", "branch")
        }
        if w_bits is not None:
            fuse_dit(model)
        for row, config in configurations(grams, steps):
            if tuple({"precision": precision, **row}[key] for key in KEYS) in done:
                continue
            if time.perf_counter() - started > seconds:
                typer.echo("out of time")
                return
            cache = None if config is None else apply_cache_to_dit(model, config=config)
            pixels, speed = sample(model)
            nbytes = 0 if cache is None else cache.nbytes
            if cache is not None:
                remove_cache(model)
            add(precision, row, pixels, speed, nbytes)


if __name__ == "__main__":
    typer.run(main)
