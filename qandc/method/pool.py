"""Record the candidate pool: what a transformer is given along trajectories, to choose calibration samples from.

Q&C (arXiv 2503.02508, Sec. 3.1) takes it from runs with the feature cache on, whose neighbouring steps are alike; from
runs without a cache it is the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from qandc.errors import ConfigError, DataError
from qandc.models import DIT, class_conditional, older_names
from qandc.quantization.layer_inputs import input_of_call
from qandc.sampling.loop import Guidance, check_sampling, describe_run, sample_latents
from qandc.sampling.pipelines import fingerprint
from qandc.support.arguments import Between, Count, Integers, Model, Scheduler, Seeds, Steps, check_fields, checked
from qandc.support.attach import eager
from qandc.support.files import FileKind, keep_settings
from qandc.tap import TapConfig, select_samples

__all__ = ["CandidatePool", "chosen_samples", "read_shard", "record_pool"]

SETTINGS = "pool.json"
SHARD = FileKind("shard of a pool", 1, dict, "delete it to have it sampled again", DataError)


@older_names
@dataclass(frozen=True)
class CandidatePool:
    """Hold samples ``(x_t, t, condition)`` on the CPU.

    Attributes:
        hidden_states: x_t, ``[N, C, H, W] float32``.
        timesteps: ``[N]``, int64 where all are whole, else floating point.
        steps, conditions: ``[N] int64``; steps count from 0, conditions are class ids.
        null_label: of the unconditional rows, or None if the runs had none (guidance <= 1).
    """

    hidden_states: torch.Tensor
    timesteps: torch.Tensor
    steps: torch.Tensor
    conditions: torch.Tensor
    null_label: Annotated[int, Between(0, 2**31 - 1)] | None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_states.ndim != 4 or not self.hidden_states.is_floating_point():
            found = f"{list(self.hidden_states.shape)} of {self.hidden_states.dtype}"
            raise DataError(f"hidden_states of a pool are [N, C, H, W] floating-point numbers; got {found}")
        for name in ("timesteps", "steps", "conditions"):
            values = getattr(self, name)
            numbers = "finite numbers" if name == "timesteps" else "integers"
            fits = values.shape == (len(self),)  # before values are read: a view can have any size
            if fits:
                fits = bool(torch.isfinite(values).all()) if name == "timesteps" else not values.is_floating_point()
            if not fits:
                found = f"{list(values.shape)} of {values.dtype}"
                raise DataError(f"{name} of a pool of {len(self)} samples are [{len(self)}] {numbers}; got {found}")

    def __len__(self) -> int:
        return len(self.hidden_states)

    @checked
    def select(
        self, count: int = 800, config: TapConfig | None = None, *, method: str = "tap", seed: int = 0
    ) -> np.ndarray:
        """Choose the samples to calibrate with, by number: :func:`qandc.select_samples` on x_t and steps."""
        looks = self.hidden_states.flatten(1)
        features = looks.to(torch.promote_types(looks.dtype, torch.float32)).numpy()  # NumPy has no bfloat16
        return select_samples(features, self.steps.numpy(), count, config, method=method, seed=seed)

    @checked
    def batches(
        self,
        indices: Integers | None = None,
        *,
        batch_size: Count = 100,
        by_timestep: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[dict[str, Any]]:
        """Yield inputs of the transformer for these samples (by default all), as :func:`qandc.calibrate` takes them.

        Each sample gives a conditional row and, if its run was guided, an unconditional one.

        Args:
            batch_size: samples in a batch, at most.
            by_timestep: a batch holds samples of one timestep only, as :func:`qandc.calibrate_steps` needs it.

        Raises:
            ConfigError: an index that the pool does not have, or a dtype without fractions.
            DeviceError: the device is not here.
        """
        chosen = chosen_samples(indices, len(self))
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype is {dtype}; give one of floating point, such as torch.float32")
        return self._batches(chosen, batch_size, by_timestep, device, dtype)

    def _batches(
        self, chosen: torch.Tensor, batch_size: int, by_timestep: bool, device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[dict[str, Any]]:
        parts = [chosen]
        if by_timestep:
            parts = [chosen[self.timesteps[chosen] == t] for t in torch.unique(self.timesteps[chosen])]
        for part in (part for of_time in parts for part in of_time.split(batch_size)):
            x, t, conditions = (
                values[part].to(device) for values in (self.hidden_states, self.timesteps, self.conditions)
            )
            if self.null_label is not None:
                x, t = torch.cat([x, x]), torch.cat([t, t])
                conditions = torch.cat([conditions, torch.full_like(conditions, self.null_label)])
            yield {"hidden_states": x.to(dtype), "timestep": t, DIT.run_key: conditions}


def chosen_samples(indices: Any, count: int) -> torch.Tensor:
    """Return indices of a pool of ``count`` samples as a tensor, all by default.

    Raises:
        ConfigError: one that the pool does not have.
    """
    chosen = torch.tensor(list(range(count) if indices is None else indices), dtype=torch.int64)
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if len(outside):
        raise ConfigError(f"index {int(outside[0])} is out of range; the pool has samples 0 to {count - 1}")
    return chosen


@older_names
@checked
def record_pool(
    transformer: Model,
    scheduler: Scheduler,
    conditions: Integers,
    *,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds | None = None,
    batch_size: Count = 50,
    directory: str | Path | None = None,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
) -> CandidatePool:
    """Sample, and keep every input of the transformer: ``images · steps`` candidates.

    Args:
        transformer: as it is to be calibrated: with its cache attached (the paper), or without one (the control).
        scheduler, conditions, num_inference_steps, guidance_scale, callback: as :func:`qandc.sample_latents`.
        seeds: one per label, 0, 1, 2, ... by default.
        batch_size: images sampled at once.
        directory: where each batch is stored as soon as it is finished. What is there already is read, not sampled
            again, so that an interrupted recording goes on; one of other settings is refused.

    Raises:
        ConfigError, DataError: as :func:`qandc.sample_latents`; or the directory holds a pool of other settings.
        OutputError: the directory cannot be written.
    """
    conditions = check_sampling(transformer, scheduler, conditions, num_inference_steps, guidance_scale)
    seeds = list(range(len(conditions)) if seeds is None else seeds)
    if len(seeds) != len(conditions):
        raise ConfigError(f"{len(conditions)} class ids need as many seeds; got {len(seeds)}")
    if directory is not None:
        scheduler.set_timesteps(num_inference_steps)
        run = describe_run(transformer, scheduler, guidance_scale)
        settings = {"version": SHARD.version, **run, DIT.run_key: conditions, "seeds": seeds, "batch_size": batch_size}
        settings |= {"scheduler_config": dict(scheduler.config), "weights_sha256": fingerprint(transformer)}
        keep_settings(Path(directory) / SETTINGS, settings, "a pool")
    shards = []
    for first in range(0, len(conditions), batch_size):
        path = None if directory is None else Path(directory) / f"pool-{first:06d}.safetensors"
        shard = None if path is None else read_shard(path)
        if shard is None:
            shard = _record(
                transformer,
                scheduler,
                conditions[first : first + batch_size],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                seeds=seeds[first : first + batch_size],
                callback=callback,
            )
            if path is not None:
                SHARD.write_tensors(path, shard, {})
        shards.append(shard)
    null_label = class_conditional(transformer)[1] if guidance_scale > 1 else None
    tensors = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return CandidatePool(conditions=tensors.pop(DIT.run_key), null_label=null_label, **tensors)


def _record(transformer: Any, scheduler: Any, conditions: list[int], **run: Any) -> dict[str, torch.Tensor]:
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of_call(args, kwargs, "hidden_states")
        seen.append(x[: len(conditions)].detach().float().cpu())

    handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with eager():
            sample_latents(transformer, scheduler, conditions, **run)
    finally:
        handle.remove()
    timesteps = torch.as_tensor(scheduler.timesteps).cpu()
    if (timesteps == timesteps.floor()).all():
        timesteps = timesteps.long()
    return {
        "hidden_states": torch.cat(seen),
        "timesteps": timesteps.repeat_interleave(len(conditions)),
        "steps": torch.arange(len(timesteps)).repeat_interleave(len(conditions)),
        DIT.run_key: torch.tensor(conditions).repeat(len(timesteps)),
    }


def read_shard(path: Path) -> dict[str, torch.Tensor] | None:
    """Read one file of a pool, or None where there is none."""
    if not path.exists():
        return None
    found, _ = SHARD.read_tensors(path)
    missing = {"hidden_states", "timesteps", "steps", DIT.run_key} - found.keys()
    if missing:
        raise DataError(f"{str(path)!r} has no {min(missing)}; {SHARD.advice}")
    return found
