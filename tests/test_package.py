"""The package as such: names, what an import loads, which way dependencies point."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qandc
import qandc_kernels

ROOT = Path(__file__).parents[1]
HEAVY = ("diffusers", "transformers", "triton", "sklearn", "typer", "matplotlib")


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by ``statement`` in a fresh interpreter."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("package", [qandc, qandc_kernels], ids=lambda p: p.__name__)
def test_all_is_true(package):
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_public_names_of_the_snippet():
    names = ("quantize_model", "apply_cache_to_dit", "reset_all_caches", "fashion_dit_path", "QuantLinear")
    assert set(names) <= set(qandc.__all__)
    names = ("quantize_per_tensor", "quantize_per_token", "int8_linear", "int4_linear", "pack_int4", "unpack_int4")
    assert set(names) <= set(qandc_kernels.__all__)


@pytest.mark.slow
def test_import_loads_nothing_heavy():
    loaded = modules_after("import qandc")
    assert not loaded & set(HEAVY)
    assert "qandc_kernels" in loaded


@pytest.mark.slow
def test_import_needs_no_triton():
    blocked = "import sys; sys.modules['triton'] = None; import qandc, qandc_kernels"
    assert "qandc" in modules_after(blocked)


@pytest.mark.slow
def test_import_takes_less_than_a_second_beyond_torch():
    code = "import torch, time; t = time.perf_counter(); import qandc; print(time.perf_counter() - t)"
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 1


ROOMS = [  # a room imports from itself and from those before it
    "errors",
    "support",
    "historical",
    "tap",
    "variance_compensation",
    "quantizer",
    "caching",
    "quantization",
    "models",
    "cache",
    "fusion",
    "evaluation",
    "sampling",
    "method",
    "optimize",
    "experiments",
    "cli",
]


def test_imports_point_one_way():
    for path in (ROOT / "qandc").rglob("*.py"):
        name = path.relative_to(ROOT / "qandc")
        room = name.parts[0].removesuffix(".py")
        if not room.startswith("__"):
            imported = set(re.findall(r"(?:from|import) qandc\.(\w+)", path.read_text()))
            assert imported <= set(ROOMS[: ROOMS.index(room) + 1]), name


def test_parts_of_models_are_named_among_the_models_alone():
    for path in (ROOT / "qandc").rglob("*.py"):
        if (ROOT / "qandc/models") not in path.parents:
            assert not re.search("attn1|proj_out|class_labels|ada_norm", path.read_text()), path


def test_the_method_uses_what_the_kernels_offer():
    for path in (ROOT / "qandc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "qandc_kernels":
                assert {alias.name for alias in node.names} <= set(qandc_kernels.__all__), path
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("qandc_kernels.") for name in names), path


def test_kernels_know_nothing_of_the_method():
    for path in (ROOT / "qandc_kernels").rglob("*.py"):
        assert not re.search(r"(?:from|import) qandc\b", path.read_text()), path


def test_errors_are_what_people_expect_to_catch():
    assert issubclass(qandc.ConfigError, ValueError)
    assert issubclass(qandc.DataError, ValueError)
    assert issubclass(qandc.DeviceError, RuntimeError)
    assert issubclass(qandc.OutputError, OSError)
    assert issubclass(qandc.CacheError, qandc.ModelError)
    for name in ("CacheError", "ConfigError", "DataError", "DeviceError", "ModelError", "OutputError", "ProcessError"):
        assert issubclass(getattr(qandc, name), qandc.QandCError)


def test_the_command_is_where_it_is_installed_from():
    module, name = re.search(
        r'^qandc = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).groups()
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.slow
def test_module_entry_point():
    done = subprocess.run(
        [sys.executable, "-m", "qandc", "generate", "--steps", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "qandc: error: --steps is 0; give an integer >= 1 (at most 10000)"
