"""Measure time and memory of calibrating, saving and loading DiT-XL/2 (random weights, as facebook/DiT-XL-2-256).

python training/measure_large_model.py                       # on a GPU
python training/measure_large_model.py --device cpu --steps 2 --uniform --pool-images 2 --samples 4 --feature-images 2

Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer


def make_pipeline(directory: Path) -> None:
    """Make a pipeline directory as the hub has it, with random weights that are not zero anywhere."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    names = {label: f"class {label}" for label in range(1000)}
    transformer = DiTTransformer2DModel(sample_size=32, out_channels=8)
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False), names).save_pretrained(directory)


def calibrate(model: Path, out: Path, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    from qandc import CalibrationConfig, calibrate_pipeline, load_pipeline, save
    from qandc.sampling.pipelines import resolve_dtype

    pipe = load_pipeline(model, device, resolve_dtype("auto", torch.device(device)))
    started = time.perf_counter()
    report = calibrate_pipeline(pipe, CalibrationConfig(**settings), out, source=str(model))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    save(pipe.transformer, out / "quantized", schedule=report.preset.schedule, features=report.preset.features)
    before, after = report.quantization.quantized_bytes
    size = sum(path.stat().st_size for path in (out / "quantized").iterdir())
    return {
        "seconds": seconds,
        "save_seconds": time.perf_counter() - started,
        "checkpoint_bytes": size,
        "quantized_bytes_before": before,
        "quantized_bytes_after": after,
    }


def load(directory: Path, device: str) -> dict[str, Any]:
    from qandc import load as load_calibrated

    started = time.perf_counter()
    load_calibrated(directory / "quantized", device=device)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started}


def _child(connection: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    found = function(*arguments)
    found["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    connection.send(found)


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the function's result and the peak memory of the process that it runs in."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(sender, function, arguments))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write; one that is there is continued.")] = Path(
        "results/h100/large-model.json"
    ),
    device: str = "cuda",
    steps: int = 50,
    pool_images: int = 20,
    samples: int = 100,
    feature_images: int = 16,
    w_bits: str = "8,4",
    uniform: Annotated[bool, typer.Option("--uniform", help="Do not search for a schedule.")] = False,
) -> None:
    """Measure each part in a process of its own."""
    from qandc.experiments.report import measure_rows  # here, so that a part's process holds what it needs alone

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = {
        "num_inference_steps": steps, "guidance_scale": 4.0, "scheduler": "ddim", "uniform": uniform,
        "pool_images": pool_images, "samples": samples, "feature_images": feature_images,
        "clusters": min(50, max(2, samples // 8)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_pipeline(model)

        def measure(row: dict[str, Any]) -> dict[str, Any]:
            where = Path(folder) / f"w{row['w_bits']}"
            bits = {**settings, "w_bits": row["w_bits"]}
            if row["part"] == "calibrate":
                return alone(calibrate, model, where, device, bits)
            if not where.exists():  # measured by an earlier run
                alone(calibrate, model, where, device, bits)
            return alone(load, where, device)

        rows = [{"part": part, "w_bits": int(bits)} for bits in w_bits.split(",") for part in ("calibrate", "load")]
        noted = {**settings, "device": device, "model": "DiT-XL/2-256, random weights"}
        measure_rows(out, noted, rows, measure)


if __name__ == "__main__":
    typer.run(main)
