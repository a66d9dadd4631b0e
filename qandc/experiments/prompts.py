"""Draw prompts with a pipeline of any family as it is and optimized, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qandc.caching.schedule import CacheConfig
from qandc.experiments.generate import Comparison, ModelImages, module_bytes, scheme_and_cache
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
    """

    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    config: QuantConfig
    cache: CacheConfig | None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name the row of the optimized pipeline."""
        return scheme_and_cache(self.config, self.cache)

    def described(self) -> dict[str, Any]:
        """Return what a record holds of it."""
        return {**asdict(self), "arguments": dict(self.arguments), "cache": str(self.cache)}


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
    plan = optimize(pipe, settings.config.w_bits, settings.config.a_bits, settings.cache, restorable=False)
    result.report = plan.transformers[0].layers
    draw(settings.name)
    return plan
