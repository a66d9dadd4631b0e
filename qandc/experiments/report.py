"""What an experiment is told as: one JSON file, one Markdown table, one figure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from qandc.experiments.scores import load_images
from qandc.support.files import write_json, write_whole
from qandc.support.results import result_header

__all__ = ["METRICS", "markdown_table", "write_report"]

METRICS = {  # name: heading, digits, factor
    "frechet_distance": ("Fréchet distance", 3, 1.0),
    "inception_score": ("IS", 2, 1.0),
    "class_accuracy": ("class accuracy, %", 1, 100.0),
    "psnr_to_fp": ("PSNR to FP, dB", 1, 1.0),
}
SHOWN = 10


def _text(row: dict[str, Any], metric: str) -> str:
    found = row["metrics"].get(metric)
    if found is None or (metric == "psnr_to_fp" and found["value"] >= 100):
        return ""
    _, digits, factor = METRICS[metric]
    return f"{factor * found['value']:.{digits}f} ± {factor * found['ci95']:.{digits}f}"


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row; metrics with half of their 95 % interval."""
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
        rows: of :func:`qandc.experiment.run_experiment`, of one or more numbers of steps.
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
    """Bars of each metric above, the first images of each row below."""
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
            exact = metric == "psnr_to_fp"  # full precision is the reference itself
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
