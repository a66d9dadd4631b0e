"""Run the forward of any model whose shapes repeat, as those of diffusion transformers do, from CUDA graphs.

A forward of a large model is some thousand launches, each of which Python, torch and the driver work on for longer than
a small kernel takes. A graph holds them all and is started once. As with the feature cache the model is not forked: it
is an instance of a subclass of its own class (:mod:`qandc.support.attach`). A feature cache is the outer of the two: it
plans a step, and each kind of step is a graph, which finds features where the cache keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from typing import Annotated, Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from qandc.cache import check_planned, detached_cache, get_cache, unread
from qandc.caching.plan import Action, Plan
from qandc.errors import ConfigError, ModelError
from qandc.fusion.fuse import is_fused
from qandc.fusion.graphs import PLAIN, GraphCache
from qandc.fusion.modulations import Ahead, Step, attached, handed, offload, offloaded, take_back
from qandc.models import family_of
from qandc.models.family import arguments_of
from qandc.support.arguments import Between, checked
from qandc.support.attach import Attachment, attach, detach
from qandc.support.watch import Watch

__all__ = ["Graphed", "UnknownArgumentError", "graph", "rebuild", "structure_of", "ungraph"]

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


class UnknownArgumentError(Exception):
    """Tell why an argument can't be part of a key."""


