"""Choose tiles from a table tuned on the GPU where there is one, else by a closed form; nothing is tried at run time.

A table is a JSON file named after its GPU, e.g. ``nvidia-h200.json``. It is looked for in the directory that the
variable QANDC_TILES names (by default ``~/.cache/qandc_kernels``), where ``python -m qandc_kernels.tiles.tune``
writes it, then among those that come with this package.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import torch

if TYPE_CHECKING:
    from qandc_kernels.triton._epilogue import Epilogue

__all__ = [
    "LONG_SUM",
    "FewRowsTile",
    "GemmTile",
    "Gpu",
    "TunedTile",
    "checksum",
    "choose_tile",
    "few_rows_tile",
    "gemm_tile",
    "gpu_of",
    "heuristic_tile",
    "kernel_name",
    "own_tables",
    "read_table",
    "tuned_tiles",
    "whole_waves",
]

logger = logging.getLogger(__name__)

LARGEST_TABLE = 1 << 26  # bytes
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Block = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Few = Annotated[int, msgspec.Meta(ge=0, le=32)]

LONG_SUM, MOST_WAVES = 8192, 4  # where a last wave of a few tiles counts
HOPPER = (9, 0), 132  # capability and multiprocessors of an H200, and of most H100


class GemmTile(NamedTuple):
    """Hold the compile-time sizes of one GEMM launch.

    ``group_m`` rows of blocks share their weight tiles in the L2 cache. With ``programs_per_sm`` so many programs run
    on each multiprocessor and take tile after tile; 0 means one program per tile. The sums are finished and stored in
    ``subtiles`` pieces. ``tma`` is 0 where plain loads beat the tensor memory accelerator, as they do on short work.
    With ``overlap`` a launch overlaps with the end of the one before (programmatic dependent launch, sm_90 on).
    """

    block_m: Block
    block_n: Block
    block_k: Block
    group_m: Block
    num_warps: Few
    num_stages: Few
    programs_per_sm: Few = 0
    subtiles: Few = 1
    tma: Few = 1
    overlap: Few = 0


class TunedTile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold a row of a table: the fastest tile for a kernel and sizes, and the microseconds that its launch took."""

    kernel: str
    m: Size
    n: Size
    k: Size
    tile: GemmTile
    us: float = 0.0


class _Table(msgspec.Struct):
    tiles: list[TunedTile]
    sha256: str = ""


class FewRowsTile(NamedTuple):
    """Hold the compile-time sizes of a launch for a few rows: each of ``parts`` warps has blocks of K of its own."""

    block_n: int
    block_k: int
    parts: int
    num_stages: int
    overlap: int = 1


class Gpu(NamedTuple):
    """Hold what tile choice knows of a device; ``name`` is that of its table."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the properties of a CUDA device; for the CPU, where kernels are interpreted, of an unnamed Hopper."""
    if device.type != "cuda":
        return Gpu("interpreter", (9, 0), 132)
    properties = torch.cuda.get_device_properties(device)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    return Gpu(name, (properties.major, properties.minor), properties.multi_processor_count)


def own_tables() -> Path:
    """Return the directory of the tables made on this machine."""
    return Path(os.environ.get("QANDC_TILES") or os.path.expanduser("~/.cache/qandc_kernels"))


def kernel_name(family: str, epilogue: Epilogue) -> str:
    """Return the name of a kernel in tables: its operands ("int8", "int4a8", ...) and its epilogue."""
    if epilogue.out_scale is not None:
        return family + " gelu"
    if epilogue.gate is not None:
        return family + " gate"
    return family + (" token" if epilogue.x_scale is not None and epilogue.x_scale.ndim else "")


def checksum(rows: Sequence[TunedTile]) -> str:
    """Return the SHA-256 of rows, which their table holds."""
    return hashlib.sha256(msgspec.json.encode(rows)).hexdigest()


def read_table(path: Path) -> list[TunedTile]:
    """Read the rows of a table.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, is no table of tiles, or has changed since.
    """
    if not path.is_file() or path.stat().st_size > LARGEST_TABLE:
        raise ValueError(f"it is no file of at most {LARGEST_TABLE:,} bytes")
    table = msgspec.json.decode(path.read_bytes(), type=_Table)
    if table.sha256 != checksum(table.tiles):
        raise ValueError("it is not as it was written (checksum)")
    return table.tiles


@functools.cache
def tuned_tiles(gpu: str) -> dict[str, dict[tuple[int, int], dict[int, GemmTile]]]:
    """Return tiles by kernel, (N, K) and M: none without a table for this GPU; a broken one is logged."""
    for directory in (own_tables(), Path(__file__).parent / "tuned"):
        path = directory / f"{gpu}.json"
        if not path.exists():
            continue
        tables: dict[str, dict[tuple[int, int], dict[int, GemmTile]]] = {}
        try:
            for row in read_table(path):
                tables.setdefault(row.kernel, {}).setdefault((row.n, row.k), {})[row.m] = row.tile
        except (OSError, ValueError, RecursionError) as error:
            logger.warning(
                "%s is no table of tiles (%s); make a new one: python -m qandc_kernels.tiles.tune", path, error
            )
            continue
        return tables
    return {}


