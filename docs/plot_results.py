"""Draw the plots beside the measured files under results/ (needs matplotlib).

python docs/plot_results.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from update_tables import (
    ABLATION,
    DOCUMENTS,
    MODEL_SIZES,
    QUALITY_FORMS,
    ROOT,
    ablation_cells,
    form,
    load,
    model_rows,
    study,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter

SHOWN = {
    "bf16 compiled": "#9aa0a6",
    "torchao int8dq, compiled": "#d7a86e",
    "torchao fp8 rowwise, compiled": "#c98b8b",
    "simulated W8A8, compiled": "#c9c9c9",
    "QuantLinear W8A8, compiled": "#8fb3d9",
    "fused W8A8": "#2f6db5",
    "fused W4A8": "#1b3f6e",
    "fused W8A8, prepared run": "#3c9a5f",
}
COLOURS = {("delta", 0): "#9aa0a6", ("branch", 0): "#2f6db5", ("taylor", 1): "#3c9a5f", ("taylor", 2): "#d7a86e"}


WARDROBE_MODES = {
    "delta": "#9aa0a6", "branch": "#2f6db5", "taylor": "#3c9a5f", "hicache": "#d7a86e", "crf": "#8a6bb0"
}  # fmt: skip


def bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def draw_model(path: Path) -> Figure:
    rows = model_rows(load(path))
    measured = {name for _, _, name in rows}
    shown = {name: colour for name, colour in SHOWN.items() if name in measured}
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(shown)
    for i, (name, colour) in enumerate(shown.items()):
        found = [rows.get((layer, m, name)) for layer, m in MODEL_SIZES]
        heights = [0 if row is None else row["ratio_to_compiled_bf16"] for row in found]
        at = [x + (i - len(shown) / 2) * width for x in range(len(found))]
        bars = axes.bar(at, heights, width * 0.92, label=name, color=colour)
        axes.bar_label(bars, [f"{h:.2f}" if h else "" for h in heights], fontsize=5.5, rotation=90, padding=2)
    axes.axhline(1, color="#555", linewidth=0.8)
    axes.set_xticks(
        range(len(MODEL_SIZES)), [f"{layer.rpartition('-')[2]}², batch rows {m}" for layer, m in MODEL_SIZES]
    )
    axes.set_ylabel("speed of a step over compiled bf16")
    axes.set_title(f"DiT-XL/2 on one {path.parent.name.upper()}, a denoising step in a CUDA graph", fontsize=10)
    axes.legend(fontsize=6.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    bare(axes)
    return figure


def draw_cache(path: Path) -> Figure:
    """Draw distance and PSNR against speed, a line per mode through its intervals."""
    rows = load(path)["rows"]
    intervals = {p: {row["interval"] for row in rows if row["precision"] == p} for p in ("FP", "W8A8", "W4A8")}
    precisions = [p for p, found in intervals.items() if len(found) > 2]
    figure, grid = plt.subplots(
        2, len(precisions), figsize=(4.2 * len(precisions), 5.4), layout="constrained", sharey="row"
    )
    for column, precision in enumerate(precisions):
        mine = [row for row in rows if row["precision"] == precision]
        plain = next(row for row in mine if row["mode"] == "none")
        for line, (key, label) in enumerate(
            (("frechet_distance", "Fréchet distance"), ("psnr_to_fp", "PSNR to FP without cache, dB"))
        ):
            axes = grid[line][column]
            for (mode, order), colour in COLOURS.items():
                for schedule, style in (("uniform", ":"), ("calibrated", "-")):
                    chosen = [r for r in mine if (r["mode"], r["order"], r["schedule"]) == (mode, order, schedule)]
                    speed = [r["images_per_second"] / plain["images_per_second"] for r in chosen]
                    name = f"{form(mode, order)}, {schedule}"
                    axes.plot(speed, [r[key] for r in chosen], style, marker=".", color=colour, label=name)
            if key == "frechet_distance":
                axes.axhline(plain[key], color="#555", linewidth=0.8)
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.set_title(f"{precision}: line at {plain[key]:.2f}, no cache", fontsize=9)
            else:
                axes.set_xlabel("speed over the same model without a cache", fontsize=8)
            if column == 0:
                axes.set_ylabel(label, fontsize=8)
            axes.tick_params(labelsize=7)
            bare(axes)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=len(QUALITY_FORMS), loc="outside lower center", frameon=False)
    return figure


def draw_ablation(path: Path) -> Figure:
    """Draw mean and standard deviation of distance, IS and PSNR for each configuration, W8A8."""
    result = load(path)
    cells = ablation_cells(result)
    full = [row for row in result["rows"] if row["part"] == "FP"]
    metrics = {"frechet_distance": "Fréchet distance", "inception_score": "IS", "psnr_to_fp": "PSNR to FP, dB"}
    columns = [("delta", 3), ("delta", 5), ("branch", 3), ("branch", 5)]
    colours = ("#9aa0a6", "#d7a86e", "#8fb3d9", "#2f6db5", "#c9c9c9", "#a8d5b5", "#3c9a5f")
    figure, grid = plt.subplots(1, len(metrics), figsize=(11, 3.4), layout="constrained")
    for axes, (metric, label) in zip(grid, metrics.items(), strict=True):
        for i, name in enumerate(ABLATION):
            values = [[row[metric] for row in cells[8, mode, n, name]] for mode, n in columns]
            at = [x + (i - (len(ABLATION) - 1) / 2) * 0.12 for x in range(len(columns))]
            means, errors = [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values]
            axes.errorbar(at, means, errors, fmt="o", markersize=4, capsize=2, color=colours[i], label=name)
        if metric != "psnr_to_fp":
            axes.axhline(statistics.mean(row[metric] for row in full), color="#555", linewidth=0.8)
        axes.set_xticks(range(len(columns)), [f"{mode}, N = {n}" for mode, n in columns], fontsize=8)
        axes.set_title(label, fontsize=9)
        axes.tick_params(axis="y", labelsize=7)
        bare(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    return figure


def draw_compensation(path: Path) -> Figure:
    """Draw PSNR of latents and distance against speed: each cache plain and corrected, and runs of fewer steps."""
    result = load(path)
    plain = study(result, part="main", precision="W8A8", mode="none")[0]
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (key, label) in zip(
        grid, {"psnr_latents": "PSNR of latents, dB", "frechet_distance": "Fréchet distance"}.items(), strict=True
    ):

        def draw(
            rows: list[dict[str, Any]], style: str, colour: str, name: str, axes: Any = axes, key: str = key
        ) -> None:
            rows = sorted(rows, key=lambda row: row["images_per_second"])
            speed = [row["images_per_second"] / plain["images_per_second"] for row in rows]
            axes.plot(speed, [row[key] for row in rows], style, marker=".", color=colour, label=name)

        for mode, colour in (("delta", "#9aa0a6"), ("branch", "#2f6db5"), ("taylor", "#3c9a5f")):
            for what, style in (("none", ":"), ("samples", "--"), ("features", "-")):
                common = {"part": "main", "precision": "W8A8", "schedule": "uniform", "form": "least_squares"}
                name = f"{mode}, {'plain' if what == 'none' else what}"
                draw(study(result, **common, mode=mode, corrected=what), style, colour, name)
        for scheduler, style in (("ddim", ":"), ("dpm++ 2m", "-")):
            name = f"fewer steps, {scheduler.upper()}"
            draw(study(result, part="fewer steps", scheduler=scheduler), style, "#c98b8b", name)
        axes.axhline(plain[key], color="#555", linewidth=0.8)
        axes.set_ylabel(label, fontsize=8)
        axes.set_xlabel("speed over W8A8 without a cache", fontsize=8)
        axes.tick_params(labelsize=7)
        bare(axes)
    grid[1].set_yscale("log", base=2)
    grid[1].yaxis.set_major_formatter(ScalarFormatter())
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    return figure


def draw_wardrobe(path: Path) -> Figure:
    """Draw the share of pictures with all right against computed steps: each cache, and runs of fewer steps."""
    rows = [row for row in load(path)["rows"] if "everything" in row and not {"scenes", "fused"} & row.keys()]
    (full,) = [row for row in rows if (row["part"], row["name"]) == ("precision", "FP")]
    figure, grid = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)

    def draw(axes: Any, wanted: dict[str, Any], style: str, colour: str, label: str) -> None:
        found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
        found.sort(key=lambda row: row["computed_steps"])
        steps = [row["computed_steps"] for row in found]
        shares = [row["everything"] for row in found]
        low, high = ([abs(row["everything"] - row["everything_ci95"][end]) for row in found] for end in (0, 1))
        axes.errorbar(steps, shares, [low, high], fmt=style, marker=".", color=colour, label=label, linewidth=1)

    for precision, axes in zip(("FP", "W8A8"), grid, strict=True):
        of = {"precision": precision}
        draw(axes, {**of, "part": "fewer steps"}, "-", "#c0392b", "fewer steps, no cache")
        for mode, colour in WARDROBE_MODES.items():
            for schedule, style in (("uniform", ":"), ("calibrated", "-")):
                cache = {"part": "cache", "mode": mode, "schedule": schedule, "corrected": None}
                draw(axes, {**of, **cache}, style, colour, f"{mode}, {schedule}")
        axes.axhline(full["everything"], color="#555", linewidth=0.8)
        axes.set_title(precision, fontsize=9)
        axes.set_xlabel("steps computed", fontsize=8)
        axes.tick_params(labelsize=7)
        bare(axes)
    grid[0].set_ylabel("share of pictures with all right", fontsize=8)
    grid[0].yaxis.set_major_formatter(PercentFormatter(1, 0))
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center", frameon=False)
    return figure


def draw_residuals(path: Path) -> Figure:
    """Draw errors of reused features by step and block, plain and corrected."""
    rows = load(path)["rows"]
    figure, grid = plt.subplots(len(rows), 2, figsize=(9, 4.4), layout="constrained", sharey=True)
    for row, line in zip(rows, grid, strict=True):
        steps = [str(of_step["step"]) for of_step in row["errors"]]
        plain = [of_step["plain"] for of_step in row["errors"]]
        for what, axes in zip(("plain", "corrected"), line, strict=True):
            values = [list(of_block) for of_block in zip(*(s[what] for s in row["errors"]), strict=True)]
            shown = axes.imshow(values, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=max(map(max, plain)))
            mean = statistics.mean(map(statistics.mean, values))
            axes.set_title(f"{row['mode']}, {what}: mean error {mean:.1%}", fontsize=9)
            axes.set_xticks(range(len(steps)), steps)
            axes.tick_params(labelsize=6)
        figure.colorbar(shown, ax=line, format=PercentFormatter(1, 0)).ax.tick_params(labelsize=6)
        line[0].set_ylabel("block", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("reuse step", fontsize=8)
    return figure


PLOTS = {  # what is drawn beside a file of any card, where a page shows it
    "*/feature-residuals.json": draw_residuals,
    "[!c]*/feature-compensation.json": draw_compensation,
    "[!c]*/ablation.json": draw_ablation,
    "*/model.json": draw_model,
    "*/cache.json": draw_cache,
    "*/wardrobe.json": draw_wardrobe,
}

if __name__ == "__main__":
    shown = "".join(document.read_text() for document in DOCUMENTS)
    for pattern, draw in PLOTS.items():
        for found in sorted((ROOT / "results").glob(pattern)):
            picture = found.with_suffix(".png")
            if picture.relative_to(ROOT).as_posix() in shown:
                draw(found).savefig(picture, dpi=130)