def structure_of(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Describe ``value`` but for the contents of its tensors, which are added to ``tensors``."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        if kind not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided:
            raise UnknownArgumentError(f"an argument is a {kind.__name__} of layout {value.layout}")
        tensors.append(value)
        return torch.Tensor, value.requires_grad
    if kind in (list, tuple):
        return kind, *(structure_of(part, tensors) for part in value)
    if kind is dict:
        return kind, *((structure_of(key, tensors), structure_of(part, tensors)) for key, part in value.items())
    if kind not in PLAIN:
        raise UnknownArgumentError(f"an argument holds a {kind.__name__}")
    return kind, value


def rebuild(structure: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Undo :func:`structure_of` with other tensors."""
    kind, *parts = structure
    if kind is torch.Tensor:
        return next(tensors)
    if kind is dict:
        return {rebuild(key, tensors): rebuild(part, tensors) for key, part in parts}
    if kind in (list, tuple):
        return kind(rebuild(part, tensors) for part in parts)
    return parts[0]


class Graphed(Attachment):
    """Hold the graphs of a model, and what has been said about calls that take none.

    Attributes:
        offloads: weights of modulation were moved to host memory, where they may still be.
    """

    attribute = "_qandc_graphed"

    def __init__(self, limit: int, ahead: Ahead | None = None) -> None:
        self.limit = limit
        self.ahead = ahead
        self.graphs = GraphCache(limit)
        self.watch: Watch | None = None
        self.reuse_watch: Watch | None = None  # of what reuse steps of a cache read
        self.reason: str | None = None  # why no call can be a graph, for the modules that are watched
        self.offloads = False
        self._said: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Graphed:
        return Graphed(self.limit)  # a copy of the model captures its own

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphed, (self.limit,)

    def say(self, reason: str) -> None:
        """Log a reason once."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("no CUDA graph: %s", reason)

    def drop(self) -> None:
        """Forget all graphs; the next forward captures anew."""
        self.watch = self.reuse_watch = None
        self.graphs.clear()

    def offload(self, model: nn.Module) -> None:
        """Move the weights of modulation to host memory."""
        self.offloads = True
        offload(model)

    def take_back(self, model: nn.Module) -> None:
        take_back(model)

    def makes_its_own(self, plan: Plan) -> bool:
        """Tell whether a step that reuses makes its gates itself, if any: to wait for those of a table costs more.

        With weights in host memory the table's are taken.
        """
        return plan.action is Action.REUSE and (plan.passes_blocks or not self.offloads)

    def look(self, model: nn.Module) -> None:
        """Drop graphs of a model that has changed since they were captured."""
        if self.watch is None or not self.watch.unchanged():
            self.drop()
            self.reason = _why_not_model(model)
            self.watch = Watch(model)
        cache = get_cache(model)
        if cache is not None and cache.plan.action is Action.REUSE and self.reuse_watch is None:
            self.reuse_watch = Watch(model, without=unread(model))


def _why_not_model(model: nn.Module) -> str | None:
    """Say why no forward of a model can be a graph, or None: Python that a replay would leave out."""
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if name and (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__):
            return f"{where} has hooks or a forward of its own, which a graph would not run"
        if is_fused(module):
            return f"{where} is fused, which chooses in Python what a step runs"
    return None


def _why_not_now(model: nn.Module, tensors: list[torch.Tensor]) -> str | None:
    """Say why this call of a model can't be a graph, or None."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        where = ", ".join(sorted(map(str, devices))) or "none"
        return f"all tensors among the arguments must be on one CUDA device; they are on: {where}"
    if model.training:
        return f"{type(model).__name__} is in training mode; call eval()"
    if torch.is_grad_enabled():
        return "gradients are enabled; call the model under torch.no_grad()"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on; convert the model to the dtype you want instead"
    if _has_any_global_hook():
        return "there are global hooks of modules, which a graph would not run"
    return None


class _GraphedModel(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graphed: Graphed = getattr(self, Graphed.attribute)
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return super().forward(*args, **kwargs)  # part of something larger
        cache = get_cache(self)
        if graphed.ahead is None or (cache is not None and graphed.makes_its_own(cache.plan)):
            return self._replay(None, args, kwargs)
        call = arguments_of(self, args, kwargs)
        return graphed.ahead.run(self, call, lambda step: self._replay(step, args, kwargs))

    def _replay(self, step: Step | None, args: Any, kwargs: Any) -> Any:
        graphed: Graphed = getattr(self, Graphed.attribute)
        forward, (layers, rows) = super().forward, ((), None) if step is None else (step.table.layers, step.rows)

        def eager() -> Any:
            hooked = step is not None and _why_not_model(self) is not None  # hooks may change what rows are made of
            with handed(layers, None if hooked else rows):
                return forward(*args, **kwargs)

        cache = get_cache(self)
        plan = Plan() if cache is None else cache.plan
        if plan.key is None:  # the first step of a cache makes the memory of its features
            return eager()
        if step is None and graphed.offloads and not plan.passes_blocks and offloaded(self):
            graphed.say("weights of modulation are in host memory, and no rows were made of what this step is given")
            return eager()
        tensors: list[torch.Tensor] = []
        try:
            structure = structure_of((args, kwargs, (plan.weights, plan.correction), rows), tensors)
            reason = _why_not_now(self, tensors)
        except UnknownArgumentError as error:
            reason = str(error)
        watch = None
        if reason is None:
            kind, seen = (structure, plan.key), graphed.reuse_watch if plan.action is Action.REUSE else graphed.watch
            # a replay reads memory that is there, and is looked through while the GPU works
            if seen is not None and seen.in_place() and graphed.graphs.has(tensors, kind):
                watch = seen
            if watch is None or graphed.reason is not None:
                graphed.look(self)
                reason = graphed.reason
        if reason is not None:
            graphed.say(reason)
            return eager()

        def function(*given: torch.Tensor) -> Any:  # kept with its graph: nothing of one run
            args, kwargs, of_plan, rows = rebuild(structure, iter(given))
            with nullcontext() if cache is None else cache.planned(*of_plan), handed(layers, rows):
                return forward(*args, **kwargs)

        with torch.inference_mode(False), torch.no_grad():
            output, how = graphed.graphs.run(function, tuple(tensors), kind=kind)
        if how == "captured":
            assert graphed.watch is not None
            if not graphed.watch.unchanged():  # by the forward itself: what others read may be gone
                graphed.graphs.keep_newest()
                graphed.watch, graphed.reuse_watch = Watch(self), None
        elif watch is not None and how == "replayed" and not watch.unchanged():
            graphed.drop()
            return _GraphedModel._replay(self, step, args, kwargs)
        return output


@checked
def graph(
    model: ModelT,
    *,
    limit: Annotated[int, Between(1, 1024)] = 16,
    pipe: Any = None,
    offload_modulation: bool = False,
) -> ModelT:
    """Replay the forwards of ``model`` from CUDA graphs, one for each structure, shapes and plain values of arguments.

    The first call of a kind runs the forward twice to compile and choose kernels, captures a graph, and replays it, as
    later calls do. Tensors among the arguments, also in lists, tuples and dictionaries, are copied in; results are
    copies that later calls leave alone. Quantized or not, with compiled blocks or not.

    A call runs as before, and the reason is logged once, where its tensors are not on one CUDA device, with gradients,
    autocast or training mode, with arguments of other types, where modules have hooks, and where the forward can't be
    captured because it reads values back from the GPU. A model whose modules, weights or attributes were replaced
    captures anew; writing into weights takes effect at once. With a feature cache (:func:`qandc.apply_cache`) each
    kind of step is a graph of its own: two to four for each run that is going on.

    Args:
        model: any module; changed in place. :func:`qandc.fuse` gives a DiT graphs of its own.
        limit: graphs that are kept; of more the one used longest ago is given up. All share the memory of the largest.
        pipe: the pipeline that runs a FLUX.1, Qwen-Image or SD3.5 with eager or fused blocks: the modulations of all
            steps are computed at the first, as its scheduler then knows the timesteps, and copied by each. A step of
            another timestep, guidance or prompt computes its own. The host waits until the GPU has come to a step,
            once it has started that.
        offload_modulation: keep the weights that ``pipe`` lets no other step read in pinned host memory. The first step
            of a run copies them layer by layer, as does each step of other values, which is no graph then. Compile no
            block afterwards. What moves the whole model (``to``, ``enable_model_cpu_offload``) and adapters take them
            back.

    Returns:
        ``model``. :func:`ungraph` makes it again what it was.

    Raises:
        ModelError: not a module, graphed or fused already, compiled as a whole, its ``forward`` was replaced on the
            instance, or ``pipe`` has no scheduler.
        ConfigError: the limit is not an integer from 1 to 1024, the attached cache decides while a step runs, or
            ``offload_modulation`` without ``pipe``.
    """
    if Graphed.of(model) is not None or is_fused(model):
        raise ModelError(f"this {type(model).__name__} has graphs already; call ungraph or unfuse first")
    if "forward" in model.__dict__ or model._compiled_call_impl is not None or hasattr(model, "_orig_mod"):
        raise ModelError(
            f"forward of this {type(model).__name__} was replaced (by torch.compile of the whole model, or by "
            "accelerate's offload hooks); compile its blocks, model.compile_repeated_blocks(), and graph it first"
        )
    if offload_modulation and pipe is None:
        raise ConfigError(
            "offload_modulation needs pipe=, whose scheduler tells for which steps to compute modulations"
        )
    check_planned(model, "it cannot run from CUDA graphs (remove_cache first)")
    with detached_cache(model):  # the graph is the inner of the two
        graphed = Graphed(limit, None if pipe is None else Ahead(model, pipe))
        for module, mixin in _captured(model):
            attach(module, mixin)
        attach(model, _GraphedModel, graphed)
    if offload_modulation:
        try:
            graphed.offload(model)
        except BaseException:
            ungraph(model)
            raise
    return model


def _captured(model: Any) -> list[tuple[Any, Any]]:
    """List the submodule of a model that needs another forward to be captured, with that forward's class."""
    family = family_of(model)
    if family is None or family.captured is None:
        return []
    name, mixin = family.captured
    return [(getattr(model, name), mixin)]


@checked
def ungraph(model: ModelT) -> ModelT:
    """Undo :func:`graph`, and free the memory of its graphs.

    Raises:
        ModelError: the model is not graphed, or another tool has wrapped it since.
    """
    graphed = Graphed.of(model)
    if graphed is None:
        raise ModelError(f"this {type(model).__name__} is not graphed")
    take_back(model)
    with detached_cache(model):
        ours = [pair for pair in _captured(model) if isinstance(*pair)]  # not one that was put there since
        detach([(model, _GraphedModel), *ours, *attached(model)], Graphed.attribute, error=ModelError)
    graphed.drop()
    return model
