"""Tile choice: sizes of the block of the output that one program computes."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GemmTile", "int8_gemm_tile"]


class GemmTile(NamedTuple):
    """Compile-time sizes of one GEMM launch; ``group_m`` rows of blocks share their weight tiles in the L2 cache."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


def int8_gemm_tile(m: int, n: int, capability: tuple[int, int] = (9, 0)) -> GemmTile:
    """A good tile for an ``[M, K] x [N, K]`` int8 product, any K, on a GPU of this compute capability.

    From 33 rows on, blocks are at least 64 rows high, which Hopper's wgmma needs. Few rows mean few blocks: they are
    made narrower, so that all multiprocessors get one. Stages are bounded by shared memory: 227 KB on sm_90 and sm_100,
    163 KB on sm_80, 99 KB on sm_86, sm_89 and sm_120.
    """
    small_memory = capability[0] == 12 or (capability[0] == 8 and capability[1] != 0)
    if m <= 32:
        return GemmTile(16 if m <= 16 else 32, 64, 128, 1, 4, 4)
    if m <= 1024 or n <= 64:
        return GemmTile(64, 64, 128, 8, 4, 4)
    return GemmTile(128, 128, 64 if small_memory else 128, 8, 8, 4)
