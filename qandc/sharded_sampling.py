"""One file of many images, of one model, drawn by any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from qandc.cache import apply_cache_to_dit, paused_cache, remove_cache
from qandc.errors import ProcessError
from qandc.files import keep_settings, locked
from qandc.fused_dit import fuse_dit
from qandc.presets import Preset
from qandc.processes import Processes
from qandc.sampling import check_sampling, decode_latents, make_scheduler, sample_latents
from qandc.shards import ImageSet, delete_shards, draw_shards, merge_shards, missing_shards
from qandc.variance_compensation import Compensation

__all__ = ["ImageDrawer", "sample_file"]

SETTINGS = "settings.json"


class ImageDrawer:
    """Labels and seeds to images ``[B, C, H, W]`` in [-1, 1], by one model in one kind of run.

    Kernels are compiled and loaded, and graphs captured, when it is made, by drawing ``batch_size`` images for nobody:
    in one step on a CPU, in a whole run on a GPU, which has graphs for each kind of step. They belong to no image's
    time.
    """

    def __init__(
        self,
        vae: Any,
        model: Any,
        scheduler: Any,
        run: dict[str, Any],
        batch_size: int,
        compensation: Compensation | None = None,
    ) -> None:
        self.vae, self.model, self.scheduler, self.run, self.compensation = vae, model, scheduler, run, compensation
        if model.device.type == "cuda":
            self([0] * batch_size, range(batch_size))
            return
        with paused_cache(model):  # whose schedule may have another length
            short = {**run, "num_inference_steps": 1}
            decode_latents(vae, sample_latents(model, scheduler, [0] * batch_size, seeds=range(batch_size), **short))

    def __call__(self, labels: Any, seeds: Any) -> torch.Tensor:
        latents = sample_latents(
            self.model, self.scheduler, list(labels), seeds=list(seeds), compensation=self.compensation, **self.run
        )
        return decode_latents(self.vae, latents)


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
    progress: Callable[[str, int, int], None] = lambda stage, completed, total: None,
) -> float:
    """Draw the images of a set and write them to one ``.npz``, as :func:`qandc.shards.merge_shards` does.

    Shards are kept in ``<path>.shards`` until then; the same call goes on with those that are there.

    Args:
        pipe: a ``DiTPipeline`` in full precision; quantized in place and given a cache if there is a preset.
        steps, guidance_scale, scheduler: of the run.
        preset: bits, ranges, schedule and compensation; None draws in full precision.
        source: where the pipeline came from.
        processes: that share the images; all call this function.
        progress: called as ``progress(stage, completed, total)``.

    Returns:
        Seconds of drawing, summed over the shards; 0 in all processes but the first.

    Raises:
        ConfigError: shards of other settings are there, or the preset is for another run.
        ModelError: the preset is for another model.
        OutputError: another run is writing this file, or it cannot be written.
        ProcessError: a process has ended, or was told to.
        DataError: images hold NaN, or a shard is damaged.
    """
    processes = Processes() if processes is None else processes
    model, noise_schedule = pipe.transformer, make_scheduler(scheduler, pipe.scheduler.config)
    check_sampling(model, noise_schedule, image_set.classes, steps, guidance_scale)
    shards = path.with_name(f"{path.name}.shards")
    with ExitStack() as stack:
        if preset is not None:
            preset.check(model, noise_schedule, steps, guidance_scale)
        if processes.first:
            stack.enter_context(locked(shards))
            keep_settings(
                shards / SETTINGS,
                {
                    "model": source,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "steps": steps,
                    "guidance_scale": guidance_scale,
                    "scheduler": scheduler,
                    "scheme": "full precision" if preset is None else preset.config.scheme,
                    "schedule": None if preset is None else str(preset.schedule.config()),
                    "compensation": None if preset is None or preset.compensation is None else preset.compensation.form,
                    "count": image_set.count,
                    "first_seed": image_set.first_seed,
                    "batch_size": image_set.batch_size,
                },
                "shards",
            )
        processes.meet("the folder of shards")
        if preset is not None:
            preset.quantize(model)
            if model.device.type == "cuda":
                fuse_dit(model)
            apply_cache_to_dit(model, config=preset.schedule.config())
            stack.callback(remove_cache, model)
        run = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        compensation = None if preset is None else preset.compensation
        draw = ImageDrawer(pipe.vae, model, noise_schedule, run, image_set.batch_size, compensation)
        draw_shards(shards, image_set, draw, processes, progress)
        processes.meet("the last shard")
        if not processes.first:
            return 0.0
        lacking = missing_shards(shards, image_set)
        if lacking:
            raise ProcessError(f"{lacking} shards are not there; run the same command again")
        seconds = merge_shards(shards, image_set, path)
        (shards / SETTINGS).unlink()
        (shards / ".lock").unlink()
        delete_shards(shards, image_set)
        return seconds
