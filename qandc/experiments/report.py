"""Write measured rows to one JSON file, and an experiment as JSON, a Markdown table and a figure."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from qandc.experiments.scores import load_images
from qandc.support.files import make_directory, write_json, write_whole
from qandc.support.results import measured_rows, result_header

__all__ = ["METRICS", "markdown_table", "measure_rows", "write_report"]

logger = logging.getLogger(__name__)
Row = dict[str, Any]

METRICS = {  # name: heading, digits, factor
    "frechet_distance": ("Fréchet distance", 3, 1.0),
    "inception_score": ("IS", 2, 1.0),
    "class_accuracy": ("class accuracy, %", 1, 100.0),
    "psnr_to_fp": ("PSNR to FP, dB", 1, 1.0),
    "psnr_worst": ("worst PSNR, dB", 1, 1.0),
}
LIKENESS = ("psnr_to_fp", "psnr_worst")
SHOWN = 10


def measure_rows(
    path: Path,
    settings: dict[str, Any],
    rows: Iterable[Row],
    measure: Callable[[Row], Row],
    *,
    goals: Callable[[list[Row]], list[Row]] = lambda rows: [],
    seconds: float = math.inf,
) -> list[Row]:
    """Measure one row after the other, and write a result file after each; a file that is there is continued.

    Args:
        path: JSON file to write (:mod:`qandc.support.results`).
        settings: of all rows, noted in the file.
        rows: what each row is known by. Those that the file holds are not measured again.
        measure: gives the figures of a row, which are added to it.
        goals: makes the goals of all rows so far.
        seconds: begin no row after so long.

    Returns:
        All rows of the file.

    Raises:
        ConfigError: the file was measured with other settings, at another commit or on another card.
        OutputError: it is no result, or cannot be written.
    """
    measured, started = measured_rows(path, result_header(settings)), time.perf_counter()
    make_directory(path.parent)
    for row in rows:
        if _found(measured, row) is not None:
            continue
        if time.perf_counter() - started > seconds:
            logger.warning("out of time after %.0f s; the same command goes on", time.perf_counter() - started)
            break
        measured.append({**row, **measure(row)})
        write_json(path, {**result_header(settings), "rows": measured, "goals": goals(measured)})
        said = " ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in measured[-1].items()
        )
        logger.info("%.0f s: %s", time.perf_counter() - started, said)
    return measured


def _found(measured: list[Row], row: Row) -> Row | None:
    """Return what was measured of a row, if it was."""
    return next((done for done in measured if {name: done.get(name) for name in row} == row), None)


def _text(row: dict[str, Any], metric: str) -> str:
    found = row["metrics"].get(metric)
    if found is None or (metric in LIKENESS and found["value"] >= 100):
        return ""
    _, digits, factor = METRICS[metric]
    return f"{factor * found['value']:.{digits}f} ± {factor * found['ci95']:.{digits}f}"


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Make a table, a line for each row; metrics with half of their 95 % interval."""
    present = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    heads = ["steps", "row", *(METRICS[name][0] for name in present), "s / image", "speed", "transformer", "cache"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        computed = (
            f"{row['computed_steps']} of {row['steps']}" if row["computed_steps"] < row["steps"] else row["steps"]
        )
        cells = [str(computed), row["row"], *(_text(row, name) for name in present)]
        cells += [f"{row['seconds_per_image']:.3f}", f"{row['speed_ratio']:.2f}x"]
        cells += [f"{row['transformer_bytes'] / 1e6:.1f} MB", f"{row['cache_bytes'] / 1e6:.1f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(
    directory: Path, rows: list[dict[str, Any]], settings: dict[str, Any], images: dict[str, Path]
) -> list[Path]:
    """Write ``experiment_summary`` as ``.json``, ``.md`` and ``.png``.

    Args:
        directory: to write to.
        rows: of :func:`qandc.experiments.ablation.run_experiment`, of one or more numbers of steps.
        settings: noted in the JSON file beside versions, machine and command.
        images: row name to the ``.npz`` whose first images the figure shows.

    Returns:
        The files.

    Raises:
        OutputError: one cannot be written.
    """
    summary = {**result_header(settings), "rows": rows, "goals": []}
    paths = [directory / f"experiment_summary{end}" for end in (".json", ".md", ".png")]
    write_json(paths[0], summary)
    write_whole(paths[1], lambda path: path.write_text(markdown_table(rows)))
    write_whole(paths[2], lambda path: _draw(path, rows, images))
    return paths


def _draw(path: Path, rows: list[dict[str, Any]], images: dict[str, Path]) -> None:
    """Draw bars of each metric above, the first images of each row below."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib.figure import Figure

    names = list(images)
    metrics = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    columns = len(metrics) + 1
    figure = Figure(figsize=(2.6 * columns, 2.8 + 0.75 * len(names)), layout="constrained")
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=(2.8, 0.75 * len(names)))
    labels = [row["row"] if len(rows) <= len(names) else f"{row['row']}, {row['steps']}" for row in rows]
    plots = top.subplots(1, columns, sharey=True)
    plots[0].set_yticks(range(len(rows)), labels)
    plots[0].invert_yaxis()
    for axes, metric in zip(plots, [*metrics, "speed_ratio"], strict=True):
        if metric == "speed_ratio":
            values, errors, heading = [row["speed_ratio"] for row in rows], None, "speed over FP"
        else:
            heading, _, factor = METRICS[metric]
            found = [row["metrics"].get(metric, {"value": np.nan, "ci95": np.nan}) for row in rows]
            exact = metric in LIKENESS  # full precision is the reference itself
            values = [np.nan if exact and f["value"] >= 100 else factor * f["value"] for f in found]
            errors = [factor * f["ci95"] for f in found]
        axes.barh(range(len(rows)), values, xerr=errors, color="#8fb3d9", height=0.6, error_kw={"linewidth": 0.8})
        axes.set_title(heading, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    grid = bottom.subplots(len(names), 1, squeeze=False)
    for (axes,), name in zip(grid, names, strict=True):
        pictures = load_images(images[name])[:SHOWN]
        strip = np.concatenate(list(pictures), axis=1)
        axes.imshow(strip[..., 0] if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=130, format="png")
