"""Start kernels: what the matrix products share, and how a kernel is started again at little cost on the host."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from qandc_kernels.tiles.tables import GemmTile, gpu_of
from qandc_kernels.triton._driver import DriverKernel, NotSupported, Operand, Tiles
from qandc_kernels.triton._epilogue import Epilogue

__all__ = ["Kept", "Launches", "Start", "compile_time", "number_of_programs", "places", "product_start"]

logger = logging.getLogger(__name__)

LARGEST_NUMBER = 4096  # of starts that a cache of them keeps


class Start(NamedTuple):
    """Describe the start of a kernel: ``kernel[grid](*arrange(*operands), **constants)``.

    ``arrange`` puts the operands of an op, tensors and None, among the other run-time arguments. ``descriptors`` holds
    by position those that travel through the copy engine (TMA), in the place of the tensor.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arrange: Callable[..., tuple[Any, ...]]
    constants: Mapping[str, Any]
    descriptors: Mapping[int, TensorDescriptor] = {}

    def __call__(self, operands: Sequence[Any]) -> Any:
        """Start the kernel through Triton, which compiles it where it has to; returns what Triton returns."""
        arguments = list(operands)
        for position, descriptor in self.descriptors.items():
            arguments[position] = descriptor
        return self.kernel[self.grid](*self.arrange(*arguments), **self.constants)


