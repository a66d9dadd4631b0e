"""The command line: reads options, calls the library, prints and saves."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.exceptions import TyperException

from qandc.errors import ConfigError, OutputError, QandCError

logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, no_args_is_help=True, help="Quantized and cached diffusion transformers.")
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)


def _check_output(path: Path, suffix: str) -> None:
    """Refuse, before the work begins, a file that could not be written after it."""
    try:
        if path.is_dir():
            name = path / f"images{suffix}"
            raise OutputError(f"output {str(path)!r} is a directory; give a file name such as {name}")
        if path.suffix.lower() != suffix:
            raise ConfigError(f"output {str(path)!r} must end in {suffix}")
        if not path.parent.is_dir():
            raise OutputError(f"output folder {str(path.parent)!r} does not exist; create it or give another one")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except QandCError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"output {str(path)!r} cannot be written ({reason}); give another file") from None


def _quiet_diffusers() -> None:
    """Keep diffusers' loading bars and hints out of our output."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    if not logger.isEnabledFor(logging.DEBUG):
        diffusers_logging.set_verbosity_error()


def _save(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the target and rename, so that a file under this name is always whole."""
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


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


@app.command()
def generate(
    model: Annotated[
        str | None, typer.Option(help="Pipeline directory or hub id, e.g. facebook/DiT-XL-2-256. Default: fashion-dit.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class ids or names, comma-separated. Default: ten.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 turns it off.")] = 1.5,
    scheduler: Annotated[str, typer.Option(help="ddpm or ddim.")] = "ddpm",
    w_bits: Annotated[int, typer.Option(help="Bits of the weights: 4 or 8.")] = 8,
    a_bits: Annotated[int, typer.Option(help="Bits of the activations: 4 to 8.")] = 8,
    cache_mode: Annotated[
        str | None,
        typer.Option(
            help="What is kept: block (the sum of all), branch, or taylor (branches, forecast). Default: branch."
        ),
    ] = None,
    cache_interval: Annotated[
        int | None, typer.Option(help="Compute every Nth step; 1 turns the cache off. Default: 3.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option(help="File of a calibrated schedule, in place of mode and interval.")
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option(
            help="Use the settings that come with fashion-dit (static ranges, schedule, variance compensation), if no "
            "option above asks for anything else."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Image i is drawn with seed + i.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    output: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("qandc.png"),
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the table to this JSON file.")] = None,
) -> None:
    """Draw one image per class in full precision and quantized + cached, from the same noise, into one PNG."""
    from qandc.generate import Comparison, GenerateSettings, comparison_record, draw_grid, quantized_name
    from qandc.generate import generate as run
    from qandc.pipelines import class_names, load_pipeline, resolve_device, resolve_dtype
    from qandc.presets import fashion_dit_preset
    from qandc.quantizer import QuantConfig
    from qandc.sampling import check_sampling, make_scheduler
    from qandc.schedule import CacheConfig, CalibratedSchedule

    config = QuantConfig(w_bits, a_bits)
    if cache_interval is not None and cache_interval < 1:
        raise ConfigError(f"--cache-interval is {cache_interval}; give an integer >= 1 (1 computes every step)")
    if schedule is not None:
        cache = CalibratedSchedule.load(schedule).config()
        cache.of_steps(steps)
    else:
        cache = CacheConfig(cache_mode or "branch", interval=3 if cache_interval is None else cache_interval)
    if steps < 1:
        raise ConfigError(f"--steps is {steps}; give an integer >= 1")
    if not 0 <= seed < 2**62:
        raise ConfigError(f"--seed is {seed}; give an integer from 0 to 2^62 - 1")
    _check_output(output, ".png")
    if json_output is not None:
        _check_output(json_output, ".json")
    _quiet_diffusers()
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    with err.status("loading the pipeline"):
        pipe = load_pipeline(model, where, torch_dtype)
    names = class_names(pipe)
    settings = GenerateSettings(_parse_classes(classes, names), steps, guidance_scale, scheduler, config, cache, seed)
    as_shipped = (model, steps, guidance_scale, scheduler, a_bits) == (None, 50, 1.5, "ddpm", 8)
    if calibrated and as_shipped and (cache_mode, cache_interval, schedule) == (None, None, None):
        settings = replace(settings, preset=fashion_dit_preset(w_bits))
    elif calibrated:
        logger.info(
            "not calibrated: the settings that are shipped are for fashion-dit as it runs without other options"
        )

    noise_schedule = make_scheduler(scheduler, pipe.scheduler.config)
    check_sampling(pipe.transformer, noise_schedule, settings.class_labels, steps, guidance_scale)

    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    result = Comparison()

    def save_rows() -> str:
        rows = [row for row in result.rows if row.batches]
        if not rows:
            return "nothing was finished"
        caption = f"{scheduler.upper()} {steps} steps, guidance {guidance_scale:g}, seed {seed}"
        picture = draw_grid(rows, [names[label] for label in settings.class_labels], caption)
        _save(output, lambda path: picture.save(path, format="PNG"))
        return f"wrote {output}"

    try:
        with Progress(*columns, console=err) as progress:
            total = steps * len(settings.class_labels)
            tasks = {name: progress.add_task(name, total=total) for name in ("FP", quantized_name(settings))}
            run(pipe, settings, result, lambda name, done: progress.advance(tasks[name], done))
    except BaseException:  # Ctrl-C, out of memory, a broken model: what is finished is kept
        err.print(f"stopped early; {save_rows()}", soft_wrap=True)
        raise
    saved = save_rows()
    _print_comparison(result, str(torch_dtype).removeprefix("torch."))
    if json_output is not None:
        text = json.dumps(comparison_record(result, settings, str(where), str(torch_dtype)), indent=1) + "\n"
        _save(json_output, lambda path: path.write_text(text))
    out.print(saved, soft_wrap=True)


def _print_comparison(result: Any, dtype: str) -> None:
    full, quantized = result.rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("", "s / image", "speed", "transformer", "PSNR to FP"):
        table.add_column(header, justify="left" if not header else "right")
    quality = f"{result.psnr.mean():.1f} dB (worst {result.psnr.min():.1f})"
    for row, name, speed, decibel in (
        (full, f"{full.name} ({dtype})", 1.0, ""),
        (quantized, quantized.name, result.speed_ratio, quality),
    ):
        memory = f"{row.transformer_bytes / 1e6:.1f} MB"
        table.add_row(name, f"{row.seconds_per_image:.3f}", f"{speed:.2f}x", memory, decibel)
    out.print(table)
    layers = result.report.quantized
    before, after = result.report.quantized_bytes
    out.print(
        f"{len(layers)} layers quantized ({layers[0].scheme}), their weights {before / 1e6:.1f} -> "
        f"{after / 1e6:.1f} MB\n"
        f"kernel: {layers[0].kernel} ({layers[0].reason})",
        soft_wrap=True,
    )


@app.command()
def info() -> None:
    """Print versions, GPUs, and which kernels can run here and why the others cannot."""
    import torch

    from qandc.pipelines import fashion_dit_path
    from qandc.results import versions
    from qandc_kernels import reference, select_backend
    from qandc_kernels.tiles import gpu_of, tuned_tiles

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    table.add_row("CUDA (torch build)", torch.version.cuda or "none")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        tiles = "tuned tiles" if tuned_tiles(gpu_of(device).name) else "tiles by formula (python -m qandc_kernels.tune)"
        name = torch.cuda.get_device_name(device)
        table.add_row(str(device), f"{name}, sm_{major}{minor}, {memory:.0f} GiB, {tiles}")
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
        from qandc.results import versions

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
