"""The command line: reads options, calls the library, prints and saves."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.exceptions import TyperException

from qandc.cli.evaluate import evaluate
from qandc.cli.options import A_BITS, DEVICE, DTYPE, GUIDANCE, MODEL, MODEL_OR_SETTINGS, STEPS, W_BITS
from qandc.cli.scale import ablate, sample
from qandc.cli.terminal import (
    check_output,
    err,
    out,
    print_calibration,
    print_comparison,
    progress_bars,
    quiet_diffusers,
    stage_bars,
)
from qandc.errors import ConfigError, QandCError
from qandc.support.files import write_json, write_whole

logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, no_args_is_help=True, help="Quantized and cached diffusion transformers.")
for command in (sample, ablate):
    app.command()(command)


def _parse_classes(text: str | None, names: dict[int, str]) -> tuple[int, ...]:
    """Ids and names separated by commas; by default the first ten classes."""
    if text is None:
        return tuple(names)[:10]
    by_name = {name.lower(): label for label, name in names.items()}
    first, last = min(names), max(names)
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            raise ConfigError(f"there is an empty class between the commas of {text!r}; give ids or names")
        if part.lower() in by_name:
            label = by_name[part.lower()]
        else:
            try:
                label = int(part)
            except ValueError:
                known = f"{names[first]} .. {names[last]}"
                raise ConfigError(f"class {part!r} is unknown; give ids {first} to {last} or names {known}") from None
        if label not in names:
            known = f"{len(names)} classes, {first} ({names[first]}) to {last} ({names[last]})"
            raise ConfigError(f"class id {label} is out of range; this model knows {known}")
        labels.append(label)
    return tuple(labels)


def _refuse_others(preset: Any, directory: Path, given: tuple[Any, ...]) -> None:
    """Refuse options that contradict the settings that were asked for; None was not given."""
    found = f"a schedule of {sum(preset.schedule.schedule)} computed steps"
    held = {
        "--steps": preset.num_inference_steps,
        "--guidance-scale": preset.guidance_scale,
        "--scheduler": preset.scheduler_name,
        "--w-bits": preset.config.w_bits,
        "--a-bits": preset.config.a_bits,
        "--no-smoothing": not preset.smoothing,
        "--cache-mode": preset.schedule.mode,
        "--cache-interval": found,
        "--schedule": found,
    }
    for (option, ours), theirs in zip(held.items(), given, strict=True):
        if theirs not in (None, ours):
            raise ConfigError(
                f"{option} is {theirs}, but the settings in {str(directory)!r} are for {ours}; leave it out, or give "
                "other settings"
            )


@app.command()
def generate(
    model: Annotated[str | None, typer.Option(help=MODEL_OR_SETTINGS)] = None,
    settings: Annotated[
        Path | None,
        typer.Option(help="Directory that qandc calibrate wrote; options marked * come from there."),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class ids or names, comma-separated. Default: ten.")] = None,
    steps: Annotated[int | None, typer.Option(help=f"* {STEPS} Default: 50.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help=f"* {GUIDANCE} Default: 1.5.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="* ddpm or ddim. Default: ddpm.")] = None,
    w_bits: Annotated[int | None, typer.Option(help=f"* {W_BITS} Default: 8.")] = None,
    a_bits: Annotated[int | None, typer.Option(help=f"* {A_BITS} 16 leaves them as they are. Default: 8.")] = None,
    no_smoothing: Annotated[
        bool, typer.Option("--no-smoothing", help="* Do not move outliers from activations to weights.")
    ] = False,
    cache_mode: Annotated[
        str | None,
        typer.Option(
            help="* What is kept: block (the sum of all), branch, or taylor (branches, forecast). Default: branch."
        ),
    ] = None,
    cache_interval: Annotated[
        int | None, typer.Option(help="* Compute every Nth step; 1 turns the cache off. Default: 3.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="* File of a calibrated schedule, in place of mode and interval.")
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            help="Use the settings that come with fashion-dit (static ranges, schedule, variance compensation), if no "
            "option above asks for anything else."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Image i is drawn with seed + i.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "auto",
    output: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("qandc.png"),
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the table to this JSON file.")] = None,
) -> None:
    """Draw one image per class in full precision and quantized + cached, from the same noise, into one PNG."""
    from qandc.caching.schedule import CacheConfig, CalibratedSchedule
    from qandc.experiments.generate import Comparison, GenerateSettings, comparison_record, draw_grid, quantized_name
    from qandc.experiments.generate import generate as run
    from qandc.method.presets import Preset, fashion_dit_preset, is_finished
    from qandc.quantizer import QuantConfig
    from qandc.sampling.loop import check_sampling, make_scheduler
    from qandc.sampling.pipelines import check_full_precision, class_names, load_pipeline, resolve_device, resolve_dtype

    if settings is None and model is not None and is_finished(model):
        settings, model = Path(model), None  # what qandc calibrate wrote names its pipeline
    if not calibrated and settings is not None:
        raise ConfigError("--settings and --no-calibrated contradict each other; give one of them")
    if cache_interval is not None and cache_interval < 1:
        raise ConfigError(f"--cache-interval is {cache_interval}; give an integer >= 1 (1 computes every step)")
    if not 0 <= seed < 2**62:
        raise ConfigError(f"--seed is {seed}; give an integer from 0 to 2^62 - 1")
    config = QuantConfig(8 if w_bits is None else w_bits, 8 if a_bits is None else a_bits)
    preset = None
    if settings is not None:
        preset = Preset.load(settings)
        given = (
            steps,
            guidance_scale,
            scheduler,
            w_bits,
            a_bits,
            no_smoothing or None,
            cache_mode,
            cache_interval,
            schedule,
        )
        _refuse_others(preset, settings, given)
        model = preset.model if model is None else model
    steps, guidance_scale = 50 if steps is None else steps, 1.5 if guidance_scale is None else guidance_scale
    scheduler = "ddpm" if scheduler is None else scheduler
    as_shipped = (model, steps, guidance_scale, scheduler, config.a_bits) == (None, 50, 1.5, "ddpm", 8)
    as_shipped &= (cache_mode, cache_interval, schedule) == (None, None, None) and not no_smoothing
    if preset is None and calibrated and as_shipped:
        preset = fashion_dit_preset(config.w_bits)
    elif preset is None and calibrated:
        logger.info(
            "not calibrated: the settings that are shipped are for fashion-dit as it runs without other options"
        )
    if preset is not None:
        steps, guidance_scale, scheduler = preset.num_inference_steps, preset.guidance_scale, preset.scheduler_name
        config, cache = preset.config, preset.schedule.config()
    elif schedule is not None:
        cache = CalibratedSchedule.load(schedule).config()
        cache.of_steps(steps)
    else:
        cache = CacheConfig(
            "branch" if cache_mode is None else cache_mode, interval=3 if cache_interval is None else cache_interval
        )
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; give an integer >= 1")
    check_output(output, ".png")
    if json_output is not None:
        check_output(json_output, ".json")
    quiet_diffusers()
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    with err.status("loading the pipeline"):
        pipe = load_pipeline(model, where, torch_dtype)
    check_full_precision(pipe, model)
    names = class_names(pipe)
    labels = _parse_classes(classes, names)
    noise_schedule = make_scheduler(scheduler, pipe.scheduler.config)
    check_sampling(pipe.transformer, noise_schedule, labels, steps, guidance_scale)
    if preset is not None:
        preset.check(pipe.transformer, noise_schedule, steps, guidance_scale)
    smoothed = not no_smoothing if preset is None else bool(preset.smoothing)
    drawn = GenerateSettings(labels, steps, guidance_scale, scheduler, config, cache, seed, preset, smoothed)

    result = Comparison()

    def save_rows() -> str:
        rows = [row for row in result.rows if row.batches]
        if not rows:
            return "nothing was finished"
        caption = f"{scheduler.upper()} {steps} steps, guidance {guidance_scale:g}, seed {seed}"
        picture = draw_grid(rows, [names[label] for label in labels], caption)
        write_whole(output, lambda path: picture.save(path, format="PNG"))
        return f"wrote {output}"

    try:
        with progress_bars() as progress:
            total = steps * len(labels)
            tasks = {name: progress.add_task(name, total=total) for name in ("FP", quantized_name(drawn))}
            run(pipe, drawn, result, lambda name, done: progress.advance(tasks[name], done))
    except BaseException:  # Ctrl-C, out of memory, a broken model: what is finished is kept
        err.print(f"stopped early; {save_rows()}", soft_wrap=True)
        raise
    saved = save_rows()
    print_comparison(result, str(torch_dtype).removeprefix("torch."))
    if json_output is not None:
        write_json(json_output, comparison_record(result, drawn, str(where), str(torch_dtype)))
    out.print(saved, soft_wrap=True)


@app.command()
def calibrate(
    directory: Annotated[Path, typer.Option("--out", "-o", help="Directory to write the settings to.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    steps: Annotated[int, typer.Option(help=STEPS)] = 50,
    guidance_scale: Annotated[float, typer.Option(help=GUIDANCE)] = 1.5,
    scheduler: Annotated[str, typer.Option(help="ddpm or ddim.")] = "ddpm",
    w_bits: Annotated[int, typer.Option(help=W_BITS)] = 8,
    a_bits: Annotated[int, typer.Option(help=A_BITS)] = 8,
    rounding: Annotated[
        str | None, typer.Option(help="Of weights: nearest, or gptq. Default: gptq with 4 bits, nearest with 8.")
    ] = None,
    no_smoothing: Annotated[
        bool, typer.Option("--no-smoothing", help="Do not move outliers from activations to weights.")
    ] = False,
    ranges: Annotated[str, typer.Option(help="How static ranges are found: minmax, percentile or mse.")] = "minmax",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Ranges around zero, without zero points.")] = False,
    cache_mode: Annotated[str, typer.Option(help="What is kept: block, branch or taylor.")] = "taylor",
    cache_interval: Annotated[
        int, typer.Option("--interval", "--cache-interval", help="As many steps are computed as with every Nth.")
    ] = 3,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Compute every Nth step, not those that serve the others best.")
    ] = False,
    pool_images: Annotated[int, typer.Option(help="Images whose steps are the candidates.")] = 40,
    pool_without_cache: Annotated[
        bool, typer.Option("--pool-without-cache", help="Record the candidates on runs without the cache.")
    ] = False,
    select: Annotated[
        str, typer.Option(help="Choice of samples: tap, random, uniform, kmeans, agglomerative or dbscan.")
    ] = "tap",
    samples: Annotated[int, typer.Option(help="Candidates to calibrate with.")] = 400,
    clusters: Annotated[int, typer.Option(help="Of the candidates.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    vc: Annotated[
        str, typer.Option(help="Variance compensation: least_squares, variance_ratio, paper or none.")
    ] = "least_squares",
    vc_target: Annotated[str, typer.Option(help="What is compensated: sample or noise.")] = "sample",
    vc_start: Annotated[int, typer.Option(help="First step that is compensated.")] = 0,
    vc_samples: Annotated[int, typer.Option(help="Images the compensation is fitted on.")] = 100,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPE)] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace finished settings; their candidate pool is used again.")
    ] = False,
) -> None:
    """Calibrate a pipeline: smoothing, quantized weights, static ranges, cache schedule, variance compensation.

    The same command after an interruption goes on with the candidates that were recorded.
    """
    from qandc.method.pipeline_calibration import POOL, calibrate_pipeline, check_directory
    from qandc.method.settings import CalibrationSettings
    from qandc.quantization.ranges import RangeConfig
    from qandc.sampling.pipelines import load_pipeline, resolve_device, resolve_dtype, source_of

    settings = CalibrationSettings(
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        w_bits=w_bits,
        a_bits=a_bits,
        rounding=rounding,
        smoothing=not no_smoothing,
        ranges=RangeConfig(ranges, symmetric=symmetric),
        cache_mode=cache_mode,
        cache_interval=cache_interval,
        uniform=uniform,
        pool_images=pool_images,
        pool_with_cache=not pool_without_cache,
        select=select,
        samples=samples,
        clusters=clusters,
        seed=seed,
        vc=vc,
        vc_target=vc_target,
        vc_start=vc_start,
        vc_samples=vc_samples,
    )
    check_directory(directory, overwrite)
    quiet_diffusers()
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    with err.status("loading the pipeline"):
        pipe = load_pipeline(model, where, torch_dtype)
    try:
        with stage_bars() as show:
            report = calibrate_pipeline(
                pipe, settings, directory, overwrite=overwrite, source=source_of(model), progress=show
            )
    except QandCError:
        raise
    except BaseException:  # Ctrl-C, out of memory: what is recorded is kept
        if (directory / POOL).is_dir():
            kept = "stopped early; the candidates that were recorded are kept, the same command goes on with them"
            err.print(kept, soft_wrap=True)
        raise
    print_calibration(report, directory)


app.command()(evaluate)


@app.command()
def info() -> None:
    """Print versions, GPUs, and which kernels can run here and why the others cannot."""
    import torch

    from qandc.sampling.pipelines import fashion_dit_path
    from qandc.support.results import versions
    from qandc_kernels import reference, select_backend

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    table.add_row("CUDA (torch build)", torch.version.cuda or "none")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = torch.cuda.get_device_name(device)
        table.add_row(str(device), f"{name}, sm_{major}{minor}, {memory:.0f} GiB")
    table.add_row("embedded model", str(fashion_dit_path()))
    out.print(table)
    out.print()
    kernels = Table("op", "device", "runs on", "why", box=None, pad_edge=False)
    ops = sorted(reference.__all__)
    for device in [torch.device("cpu"), *devices]:
        backend, reason = select_backend(device)
        for op in ops:
            kernels.add_row(op, str(device), backend, reason)
    if not devices:
        built = "torch sees no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
        for op in ops:
            kernels.add_row(op, "cuda", "not available", built)
    out.print(kernels)


def _print_version(wanted: bool) -> None:
    if wanted:
        from qandc.support.results import versions

        out.print(f"qandc {versions()['qandc-kernels'] or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what is decided, on stderr.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    for package in ("qandc", "qandc_kernels"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.NOTSET)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every error is one line on stderr and status 2, Ctrl-C is status 130."""
    try:
        status = app(args=arguments, prog_name="qandc", standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
    except QandCError as error:
        message = str(error)
    except OSError as error:  # a name that no file can have, a file that may not be read
        logger.debug("the operating system refused", exc_info=True)
        named = "a file" if error.filename is None else repr(error.filename)
        message = f"{named} cannot be used ({error.strerror or error}); give another path, or mend it"
    except Exception as error:
        logger.debug("unexpected error", exc_info=True)
        message = f"{type(error).__name__}: {error} (qandc --verbose shows where)"
    else:
        if status == 130:
            err.print("interrupted")
        return status if isinstance(status, int) else 0
    if message:
        err.print(f"qandc: error: {' '.join(message.split())}", style="red", soft_wrap=True)
    return 2


def entry_point() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    sys.exit(main())
