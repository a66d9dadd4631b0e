from __future__ import annotations

import pytest
import torch

from qandc_kernels import ArgumentError, pack_int4, unpack_int4


def test_layout_is_the_one_drawn():
    q = torch.tensor([[1, -2, 3, -8, 7, -1]], dtype=torch.int8)
    # byte j: low nibble k = j, high nibble k = j + 3
    expected = torch.tensor([[0x81, 0x7E, 0xF3]], dtype=torch.uint8)
    assert torch.equal(pack_int4(q), expected)


def test_round_trip_of_all_values():
    q = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(q)), q)
    assert torch.equal(unpack_int4(pack_int4(q.t()[:, :10])), q.t()[:, :10])


@pytest.mark.parametrize(
    ("q", "message"),
    [(torch.zeros(2, 3, dtype=torch.int8), "even"), (torch.full((2, 4), 8, dtype=torch.int8), "-8 to 7")],
)
def test_refusals(q, message):
    with pytest.raises(ArgumentError, match=message):
        pack_int4(q)
