"""Run a quantized transformer on the fused kernels of its family and CUDA graphs: :func:`fuse`.

As with the feature cache, the model is not forked: while fused it is an instance of a subclass of its own class that
overrides ``forward``. Attributes, parameters and state-dict keys stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qandc.cache import check_planned, detached_cache, get_cache
from qandc.caching.plan import Action, Plan
from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.blocks import FusedBlocks, attach_blocks, detach_blocks, fuses_blocks, why_not_here
from qandc.fusion.graphs import GraphCache
from qandc.models import FAMILIES, Family, family_of, older_names
from qandc.models.family import Program, arguments_of, forward_of
from qandc.quantization.conversion import quant_layers
from qandc.quantization.ranges import StepRanges, check_step_ranges
from qandc.support.arguments import Model, checked
from qandc.support.attach import Attachment, attach, detach

__all__ = ["Fused", "fuse", "fuse_dit", "is_fused", "prepare_run", "unfuse", "unfuse_dit"]

logger = logging.getLogger(__name__)

LONGEST = 1 << 20  # steps, and samples, of a run whose conditioning is computed ahead
RUN_GRAPHS = 2  # each may hold conditioning of that run, and the features of a cache


class Fused(Attachment):
    """Hold the state of a fused transformer: a program for the layers as they are now, and graphs of it."""

    attribute = "_qandc_fused"

    def __init__(self, family: Family, cuda_graphs: bool, ranges: StepRanges | None) -> None:
        self.family = family
        self.cuda_graphs = cuda_graphs
        self.ranges = ranges
        self.graphs = GraphCache()
        self.run_graphs = GraphCache(RUN_GRAPHS, self.graphs.lock)
        self.launching: int | None = None  # the thread that launches kernels one by one, within a graph of a whole run
        self.run: _PreparedRun | None = None
        self.built: Program | None = None
        self._said: set[str] = set()

    @property
    def program(self) -> type[Program]:
        assert self.family.program is not None  # fuse has seen to it
        return self.family.program

    def __deepcopy__(self, memo: Any) -> Fused:
        return Fused(self.family, self.cuda_graphs, self.ranges)  # a copy of the model builds its own

    def __reduce__(self) -> tuple[Any, ...]:
        return Fused, (self.family, self.cuda_graphs, self.ranges)

    def say(self, reason: str) -> None:
        """Log a reason once."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("fuse: %s", reason)

    def drop(self) -> None:
        """Forget what was built; the next forward builds it again."""
        self.built = self.run = None
        self.graphs.clear()
        self.run_graphs.clear()

    def step(self, transformer: Any, reusing: bool = False) -> Any:
        """Return the program, built anew whenever layers have changed since; None where no layer can run fused.

        Reuse steps of a cache take the program of their compute step and do not look for changes.
        """
        if self.built is not None and (reusing or self.built.unchanged()):
            return self.built
        self.drop()
        reasons = self.program.why_not(transformer, self.ranges)
        for reason, count in Counter(reasons.values()).items():
            if reason is not None:
                self.say(f"{count} layers run unfused: {reason}")
        if None not in reasons.values():
            return None
        self.built = self.program(transformer, self.ranges)
        if self.cuda_graphs and not self.built.graphable:
            self.say("no CUDA graphs, as parts of the model run unfused")
        return self.built

    def kernels_of(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        reasons, layers = self.program.why_not(model, self.ranges), quant_layers(model)
        found = {name: reasons[name] for name in layers if name in reasons}
        return {name: ("unfused", why) if why else ("fused", "in a fused program") for name, why in found.items()}


@dataclass(frozen=True)
class _PreparedRun:
    """Hold what was computed ahead for the steps whose timestep and conditions are these very tensors."""

    timesteps: tuple[torch.Tensor, ...]
    conditions: torch.Tensor
    tables: tuple[torch.Tensor, ...]  # [S, ...] each

    def find(self, timestep: Any, conditions: Any, batch: int) -> tuple[torch.Tensor, ...]:
        """Return the part of a step, or nothing."""
        if conditions is self.conditions and batch == len(conditions):
            for i, known in enumerate(self.timesteps):
                if timestep is known:
                    return tuple(table[i] for table in self.tables)
        return ()


class _FusedTransformer(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fused: Fused = getattr(self, Fused.attribute)
        cache, call = get_cache(self), arguments_of(self, args, kwargs)
        plan = Plan() if cache is None else cache.plan
        latents = call.get("hidden_states")
        if not isinstance(latents, torch.Tensor):
            return super().forward(*args, **kwargs)  # which says what is missing
        reason = why_not_here(self, latents.device) or fused.program.why_not_call(call)
        if reason is None and torch.is_grad_enabled() and latents.requires_grad:
            reason = "its input carries a gradient, which fused kernels do not pass on"
        step = None
        # weights prepared in inference mode could not be used outside of it
        with torch.inference_mode(False), torch.no_grad():
            if reason is None:
                step = fused.step(self, plan.action is Action.REUSE)
            if step is not None and cache is not None and not step.graphable:
                step, reason = None, "with a feature cache all of it must be fusable"
            if step is not None:
                output = _run(self, fused, step, call, plan)
        if step is None:
            if reason is not None:
                fused.say(f"the model runs unfused: {reason}")
            return super().forward(*args, **kwargs)
        return step.output(output) if call.get("return_dict", True) else (output,)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        getattr(self, Fused.attribute).drop()  # .to() replaces tensors that the program and its graphs hold
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        getattr(self, Fused.attribute).drop()  # called also where a module that holds this one is loaded
        super()._load_from_state_dict(*args, **kwargs)


def _run(transformer: Any, fused: Fused, step: Program, call: Any, plan: Plan) -> torch.Tensor:
    inputs = step.inputs(call)
    latents = inputs[0]
    ahead: tuple[torch.Tensor, ...] = ()
    if fused.run is not None:
        ahead = fused.run.find(call["timestep"], call[fused.family.run_key], len(latents))
    if plan.action is not Action.COMPUTE:
        plan.make(step.features_shape(latents), latents.dtype, latents.device)
    launch = step.reuse(ahead, plan) if plan.action is Action.REUSE else step.compute(ahead, plan)
    inputs = (*inputs, *launch.extra)
    graphs = latents.is_cuda and fused.cuda_graphs and step.graphable and len(latents) > 0
    graphs = graphs and fused.launching != threading.get_ident()
    if graphs and not torch.cuda.is_current_stream_capturing():
        return fused.graphs.run(launch.function, inputs, kind=launch.kind)[0]
    with torch.cuda.device(latents.device) if latents.is_cuda else contextlib.nullcontext():
        return launch.function(*inputs)


@checked
def fuse(transformer: nn.Module, *, cuda_graphs: bool = True, step_ranges: StepRanges | None = None) -> Any:
    """Run a quantized DiT, FLUX.1, Chroma, Qwen-Image, SD3.5 or PixArt on fused kernels, in its pipeline.

    A block with static ranges becomes seven launches (of the others a few more) without an int32 or a 16-bit copy of
    int8 data in between; without them tokens get a scale each, which behind attention and GELU takes a pass. Of DiT the
    conditioning of all blocks becomes a few batched products, and a forward one CUDA graph for each batch size and
    resolution (at most 8 are kept); of the others blocks alone are fused, and :func:`qandc.graph` makes the forward a
    graph. Results equal those of the unfused model to rounding. Weights are used where they are, those of q, k, v and
    of DiT's adaLN layers become parts of larger tensors; no weight is stored twice.

    A block that can't run fused (a layer is not quantized, activations of fewer than 8 bits, hooks, LoRA,
    parametrizations, another attention processor, arguments that it does not read) runs as before, in DiT then without
    CUDA graphs, and ``quantization_report`` says why. On a CPU, under autocast, with global hooks of modules and in
    training mode the whole model does, and logs it.
    Changes to modules, hooks, ranges, dtype or device are noticed; writing into a tensor of a layer need not be, unless
    ``load_state_dict`` of the transformer, or of a module that holds it, does so.

    Args:
        transformer: after :func:`qandc.quantize_model`, and, for static ranges, :func:`qandc.calibrate`; it is changed.
        cuda_graphs: of a DiT, False launches kernels one by one.
        step_ranges: of a DiT, activation ranges that change from step to step, instead of those in the layers.

    Returns:
        ``transformer``. :func:`unfuse` makes it again what it was.

    Raises:
        ModelError: there are no fused kernels for this class, it is not quantized, no block can run fused, it is in
            training mode, or fused already.
        ConfigError: ``step_ranges`` names layers that are not there, or not one range per timestep; or the attached
            cache decides at each step whether to compute it.
    """
    family = family_of(transformer)
    if family is None or (family.program is None and not fuses_blocks(family)):
        known = " and ".join(name for name, each in FAMILIES.items() if each.program is not None or fuses_blocks(each))
        raise ModelError(
            f"there are fused kernels for diffusers' {known}; got {type(transformer).__name__} "
            "(of a pipeline, pass pipe.transformer; of a compiled model, the model before torch.compile)"
        )
    if is_fused(transformer) or FusedBlocks.of(transformer) is not None:
        raise ModelError("this transformer is fused already; call unfuse(transformer) first")
    if "forward" in transformer.__dict__:
        raise ModelError(
            "forward of this transformer was replaced (by accelerate's offload hooks, for example); fuse first"
        )
    if family.program is not None and forward_of(transformer).__qualname__ != f"{family.transformer}.forward":
        raise ModelError(f"{type(transformer).__name__} has a forward of its own, which fuse does not know")
    if transformer.training:
        raise ModelError("this transformer is in training mode; call transformer.eval() first")
    check_planned(transformer, "it cannot run on fused kernels (remove_cache first)")
    layers = quant_layers(transformer)
    if not layers:
        raise ModelError("this transformer is not quantized; call quantize_model first")
    if step_ranges is not None:
        if family.program is None:
            raise ConfigError(f"step_ranges are for a DiT; blocks of a {family.transformer} take those of their layers")
        check_step_ranges(step_ranges, layers)
    if family.program is None:
        with detached_cache(transformer):
            attach_blocks(transformer, family)
        return transformer
    reasons = family.program.why_not(transformer, step_ranges)
    if None not in reasons.values():
        raise ModelError(f"no block of this transformer can run fused: {next(iter(reasons.values()))}")
    for name in () if step_ranges is None else step_ranges.scales:
        why = reasons.get(name, "it runs as it is in any case")
        if why is not None:
            raise ConfigError(f"step_ranges names {name}, which does not run fused ({why}); leave it out")
    fused = Fused(family, cuda_graphs, step_ranges)
    with detached_cache(transformer):  # fusion is the inner of the two
        attach(transformer, _FusedTransformer, fused)
    return transformer


fuse_dit = fuse  # its name before other models could have fused kernels


def is_fused(transformer: nn.Module) -> bool:
    """Tell whether :func:`fuse` has put a program in the place of the forward of this transformer."""
    return Fused.of(transformer) is not None


@older_names
@checked
def prepare_run(transformer: Model, timesteps: torch.Tensor, conditions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute the conditioning of a whole denoising run ahead, in a few large products instead of some in each step.

    :func:`qandc.sample_latents` does so by itself. Otherwise a step computes its own, in part beside its first blocks.

    Args:
        transformer: a fused DiT.
        timesteps: ``[S]``, of the steps to come, in any order, on any device.
        conditions: class ids ``[B]`` on the device of the model.

    Returns:
        S tensors ``[B]``. A step looks its conditioning up if its timestep is one of them and its class ids the tensor
        given here, both by identity; they must not be written to. Kept until the next run; at most 2 GiB
        (S · B · 0.4 MB for DiT-XL/2 in bf16), beyond which nothing is prepared.

    Raises:
        ModelError: the transformer is not fused.
        DataError: timesteps or conditions are not what is said above.
    """
    fused = Fused.of(transformer)
    if fused is None:
        raise ModelError(f"this {type(transformer).__name__} is not fused; call fuse first")
    fused.program.check_conditions(conditions)
    if timesteps.ndim != 1 or max(len(timesteps), len(conditions)) > LONGEST:
        found = f"{list(timesteps.shape)} and {list(conditions.shape)}"
        raise DataError(f"timesteps [S] and conditions [B] of at most {LONGEST} are needed; got {found}")
    if timesteps.is_cpu and not torch.isfinite(timesteps).all():  # elsewhere looking would wait
        raise DataError("timesteps hold NaN or inf; give those of the steps to come")
    with torch.inference_mode(False), torch.no_grad():
        on_device = timesteps.to(conditions.device, torch.float32)
        steps = tuple(on_device[:, None].repeat(1, len(conditions)).unbind(0))
        fused.run = None
        if steps and len(conditions) and why_not_here(transformer, conditions.device) is None:
            step = fused.step(transformer)
            tables = () if step is None else step.prepare(on_device, conditions)
            fused.run = _PreparedRun(steps, conditions, tables) if tables else None
    return steps


@checked
def unfuse(transformer: nn.Module) -> Any:
    """Undo :func:`fuse`.

    Raises:
        ModelError: the transformer is not fused, or another tool has wrapped it since.
    """
    fused = Fused.of(transformer)
    if fused is None and FusedBlocks.of(transformer) is None:
        raise ModelError(f"this {type(transformer).__name__} is not fused")
    with detached_cache(transformer):
        if fused is None:
            detach_blocks(transformer)
            return transformer
        detach([(transformer, _FusedTransformer)], Fused.attribute, error=ModelError)
        fused.drop()  # a graph of a run holds what holds it
    return transformer


unfuse_dit = unfuse
