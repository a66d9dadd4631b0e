"""Calibrate a pipeline that draws from prompts, along its own runs: samples, ranges, schedule, compensation."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from qandc import historical
from qandc.cache import attached_cache, get_cache
from qandc.caching.schedule import CacheConfig
from qandc.errors import ConfigError, ModelError
from qandc.method.feature_compensation import fit_feature_compensation
from qandc.method.pipeline_calibration import FEATURES_SEED, FIRST_SEED, POOL_SEED, SCHEDULE_SEED
from qandc.method.run_pool import pool_from_run
from qandc.method.saved import CalibratedModel
from qandc.method.schedule_calibration import schedule_for
from qandc.method.settings import COMPENSATIONS, Images
from qandc.method.stages import Stage, StageProgress, quantize_on
from qandc.quantization.conversion import quant_layers
from qandc.quantization.plan import conditioning_of
from qandc.quantizer import QuantConfig
from qandc.sampling.corrected_scheduler import check_uncorrected
from qandc.sampling.prompts import check_prompts, of_prompts, text_length
from qandc.sampling.trajectories import compensation_from_run, trajectory_from_run
from qandc.support.arguments import Count, Pipeline, checked
from qandc.tap import METHODS, TapConfig

__all__ = ["calibrate_on_prompts", "draw_latents"]

logger = logging.getLogger(__name__)

OURS = ("prompt", "generator", "output_type", "latents", "return_dict")  # arguments of a pipeline that are set here
SAMPLES_PER_CLUSTER = 8


@checked
def calibrate_on_prompts(
    pipe: Annotated[Any, Pipeline],
    prompts: Sequence[str],
    *,
    w_bits: int = 8,
    a_bits: int = 8,
    conditioning: str | None = "W8A16",
    cache: CacheConfig | None = None,
    pool_images: Images = 16,
    samples: Count = 128,
    select: str = "tap",
    uniform: bool = False,
    smoothing: bool = True,
    gptq: bool | None = None,
    compensation: str | None = None,
    transformer: str = "transformer",
    pool_directory: str | Path | None = None,
    progress: StageProgress | None = None,
    **pipeline_arguments: Any,
) -> CalibratedModel:
    """Quantize a transformer on images that its own pipeline draws from prompts, and find schedule and compensation.

    ``calibrate_on_prompts(pipe, prompts, cache=CacheConfig("taylor", interval=3), num_inference_steps=28)``. The
    transformer is quantized in place; no cache is attached: ``apply_cache(found.model, config=found.schedule.config(),
    compensation=found.features)``. :func:`qandc.save` takes what is returned.

    Args:
        pipe: any pipeline of diffusers that takes ``prompt``, with its transformer in full precision, without a cache.
        prompts: taken in turn.
        w_bits, a_bits, conditioning: as :func:`qandc.optimize`.
        cache: that the model will have: samples are taken from runs with it, as the paper does it. With an interval,
            as many steps are computed, those that serve the others best; a schedule is kept. None: no cache.
        pool_images: images that are drawn for each part of the work, pool, schedule and compensation, each from noise
            of its own.
        samples: calls of the transformer to calibrate with, chosen among all of the pool.
        select: how they are: by ``tap``, ``random``, ``uniform`` or ``kmeans`` (:func:`qandc.select_samples`).
        uniform: compute every Nth step, not those that serve the others best.
        smoothing: move outliers from activations to weights.
        gptq: round weights with Hessians, by default those of 4 bits.
        compensation: ``features`` corrects what the cache reuses (:func:`qandc.fit_feature_compensation`), the default
            with a cache; ``samples`` the latents after each step (:func:`qandc.compensation_from_run`), for which all
            images are drawn at once; or ``none``, the default without a cache.
        transformer: name of the transformer in the pipeline: ``transformer_2`` for the second one of Wan 2.2.
        pool_directory: keeps the pool, as :func:`qandc.pool_from_run` does; an interrupted recording goes on.
        progress: called as ``progress(stage, completed, total)``, first with 0, last with the total.
        pipeline_arguments: of each call of the pipeline: ``height``, ``width``, ``num_inference_steps``,
            ``guidance_scale``, ``negative_prompt`` and others, by the names that it has for them.

    Raises:
        ConfigError: no prompt, an empty one or no string; an argument that the pipeline does not have or that is set
            here; another compensation or choice of samples.
        ModelError: the pipeline takes no prompts, or its transformer is quantized, cached or of no family that a cache
            knows.
        DataError: samples or features are NaN, infinite or do not vary.
    """
    model: Any = getattr(pipe, transformer, None)
    _check(pipe, model, transformer, prompts, pipeline_arguments)
    pipeline_arguments = {**text_length(pipe), **pipeline_arguments}
    for what, given, allowed in (
        ("compensation", compensation, (None, *COMPENSATIONS)),
        ("select", select, (*METHODS, *historical.CLUSTERERS)),
    ):
        if given not in allowed:
            raise ConfigError(f"{what} {given!r} is unknown; choose one of {', '.join(filter(None, allowed))}")
    if compensation == "samples":
        check_uncorrected(pipe.scheduler)
    if cache is not None:
        cache.check_planned("no schedule can be found for it")
    gptq = w_bits == 4 if gptq is None else gptq
    config = QuantConfig(w_bits, a_bits, None, "mse" if gptq else "max", conditioning_of(model, conditioning))
    if len(prompts) < pool_images:
        logger.info("%d prompts for %d images: they are taken in turn", len(prompts), pool_images)
    report: StageProgress = progress or (lambda stage, completed, total: None)

    def draw(stage: Stage, first_seed: int, numbers: Sequence[int]) -> None:
        draw_latents(pipe, prompts, first_seed, numbers, pipeline_arguments)
        stage.add(len(numbers))

    def images(stage: Stage, first_seed: int) -> list[Callable[[], None]]:
        return [partial(draw, stage, first_seed, [number]) for number in range(pool_images)]

    def one_by_one(stage: Stage, first_seed: int) -> None:
        for image in images(stage, first_seed)[: stage.total]:
            image()

    def stage_of(name: str, count: int = pool_images) -> Stage:
        return Stage(name, count, report)

    with attached_cache(model, cache), stage_of("candidate pool") as stage:
        about = json.dumps([prompts, pipeline_arguments], default=lambda value: type(value).__name__)
        pool = pool_from_run(model, images(stage, POOL_SEED), pool_directory, about=about)
    together, reference = range(pool_images), None
    if compensation == "samples":
        with stage_of("reference") as stage:
            reference = trajectory_from_run(pipe, partial(draw, stage, FIRST_SEED, together))
    with Stage("choosing samples", 1, report):
        count = min(samples, len(pool))
        if count < samples:
            logger.info("the pool has %d samples, and all are taken: there are no %d", count, samples)
        chosen = pool.select(count, TapConfig(max(1, count // SAMPLES_PER_CLUSTER)), method=select)
    device = getattr(pipe, "_execution_device", model.device)  # of diffusers: where an offloaded model runs
    batches = partial(pool.batches, chosen, device=device)
    quantize_on(model, batches, count, config, report, smoothing=smoothing, gptq=gptq)
    schedule = features = gains = None
    if cache is not None:
        known = uniform or cache.schedule is not None  # but for its timesteps
        with stage_of("schedule", 1 if known else pool_images) as stage:
            schedule = schedule_for(
                model, partial(one_by_one, stage, SCHEDULE_SEED), cache, compensation in (None, "features"), uniform
            )
        cache = schedule.config(cache.storage_dtype)
        if compensation in (None, "features") and not all(schedule.schedule):
            with stage_of("features") as stage:
                features = fit_feature_compensation(model, partial(one_by_one, stage, FEATURES_SEED), config=cache)
    if reference is not None:
        with attached_cache(model, cache), stage_of("compensation") as stage:
            gains = compensation_from_run(pipe, partial(draw, stage, FIRST_SEED, together), reference)
    return CalibratedModel(model, schedule, gains, features=features)


def draw_latents(
    pipe: Any, prompts: Sequence[str], first_seed: int, numbers: Sequence[int], arguments: Mapping[str, Any]
) -> None:
    """Draw images at once, by number, from prompts that are taken in turn; all but latents is left out."""
    texts = [prompts[i % len(prompts)] for i in numbers]
    generators = [torch.Generator().manual_seed(first_seed + i) for i in numbers]
    pipe(**of_prompts(texts, generators, {**text_length(pipe), **arguments}), output_type="latent")


def _check(pipe: Any, model: Any, name: str, prompts: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Refuse, before any work, what cannot be calibrated or drawn."""
    kind, known = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in known:
        raise ModelError(f"{kind} takes no prompt; calibrate a DiTPipeline with calibrate_pipeline")
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{kind} has no model {name!r}; give the name of its transformer")
    if quant_layers(model) or get_cache(model) is not None:
        raise ModelError(f"{name} is quantized or has a cache already; load the pipeline anew to calibrate it")
    check_prompts(prompts)
    for argument in arguments:
        if argument in OURS or argument not in known:
            why = "is set here" if argument in OURS else f"is no argument of {kind}"
            raise ConfigError(f"{argument} {why}; give what a call of the pipeline takes beside a prompt")
