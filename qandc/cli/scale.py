"""Commands that draw many images, alone or as one of the processes of ``torchrun``: ``sample`` and ``ablate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qandc.cli.options import A_BITS, DEVICE, DTYPE, GUIDANCE, MODEL, MODEL_OR_SETTINGS, STEPS, W_BITS
from qandc.cli.terminal import check_output, err, out, quiet_diffusers, stage_bars
from qandc.errors import ConfigError
from qandc.support.files import keep_settings, locked, write_json

SEED = "Image i is drawn with seed + i."
BATCH = "Images drawn at once."
DEFAULTS = {"guidance_scale": 1.5, "scheduler": "ddpm", "w_bits": 8, "a_bits": 8, "cache_mode": "block"}
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "model": None,
        "steps": "20",
        "images": 160,
        "pool_images": 20,
        "samples": 100,
        "clusters": 20,
        "vc_samples": 40,
    },
    "paper": {
        "model": "facebook/DiT-XL-2-256",
        "steps": "50,100,250",
        "images": 10_000,
        "pool_images": 200,
        "samples": 800,
        "clusters": 100,
        "vc_samples": 256,
    },
}


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped early; the same command goes on where it was")
        raise


def _load(model: str | None, device: str, dtype: str, processes: Any) -> tuple[Any, str | None]:
    """The pipeline on the device of this process, and where it came from."""
    from qandc.sampling.pipelines import check_full_precision, load_pipeline, resolve_device, resolve_dtype, source_of

    quiet_diffusers()
    where = processes.device(resolve_device(device))
    pipe = load_pipeline(model, where, resolve_dtype(dtype, where))
    check_full_precision(pipe, model)
    return pipe, source_of(model)


@contextmanager
def _one_set_of_settings(directory: Path, settings: Any, source: str | None, processes: Any) -> Iterator[None]:
    """All experiments below a directory differ in the number of steps alone, and one command at a time is at them."""
    if not processes.first:
        yield
        return
    described = {name: value for name, value in settings.described().items() if name != "num_inference_steps"}
    with locked(directory / ".lock"):
        keep_settings(directory / "settings.json", {"model": source, **described}, "an ablation")
        yield


def sample(
    images: Annotated[int, typer.Option("--images", "-n", help="How many; the classes of the model in turn.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="NPZ file to write: arr_0 [N, H, W, C] uint8.")],
    settings: Annotated[
        Path | None, typer.Option(help="Directory that qandc calibrate wrote. Default: the settings of fashion-dit.")
    ] = None,
    full_precision: Annotated[bool, typer.Option("--full-precision", help="Neither quantize nor cache.")] = False,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    steps: Annotated[int | None, typer.Option(help=f"{STEPS} Default: those of the settings, or 50.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help=f"{GUIDANCE} Default: that of the settings, or 1.5.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddpm or ddim. Default: that of the settings, or ddpm.")] = None,
    w_bits: Annotated[int, typer.Option(help="Of the settings that come with fashion-dit: 4 or 8.")] = 8,
    batch_size: Annotated[int, typer.Option(help=BATCH)] = 50,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "auto",
    json_output: Annotated[Path | None, typer.Option("--json", help="Write the speed to this JSON file.")] = None,
) -> None:
    """Draw many images into one file, for qandc evaluate or ADM's suite; torchrun shares them out among GPUs.

    The same command after an interruption goes on with the images that were drawn.
    """
    from qandc.experiments.many_images import check_new, sample_file
    from qandc.experiments.processes import Processes
    from qandc.experiments.shards import ImageSet
    from qandc.method.presets import Preset, fashion_dit_preset
    from qandc.sampling.pipelines import class_names
    from qandc.support.results import result_header

    if full_precision and settings is not None:
        raise ConfigError("--full-precision and --settings contradict each other; give one of them")
    check_output(output, ".npz")
    if images < 1:
        raise ConfigError(f"--images is {images}; give an integer >= 1")
    check_new(output)
    if json_output is not None:
        check_output(json_output, ".json")
    preset = None
    if settings is not None:
        preset = Preset.load(settings)
        model = preset.model if model is None else model
    elif not full_precision:
        if model is not None:
            raise ConfigError(
                f"--model {model} needs --settings, which qandc calibrate writes for it, or --full-precision"
            )
        preset = fashion_dit_preset(w_bits)
    if preset is not None:
        origin = f"in {str(settings)!r}" if settings is not None else "that come with fashion-dit"
        held = preset.num_inference_steps, preset.guidance_scale, preset.scheduler_name
        for option, ours, asked in zip(
            ("--steps", "--guidance-scale", "--scheduler"), held, (steps, guidance_scale, scheduler), strict=True
        ):
            if asked not in (None, ours):
                raise ConfigError(
                    f"{option} is {asked}, but the settings {origin} are for {ours}; leave it out, give "
                    "--full-precision, or settings that qandc calibrate made for it"
                )
        steps = preset.num_inference_steps if steps is None else steps
        guidance_scale = preset.guidance_scale if guidance_scale is None else guidance_scale
        scheduler = preset.scheduler_name if scheduler is None else scheduler
    run: dict[str, Any] = {
        "steps": 50 if steps is None else steps,
        "guidance_scale": 1.5 if guidance_scale is None else guidance_scale,
        "scheduler": "ddpm" if scheduler is None else scheduler,
    }
    with Processes.joined() as processes:
        pipe, source = _load(model, device, dtype, processes)
        image_set = ImageSet(images, tuple(class_names(pipe)), seed, batch_size)
        with stage_bars(processes.first) as progress, _resumable():
            rate = sample_file(
                pipe, output, image_set, preset=preset, source=source, processes=processes, progress=progress, **run
            )
        if not processes.first:
            return
    if json_output is not None:
        name = "full precision" if preset is None else preset.config.scheme
        row = {"name": name, "processes": processes.count, "images": images, "images_per_second": rate}
        header = result_header({**run, "batch_size": batch_size, "device": str(pipe.device), "model": source})
        write_json(json_output, {**header, "rows": [row], "goals": []})
    speed = "" if rate is None else f", {rate:.1f} images/s"
    out.print(f"wrote {output}: {images} images{speed}", soft_wrap=True)


def ablate(
    directory: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to, and to go on in.")],
    preset: Annotated[
        str, typer.Option(help="Where the defaults come from: small (minutes on a CPU) or paper (hours on GPUs).")
    ] = "small",
    model: Annotated[str | None, typer.Option(help=f"{MODEL_OR_SETTINGS} Its settings are the defaults then.")] = None,
    images: Annotated[int | None, typer.Option(help="Of each row. Default: 160; paper: 10,000.")] = None,
    steps: Annotated[
        str | None, typer.Option(help=f"{STEPS} Several with commas. Default: 20; paper: 50,100,250.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help=f"{GUIDANCE} Default: 1.5.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddpm or ddim. Default: ddpm.")] = None,
    w_bits: Annotated[int | None, typer.Option(help=f"{W_BITS} Default: 8.")] = None,
    a_bits: Annotated[int | None, typer.Option(help=f"{A_BITS} Default: 8.")] = None,
    cache_mode: Annotated[
        str | None, typer.Option(help="What is kept: block, branch or taylor. Default: block.")
    ] = None,
    cache_interval: Annotated[int, typer.Option("--interval", "--cache-interval", help="Compute every Nth step.")] = 3,
    pool_images: Annotated[
        int | None, typer.Option(help="Images whose steps are the candidates. Default: 20; paper: 200.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Candidates to calibrate with. Default: 100; paper: 800.")] = None,
    clusters: Annotated[int | None, typer.Option(help="Of TAP. Default: 20; paper: 100.")] = None,
    vc: Annotated[
        str, typer.Option(help="Variance compensation: least_squares, variance_ratio or paper.")
    ] = "least_squares",
    vc_samples: Annotated[
        int | None, typer.Option(help="Images the compensation is fitted on. Default: 40; paper: 256.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help=BATCH)] = 20,
    seed: Annotated[int, typer.Option(help=SEED)] = 0,
    features: Annotated[
        str,
        typer.Option(
            help="Network of the metrics, as in qandc evaluate; auto: the classifier of fashion-dit for its images, "
            "none for others."
        ),
    ] = "auto",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Real images, or their statistics. Default for the classifier of fashion-dit: fashion-mnist."
        ),
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="pt_inception-2015-12-05-6726825d.pth, with --features inception.")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "auto",
) -> None:
    """Compare FP, quantization, caching, and both with TAP and VC; torchrun shares the images out among GPUs.

    Interrupt it anywhere: the same command goes on where it was. Other settings in the same directory are refused.
    """
    from qandc.evaluation.compare import USUAL_COUNT
    from qandc.experiments.ablation import ROWS, ExperimentSettings, check_experiment, run_experiment
    from qandc.experiments.processes import Processes
    from qandc.experiments.report import markdown_table, write_report
    from qandc.experiments.scores import scorer_for
    from qandc.method.presets import Preset, is_finished
    from qandc.method.settings import CalibrationSettings

    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    settings_of: dict[str, Any] = {}
    if model is not None and is_finished(model):  # what qandc calibrate wrote names its pipeline
        calibrated = Preset.load(model)
        settings_of = {
            "steps": str(calibrated.num_inference_steps),
            "guidance_scale": calibrated.guidance_scale,
            "scheduler": calibrated.scheduler_name,
            "w_bits": calibrated.config.w_bits,
            "a_bits": calibrated.config.a_bits,
            "cache_mode": calibrated.schedule.mode,
        }
        model = calibrated.model
        settings_of["model"] = model
    given = {
        "model": model,
        "steps": steps,
        "images": images,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "w_bits": w_bits,
        "a_bits": a_bits,
        "cache_mode": cache_mode,
        "pool_images": pool_images,
        "samples": samples,
        "clusters": clusters,
        "vc_samples": vc_samples,
    }
    chosen: dict[str, Any] = {**DEFAULTS, **PRESETS[preset], **settings_of}
    chosen |= {name: value for name, value in given.items() if value is not None}
    try:
        counts = [int(part) for part in chosen["steps"].split(",")]
    except ValueError:
        raise ConfigError(f"--steps is {steps!r}; give numbers, separated by commas") from None
    base = CalibrationSettings(
        num_inference_steps=counts[0],
        guidance_scale=chosen["guidance_scale"],
        scheduler=chosen["scheduler"],
        w_bits=chosen["w_bits"],
        a_bits=chosen["a_bits"],
        cache_mode=chosen["cache_mode"],
        cache_interval=cache_interval,
        uniform=True,
        pool_images=chosen["pool_images"],
        samples=chosen["samples"],
        clusters=chosen["clusters"],
        vc=vc,
        vc_samples=chosen["vc_samples"],
    )
    experiments = {
        number: ExperimentSettings(chosen["images"], replace(base, num_inference_steps=number), seed, batch_size)
        for number in counts
    }
    with Processes.joined() as processes, ExitStack() as stack:
        pipe, source = _load(chosen["model"], device, dtype, processes)
        scorer = scorer_for(pipe, features, reference, inception_weights)
        for settings in experiments.values():
            check_experiment(pipe, settings)
        stack.enter_context(_one_set_of_settings(directory, experiments[counts[0]], source, processes))
        rows = []
        for number, settings in experiments.items():
            if len(experiments) > 1 and processes.first:
                err.print(f"{number} steps")
            with stage_bars(processes.first) as progress, _resumable():
                rows += run_experiment(
                    pipe,
                    settings,
                    directory / f"steps-{number}",
                    scorer=scorer,
                    source=source,
                    processes=processes,
                    progress=progress,
                )
        if not processes.first:
            return
        described = {**experiments[counts[0]].described(), "model": source, "scorer": scorer.name, "preset": preset}
        described |= {"num_inference_steps": counts, "device": str(pipe.device)}
        shown = {kind.name: directory / f"steps-{counts[0]}" / f"{kind.slug}.npz" for kind in ROWS}
        for path in write_report(directory, rows, described, shown):
            err.print(f"wrote {path}", soft_wrap=True)
    if scorer.reference is not None and chosen["images"] < USUAL_COUNT:
        err.print(f"{chosen['images']} images: Fréchet distances are too large, compare them only with equal numbers")
    out.print(markdown_table(rows), soft_wrap=True)
