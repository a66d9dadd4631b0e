"""``fuse_dit``: a quantized, calibrated DiT that runs on fused kernels and CUDA graphs, otherwise the same model.

As with the feature cache, the model is not forked: while fused it is an instance of a subclass of its own class that
overrides ``forward``. Attributes, parameters and state-dict keys stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qandc.cache import detached_cache, get_cache
from qandc.caching.feature_cache import Action, FeatureCache
from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.fusable import (
    BLOCK_LAYERS,
    Watch,
    check_ranges,
    is_batchable,
    is_graphable,
    is_plain_embedding,
    why_not_block,
    why_not_output,
)
from qandc.fusion.fused_step import FusedBlock, FusedStep, Kept
from qandc.fusion.graphs import GraphCache
from qandc.quantization.conversion import quant_layers
from qandc.quantization.ranges import StepRanges
from qandc.support.arguments import Model, checked
from qandc.support.attach import Attachment, class_before, derived_class, original_class
from qandc_kernels import select_backend

__all__ = ["FUSED", "fuse_dit", "is_fused", "prepare_run", "unfuse_dit", "why_not_now"]

logger = logging.getLogger(__name__)

FUSED = "_qandc_fused"  # the attribute that holds what fuse_dit knows of a model

LARGEST_RUN = 2 << 30  # bytes of conditioning computed ahead
RUN_GRAPHS = 2  # each may hold that much, and the features of a cache


class _Fused(Attachment):
    """The state of a fused transformer: a :class:`FusedStep` for the layers as they are now, and graphs of it."""

    def __init__(self, cuda_graphs: bool, ranges: StepRanges | None) -> None:
        self.cuda_graphs = cuda_graphs
        self.ranges = ranges
        self.graphs = GraphCache()
        self.run_graphs = GraphCache(RUN_GRAPHS, self.graphs.turn)
        self.launching: int | None = None  # the thread that launches kernels one by one, within a graph of a whole run
        self.run: _Run | None = None
        self.reasons: list[str | None] = []
        self.output_reason: str | None = None
        self.graphable = True
        self._step: FusedStep | None = None
        self._watch: Watch | None = None
        self._said: set[str] = set()

    def __deepcopy__(self, memo: Any) -> _Fused:
        return _Fused(self.cuda_graphs, self.ranges)  # a copy of the model builds its own

    def __reduce__(self) -> tuple[Any, ...]:
        return _Fused, (self.cuda_graphs, self.ranges)

    def say(self, reason: str) -> None:
        """Once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("fuse_dit: %s", reason)

    def drop(self) -> None:
        """Forget what was built; the next forward builds it again."""
        self._step = self._watch = self.run = None
        self.graphs.clear()
        self.run_graphs.clear()

    def inspect(self, transformer: Any) -> None:
        """Find out which blocks can run fused."""
        blocks = list(transformer.transformer_blocks)
        prefixes = [f"transformer_blocks.{i}." for i in range(len(blocks))]
        self.reasons = [why_not_block(block, p, self.ranges) for block, p in zip(blocks, prefixes, strict=True)]
        self.output_reason = why_not_output(transformer, self.ranges)

    def step(self, transformer: Any, reusing: bool = False) -> FusedStep | None:
        """Built anew whenever layers have changed since; None where no block can run fused.

        The reuse steps of a cache take the layers as their compute step found them.
        """
        if reusing and self._step is not None:
            return self._step
        if self._step is None or self._watch is None or not self._watch.unchanged():
            self.drop()
            self.inspect(transformer)
            for reason in dict.fromkeys(r for r in self.reasons if r is not None):
                self.say(f"{self.reasons.count(reason)} blocks run unfused: {reason}")
            if all(reason is not None for reason in self.reasons):
                return None
            batched = is_batchable(list(transformer.transformer_blocks))
            plain_embedding = is_plain_embedding(transformer.pos_embed)
            fused = [reason is None for reason in self.reasons]
            self._step = FusedStep(
                transformer, fused, self.output_reason is None, batched, plain_embedding, self.ranges
            )
            self.graphable = all(fused) and batched and is_graphable(transformer)
            if self.cuda_graphs and not self.graphable:
                self.say("no CUDA graphs, as parts of the model run unfused")
            self._watch = Watch(transformer)  # only now: building has moved some weights together
        return self._step

    def nan_flags(self) -> dict[str, torch.Tensor]:
        """Layer name to the flag of the fused kernel that feeds it, for the step that is built."""
        if self._step is None:
            return {}
        return {
            f"transformer_blocks.{i}.attn1.to_out.0": block.nan_flag
            for i, block in enumerate(self._step.blocks)
            if isinstance(block, FusedBlock)
        }

    def covers_all(self) -> bool:
        """Tell whether fused kernels run every quantized layer."""
        return self._step is not None and self.graphable and self.output_reason is None

    def runs(self, name: str) -> bool:
        """Tell whether fused kernels run the layer of this name."""
        how = None if self._step is None else self.kernel_of(name)
        return how is not None and how[0] == "fused"

    def kernels_of(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        self.inspect(model)
        found = {name: self.kernel_of(name) for name in quant_layers(model)}
        return {name: how for name, how in found.items() if how is not None}

    def kernel_of(self, name: str) -> tuple[str, str] | None:
        parts = name.split(".", 2)
        if parts[0] == "transformer_blocks" and parts[2] in BLOCK_LAYERS:
            reason = self.reasons[int(parts[1])]
        elif name == "proj_out_2":
            reason = self.output_reason
        else:
            return None
        return ("fused", "one of seven launches a block") if reason is None else ("unfused", reason)


@dataclass(frozen=True)
class _Run:
    """Conditioning computed ahead for the steps whose timestep and labels are these very tensors."""

    timesteps: tuple[torch.Tensor, ...]
    class_labels: torch.Tensor
    modulations: torch.Tensor
    final: torch.Tensor

    def find(self, timestep: Any, class_labels: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if class_labels is self.class_labels and batch == len(class_labels):
            for i, known in enumerate(self.timesteps):
                if timestep is known:
                    return self.modulations[i], self.final[i]
        return None


class _FusedTransformer(nn.Module):
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        fused: _Fused = getattr(self, FUSED)
        cache = get_cache(self)
        reason = why_not_now(self, hidden_states, timestep, class_labels, cross_attention_kwargs)
        if reason is not None:
            fused.say(f"the model runs unfused: {reason}")
            step = None
        else:
            # weights prepared in inference mode could not be used outside of it
            with torch.inference_mode(False), torch.no_grad():
                step = fused.step(self, cache is not None and cache.plan.action is Action.REUSE)
            if step is not None and cache is not None and not fused.graphable:
                fused.say("the model runs unfused: with a feature cache all of it must be fusable")
                step = None
        if step is None:
            return super().forward(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
        assert timestep is not None
        assert class_labels is not None
        with torch.inference_mode(False), torch.no_grad():
            output = _run(fused, step, hidden_states, timestep, class_labels, cache)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        getattr(self, FUSED).drop()  # .to() replaces tensors that the step and its graphs hold
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        getattr(self, FUSED).drop()  # called also where a module that holds this one is loaded
        super()._load_from_state_dict(*args, **kwargs)


def why_not_now(
    transformer: Any, hidden_states: Any, timestep: Any, class_labels: Any, cross_attention_kwargs: Any
) -> str | None:
    """Why this call must take the unfused way, or None."""
    device = hidden_states.device
    backend = select_backend(device)
    if backend.name != "triton":
        return f"on {device} there are no fused kernels ({backend.reason})"
    if transformer.training:
        return "it is in training mode; call eval()"
    if timestep is None or class_labels is None or cross_attention_kwargs is not None:
        return "it was called without timestep and class_labels, or with cross_attention_kwargs"
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        return "its input carries a gradient, which fused kernels do not pass on"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on; convert the model to the dtype you want instead"
    batch = len(hidden_states)
    if class_labels.dtype not in (torch.int32, torch.int64) or class_labels.shape not in ((batch,), (1,)):
        return f"class_labels are {class_labels.dtype} {tuple(class_labels.shape)}, not one integer per row"
    if not isinstance(timestep, torch.Tensor) or timestep.shape not in ((batch,), (1,)):
        return "timestep is no tensor with one value, or one per row"
    return None


def _run(
    fused: _Fused,
    step: FusedStep,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    cache: FeatureCache | None,
) -> torch.Tensor:
    batch = latents.shape[0]
    ahead = None if fused.run is None else fused.run.find(timestep, class_labels, batch)
    # float32 as the embedder makes of it; expanded as broadcasting would
    timestep = timestep.to(latents.device, torch.float32).expand(batch)
    class_labels = class_labels.to(torch.int64).expand(batch)
    kind, function, extra = _function(step, latents, ahead, cache)
    inputs = (latents, timestep, class_labels, *extra)
    graphs = latents.is_cuda and fused.cuda_graphs and fused.graphable and batch > 0
    graphs = graphs and fused.launching != threading.get_ident()
    if graphs and not torch.cuda.is_current_stream_capturing():
        return fused.graphs(function, inputs, kind=kind)
    with torch.cuda.device(latents.device) if latents.is_cuda else contextlib.nullcontext():
        return function(*inputs)


def _function(
    step: FusedStep,
    latents: torch.Tensor,
    ahead: tuple[torch.Tensor, torch.Tensor] | None,
    cache: FeatureCache | None,
) -> tuple[tuple[Any, ...], Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    """What to run, a key for its graph, and its inputs beside latents, timestep and labels."""
    kept, weights = None, None
    if cache is not None and cache.plan.action is not Action.COMPUTE:
        store = cache.store(step.tokens_of(latents), latents.dtype, latents.device)
        kept, weights = Kept(store, cache.config.mode != "block", cache.plan.at), cache.weights(latents.device)
    if cache is None or kept is None or cache.plan.action is Action.STORE:
        key = (ahead is not None, kept and (kept.store.serial, kept.at))
        function = step if ahead is None else step.prepared
        return key, function if kept is None else functools.partial(function, kept=kept), ahead or ()
    named = {
        "weights": weights,
        "modulations": ahead[0] if ahead is not None and kept.branches else None,
        "final": None if ahead is None else ahead[1],
    }
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    missing = dict.fromkeys(named.keys() - given.keys())

    def reuse(
        latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, *extra: torch.Tensor
    ) -> torch.Tensor:
        return step.reuse(latents, timestep, labels, kept, **dict(zip(given, extra, strict=True)), **missing)

    return ("reuse", kept.store.serial, *given), reuse, tuple(given.values())


@checked
def fuse_dit(transformer: nn.Module, *, cuda_graphs: bool = True, step_ranges: StepRanges | None = None) -> Any:
    """Run a quantized, calibrated ``DiTTransformer2DModel`` on fused kernels, in the unmodified ``DiTPipeline`` too.

    A block becomes seven launches without an int32 or a 16-bit copy of int8 data in between, the conditioning of all
    blocks a few batched products, a forward one CUDA graph for each batch size and resolution (at most 8 are kept).
    Results equal those of the unfused model to rounding. Weights are used where they are, those of q, k, v and of the
    adaLN layers become parts of larger tensors; no weight is stored twice.

    A block that can't run fused (a layer is not quantized or has no static range, activations of fewer than 8 bits,
    hooks, LoRA, parametrizations, another attention processor) runs as before, then without CUDA graphs, and
    ``quantization_report`` says why. On a CPU, under autocast and in training mode the whole model does, and logs it.
    Changes to modules, hooks, ranges, dtype or device are noticed; writing into a tensor of a layer need not be, unless
    ``load_state_dict`` of the transformer, or of a module that holds it, does so.

    Args:
        transformer: a diffusers DiT after :func:`qandc.quantize_model` and :func:`qandc.calibrate`; changed in place.
        cuda_graphs: False launches kernels one by one.
        step_ranges: activation ranges that change from step to step, instead of those in the layers.

    Returns:
        ``transformer``. :func:`unfuse_dit` makes it again what it was.

    Raises:
        ModelError: not a DiT, not quantized, no block calibrated, in training mode, or fused already.
        ConfigError: ``step_ranges`` names layers that are not there, or not one range per timestep.
    """
    from diffusers import DiTTransformer2DModel

    dit_class: Any = DiTTransformer2DModel
    if not isinstance(transformer, dit_class):
        raise ModelError(
            f"fuse_dit knows diffusers' DiTTransformer2DModel; got {type(transformer).__name__} "
            "(of a pipeline, pass pipe.transformer; of a compiled model, the model before torch.compile)"
        )
    if FUSED in transformer.__dict__:
        raise ModelError("this transformer is fused already; call unfuse_dit(transformer) first")
    if "forward" in transformer.__dict__:
        raise ModelError(
            "forward of this transformer was replaced (by accelerate's offload hooks, for example); fuse first"
        )
    if original_class(transformer).forward is not dit_class.forward:
        raise ModelError(f"{type(transformer).__name__} has a forward of its own, which fuse_dit does not know")
    if transformer.training:
        raise ModelError("this transformer is in training mode; call transformer.eval() first")
    layers = quant_layers(transformer)
    if not layers:
        raise ModelError("this transformer is not quantized; call quantize_model and calibrate first")
    if step_ranges is not None:
        check_ranges(step_ranges, layers)
    fused = _Fused(cuda_graphs, step_ranges)
    fused.inspect(transformer)
    if all(reason is not None for reason in fused.reasons):
        raise ModelError(f"no block of this transformer can run fused: {fused.reasons[0]}")
    if step_ranges is not None:
        for name in step_ranges.scales:
            how = fused.kernel_of(name)
            if how is None or how[0] != "fused":
                why = how[1] if how is not None else "it runs as it is in any case"
                raise ConfigError(f"step_ranges names {name}, which does not run fused ({why}); leave it out")
    with detached_cache(transformer):  # fusion is the inner of the two
        base: Any = type(transformer)
        setattr(transformer, FUSED, fused)
        transformer.__class__ = derived_class(_FusedTransformer, base)
    return transformer


def is_fused(transformer: nn.Module) -> bool:
    return FUSED in transformer.__dict__


@checked
def prepare_run(transformer: Model, timesteps: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute the conditioning of a whole denoising run ahead, in a few large products instead of some in each step.

    :func:`qandc.sample_latents` does so by itself. Otherwise a step computes its own, in part beside its first blocks.

    Args:
        transformer: a fused DiT.
        timesteps: ``[S]``, of the steps to come, in any order, on any device.
        class_labels: ``[B]`` on the device of the model.

    Returns:
        S tensors ``[B]``. A step looks its conditioning up if its ``timestep`` is one of them and its ``class_labels``
        the tensor given here, both by identity; they must not be written to. Kept until the next run; at most 2 GiB
        (S · B · 0.4 MB for DiT-XL/2 in bf16), beyond which nothing is prepared.

    Raises:
        ModelError: the transformer is not fused.
        DataError: timesteps or labels are not what is said above.
    """
    fused = transformer.__dict__.get(FUSED)
    if fused is None:
        raise ModelError(f"this {type(transformer).__name__} is not fused; call fuse_dit first")
    shapes = (*timesteps.shape, *class_labels.shape)
    if not timesteps.ndim == class_labels.ndim == 1 or class_labels.is_floating_point() or max(shapes) > 1 << 20:
        raise DataError(f"timesteps [S] and class_labels, [B] integers, are needed; got sizes {list(shapes)}")
    if timesteps.is_cpu and not torch.isfinite(timesteps).all():  # elsewhere looking would wait
        raise DataError("timesteps hold NaN or inf; give those of the steps to come")
    with torch.inference_mode(False), torch.no_grad():
        on_device = timesteps.to(class_labels.device, torch.float32)
        steps = tuple(on_device[:, None].repeat(1, len(class_labels)).unbind(0))
        fused.run = None
        step = None
        if steps and len(class_labels) and why_not_now(transformer, class_labels, steps[0], class_labels, None) is None:
            step = fused.step(transformer)
        if step is None:
            return steps
        dtype = transformer.dtype
        needed = step.conditioning.bytes_of_run(len(steps), len(class_labels), dtype)
        if needed > LARGEST_RUN:
            logger.info("conditioning of this run would take %.1f GiB: computed step by step", needed / 2**30)
            return steps
        fused.run = _Run(steps, class_labels, *step.conditioning.of_run(on_device, class_labels, dtype))
    return steps


@checked
def unfuse_dit(transformer: nn.Module) -> Any:
    """Undo :func:`fuse_dit`.

    Raises:
        ModelError: the transformer is not fused, or another tool has wrapped it since.
    """
    if FUSED not in transformer.__dict__:
        raise ModelError(f"this {type(transformer).__name__} is not fused")
    with detached_cache(transformer):
        before = class_before(transformer, _FusedTransformer)
        if "forward" in transformer.__dict__ or before is None:
            raise ModelError(
                "this transformer was wrapped after fuse_dit (by accelerate's offload hooks, for example); undo that "
                "first"
            )
        transformer.__class__ = before
        transformer.__dict__.pop(FUSED).drop()  # a graph of a run holds what holds it
    return transformer
