"""Test that torch fills new memory in tests with nothing that could pass for a result."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    "new",
    [
        torch.empty,
        torch.zeros(1).new_empty,
        lambda *size, dtype: torch.empty_like(torch.zeros(size), dtype=dtype),
        lambda *size, dtype: torch.empty_strided(size, (1, 2), dtype=dtype),
    ],
    ids=["empty", "new_empty", "empty_like", "empty_strided"],
)
def test_new_memory_is_filled(new):
    assert new(2, 3, dtype=torch.float16).isnan().all()
    assert (new(2, 3, dtype=torch.int8) == 127).all()


def test_the_meta_device_works_in_this_process():
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 3).weight.is_meta
