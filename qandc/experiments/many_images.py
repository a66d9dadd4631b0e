"""Draw one file of many images of one model, by any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from qandc.cache import attached_cache, get_cache
from qandc.caching.compensation import config_for
from qandc.errors import OutputError, ProcessError
from qandc.experiments.processes import Processes
from qandc.experiments.prompts import PromptDrawer
from qandc.experiments.shards import ImageSet, delete_shards, draw_shards, merge_shards, missing_shards
from qandc.fusion.fuse import fuse
from qandc.method.pipeline_calibration import StageProgress
from qandc.method.saved import MANIFEST, Preset
from qandc.optimize import optimize, parts_of
from qandc.sampling.loop import check_sampling, decode_latents, make_scheduler, sample_latents
from qandc.sampling.pipelines import fingerprint
from qandc.support.attach import paused
from qandc.support.files import FileEntry, keep_settings, locked
from qandc.variance_compensation import Compensation

__all__ = ["ImageDrawer", "check_new", "describe_pipeline", "memory_of", "sample_file", "sample_prompts_file"]

SETTINGS = "settings.json"


def describe_pipeline(pipe: Any, scheduler: Any, source: str | None) -> dict[str, Any]:
    """Describe what decides about images beside a command's options, for the file a resumed run is compared with."""
    models = [getattr(pipe, name) for name in parts_of(pipe)]
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {
        "model": source,
        "weights_sha256": [fingerprint(part) for part in (*models, pipe.vae)],
        "scheduler_config": config,
        "device": models[0].device.type,
        "dtype": str(models[0].dtype).removeprefix("torch."),
    }


def check_new(path: Path) -> None:
    """Refuse a file that is finished, with nothing of it left to do.

    Raises:
        OutputError: it is there.
    """
    if path.exists() and not _shards_of(path).exists():
        raise OutputError(f"{str(path)!r} is there already; delete it, or give another file")


def _shards_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.shards")


class ImageDrawer:
    """Draw images ``[B, C, H, W]`` in [-1, 1] of labels and seeds, by one model in one kind of run."""

    def __init__(
        self, vae: Any, model: Any, scheduler: Any, run: dict[str, Any], compensation: Compensation | None = None
    ) -> None:
        self.vae, self.model, self.scheduler, self.run, self.compensation = vae, model, scheduler, run, compensation

    def warm_up(self, images: int) -> None:
        """Load kernels and capture graphs by drawing images for nobody, so that this belongs to no image's time.

        In one step on a CPU; in a whole run on a GPU, which has graphs for each kind of step.
        """
        if self.model.device.type == "cuda":
            self([0] * images, range(images))
            return
        with paused(self.model):  # whose schedule may have another length
            short = {**self.run, "num_inference_steps": 1}
            latents = sample_latents(self.model, self.scheduler, [0] * images, seeds=range(images), **short)
            decode_latents(self.vae, latents)

    def __call__(self, labels: Any, seeds: Any) -> torch.Tensor:
        latents = sample_latents(
            self.model, self.scheduler, list(labels), seeds=list(seeds), compensation=self.compensation, **self.run
        )
        return decode_latents(self.vae, latents)


