"""Write the tables of README.md, docs/ and the model cards from the measured files under results/.

python docs/update_tables.py            # rewrite
python docs/update_tables.py --check    # exit status 1 if a table is not what its file says
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record_tables
from record_tables import header

from qandc.caching.schedule import MODES
from qandc.experiments.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(p for d in ("docs", "qandc/assets") for p in (ROOT / d).rglob("*.md"))]
MODELS = re.compile(r"-\{(?P<names>.*)\}")  # in a path: several files, one for each model
BLOCK = re.compile(r"(<!-- table: (?P<path>\S+)(?P<part> \w+)? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def load(path: Path) -> Any:
    """Read a result; the cache mode delta had the name block when the first ones were measured."""
    return json.loads(re.sub(r'("(?:mode|part|candidate)": "(?:[a-z]+ )?)block\b', r"\1delta", path.read_text()))


def paths(path: str) -> list[str]:
    """List the files that a path with braces names."""
    found = MODELS.search(path)
    return [MODELS.sub(f"-{name}", path) for name in found["names"].split(",")] if found else [path]


def directory_of(result: dict[str, Any]) -> Path:
    """Return the directory of the card that a result was measured on."""
    return ROOT / "results" / ("h100" if "H100" in result["machine"]["gpu"] else "h200")


def source(results: dict[str, dict[str, Any]]) -> str:
    """Machine, versions, command and commit of the results at some paths, in a line."""
    found: dict[str, list[str]] = {}  # by what several have in common
    for path, result in results.items():
        machine, versions = result["machine"], result["versions"]
        where = machine["gpu"] or f"{machine['cores']} CPU cores ({machine['processor']})"
        installed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers") if versions[name])
        commit = (result["commit"] or "unknown")[:10]
        command = textwrap.shorten(result["command"], 200, placeholder=" ...")  # all of it is in the file
        found.setdefault(f"{where}, {installed}; `{command}` at {commit};", []).append(path)

    def files(measured: list[str]) -> str:
        turns = (row["rival_ratio_range"] for p in measured for row in results[p]["rows"] if "rival_ratio_range" in row)
        ranges = [high / low - 1 for low, high in turns if high > low]  # of a single turn nothing is known
        spread = f"ratios by turns, within {statistics.median(ranges):.1%} (median of rows); " if ranges else ""
        return spread + ", ".join(f"[{path}](/{path})" for path in measured)

    return "\n".join(f"{head} {files(measured)}." for head, measured in found.items())


def with_machine(lines: list[str], result: dict[str, Any]) -> list[str]:
    """Name the card in the first cell of a table's head, since one page may show tables of several."""
    if result["settings"].get("device") == "meta":  # no card has a part in it
        return lines
    gpu, cores = result["machine"]["gpu"], result["machine"]["cores"]
    card = re.sub("^NVIDIA | 80GB HBM3$", "", gpu) if gpu else f"{cores} CPU cores"
    first, rest = lines[0].removeprefix("|").split("|", 1)
    return [f"| {card}{': ' if first.strip() else ''}{first.strip()} |{rest}", *lines[1:]]


PRESETS = "results/h200/presets.json"


def generate_table(result: dict[str, Any]) -> list[str]:
    full, quantized = result["rows"]
    many = next(row for row in load(ROOT / PRESETS)["rows"] if row["w_bits"] == 8 and row["compensation"] == "none")
    before, after = (quantized[f"quantized_bytes_{when}"] / 1e6 for when in ("before", "after"))
    return [
        *header(f"| | speed | transformer | PSNR to FP | [of {many['images']:,} others](/{PRESETS}), on an H200 |"),
        f"| {full['name']} | 1x | {full['transformer_bytes'] / 1e6:.1f} MB | | |",
        f"| {quantized['name']} | {quantized['speed_ratio']:.2f}x | {quantized['transformer_bytes'] / 1e6:.1f} MB | "
        f"{quantized['psnr_mean']:.1f} dB (worst {quantized['psnr_min']:.1f}) | "
        f"{many['psnr_mean']:.1f} dB (worst {many['psnr_min']:.1f}) |",
        "",
        f"{quantized['layers_quantized']} layers quantized, their weights {before:.1f} -> {after:.1f} MB.",
    ]


def prompts_table(result: dict[str, Any]) -> list[str]:
    """Print what ``qandc generate`` found for a few prompts that a judge can score."""
    lines = header("| | seconds an image | transformer | PSNR to FP | all right, by a judge |")
    for row in result["rows"]:
        ratio, likeness = f" ({row['speed_ratio']:.2f}x)" if "speed_ratio" in row else "", ""
        if "psnr_mean" in row:
            likeness = f"{row['psnr_mean']:.1f} dB (worst {row['psnr_min']:.1f})"
        right = f"{row['right']['everything'] * row['images']:.0f} of {row['images']}"
        size = f"{row['transformer_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {row['name']} | {row['seconds_per_image']:.2f}{ratio} | {size} | {likeness} | {right} |")
    return lines


def presets_table(result: dict[str, Any]) -> list[str]:
    """Print the likeness of many images drawn with the shipped settings, and what a compensation adds."""
    lines = header("| settings | compensation | PSNR to FP | gained | Fréchet distance | class accuracy |")
    for row in result["rows"]:
        gained = f"{row['psnr_gained']:+.2f} ± {row['psnr_gained_ci95']:.2f} dB"
        likeness = f"{row['psnr_mean']:.1f} dB (worst {row['psnr_min']:.1f})"
        lines.append(
            f"| W{row['w_bits']}A8 | {row['compensation']} | {likeness} | "
            f"{'' if row['compensation'] == 'none' else gained} | {row['frechet_distance']:.2f} | "
            f"{row['class_accuracy']:.1%} |"
        )
    return lines


