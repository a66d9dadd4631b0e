"""README.md is executed: its snippet runs, its tables are what the measured files say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippet(kind: str = "") -> str:
    return README.partition(f"<!-- snippet{kind} -->\n```python\n")[2].partition("```")[0]


def run(code: str, changes: dict[str, str]) -> dict:
    """The names that the code leaves, with each of the changes made."""
    for theirs, ours in changes.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    names: dict = {}
    exec(code, names)
    return names


def test_snippet_runs_on_the_embedded_model():
    """As printed, but for the model's path, the class and fewer steps."""
    from qandc import QuantLinear, fashion_dit_path, get_cache

    changes = {
        '"facebook/DiT-XL-2-256"': repr(str(fashion_dit_path())),
        "class_labels=[207]": "class_labels=[7]",
        "num_inference_steps=50": "num_inference_steps=11",
    }
    names = run(snippet(), changes)
    assert names["images"][0].size == (32, 32)
    assert sum(isinstance(m, QuantLinear) for m in names["pipe"].transformer.modules()) == 12 * 6 + 2
    assert get_cache(names["pipe"].transformer).compute_steps == 3


def test_fuse_snippet_follows_the_first():
    """As printed, with fewer steps; on a CPU the model runs unfused."""
    from qandc import fashion_dit_path
    from qandc.cache import FUSED

    changes = {
        '"facebook/DiT-XL-2-256"': repr(str(fashion_dit_path())),
        "[207, 360, 387]": "[2, 3, 4]",
        "num_inference_steps=10": "num_inference_steps=2",
        "class_labels=[207]": "class_labels=[7]",
        "num_inference_steps=50": "num_inference_steps=2",
    }
    names = run(snippet().partition("images = ")[0] + snippet(": fuse"), changes)
    assert names["images"][0].size == (32, 32)
    assert len(names["batches"]) == 2
    assert FUSED in names["pipe"].transformer.__dict__


def test_cache_snippet_follows_the_first(tmp_path, monkeypatch, capsys):
    from qandc import CalibratedSchedule, fashion_dit_path, get_cache

    monkeypatch.chdir(tmp_path)
    changes = {
        '"facebook/DiT-XL-2-256"': repr(str(fashion_dit_path())),
        "[207, 360, 387]": "[2, 3, 4]",
        "class_labels=[207]": "class_labels=[7]",
        "num_inference_steps=50": "num_inference_steps=8",
        "computed_steps=17": "computed_steps=3",
    }
    names = run(snippet().partition("images = ")[0] + snippet(": cache"), changes)
    assert names["images"][0].size == (32, 32)
    cache = get_cache(names["pipe"].transformer)
    assert (cache.compute_steps, cache.reuse_steps) == (3, 5)
    assert CalibratedSchedule.load("schedule.json").config() == cache.config
    assert capsys.readouterr().out.count("*") == 3


def test_tap_snippet_follows_the_first():
    from qandc import fashion_dit_path
    from qandc.conversion import quant_layers

    changes = {
        '"facebook/DiT-XL-2-256"': repr(str(fashion_dit_path())),
        "[207, 360, 387, 974]": "[2, 3, 4, 5]",
        '"num_inference_steps": 50': '"num_inference_steps": 8',
        "select(40": "select(9",
        "clusters=10": "clusters=3",
    }
    names = run(snippet().partition("images = ")[0] + snippet(": tap"), changes)
    assert len(names["pool"]) == 4 * 8
    assert len(names["chosen"]) == 9
    layers = quant_layers(names["pipe"].transformer)
    assert all(layer.act_scale is not None for layer in layers.values())


def test_diffusers_snippet(tmp_path, monkeypatch):
    from qandc.conversion import quant_layers

    monkeypatch.chdir(tmp_path)
    names = run(snippet(": diffusers"), {})
    layers = quant_layers(names["pipe"].transformer)
    assert {layer.w_bits for layer in layers.values()} == {4}
    assert len(layers) == 12 * 6 + 2


def test_vc_snippet(tmp_path, monkeypatch):
    from qandc import Compensation

    monkeypatch.chdir(tmp_path)
    names = run(snippet(": vc"), {'"num_inference_steps": 50': '"num_inference_steps": 6', "range(50)": "range(4)"})
    assert names["images"][0].size == (32, 32)
    assert torch.equal(Compensation.load("vc.safetensors").gain, names["compensation"].gain)
    assert names["latents"].shape == (1, 4, 16, 16)


def test_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "update_tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/caching.md", "docs/calibration.md"]
)
def test_linked_and_named_files_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        base = ROOT if target.startswith("/") else (ROOT / document).parent
        assert (base / target.lstrip("/")).exists(), target
    for name in re.findall(r"`((?:qandc|qandc_kernels|tests|docs|training)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
