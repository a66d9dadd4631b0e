"""The rows of a run: shares and ratios, which need several of them, and the tables printed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.goals import (
    BF16,
    COMPILED,
    COMPUTE,
    CUDNN,
    EAGER,
    FP8,
    FP32,
    PIPELINE_COMPILED,
    PIPELINE_EAGER,
    PLAIN,
    RUN,
    SQUARE_LAYER,
    SUITES,
    median,
    over,
    reached,
)

__all__ = ["breakdowns", "ceilings", "complete", "goal_lines", "losses", "table"]

Row = dict[str, Any]

# what a row is compared with, and the name of that ratio: > 1 is faster
BASELINES = {
    "linear": ((BF16, "ratio_to_bf16"), (FP32, "ratio_to_fp32")),
    "epilogue": ((PLAIN, "ratio_to_bf16_store"),),
    "adaln": ((EAGER, "ratio_to_eager"),),
    "copy": (),
    "attention": ((CUDNN, "ratio_to_cudnn"),),
    "model": ((COMPILED, "ratio_to_compiled_bf16"),),
    "images": (("bf16 compiled", "ratio_to_compiled_bf16"), ("bf16 eager", "ratio_to_eager")),
    "models": (("bf16 compiled", "ratio_to_compiled_bf16"), ("bf16 eager", "ratio_to_eager")),
    "host": (("F.linear", "ratio_to_f_linear"),),
    "products": ((FP8, "ratio_to_fp8"), (BF16, "ratio_to_bf16")),
    "cache": ((COMPUTE, "ratio_to_compute_step"), (RUN, "ratio_to_no_cache")),
    "pipeline": ((PIPELINE_COMPILED, "ratio_to_compiled_bf16"), (PIPELINE_EAGER, "ratio_to_eager")),
}
RATIOS = tuple(key for baselines in BASELINES.values() for _, key in baselines)
# a rival that quantizes its activations, and ours that does the same work
COUNTERPARTS = {
    "gemlite A8W8": "dynamic quantize + W8A8",
    "gemlite A8W4": "dynamic quantize + W4A8",
    "torchao int8dq, compiled": "dynamic quantize + W8A8",
}
# parts of names
THEIRS = ("F.linear", "bf16 ", "diffusers", "decoder", "simulated", "torch", "fp8 ", "gemlite", ", then ")


def ceilings(rows: list[Row]) -> dict[str, float]:
    """The best rates measured: TOP/s of the large square products in bf16 and int8, GB/s of a copy."""
    found: dict[str, float] = {}
    for row in rows:
        rate = (
            row.get("tops") if row["layer"] == SQUARE_LAYER else row.get("gbytes_per_s") if row["op"] == "copy" else 0
        )
        if rate:
            found[row["ceiling"]] = max(found.get(row["ceiling"], 0), rate)
    return found


def complete(rows: list[Row]) -> None:
    """Add each row's ratio to the baseline and share of the measured ceiling; None where that wasn't measured."""
    best = ceilings(rows)
    for row in rows:
        if "skipped" in row:
            continue
        for baseline, key in BASELINES[row["op"]]:
            faster = over(rows, row["op"], row["layer"], row["m"], baseline, row["candidate"])
            if faster is not None:
                row[key] = faster
        if "ceiling" not in row:
            continue
        rate, ceiling = row["tops"] if "tops" in row else row["gbytes_per_s"], best.get(row["ceiling"])
        row["share_of_ceiling"] = None if ceiling is None else rate / ceiling


def row_ratio(row: Row) -> float | None:
    return next((row[key] for key in RATIOS if key in row), None)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "skipped" in row:
        reason = row["skipped"].partition(":")[0]
        return reason if reason in ("not installed", "failed") else "skipped"
    if row["op"] == "copy":
        return f"{row['median_us']:.1f} µs {row['gbytes_per_s']:.0f} GB/s"
    ratio = row_ratio(row)
    mark = " *" if row["method"] == "events" else ""
    return f"{row['median_us']:.1f} µs" + ("" if ratio is None else f" {ratio:5.2f}x") + mark


def table(rows: list[Row]) -> Iterator[str]:
    """One block per layer: candidates down, M across, cells of median and speed relative to the baseline.

    What was never to run here is only counted, below the table; what failed or is not installed has its cells.
    """
    shown = [row for row in rows if "median_us" in row or _cell(row) != "skipped"]
    for op in BASELINES:
        for layer in dict.fromkeys(row["layer"] for row in shown if row["op"] == op):
            block = [row for row in shown if (row["op"], row["layer"]) == (op, layer)]
            columns = sorted({row["m"] for row in block}, key=lambda m: m or 0)
            shape = ", ".join(f"{key.upper()} {block[0][key]}" for key in ("n", "k") if block[0][key])
            heading = f"{op} {layer}" + (f" ({shape})" if shape else "")
            rows_are = {"model": "rows", "attention": "batch", "cache": "rows", "pipeline": "images"}.get(op, "M")
            yield f"{heading:38}" + "".join("" if m is None else f"{f'{rows_are} {m}':>20}" for m in columns)
            cells = {(row["candidate"], row["m"]): _cell(row) for row in block}
            for name in dict.fromkeys(row["candidate"] for row in block):
                yield f"  {name:36}" + "".join(f"{cells.get((name, m), ''):>20}" for m in columns)
            yield ""
    if any(row.get("method") == "events" for row in rows):
        yield "* launched one by one: a CUDA graph could not hold it"
    for reason in dict.fromkeys(row["skipped"] for row in rows if "skipped" in row):
        yield f"{sum(row.get('skipped') == reason for row in rows)} rows: {reason}"


def losses(rows: list[Row]) -> Iterator[str]:
    """Where ours is slower than its baseline, or a rival faster than ours at the same work."""
    for row in rows:
        what, ratio = f"{row['op']} {row['layer']}, M {row['m']}: {row['candidate']}", row_ratio(row)
        ours = not any(mark in row["candidate"] for mark in THEIRS)
        if ours and ratio is not None and ratio < 1 and row["op"] != "cache":
            yield f"{what} takes {1 / ratio:.2f} times the baseline's time"
        if row["candidate"] in COUNTERPARTS and "median_us" in row:
            counterpart = COUNTERPARTS[row["candidate"]]
            time = median(rows, row["op"], row["layer"], row["m"], counterpart)
            if time is not None and time > row["median_us"]:
                yield f"{what} is {time / row['median_us']:.2f} times as fast as {counterpart}"


def breakdowns(rows: list[Row]) -> Iterator[str]:
    """Where the time of our steps goes, in µs."""
    for row in rows:
        if "kernels_us" in row:
            parts = ", ".join(f"{name} {time:.0f}" for name, time in row["kernels_us"].items())
            yield f"{row['layer']}, rows {row['m']}, {row['candidate']}: {parts}"


def goal_lines(rows: list[Row]) -> Iterator[str]:
    """A line per goal that was measured, and a count of the others."""
    missing = 0
    ops = {row["op"] for row in rows}
    for goal in (goal for held, goals in SUITES.values() if ops & held for goal in goals(rows)):
        if goal["value"] is None:
            missing += 1
            continue
        verdict = "goal reached" if reached(goal, "goal") else "must reached" if reached(goal, "must") else "MISSED"
        bounds = f"must {goal['must']:g}" + ("" if goal["goal"] is None else f", goal {goal['goal']:.3g}")
        yield f"{goal['name']:48}{goal['value']:10.3f}   {bounds:22}{goal['better']:8}{verdict}"
    if missing:
        yield f"{missing} goals not measured"
