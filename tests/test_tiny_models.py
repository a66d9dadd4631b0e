"""The small models of tests/tiny_models.py: they run, fast, and every input and block matters."""

from __future__ import annotations

import time

import pytest
import torch

from tests.tiny_models import TINY, inputs_of, make_tiny, output_of


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model(name):
    model = make_tiny(name)
    found = output_of(model, inputs_of(name))
    start = time.perf_counter()
    assert torch.equal(output_of(model, inputs_of(name)), found)
    assert time.perf_counter() - start < 2  # 0.3 with the machine to itself
    assert torch.isfinite(found).all()
    assert found.std() > 1e-3
    for other in (inputs_of(name, time=0.9), inputs_of(name, seed=1)):
        assert not torch.allclose(output_of(model, other), found, atol=1e-4)
    widths = [w for p in model.parameters() for w in p.shape[1:2] if p.ndim == 2]
    assert not [w for w in widths if w % 2]  # int4 packs pairs
