"""Compiles what the launchers would launch on other GPUs, and writes PTX facts and resources as JSON. Needs no GPU.

python compile_kernels.py '[80, 90]'                # the kernels with the tiles that ship for these architectures
python compile_kernels.py '[90]' candidates         # the GEMMs with every tile that the tuner tries
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qandc_kernels.tiles import tables as tiles
from qandc_kernels.tiles import tune
from qandc_kernels.triton import _launch, adaln, attention, batched, denoise, few_rows, quantize, residual, rotary
from qandc_kernels.triton._driver import sizes as driver_sizes
from qandc_kernels.triton._epilogue import Epilogue
from qandc_kernels.triton.int8_gemm import int8_gemm_triton
from qandc_kernels.triton.mixed_gemm import mixed_gemm_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHAPES = [(m, n, k) for m in (1, 17, 128, 512, 1000, 2048, 4096, 8192, 16384) for n, k in tune.DIT_XL_2]
SHAPES.append((8192, 8192, 8192))
PTX = {
    "wgmma int8": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    "wgmma 16": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
    "mma int8": r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    "mma 16": r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32",
    "tcgen05": r"tcgen05\.mma\.",
    "overlap": r"griddepcontrol\.wait",
    "tma load": r"cp\.async\.bulk\.tensor\.2d\.shared",
    "copy 16": r"cp\.async\.c[ag]\.shared\.global \[[^;]*, 0x10\b",
    "copy less": r"cp\.async\.c[ag]\.shared\.global \[[^;]*, 0x[48]\b",
    "flag": r"st\.global\.b32",  # integers are stored by fours and more
    "atomic": r"\b(atom|red)\.",
    "tma add": r"cp\.reduce\.async\.bulk\.tensor\.2d\.global\.shared::cta\.add",
}


class CompileOnly:
    """A driver for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: list = []
given: list[list[int]] = []  # bytes of each parameter, as the driver would be given them