def _usual() -> bool:
    """Tell whether nobody watches launches or compiles them in another way, which Triton's own start cares for."""
    runtime = knobs.runtime
    return not (runtime.debug or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


class Kept:
    """Hold kernels to start one after the other on operands like those that they were started with before."""

    def __init__(self, kernels: Sequence[DriverKernel], device: int) -> None:
        self._kernels, self._device = kernels, device

    def __call__(self, addresses: Sequence[int | None]) -> bool:
        """Start them on operands at these addresses; False, and nothing is started, where Triton has to."""
        if not self._kernels or self._device != torch._C._cuda_getDevice() or not _usual():
            return False
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        for kernel in self._kernels:
            kernel(stream, addresses)
        return True


class Launches:
    """Keep the starts of one op, of one kernel or several, to start them again without Triton's ``JITFunction.run``.

    That function finds out anew what every argument specializes a kernel for, which takes longer than a small product.
    Here a compiled kernel is found by all that it can depend on: dtype, shape, strides, alignment (16 bytes) and device
    of each operand, or None, and whatever else the op has been given. Anything unknown is started by Triton.
    """

    def __init__(self) -> None:
        self._ready: dict[tuple[Any, ...], Kept] = {}

    def __call__(
        self,
        operands: Sequence[torch.Tensor | None],
        others: Hashable,
        prepare: Callable[[], tuple[tuple[Start, ...], Sequence[torch.Tensor | None]]],
    ) -> None:
        """Start the kernels for these operands, the first of which is a tensor on the device that runs them.

        Args:
            operands: what ``Start.arrange`` takes.
            others: whatever else decides about the start.
            prepare: gives the starts, and the operands as Triton should see them: views, or copies, which will be made
                each time.
        """
        first = operands[0]
        assert first is not None
        device = first.get_device()
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(operands, others, prepare)
        key, addresses = self._key(operands, others)
        kept = self._ready.get(key)
        if kept is not None and kept(addresses):
            return None
        starts, views = prepare()
        compiled = [start(views) for start in starts]
        copied = [None if view is None else view.data_ptr() for view in views] != addresses
        if kept is None and not copied and all(isinstance(kernel, CompiledKernel) for kernel in compiled):
            self._keep(key, starts, compiled, len(addresses), device)
        return None

    def find(self, operands: Sequence[torch.Tensor | None], others: Hashable) -> Kept | None:
        """Return what a call with such operands starts, if one has been kept."""
        return self._ready.get(self._key(operands, others)[0])

    def _key(
        self, operands: Sequence[torch.Tensor | None], others: Hashable
    ) -> tuple[tuple[Any, ...], list[int | None]]:
        addresses: list[int | None] = []
        parts: list[Any] = [others]
        for tensor in operands:
            if tensor is None:
                addresses.append(None)
                parts.append(None)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                parts += (tensor.dtype, tensor.shape, tensor.stride(), address & 15, tensor.get_device())
        return tuple(parts), addresses

    def _keep(
        self, key: tuple[Any, ...], starts: tuple[Start, ...], compiled: list[Any], number: int, device: int
    ) -> None:
        if len(self._ready) >= LARGEST_NUMBER:
            self._ready.clear()
        try:
            kernels = [
                DriverKernel(kernel, start.grid, start.arrange(*places(number, start)))
                for start, kernel in zip(starts, compiled, strict=True)
            ]
        except NotSupported as reason:
            kernels = []
            _log_once(str(reason))
        self._ready[key] = Kept(kernels, device)


def places(number: int, start: Start) -> list[Operand | Tiles]:
    """Stand for so many operands of a start among its arguments."""
    descriptors = start.descriptors
    return [Tiles(i, descriptors[i]) if i in descriptors else Operand(i) for i in range(number)]


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("Triton's own launcher starts each kernel, at some 100 µs of the host: %s", reason)


def _aligned(t: torch.Tensor) -> bool:
    """Tell whether the copy engine moves tiles of ``t``: unit inner stride, rows and address multiples of 16 bytes."""
    return (
        t.shape[1] > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def product_start(
    kernel: Any,
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    branch: torch.Tensor | None,
    epilogue: Epilogue,
    tile: GemmTile,
    out_block: list[int],
    constants: Mapping[str, Any],
    *,
    grouped: bool = False,
) -> Start:
    """Prepare the start of a product of ``x [M, K]`` and ``w [N, K or K/2]``.

    Its operands are x, w, out, branch, the scales of groups, which only a kernel that is ``grouped`` takes, and the
    tensors of the epilogue in their order. Tiles travel through the copy engine (TMA, sm_90 on) where they can.
    """
    m, n = out.shape
    blocks = {0: (x, [tile.block_m, tile.block_k]), 1: (w, [tile.block_n, tile.block_k])}
    blocks |= {i: (t, out_block) for i, t in ((2, out), (3, branch)) if t is not None}
    tma = tile.tma and gpu_of(x.device).capability >= (9, 0) and all(_aligned(t) for t, _ in blocks.values())
    descriptors = {i: TensorDescriptor.from_tensor(t, block) for i, (t, block) in blocks.items()} if tma else {}
    strides = (*x.stride(), *w.stride(), out.stride(0))
    last = (epilogue.gate_stride, epilogue.tokens)

    def arrange(x: Any, w: Any, out: Any, branch: Any, group_scale: Any, *parameters: Any) -> tuple[Any, ...]:
        scales = (group_scale,) if grouped else ()
        return (x, w, out, branch, m, n, *strides, *scales, Epilogue._make((*parameters, *last)))

    grid = (number_of_programs(m, n, tile, x.device), 1, 1)
    return Start(kernel, grid, arrange, {**constants, "TMA": bool(tma), **compile_time(epilogue, tile)}, descriptors)


def number_of_programs(m: int, n: int, tile: GemmTile, device: torch.device) -> int:
    """Count programs: one per tile; with ``programs_per_sm`` as many as run at once, each taking tile after tile."""
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if tile.programs_per_sm:
        return min(tiles, tile.programs_per_sm * gpu_of(device).multiprocessors)
    return tiles


def _registers(tile: GemmTile) -> int | None:
    """Limit registers per thread so that ``programs_per_sm`` programs are resident; one that waits costs a wave."""
    limit = 65536 // (max(tile.programs_per_sm, 1) * tile.num_warps * 32) // 8 * 8
    return limit if limit < 255 else None


def compile_time(epilogue: Epilogue, tile: GemmTile) -> dict[str, Any]:
    """Return what a kernel must know of its epilogue and tile when it is compiled, and Triton's own options."""
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
