"""Count the bytes of transformers that people run, in full precision and as ``quantize_model`` leaves them.

python -m training.model_bytes    # a minute, without weights: on the meta device
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer

from benchmarks.families import FAMILIES
from qandc import quantization_plan
from qandc.experiments.report import measure_rows
from qandc.models import family_of

SD3, WAN = FAMILIES["SD3.5-large"], "Wan-2.1-1.3B"
MEDIUM = {**SD3.sizes, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
WAN_5B = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {  # to class and sizes, where these are not its defaults
    **{name: (family.name, family.sizes) for name, family in FAMILIES.items() if name != WAN},
    "SD3-medium": (SD3.name, {**MEDIUM, "qk_norm": None}),
    "SD3.5-medium": (SD3.name, {**MEDIUM, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}),
    "Chroma1-HD": ("ChromaTransformer2DModel", {}),
    "Wan 2.1, 1.3B": ("WanTransformer3DModel", FAMILIES[WAN].sizes),
    "Wan 2.2, 5B": ("WanTransformer3DModel", WAN_5B),
    "Wan 2.1, 14B; each of the two of 2.2": ("WanTransformer3DModel", {}),
}
SCHEMES: dict[str, tuple[int, str | None]] = {  # to bits of the weights, and of modulation
    "W8A8": (8, None),
    "W8A8 + W8A16": (8, "W8A16"),
    "W4A8 + W4A16": (4, "W4A16"),
}


def count(row: dict[str, Any]) -> dict[str, Any]:
    """Plan each scheme for a transformer without memory."""
    kind, sizes = CHECKPOINTS[row["model"]]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = getattr(diffusers, kind)(**sizes)
    finally:
        torch.set_default_dtype(default)
    plans = {name: quantization_plan(model, bits, conditioning=other) for name, (bits, other) in SCHEMES.items()}
    found = {name: plan.total_bytes[1] for name, plan in plans.items()}
    family = family_of(model)
    ends = tuple(f".{name}" for stack in family.stacks for name in stack.modulations) if family is not None else ()
    # what a step does not read where modulations are computed once in a run
    of_modulation = sum(row.bytes_after for row in plans["W4A8 + W4A16"].layers if row.name.endswith(ends))
    return {
        "class": kind,
        "parameters": model.num_parameters(),
        "bf16": plans["W8A8"].total_bytes[0],
        **found,
        "of it modulation": of_modulation,
    }


def main(out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("results/cpu/model-bytes.json")) -> None:
    """Write the bytes of every checkpoint."""
    measure_rows(out, {"device": "meta"}, [{"model": name} for name in CHECKPOINTS], count)


if __name__ == "__main__":
    typer.run(main)
