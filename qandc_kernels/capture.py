"""Capture CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["capturing"]


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture what the block launches into ``graph``, as ``torch.cuda.graph`` does, without garbage collection.

    A collection could free another graph, which CUDA permits no thread that captures: the capture would fail. Torch
    collects garbage before a capture up to 2.8 only. Other threads may go on using the GPU.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            yield
    finally:
        if collecting:
            gc.enable()