@functools.lru_cache(maxsize=4096)
def choose_tile(kernel: str, m: int, n: int, k: int, gpu: Gpu) -> GemmTile:
    """Look the tile of a kernel up, else that of the plain product of this (N, K); no rows take that of one."""
    m = max(m, 1)
    names = [gpu.name] if gpu[1:] != HOPPER else [gpu.name, "nvidia-h200"]  # the same chip beside other memory
    own, plain = (
        [tuned_tiles(name).get(which, {}).get((n, k), {}) for name in names] for which in (kernel, kernel.split()[0])
    )
    # an ending needs registers that three programs on a multiprocessor don't leave
    plain = [{rows: tile for rows, tile in each.items() if tile.programs_per_sm < 3} for each in plain]
    rows = next(filter(None, (*own, *plain)), {})
    if rows:
        nearest = min(rows, key=lambda tuned: abs(math.log(tuned / m)))
        if nearest / 2 <= m <= nearest * 2:
            return rows[nearest]
    return heuristic_tile(kernel, m, n, k, gpu)


def gemm_tile(family: str, epilogue: Epilogue, m: int, n: int, k: int, device: torch.device) -> GemmTile:
    """Return the tile of an ``[M, K] x [N, K]`` product: tuned for this (N, K) and half to twice this M, or computed.

    ``family`` is "int8" (W8A8), "int4a8", "int4a16" or "int8a16"; with a g behind it weights have scales per group.
    """
    return choose_tile(kernel_name(family, epilogue), m, n, k, gpu_of(device))


@functools.lru_cache(maxsize=4096)
def whole_waves(kernel: str, m: int, n: int, k: int, gpu: Gpu) -> int:
    """Return the rows after which a product is cut in two launches, or 0 where one launch is better.

    Where programs take tile after tile, a last wave of a few tiles takes as long as a full one: of long sums so long
    that the rows of that wave are sooner computed by a launch of their own, with smaller tiles.
    """
    tile = choose_tile(kernel, m, n, k, gpu)
    at_once, columns = tile.programs_per_sm * gpu.multiprocessors, math.ceil(n / tile.block_n)
    if k < LONG_SUM or not at_once:
        return 0
    waves, rest = divmod(math.ceil(m / tile.block_m) * columns, at_once)
    rows = waves * at_once // columns * tile.block_m
    return rows if 0 < rows < m and waves <= MOST_WAVES and 2 * rest <= at_once else 0


def heuristic_tile(kernel: str, m: int, n: int, k: int, gpu: Gpu) -> GemmTile:
    """Compute a good tile without measurement.

    wgmma (Hopper) takes blocks of at least 64 rows of the left operand, which is the weight unless both are int8. A
    large product gets blocks of 128 x 128: two or three programs of one warpgroup share a Hopper multiprocessor, so
    that the tensor cores work for one while another stores. A small one gets smaller blocks, until all multiprocessors
    have one. Stages are bounded by shared memory: 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on the others.
    """
    family, _, ending = kernel.partition(" ")
    small_memory = gpu.capability[0] == 12 or (gpu.capability[0] == 8 and gpu.capability[1] != 0)
    hopper = gpu.capability >= (9, 0) and not small_memory
    large = math.ceil(m / 128) * math.ceil(n / 128) >= gpu.multiprocessors
    if m <= 32:
        block_m = 16 if m <= 16 else 32
        return GemmTile(block_m, 64, 128, 1, 4, 4) if family == "int8" else GemmTile(block_m, 64, 64, 1, 4, 4)
    if family.endswith("g"):  # two sets of sums, of the group and of all: larger blocks do not fit the registers
        return GemmTile(64, 64, 64, 8, 4, 4)
    if family != "int8":  # a stage holds a tile of the weight and one or two of the activations
        if not hopper:
            return GemmTile(128, 128, 64, 8, 8, 2 if small_memory else 3) if large else GemmTile(64, 64, 32, 8, 4, 4)
        return GemmTile(128, 128, 64, 8, 4, 3) if large else GemmTile(64, 64, 64, 8, 4, 3)
    if large and gpu.capability[0] == 9 and k < 2048 and ending != "gate":  # whose registers three would not leave
        return GemmTile(128, 128, 128, 8, 4, 2, programs_per_sm=3, subtiles=4)
    if large and hopper:  # long sums hide the stores better, and want deeper prefetch
        return GemmTile(128, 128, 128, 16, 4, 3, programs_per_sm=2, subtiles=4)
    if large:
        return GemmTile(128, 128, 64 if small_memory else 128, 8, 8, 4)
    return GemmTile(64, 64, 128, 8, 4, 4)


def few_rows_tile(m: int, k: int, packed: bool, device: torch.device) -> FewRowsTile:
    """Choose the tile for at most 16 rows: the best of some twenty, measured on an H200."""
    overlap = int(gpu_of(device).capability >= (9, 0))
    if (k // 2 if packed else k) % 16:  # byte by byte: larger blocks spill
        return FewRowsTile(32 if m <= 8 else 16, 64, 4, 4, overlap)
    if packed and m > 8:  # two blocks of x a step: fewer programs read it
        return FewRowsTile(32, 128, 4, 2, overlap)
    return FewRowsTile(16, 128, 4, 3 if packed or m > 8 else 4, overlap)