def memory_of(model: Any) -> dict[str, int]:
    """Return the bytes of features that the cache of a model holds, and on a GPU the peak since it was reset."""
    cache, device = get_cache(model), model.device
    found = {"cache_bytes": 0 if cache is None else cache.nbytes}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def sample_file(
    pipe: Any,
    path: Path,
    image_set: ImageSet,
    *,
    steps: int,
    guidance_scale: float,
    scheduler: str,
    preset: Preset | None = None,
    source: str | None = None,
    processes: Processes | None = None,
    progress: StageProgress = lambda stage, completed, total: None,
) -> float | None:
    """Draw the images of a set and write them to one ``.npz``, as :func:`qandc.experiments.shards.merge_shards` does.

    Shards are kept in ``<path>.shards`` until then; the same call goes on with those that are there.

    Args:
        pipe: a ``DiTPipeline`` in full precision; quantized in place and given a cache if there is a preset.
        steps, guidance_scale, scheduler: of the run.
        preset: bits, ranges, schedule and compensations; None draws in full precision.
        source: where the pipeline came from.
        processes: that share the images; all call this function.
        progress: called as ``progress(stage, completed, total)``.

    Returns:
        Images drawn by this call in a second of all processes together, once each had loaded its kernels; None if there
        was nothing left to draw, and in all processes but the first.

    Raises:
        ConfigError: shards of other settings are there, or the preset is for another run.
        ModelError: the preset is for another model.
        OutputError: the file is there already, another run is writing it, or it cannot be written.
        ProcessError: a process has ended, or was told to.
        DataError: images hold NaN, or a shard is damaged.
    """
    model, noise_schedule = pipe.transformer, make_scheduler(scheduler, pipe.scheduler.config)
    check_sampling(model, noise_schedule, image_set.classes, steps, guidance_scale)
    if preset is not None:
        preset.check(model, noise_schedule, steps, guidance_scale)
    settings = {
        **describe_pipeline(pipe, noise_schedule, source),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "preset": None if preset is None else preset.digest(),
        "classes": list(image_set.classes),
    }

    def prepare(stack: ExitStack) -> ImageDrawer:
        if preset is not None:
            preset.quantize(model)
            if model.device.type == "cuda":
                fuse(model)
            stack.enter_context(attached_cache(model, config_for(preset.schedule, preset.features), preset.features))
        run = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        return ImageDrawer(pipe.vae, model, noise_schedule, run, None if preset is None else preset.compensation)

    return _draw_file(path, image_set, settings, prepare, processes, progress)


def sample_prompts_file(
    pipe: Any,
    path: Path,
    image_set: ImageSet,
    prompts: Sequence[str],
    arguments: Mapping[str, Any],
    *,
    optimization: Mapping[str, Any] | None = None,
    source: str | None = None,
    processes: Processes | None = None,
    progress: StageProgress = lambda stage, completed, total: None,
) -> float | None:
    """Do for prompts what :func:`sample_file` does for classes; the classes of the set are numbers of prompts.

    Args:
        pipe: draws from prompts, in full precision.
        path, image_set, source, processes, progress: as for :func:`sample_file`.
        prompts: that images are drawn from.
        arguments: of each call of the pipeline.
        optimization: arguments of :func:`qandc.optimize`; None draws in full precision.
    """
    held = {} if optimization is None else {name: str(value) for name, value in optimization.items()}
    if "calibrated" in held:  # another model under the same name is another
        held["calibrated"] = FileEntry.of(Path(held["calibrated"], MANIFEST)).sha256
    settings = {
        **describe_pipeline(pipe, pipe.scheduler, source),
        "prompts": list(prompts),
        "arguments": dict(arguments),
        "optimization": None if optimization is None else held,
    }

    def prepare(stack: ExitStack) -> PromptDrawer:
        if optimization is not None:
            optimize(pipe, **optimization, restorable=False)
        return PromptDrawer(pipe, prompts, arguments)

    return _draw_file(path, image_set, settings, prepare, processes, progress)


def _draw_file(
    path: Path,
    image_set: ImageSet,
    settings: Mapping[str, Any],
    prepare: Callable[[ExitStack], ImageDrawer | PromptDrawer],
    processes: Processes | None,
    progress: StageProgress,
) -> float | None:
    """Draw the shards that are not there, with what ``prepare`` makes once shards of other settings are refused."""
    processes = Processes() if processes is None else processes
    shards = _shards_of(path)
    with ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
            check_new(path)
            of_set = {name: getattr(image_set, name) for name in ("count", "first_seed", "batch_size")}
            keep_settings(shards / SETTINGS, {**settings, **of_set}, "shards")
        processes.barrier("the folder of shards")
        missing = sum(map(len, missing_shards(shards, image_set)))
        draw = prepare(stack)
        if missing:
            draw.warm_up(min(image_set.batch_size, image_set.count))
        processes.barrier("loading")
        started = time.perf_counter()
        draw_shards(shards, image_set, draw, processes, progress)
        processes.barrier("the last shard")
        seconds = time.perf_counter() - started
        if not processes.is_main:
            return None
        lacking = missing_shards(shards, image_set)
        if lacking:
            raise ProcessError(f"{len(lacking)} shards are not there; run the same command again")
        merge_shards(shards, image_set, path)
        delete_shards(shards)
        return missing / seconds if missing else None
