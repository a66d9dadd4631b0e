"""Draw prompts with a pipeline of any family as it is and optimized, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qandc.caching.schedule import CacheConfig
from qandc.experiments.generate import Comparison, ModelImages, module_bytes, name_of
from qandc.optimize import OptimizationPlan, optimize, parts_of
from qandc.quantizer import QuantConfig
from qandc.sampling.prompts import draw_prompt

__all__ = ["PromptsConfig", "compare_prompts"]


@dataclass(frozen=True)
class PromptsConfig:
    """Say what ``qandc generate`` draws from prompts.

    Attributes:
        prompts: one image is drawn from each.
        arguments: of each call of the pipeline.
        config, cache: what is made of its transformers.
        seed: of the first image; later ones count on.
        calibrated: a directory that holds the model to compare with, in the place of ``config`` and ``cache``.
    """

    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    config: QuantConfig
    cache: CacheConfig | None
    seed: int = 0
    calibrated: Path | None = None

    def described(self) -> dict[str, Any]:
        """Return what a record holds of it."""
        return {
            **asdict(self),
            "arguments": dict(self.arguments),
            "cache": str(self.cache),
            "calibrated": str(self.calibrated),
        }


def compare_prompts(
    pipe: Any,
    settings: PromptsConfig,
    result: Comparison,
    progress: Callable[[str, int], None] = lambda row, number: None,
) -> OptimizationPlan:
    """Draw all prompts with ``pipe``, optimize it in place, and draw them again from the same noise.

    Args:
        result: receives rows and images as they are finished, so that an interrupted run keeps them.
        progress: called as ``progress(row name, number of the image)`` before each.
    """
    names = parts_of(pipe)

    def draw(name: str) -> None:
        parts = [getattr(pipe, part) for part in names]
        row = ModelImages(name, sum(map(module_bytes, parts)))
        result.rows.append(row)
        if parts[0].device.type == "cuda":  # outside the clock: compilation and the loading of kernels
            draw_prompt(pipe, settings.prompts[0], settings.seed, settings.arguments)
        for number, prompt in enumerate(settings.prompts):
            progress(name, number)
            started = time.perf_counter()
            row.batches.append(draw_prompt(pipe, prompt, settings.seed + number, settings.arguments))
            row.seconds += time.perf_counter() - started

    draw("FP")
    if settings.calibrated is not None:
        plan = optimize(pipe, calibrated=settings.calibrated, cache=None, restorable=False)
    else:
        plan = optimize(pipe, settings.config.w_bits, settings.config.a_bits, settings.cache, restorable=False)
    part = plan.transformers[0]
    result.report = part.layers
    draw(name_of(part.layers.quantized[0].scheme.partition(" ")[0], part.cache))
    return plan
