"""Compiles every kernel for the architectures given and writes PTX and resources as JSON. Needs no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qandc_kernels import int8_gemm, quantize
from qandc_kernels.tiles import int8_gemm_tile

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(kernel, types: dict[str, str], constexprs: dict, arch: int, **options) -> dict:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # what the launcher finds at run time: 16-byte aligned pointers, sizes divisible by 16
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in types}
    unit_stride = {name: 1 for name in ("stride_xk", "stride_wk") if name in kernel.arg_names}
    for name in unit_stride:
        signature[name] = "constexpr"
    aligned = {key: value for key, value in aligned.items() if kernel.arg_names[key[0]] not in unit_stride}
    none = {name: None for name in kernel.arg_names if name not in types and name not in constexprs}
    source = ASTSource(kernel, signature, {**none, **constexprs, **unit_stride}, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **options}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
    return {
        "arch": arch,
        "ptx": compiled.asm["ptx"],
        "stack": int(found[1]) + int(found[2]),
        "shared": compiled.metadata.shared,
    }


def records(archs: list[int], m_values: list[int]):
    n, k = 3456, 1152
    for arch in archs:
        for m in m_values:
            tile = int8_gemm_tile(m, n, divmod(arch, 10))
            types = {"x_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*bf16", "M": "i32", "N": "i32"}
            types |= {"stride_xm": "i32", "stride_wn": "i32", "stride_xk": "i32", "stride_wk": "i32"}
            types |= {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
            types |= {"x_zero_point_ptr": "*i32", "w_sum_ptr": "*i32"}
            flags = {"DEQUANTIZE": True, "PER_TOKEN": False, "HAS_BIAS": True, "HAS_ZERO_POINT": True, "K": k}
            blocks = {
                "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m
            }  # fmt: skip
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            record = compile_kernel(int8_gemm._int8_gemm_kernel, types, flags | blocks, arch, **options)
            yield {"kernel": "int8_gemm", "tile": list(tile), "block_m": tile.block_m, **record}
        types = {"x_ptr": "*bf16", "q_ptr": "*i8", "M": "i32", "K": "i32", "stride_xm": "i32", "stride_xk": "i32"}
        types |= {"scale_ptr": "*fp32"}
        flags = {"QMIN": -128, "QMAX": 127, "HAS_ZERO_POINT": True, "BLOCK_M": 4, "BLOCK_K": 1024}
        record = compile_kernel(
            quantize._quantize_per_tensor_kernel, types | {"zero_point_ptr": "*i32"}, flags, arch, num_warps=4
        )
        yield {"kernel": "quantize_per_tensor", "tile": [4, 1024], **record}
        for block_k in (2048, 8192):
            flags = {"QMAX": 127, "SMALLEST_AMAX": 1e-10, "BLOCK_M": max(1, 4096 // block_k), "BLOCK_K": block_k}
            record = compile_kernel(quantize._quantize_per_token_kernel, types, flags, arch, num_warps=8)
            yield {"kernel": "quantize_per_token", "tile": [block_k], **record}


if __name__ == "__main__":
    json.dump(list(records(json.loads(sys.argv[1]), json.loads(sys.argv[2]))), sys.stdout)
