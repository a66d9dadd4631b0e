"""Do what calibrations of all pipelines have in common, and count how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from qandc.method.block_hessians import BlockHessians
from qandc.models import family_of
from qandc.quantization.conversion import quantize_model
from qandc.quantization.observe import calibrate, input_hessians, smoothing_factors, unquantized
from qandc.quantization.ranges import RangeConfig
from qandc.quantizer import QuantConfig

__all__ = ["Stage", "StageProgress", "quantize_on"]

StageProgress = Callable[[str, int, int], None]


class Stage:
    """Count what is done of one part of the work."""

    def __init__(self, name: str, total: int, progress: StageProgress) -> None:
        self.name, self.total, self.completed, self.progress = name, total, 0, progress

    def __enter__(self) -> Stage:
        self.progress(self.name, 0, self.total)
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None and self.completed < self.total:  # parts that were there already
            self.progress(self.name, self.total, self.total)

    def add(self, count: int) -> None:
        self.completed += count
        self.progress(self.name, self.completed, self.total)

    def step(self, step: int, timestep: float, latents: torch.Tensor) -> None:
        """Count the images of a step; a callback of the denoising loop."""
        self.add(len(latents))

    def counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches, each counted when the next one is asked for."""
        for batch in batches:
            yield batch
            self.add(1)


def quantize_on(
    model: Any,
    batches: Callable[[], Iterable[Any]],
    count: int,
    config: QuantConfig,
    progress: StageProgress,
    *,
    smoothing: bool,
    gptq: bool,
    ranges: RangeConfig | None = None,
) -> None:
    """Find smoothing factors, round weights, then find static ranges, each on ``count`` batches.

    Activations that stay as they are (``a_bits`` 16) have neither factors nor ranges.
    """
    factors: dict[str, torch.Tensor] | None = None
    hessians: Mapping[str, torch.Tensor] | None = None
    rounding = Stage("rounding weights", 1, progress)
    if smoothing and config.a_bits < 16:
        with Stage("smoothing", count, progress) as stage:
            factors = smoothing_factors(model, stage.counted(batches()), skip_patterns=config.skip_patterns)
    if gptq and family_of(model) is not None:
        found = BlockHessians(
            model, lambda: rounding.counted(batches()), unquantized(model, config.skip_patterns, "gather Hessians")
        )
        hessians, rounding = found, Stage("rounding weights", count * len(found.layers), progress)
    elif gptq:
        with Stage("inputs of layers", count, progress) as stage:
            hessians = input_hessians(model, stage.counted(batches()), config.skip_patterns)
    with rounding:
        quantize_model(
            model,
            config.w_bits,
            config.a_bits,
            config.skip_patterns,
            conditioning=config.conditioning,
            weight_clip=config.weight_clip,
            smoothing=factors,
            hessians=hessians,
        )
    if config.a_bits < 16:
        with Stage("ranges", count, progress) as stage:
            calibrate(model, stage.counted(batches()), ranges=ranges)
