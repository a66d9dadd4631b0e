"""int4 weights, two per byte.

Row n of a ``[N, K]`` weight becomes K/2 bytes. Byte j holds k = j in its low and k = j + K/2 in its high nibble::

    byte        0                1                ...   K/2 - 1
    bits 0-3    q[n, 0]          q[n, 1]          ...   q[n, K/2 - 1]
    bits 4-7    q[n, K/2]        q[n, K/2 + 1]    ...   q[n, K - 1]

Both nibbles are two's complement, -8 to 7. The halves are split, not interleaved, so that unpacking
gives two pieces with contiguous k and needs no shuffle.
"""

from __future__ import annotations

import torch

__all__ = ["pack_int4", "unpack_int4"]


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """``[..., K] int8`` with values -8 to 7 to ``[..., K/2] uint8``.

    Raises:
        TypeError: ``q`` is not int8.
        ValueError: K is odd, or a value is outside -8 to 7.
    """
    if not isinstance(q, torch.Tensor) or q.dtype != torch.int8:
        raise TypeError(f"pack_int4 takes an int8 tensor; got {getattr(q, 'dtype', type(q).__name__)}")
    if q.ndim == 0 or q.shape[-1] % 2:
        raise ValueError(f"pack_int4 needs an even last dimension; got shape {tuple(q.shape)}")
    if q.numel() and not q.is_meta and (q.min() < -8 or q.max() > 7):
        raise ValueError(f"int4 holds -8 to 7; got values from {int(q.min())} to {int(q.max())}")
    low, high = q.view(torch.uint8).chunk(2, dim=-1)
    return (low & 0xF) | (high << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """``[..., K/2] uint8`` to ``[..., K] int8``; the inverse of :func:`pack_int4`.

    Raises:
        TypeError: ``packed`` is not uint8.
    """
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"unpack_int4 takes a uint8 tensor; got {getattr(packed, 'dtype', type(packed).__name__)}")
    signed = packed.view(torch.int8)
    # an arithmetic shift right by 4 extends the sign of the high nibble; the low one is moved up first
    return torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1)
