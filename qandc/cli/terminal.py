"""Write to the terminal: two consoles, progress bars, tables; check files before they are written."""

from __future__ import annotations

import importlib.util
import logging
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qandc.caching.schedule import format_schedule
from qandc.errors import ConfigError, OutputError, QandCError
from qandc.support.results import size_text

if TYPE_CHECKING:  # they load what no other command needs
    from qandc.caching.schedule import CalibratedSchedule
    from qandc.evaluation.compare import Evaluation
    from qandc.experiments.generate import Comparison
    from qandc.method.pipeline_calibration import CalibrationReport
    from qandc.optimize import OptimizationPlan
    from qandc.quantization.conversion import QuantizationReport

__all__ = [
    "COMPARED",
    "check_output",
    "comparison_rows",
    "err",
    "open_pipeline",
    "out",
    "print_calibration",
    "print_comparison",
    "print_evaluation",
    "print_settings",
    "progress_bars",
    "quiet_diffusers",
    "said_of_error",
    "said_of_layers",
    "stage_bars",
]

logger = logging.getLogger(__name__)
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)
COMPARED = ("", "s / image", "speed", "transformer", "PSNR to FP")


def progress_bars() -> Progress:
    """Make progress bars on stderr."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


@contextmanager
def stage_bars(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress ``(stage, completed, total)``: a bar for each stage at work, a line for each that is done."""
    if not shown:
        yield lambda stage, completed, total: None
        return
    tasks: dict[str, TaskID] = {}
    with progress_bars() as bars:

        def show(stage: str, completed: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            done = bars.tasks[tasks[stage]].finished
            bars.update(tasks[stage], completed=completed)
            if completed == total and not done:  # there may be more stages than a screen has lines
                bars.update(tasks[stage], visible=False)
                bars.console.print(f"{stage}: done")

        yield show


def open_pipeline(model: str | None, device: str, dtype: str, text: bool = False) -> tuple[Any, Any, Any]:
    """Load a pipeline, and say so; downloads show progress of their own. Returns it, its device and its dtype."""
    from qandc.sampling.pipelines import embedded_name, load_pipeline, resolve_device, resolve_dtype

    quiet_diffusers(text)
    where = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, where)
    status: AbstractContextManager[Any] = nullcontext()
    if embedded_name(model) is not None or Path(str(model)).is_dir():
        status = err.status("loading the pipeline")
    else:
        err.print(f"loading {model}", soft_wrap=True)
    with status:
        return load_pipeline(model, where, torch_dtype), where, torch_dtype


def said_of_error(error: Exception) -> str:
    """Say what an error is, and what to do; the traceback of one that is not ours is logged."""
    if isinstance(error, QandCError):
        message = str(error)
    elif isinstance(error, OSError):  # a name that no file can have, a file that may not be read
        logger.debug("the operating system refused", exc_info=error)
        named = "a file" if error.filename is None else repr(error.filename)
        message = f"{named} cannot be used ({error.strerror or error}); give another path, or mend it"
    else:
        logger.debug("unexpected error", exc_info=error)
        message = f"{type(error).__name__}: {error} (qandc --verbose shows where)"
    return message


def check_output(path: Path, suffix: str) -> None:
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


def quiet_diffusers(text: bool = False) -> None:
    """Keep loading bars and hints of diffusers, and of transformers, out of our output; downloads show theirs."""
    from diffusers.utils import logging as diffusers_logging

    libraries: list[Any] = [diffusers_logging]
    if text and importlib.util.find_spec("transformers") is not None:
        libraries.append(importlib.import_module("transformers.utils.logging"))
    for library in libraries:
        library.disable_progress_bar()
    if not logging.getLogger("qandc").isEnabledFor(logging.DEBUG):
        for library in libraries:
            library.set_verbosity_error()


