"""Measure tiles on the GPU at hand and write the fastest as a table.

    python -m qandc_kernels.tiles.tune                                        # the layers of DiT-XL/2
    python -m qandc_kernels.tiles.tune --layers 576x192 768x192 192x768 192x192 --rows 640 1280

Candidates are compiled by several processes, then timed one after another inside CUDA graphs that walk over many
weights, as a network does: weights come from memory, activations from the L2 cache. The table goes to the directory
where :mod:`qandc_kernels.tiles.tables` looks first; entries for other shapes that are there already stay.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from qandc_kernels.backend import select_backend
from qandc_kernels.capture import capturing
from qandc_kernels.errors import ArgumentError
from qandc_kernels.ops._operands import check_integer, check_layers, check_list, check_sizes
from qandc_kernels.tiles.tables import GemmTile, TunedTile, checksum, gpu_of, own_tables, read_table

__all__ = ["Problem", "candidates", "main", "time_launches", "tune", "write_table"]

logger = logging.getLogger("qandc_kernels.tiles.tune")

DIT_XL_2 = [(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)]  # (N, K): qkv, out, fc1, fc2
ROWS = [16, 128, 512, 1024, 2048, 4096, 8192, 16384]
KERNELS = [f"{family}{ending}" for family in ("int8", "int4a8") for ending in ("", " token", " gelu", " gate")]
KERNELS += ["int8a16", "int4a16"]
TOKENS = 256  # rows per sample, for the gate


class Problem(NamedTuple):
    kernel: str
    m: int
    n: int
    k: int


def candidates(kernel: str, m: int) -> Iterator[GemmTile]:
    """Yield tiles worth trying for ``m`` rows. Those that no GPU has shared memory or registers for fail when launched.

    Raises:
        ArgumentError: ``kernel`` is none of KERNELS, or ``m`` no size.
    """
    _checked([], [m], [kernel])
    rows = [block for block in (16, 32, 64, 128) if block < 2 * m or block == 16]
    if kernel.split()[0] == "int8":
        sizes = [(16, 64), (16, 128), (32, 64), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128)]
        for block_m, block_n in sizes:
            if block_m not in rows or (block_m < 64 and m > 128):
                continue
            for stages in (3, 5) if block_m * block_n < 16384 else (3,):
                yield GemmTile(block_m, block_n, 128, 8, 4, stages)
                for tma, overlap in ((0, 0), (0, 1), (1, 1)):
                    if m <= 1024 and (tma or block_m * block_n < 16384):
                        yield GemmTile(block_m, block_n, 128, 8, 4, stages, tma=tma, overlap=overlap)
        if 128 in rows and m > 128:
            yield GemmTile(128, 128, 64, 8, 4, 4, 0, 4)
            yield GemmTile(128, 128, 128, 8, 8, 3)
            for group_m, subtiles in itertools.product((4, 8, 16), (1, 2, 4)):
                yield GemmTile(128, 128, 128, group_m, 4, 3, 2, subtiles)
                if subtiles > 1:
                    yield GemmTile(128, 128, 128, group_m, 4, 2, 3, subtiles)
                    yield GemmTile(128, 128, 64, group_m, 4, 4, 3, subtiles)
    else:
        for block_m, block_n, block_k, stages in [
            (16, 64, 64, 4), (16, 64, 128, 4), (16, 128, 64, 4), (32, 64, 64, 4), (32, 64, 128, 4),
            (64, 64, 64, 3), (64, 64, 64, 5), (64, 64, 128, 3), (64, 64, 128, 4), (64, 128, 64, 3), (64, 128, 64, 4),
            (128, 64, 64, 3), (128, 64, 64, 5), (128, 128, 64, 3), (128, 128, 64, 4),
        ]:  # fmt: skip
            if block_m not in rows or (block_m < 64 and m > 128):
                continue
            yield GemmTile(block_m, block_n, block_k, 8, 4, stages)
            if m <= 1024:
                for tma, overlap in ((0, 0), (0, 1), (1, 1)):
                    yield GemmTile(block_m, block_n, block_k, 8, 4, stages, tma=tma, overlap=overlap)
            elif block_m * block_n >= 8192:
                for subtiles in (1, 2, 4):
                    yield GemmTile(
                        block_m, block_n, block_k, 8, 4, stages, 2 if block_m * block_n > 8192 else 3, subtiles
                    )
        if 128 in rows and m > 512:
            yield GemmTile(128, 128, 64, 8, 8, 3)


def _checked(
    layers: list[tuple[int, int]], rows: list[int], kernels: list[str], processes: int = 1
) -> tuple[list[tuple[int, int]], list[int], list[str]]:
    kernels = check_list("tune", "kernels", kernels)
    for name in kernels:
        if not isinstance(name, str) or name not in KERNELS:
            raise ArgumentError(f"tune: kernels are {', '.join(KERNELS)}; got {name!r}")
    layers = check_layers("tune", layers, 2 if any(name.startswith("int4") for name in kernels) else 1)
    check_integer("tune", "processes", processes, 1, 1024)
    return layers, check_sizes("tune", "rows", rows), kernels


def launcher(problem: Problem, copies: int) -> Callable[[GemmTile, int], torch.Tensor]:
    """Return a function that launches the kernel of ``problem`` with a tile on the i-th of ``copies`` weights."""
    from qandc_kernels.triton._epilogue import Epilogue
    from qandc_kernels.triton.int8_gemm import int8_gemm_triton
    from qandc_kernels.triton.mixed_gemm import mixed_gemm_triton

    kernel, m, n, k = problem
    family, _, ending = kernel.partition(" ")
    packed, halves = family.startswith("int4"), family.endswith("a16")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8, device="cuda")
    if halves:
        x = x.to(torch.bfloat16)
    shape, dtype = ((copies, n, k // 2), torch.uint8) if packed else ((copies, n, k), torch.int8)
    weights = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cuda").view(dtype).unbind()
    one = torch.full((), 1e-4, device="cuda")
    vector = torch.randn(math.ceil(m / TOKENS), 6 * n, generator=generator, device="cuda", dtype=torch.bfloat16)
    epilogue = Epilogue(None if halves else one, torch.ones(n, device="cuda"), vector[0, :n])
    if ending == "token":
        epilogue = epilogue._replace(x_scale=torch.full((m,), 1e-4, device="cuda"))
    elif not halves:  # zero points, as static ranges usually have them: they need registers
        integer = torch.zeros((), dtype=torch.int32, device="cuda")
        epilogue = epilogue._replace(x_zero_point=integer, w_sum=torch.zeros(n, dtype=torch.int32, device="cuda"))
    if ending == "gelu":
        epilogue = epilogue._replace(out_scale=one * 1000, out_zero_point=integer)
    elif ending == "gate":
        epilogue = epilogue._replace(gate=vector[:, :n], gate_stride=vector.stride(0), tokens=TOKENS)
    out = torch.zeros(m, n, dtype=torch.int8 if ending == "gelu" else torch.bfloat16, device="cuda")

    def launch(tile: GemmTile, i: int) -> torch.Tensor:
        if family == "int8":
            return int8_gemm_triton(x, weights[i], out, epilogue, tile=tile)
        return mixed_gemm_triton(x, weights[i], out, epilogue, tile=tile)

    return launch


def time_launches(launch: Callable[[int], object], copies: int, repeats: int) -> float:
    """Return the median seconds of one launch, from ``repeats`` replays of a CUDA graph of ``copies`` launches.

    Raises:
        ArgumentError: ``copies`` or ``repeats`` is not a positive integer.
    """
    check_integer("time_launches", "copies", copies, 1, 2**20)
    check_integer("time_launches", "repeats", repeats, 1, 2**20)
    launch(0)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for i in range(copies):
            launch(i)
    seconds = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3 / copies)
    return statistics.median(seconds[1:])


def _compile(problem: Problem, tiles: list[GemmTile]) -> None:
    """Fill Triton's cache on disk; what does not compile will fail again, and be logged, where it is timed."""
    from triton.errors import TritonError

    launch = launcher(problem, 1)
    for tile in tiles:
        try:
            launch(tile, 0)
        except (TritonError, RuntimeError) as error:
            logger.debug("%s %s: %s", problem.kernel, tile, error)


