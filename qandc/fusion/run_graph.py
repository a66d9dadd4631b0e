"""Run all steps of a fused transformer as one CUDA graph."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

from qandc.cache import get_cache
from qandc.fusion.blocks import why_not_here
from qandc.fusion.fuse import Fused
from qandc.support.attach import has_other_forward

__all__ = ["run_as_graph", "why_no_run_graph"]


def why_no_run_graph(transformer: Any, device: torch.device) -> str | None:
    """Say why many forwards of this transformer can't be one CUDA graph, or None."""
    cache = get_cache(transformer)
    if cache is not None and not cache.config.planned:
        return f"cache mode {cache.config.mode!r} decides at each step whether to compute it"
    fused = Fused.of(transformer)
    if fused is None:
        return "the transformer is not fused (fuse)"
    if cache is not None and cache.paused:
        return "the feature cache is paused"
    reason = why_not_here(transformer, device)
    if reason is not None:
        return reason
    hooked = transformer._forward_hooks or transformer._forward_pre_hooks
    if hooked or has_other_forward(transformer):
        return "the transformer has hooks or a forward of its own, which would run once and never again"
    with torch.inference_mode(False), torch.no_grad():
        step = fused.step(transformer) if fused.cuda_graphs and device.type == "cuda" else None
    if step is None or not step.graphable:
        return "CUDA graphs are off, or parts of the model run unfused (quantization_report)"
    return None


def run_as_graph(
    transformer: Any,
    make_run: Callable[[], Callable[..., torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    key: Hashable,
) -> torch.Tensor:
    """Run ``make_run()(*inputs)``, with many forwards of the fused transformer, as one CUDA graph per key and shapes.

    ``make_run`` is called where there is no such graph yet, once, before the capture. What it makes depends on nothing
    but ``inputs``, ``key`` and the transformer, where :func:`why_no_run_graph` finds no reason against it. A graph is
    given up when layers change, as that of a single forward is.
    """
    run = functools.cache(make_run)
    fused = getattr(transformer, Fused.attribute)
    cache = get_cache(transformer)
    held: list[Any] = []

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        held.clear()  # of a run to warm up
        fused.launching = threading.get_ident()
        try:
            output = run()(*inputs)
        finally:
            fused.launching = None
        fused.run = None  # lies in memory of the graph, and would keep the run's labels alive
        if cache is not None:
            held[:] = cache.take_finished()
        return output

    return fused.run_graphs.run(function, inputs, kind=key, otherwise=lambda *inputs: run()(*inputs))[0]