def fashion_table(result: dict[str, Any]) -> list[str]:
    lines = header("| images | Fréchet distance to the training images | IS | class accuracy |")
    for row in result["rows"]:
        name = row["name"]
        if "first_seed" in row:
            scheduler, steps = name.split()[:2]
            guidance, seed = row["guidance_scale"], row["first_seed"]
            name = f"{scheduler.upper()}, {steps} steps, guidance {guidance:g}, seeds from {seed}"
        lines.append(
            f"| {name} | {row['frechet_distance']:.3f} | {row['inception_score']:.2f} | {row['class_accuracy']:.1%} |"
        )
    return lines


def kernels_table(result: dict[str, Any]) -> list[str]:
    """Speed of our products relative to bf16, by layer and rows; of others where they were measured."""
    speed = {
        (row["layer"], row["m"], row["candidate"]): row["ratio_to_bf16"]
        for row in result["rows"]
        if row["op"] == "linear" and "ratio_to_bf16" in row
    }
    sizes = (512, 4096, 16384)
    lines = header("| layer (N x K) | M | W8A8 | W4A8 | quantize + W8A8 | best of others, M 4096 |")
    shapes = {row["layer"]: f"{row['n']} x {row['k']}" for row in result["rows"] if row["op"] == "linear"}
    for layer in ("qkv", "out", "fc1", "fc2"):
        others = ("gemlite A8W8", "gemlite A8W4", "torchao int8dq, compiled", "torch._int_mm + dequantize, compiled")
        found = {name: speed[layer, 4096, name] for name in others if (layer, 4096, name) in speed}
        best = max(found, key=lambda name: found[name])
        columns = [
            " / ".join(f"{speed[layer, m, name]:.2f}x" for m in sizes) for name in ("W8A8", "W4A8", "quantize + W8A8")
        ]
        lines.append(
            f"| {layer} ({shapes[layer]}) | {' / '.join(map(str, sizes))} | {' | '.join(columns)} | "
            f"{found[best]:.2f}x ({best}) |"
        )
    return lines


MODEL_SIZES = (
    ("DiT-XL/2-256", 2),
    ("DiT-XL/2-256", 16),
    ("DiT-XL/2-256", 64),
    ("DiT-XL/2-512", 2),
    ("DiT-XL/2-512", 16),
)


