"""Measure what outliers in activations cost, and which ranges and smoothing withstand them.

    python training/evaluate_outliers.py --fused                           # on a GPU; a file that is there is continued
    python training/evaluate_outliers.py --model wardrobe --fused --out results/h200/outliers-wardrobe.json
    python training/evaluate_outliers.py --images 10 --steps 10 --fit 4 --device cpu --out results/cpu/outliers.json

Four channels of what each block's modulated norms and its v give are multiplied, and the weights that read them are
divided, so that the full-precision model computes the same as before. PSNR is to its images of the same noise. Single
images may turn into another garment, so of a DiT predictions of a run that nothing was calibrated on are compared too:
signal over error of each forward, on average. Of wardrobe the judge's scores are told. Every step is computed, in
float32; int8 weights are rounded to nearest, int4 weights with GPTQ.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from evaluate_wardrobe import JudgeFile, Wardrobe, likeness, row, settings_of
from fashion_mnist import DEFAULT_DIRECTORY, Data
from outliers import plant_outliers, set_per_token_behind_modulation
from qandc import calibrate, fuse, input_hessians, quantize_model, smoothing_factors
from qandc.evaluation.metrics import snr
from qandc.quantization.conversion import quant_layers
from qandc.sampling.pipelines import CLASS_CONDITIONAL, pipeline_class
from quality import Bench, Only, Out, Seconds, command, measure_chosen

FIT, OTHERS = 20_000_000, 30_000_000  # seeds of the samples to calibrate with, and of the predictions that are compared
SIZES = (1, 10, 30, 100)  # 1 plants none
RANGES = ("static", "per token", "static, per token behind modulation")
SMOOTHING = {None: RANGES, 0.25: RANGES[:1], 0.5: RANGES, 0.75: RANGES[:1]}
DTYPE = torch.float32  # rounded to bfloat16 the planted model itself would be as far away as one of 8 bits
MUST = 1.0  # dB that outliers of the largest size may cost with smoothing


def rows(fused: bool) -> Iterator[dict[str, Any]]:
    """Give the rows, of models as they are or fused."""
    how = {"fused": True} if fused else {}
    for precision, times, (smoothing, ranges) in itertools.product(("W8A8", "W4A8"), SIZES, SMOOTHING.items()):
        for kind in ranges:
            yield row("outliers", precision, outliers=times, ranges=kind, smoothing=smoothing, **how)


def goals(model: str, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the goals: what the largest outliers cost with smoothing, where it is measured."""
    known = {row["name"]: row for row in measured if "refused" not in row}
    found = []
    for name, last in known.items():
        none = known.get(name.replace(f"outliers {SIZES[-1]}", "outliers 1"))
        if last["outliers"] == SIZES[-1] and last["smoothing"] == 0.5 and none:
            goal = {"unit": "dB", "better": "lower", "must": MUST, "goal": None}
            for key, what in (("prediction_snr", "predictions"), ("psnr_to_fp", "images")):
                if key in last:
                    of = {"name": f"dB of {what} lost, {model}, {name}", "value": none[key] - last[key]}
                    found.append({**of, **goal})
    return found


class ClassConditional:
    """Draw what rows ask for with a DiT."""

    def __init__(self, model: str, device: str, images: int, steps: int, batch: int, fit: int) -> None:
        directory = None if model == "fashion-dit" else Path(model)
        self.bench, self.fit = Bench(device, images, batch, steps, 1.5, dtype=DTYPE, pipeline=directory), fit
        self.settings = {"model": model, "fit": fit, **self.bench.settings}
        self.rounded = functools.lru_cache(1)(self._rounded)  # rows of one behind each other
        base, self.calls = self.bench.base, []
        handle = base.register_forward_pre_hook(lambda _, *given: self.calls.append(given), with_kwargs=True)
        self.run(base, OTHERS)
        handle.remove()
        self.full, self.predicted = self.bench.sample(base)[0], self.predictions(base)

    def run(self, model: Any, seed: int) -> None:
        """Draw a few images for nobody."""
        self.bench.denoise(model, self.bench.labels[: self.fit], seed, None, self.bench.scheduler)

    @torch.no_grad()
    def predictions(self, model: Any) -> torch.Tensor:
        return torch.stack([model(*args, **kwargs)[0] for args, kwargs in self.calls])

    def _rounded(self, precision: str, weights: str, smoothing: float | None, times: float) -> Any:
        """Make a quantized model with static ranges."""
        model = plant_outliers(copy.deepcopy(self.bench.base), times)
        run = functools.partial(self.run, model, FIT)
        factors = None if smoothing is None else smoothing_factors(model, run, alpha=smoothing)
        gptq = weights == "gptq"
        hessians = input_hessians(model, run) if gptq else None
        clip = "mse" if gptq else "max"
        quantize_model(model, int(precision[1]), weight_clip=clip, smoothing=factors, hessians=hessians)
        return calibrate(model, run)

    def measure(self, row: dict[str, Any]) -> dict[str, Any]:
        how = settings_of(row)
        model = copy.deepcopy(self.rounded(how["precision"], how["weights"], how["smoothing"], how["outliers"]))
        if how["ranges"] == "per token":
            for layer in quant_layers(model).values():
                layer.set_static_range(None)
        elif "per token" in how["ranges"]:
            set_per_token_behind_modulation(model)
        if how["fused"]:
            fuse(model)
        signal = snr(self.predictions(model), self.predicted).mean()
        found = likeness(self.bench.sample(model)[0], self.full)
        return {"images": len(self.full), "prediction_snr": float(signal), **found}


def main(
    model: Annotated[str, typer.Option(help="fashion-dit, wardrobe, or a directory.")] = "fashion-dit",
    judge: JudgeFile = None,
    out: Out = Path("results/h200/outliers.json"),
    data: Data = DEFAULT_DIRECTORY,
    images: Annotated[int, typer.Option(min=2, help="Of each row.")] = 1000,
    steps: Annotated[int | None, typer.Option(help="Default: 50 of a DiT, 28 of wardrobe.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 1000,
    fit: Annotated[int, typer.Option(min=1, help="Images to calibrate with.")] = 16,
    fused: Annotated[bool, typer.Option(help="Measure on fused kernels; needs a GPU.")] = False,
    only: Only = "",
    seconds: Seconds = 1e9,
    device: str = "cuda",
) -> None:
    """Draw the same noise with every configuration, and compare with full precision."""
    make_goals = functools.partial(goals, Path(model).name)
    if fused and not device.startswith("cuda"):
        raise typer.BadParameter("--fused needs a GPU; give --device cuda, or leave it out")
    bench: Any
    if pipeline_class(model) == CLASS_CONDITIONAL:
        bench = ClassConditional(model, device, images, steps or 50, batch, fit)
    else:
        bench = Wardrobe(model, judge, data, [0], images, steps or 28, batch, fit, 1.0, device, DTYPE)
    measure_chosen(out, bench.settings, rows(fused), bench.measure, make_goals, only, seconds)


if __name__ == "__main__":
    command(main)
