"""Run the command line: read options, call the library, print and save."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from typer.exceptions import TyperException

from qandc.cli.evaluate import evaluate
from qandc.cli.options import (
    Calibrated,
    Device,
    Dtype,
    Given,
    Model,
    ModelOrSettings,
    Seed,
    calibrated_options,
    resolve,
    takes,
)
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
from qandc.support import arguments
from qandc.support.files import read_json, write_json, write_whole

logger = logging.getLogger(__name__)
DEFAULTS = {"cache_mode": "branch"}  # of generate, beside those of the fields
app = typer.Typer(add_completion=False, no_args_is_help=True, help="Quantized and cached diffusion transformers.")
for command in (sample, ablate):
    app.command()(command)


def parse_classes(text: str | None, names: dict[int, str]) -> tuple[int, ...]:
    """Read ids and names separated by commas; without a text, the first ten classes."""
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


@app.command()
@takes("num_inference_steps guidance_scale scheduler w_bits a_bits smoothing cache_mode cache_interval", **DEFAULTS)
def generate(
    *,
    model: ModelOrSettings = None,
    calibrated: Calibrated = None,
    classes: Annotated[str | None, typer.Option(help="Class ids or names, comma-separated. Default: ten.")] = None,
    given: Given,
    schedule: Annotated[
        Path | None, typer.Option(help="File of a calibrated schedule, in place of mode and interval.")
    ] = None,
    no_calibrated: Annotated[
        bool,
        typer.Option(
            "--no-calibrated",
            help="Do not use what comes with fashion-dit (static ranges, schedule, compensation) where no "
            "option above asks for anything else.",
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("qandc.png"),
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the table to this JSON file.")] = None,
) -> None:
    """Draw one image per class in full precision and quantized + cached, from the same noise, into one PNG."""
    from qandc.caching.schedule import CacheConfig, CalibratedSchedule
    from qandc.experiments.generate import Comparison, GenerateConfig, comparison_record, draw_grid, quantized_name
    from qandc.experiments.generate import generate as run
    from qandc.method.saved import LIKENESS, Preset, fashion_dit_preset, is_finished
    from qandc.quantizer import QuantConfig
    from qandc.sampling.loop import check_sampling, make_scheduler
    from qandc.sampling.pipelines import check_full_precision, class_names, load_pipeline, resolve_device, resolve_dtype

    if calibrated is None and model is not None and is_finished(model):
        calibrated, model = Path(model), None  # what qandc calibrate wrote names its pipeline
    arguments.check_value("--seed", arguments.Seed, seed)
    if no_calibrated and calibrated is not None:
        raise ConfigError("--calibrated and --no-calibrated contradict each other; give one of them")
    preset, held, many = None, {}, None
    if calibrated is not None:
        preset = Preset.load(calibrated)
        held = calibrated_options(preset)
        held["cache_interval"] = f"a schedule of {sum(preset.schedule.schedule)} computed steps"
        if schedule is not None:
            raise ConfigError(
                f"--schedule and --calibrated {str(calibrated)!r} contradict each other; give one of them"
            )
        model = preset.base_model(model)
    chosen = resolve(given, held, DEFAULTS, f"in {str(calibrated)!r}")
    plain = resolve({**dict.fromkeys(given), "w_bits": given["w_bits"]}, {}, DEFAULTS)
    as_shipped = chosen == plain and (model, schedule, given["cache_mode"], given["cache_interval"]) == (None,) * 4
    if preset is None and not no_calibrated and as_shipped:
        preset = fashion_dit_preset(chosen["w_bits"])
        many = read_json(LIKENESS, "measured likeness", "install qandc again")[f"w{chosen['w_bits']}a8"]
    elif preset is None and not no_calibrated:
        logger.info(
            "not calibrated: the settings that are shipped are for fashion-dit as it runs without other options"
        )
    if preset is not None:
        chosen |= calibrated_options(preset)
        config, cache = preset.config, preset.schedule.config()
    else:
        config = QuantConfig(chosen["w_bits"], chosen["a_bits"])
        if schedule is not None:
            cache = CalibratedSchedule.load(schedule).config()
            cache.of_steps(chosen["num_inference_steps"])
        else:
            cache = CacheConfig(chosen["cache_mode"], interval=chosen["cache_interval"])
    steps, guidance_scale, scheduler = (chosen[name] for name in ("num_inference_steps", "guidance_scale", "scheduler"))
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
    labels = parse_classes(classes, names)
    noise_schedule = make_scheduler(scheduler, pipe.scheduler.config)
    check_sampling(pipe.transformer, noise_schedule, labels, steps, guidance_scale)
    if preset is not None:
        preset.check(pipe.transformer, noise_schedule, steps, guidance_scale)
    drawn = GenerateConfig(labels, steps, guidance_scale, scheduler, config, cache, seed, preset, chosen["smoothing"])

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
    print_comparison(result, str(torch_dtype).removeprefix("torch."), many)
    if json_output is not None:
        write_json(json_output, comparison_record(result, drawn, str(where), str(torch_dtype)))
    out.print(saved, soft_wrap=True)


@app.command()
@takes()
def calibrate(
    *,
    directory: Annotated[Path, typer.Option("--out", "-o", help="Directory to write the settings to.")],
    model: Model = None,
    given: Given,
    ranges: Annotated[str, typer.Option(help="How static ranges are found: minmax, percentile or mse.")] = "minmax",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Ranges around zero, without zero points.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace finished settings; their candidate pool is used again.")
    ] = False,
) -> None:
    """Calibrate a pipeline: smoothing, quantized weights, static ranges, cache schedule, compensation.

    The same command after an interruption goes on with what was finished.
    """
    from qandc.method.pipeline_calibration import POOL, calibrate_pipeline, check_directory
    from qandc.method.settings import CalibrationConfig
    from qandc.quantization.ranges import RangeConfig
    from qandc.sampling.pipelines import load_pipeline, resolve_device, resolve_dtype, source_of

    settings = CalibrationConfig(ranges=RangeConfig(ranges, symmetric=symmetric), **resolve(given, {}, {}))
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
    except BaseException:  # Ctrl-C, out of memory: what is finished is kept
        if (directory / POOL).is_dir():
            err.print("stopped early; what was finished is kept, the same command goes on with it", soft_wrap=True)
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
    """Run the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    sys.exit(main())
