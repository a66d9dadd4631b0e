"""Ahead-of-time compilation for GPUs that are not here: the instructions, the spills, the shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTRUCTIONS = {
    80: r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    89: r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    # Triton 3.6 uses the older instruction on Blackwell, 3.9 the fifth-generation one
    100: r"tcgen05\.mma\.\S*kind::i8|mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32",
}
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
M_VALUES = (16, 512, 4096)


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """One record per architecture and kernel; compiled in a process of its own, where Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).parent / "compile_kernels.py"
    command = [sys.executable, script, json.dumps(sorted(INSTRUCTIONS)), json.dumps(M_VALUES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", sorted(INSTRUCTIONS))
def test_int8_gemm_uses_the_tensor_cores(compiled, arch):
    import re

    records = [r for r in compiled if r["arch"] == arch and r["kernel"] == "int8_gemm"]
    assert len(records) == len(M_VALUES)
    for record in records:
        # a block of 16 rows is too low for wgmma; Hopper runs it on mma.sync
        pattern = INSTRUCTIONS[80] if record["block_m"] < 64 else INSTRUCTIONS[arch]
        assert re.search(pattern, record["ptx"]), f"sm_{arch}, {record['tile']}: no {pattern}"


@pytest.mark.parametrize("arch", sorted(INSTRUCTIONS))
def test_nothing_spills_and_shared_memory_fits(compiled, arch):
    records = [r for r in compiled if r["arch"] == arch]
    assert records
    for record in records:
        assert record["stack"] == 0, f"{record['kernel']} {record['tile']} on sm_{arch} spills"
        assert record["shared"] <= SHARED_MEMORY[arch], f"{record['kernel']} {record['tile']} on sm_{arch}"
