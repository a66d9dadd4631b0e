"""Quantize and cache all transformers of a pipeline in one call, and undo it."""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qandc.cache import apply_cache, get_cache, reset_all_caches
from qandc.caching.compensation import config_for
from qandc.caching.schedule import CacheConfig, CalibratedSchedule, cache_of, format_schedule
from qandc.errors import ConfigError, ModelError
from qandc.fusion.blocks import FusedBlocks, fuses_blocks, why_not_here
from qandc.fusion.fuse import Fused, fuse, is_fused
from qandc.fusion.model_graph import Graphed, graph
from qandc.fusion.modulations import attached, offloaded
from qandc.method.prompt_calibration import calibrate_on_prompts
from qandc.method.saved import CalibratedModel, load
from qandc.models import FAMILIES, family_of
from qandc.quantization.conversion import (
    ORIGINALS,
    QuantizationReport,
    quant_layers,
    quantization_plan,
    quantization_report,
    quantize_model,
)
from qandc.quantization.plan import conditioning_of
from qandc.quantization.ranges import StepRanges
from qandc.sampling.corrected_scheduler import compensated_scheduler
from qandc.sampling.prompts import usual_steps
from qandc.support.arguments import Steps, check_fields, checked
from qandc.support.attach import attachments, original_class
from qandc.support.results import size_text
from qandc.support.undo import Undo

__all__ = ["OptimizationPlan", "TransformerPlan", "optimize", "parts_of", "restore"]

logger = logging.getLogger(__name__)

PARTS = ("transformer", "transformer_2", "unet")  # names of what denoises in pipelines of diffusers
OPTIMIZED = "_qandc_optimized"  # attribute of a pipeline: what undoes each call, in order
INTERVAL = 3
AUTO = "auto"
UNPLANNED = "no: the cache decides while a step runs"
ADD_A_FAMILY = "docs/models.md says how a family is added"


