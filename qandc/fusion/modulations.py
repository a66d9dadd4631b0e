"""Compute the modulations of all steps of a run at its first one: a product with a row per step reads weights once.

In FLUX.1, Qwen-Image and SD3.5 each block makes its modulations of one vector per sample, of timestep, guidance and
pooled text, and reads up to a third of the model's weights for a few rows. The scheduler of a pipeline holds the
timesteps of its run, so all rows can be made at once; a step copies those made of the values that it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qandc.caching.runs import weakly
from qandc.errors import ModelError
from qandc.fusion.graphs import versions
from qandc.models import family_of
from qandc.models.family import Call, Modulated, forward_of
from qandc.support.attach import attach
from qandc.support.watch import Watch

__all__ = ["Ahead", "Step", "attached", "handed", "offload", "offloaded", "take_back"]

logger = logging.getLogger(__name__)

LARGEST = 512 << 20  # bytes of a table; making it takes twice as many
RUNS = 4  # that take turns: a step may have passes for other prompts, and one without some layers
_now = threading.local()  # of each thread: what layers return in this step


class _Modulation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        known: dict[nn.Module, torch.Tensor] = getattr(_now, "rows", {})
        return known[self] if self in known else super(_Modulation, _on(self, x.device)).forward(x)


def _on(layer: Any, device: torch.device) -> Any:
    """Return a layer whose tensors are on a device: itself, or one like it, for a layer that stays in host memory."""
    held = {name: layer.__dict__[name] for name in ("_parameters", "_buffers")}
    if all(tensor is None or tensor.device == device for tensors in held.values() for tensor in tensors.values()):
        return layer
    there = object.__new__(type(layer))
    there.__dict__.update(layer.__dict__)  # other threads may be inside of the layer
    for name, tensors in held.items():
        there.__dict__[name] = {
            key: None if tensor is None else tensor.to(device, non_blocking=True) for key, tensor in tensors.items()
        }
    return there


def attached(model: nn.Module) -> list[tuple[Any, Any]]:
    """List the layers of a model that take rows, with what is attached to them, as ``detach`` takes them."""
    return [(module, _Modulation) for module in model.modules() if isinstance(module, _Modulation)]


def offload(model: nn.Module) -> None:
    """Move the weights of layers that take rows to pinned host memory, from a GPU."""
    layers = [layer for layer, _ in attached(model)]
    if not layers or not next(model.parameters()).is_cuda:
        logger.warning("nothing is offloaded: no modulation layers on a GPU, in blocks that are not compiled")
        return
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            layer._apply(lambda tensor: tensor.cpu().pin_memory())


def offloaded(model: nn.Module) -> list[Any]:
    """List the layers that take rows whose weights are in host memory, while the rest of the model is on a GPU."""
    layers = [layer for layer, _ in attached(model)]
    held = [layer for layer in layers if next(itertools.chain(layer.parameters(), layer.buffers())).is_cpu]
    return held if held and next(model.parameters()).is_cuda else []  # of an embedder, before all blocks


def take_back(model: nn.Module) -> None:
    """Move weights that are offloaded to where the model is."""
    for layer in offloaded(model):
        layer.to(next(model.parameters()).device)


class _Table:
    """Hold the modulations of all steps of one run, and what they were made of.

    Attributes:
        keys, rows: of each step what its vectors are made of, ``[S, n]``, and the outputs of ``layers`` side by side.
        confirmed: whether the step before found its rows.
    """

    def __init__(self, layers: list[Any], embedder: nn.Module, keys: torch.Tensor, rows: torch.Tensor) -> None:
        self.layers, self.keys, self.rows, self.confirmed = layers, keys, rows, False
        self.watch = Watch(nn.ModuleList([*layers, embedder]))
        self.versions = versions(self.watch.tensors)

    def unchanged(self) -> bool:
        """Tell whether the weights are those that the rows were made with."""
        return self.watch.unchanged() and versions(self.watch.tensors) == self.versions


class _Run(NamedTuple):
    """Tell by which tensors a run is known, and hold its table, if that is not too large."""

    tensors: tuple[Callable[[], torch.Tensor | None], ...]
    kind: tuple[Any, ...]
    table: _Table | None

    def is_of(self, tensors: tuple[Any, ...], kind: tuple[Any, ...]) -> bool:
        return self.kind == kind and all(mine() is other for mine, other in zip(self.tensors, tensors, strict=True))


class Step:
    """Hold the modulations of a step, which are right if :meth:`found` says so.

    Attributes:
        rows: as :func:`handed` takes them.
    """

    def __init__(self, table: _Table, key: torch.Tensor) -> None:
        self.table, self.event = table, None
        same = (table.keys == key).all(1)
        self.rows = table.rows.index_select(0, same.int().argmax(0, keepdim=True))[0]
        self.flag = same.any()
        if key.is_cuda:
            self.flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self.flag, non_blocking=True)
            self.event = torch.cuda.current_stream(key.device).record_event()

    def found(self) -> bool:
        """Wait until the GPU has come to this step, and tell whether the table has rows made of its very values."""
        if self.event is not None:
            self.event.synchronize()
        self.table.confirmed = bool(self.flag)
        return self.table.confirmed


@contextlib.contextmanager
def handed(layers: Sequence[Any], rows: torch.Tensor | None) -> Iterator[None]:
    """Have layers return ``rows`` inside the block: the outputs ``[B, N]`` of each, one behind the other."""
    if rows is None:
        yield
        return
    sizes = [layer.out_features for layer in layers]
    samples = len(rows) // sum(sizes)
    parts = (part.view(samples, -1) for part in rows.split([samples * size for size in sizes]))
    _now.rows = dict(zip(layers, parts, strict=True))
    try:
        yield
    finally:
        del _now.rows


def _key(parts: tuple[Any, ...]) -> torch.Tensor:
    """Join the values that a vector is made of."""
    return torch.cat([part.double().flatten() for part in parts if part is not None])


class Ahead:
    """Compute and keep the modulations of the runs of one pipeline.

    Args:
        model: its transformer. Layers in compiled blocks are left alone: the code would be compiled again for rows.
        pipe: has a ``scheduler``, whose ``timesteps`` are those of the run that is going on.
    """

    def __init__(self, model: Any, pipe: Any) -> None:
        if not hasattr(pipe, "scheduler"):
            raise ModelError(f"pipe is the pipeline that runs the model; this {type(pipe).__name__} has no scheduler")
        self.pipe, self.said = weakref.ref(pipe), False
        self.runs: list[_Run] = []
        family = family_of(model)
        own = family is not None and forward_of(model).__qualname__ == f"{family.transformer}.forward"
        self.modulated = family.modulated if family is not None and own else None
        for stack in family.stacks if family is not None and self.modulated is not None else ():
            for block in getattr(model, stack.blocks):
                known = block._compiled_call_impl is None and stack.why_not(block) is None
                found = dict(block.named_modules()) if known else {}
                for name in stack.modulations:
                    activations = (type(part) for part in found.get(name.rpartition(".")[0], nn.Identity()).children())
                    if nn.SiLU in activations:
                        attach(found[name], _Modulation)

    def run(self, model: nn.Module, call: Call, forward: Callable[[Step | None], Any]) -> Any:
        """Return ``forward`` of a step, with modulations if they are known.

        Behind a step that found its own, one is started as if it did too, and again without if it does not: so the GPU
        has work while the host looks at weights and waits for what was compared.
        """
        step = self._step(model, call)
        if step is None or not step.table.confirmed:
            return forward(step if step is not None and self._found(step) else None)
        output = forward(step)
        return output if self._found(step) else forward(None)

    def _found(self, step: Step) -> bool:
        if step.table.unchanged():
            return step.found()
        self.runs = [run for run in self.runs if run.table is not step.table]
        return False

    def _step(self, model: Any, call: Call) -> Step | None:
        timesteps = getattr(getattr(self.pipe(), "scheduler", None), "timesteps", None)
        timestep, x = call.get("timestep"), call.get("hidden_states")
        if self.modulated is None or not isinstance(timesteps, torch.Tensor) or not isinstance(x, torch.Tensor):
            return None
        if timestep is None or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return None
        given = tuple(call.get(name) for name in self.modulated.arguments)
        shapes = (None if each is None else each.shape for each in (timestep, *given))
        tensors, kind = (timesteps, *given), (x.dtype, timestep.dtype, timestep.device, *shapes)
        run = next((run for run in self.runs if run.is_of(tensors, kind)), None)
        if run is None:
            going_on = [run for run in self.runs if run.tensors[0]() is timesteps]
            self.runs = going_on[-RUNS + 1 :]  # the memory of the others is free for this one
            with torch.inference_mode(False), torch.no_grad():
                table = self._table(model, call, self.modulated, timesteps, given)
            run = _Run(tuple(map(weakly, tensors)), kind, table)
            self.runs.append(run)
        return None if run.table is None else Step(run.table, _key((timestep, *given)))

    def _table(
        self, model: Any, call: Call, modulated: Modulated, timesteps: torch.Tensor, given: tuple[Any, ...]
    ) -> _Table | None:
        """Compute the modulations of all steps; None where they would be too large."""
        layers, timestep = [layer for layer, _ in attached(model)], call["timestep"]
        samples = max(len(each) for each in (timestep, *given) if each is not None)
        width = samples * sum(layer.out_features for layer in layers)
        count = len(timesteps) * width * call["hidden_states"].element_size()
        if not 0 < count <= LARGEST:
            if count and not self.said:
                logger.warning(
                    "modulations of a run of %d steps and %d rows would take %d MB, more than %d: each step makes its "
                    "own", len(timesteps), samples, count >> 20, LARGEST >> 20,
                )  # fmt: skip
                self.said = True
            return None
        times = timesteps.to(timestep.device, timestep.dtype) / modulated.divisor
        steps = len(times)
        of_steps = {
            name: each.expand(samples, *each.shape[1:]).repeat(steps, *[1] * (each.ndim - 1))
            for name, each in zip(modulated.arguments, given, strict=True)
            if each is not None
        }
        vectors = F.silu(modulated.vector(model, {**call, **of_steps, "timestep": times.repeat_interleave(samples)}))
        # tensors of their own, or layers would form a group of shared products; without hooks, which each step runs
        rows = torch.cat([layer.forward(vectors.view_as(vectors)).view(steps, -1) for layer in layers], 1)
        parts = [part.double().flatten().expand(steps, -1) for part in given if part is not None]
        keys = torch.cat([times.double()[:, None].expand(-1, timestep.numel()), *parts], 1)
        return _Table(layers, model.get_submodule(modulated.embedder), keys, rows)
