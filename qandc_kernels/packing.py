"""Pack int4 weights, two per byte, and unpack them.

Row n of a ``[N, K]`` weight becomes K/2 bytes. Byte j holds k = j in its low and k = j + K/2 in its high nibble::

    byte        0                1                ...   K/2 - 1
    bits 0-3    q[n, 0]          q[n, 1]          ...   q[n, K/2 - 1]
    bits 4-7    q[n, K/2]        q[n, K/2 + 1]    ...   q[n, K - 1]

Both nibbles are two's complement, -8 to 7. The halves are split, not interleaved, so that unpacking
gives two pieces with contiguous k and needs no shuffle.
"""

from __future__ import annotations

import torch

from qandc_kernels.errors import ArgumentError
from qandc_kernels.ops._operands import INT8, UINT8, check_elements, check_tensor

__all__ = ["pack_int4", "unpack_int4", "unpack_unchecked"]


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Pack ``[..., K] int8`` with values -8 to 7 into ``[..., K/2] uint8``.

    Raises:
        ArgumentError: ``q`` is no dense int8 tensor, K is odd, or a value is outside -8 to 7.
    """
    check_tensor("pack_int4", "q", q, INT8)
    check_elements("pack_int4", "q", q.numel())
    if q.ndim == 0 or q.shape[-1] % 2:
        raise ArgumentError(f"pack_int4 needs an even last dimension; got shape {tuple(q.shape)}")
    if q.numel() and not q.is_meta and (q.min() < -8 or q.max() > 7):
        raise ArgumentError(f"int4 holds -8 to 7; got values from {int(q.min())} to {int(q.max())}")
    low, high = q.view(torch.uint8).chunk(2, dim=-1)
    return (low & 0xF) | (high << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Unpack ``[..., K/2] uint8`` into ``[..., K] int8``; the inverse of :func:`pack_int4`.

    Raises:
        ArgumentError: ``packed`` is no dense uint8 tensor, or has no dimension.
    """
    check_tensor("unpack_int4", "packed", packed, UINT8)
    check_elements("unpack_int4", "packed", packed.numel())
    if packed.ndim == 0:
        raise ArgumentError("unpack_int4 needs at least one dimension; got a tensor without")
    return unpack_unchecked(packed)


def unpack_unchecked(packed: torch.Tensor) -> torch.Tensor:
    """Do what :func:`unpack_int4` does, for a tensor that has been checked; torch can compile it in a backward pass."""
    signed = packed.view(torch.int8)
    # an arithmetic shift right by 4 extends the sign of the high nibble; the low one is moved up first
    return torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1)
