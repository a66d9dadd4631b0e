"""Run the denoising loop: scheduler + transformer, guidance, one noise stream per image.

``DiTPipeline`` draws the noise of a DDPM step from the global generator, so two of its runs cannot be compared image by
image. This loop gives every image a generator of its own: image ``i`` is the same for any batch it is drawn in, and two
models given the same seeds see the same noise.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import torch

from qandc.cache import get_cache
from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.fuse import is_fused, prepare_run
from qandc.fusion.nan_flags import lower_nan_flags, raised_nan_flag
from qandc.fusion.run_graph import run_as_graph, why_no_run_graph
from qandc.models import class_conditional, family_of, older_names
from qandc.quantization.conversion import quant_layers
from qandc.sampling.affine_step import affine_coefficients, is_affine, why_not_plain_ddim
from qandc.support.arguments import Between, Integers, Model, Scheduler, Seeds, Steps, checked
from qandc.support.attach import original_class
from qandc.variance_compensation import Compensation
from qandc_kernels import guided_step, select_backend

__all__ = ["SCHEDULERS", "Corrector", "Guidance", "decode_latents", "describe_run", "make_scheduler", "sample_latents"]

logger = logging.getLogger(__name__)

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}


Guidance = Annotated[float, Between(0, 1e6)]


@checked
def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Make a diffusers scheduler, ``name`` "ddpm" or "ddim", with the noise schedule of ``config``.

    Raises:
        ConfigError: an unknown name, or a config that diffusers makes no scheduler of.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise ConfigError(f"scheduler {name!r} is unknown; choose one of {', '.join(SCHEDULERS)}")
    changes = {}
    if str(config.get("variance_type", "")).startswith("learned"):
        # needs a predicted variance, which the loop below does not use
        changes["variance_type"] = "fixed_small"
        logger.info("variance_type %s is replaced by fixed_small", config["variance_type"])
    try:
        return getattr(diffusers, SCHEDULERS[name]).from_config(config, **changes)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"config is none of a scheduler ({error}); give that of one, pipe.scheduler.config"
        ) from error


@runtime_checkable
class Corrector(Protocol):
    """Change a run at two points of every step: the guided noise prediction, and the latents after the step."""

    def noise(self, step: int, noise_pred: torch.Tensor) -> torch.Tensor: ...

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor: ...


def describe_run(transformer: Any, scheduler: Any, guidance_scale: float) -> dict[str, Any]:
    """Describe a run by the fields of ``FittedFor``, which a compensation must be fitted for.

    Called after ``scheduler.set_timesteps``.
    """
    cache, timesteps = get_cache(transformer), timesteps_of(scheduler)
    model = getattr(transformer, "_orig_mod", transformer)
    family = family_of(model)
    size = type(model).__name__
    if family is not None:
        size = f"{len(family.blocks(model).blocks)} blocks of {family.width(model)}"
    cached = None if cache is None else cache.config
    return {
        "scheduler": type(scheduler).__name__,
        "timesteps": timesteps,
        "guidance_scale": float(guidance_scale),
        "model": size,
        "schemes": tuple(sorted({layer.scheme for layer in quant_layers(transformer).values()})),
        "cache_mode": None if cached is None else cached.mode,
        "cache_schedule": None if cached is None else cached.of_steps(len(timesteps)),
        "cache_order": 0 if cached is None else cached.history - 1,
        "cache_storage": None if cached is None else cached.storage_dtype,
        "cache_compensated": cache is not None and cache.compensation is not None,
    }


@checked
def check_sampling(
    transformer: Model, scheduler: Scheduler, conditions: Integers, num_inference_steps: Steps, guidance_scale: Guidance
) -> list[int]:
    """Refuse what :func:`sample_latents` cannot sample, before any work; returns the class ids as a list.

    Raises:
        ConfigError: class ids are no integers in one dimension, or a setting is out of range.
        ModelError: no DiT, or no scheduler of one.
    """
    _, num_classes = class_conditional(transformer)
    conditions = list(conditions)
    if not conditions:
        raise ConfigError("no class ids given; give at least one")
    for label in conditions:
        if not 0 <= label < num_classes:
            raise ConfigError(f"class id {label} is out of range; this model knows 0 to {num_classes - 1}")
    limit = getattr(scheduler.config, "num_train_timesteps", None)
    if not isinstance(limit, int) or not hasattr(scheduler, "init_noise_sigma"):
        raise ModelError(f"{type(scheduler).__name__} makes no noise for a DiT; give a scheduler such as DDIMScheduler")
    if not 1 <= num_inference_steps <= limit:
        raise ConfigError(f"num_inference_steps is {num_inference_steps}; this scheduler allows 1 to {limit}")
    return conditions


def set_timesteps(scheduler: Any, num_inference_steps: int) -> tuple[float, ...]:
    """Prepare a scheduler for a run; returns the timesteps, one for each call of the model.

    A scheduler of second order calls the model twice a step: 2 n - 1 times for n inference steps.
    """
    scheduler.set_timesteps(num_inference_steps)
    return timesteps_of(scheduler)


def timesteps_of(scheduler: Any) -> tuple[float, ...]:
    """Read the timesteps of a scheduler that is prepared for a run: whole ones as int, others as float."""
    return tuple(plain_timestep(timestep) for timestep in torch.as_tensor(scheduler.timesteps).tolist())


def plain_timestep(timestep: Any) -> float:
    """Convert a timestep to an int if it is whole, else to a float: equal values are equal, as is their text."""
    value = float(timestep)
    return int(value) if value.is_integer() else value


def check_gains(compensation: Compensation, steps: int, channels: int) -> None:
    """Refuse a compensation whose gains cannot be applied to a run, not even if it is forced upon it.

    Raises:
        ConfigError: the run has other channels, or more steps than there are gains.
    """
    known, of_channels = compensation.gain.shape
    if of_channels != channels or known < steps:
        raise ConfigError(
            f"the variance compensation has gains for {known} steps and {of_channels} channels; this run has {steps} "
            f"steps and {channels} channels (fit it for this run)"
        )


@dataclass(frozen=True, eq=False)
class _Request:
    """Hold what one call of :func:`sample_latents` is to do."""

    transformer: Any
    scheduler: Any
    guidance_scale: float
    compensation: Compensation | None
    force_compensation: bool
    corrector: Corrector | None  # in place of a compensation
    callback: Callable[[int, float, torch.Tensor], None] | None
    generators: Sequence[torch.Generator]
    device: torch.device

    def why_no_graph(self) -> str | None:
        """Say why these steps can't be replayed from one CUDA graph, or None."""
        reason = why_not_plain_ddim(self.scheduler)
        if reason is not None:
            return reason
        if self.callback is not None or self.corrector is not None:
            return "a callback or a corrector of your own runs in every step"
        return why_no_run_graph(self.transformer, self.device)

    def key(self) -> Hashable:
        """Return what a graph of these steps depends on beside shapes, labels, noise and the layers."""
        cache = get_cache(self.transformer)
        scheduler = self.scheduler
        coefficients = (scheduler.alphas_cumprod.numpy().tobytes(), float(scheduler.final_alpha_cumprod))
        run = (repr(sorted(scheduler.config.items())), tuple(scheduler.timesteps.tolist()), self.guidance_scale)
        features = None if cache is None else (cache.config, cache.compensation)
        compensation = None if self.compensation is None else self.compensation.key()
        return (*run, *coefficients, features, compensation, self.force_compensation)


