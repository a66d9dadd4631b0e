"""Measure what outliers in activations cost, and what smoothing wins back, on fashion-dit with planted outliers.

python training/measure_outliers.py                                                            # on a GPU
python training/measure_outliers.py --images 5 --steps 10 --device cpu --out results/cpu/outliers.json

Four channels of what each block's modulated norms and its v give are multiplied, and the weights that read them are
divided, so that the full-precision model computes the same as before. PSNR is to its images. Single images may turn
into another garment, so predictions of a run that nothing was calibrated on are compared too: signal over error of each
forward, on average. Every step is computed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline
from torch import nn

from qandc import (
    calibrate,
    decode_latents,
    fashion_dit_path,
    input_hessians,
    make_scheduler,
    quantize_model,
    sample_latents,
    smoothing_factors,
)
from qandc.evaluation.metrics import psnr, snr
from qandc.experiments.report import measure_rows
from quality import Out, command

CHANNELS = 4  # that hold outliers
FIRST_SEED = 20_000_000  # of the samples to calibrate with; far from those of the images


@torch.no_grad()
def plant_outliers(transformer: Any, times: float) -> Any:
    """Multiply channels of each block's modulated norms, and of v of a DiT, in place; what it computes stays the same.

    Each block has other channels. The modulation layer gives ``(1 + scale) · times`` and ``shift · times``; q, k, v and
    the MLP's first layer are divided, and so is the attention's last one behind v. Of FLUX.1 both streams have them.
    """
    blocks = (*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ()))
    for number, block in enumerate(blocks):
        for modulation, parts, *readers in _modulations(block):
            width = modulation.out_features // parts
            chosen = (torch.arange(CHANNELS) * (width // CHANNELS) + number) % width
            for part, layers in enumerate(readers):  # shift, scale and gate of each
                shift, scale = (3 * part * width + chosen, (3 * part + 1) * width + chosen)
                _times(modulation, torch.cat([shift, scale]), times)
                modulation.bias[scale] += times - 1
                for layer in layers:
                    layer.weight[:, chosen] /= times
        if hasattr(block, "attn1"):
            _times(block.attn1.to_v, chosen, times)
            block.attn1.to_out[0].weight[:, chosen] /= times
    return transformer


def _modulations(block: Any) -> list[tuple[Any, ...]]:
    """List modulation layers of a block, the parts of what each gives, and the layers that read each norm."""
    attention = getattr(block, "attn1", None) or block.attn
    readers = [attention.to_q, attention.to_k, attention.to_v]
    if hasattr(block, "proj_mlp"):
        return [(block.norm.linear, 3, [*readers, block.proj_mlp])]
    found = [(block.norm1.linear, 6, readers, [block.ff.net[0].proj])]
    if hasattr(block, "ff_context"):
        of_text = [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
        found.append((block.norm1_context.linear, 6, of_text, [block.ff_context.net[0].proj]))
    return found


def _times(layer: nn.Linear, channels: torch.Tensor, times: float) -> None:
    layer.weight[channels] *= times
    layer.bias[channels] *= times


CONFIGURATIONS = [  # those of one model behind each other
    {"w_bits": w_bits, "ranges": ranges, "alpha": alpha}
    for w_bits in (8, 4)
    for ranges, alpha in (
        ("static", None), ("dynamic", None), ("dynamic", 0.5), ("static", 0.25), ("static", 0.5), ("static", 0.75)
    )
]  # fmt: skip


def main(
    out: Out = Path("results/h100/outliers.json"),
    outliers: Annotated[str, typer.Option(help="Factors, separated by commas; 1 plants none.")] = "1,10,30,100",
    images: Annotated[int, typer.Option(help="Of each row, one per class in turn.")] = 10,
    steps: int = 50,
    guidance_scale: float = 1.5,
    device: str = "cuda",
) -> None:
    """Sample with every configuration; int8 weights are rounded to nearest, int4 weights with GPTQ."""
    pipe = DiTPipeline.from_pretrained(fashion_dit_path()).to(device)
    scheduler = make_scheduler("ddpm", pipe.scheduler.config)

    def latents(model: nn.Module, first_seed: int = 0) -> torch.Tensor:
        labels, seeds = [i % 10 for i in range(images)], list(range(first_seed, first_seed + images))
        run: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        return sample_latents(model, scheduler, labels, seeds=seeds, **run)

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    full = decode_latents(pipe.vae, latents(pipe.transformer))
    handle.remove()

    @torch.no_grad()
    def predictions(model: nn.Module) -> torch.Tensor:
        return torch.stack([model(*args, **kwargs)[0] for args, kwargs in calls])

    expected = predictions(pipe.transformer)

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        model = plant_outliers(copy.deepcopy(pipe.transformer), row["times"])

        def run() -> torch.Tensor:
            return latents(model, FIRST_SEED)

        smoothing = None if row["alpha"] is None else smoothing_factors(model, run, alpha=row["alpha"])
        hessians = input_hessians(model, run) if row["w_bits"] == 4 else None
        clip = "max" if hessians is None else "mse"
        quantize_model(model, row["w_bits"], weight_clip=clip, smoothing=smoothing, hessians=hessians)
        if row["ranges"] == "static":
            calibrate(model, run)
        likeness = psnr(decode_latents(pipe.vae, latents(model)), full)
        signal = snr(predictions(model), expected).mean()
        return {"psnr_to_fp": likeness.tolist(), "prediction_snr": float(signal)}

    rows = [{"times": float(times), **row} for times in outliers.split(",") for row in CONFIGURATIONS]
    settings = {"images": images, "steps": steps, "guidance_scale": guidance_scale, "device": device}
    measure_rows(out, {**settings, "scheduler": "ddpm"}, rows, measure)


if __name__ == "__main__":
    command(main)