def print_comparison(
    result: Comparison, dtype: str, many: Mapping[str, Any] | None = None, plan: OptimizationPlan | None = None
) -> None:
    """Print the table of ``qandc generate``, and what was done to the pipeline.

    Args:
        result: both rows.
        dtype: of the full-precision one.
        many: the likeness of more images, measured before.
        plan: what optimize did.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in COMPARED:
        table.add_column(header, justify="left" if not header else "right")
    for cells in comparison_rows(result, dtype):
        table.add_row(*cells)
    out.print(table)
    for row in result.rows:
        if row.right is not None:
            right = ", ".join(f"{what} {share:.0%}" for what, share in row.right.items())
            out.print(f"right in {row.name}, says the judge: {right}", soft_wrap=True)
    if many is not None:
        of_many = f"{many['psnr_mean']:.1f} dB (worst {many['psnr_min']:.1f})"
        out.print(f"PSNR of {many['images']} other images, measured before: {of_many}", soft_wrap=True)
    if plan is not None:
        out.print(plan, soft_wrap=True)
        return
    out.print("\n".join(said_of_layers(result)), soft_wrap=True)


def comparison_rows(result: Comparison, dtype: str) -> list[tuple[str, ...]]:
    """Return the rows of a comparison as text, in the columns ``COMPARED``."""
    full, quantized = result.rows
    quality = f"{result.psnr.mean():.1f} dB (worst {result.psnr.min():.1f})"
    return [
        (name, f"{row.seconds_per_image:.3f}", f"{speed:.2f}x", size_text(row.transformer_bytes), decibel)
        for row, name, speed, decibel in (
            (full, f"{full.name} ({dtype})", 1.0, ""),
            (quantized, quantized.name, result.speed_ratio, quality),
        )
    ]


def said_of_layers(result: Comparison) -> tuple[str, str]:
    """Say in two lines what became of the layers, and which kernel runs them."""
    assert result.report is not None
    usual, (before, after) = result.report.usual, result.report.quantized_bytes
    weights = f"their weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB"
    return (
        f"{len(result.report.quantized)} layers quantized ({usual.scheme}), {weights}",
        f"kernel: {usual.kernel} ({usual.reason})",
    )


def print_calibration(report: CalibrationReport, directory: Path) -> None:
    """Print the table of ``qandc calibrate``."""
    compensated, rows = report.preset.compensations.removeprefix(" + "), {}
    for name, decibels in (
        ("PSNR to FP", report.psnr_uncompensated),
        (f"PSNR to FP, with {compensated}", report.psnr_compensated),
    ):
        if decibels is not None:
            rows[name] = f"{decibels.mean():.1f} dB (worst {decibels.min():.1f})"
    worse = None
    if report.psnr_compensated is not None and report.psnr_compensated.mean() < report.psnr_uncompensated.mean():
        worse = f"{compensated} made these images less like those of full precision; --compensation none leaves it out"
    command = "qandc generate --calibrated"
    print_settings(report.quantization, report.preset.schedule, directory, command, rows, worse)


def print_settings(
    quantization: QuantizationReport,
    schedule: CalibratedSchedule | None,
    directory: Path,
    command: str,
    rows: Mapping[str, str] | None = None,
    note: str | None = None,
) -> None:
    """Print what was found for a model, and the command that uses its directory."""
    before, after = quantization.quantized_bytes
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("layers", f"{len(quantization.quantized)} ({quantization.usual.scheme})")
    table.add_row("their weights", f"{size_text(before)} -> {size_text(after)}")
    if schedule is not None:
        table.add_row("computed steps", f"{sum(schedule.schedule)} of {len(schedule.schedule)} ({schedule.mode})")
    for row in (rows or {}).items():
        table.add_row(*row)
    out.print(table)
    if note is not None:
        out.print(note, soft_wrap=True)
    if schedule is not None:
        out.print(format_schedule(schedule.schedule, schedule.timesteps), soft_wrap=True)
    out.print(f"wrote {directory}\nnext: {command} {shlex.quote(str(directory))}", soft_wrap=True)


def print_evaluation(result: Evaluation) -> None:
    """Print the table of ``qandc evaluate``."""
    table = Table(box=None, show_header=False, pad_edge=False)
    score = "inception score" if result.split is None else f"inception score, parts of {result.split}"
    rows = (
        ("Fréchet distance", result.frechet_distance),
        (f"Fréchet distance, spatial ({result.spatial})", result.spatial_frechet_distance),
        (score, result.inception_score),
        ("precision", result.precision),
        ("recall", result.recall),
        ("kernel distance", result.kernel_distance),
    )
    for name, value in rows:
        spread = (
            f" ± {result.kernel_distance_std:.2g}" if name == "kernel distance" and result.kernel_distance_std else ""
        )
        table.add_row(name, "-" if value is None else f"{value:.5g}{spread}")
    out.print(table)
    counted = f"{result.reference_count} of" if result.reference_count else "an unknown number of"
    out.print(
        f"features: {result.extractor} ({result.description})\n"
        f"{result.count} of {result.images} against {counted} {result.reference}",
        soft_wrap=True,
    )
    for note in result.notes:
        out.print(f"note: {note}", soft_wrap=True)
