"""CUDA graphs of a function of tensors: captured on first use for each shape, replayed afterwards."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["GraphCache"]

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8


@dataclass(frozen=True)
class _Captured:
    function: Callable[..., torch.Tensor]  # kept, as it may hold what the graph uses
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class GraphCache:
    """Runs a function from CUDA tensors to one CUDA tensor through graphs, one per key and shape of inputs.

    The function runs twice before it is captured, to compile and choose kernels. Graphs share one memory pool: they
    never run at the same time. Of more than ``limit`` graphs the one used longest ago is given up. Where a capture
    fails the reason is logged and the function runs as it is from then on. Results are copies that the next call
    leaves alone.

    Attributes:
        captures, replays: how many there were.
    """

    def __init__(self, limit: int = MAX_GRAPHS) -> None:
        self.limit = limit
        self.captures = 0
        self.replays = 0
        self._graphs: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._pool: Any = None
        self._lock = threading.Lock()
        self._done: Any = None

    def clear(self) -> None:
        """Give up all graphs and their memory."""
        self._graphs.clear()
        self._pool = None

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(
        self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], kind: Hashable = None
    ) -> torch.Tensor:
        key = (kind, *((t.shape, t.dtype, t.device) for t in inputs))
        with self._lock, torch.cuda.device(inputs[0].device):
            if self._done is None:
                self._done = torch.cuda.Event()
            if key not in self._graphs:
                self._graphs[key] = self._capture(function, inputs)
                while len(self._graphs) > self.limit:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            captured = self._graphs[key]
            if captured is None:
                return function(*inputs)
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # a call on another stream may still run
            for static, given in zip(captured.inputs, inputs, strict=True):
                static.copy_(given)
            captured.graph.replay()
            self.replays += 1
            output = captured.output.clone()
            self._done.record(stream)
            return output

    def _capture(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> _Captured | None:
        static = tuple(t.clone(memory_format=torch.contiguous_format) for t in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # the outer context leaves the caller's stream as it was, also when the capture fails
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                output = function(*static)
        except RuntimeError as error:
            torch.cuda.synchronize()
            logger.warning(
                "no CUDA graph for inputs of %s, kernels are launched one by one: %s",
                ", ".join(str(tuple(t.shape)) for t in static),
                str(error).partition("\n")[0],
            )
            return None
        self.captures += 1
        return _Captured(function, graph, static, output)
