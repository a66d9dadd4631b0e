"""What the launchers of the matrix products share: operands, number of programs, compile-time arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from qandc_kernels.epilogue import Epilogue
from qandc_kernels.tiles import GemmTile, gpu_of

__all__ = ["compile_time", "number_of_programs", "operands"]


def _aligned(t: torch.Tensor) -> bool:
    """Whether the copy engine can move tiles of ``t``: unit inner stride, rows and address multiples of 16 bytes."""
    return (
        t.shape[1] > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def operands(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    branch: torch.Tensor | None,
    tile: GemmTile,
    out_block: list[int],
) -> tuple[bool, Any, Any, Any, Any]:
    """Whether tiles travel through the copy engine (TMA, sm_90 on), and x, w, out, branch as descriptors or tensors."""
    accelerator = tile.tma and gpu_of(x.device).capability >= (9, 0)
    if not (accelerator and all(_aligned(t) for t in (x, w, out, branch) if t is not None)):
        return False, x, w, out, branch
    return (
        True,
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(w, [tile.block_n, tile.block_k]),
        TensorDescriptor.from_tensor(out, out_block),
        None if branch is None else TensorDescriptor.from_tensor(branch, out_block),
    )


def number_of_programs(m: int, n: int, tile: GemmTile, device: torch.device) -> int:
    """One per tile; with ``programs_per_sm`` no more than run at once, and each takes tile after tile."""
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if tile.programs_per_sm:
        return min(tiles, tile.programs_per_sm * gpu_of(device).multiprocessors)
    return tiles


def _registers(tile: GemmTile) -> int | None:
    """So few per thread that all programs fit a multiprocessor at once: one that has to wait costs a turn more."""
    limit = 65536 // (max(tile.programs_per_sm, 1) * tile.num_warps * 32) // 8 * 8
    return limit if limit < 255 else None


def compile_time(epilogue: Epilogue, tile: GemmTile) -> dict[str, Any]:
    """What a kernel must know of its epilogue and tile when it is compiled, and Triton's own options."""
    return {
        "PER_TOKEN": epilogue.x_scale is not None and epilogue.x_scale.ndim == 1,
        "ONE_GATE": epilogue.gate is not None and epilogue.tokens % tile.block_m == 0,
        "PERSISTENT": tile.programs_per_sm > 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "SUBTILES": tile.subtiles,
        "OVERLAP": tile.overlap > 0,
        "launch_pdl": tile.overlap > 0,
        "maxnreg": _registers(tile),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
