"""Tile choice, tables, the tuner's command line, warm-up."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

import qandc_kernels
from qandc_kernels.tiles import tables as tiles
from qandc_kernels.tiles import tune
from qandc_kernels.tiles.tables import GemmTile, Gpu, gemm_tile, heuristic_tile, kernel_name
from qandc_kernels.triton._epilogue import Epilogue
from tests.conftest import in_time

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KB
CPU = torch.device("cpu")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("QANDC_TILES", str(tmp_path))
    tiles.tuned_tiles.cache_clear()
    tiles.choose_tile.cache_clear()
    yield tmp_path
    tiles.tuned_tiles.cache_clear()
    tiles.choose_tile.cache_clear()


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=str)
@pytest.mark.parametrize("family", ["int8", "int4a8", "int4a16", "int8a16", "int4a8g", "int4a16g"])
def test_heuristic_tiles_fit_shared_memory(capability, family):
    for m in (1, 17, 64, 256, 1000, 4096, 16384):
        for n, k in ((32, 1152), (1152, 4608), (3456, 1152), (8192, 8192)):
            tile = heuristic_tile(family, m, n, k, Gpu("any", capability, 108))
            x_bytes = (2 if "a16" in family else 1) * (2 if family.startswith("int4") else 1)
            stage = (tile.block_m * x_bytes + tile.block_n) * tile.block_k
            assert stage * tile.num_stages * max(1, tile.programs_per_sm) <= SHARED_MEMORY[capability] * 1024
            if capability < (9, 0):
                assert tile.programs_per_sm == 0


def test_every_multiprocessor_gets_work():
    """Where there are rows enough, blocks shrink until there is one for each."""
    for m in (512, 1024, 4096, 16384):
        for n in (1152, 4608):
            tile = heuristic_tile("int8", m, n, 1152, Gpu("any", (9, 0), 132))
            assert (m // tile.block_m) * (n // tile.block_n) >= 132


def write_table(directory, rows, name="interpreter"):
    tune.write_table(directory / f"{name}.json", {}, msgspec.convert(rows, list[tiles.TunedTile]))


def test_a_table_of_ones_own_wins(tables):
    tile = [64, 64, 32, 1, 4, 2, 1, 2, 0]
    write_table(tables, [{"kernel": "int8 gelu", "m": 512, "n": 96, "k": 192, "tile": tile, "us": 1.0}])
    gelu = Epilogue(out_scale=1)
    assert gemm_tile("int8", gelu, 512, 96, 192, CPU) == GemmTile(*tile)
    assert gemm_tile("int8", gelu, 1000, 96, 192, CPU) == GemmTile(*tile)  # up to twice the rows
    for kernel, epilogue, m, n in [
        ("int8", gelu, 200, 96),
        ("int8", Epilogue(), 512, 96), ("int8", gelu, 2000, 96), ("int8", gelu, 512, 97), ("int4a8", gelu, 512, 96)
    ]:  # fmt: skip
        assert gemm_tile(kernel, epilogue, m, n, 192, CPU) == heuristic_tile(kernel, m, n, 192, tiles.gpu_of(CPU))


def test_the_nearest_row_count_counts(tables):
    rows = [{"kernel": "int8", "m": m, "n": 96, "k": 192, "tile": [64, 64, 32, 1, 4, m // 64]} for m in (128, 512)]
    write_table(tables, rows)
    assert gemm_tile("int8", Epilogue(), 400, 96, 192, CPU).num_stages == 8
    assert gemm_tile("int8", Epilogue(), 150, 96, 192, CPU).num_stages == 2


ROW = {"kernel": "int8", "m": 512, "n": 96, "k": 192, "tile": [64, 64, 32, 1, 4, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`, got `array`"),
        ('{"tiles": [{"kernel": "int8"}]}', "missing required field"),
        (json.dumps({"tiles": [{**ROW, "tile": [1]}]}), "length 6 to 10"),
        (json.dumps({"tiles": [{**ROW, "tile": [64, 64, 32, 1, 4, 10**6]}]}), "<= 32"),
        (json.dumps({"tiles": [{**ROW, "m": "512"}]}), "Expected `int`, got `str`"),
        (json.dumps({"tiles": [ROW]}), "not as it was written"),
        ('{"tiles": ' + "[" * 100_000 + "]" * 100_000 + "}", "got `array`|recursion"),
        ('{"tiles": [], "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
    ],
)
def test_a_broken_table_is_passed_over(tables, text, message, caplog):
    (tables / "interpreter.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        gemm_tile("int8", Epilogue(), 512, 96, 192, CPU)
    assert re.search(rf"interpreter.json is no table of tiles \(.*({message}).*\); make a new one", caplog.text)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_a_table_that_is_no_regular_file_is_not_opened(tables, make, caplog):
    make(tables / "interpreter.json")
    with in_time(), caplog.at_level(logging.WARNING):
        gemm_tile("int8", Epilogue(), 512, 96, 192, CPU)
    assert "it is no file of at most" in caplog.text


def test_names_of_kernels():
    assert kernel_name("int8", Epilogue()) == "int8"
    assert kernel_name("int4a8", Epilogue(out_scale=1)) == "int4a8 gelu"
    assert kernel_name("int8", Epilogue(gate=1)) == "int8 gate"
    assert kernel_name("int8", Epilogue(torch.ones(()))) == "int8"
    assert kernel_name("int8", Epilogue(torch.ones(7))) == "int8 token"
    assert set(tune.KERNELS) >= {"int8", "int8 gelu", "int4a8 gate", "int8a16"}


@pytest.mark.parametrize(
    ("ending", "epilogue"),
    [("token", Epilogue(torch.ones(512))), ("gelu", Epilogue(out_scale=1)), ("gate", Epilogue(gate=1))],
)
def test_an_ending_takes_its_own_tile_or_that_of_the_plain_product(tables, ending, epilogue):
    static, own = [64, 64, 128, 8, 4, 4, 0, 1, 1, 0], [64, 64, 128, 8, 4, 5, 0, 1, 1, 0]
    rows = [{"kernel": "int8", "m": 512, "n": n, "k": 192, "tile": static, "us": 1.0} for n in (96, 64)]
    write_table(tables, [*rows, {"kernel": f"int8 {ending}", "m": 512, "n": 96, "k": 192, "tile": own, "us": 1.0}])
    assert gemm_tile("int8", epilogue, 512, 96, 192, CPU) == GemmTile(*own)
    assert gemm_tile("int8", epilogue, 512, 64, 192, CPU) == GemmTile(*static)
    assert gemm_tile("int8", Epilogue(), 512, 96, 192, CPU) == GemmTile(*static)


def test_an_h100_takes_what_was_measured_on_an_h200_alone():
    flux = 9216, 3072
    h100, h200 = (Gpu(name, (9, 0), 132) for name in ("nvidia-h100-80gb-hbm3", "nvidia-h200"))
    assert flux not in tiles.tuned_tiles(h100.name)["int8"]
    for kernel in ("int8", "int8 token"):
        tile = tiles.tuned_tiles(h200.name)[kernel][flux][4096]
        assert tiles.choose_tile(kernel, 4096, *flux, h100) == tile
        assert tiles.choose_tile(kernel, 4096, *flux, h100._replace(multiprocessors=114)) == heuristic_tile(
            "int8", 4096, *flux, h100
        )
    own = tiles.tuned_tiles(h100.name)["int8"][3456, 1152][4096]
    assert tiles.choose_tile("int8", 4096, 3456, 1152, h100) == own


def test_long_sums_are_cut_after_whole_waves():
    """FLUX.1's last product of a block: 864 tiles of 128 x 128, 264 at a time; 4,096 rows are nearly three waves."""
    h200 = Gpu("nvidia-h200", (9, 0), 132)
    for kernel in ("int8 gate", "int4a8 gate"):
        assert tiles.whole_waves(kernel, 4608, 3072, 15360, h200) == 4224
        for m, k in ((4096, 15360), (4224, 15360), (512, 15360), (4608, 3072), (16384, 15360), (0, 15360)):
            assert tiles.whole_waves(kernel, m, 3072, k, h200) == 0, (m, k)