def _fastest(problem: Problem) -> tuple[GemmTile, float]:
    from triton.errors import TritonError

    copies = max(2, min(64, int(1e8 / (problem.n * problem.k))))
    launch = launcher(problem, copies)
    timed = []
    for tile in dict.fromkeys(candidates(problem.kernel, problem.m)):
        try:
            timed.append((time_launches(functools.partial(launch, tile), copies, 2), tile))
        except (TritonError, RuntimeError) as error:  # more shared memory or registers than there are
            logger.debug("%s %s: %s", problem.kernel, tile, error)
    if not timed:
        raise RuntimeError(f"no tile of {problem} could be launched; --verbose tells why")
    best = [tile for _, tile in sorted(timed)[:4]]
    seconds, tile = min((time_launches(functools.partial(launch, tile), copies, 7), tile) for tile in best)
    return tile, seconds


def tune(layers: list[tuple[int, int]], rows: list[int], kernels: list[str], processes: int) -> list[TunedTile]:
    """Return the fastest tile of every kernel for every (N, K) and M, with its time.

    Raises:
        ArgumentError: a size is not positive, an odd K meets int4, a kernel is none of KERNELS, or ``processes`` < 1.
    """
    layers, rows, kernels = _checked(layers, rows, kernels, processes)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for kernel, k in itertools.product(kernels, sorted({k for _, k in layers})):  # M and N are run-time arguments
            tiles = list(dict.fromkeys(tile for m in rows for tile in candidates(kernel, m)))
            jobs += [pool.submit(_compile, Problem(kernel, 512, 128, k), tiles[i::4]) for i in range(4)]
        for done, job in enumerate(jobs, 1):
            job.result()
            logger.info("compiled %d of %d groups", done, len(jobs))
    entries = []
    for (n, k), m, kernel in itertools.product(layers, rows, kernels):
        tile, seconds = _fastest(Problem(kernel, m, n, k))
        entries.append(TunedTile(kernel, m, n, k, tile, round(seconds * 1e6, 2)))
        logger.info("%s %d x %d x %d: %s, %.1f us", kernel, m, n, k, tuple(tile), seconds * 1e6)
    return entries