def model_rows(result: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """By model, rows of the batch and candidate; those of torchao from the files of its own runs beside it."""
    others = [load(path) for path in sorted(directory_of(result).glob("model-torchao*.json"))]
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in [*result["rows"], *(row for other in others for row in other["rows"])]:
        if row["op"] == "model" and "median_us" in row:
            found.setdefault((row["layer"], row["m"], row["candidate"]), row)
    return found


def model_table(result: dict[str, Any]) -> list[str]:
    """Milliseconds of a step and speed relative to compiled bf16, per batch; images per second; memory."""
    rows = model_rows(result)
    lines = header("| | 256², rows 2 | 16 | 64 | 512², rows 2 | 16 | images/s, 256², rows 64 | model |")
    for name in dict.fromkeys(name for _, _, name in rows):
        cells = []
        for layer, m in MODEL_SIZES:
            row = rows.get((layer, m, name))
            ratio = "" if row is None else f" ({row['ratio_to_compiled_bf16']:.2f}x)"
            cells.append("" if row is None else f"{row['median_us'] / 1e3:.2f} ms{ratio}")
        large = rows.get((*MODEL_SIZES[2], name))
        some = next(row for key, row in rows.items() if key[2] == name)
        cells += ["" if large is None else f"{large['images_per_s']:.1f}", f"{some['model_bytes'] / 1e6:.0f} MB"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def pipeline_table(result: dict[str, Any]) -> list[str]:
    """Milliseconds of a call and speed relative to compiled bf16, per number of images; images per second; energy."""
    measured = [row for row in result["rows"] if "median_us" in row and row["layer"] == "50 steps"]
    rows = {(row["m"], row["candidate"]): row for row in measured}
    counts = sorted({m for m, _ in rows})
    energy = any(row.get("joules_per_image") for row in rows.values())
    head = [f"{m} image{'s' * (m > 1)}" for m in counts] + [f"images/s, {counts[-1]} images"]
    head += [f"J per image, {counts[0]} / {counts[-1]}"] * energy
    lines = header("| | " + " | ".join(head) + " |")
    for name in dict.fromkeys(name for _, name in rows):
        found = [rows.get((m, name)) for m in counts]
        cells = [
            "" if row is None else f"{row['median_us'] / 1e3:.1f} ms ({row['ratio_to_compiled_bf16']:.2f}x)"
            for row in found
        ]
        cells.append("" if found[-1] is None else f"{found[-1]['images_per_s']:.1f}")
        if energy:
            ends = [row and row.get("joules_per_image") for row in (found[0], found[-1])]
            cells.append(" / ".join("?" if joules is None else f"{joules:.1f}" for joules in ends))
        if name == "decoder alone":  # its ratio to a whole pipeline says nothing
            cells = [re.sub(r" \(.*\)", "", cell) for cell in cells]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def breakdown_table(result: dict[str, Any]) -> list[str]:
    """Microseconds per block of each of its seven launches; what is outside of blocks in all."""
    found = [row for row in result["rows"] if "kernels_us" in row and row["layer"] == "DiT-XL/2-256"]
    parts = [name for name in found[0]["kernels_us"] if name != "rest"]
    lines = header("| | rows | " + " | ".join(parts) + " | outside of blocks |")
    for row in found:
        times = [f"{row['kernels_us'][name] / 28:.1f}" for name in parts]
        lines.append(f"| {row['candidate']} | {row['m']} | {' | '.join(times)} | {row['kernels_us']['rest']:.0f} |")
    return lines


CACHE_FORMS = ("delta", "branch", "taylor 1", "branch int8", "taylor 1 int8")
QUALITY_FORMS = (("delta", 0), ("branch", 0), ("taylor", 1), ("taylor", 2))


def cache_cost_table(result: dict[str, Any]) -> list[str]:
    """Per form: share of a compute step that a reuse step takes, what keeping adds, a run of 50 steps, memory."""
    rows = {(row["layer"], row["m"], row["candidate"]): row for row in result["rows"] if "median_us" in row}
    steps, sizes = "DiT-XL/2-256", (2, 16, 64)
    titles = "| mode | reuse step, rows 2 / 16 / 64 | with the conditioning ahead | a compensation adds | keeping | "
    lines = header(titles + "50 steps, rows 64 | rows 2 | features, rows 64 |")

    def share(name: str, m: int, ahead: str = "") -> float:
        return rows[steps, m, name + ahead]["median_us"] / rows[steps, m, "compute step" + ahead]["median_us"]

    for form in CACHE_FORMS:
        cells = [
            " / ".join(f"{share(f'reuse {form}', m, ahead):.1%}" for m in sizes) for ahead in ("", ", prepared run")
        ]
        more = [share(f"corrected {form}", m) / share(f"reuse {form}", m) - 1 for m in sizes]
        cells += [" / ".join(f"{part:+.1%}" for part in more)]
        cells.append(" / ".join(f"{share(f'keeping {form}', m) - 1:+.1%}" for m in sizes))
        for m in (64, 2):
            run = rows.get(("50 steps", m, form))
            cells.append("" if run is None else f"{run['ratio_to_no_cache']:.2f}x ({run['compute_steps']} computed)")
        cells.append(f"{rows[steps, 64, f'reuse {form}']['cache_bytes'] / 1e6:.0f} MB")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    plain = [f"{rows[steps, m, 'compute step']['median_us'] / 1e3:.2f}" for m in sizes]
    lines += ["", f"A compute step, W8A8, takes {' / '.join(plain)} ms."]
    return lines


def _quality(result: dict[str, Any]) -> dict[tuple[str, str, int, int, str], dict[str, Any]]:
    return {
        (row["precision"], row["mode"], row["order"], row["interval"], row["schedule"]): row for row in result["rows"]
    }


def form(mode: str, order: int) -> str:
    return f"{mode} {order}" if order else mode


def cache_quality_table(result: dict[str, Any]) -> list[str]:
    """Distance and PSNR by precision, form, schedule and interval; forms of which nothing was measured are left out."""
    rows, intervals = _quality(result), (2, 3, 4, 5, 8)
    lines = header("| | mode | schedule | " + " | ".join(f"N = {n}" for n in intervals) + " |")
    for precision in ("FP", "W8A8", "W4A8"):
        plain = rows.get((precision, "none", 0, 1, "all"))
        if plain is None:
            continue
        lines.append(
            f"| {precision} | no cache | | {plain['frechet_distance']:.2f}"
            + ("" if precision == "FP" else f" / {plain['psnr_to_fp']:.1f} dB")
            + " | " * len(intervals)
            + "|"
        )
        for mode, order in QUALITY_FORMS:
            for schedule in ("uniform", "calibrated"):
                found = [rows.get((precision, mode, order, n, schedule)) for n in intervals]
                if not any(found):
                    continue
                cells = ["" if r is None else f"{r['frechet_distance']:.2f} / {r['psnr_to_fp']:.1f}" for r in found]
                lines.append(f"| {precision} | {form(mode, order)} | {schedule} | {' | '.join(cells)} |")
    return lines


def cache_rows_table(result: dict[str, Any]) -> list[str]:
    """Every row."""
    lines = header("| | mode | N | schedule | computed | distance | IS | class accuracy | PSNR to FP | images/s |")
    for row in result["rows"]:
        lines.append(
            f"| {row['precision']} | {form(row['mode'], row['order'])} | {row['interval']} | {row['schedule']} | "
            f"{row.get('compute_steps', result['settings']['steps'])} | {row['frechet_distance']:.3f} | "
            f"{row['inception_score']:.2f} | {row['class_accuracy']:.1%} | "
            + ("" if row["psnr_to_fp"] >= 100 else f"{row['psnr_to_fp']:.1f} dB")
            + f" | {row['images_per_second']:.0f} |"
        )
    return lines


ABLATION = {
    "naive": {},
    "TAP": {"selection": "tap"},
    "VC": {"compensation": "least squares"},
    "TAP + VC": {"selection": "tap", "compensation": "least squares"},
    "calibrated without the cache": {"pool": "uncached"},
    "TAP, calibrated schedule": {"selection": "tap", "schedule": "calibrated"},
    "TAP + VC, calibrated schedule": {
        "selection": "tap",
        "schedule": "calibrated",
        "compensation": "least squares",
    },
}
NAIVE = {"pool": "cached", "selection": "random", "schedule": "uniform", "compensation": "none"}


def ablation_cells(result: dict[str, Any]) -> dict[tuple[int, str, int, str], list[dict[str, Any]]]:
    """The repeats of each configuration, by weight bits, mode, interval and name."""
    cells: dict[tuple[int, str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        settings = row["row"]
        for name, changes in ABLATION.items():
            if row["part"] == settings.get("mode") and {**NAIVE, **changes}.items() <= settings.items():
                key = (settings["w_bits"], settings["mode"], settings["interval"], name)
                cells.setdefault(key, []).append(row)
    return cells


def spread(rows: list[dict[str, Any]], metric: str, digits: int) -> str:
    """Mean and standard deviation over the repeats that have this metric."""
    values = [row[metric] for row in rows if metric in row]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def metrics(rows: list[dict[str, Any]]) -> str:
    """Cells of both distances, IS, class accuracy and PSNR, the last empty for the reference itself."""
    likeness = "" if rows[0]["psnr_to_fp"] >= 100 else f"{spread(rows, 'psnr_to_fp', 1)} dB"
    cells = [
        spread(rows, "frechet_distance", 3),
        spread(rows, "frechet_distance_efficientnet", 1),
        spread(rows, "inception_score", 2),
        spread([{"percent": 100 * row["class_accuracy"]} for row in rows], "percent", 1) + " %",
        likeness,
    ]
    return " | ".join(cells)


def quantized_only(result: dict[str, Any], bits: int) -> list[dict[str, Any]]:
    """Static ranges, weights as in the other rows of these bits, no cache."""
    wanted = {"w_bits": bits, "ranges": "static, min-max", "smoothing": False}
    wanted["rounding"] = "gptq" if bits == 4 else "nearest"
    return [row for row in result["rows"] if row["part"] == "ranges" and wanted.items() <= row["row"].items()]


def cached_only(result: dict[str, Any], mode: str, interval: int) -> list[dict[str, Any]]:
    """Of the measurement of caches: full precision, uniform schedule, the noise of repeat 0."""
    wanted = {"precision": "FP", "mode": mode, "interval": interval, "schedule": "uniform"}
    rows = load(directory_of(result) / "cache.json")["rows"]
    return [row for row in rows if wanted.items() <= row.items()]


def ablation_table(result: dict[str, Any]) -> list[str]:
    cells = ablation_cells(result)
    columns = [(bits, mode, n) for bits in (8, 4) for mode in ("delta", "branch") for n in (3, 5)]
    full = spread([row for row in result["rows"] if row["part"] == "FP"], "frechet_distance", 3)
    lines = header("| | " + " | ".join(f"W{bits}A8, {mode}, N = {n}" for bits, mode, n in columns) + " |")
    alone = {bits: quantized_only(result, bits) for bits in (8, 4)}
    found = {"quantized only": [alone[bits] for bits, _, _ in columns]}
    found["cached only"] = [cached_only(result, mode, n) for _, mode, n in columns]
    found |= {name: [cells.get((*column, name), []) for column in columns] for name in ABLATION}
    for name, of_columns in found.items():
        texts = [
            f"{spread(rows, 'frechet_distance', 3)} / {spread(rows, 'psnr_to_fp', 1)}" if rows else ""
            for rows in of_columns
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return [*lines, "", f"Full precision without a cache: {full}."]


def ablation_rows_table(result: dict[str, Any]) -> list[str]:
    lines = header(
        "| | mode | N | | repeats | distance | on EfficientNet features | IS | class accuracy | PSNR to FP |"
    )

    full = [row for row in result["rows"] if row["part"] == "FP"]
    lines.append(f"| FP | | | | {len(full)} | {metrics(full)} |")
    for (bits, mode, n, name), rows in ablation_cells(result).items():
        lines.append(f"| W{bits}A8 | {mode} | {n} | {name} | {len(rows)} | {metrics(rows)} |")
    return lines


OTHER_PARTS = ("ranges", "compensation", "selection")


def ablation_parts_table(result: dict[str, Any], what: str) -> list[str]:
    """One of the parts that change one thing, a line for each configuration."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        settings = row["row"]
        if not row["part"].startswith(what):
            continue
        if what == "ranges":
            name = settings["ranges"] + (", smoothing" if settings["smoothing"] else "")
            name += f"; weights: {settings['rounding']}"
        elif what == "compensation":
            name = settings["compensation"]
        else:
            name = f"{settings['selection']}, {settings['samples']} samples"
        cells.setdefault((settings["w_bits"], settings["mode"], settings["interval"], name), []).append(row)
    lines = header("| | | | repeats | distance | on EfficientNet features | IS | class accuracy | PSNR to FP |")
    for (bits, mode, interval, name), rows in cells.items():
        cache = "no cache" if mode == "none" else f"{mode}, N = {interval}"
        lines.append(f"| W{bits}A8 | {cache} | {name} | {len(rows)} | {metrics(rows)} |")
    return lines


def experiment_table(result: dict[str, Any]) -> list[str]:
    """As ``qandc ablate`` prints it."""
    return markdown_table(result["rows"]).splitlines()


def large_model_table(result: dict[str, Any]) -> list[str]:
    lines = header("| | time | peak memory of the process | of the GPU | |")
    for row in result["rows"]:
        what = ""
        if row["part"] == "calibrate":
            before, after = (row[f"quantized_bytes_{when}"] / 1e6 for when in ("before", "after"))
            what = f"quantized layers {before:.0f} -> {after:.0f} MB, checkpoint {row['checkpoint_bytes'] / 1e6:.0f} MB"
        memory = [row[f"peak_{of}_bytes"] / 1e9 if f"peak_{of}_bytes" in row else 0 for of in ("memory", "gpu")]
        cells = [f"{row['part']}, W{row['w_bits']}A8", f"{row['seconds']:.0f} s"]
        cells += [f"{gigabytes:.1f} GB" if gigabytes else "" for gigabytes in memory]
        lines.append(f"| {' | '.join(cells)} | {what} |")
    return lines


def sample_table(result: dict[str, Any]) -> list[str]:
    """Print images/s of one process, and of two from the file beside it."""
    more = directory_of(result) / "sample-2.json"
    result["rows"] += load(more)["rows"] if more.exists() else []
    alone = next(row["images_per_second"] for row in result["rows"] if row["processes"] == 1)
    lines = header("| | processes | images | images/s | of what one would make of it |")
    for row in result["rows"]:
        speed, n = row["images_per_second"], row["processes"]
        lines.append(f"| {row['name']} | {n} | {row['images']:,} | {speed:.0f} | {speed / (n * alone):.1%} |")
    return lines


def compensation_table(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["rows"] if row["part"].startswith("compensation")]
    lines = header("| compensation | PSNR to FP |")
    return lines + [f"| {row['row']['compensation']} | {row['psnr_to_fp']:.1f} dB |" for row in rows]


def _theirs_first(rows: list[dict[str, Any]]) -> list[str]:
    """Name candidates: bf16, other libraries, what one line gives, then ours by hand."""
    names = dict.fromkeys(row["candidate"] for row in rows)
    return sorted(names, key=lambda name: (name[:4] != "bf16", "torchao" not in name, name != "optimize(pipe)"))


def _speed(row: dict[str, Any], key: str) -> str:
    """Print a ratio of a row; its least and greatest, where turns with the rival differ by more than a tenth."""
    least, greatest = row.get("rival_ratio_range", (1, 1))
    if greatest > 1.1 * least and row[key] == row["rival_ratio"]:
        return f"{least:.2f}x to {greatest:.2f}x"
    return f"{row[key]:.2f}x"


def models_table(result: dict[str, Any]) -> list[str]:
    """Cells of what was not measured stay empty."""
    rows = [row for row in result["rows"] if "median_us" in row]
    layers, names = list(dict.fromkeys(row["layer"] for row in rows)), _theirs_first(rows)
    found = {(row["layer"], row["candidate"]): row for row in rows}
    lines = header(f"| ms a forward, as called | {' | '.join(layers)} |")

    def cell(layer: str, name: str) -> str:
        row = found.get((layer, name))
        if row is None:
            return ""
        faster = "ratio_to_compiled_bf16" if "compiled" in name or "fused" in name else "ratio_to_eager"
        return f"{row['median_us'] / 1e3:.1f} ({_speed(row, faster)})"

    lines += [f"| {name} | {' | '.join(cell(layer, name) for layer in layers)} |" for name in names]
    weights: dict[str, list[str]] = {}  # by scheme, however it is run
    for name in names:
        cells = [f"{found[layer, name]['model_bytes'] / 1e9:.1f}" if (layer, name) in found else "" for layer in layers]
        scheme = re.sub("( eager| compiled)?(, per token)?(, fused)?(, compiled)?(, graph\\(\\))?$", "", name)
        before = weights.setdefault(scheme, cells)
        weights[scheme] = [one or other for one, other in zip(before, cells, strict=True)]
    lines += [f"| GB of weights, {scheme} | {' | '.join(cells)} |" for scheme, cells in weights.items()]
    return lines


def images_table(result: dict[str, Any]) -> list[str]:
    """Tabulate seconds for an image by pipeline and candidate; a candidate that could not run says why."""
    rows = result["rows"]
    runs, names = list(dict.fromkeys((row["layer"], row["m"]) for row in rows)), _theirs_first(rows)
    found = {(row["layer"], row["m"], row["candidate"]): row for row in rows}
    titles = (f"{layer}, {steps} steps" for layer, steps in runs)
    lines = header(f"| seconds for an image, as called | {' | '.join(titles)} |")

    def cell(run: tuple[str, int], name: str) -> str:
        row = found.get((*run, name))
        if row is None or "median_us" not in row:
            return "" if row is None else "no such cache" if "no such" in row["skipped"] else "did not run"
        faster = f"{row['median_us'] / 1e6:.2f}"
        if "ratio_to_compiled_bf16" in row:
            faster += f" ({_speed(row, 'ratio_to_compiled_bf16')})"
        return f"{faster}, computes {row['compute_steps']}" if "FirstBlock" in name else faster

    return [*lines, *(f"| {name} | {' | '.join(cell(run, name) for run in runs)} |" for name in names)]


def ahead_table(result: dict[str, Any]) -> list[str]:
    """Compare images whose modulations are computed ahead with those of the same model without that."""
    lines = header("| s an image: own, ahead | steps | | GB of weights on the GPU |")
    for row in (row for row in result["rows"] if "ahead" in row["candidate"] and "rival" in row):
        if not row["candidate"].startswith(row["rival"]):  # beside bf16
            continue
        own, ahead = row["rival_median_us"] / 1e6, row["median_us"] / 1e6
        name = f"{row['layer']}, {row['candidate'].replace(', modulations ahead', '')}"
        figures = f"{own:.2f}, {ahead:.2f} (**{row['rival_ratio']:.3f}x**) | {row['gpu_bytes'] / 1e9:.1f}"
        lines.append(f"| {name} | {row['m']} | {figures} |")
    return lines


def runs_table(result: dict[str, Any]) -> list[str]:
    """Tabulate what a run costs beside the graphs that it replays, which a run as one graph would take as well."""
    titles = "as called | until the first graph | graphs alone | share of graphs"
    lines = header(f"| ms of a run, decoder excluded | steps | {titles} |")
    for row in (row for row in result["rows"] if row.get("replays")):
        if row["replays"] % row["m"]:  # a step that is no graph
            continue
        called, alone = row["latents_us"] / 1e3, row["replays_us"] / 1e3
        before = f"{row['before_us'] / 1e3:.1f}" if "before_us" in row else ""
        name = f"{row['layer']}, {row['candidate']}"
        lines.append(f"| {name} | {row['m']} | {called:.1f} | {before} | {alone:.1f} | {alone / called:.1%} |")
    return lines


PARTS = {  # of ops, by the first pattern that fits
    "attention": "attention",
    "products with GELU": "linear_gelu",
    "products with gate": "linear_gate",
    "other products": "linear_into|quantized_linear|int._linear|int._matmul",
    "norms, rotary embeddings, quantization": "adaln|qk_norm|quantize_per",
}


def parts_table(result: dict[str, Any]) -> list[str]:
    """Tabulate where the time of a fused forward goes: ops by their kind, and the whole as one graph."""
    names = [*PARTS, "rest"]
    lines = header(f"| ms of a fused forward | whole, a graph | {' | '.join(names)} | launches |")
    for row in result["rows"]:
        sums, count = dict.fromkeys(names, 0.0), 0
        for op in row["ops"]:
            kind = next((name for name, pattern in PARTS.items() if re.search(pattern, op["op"].split()[0])), "rest")
            sums[kind], count = sums[kind] + op["ms"], count + op["count"]
        model = f"{row['layer']} W{row['w_bits']}A8" + (", scales per token" if row["per_token"] else "")
        cells = " | ".join(f"{value:.1f}" for value in (row["graph_ms"], *sums.values()))
        lines.append(f"| {model} | {cells} | {count} |")
    return lines


def short_images_table(result: dict[str, Any]) -> list[str]:
    """Leave out what is eager, other caches of ours, and rivals that save less."""
    names = ("bf16 compiled", "torchao fp8 rowwise, compiled", "bf16 compiled, cache-dit", "optimize(pipe)")
    own = [r["candidate"] for r in result["rows"] if "graph()" in r["candidate"]]
    kept = (*names, *(name for name in own if name.endswith(("graph()", "taylor cache"))))
    return images_table({**result, "rows": [row for row in result["rows"] if row["candidate"] in kept]})


def bytes_table(result: dict[str, Any], of_class: str) -> list[str]:
    """Tabulate bytes of the transformers of a class, as they are and quantized, but for schemes that change nothing."""
    rows = [row for row in result["rows"] if row["class"] == of_class and not row["model"].endswith("-512")]
    schemes = ["bf16", "W8A8", "W8A8 + W8A16", "W4A8 + W4A16"]
    names = {name: tuple(row[name] for row in rows) for name in schemes}
    if names["W8A8"] == names["W8A8 + W8A16"]:
        del names["W8A8 + W8A16"]
    elif any(row["of it modulation"] for row in rows):
        names["of it modulation"] = ()
    heads = [name if len(names) >= len(schemes) else name.partition(" ")[0] for name in names]
    lines = header(f"| GB of the transformer | parameters | {' | '.join(heads)} |")
    for row in rows:
        cells = " | ".join(f"{row[name] / 1e9:.1f}" for name in names)
        lines.append(f"| {row['model']} | {row['parameters'] / 1e9:.1f} B | {cells} |")
    return lines


def by_turns_table(result: dict[str, Any]) -> list[str]:
    """Compare seconds for an image, ours and bf16 in the same rounds."""
    measured = (row for row in result["rows"] if "rival_median_us" in row and "bf16" in row["rival"])
    rows = {(row["layer"], row["candidate"]): row for row in measured}
    layers, names = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    lines = header(f"| s an image: bf16, ours | {' | '.join(layers)} |")
    for name in names:
        cells = []
        for layer in layers:
            row = rows.get((layer, name))
            if row is None:
                cells.append("")
                continue
            theirs, ours = row["rival_median_us"] / 1e6, row["median_us"] / 1e6
            cells.append(f"{theirs:.2f}, {ours:.2f} (**{_speed(row, 'rival_ratio')}**)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def feature_compensation_table(result: dict[str, Any], what: str = "pull") -> list[str]:
    """Print PSNR of latents to those without a cache: plain, and corrected, by pull or by schedule."""
    pulls: dict[Any, str] = {None: "plain cache", 0.0: "pull 0", 0.5: "pull 0.5", 1.0: "pull 1"}
    heads = [*pulls.values()] if what == "pull" else ["plain cache", "uniform", "calibrated", "calibrated, compensated"]
    rows: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in result["rows"]:
        schedule = row.get("schedule", "uniform")
        found = rows.setdefault((row["mode"], row["order"], row["interval"]), {})
        if schedule == "uniform":
            found[pulls[row["pull"]]] = row["psnr"]
        if row["pull"] == (0.5 if row["mode"] == "taylor" else 0.0):
            found[schedule] = row["psnr"]
    lines = header(f"| dB | {' | '.join(heads)} |")
    for mode, order, interval in sorted(rows, key=lambda key: (MODES.index(key[0]), *key[1:])):
        found = rows[mode, order, interval]
        if all(head in found for head in heads):
            values = [found[head] for head in heads]
            cells = [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]
            lines.append(f"| {mode}{f' {order}' if mode == 'taylor' else ''}, N = {interval} | {' | '.join(cells)} |")
    return lines


CORRECTIONS = {  # heading: what a row of the study has
    "plain cache": {"corrected": "none"},
    "VC of samples": {"corrected": "samples"},
    "features, least squares": {"corrected": "features", "form": "least_squares"},
    "features, variance ratio": {"corrected": "features", "form": "variance_ratio"},
}
SCHEDULED = {
    "calibrated, plain": {"corrected": "none", "schedule": "calibrated"},
    "calibrated, features": {"corrected": "features", "schedule": "calibrated"},
}


def study(result: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]


def _corrected_cell(rows: list[dict[str, Any]]) -> str:
    return f"{rows[0]['psnr_latents']:.1f} / {rows[0]['frechet_distance']:.2f}" if rows else ""


def corrections_table(result: dict[str, Any], scheduler: str) -> list[str]:
    """Print PSNR of latents / Fréchet distance of W8A8: a line for each cache, a column for each correction."""
    part = "main" if scheduler == "ddim" else scheduler
    columns = {**CORRECTIONS, **(SCHEDULED if scheduler == "ddim" else {})}
    lines = header(f"| {scheduler.upper()}, W8A8 | {' | '.join(columns)} |")
    common = {"part": part, "precision": "W8A8", "scheduler": scheduler}
    common |= {"pull": None, "target": "self", "along": "uncached", "fitted_on": "as drawn"}
    plain = _corrected_cell(study(result, **common, mode="none"))
    lines.append(f"| no cache | {plain}{' |' * len(columns)}")
    cached = study(result, **common, schedule="uniform")
    for mode, interval in sorted({(r["mode"], r["interval"]) for r in cached if r["mode"] != "none"}):
        uniform = {"schedule": "uniform", "mode": mode, "interval": interval}
        cells = [_corrected_cell(study(result, **{**common, **uniform, **column})) for column in columns.values()]
        lines.append(f"| {mode}, N = {interval} | {' | '.join(cells)} |")
    return lines


def equal_time_table(result: dict[str, Any]) -> list[str]:
    """Print runs of fewer steps without a cache beside caches that compute as many."""
    lines = header("| W8A8 | computed steps | images/s | PSNR of latents | of images | distance | class accuracy |")

    def line(name: str, row: dict[str, Any], computed: int) -> None:
        figures = f"{row['psnr_latents']:.1f} dB | {row['psnr_to_fp']:.1f} dB | {row['frechet_distance']:.2f}"
        speed, accuracy = row["images_per_second"], row["class_accuracy"]
        lines.append(f"| {name} | {computed} | {speed:.0f} | {figures} | {accuracy:.1%} |")

    for interval, steps in ((5, 10), (3, 17), (2, 25)):
        for row in study(result, part="fewer steps", steps=steps):
            line(f"{row['scheduler'].upper()}, {steps} steps, no cache", row, steps)
        for mode in ("branch", "taylor"):
            common = {"part": "main", "precision": "W8A8", "schedule": "uniform", "mode": mode, "interval": interval}
            for name, column in list(CORRECTIONS.items())[:3]:
                for row in study(result, **common, **column)[:1]:
                    line(f"DDIM, 50 steps, {mode}, N = {interval}, {name}", row, row["compute_steps"])
    return lines


def compensation_rest_table(result: dict[str, Any]) -> list[str]:
    """Print all other rows: how a compensation is fitted, on what, for which precision, and where it carries over."""
    lines = header("| what | cache | compensation | PSNR of latents | of images | distance |")
    shown = ("scheduler", "guidance_scale", "classes", "fit", "fitted_on", "target", "along", "form", "pull")
    usual = study(result, part="main", precision="W8A8", mode="none")[0]
    for row in result["rows"]:
        if row["part"] in ("main", "fewer steps") and row["precision"] == "W8A8" and row["corrected"] != "both":
            continue
        if row["part"] == "ddpm" and row["fitted_on"] == "as drawn":
            continue
        special = [f"{name.replace('_', ' ')} {row[name]}" for name in shown if row[name] != usual[name]]
        what = row["part"] + (f" {row['repeat']}" if row["part"] == "repeat" else "")
        cache = "none" if row["mode"] == "none" else f"{row['mode']}, N = {row['interval']}"
        figures = f"{row['psnr_latents']:.1f} dB | {row['psnr_to_fp']:.1f} dB | {row['frechet_distance']:.2f}"
        lines.append(
            f"| {what}, {row['precision']} | {cache} | {', '.join((row['corrected'], *special))} | {figures} |"
        )
    return lines


def outliers_table(result: dict[str, Any]) -> list[str]:
    """Print a line per configuration, a column per size: dB of predictions / of images ± half of 95 % / points lost."""
    rows = [row for row in result["rows"] if "refused" not in row]
    sizes = sorted({row["outliers"] for row in rows})
    found: dict[str, dict[float, str]] = {}
    for row in rows:
        alpha, ranges = row["smoothing"], row["ranges"].removeprefix("static, ")
        name = f"{row['precision']}{', fused' if 'fused' in row else ''} | {ranges} | {'' if alpha is None else alpha}"
        figures = [f"{row['prediction_snr']:.1f}"] if "prediction_snr" in row else []
        figures.append(f"{row['psnr_to_fp']:.1f} ± {row['psnr_to_fp_ci95']:.1f}")
        figures += [_points_lost([row])] if "everything_lost" in row else []
        found.setdefault(name, {})[row["outliers"]] = " / ".join(figures)
    lines = header(f"| | ranges | smoothing α | {' | '.join(f'x {size}' for size in sizes)} |")
    return [*lines, *(f"| {name} | {' | '.join(cells.get(n, '') for n in sizes)} |" for name, cells in found.items())]


def host_table(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["rows"] if "median_us" in row]
    return [*header("| a call | µs of the host |"), *(f"| {r['candidate']} | {r['median_us']:.0f} |" for r in rows)]


def drop_in_table(result: dict[str, Any]) -> list[str]:
    """Milliseconds of a step and speed relative to compiled bf16 run the same way."""
    rows = {(m, name): row for (layer, m, name), row in model_rows(result).items() if layer == "DiT-XL/2-256"}
    rows = {key: row for key, row in rows.items() if re.match("(bf16|QuantLinear).*compiled", key[1])}
    counts = sorted({m for m, _ in rows})
    lines = header(f"| ms a step | {' | '.join(f'rows {m}' for m in counts)} |")
    for name in dict.fromkeys(name for _, name in rows):
        rival = "bf16 compiled, called" if name.endswith("called") else "bf16 compiled"
        pairs = [(rows.get((m, name)), rows.get((m, rival), {}).get("median_us", math.nan)) for m in counts]
        cells = [
            ""
            if own is None
            else f"{own['median_us'] / 1e3:.2f} "
            f"({own['rival_ratio'] if own.get('rival') == rival else other / own['median_us']:.2f}x)"
            for own, other in pairs
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def products_table(result: dict[str, Any]) -> list[str]:
    """Speed of ours over fp8's, and ours in TOP/s, by layer and rows."""
    rows = {(row["layer"], row["m"], row["candidate"]): row for row in result["rows"] if "median_us" in row}
    counts = sorted({m for _, m, _ in rows})
    lines = header(f"| N x K | {' | '.join(f'M {m}' for m in counts)} |")
    for layer in dict.fromkeys(layer for layer, _, _ in rows):
        cells = []
        for m in counts:
            ours, theirs = rows[layer, m, "W8A8"], rows[layer, m, "fp8 _scaled_mm rowwise"]
            cells.append(f"{theirs['median_us'] / ours['median_us']:.2f}x ({ours['tops']:.0f} TOP/s)")
        lines.append(f"| {ours['n']} x {ours['k']} | {' | '.join(cells)} |")
    return lines


PAGES = {  # of docs/families, to the class of the transformer
    "flux": "FluxTransformer2DModel",
    "qwen_image": "QwenImageTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "z_image": "ZImageTransformer2DModel",
    "wan": "WanTransformer3DModel",
}


def wardrobe_table(result: dict[str, Any], parts: tuple[str, ...]) -> list[str]:
    """Print all rows of some parts, with what a judge finds right in them."""
    heads = "| | all right | points lost | objects | colours | places | Fréchet distance | PSNR to FP | images/s |"
    lines = header(heads)
    for row in result["rows"]:
        if row["part"] not in parts:
            continue
        if "refused" in row:
            lines.append(f"| {row['name']} | refused: {row['refused']} |{' |' * 7}")
            continue
        low, high = row["everything_ci95"]
        cells = [f"{row['everything']:.1%} of {row['images']:,} ({low:.1%} to {high:.1%})", _points_lost([row])]
        cells += [f"{row[what]:.1%}" for what in ("objects", "colours", "places")] + [f"{row['frechet_distance']:.3f}"]
        exact = row.get("psnr_to_fp", 100) >= 100  # full precision itself, or no picture of it
        cells.append("" if exact else f"{row['psnr_to_fp']:.1f} dB (worst {row['psnr_to_fp_worst']:.1f})")
        cells.append(f"{row['images_per_second']:.0f}" if "images_per_second" in row else "")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def _points_lost(rows: list[dict[str, Any]]) -> str:
    """Say how many points fewer are all right than in full precision; of repeats the mean, the least and the most."""
    found = [100 * row["everything_lost"] for row in rows]
    if len(rows) == 1:
        return f"{found[0]:.1f} ± {100 * rows[0]['everything_lost_ci95']:.1f}"
    return f"{statistics.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def wardrobe_grid(result: dict[str, Any], part: str, line: tuple[str, ...], column: str) -> list[str]:
    """Print points lost and PSNR of a part: a line for each value of some settings, a column for each of another."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        if row["part"] == part and column in row and not {"refused", "scenes", "fused"} & row.keys():
            values = [(key, row[key]) for key in line if key in row]
            name = ", ".join(v if isinstance(v, str) else f"{key} {v}" if v else f"no {key}" for key, v in values)
            found.setdefault(name, {}).setdefault(str(row[column]), []).append(row)
    columns = dict.fromkeys(value for cells in found.values() for value in cells)
    lines = header(f"| points lost / PSNR, dB | {' | '.join(f'{column} {c}' for c in columns)} |")
    for name, cells in found.items():
        texts = []
        for rows in (cells.get(value, []) for value in columns):
            likeness = rows and statistics.mean(row["psnr_to_fp"] for row in rows)
            texts.append(f"{_points_lost(rows)} / {likeness:.1f}" if rows else "")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {  # of a file on any card; cpu/ goes before
    "generate.json": generate_table,
    "generate-wardrobe.json": prompts_table,
    "cpu/ablation.json": compensation_table,
    "outliers.json": outliers_table,
    "outliers-wardrobe.json": outliers_table,
    "experiment.json": experiment_table,
    "presets.json": presets_table,
    "cpu/feature-compensation.json": feature_compensation_table,
    "cpu/feature-compensation.json schedule": partial(feature_compensation_table, what="schedule"),
    "feature-compensation.json": partial(corrections_table, scheduler="ddim"),
    "feature-compensation.json ddpm": partial(corrections_table, scheduler="ddpm"),
    "feature-compensation.json equal": equal_time_table,
    "feature-compensation.json rest": compensation_rest_table,
    "large-model.json": large_model_table,
    "sample.json": sample_table,
    "fashion-dit.json": fashion_table,
    "kernels.json": kernels_table,
    "model.json": model_table,
    "model.json breakdown": breakdown_table,
    "models.json": models_table,
    "images.json": images_table,
    "images.json short": short_images_table,
    "images.json runs": runs_table,
    "images.json ahead": ahead_table,
    "parts.json": parts_table,
    **{f"model-bytes.json {page}": partial(bytes_table, of_class=kind) for page, kind in PAGES.items()},
    "model.json drop": drop_in_table,
    "images.json turns": by_turns_table,
    "products.json": products_table,
    "host.json": host_table,
    "pipeline.json": pipeline_table,
    "cache-cost.json": cache_cost_table,
    "cache.json": cache_quality_table,
    "cache.json rows": cache_rows_table,
    "ablation.json": ablation_table,
    "ablation.json rows": ablation_rows_table,
    "wardrobe.json": partial(wardrobe_table, parts=("model", "precision", "fewer steps", "guidance and text")),
    "wardrobe.json model": partial(wardrobe_table, parts=("model",)),
    "wardrobe-shift.json": partial(wardrobe_table, parts=("shift",)),
    "wardrobe.json caches": partial(
        wardrobe_grid, part="cache", line=("precision", "mode", "schedule", "corrected"), column="interval"
    ),
    "wardrobe.json layers": partial(wardrobe_grid, part="layers", line=("layers",), column="precision"),
    "wardrobe.json samples": partial(
        wardrobe_grid, part="VC", line=("precision", "mode", "interval", "corrected"), column="form"
    ),
    "wardrobe.json selection": partial(wardrobe_grid, part="TAP", line=("precision", "samples"), column="selection"),
    **{f"ablation.json {what}": partial(ablation_parts_table, what=what) for what in OTHER_PARTS},
}


ACROSS: dict[str, Callable[[], list[str]]] = {  # of many files
    " losses": record_tables.losses_table,
    " missed": record_tables.missed_table,
    " reached": record_tables.reached_table,
}


def render(match: re.Match[str]) -> str:
    path, part = match["path"], match["part"] or ""
    card, _, file = path.removeprefix("results/").partition("/")
    if part == " benchmarks":
        lines = record_tables.benchmarks_table(card)
    elif not file:
        lines = ACROSS[part]()
    else:
        results = {each: load(ROOT / each) for each in paths(path)}
        first = next(iter(results.values()))
        result = {**first, "rows": [row for each in results.values() for row in each["rows"]]}
        file = MODELS.sub("", file)
        table = TABLES.get(f"{card}/{file}{part}") or TABLES[file + part]
        lines = [*with_machine(table(result), result), "", source(results)]
    return "\n".join([match[1].rstrip(), *lines, match["end"]])


def main() -> int:
    stale = []
    for document in DOCUMENTS:
        text = document.read_text()
        fresh = BLOCK.sub(render, text)
        if fresh != text:
            stale.append(document.relative_to(ROOT))
            if "--check" not in sys.argv:
                document.write_text(fresh)
    sys.stdout.write(
        "".join(f"{name}: tables {'differ' if '--check' in sys.argv else 'rewritten'}\n" for name in stale)
    )
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
