"""Captures of CUDA graphs: no garbage collection in between, which may free another graph."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch

from qandc_kernels import capturing


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_after_a_capture_as_before(monkeypatch, collecting, fails):
    seen = []

    @contextmanager
    def captured(graph, **options):
        seen.append((gc.isenabled(), graph, options))
        yield
        seen.append(gc.isenabled())

    monkeypatch.setattr(torch.cuda, "graph", captured)
    if not collecting:
        gc.disable()
    try:
        with capturing("a graph", pool=1):
            assert not gc.isenabled()
            if fails:
                raise RuntimeError
        assert not fails
    except RuntimeError:
        assert fails
    finally:
        after = gc.isenabled()
        gc.enable()
    assert after is collecting
    assert seen[0] == (False, "a graph", {"pool": 1, "capture_error_mode": "thread_local"})
    assert seen[1:] == ([] if fails else [False])


@pytest.mark.gpu
def test_a_graph_that_is_garbage_ends_no_capture():
    x = torch.ones(4, device="cuda")
    holder = [torch.cuda.CUDAGraph()]
    with capturing(holder[0]):
        x + 1
    holder.append(holder)
    del holder
    thresholds, graph = gc.get_threshold(), torch.cuda.CUDAGraph()
    gc.set_threshold(1)  # each few objects are reason enough to collect
    try:
        with capturing(graph):
            y = x + 1
            made = [[[]] for _ in range(100)]
    finally:
        gc.set_threshold(*thresholds)
    graph.replay()
    assert y.tolist() == [2.0] * 4
    assert len(made) == 100