def _layer(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    try:
        return int(n), int(k)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no layer; give out_features x in_features, e.g. 3456x1152"
        ) from None


def write_table(path: Path, header: dict[str, Any], rows: list[TunedTile]) -> None:
    """Write a table with a row to a line, and its checksum, beside its name, then rename."""
    partial = path.with_suffix(".partial")
    lines = ",\n".join("  " + msgspec.json.encode(row).decode() for row in rows)
    head = json.dumps({**header, "sha256": checksum(rows)})[:-1]
    partial.write_text(f'{head}, "tiles": [\n{lines}\n]}}\n')
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qandc_kernels.tiles.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=_layer, nargs="+", default=DIT_XL_2, metavar="NxK", help="default: DiT-XL/2")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="batch times tokens")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, help=f"directory of the table (default: {own_tables()})")
    parser.add_argument("--verbose", action="store_true", help="tell which tiles failed, and why")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    try:
        _checked(options.layers, options.rows, options.kernels, options.processes)
    except ArgumentError as error:
        parser.error(str(error))
    backend = select_backend("cuda" if torch.cuda.is_available() else "cpu")
    if backend.name != "triton":
        parser.error(f"tiles are measured on a GPU; {backend.reason}")
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    path = (options.out or own_tables()) / f"{gpu.name}.json"
    try:  # before the hours that tuning takes
        path.parent.mkdir(parents=True, exist_ok=True)
        old = {(row.kernel, row.m, row.n, row.k): row for row in (read_table(path) if path.exists() else ())}
    except (OSError, ValueError, RecursionError) as error:
        parser.error(f"{path} cannot be made or is no table of tiles ({error}); give another --out, or remove it")
    tuned = tune(options.layers, options.rows, options.kernels, options.processes)
    new = {(row.kernel, row.m, row.n, row.k) for row in tuned}
    tuned += [row for key, row in old.items() if key not in new]
    import triton

    header = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
    write_table(path, header, tuned)
    logger.info("%s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