class _Loop:
    """Take all steps of a run, from initial latents and conditions to the last latents.

    What the steps read on the device is made with the loop: before a CUDA graph is captured, which keeps it.
    """

    def __init__(self, run: _Request) -> None:
        scheduler, compensation = run.scheduler, run.compensation
        if compensation is not None and not run.force_compensation:
            compensation.check(describe_run(run.transformer, scheduler, run.guidance_scale))
        self.run = run
        self.timesteps = scheduler.timesteps.to(run.device)
        self.corrector = run.corrector if compensation is None else copy.deepcopy(compensation).to(run.device)
        self.coefficients: torch.Tensor | None = None  # of steps that one kernel takes
        fused = is_fused(run.transformer) and select_backend(run.device).name == "triton"
        if fused and run.corrector is None and is_affine(scheduler):
            channels = run.transformer.config.in_channels
            self.coefficients = affine_coefficients(scheduler, channels, compensation).to(run.device)
        # a compensated scheduler takes what its original takes
        step = vars(scheduler).get("step", original_class(scheduler).step)
        takes_generators = "generator" in inspect.signature(step).parameters
        self.step_kwargs = {"generator": run.generators} if takes_generators else {}

    def __call__(self, latents: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        transformer, scheduler, guidance_scale = self.run.transformer, self.run.scheduler, self.run.guidance_scale
        dtype, guided = transformer.dtype, guidance_scale > 1
        # a tensor of this run alone, by which caches and prepared conditioning know it
        family, null = class_conditional(transformer)
        conditions = torch.cat([conditions, torch.full_like(conditions, null)]) if guided else conditions.clone()
        if is_fused(transformer):
            of_steps = prepare_run(transformer, self.timesteps, conditions)
        else:
            of_steps = self.timesteps[:, None].expand(-1, len(conditions)).unbind(0)
        model_input = None
        for step, (timestep, timesteps) in enumerate(zip(scheduler.timesteps, of_steps, strict=True)):
            if model_input is None:
                model_input = scheduler.scale_model_input(latents, timestep).to(dtype)
                model_input = torch.cat([model_input, model_input]) if guided else model_input
            given = {"timestep": timesteps, family.run_key: conditions}
            noise_pred = transformer(model_input, **given, return_dict=False)[0]
            if self.coefficients is not None:
                scale = guidance_scale if guided else None
                latents, model_input = guided_step(noise_pred.to(dtype), latents, self.coefficients[step], scale)
            else:
                latents, model_input = self.step(step, timestep, noise_pred, latents), None
            if self.run.callback is not None:
                self.run.callback(step, plain_timestep(timestep), latents)
                model_input = None  # it may have written to the latents
        return latents

    def step(self, step: int, timestep: torch.Tensor, noise_pred: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        guidance_scale, corrector = self.run.guidance_scale, self.corrector
        noise_pred = noise_pred[:, : latents.shape[1]].float()  # DiT-XL/2's variances are not used here
        if guidance_scale > 1:
            cond, uncond = noise_pred.chunk(2)
            noise_pred = uncond + guidance_scale * (cond - uncond)
        if corrector is not None:
            noise_pred = corrector.noise(step, noise_pred)
        stepped = self.run.scheduler.step(noise_pred, timestep, latents, return_dict=False, **self.step_kwargs)
        latents = stepped[0]
        return latents if corrector is None else corrector.sample(step, latents)


@older_names
@checked
@torch.inference_mode()
def sample_latents(
    transformer: Model,
    scheduler: Annotated[Any, Scheduler],
    conditions: Integers,
    *,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 1.5,
    seeds: Seeds,
    callback: Callable[[int, float, torch.Tensor], None] | None = None,
    compensation: Compensation | None = None,
    force_compensation: bool = False,
    corrector: Corrector | None = None,
    cuda_graph: bool = False,
) -> torch.Tensor:
    """Denoise one latent image per class label: ``[B, C, H, W] float32`` on the transformer's device.

    Each step computes ``ε = ε_uncond + guidance_scale · (ε_cond - ε_uncond)`` (classifier-free guidance, Ho and
    Salimans 2022; without the unconditional rows when ``guidance_scale <= 1``) and calls ``scheduler.step``. On a GPU a
    fused model takes a step of a plain ``DDIMScheduler``, guidance and compensation included, in one kernel
    (:func:`qandc_kernels.guided_step`), which is the same to rounding.

    Args:
        transformer: a diffusers ``DiTTransformer2DModel``, plain, quantized or cached.
        scheduler: a diffusers scheduler; its step state is overwritten.
        conditions: class ids, ``[B]`` integers.
        num_inference_steps: 1 to the scheduler's number of training timesteps. Where a scheduler calls the model more
            than once a step (Heun), what counts steps counts calls: the callback, the schedule of a cache, gains.
        guidance_scale: a finite number >= 0.
        seeds: one per image; initial and step noise of image ``i`` come from ``seeds[i]`` alone.
        callback: called as ``callback(step, timestep, latents)`` after every step; a whole timestep is an int.
        compensation: variance compensation (:func:`qandc.fit_compensation`): applied to the guided noise prediction, or
            to the latents that ``scheduler.step`` returns, before the next step sees them.
        force_compensation: apply it also to a run it was not fitted for.
        corrector: anything else that changes predictions and latents at these two points.
        cuda_graph: replay all steps from one CUDA graph, which the first call with these settings captures (in the time
            of a few runs; two graphs are kept). For a fused transformer and a plain ``DDIMScheduler``, without callback
            or corrector of your own; otherwise the steps are taken as usual and the reason is logged. An attached
            cache does not count the steps of a replay.

    Raises:
        ConfigError: a setting is outside the range above, the lengths of labels and seeds differ, the schedule of an
            attached cache has another number of steps or other timesteps, or the compensation was fitted for another
            run, has gains for other channels or, forced, for fewer steps.
        DataError: the latents came out NaN or infinite; or a layer with a static range, in a block that is not
            compiled, was given NaN.
    """
    conditions = check_sampling(transformer, scheduler, conditions, num_inference_steps, guidance_scale)
    if len(seeds) != len(conditions):
        raise ConfigError(f"{len(conditions)} class ids need as many seeds; got {len(seeds)}")
    timesteps = set_timesteps(scheduler, num_inference_steps)
    cache = get_cache(transformer)
    if cache is not None and not cache.paused:
        cache.config.check_run(timesteps)
    from diffusers.utils.torch_utils import randn_tensor

    config = transformer.config
    # diffusers' own property walks through all modules, which takes as long as a step; fused, all are in one place
    device = next(transformer.parameters()).device if is_fused(transformer) else transformer.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (len(conditions), config.in_channels, config.sample_size, config.sample_size)
    latents = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    ids = torch.tensor(conditions, device=device)

    if compensation is not None:
        if corrector is not None:
            raise ConfigError("give compensation or corrector, not both: they change the same values")
        check_gains(compensation, len(timesteps), config.in_channels)
    latents = latents * scheduler.init_noise_sigma
    run = _Request(
        transformer,
        scheduler,
        guidance_scale,
        compensation,
        force_compensation,
        corrector,
        callback,
        generators,
        device,
    )
    why_no_graph = run.why_no_graph() if cuda_graph else None
    if why_no_graph is not None:
        logger.warning("the run is no CUDA graph: %s", why_no_graph)
    lower_nan_flags(transformer)
    if cuda_graph and why_no_graph is None:
        latents = run_as_graph(transformer, lambda: _Loop(run), (latents, ids), run.key())
    else:
        latents = _Loop(run)(latents, ids)
    if not torch.isfinite(latents).all():
        raise DataError(
            f"the latents hold NaN or inf after {num_inference_steps} steps with guidance_scale {guidance_scale} in "
            f"{str(transformer.dtype).removeprefix('torch.')}; try a lower guidance_scale or another dtype, and check "
            "the weights"
        )
    layer = raised_nan_flag(transformer)
    if layer is not None:
        raise DataError(
            f"{layer} was given NaN, which its static range hides: the latents are finite and wrong; look for an "
            f"overflow before it (in {str(transformer.dtype).removeprefix('torch.')}; try bfloat16 or float32)"
        )
    return latents


def _placement(vae: Any) -> tuple[torch.device, torch.dtype]:
    """Find the device and the dtype in which a decoder takes latents."""
    first = getattr(vae, "post_quant_conv", None)
    if first is None or any(hasattr(module, "_diffusers_hook") for module in (vae, first)):
        return vae.device, vae.dtype
    return first.weight.device, first.weight.dtype  # the same without a walk through all modules, as long as a step


@checked
@torch.inference_mode()
def decode_latents(vae: Model, latents: torch.Tensor) -> torch.Tensor:
    """Compute ``decode(latents / scaling_factor)``: images ``[B, channels, H, W] float32`` on the CPU, in [-1, 1].

    Raises:
        ModelError: no autoencoder of diffusers.
        DataError: the latents are not ``[B, latent_channels, H, W]`` finite floating-point numbers.
    """
    channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    if channels is None or not hasattr(vae, "decode"):
        raise ModelError(
            f"latents are decoded by an autoencoder of diffusers; got {type(vae).__name__} (pass pipe.vae)"
        )
    shaped = latents.ndim == 4 and latents.shape[1] == channels and latents.numel()
    if not shaped or not latents.is_floating_point() or not torch.isfinite(latents).all():
        raise DataError(
            f"latents must be [B, {channels}, H, W] finite floating-point numbers; got {list(latents.shape)} of "
            f"{latents.dtype}, or NaN or inf among them"
        )
    latents = latents.to(*_placement(vae)) / vae.config.scaling_factor
    return vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1).cpu()
