"""Run functions of tensors as CUDA graphs, captured on first use for each shape, replayed afterwards."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qandc_kernels import capturing

__all__ = ["PLAIN", "GraphCache", "ReplayLock", "unknown_part", "versions"]

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Captured:
    function: Callable[..., Any]  # kept, as it may hold what the graph uses
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: Any


class ReplayLock:
    """Serialise replays of graphs that share memory: a lock for threads, an event per device for streams."""

    def __init__(self) -> None:
        self.threads = threading.Lock()
        self.done: dict[torch.device, torch.cuda.Event] = {}  # recorded behind the last replay


class GraphCache:
    """Run a function of CUDA tensors through graphs, one per key and shape of inputs.

    It returns tensors, one or in any structure that torch's pytree knows.

    The function runs twice before it is captured, to compile and choose kernels. Graphs share one memory pool: they
    never run at the same time. Of more than ``limit`` graphs the one used longest ago is given up. Where a capture
    fails, or a result holds what pytree does not know, the reason is logged and the function runs as it is from then
    on. Results are copies that the next call leaves alone. A function that writes to its inputs or draws random numbers
    is not captured.

    Attributes:
        captures, replays: how many there were.
    """

    def __init__(self, limit: int = MAX_GRAPHS, lock: ReplayLock | None = None) -> None:
        self.limit = limit
        self.lock = lock or ReplayLock()  # several caches share one where their functions share memory
        self.captures = 0
        self.replays = 0
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._pool: Any = None
        self._cleared = 0

    def clear(self) -> None:
        """Give up all graphs and their memory, and one that is being captured."""
        self._cleared += 1
        self._graphs.clear()
        self._pool = None

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    @staticmethod
    def _key(inputs: Iterable[torch.Tensor], kind: Hashable) -> Hashable:
        return kind, *((t.shape, t.dtype, t.device) for t in inputs)

    def has(self, inputs: Iterable[torch.Tensor], kind: Hashable = None) -> bool:
        """Tell whether there is a graph for such inputs, or a refusal, so that :meth:`run` would capture nothing."""
        return self._key(inputs, kind) in self._graphs

    def run(
        self,
        function: Callable[..., Any],
        inputs: tuple[torch.Tensor, ...],
        kind: Hashable = None,
        otherwise: Callable[..., Any] | None = None,
    ) -> tuple[Any, str]:
        """Return ``function(*inputs)``, and whether its graph was "captured" or "replayed", or it ran "eager".

        ``otherwise(*inputs)`` takes its place if that is given and the function can't be captured.
        """
        key = self._key(inputs, kind)
        device = inputs[0].device
        with self.lock.threads, torch.cuda.device(device):
            done, known = self.lock.done.setdefault(device, torch.cuda.Event()), key in self._graphs
            if known:
                self._graphs.move_to_end(key)
                captured = self._graphs[key]
            else:
                cleared = self._cleared
                captured = self._capture(function, inputs)
                if cleared == self._cleared:  # else the layers have changed meanwhile
                    self._graphs[key] = captured
                while len(self._graphs) > self.limit:
                    self._graphs.popitem(last=False)
            if captured is None and otherwise is None:
                return function(*inputs), "eager"
            if captured is not None:
                stream = torch.cuda.current_stream()
                stream.wait_event(done)  # a call on another stream may still run
                for static, given in zip(captured.inputs, inputs, strict=True):
                    static.copy_(given)
                captured.graph.replay()
                self.replays += 1
                output = pytree.tree_map_only(torch.Tensor, torch.clone, captured.output)
                done.record(stream)
                return output, "replayed" if known else "captured"
        assert otherwise is not None
        return otherwise(*inputs), "eager"

    def keep_newest(self) -> None:
        """Give up all graphs but the one used last."""
        while len(self._graphs) > 1:
            self._graphs.popitem(last=False)

    def _capture(self, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> _Captured | None:
        static = tuple(t.clone(memory_format=torch.contiguous_format) for t in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = versions(static), generator.get_offset()
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    unknown = unknown_part(function(*static))
        finally:  # also of what was queued before an exception
            torch.cuda.current_stream().wait_stream(stream)
        if (versions(static), generator.get_offset()) != before:
            generator.set_offset(before[1])  # the caller's random numbers are those of a model without graphs
            _log_refusal(static, "the function writes to its inputs, or draws random numbers")
            return None
        if unknown is not None:
            _log_refusal(static, f"its result holds a {unknown}, and tensors in it could not be copied")
            return None
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # the outer context leaves the caller's stream as it was, also when the capture fails
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                capturing(graph, pool=self._pool, stream=stream),
            ):
                output = function(*static)
        except RuntimeError as error:
            torch.cuda.synchronize()
            generator.graphsafe_set_state(generator.clone_state())  # else it goes on believing in the capture
            _log_refusal(static, str(error).partition("\n")[0])
            return None
        self.captures += 1
        return _Captured(function, graph, static, output)


def unknown_part(output: Any) -> str | None:
    """Name the type of a part of a result that may hold tensors which no copy would reach, or return None."""
    known = (torch.Tensor, *PLAIN)
    return next((type(leaf).__name__ for leaf in pytree.tree_leaves(output) if not isinstance(leaf, known)), None)


def versions(tensors: Iterable[torch.Tensor]) -> list[int | None]:
    """Count how often each tensor was written to; inference mode does not."""
    return [None if t.is_inference() else t._version for t in tensors]


def _log_refusal(inputs: tuple[torch.Tensor, ...], reason: str) -> None:
    """Log why there is no graph for such inputs."""
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
    logger.warning("no CUDA graph for inputs of %s, kernels are launched one by one: %s", shapes, reason)