def test_a_gate_leaves_no_registers_for_three_programs():
    gpu = Gpu("unknown", (9, 0), 132)
    assert heuristic_tile("int8 gelu", 16384, 1536, 1536, gpu).programs_per_sm == 3
    assert heuristic_tile("int8 gate", 16384, 1536, 1536, gpu).programs_per_sm == 2


def test_no_rows_take_the_tile_of_one():
    gpu = Gpu("nvidia-h200", (9, 0), 132)  # which has a table for this N and K
    assert tiles.choose_tile("int8", 0, 3456, 1152, gpu) == tiles.choose_tile("int8", 1, 3456, 1152, gpu)


def test_the_table_that_ships_covers_the_layers_of_dit_xl_2(tables):
    table = tiles.tuned_tiles("nvidia-h200")
    for kernel in tune.KERNELS:
        assert set(table[kernel]) >= set(tune.DIT_XL_2)
        for layer, rows in table[kernel].items():
            assert set(rows) == set(tune.ROWS) or layer not in tune.DIT_XL_2
            for m, tile in rows.items():
                assert tile in set(tune.candidates(kernel, m))


on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "tiles are measured on a GPU", marks=on_cpus),
        (["--layers", "12"], "'12' is no layer; give out_features x in_features"),
        (["--layers", "0x12"], "out_features must be an integer from 1 to 1073741824; got 0"),
        (["--layers", "12x65536"], "in_features must be an integer from 1 to 65535; got 65536"),
        (["--layers", "12x63"], "in_features must be a multiple of 2; got 63"),
        (["--rows", "16", "0"], "an entry of rows must be an integer from 1 to 1073741824; got 0"),
        (["--rows", "-5"], "got -5"),
        (["--processes", "0"], "processes must be an integer from 1 to 1024; got 0"),
    ],
)
def test_tuning_refuses_nonsense(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [(0, 8)]},
        {"rows": [0]},
        {"rows": None},
        {"kernels": ["int3"]},
        {"kernels": [3]},
        {"kernels": None},
        {"processes": True},
    ],
    ids=str,
)
def test_tune_refuses_before_it_starts_processes(monkeypatch, changes):
    monkeypatch.setattr(tune, "ProcessPoolExecutor", None)
    with pytest.raises(qandc_kernels.ArgumentError, match="tune: "):
        tune.tune(**{"layers": [(8, 8)], "rows": [8], "kernels": ["int8"], "processes": 1, **changes})


