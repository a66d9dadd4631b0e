"""Draws results/h200/model.png from the measured file beside it (needs matplotlib).

python docs/plot_results.py
"""

from __future__ import annotations

import json

import matplotlib
from update_tables import MODEL_SIZES, ROOT, model_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def main() -> None:
    path = ROOT / "results" / "h200" / "model.json"
    rows = model_rows(json.loads(path.read_text()))
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
    axes.set_title("DiT-XL/2 on one H200, a denoising step in a CUDA graph", fontsize=10)
    axes.legend(fontsize=6.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
