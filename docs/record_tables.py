"""Tables over all files of results/: ours beside rivals for each card, where ours loses, and every goal."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import report  # noqa: E402
from benchmarks.goals import SUITES, reached  # noqa: E402

REASONS = (  # goals that are missed, by the first pattern that fits: why, and what to try next
    (
        "gelu_requantize",
        "too few tiles a multiprocessor: the epilogue of the last wave is exposed",
        "warps of their own for epilogues, when Triton has them",
    ),
    (
        "gate_residual_.*_out",
        "the residual is read and written in L2: 38 MB more on a product bound by memory",
        "none known",
    ),
    (
        "w4a8_over_bf16_out_4096",
        "144 tiles a wave, and both halves of K need their own tile of x",
        "none known: tiles of 64 and 128, 1 to 3 programs were tried",
    ),
    ("w4a8_share", "four of sixteen bits are 0.25, scales and sums come on top", "none: it cannot be"),
    (
        "fused_w8a8_over_.*_2$",
        "196 launches of 7 µs that depend on each other; what is not prepared reads 537 MB more",
        "a prepared run: 2.0x; two launches of a block as one",
    ),
    (
        "w8a8_over_fp8_.*_512",
        "tiles of 64 x 64 read both operands from shared memory",
        "weights in registers, as W4A8 has them",
    ),
    (
        "w8a8_over_fp8",
        "few steps along K between first loads and store, which fp8's kernel hides by warps for loading",
        "scales per token (1 to 6 % faster); such warps, when Triton has them",
    ),
    (
        "host_QuantLinear_W8A8_static_compiled",
        "quantization is a launch of its own, and the product goes through torch's dispatcher and Python, 35 µs",
        "`qandc.graph`, or `fuse`: a replay calls neither",
    ),
    (
        "PixArt-Sigma_QuantLinear_W8A8(_compiled)?_over",
        "280 layers: Python, on a processor on which a call of nn.Linear takes 28 µs, is slower than the GPU, "
        "and rounds differ by up to 60 %",
        "`qandc.graph`, or `fuse`, 1.35x",
    ),
    (
        "w8a8_over_.*_16384",
        "the GPU draws all of its power, and clocks fall: 133 to 152 µs for fc2",
        "tiles 64 deep in four pieces, which take 126 and 167 µs where qkv's and fc1's take 133 and 179 at such clocks",
    ),
    (
        "compiled_quantlinear_.*_64",
        "quantization is a pass of its own, and products of 16,384 rows run at fallen clocks",
        "`fuse`: 1.72x",
    ),
    (
        "attention_over_cudnn_.*4096_tokens",
        "cuDNN's kernel overlaps the softmax of a tile with products, Triton waits for each",
        "none: blocks of PixArt take cuDNN from 1,536 keys on",
    ),
    (
        "compiled_quantlinear|the_same_as_called",
        "quantization is a pass of its own; called, Python takes longer than the GPU",
        "`qandc.graph`, or `fuse`",
    ),
    (
        "recovered_share_of_gap_branch",
        "gains below 1 take contrast, and branch has little noise that they could take with it",
        "compensation of features",
    ),
    ("recovered_share_of_gap_block", "VC recovers little of what stale gates cost", "the calibrated schedule: 0.55"),
    (
        "psnr_.*gained_taylor",
        "a forecast errs less, and fits of it overshoot",
        "a pull of 0.5, the default of taylor now",
    ),
    (
        "psnr_to_fp_gained|recovered_share_of_distance|frechet_distance_of",
        "a fifth of the error goes, that which all images have in common, and contrast with it",
        "the variance ratio, for distances",
    ),
    ("compensated_reuse", "1.7 of 48.5 µs: a small kernel before one that takes little longer", "none known"),
    (
        "over_taylor_1",
        "two sets of features, 4.2 GB, are read at the speed of memory: 2.51 at best",
        "scales of int8 features in the epilogue of the product that keeps them",
    ),
    (
        "dB of images lost, fashion-dit",
        "ten images, of which single ones turn into another garment; predictions lose next to nothing",
        "a thousand pictures tell: [of wardrobe](wardrobe.md#outliers) 0.1 to 0.5 dB",
    ),
    (
        "all right gained by that over 10 steps",
        "a model with guidance built in loses 2.4 points in 10 steps: the cache gains all but 0.4 of them",
        "none: it cannot be; with 7 steps `hicache` gains 3 over as many",
    ),
    (
        "graphs_alone_over_run_as_called_.*-512",
        "what diffusers does before the first step takes 9 and 19 ms; between steps 3 and 4 ms of 118 and 302 are left",
        "none: no graph takes that away",
    ),
    (
        "over_no_cache_PixArt",
        "7 or 8 of 20 steps are computed; decoder and scheduler take 0.08 of 0.69 s",
        "fewer computed steps, by a calibrated schedule",
    ),
)


def header(titles: str) -> list[str]:
    """Begin a table with a line of titles."""
    return [titles, "|---" * (titles.count("|") - 1) + "|"]


class Result(NamedTuple):
    """A file of results and what is in it."""

    path: Path
    content: dict[str, Any]

    @property
    def card(self) -> str:
        return self.path.parent.name

    @property
    def commit(self) -> str:
        return (self.content["commit"] or "unknown")[:10]

    @property
    def link(self) -> str:
        return f"[{self.path.name}](/{self.path.relative_to(ROOT).as_posix()}) at {self.commit}"


def results() -> list[Result]:
    """Read all files, the oldest first."""
    paths = (path for path in (ROOT / "results").glob("*/*.json") if path.name != "record.json")
    return sorted((Result(path, json.loads(path.read_text())) for path in paths), key=lambda r: r.content["date"])


class Group(NamedTuple):
    """Ours beside one rival: by shape the speed over it, and where that was measured."""

    card: str
    name: str
    rival: str
    speeds: dict[tuple[str, int | None], tuple[float, Result]]


def _against(row: dict[str, Any]) -> tuple[str, float] | None:
    """Return whom a row is compared with and the speed over it: the one it took turns with, else its baseline."""
    if "rival_median_us" in row:
        if not any(mark in row["rival"] for mark in report.THEIRS):  # ours beside ours
            return None
        return row["rival"], row.get("rival_ratio", row["rival_median_us"] / row["median_us"])
    if row["op"] == "host" or "called" in row["candidate"]:  # by turns alone
        return None
    baselines = report.BASELINES[row["op"]]
    if row["op"] == "models" and not re.search("compiled|fused", row["candidate"]):
        baselines = baselines[1:]  # eager beside eager
    return next(((rival, row[key]) for rival, key in baselines if key in row), None)


def groups() -> list[Group]:
    """Compare ours with rivals on every card; of what was measured several times the latest counts."""
    found: dict[tuple[str, str, str], Group] = {}
    for result in results():
        for row in result.content["rows"]:
            name = row.get("candidate", "")
            ours = not any(mark in name for mark in report.THEIRS)
            if not ours or row.get("op") in (None, "cache", "copy") or "skipped" in row:
                continue
            against = _against(row)
            if against is not None and against[0] != name:
                key = result.card, f"{row['op']}: {name}", against[0]
                group = found.setdefault(key, Group(*key, {}))
                group.speeds[row["layer"], row["m"]] = against[1], result
    return list(found.values())


def benchmarks_table(card: str) -> list[str]:
    """Print ours beside a rival on a card, with least and greatest speed over it."""
    lines = header("| what | rival | speed over it | shapes | command | file |")
    for group in (group for group in groups() if group.card == card):
        values, measured = zip(*group.speeds.values(), strict=True)
        speed = f"{min(values):.2f}x" + (f" to {max(values):.2f}x" if len(values) > 1 else "")
        command = textwrap.shorten(measured[-1].content["command"].replace("|", "/"), 70, placeholder=" ...")
        files = ", ".join(dict.fromkeys(result.link for result in measured))
        lines.append(f"| {group.name} | {group.rival} | {speed} | {len(values)} | `{command}` | {files} |")
    return lines


def losses_table() -> list[str]:
    """Print where ours is slower than the rival: how much at worst, and in how many shapes."""
    lines = header("| card | what | rival | speed over it at worst | slower in | file |")
    for group in groups():
        slower = {shape: found for shape, found in group.speeds.items() if found[0] < 1}
        if slower:
            (layer, m), (speed, result) = min(slower.items(), key=lambda item: item[1][0])
            where = f"{layer}, {m}" if m else layer
            lines.append(
                f"| {group.card.upper()} | {group.name} | {group.rival} | {speed:.2f}x ({where}) | "
                f"{len(slower)} of {len(group.speeds)} | {result.link} |"
            )
    return lines


def goals() -> Iterator[tuple[Result, dict[str, Any]]]:
    """Give each goal that was measured, of every card, as it was measured last."""
    found = {
        (r.card, goal["name"]): (r, goal) for r in results() for goal in r.content["goals"] if goal["value"] is not None
    }
    yield from found.values()


def reason(name: str) -> tuple[str, str]:
    """Return why a goal is missed, and what to try next."""
    return next(((why, idea) for pattern, why, idea in REASONS if re.search(pattern, name)), ("", ""))


def missed_table() -> list[str]:
    """Print goals that are missed, why and what to try next, and those that nothing has measured."""
    lines = header("| card | figure | measured | must | why | next | file |")
    for result, goal in goals():
        if not reached(goal, "must"):
            why, idea = reason(goal["name"])
            figures = f"{goal['value']:.4g} | {goal['must']:.4g} | {why} | {idea}"
            lines.append(f"| {result.card.upper()} | {goal['name']} | {figures} | {result.link} |")
    known = {goal["name"] for _, goal in goals()}
    missing = [goal["name"] for _, make in SUITES.values() for goal in make([]) if goal["name"] not in known]
    return [*lines, "", f"Not measured: {', '.join(f'`{name}`' for name in missing) or 'none'}."]


def reached_table() -> list[str]:
    """Print goals that are reached."""
    lines = header("| card | figure | measured | must | goal | | file |")
    for result, goal in goals():
        if reached(goal, "must"):
            wished = "" if goal["goal"] is None else f"{goal['goal']:.4g}"
            verdict = "goal" if reached(goal, "goal") else "must"
            figures = f"{goal['value']:.4g} | {goal['must']:.4g} | {wished} | {verdict}"
            lines.append(f"| {result.card.upper()} | {goal['name']} | {figures} | {result.link} |")
    return lines