def test_candidates_refuse():
    for kernel, m in (("int8", 0), ("int8", "8"), ("int3", 8), (None, 8), ("int8", float("nan"))):
        with pytest.raises(qandc_kernels.ArgumentError):
            next(tune.candidates(kernel, m))
    for copies, repeats in ((0, 1), (1, 0), (1.0, 1), (None, 1)):
        with pytest.raises(qandc_kernels.ArgumentError, match="must be an integer from 1"):
            tune.time_launches(lambda i: None, copies, repeats)


def test_a_broken_table_is_told_before_tuning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "select_backend", lambda device: qandc_kernels.Backend("triton", "here"))
    monkeypatch.setattr(tune, "gpu_of", lambda device: tiles.Gpu("card", (9, 0), 132))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", None)
    (tmp_path / "card.json").write_text("[]")
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(SystemExit):
            tune.main(["--out", str(out)])
        assert "cannot be made or is no table of tiles" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_one_layer(tables):
    arguments = ["--layers", "64x128", "--rows", "64", "--kernels", "int8", "--processes", "2"]
    assert tune.main(arguments) == 0
    (path,) = tables.iterdir()
    (entry,) = json.loads(path.read_text())["tiles"]
    assert entry["us"] > 0
    tiles.tuned_tiles.cache_clear()
    tiles.choose_tile.cache_clear()
    assert list(gemm_tile("int8", Epilogue(), 64, 64, 128, torch.device("cuda", 0))) == entry["tile"]


def test_warm_up_without_kernels_does_nothing():
    qandc_kernels.warm_up([(64, 64)], [8], device="cpu")
    with pytest.raises(ValueError, match="w_bits must be 8 or 4; got 3"):
        qandc_kernels.warm_up([(64, 64)], [8], w_bits=3)


@pytest.mark.slow
@pytest.mark.parametrize("w_bits", [8, 4])
def test_warm_up_runs_every_kernel(kernel_device, w_bits):
    qandc_kernels.warm_up([(48, 64)], [5, 12], torch.float16, w_bits, tokens=6, device=kernel_device)


@pytest.mark.gpu
def test_a_first_call_compiles_in_seconds(tmp_path):
    code = """
import time, torch
from qandc_kernels import int8_linear
x, w = (torch.zeros(rows, 1152, dtype=torch.int8, device="cuda") for rows in (4096, 4608))
one, scale = torch.ones((), device="cuda"), torch.ones(4608, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
int8_linear(x, w, one, scale)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
    import os

    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 10  # two seconds where nothing else runs; a search of tiles takes minutes
