"""Writes the tables of README.md and of the model card from the measured files under results/.

python docs/update_tables.py            # rewrite
python docs/update_tables.py --check    # exit status 1 if a table is not what its file says
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "qandc/assets/fashion-dit/README.md")
BLOCK = re.compile(r"(<!-- table: (?P<path>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def source(result: dict[str, Any], path: str) -> str:
    """Machine, versions, command and commit of a result, in a line."""
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] or f"{machine['cores']} CPU cores ({machine['processor']})"
    installed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers"))
    commit = (result["commit"] or "unknown")[:10]
    return f"{where}, {installed}; `{result['command']}` at {commit}; [{path}](/{path})."


def generate_table(result: dict[str, Any]) -> list[str]:
    full, quantized = result["rows"]
    lines = ["| | speed | transformer | PSNR to FP |", "|---|---|---|---|"]
    lines.append(f"| {full['name']} | 1x | {full['transformer_bytes'] / 1e6:.1f} MB | |")
    lines.append(
        f"| {quantized['name']} | {quantized['speed_ratio']:.2f}x | {quantized['transformer_bytes'] / 1e6:.1f} MB | "
        f"{quantized['psnr_mean']:.1f} dB (worst {quantized['psnr_min']:.1f}) |"
    )
    before, after = (quantized[f"quantized_bytes_{when}"] / 1e6 for when in ("before", "after"))
    lines += ["", f"{quantized['layers_quantized']} layers quantized, their weights {before:.1f} -> {after:.1f} MB."]
    return lines


def fashion_table(result: dict[str, Any]) -> list[str]:
    lines = ["| images | Fréchet distance to the training images | IS | class accuracy |", "|---|---|---|---|"]
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


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "results/cpu/generate.json": generate_table,
    "results/h200/fashion-dit.json": fashion_table,
}


def render(match: re.Match[str]) -> str:
    path = match["path"]
    result = json.loads((ROOT / path).read_text())
    return "\n".join([match[1].rstrip(), *TABLES[path](result), "", source(result, path), match[3]])


def main() -> int:
    stale = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        fresh = BLOCK.sub(render, text)
        if fresh != text:
            stale.append(name)
            if "--check" not in sys.argv:
                (ROOT / name).write_text(fresh)
    sys.stdout.write(
        "".join(f"{name}: tables {'differ' if '--check' in sys.argv else 'rewritten'}\n" for name in stale)
    )
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