def _compile_only(run):
    def wrapper(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    return wrapper


def _noting_parameters(start):
    def wrapper(self, operands):
        start(self, operands)
        binary = compiled[-1]
        arguments = self.arrange(*_launch.places(len(operands), self))
        given.append(driver_sizes(list(binary.src.signature.values()), arguments))

    return wrapper


def record(arch: int, kernel: str, tile) -> dict:
    binary = compiled.pop()
    assert not compiled
    taken = re.findall(r"\.param (?:\.align \d+ )?\.(\w)(\d+)[^\[,)\n]*?(?:\[(\d+)\])?[,\n]", binary.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    return {
        "arch": arch,
        "kernel": kernel,
        "tile": list(tile),
        "instructions": [name for name, pattern in PTX.items() if re.search(pattern, binary.asm["ptx"])],
        "registers": int(found[1]),
        # a product that runs on while registers it reads from are refilled gives wrong results
        "waits": sorted({int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", binary.asm["ptx"])}),
        "stack": int(found[2]) + int(found[3]),
        "shared": binary.metadata.shared,
        "parameters": [int(count or 1) * int(bits) // 8 for _, bits, count in taken],
        "given": given.pop() if given else None,
    }


def launch_gemm(
    kernel: str, m: int, n: int, k: int, tile: tiles.GemmTile | None, branch: bool = False, per_token: bool = False
) -> None:
    """Launch a matrix product as the ops do, with every optional operand of its kernel."""
    family, _, ending = kernel.partition(" ")
    halves, packed = family.endswith("a16"), family.startswith("int4")
    x = torch.zeros(m, k, dtype=torch.bfloat16 if halves else torch.int8)
    weight = torch.zeros(n, k // 2, dtype=torch.uint8) if packed else torch.zeros(n, k, dtype=torch.int8)
    one, integer, vector = torch.ones(()), torch.zeros((), dtype=torch.int32), torch.ones(n)
    parameters = Epilogue(None if halves else one, vector, vector.bfloat16())
    if ending == "gelu":
        parameters = parameters._replace(out_scale=one, out_zero_point=integer, multiplier=vector)
    elif ending == "gate":
        parameters = parameters._replace(gate=torch.zeros(m // 256 + 1, n).bfloat16(), gate_stride=n, tokens=256)
    out = torch.zeros(m, n, dtype=torch.int8 if ending == "gelu" else torch.bfloat16)
    if ending == "token" or per_token:
        parameters = parameters._replace(x_scale=torch.ones(m))
    elif not halves:
        parameters = parameters._replace(x_zero_point=integer, w_sum=vector.int())
    kept = torch.zeros_like(out) if branch else None
    if family == "int8":
        int8_gemm_triton(x, weight, out, parameters, tile, kept)
    else:
        mixed_gemm_triton(x, weight, out, parameters, tile=tile, branch=kept)


def records(arch: int, every_candidate: bool) -> Iterator[dict]:
    shipped = ["nvidia-h200", "nvidia-h100-80gb-hbm3"] if arch == 90 else [f"sm_{arch}"]
    gpus = [tiles.Gpu(name, divmod(arch, 10), 132) for name in shipped]
    gpu = gpus[0]
    tiles.gpu_of = _launch.gpu_of = adaln.gpu_of = attention.gpu_of = batched.gpu_of = lambda device: gpu
    seen = set()
    for kernel in tune.KERNELS:
        for m, n, k in SHAPES:
            chosen = {tiles.choose_tile(kernel, m, n, k, gpu) for gpu in gpus}
            if m == 4096:  # all tiles that ship, whatever their layer is
                tables = [tiles.tuned_tiles(gpu.name) for gpu in gpus]
                own, plain = (
                    {t for table in tables for rows in table.get(name, {}).values() for t in rows.values()}
                    for name in (kernel, kernel.split()[0])
                )
                chosen |= own | {t for t in plain if t.programs_per_sm < 3}
                if kernel.endswith("gate"):
                    chosen |= {tiles.heuristic_tile(kernel, 16384, 4608, inner, gpu) for inner in (1152, 4608)}
            if every_candidate:
                chosen = set(tune.candidates(kernel, m))
            for tile in chosen:
                if (kernel, tile) in seen:
                    continue
                seen.add((kernel, tile))
                try:
                    launch_gemm(kernel, m, n, k, tile)
                except triton.errors.TritonError as error:
                    if not every_candidate:
                        raise
                    yield {"arch": arch, "kernel": kernel, "tile": list(tile), "error": str(error)[:80]}
                    continue
                yield record(arch, kernel, tile)
                if kernel.endswith("gate") and not every_candidate:
                    for branch, per_token in ((True, False), (True, True), (False, True)):
                        launch_gemm(kernel, m, n, k, tile, branch, per_token)
                        yield record(arch, f"{kernel}{' branch' * branch}{' token' * per_token}", tile)
    if every_candidate:
        return
    sums = torch.zeros(512, 1152, dtype=torch.int32), tiles.GemmTile(64, 64, 64, 8, 4, 3)
    x = torch.zeros(512, 192, dtype=torch.int8)
    int8_gemm_triton(x, torch.zeros(1152, 192, dtype=torch.int8), sums[0], tile=sums[1])
    yield record(arch, "int8 sums", sums[1])
    groups, parameters = torch.ones(1152, 6), Epilogue(torch.ones(()), bias=torch.ones(1152))
    out, packed = torch.zeros(512, 1152).bfloat16(), torch.zeros(1152, 96, dtype=torch.uint8)
    for kernel, activations, x_scale in (("int4a8g", x, parameters.x_scale), ("int4a16g", x.bfloat16(), None)):
        tile = tiles.heuristic_tile(kernel, 512, 1152, 192, gpu)
        mixed_gemm_triton(activations, packed, out, parameters._replace(x_scale=x_scale), groups, tile=tile)
        yield record(arch, kernel, tile)
    one, integer = torch.ones(()), torch.zeros((), dtype=torch.int32)
    for samples, width in ((2, 1152), (64, 1152), (2, 8000)):
        x = torch.zeros(samples, 256, width).bfloat16()
        for *arguments, copy in (
            (one, integer, torch.zeros_like(x)),
            (one, integer, None),
            (None, None, torch.zeros_like(x)),
        ):
            adaln.adaln_quantize_triton(x.view(-1, width), 256, x[:, 0], x[:, 1], *arguments, 1e-6, copy)
            yield record(arch, "adaln", [samples, width])
    for batch, tokens, width in ((2, 256, 72), (16, 256, 72), (64, 256, 72), (16, 1024, 72), (2, 64, 32), (2, 50, 128)):
        parts = torch.zeros(batch, tokens, 3, 16, width).bfloat16().unbind(2)
        for flag, bias in ((None, None), (integer, None), (integer, torch.zeros(batch, tokens).bfloat16())):
            attention.attention_quantize_triton(*parts, one, integer, flag, bias)
            yield record(arch, "attention", [batch, tokens, width, bias is not None, flag is not None])
        cos, sin = torch.zeros(2, tokens, width)
        for tables in ((cos, sin), (cos[:, ::2], sin[:, ::2]), (None, None)):
            rotary.qk_norm_rope_triton(torch.stack(parts, 2), cos[0].bfloat16(), sin[0].bfloat16(), *tables, 1e-6)
            yield record(arch, "qk_norm_rope", [batch, tokens, width])
    for rows, inner, columns in ((2, 1152, 6912), (16, 256, 1152), (64, 1152, 6912), (5, 100, 70)):
        x, bias = torch.zeros(1, rows, inner).bfloat16(), torch.zeros(1, columns).bfloat16()
        batched.batched_gemm_triton(x, torch.zeros(1, columns, inner).bfloat16(), bias, 0.25)
        yield record(arch, "batched_linear", [rows, inner, columns])
    for packed, rows, columns, inner in itertools.product((False, True), (1, 2, 16), (18432, 577), (3072, 858)):
        x, out = torch.zeros(rows, inner).bfloat16(), torch.zeros(rows, columns).bfloat16()
        weight = torch.zeros(columns, inner // 2 if packed else inner, dtype=torch.int8)
        parameters = Epilogue(None, torch.ones(columns), torch.zeros(columns).bfloat16())
        few_rows.few_rows_start(x, weight, out, parameters)((x, weight, out, None, None, *parameters[:-2]))
        yield record(arch, f"few_rows {'int4' if packed else 'int8'}", [rows, columns, inner])
    for samples, sets, dtype in (
        (1, 1, torch.bfloat16),
        (2, 1, torch.bfloat16),
        (64, 2, torch.bfloat16),
        (64, 1, torch.int8),
    ):
        x, features = torch.zeros(samples, 256, 1152).bfloat16(), torch.zeros(1, dtype=dtype)
        features = features.expand(sets, 28, 2, samples, 256, 1152)
        gates, scales = x[:, :2].transpose(0, 1).expand(28, -1, -1, -1), None
        if dtype == torch.int8:
            scales = torch.ones(1).expand(features.shape[:5])
        weights, offset = (torch.ones(sets), torch.ones(samples, 1152)) if sets > 1 else (None, None)
        residual.gated_sum_triton(x, features, gates, weights, scales, offset)
        yield record(arch, "gated_sum", [samples, sets, dtype.itemsize])
    gates = torch.zeros(28, 2, 6, 1152).bfloat16()[:, :, 2::3].transpose(1, 2)
    residual.corrected_gates_triton(gates, *torch.zeros(2, 28, 2, 1152))
    yield record(arch, "corrected_gates", [1152])
    latents, coefficients = torch.zeros(2, 4, 32, 32), torch.zeros(3, 4)
    for guidance_scale, rows in ((4.0, 4), (None, 2)):
        denoise.guided_step_triton(torch.zeros(rows, 8, 32, 32).bfloat16(), latents, coefficients, guidance_scale)
        yield record(arch, "guided_step", [rows])
    for width in (1152, 4608):
        x = torch.zeros(512, width).bfloat16()
        for flag in (None, integer):
            quantize.quantize_per_tensor_triton(x, one, integer, nan_flag=flag)
            yield record(arch, "quantize_per_tensor", [width, flag is not None])
        quantize.quantize_per_token_triton(x)
        yield record(arch, "quantize_per_token", [width])
    for width, heads in ((4608, None), (12288, 24), (12288, None), (10240, None), (15360, 24)):
        beside = None if heads is None else torch.zeros(1, heads, 128).bfloat16()
        quantize.gelu_quantize_per_token_triton(torch.zeros(1, width).bfloat16(), torch.ones(width), beside)
        yield record(arch, "gelu_quantize_per_token", [width, heads or 0])
    x = torch.zeros(2, 16, 256, 72).bfloat16().transpose(1, 2)
    quantize.quantize_per_tensor_triton(x, one, integer)
    yield record(arch, "quantize_per_tensor", [16, 72])


if __name__ == "__main__":
    JITFunction.run = _compile_only(JITFunction.run)
    _launch.Start.__call__ = _noting_parameters(_launch.Start.__call__)
    found = []
    for arch in json.loads(sys.argv[1]):
        driver.set_active(CompileOnly(arch))
        found += records(arch, sys.argv[2:] == ["candidates"])
    json.dump(found, sys.stdout)