@dataclass(frozen=True)
class TransformerPlan:
    """Say what became of one transformer of a pipeline.

    Attributes:
        name: of the part of the pipeline.
        model: its class.
        layers: all linear layers, and why some stay.
        cache: what its feature cache does; None without one.
        steps: of a run, for which a cache of any length is printed; ``optimize`` takes the pipeline's default.
        others: what else was done, or why not, by a word for it.
    """

    name: str
    model: str
    layers: QuantizationReport
    cache: CacheConfig | None
    steps: Steps
    others: Mapping[str, str]

    def __post_init__(self) -> None:
        check_fields(self)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield what is printed: a word and what it says."""
        rows, (before, after) = self.layers.layers, self.layers.total_bytes
        for (scheme, kernel, why), count in _counted((r.scheme, r.kernel, r.reason) for r in self.layers.quantized):
            yield "quantized", f"{count} of {len(rows)} linear layers, {scheme}, by {kernel} ({why})"
        left = "; ".join(f"{count} {why}" for why, count in _counted(r.reason for r in rows if not r.quantized))
        if left:
            yield "left", left
        yield "weights", f"{size_text(before)} -> {size_text(after)}, with all that is left"
        if self.cache is not None and not self.cache.planned:
            yield "cache", f"{self.cache.mode}, which decides at each step (threshold {self.cache.threshold:g})"
        elif self.cache is not None:
            schedule = self.cache.of_steps(self.cache.length or self.steps)
            kind = self.cache.mode + (f" of order {self.cache.order}" if self.cache.history > 1 else "")
            counted = f"{sum(schedule)} of {len(schedule)} steps are"
            if not self.cache.length:
                counted = f"in a run of {len(schedule)} steps {sum(schedule)} are"
            yield "cache", f"{kind}, {counted} computed (*): {format_schedule(schedule, self.cache.timesteps)}"
        yield from self.others.items()


def _counted(values: Iterable[Any]) -> Iterable[tuple[Any, int]]:
    return Counter(values).most_common()


@dataclass(frozen=True, repr=False)
class OptimizationPlan:
    """Say what :func:`optimize` did to a pipeline; ``print`` it, or have a notebook show it.

    Attributes:
        pipeline: its class.
        transformers: what became of each; their ``layers`` print as a table.
    """

    pipeline: str
    transformers: tuple[TransformerPlan, ...]

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        lines = [self.pipeline]
        for part in self.transformers:
            lines.append(f"  {part.name} ({part.model})")
            for word, text in part.rows():
                lines += textwrap.wrap(text, 118, initial_indent=f"    {word:10} ", subsequent_indent=" " * 15)
        return "\n".join(lines)


class _Optimized:
    """Hold what undoes the optimization of a pipeline; copies of the pipeline have none."""

    def __init__(self, pipe: Any, names: list[str], restorable: bool) -> None:
        self.pipe, self.restorable = pipe, restorable
        self.undos = {name: Undo(getattr(pipe, name)) for name in names}
        self.originals: dict[str, dict[str, nn.Linear]] = {name: {} for name in names}
        self.given: list[Undo] = []  # of calibrated models that took the place of the pipeline's
        self.scheduler = self.left_scheduler = getattr(pipe, "scheduler", None)
        self.left: dict[str, tuple[Any, Any]] = {}  # by name the transformer and its dtype

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def check(self) -> None:
        """Refuse to undo what cannot be, with a ModelError."""
        if not self.restorable:
            raise ModelError("optimize(restorable=False) kept no full-precision layers; load the pipeline again")
        for name, (model, _) in self.left.items():
            if getattr(self.pipe, name) is not model:
                raise ModelError(f"pipe.{name} was replaced since; put back the one that optimize left there")
        for undo in (*self.undos.values(), *self.given):
            undo.check()

    def host_bytes(self, name: str) -> int:
        """Count the bytes that are kept of a transformer: of layers, or of all of it if another took its place."""
        layers = {id(layer): layer for layer in self.originals[name].values()}
        modules = layers.values() or [self.undos[name].model]
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def settle(self) -> None:
        """Take the pipeline as it is now for what is to be undone."""
        for undo in (*self.undos.values(), *self.given):
            undo.settle()
        models = {name: getattr(self.pipe, name) for name in self.undos}
        self.left = {name: (model, getattr(model, "dtype", None)) for name, model in models.items()}
        self.left_scheduler = getattr(self.pipe, "scheduler", None)
        if not self.restorable:
            self.undos, self.originals, self.given = {}, {}, []

    def undo(self) -> None:
        """Make all transformers again what they were; what was kept goes where the quantized layers were, now gone."""
        homes: list[tuple[nn.Module, Any, Any]] = []
        keeps_scheduler = bool(self.left) and getattr(self.pipe, "scheduler", None) is not self.left_scheduler
        for part, undo in self.undos.items():
            now = getattr(self.pipe, part)
            for attachment in attachments(now):
                attachment.take_back(now)
            for name, linear in self.originals[part].items():
                layer: Any = now.get_submodule(name)
                homes.append((linear, layer.qweight.device, layer.weight_dtype_holder.dtype))
                del layer
            if now is not undo.model:
                changed = part in self.left and now.dtype != self.left[part][1]
                homes.append((undo.model, now.device, now.dtype if changed else None))
            for attachment in attachments(now):
                attachment.drop() if isinstance(attachment, Fused | Graphed) else attachment.reset()
            undo.undo()
            setattr(self.pipe, part, undo.model)
            del now
        for given in self.given:
            given.undo()
        self.left.clear()
        for module, device, dtype in homes:
            nn.Module.to(module, device=device, dtype=dtype)
        if self.scheduler is not None and not keeps_scheduler:
            self.pipe.scheduler = self.scheduler


def parts_of(pipe: Any, only: str | None = None) -> list[str]:
    """Return the names of the transformers of a pipeline, or the one that is wanted."""
    found = [name for name in PARTS if isinstance(getattr(pipe, name, None), nn.Module)]
    if isinstance(pipe, nn.Module) or not found or not hasattr(pipe, "components"):
        raise ModelError(
            f"optimize takes a pipeline of diffusers that denoises with {', '.join(PARTS)}; got {type(pipe).__name__} "
            "(of a model alone: quantize_model and apply_cache)"
        )
    if only is not None and only not in found:
        raise ConfigError(f"transformer {only!r} is none of this {type(pipe).__name__}, which has {', '.join(found)}")
    return found if only is None else [only]


def _config_of(cache: str | CacheConfig | CalibratedSchedule | None, interval: int | None) -> CacheConfig | None:
    if isinstance(cache, str):
        return cache_of(cache, interval, INTERVAL)
    if interval is not None:
        raise ConfigError("give cache_interval with the name of a cache mode; a config or schedule has its own steps")
    return cache.config() if isinstance(cache, CalibratedSchedule) else cache


@checked
def optimize(
    pipe: Any,
    w_bits: int = 8,
    a_bits: int = 8,
    cache: str | CacheConfig | CalibratedSchedule | None = "taylor",
    cache_interval: Steps | None = None,
    *,
    transformer: str | None = None,
    conditioning: str | None = AUTO,
    calibrate_on: Sequence[str] | None = None,
    calibrated: str | Path | CalibratedModel | None = None,
    compile: bool | None = None,
    offload_modulation: bool = False,
    restorable: bool = True,
    **calibration: Any,
) -> OptimizationPlan:
    """Quantize and cache the transformers of a pipeline of diffusers, in place: the whole way in one call.

    ``print`` what is returned to see what was done, and why not more. :func:`restore` undoes it. Call it before
    ``enable_model_cpu_offload``.

    Args:
        pipe: any pipeline with a ``transformer`` (Wan 2.2: both), or a ``unet``. Classes that no cache knows are
            quantized alone.
        w_bits, a_bits: as for :func:`qandc.quantize_model`.
        conditioning: scheme of modulation layers, where a model has them, as for ``quantize_model``. "auto" is "W8A16",
            weights of 8 bits, which cost wardrobe no quality (docs/wardrobe.md) and take 3 GB off FLUX.1; and None of a
            DiT, whose fused steps take them as they are.
        cache: a mode of :class:`qandc.CacheConfig`, a config or schedule, or None.
        cache_interval: with a mode, which steps are computed: every third by default.
        transformer: only this one, ``"transformer_2"`` for example; the other may be optimized by a call of its own.
        calibrate_on: prompts like those to come. Images are drawn from them, in minutes to hours, to find smoothing,
            static ranges, the steps to compute and a compensation (:func:`qandc.calibrate_on_prompts`).
        calibrated: instead of these, a directory that :func:`qandc.save` or ``qandc calibrate`` wrote, or what
            :func:`qandc.load` made of it: its transformer takes the place of the pipeline's, on the same device, in its
            bits and schemes, and what it was saved with is used. Settings without a model quantize the pipeline's own.
        compile: fuse the blocks (DiT, FLUX.1, Chroma, Qwen-Image, SD3.5, PixArt), or compile those of other models, and
            those that cannot run fused, with an adapter for example, which takes a minute at the first image; and
            replay steps from CUDA graphs. By default where the model is on a GPU.
        offload_modulation: keep the weights of modulation in host memory, where blocks are fused: 6.9 GB less of a
            Qwen-Image in 8 bits on the GPU, 3.6 in 4. The first step of each run copies them, layer by layer.
        restorable: keep what is replaced, in host memory.
        calibration: with ``calibrate_on``, other arguments of ``calibrate_on_prompts``, of which those of the
            pipeline's call are some: ``num_inference_steps=28, height=1024, pool_images=8``.

    Raises:
        ModelError: no such pipeline, it is optimized already, quantized or cached, or nothing can be quantized.
        ConfigError: a setting is none of these.
        CacheError: the model cannot be cached so; the message says how it can.

    After any error, also Ctrl-C, the pipeline is what it was.
    """
    names = parts_of(pipe, transformer)
    config = _config_of(cache, cache_interval)
    _check(pipe, names, config, calibrate_on, calibrated, calibration)
    state = _Optimized(pipe, names, restorable)
    parts = []
    try:
        for name in names:
            model = getattr(pipe, name)
            bits: dict[str, Any] = {
                "w_bits": w_bits,
                "a_bits": a_bits,
                "conditioning": _conditioning(model, conditioning),
            }
            planned, own = quantization_plan(model, w_bits, a_bits), config if family_of(model) is not None else None
            others = {} if own is config else {"no cache": _no_cache(model)}
            model.__dict__[ORIGINALS] = state.originals[name]
            try:
                if calibrated is not None:
                    found = _loaded(calibrated, name, model)
                elif calibrate_on is not None:
                    more = {**bits, **calibration, "transformer": name, "cache": own}
                    found = calibrate_on_prompts(pipe, calibrate_on, **more)
                else:
                    found = CalibratedModel(quantize_model(model, **bits))
            finally:
                del model.__dict__[ORIGINALS]
            if found.model is not model:
                if isinstance(calibrated, CalibratedModel):
                    state.given.append(Undo(found.model))
                    nn.Module.to(found.model, model.device)
                setattr(pipe, name, found.model)
                if restorable:
                    nn.Module.to(model, "cpu")
            if found.schedule is not None:
                own = config_for(found.schedule, found.features, None if config is None else config.storage_dtype)
            if calibrated is not None:
                where = "before" if isinstance(calibrated, CalibratedModel) else f"in {calibrated}"
                others["calibrated"] = _held(where, found)
            elif calibrate_on is not None:
                others["calibrated"] = _held(f"on {len(calibrate_on)} prompts", found)
            others |= _speed_up(pipe, found.model, own, compile, found.step_ranges)
            if offload_modulation:
                others["offload"] = _offloaded(found.model)
            if own is not None:
                apply_cache(found.model, config=own, compensation=found.features)
            if found.compensation is not None:
                pipe.scheduler = compensated_scheduler(pipe.scheduler, found.compensation)
            kept = f"qandc.restore(pipe); what was replaced takes {size_text(state.host_bytes(name))} of host memory"
            others["restore"] = kept if restorable else "no: restorable=False"
            layers = _with_reasons(quantization_report(found.model), planned)
            kind = original_class(model).__name__
            parts.append(TransformerPlan(name, kind, layers, own, usual_steps(pipe), others))
        for name in names:
            reset_all_caches(getattr(pipe, name))  # calibration of one transformer runs the others
    except BaseException:
        state.undo()
        raise
    state.settle()
    pipe.__dict__.setdefault(OPTIMIZED, []).append(state)
    plan = OptimizationPlan(type(pipe).__name__, tuple(parts))
    logger.info("%s", plan)
    return plan


def _conditioning(model: Any, scheme: str | None) -> str | None:
    """Return the scheme of the modulation layers of a model, or None where they stay as they are."""
    family = family_of(model)
    if scheme == AUTO:
        scheme = None if family is not None and family.program is not None else "W8A16"
    return conditioning_of(model, scheme)


def _check(
    pipe: Any, names: list[str], config: CacheConfig | None, calibrate_on: Any, calibrated: Any, calibration: Any
) -> None:
    """Refuse, before any work, arguments that contradict each other, and what was optimized before."""
    kind = type(pipe).__name__
    if calibrate_on is not None and calibrated is not None:
        raise ConfigError("give calibrate_on or calibrated, not both: prompts to calibrate on now, or what was found")
    if calibration and calibrate_on is None:
        raise ConfigError(f"{min(calibration)} is no argument of optimize without calibrate_on; leave it out")
    if calibration.get("compensation") == "samples" and len(names) > 1:
        raise ConfigError(
            f"compensation 'samples' corrects in the scheduler, and this {kind} has one for {', '.join(names)}; give "
            "'features', or 'none'"
        )
    single = "a calibrated model" if calibrated is not None else None
    if config is not None and config.length is not None:
        single = f"a schedule of {config.length} steps"
    if single and len(names) > 1:
        raise ConfigError(
            f"{single} is for one transformer, and this {kind} has {', '.join(names)}; give "
            f"transformer={names[0]!r}, or a mode and an interval"
        )
    for name in names:
        model = getattr(pipe, name)
        if hasattr(model, "_orig_mod"):
            raise ModelError(
                f"pipe.{name} was replaced by torch.compile(...); put the model inside back, pipe.{name} = "
                f"pipe.{name}._orig_mod: optimize compiles its blocks"
            )
        done = {"quantized": bool(quant_layers(model)), "cached": get_cache(model) is not None}
        if any(done.values()) or attachments(model):
            what = next((what for what, is_so in done.items() if is_so), "optimized")
            raise ModelError(
                f"pipe.{name} is {what} already; call qandc.restore(pipe) first, or load the pipeline again"
            )


def _held(where: str, found: CalibratedModel) -> str:
    """Say where a model was calibrated, and what was found beside ranges and weights."""
    held = {
        "steps to compute": found.schedule,
        "compensation of features": found.features,
        "compensation of samples": found.compensation,
        "ranges per step": found.step_ranges,
    }
    return ", ".join([where, *(what for what, value in held.items() if value is not None)])


def _loaded(calibrated: str | Path | CalibratedModel, name: str, model: Any) -> CalibratedModel:
    """Load the calibrated model that takes the place of a transformer, if it is not at hand."""
    if not isinstance(calibrated, CalibratedModel):
        return load(calibrated, device=model.device, dtype=model.dtype, base=model)
    if original_class(calibrated.model) is not original_class(model):
        raise ModelError(
            f"calibrated holds a {original_class(calibrated.model).__name__}, and pipe.{name} is a "
            f"{original_class(model).__name__}; give the model that was calibrated for this pipeline"
        )
    if attachments(calibrated.model):
        raise ModelError(
            "the calibrated model is cached, fused or in another pipeline that is optimized; load it anew, or undo that"
        )
    return calibrated


def _no_cache(model: nn.Module) -> str:
    return f"caches know {', '.join(FAMILIES)}, not {original_class(model).__name__}; {ADD_A_FAMILY}"


def _with_reasons(report: QuantizationReport, planned: QuantizationReport) -> QuantizationReport:
    """Say of layers that were left alone why, as the plan did."""
    reasons = {row.name: row.reason for row in planned.layers if not row.quantized}
    rows = (row if row.quantized else replace(row, reason=reasons.get(row.name, row.reason)) for row in report.layers)
    return QuantizationReport(tuple(rows), report.other_bytes)


def _speed_up(
    pipe: Any, model: Any, cache: CacheConfig | None, wanted: bool | None, ranges: StepRanges | None
) -> dict[str, str]:
    """Fuse, or compile and graph, what can be; returns what was done, or why not."""
    device = next(model.parameters()).device
    family = family_of(model)
    if wanted is False:
        return {"compile": "no: compile=False"}
    if wanted is None and device.type != "cuda":
        return {"compile": f"no: on {device} nothing is gained"}
    said = _fused(model, cache is None or cache.planned, ranges)
    if is_fused(model):
        return said  # with graphs of its own
    blocks_fused = FusedBlocks.of(model)
    if blocks_fused is not None:
        blocks_fused.compile_unfused = True  # what cannot run fused, after an adapter was loaded for example
    else:
        blocks = [block.module for block in family.blocks(model).blocks] if family is not None else []
        kinds = getattr(model, "_repeated_blocks", None) or ()
        blocks = blocks or [module for module in model.modules() if type(module).__name__ in kinds]
        for block in blocks:
            block.compile()
        said["compile"] = f"{len(blocks)} blocks, when they first run" if blocks else "no: its class names no blocks"
    if cache is not None and not cache.planned:
        return {**said, "graph": UNPLANNED}
    if device.type != "cuda":
        return {**said, "graph": f"no: on {device} there are none"}
    graph(model, pipe=pipe if hasattr(pipe, "scheduler") else None)
    return {**said, "graph": "of each kind of step" + ("; modulations of all at the first" if attached(model) else "")}


def _offloaded(model: Any) -> str:
    """Offload modulation; say how much, or why nothing."""
    graphed = Graphed.of(model)
    if graphed is None or not attached(model):
        return "no: that takes CUDA graphs of fused blocks with modulation layers of their own"
    graphed.offload(model)
    size = sum(tensor.nbytes for layer in offloaded(model) for tensor in (*layer.parameters(), *layer.buffers()))
    return f"{size_text(size)} of modulation in host memory, copied by the first step of a run"


def _fused(model: Any, planned: bool, ranges: StepRanges | None) -> dict[str, str]:
    """Fuse a model of a family that has fused kernels; returns that it was, or why not."""
    family = family_of(model)
    if family is None or (family.program is None and not fuses_blocks(family)):
        return {}
    reason = why_not_here(model, next(model.parameters()).device)
    if reason is None and family.program is not None and ranges is None:  # in part it would be slower than compiled
        reason = family.program.why_not_whole(model)
    if reason is not None or not planned:
        return {"fused": f"no: {reason}" if reason is not None else UNPLANNED}
    try:
        fuse(model, step_ranges=ranges)
    except ModelError as error:
        return {"fused": f"no: {error}"}
    return {"fused": "whole steps, with CUDA graphs" if is_fused(model) else "blocks, each by itself"}


@checked
def restore(pipe: Any) -> Any:
    """Undo :func:`optimize`: the pipeline has the very modules that it had, and draws the same images.

    Returns:
        ``pipe``.

    Raises:
        ModelError: it is not optimized, was optimized with ``restorable=False``, or its transformer was changed since
            (by an adapter, for example). The pipeline is unchanged then.
    """
    states = [state for state in getattr(pipe, "__dict__", {}).get(OPTIMIZED, ()) if state is not None]
    if not states:
        raise ModelError(f"this {type(pipe).__name__} is not optimized; give the pipeline that optimize was given")
    for state in states:
        state.check()
    while states:
        states.pop().undo()
    del pipe.__dict__[OPTIMIZED]
    return pipe
