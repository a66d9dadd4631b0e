"""Draw prompts with a pipeline of any family as it is and optimized, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qandc.caching.schedule import CacheConfig
from qandc.evaluation.judge import Judge, score_scenes
from qandc.evaluation.scenes import Garment, Scene
from qandc.experiments.generate import Comparison, ModelImages, module_bytes, name_of
from qandc.optimize import OptimizationPlan, optimize, parts_of, restore
from qandc.quantizer import QuantConfig
from qandc.sampling.pipelines import ASSETS, embedded_name
from qandc.sampling.prompts import draw_prompt

__all__ = ["EXAMPLES", "PromptDrawer", "PromptsConfig", "compare_prompts"]


def _scene(caption: str, *garments: Garment) -> Scene:
    return Scene(garments, garments, caption)


EXAMPLES = (  # that wardrobe draws if nobody says what
    _scene(
        "a red dress on the left and a yellow bag on the right",
        Garment("dress", "red", "left"),
        Garment("bag", "yellow", "right"),
    ),
    _scene("two green bags", Garment("bag", "green"), Garment("bag", "green")),
    _scene(
        "a blue coat at the top left, a pink sneaker at the bottom right",
        Garment("coat", "blue", "top left"),
        Garment("sneaker", "pink", "bottom right"),
    ),
    _scene(
        "an orange coat, a purple sneaker and a green dress",
        Garment("coat", "orange"),
        Garment("sneaker", "purple"),
        Garment("dress", "green"),
    ),
)


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
        """Return what a record holds of it; settings that are shipped are named without the place of the package."""
        calibrated = self.calibrated
        if calibrated is not None and calibrated.is_relative_to(ASSETS):
            calibrated = calibrated.relative_to(ASSETS)
        return {
            **asdict(self),
            "arguments": dict(self.arguments),
            "cache": self.cache and str(self.cache),
            "calibrated": calibrated and str(calibrated),
        }


class PromptDrawer:
    """Draw images ``[B, C, H, W]`` in [-1, 1] of prompts, given by number, and seeds, one by one."""

    def __init__(self, pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any]) -> None:
        self.pipe, self.prompts, self.arguments = pipe, prompts, arguments

    def warm_up(self, images: int) -> None:
        """Load kernels, compile and capture graphs by drawing an image for nobody, where there are any."""
        if self.pipe.device.type == "cuda":
            self([0], [0])

    def __call__(self, numbers: Any, seeds: Any) -> torch.Tensor:
        pairs = zip(numbers, seeds, strict=True)
        return torch.cat([draw_prompt(self.pipe, self.prompts[i], seed, self.arguments) for i, seed in pairs])


def compare_prompts(
    pipe: Any,
    settings: PromptsConfig,
    result: Comparison,
    progress: Callable[[str, int], None] = lambda row, number: None,
    *,
    restored: bool = False,
) -> OptimizationPlan:
    """Draw all prompts with ``pipe``, optimize it in place, and draw them again from the same noise.

    wardrobe's pictures of ``EXAMPLES`` are judged, too.

    Args:
        result: receives rows and images as they are finished, so that an interrupted run keeps them.
        progress: called as ``progress(row name, number of the image)`` before each.
        restored: make the pipeline again what it was.
    """
    names = parts_of(pipe)

    def draw(name: str) -> None:
        row = ModelImages(name, sum(module_bytes(getattr(pipe, part)) for part in names))
        result.rows.append(row)
        image = PromptDrawer(pipe, settings.prompts, settings.arguments)
        image.warm_up(1)  # outside the clock
        for number in range(len(settings.prompts)):
            progress(name, number)
            started = time.perf_counter()
            row.batches.append(image([number], [settings.seed + number]))
            row.seconds += time.perf_counter() - started

    draw("FP")
    if settings.calibrated is not None:
        plan = optimize(pipe, calibrated=settings.calibrated, cache=None, restorable=restored)
    else:
        plan = optimize(pipe, settings.config.w_bits, settings.config.a_bits, settings.cache, restorable=restored)
    steps = settings.arguments.get("num_inference_steps", plan.transformers[0].steps)
    plan = replace(plan, transformers=tuple(replace(part, steps=steps) for part in plan.transformers))
    part = plan.transformers[0]
    result.report = part.layers
    try:
        draw(name_of(part.layers.usual.scheme.partition(" ")[0], part.cache))
    finally:
        if restored:
            restore(pipe)
    captions = tuple(scene.caption for scene in EXAMPLES)
    if settings.prompts == captions and embedded_name(pipe.name_or_path) == "wardrobe":
        judge = Judge.load()
        for row in result.rows:
            row.right = score_scenes(judge, row.images, EXAMPLES).shares()
    return plan
