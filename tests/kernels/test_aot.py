"""Ahead-of-time compilation for GPUs that are not here: instructions, spills, shared memory, safe waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ARCHITECTURES = (80, 89, 90, 100)
FAMILIES = ("int8", "int4a8", "int4a16", "int8a16", "int4a8g", "int4a16g")
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """One record per architecture and kernel; compiled in processes of their own, where Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "QANDC_TILES": str(tmp_path_factory.mktemp("no-own-tables"))}
    script = Path(__file__).parent / "compile_kernels.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, json.dumps([arch])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for arch in ARCHITECTURES
    ]  # fmt: skip
    records = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        records += json.loads(output)
    return records


def of(compiled: list[dict], arch: int, *families: str) -> list[dict]:
    records = [r for r in compiled if r["arch"] == arch and (not families or r["kernel"].split()[0] in families)]
    assert records
    return records


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_use_the_tensor_cores(compiled, arch, family):
    kind = "16" if "a16" in family else "int8"
    for record in of(compiled, arch, family):
        block_m, block_n = record["tile"][:2]
        # wgmma takes 64 rows of its left operand, which is the weight unless both are int8
        if arch == 90 and (block_m if record["kernel"].split()[0] == "int8" else block_n) >= 64:
            wanted = {f"wgmma {kind}"}
        elif arch == 100:  # Triton 3.6 uses the older instruction on Blackwell, 3.9 the fifth-generation one
            wanted = {"tcgen05", f"mma {kind}"}
        else:
            wanted = {f"mma {kind}"}
        assert wanted & set(record["instructions"]), f"sm_{arch}, {record['kernel']} {record['tile']}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_uses_the_tensor_cores(compiled, arch):
    wanted = {"wgmma 16"} if arch == 90 else {"mma 16", "tcgen05"} if arch == 100 else {"mma 16"}
    for record in of(compiled, arch, "attention"):
        assert wanted & set(record["instructions"]), record


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_rows_read_the_weight_16_bytes_at_a_time(compiled, arch):
    for record in of(compiled, arch, "few_rows"):
        assert "mma 16" in record["instructions"], record
        assert ("overlap" in record["instructions"]) == (arch >= 90), record
        if record["tile"][2] == 3072:
            assert "copy 16" in record["instructions"], record
            assert "copy less" not in record["instructions"], record


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["attention", "quantize_per_tensor"])
def test_a_flag_costs_no_atomics_and_nothing_where_there_is_none(compiled, arch, kernel):
    flags = [record for record in of(compiled, arch, kernel) if isinstance(record["tile"][-1], bool)]
    assert {record["tile"][-1] for record in flags} == {True, False}
    for record in flags:
        assert "atomic" not in record["instructions"], record
        assert ("flag" in record["instructions"]) == record["tile"][-1], record


@pytest.mark.parametrize("arch", [90, 100])
def test_tiles_travel_through_the_copy_engine(compiled, arch):
    for record in of(compiled, arch, *FAMILIES):
        if record["tile"][8]:
            assert "tma load" in record["instructions"], record
            assert ("tma add" in record["instructions"]) == ("gate" in record["kernel"]), record


def test_launches_overlap_where_a_tile_says_so(compiled):
    for record in of(compiled, 90, *FAMILIES):
        assert ("overlap" in record["instructions"]) == bool(record["tile"][9]), record
    for record in of(compiled, 90, "attention"):
        assert "overlap" in record["instructions"], record
    for record in of(compiled, 90, "adaln"):
        assert ("overlap" in record["instructions"]) == (record["tile"][0] == 2), record  # 512 rows, not 16384


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills_and_shared_memory_fits(compiled, arch):
    for record in of(compiled, arch):
        assert record["stack"] == 0, f"{record['kernel']} {record['tile']} on sm_{arch} spills"
        assert record["shared"] <= SHARED_MEMORY[arch], f"{record['kernel']} {record['tile']} on sm_{arch}"


def test_all_programs_that_take_tile_after_tile_fit_at_once(compiled):
    """One that had to wait for a place would begin when the others end."""
    for record in of(compiled, 90, "int8", "int4a8", "int4a16", "int8a16"):
        programs, warps = record["tile"][6], record["tile"][4]
        assert programs * warps * 32 * record["registers"] <= 65536, record
        assert programs * (record["shared"] + 1024) <= 228 * 1024, record


def test_no_product_runs_on_while_its_registers_are_refilled(compiled):
    """Seen on an H200 with one product a step: NaN now and then. wgmma then waits for all but a few of its kind."""
    for record in of(compiled, 90, *FAMILIES[1:], "attention"):
        assert record["waits"] in ([], [0]), record


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_take_the_parameters_that_the_driver_is_given(compiled, arch):
    known = [record for record in of(compiled, arch) if record["given"] is not None]
    others = {"quantize_per_tensor", "quantize_per_token", "gelu_quantize_per_token"}
    assert {record["kernel"] for record in known} >= {*FAMILIES, *others}
    for record in known:
        taken, given = record["parameters"], record["given"]
        assert taken in (given, [*given, 8], [*given, 8, 8]), record
