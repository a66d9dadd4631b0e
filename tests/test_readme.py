"""README.md and docs/ are executed: their snippets run, their tables are what the measured files say."""

from __future__ import annotations

import functools
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from qandc.models import FAMILIES
from qandc.quantization.conversion import quant_layers
from tests.test_families import FUSED
from tests.test_fused_projections import CLASSES as PROJECTIONS_FUSED
from tests.test_lora import WITHOUT_PEFT
from tests.test_models import UNCAPTURED
from tests.test_optimize import CELLS
from tests.tiny_models import TINY, inputs_of, make_tiny, output_of
from tests.tiny_pipelines import PIPELINES, make_pipeline

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
FAMILY_PAGES = [page for page in PAGES if page.startswith("docs/families/")]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]


def snippet(kind: str = "", document: str = "README.md") -> str:
    found = (ROOT / document).read_text().split(f"<!-- snippet{kind} -->\n```python\n")
    assert len(found) == 2
    return found[1].partition("```")[0]


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


@pytest.mark.slow
def test_snippet_for_any_transformer(monkeypatch, caplog):
    """As printed, but for the backend of the compiler, with a small model in the place of FLUX.1 and its pipeline."""
    import diffusers

    from qandc.evaluation.metrics import snr

    class Pipeline:
        calls = 0

        def __init__(self):
            self.transformer = make_tiny("FluxTransformer2DModel")

        @classmethod
        def from_pretrained(cls, name, torch_dtype):
            return cls()

        def to(self, device):
            return self

        def __call__(self, prompt, num_inference_steps=1):
            Pipeline.calls += num_inference_steps
            for _ in range(num_inference_steps):
                last = output_of(self.transformer, inputs_of("FluxTransformer2DModel"))
            return types.SimpleNamespace(images=[last])

    monkeypatch.setattr(diffusers, "FluxPipeline", Pipeline)
    full = Pipeline()("").images[0]
    names = run(snippet(": any", "docs/quantization.md"), {"fullgraph=True": 'fullgraph=True, backend="eager"'})
    model = names["pipe"].transformer
    layers = quant_layers(model)
    q, modulation = (layers[f"transformer_blocks.1.{name}"] for name in ("attn.to_q", "norm1.linear"))
    assert q.smoothing is not None
    assert q.act_scale is not None
    assert modulation.scheme.startswith("W8A16")
    assert q.membership.compiled is not None  # compiled code runs q, k and v as one
    assert snr(names["image"][None], full[None]) > 25
    assert Pipeline.calls == 1 + 8 + 8 + 1


def with_small_pipelines(monkeypatch, name):
    """Have a class of pipelines load small ones, and draw small images in few steps; returns those it loads."""
    pytest.importorskip("transformers")
    import diffusers

    kind, made = getattr(diffusers, name), []
    call, small = kind.__call__, {**PIPELINES[name][3], "height": 16, "width": 16, "num_inference_steps": 6}

    @functools.wraps(call)
    def small_call(pipe, prompt, **given):
        assert given.keys() <= inspect.signature(call).parameters.keys()
        return call(pipe, prompt, **{**given, **small})

    def from_pretrained(checkpoint, torch_dtype=None):
        made.append(make_pipeline(name))
        return made[-1]

    monkeypatch.setattr(kind, "__call__", small_call)
    monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    monkeypatch.setattr(kind, "to", lambda pipe, device: pipe)
    return made


@pytest.mark.slow
def test_snippet_of_one_call(monkeypatch, capsys):
    """Run the snippet as printed, with a small pipeline in the place of FLUX.1, small images and fewer steps."""
    made = with_small_pipelines(monkeypatch, "FluxPipeline")
    names = run(snippet(": optimize"), {})
    assert names["image"].size == (16, 16)
    assert "int8" in capsys.readouterr().out
    after, before = (pipe.transformer.state_dict() for pipe in (*made, make_pipeline("FluxPipeline")))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.slow
def test_text_to_image_snippet(tmp_path, monkeypatch, capsys):
    """Run the snippet as printed, with a small pipeline, small images and fewer steps."""
    from qandc import quantize_model, save

    with_small_pipelines(monkeypatch, "FluxPipeline")
    monkeypatch.chdir(tmp_path)
    save(quantize_model(make_tiny("FluxTransformer2DModel"), 4), "my-flux")
    given = 'import diffusers\npipe, prompts = diffusers.FluxPipeline.from_pretrained("x"), ["a coat"]\n'
    changes = {"calibrate_on=prompts": "calibrate_on=prompts, pool_images=2, samples=8"}
    names = run(given + snippet(": text", "docs/text-to-image.md"), changes)
    assert names["images"][0].size == (16, 16)
    assert "taylor of order 1" in capsys.readouterr().out
    assert {layer.scheme[:4] for layer in quant_layers(names["pipe"].transformer).values()} == {"W4A8"}


@pytest.mark.slow
@pytest.mark.parametrize("page", FAMILY_PAGES)
def test_snippets_of_families(page, monkeypatch, capsys):
    """Run each as printed, with a small pipeline; adapters and offloading are noted alone."""
    code, noted = snippet(": family", page), []
    name = re.search(r"from diffusers import (\w+)", code)[1]
    made = with_small_pipelines(monkeypatch, name)
    for method in ("load_lora_weights", "enable_model_cpu_offload"):
        noting = functools.partialmethod(lambda pipe, method, *given: noted.append((pipe, method, *given)), method)
        monkeypatch.setattr(pkgutil.resolve_name(f"diffusers.{name}"), method, noting, raising=False)
    names = run(code, {})
    assert "taylor of order 1" in capsys.readouterr().out
    large, small = made
    assert {layer.w_bits for layer in quant_layers(large.transformer).values()} == {8}
    assert {layer.w_bits for layer in quant_layers(small.transformer).values()} == {4}
    adapters = [] if PIPELINES[name][0] in WITHOUT_PEFT else [(large, "load_lora_weights", "style.safetensors")]
    assert noted == [*adapters, (small, "enable_model_cpu_offload")]
    for drawn in (names["first"], names["second"]):
        assert (drawn.shape[1:3] if name == "WanPipeline" else drawn.size) == (16, 16)


def test_every_family_has_a_page_in_the_navigation():
    shown = (ROOT / "mkdocs.yml").read_text()
    assert all(page in shown for page in PAGES)
    written = "".join((ROOT / page).read_text() for page in FAMILY_PAGES)
    assert {name for name in PIPELINES if f"import {name}\n" in written} == set(PIPELINES)


def test_snippet_of_scenes(monkeypatch, capsys):
    """Run the snippet as printed, with grey pictures and a judge that has learned nothing."""
    from qandc.evaluation.judge import Judge

    monkeypatch.setattr(Judge, "load", lambda: Judge().eval())
    given = "import torch\ndraw = lambda captions: torch.zeros(len(captions), 3, 64, 64)\n"
    names = run(given + snippet(": scenes", "docs/measuring.md"), {})
    assert names["scores"].everything.shape == (100,)
    assert "'recall': 0.0" in capsys.readouterr().out


def test_fuse_snippet_follows_the_first():
    """As printed, with fewer steps; on a CPU the model runs unfused."""
    from qandc import fashion_dit_path
    from qandc.fusion.fuse import Fused

    changes = {
        '"facebook/DiT-XL-2-256"': repr(str(fashion_dit_path())),
        "[207, 360, 387]": "[2, 3, 4]",
        "num_inference_steps=10": "num_inference_steps=2",
        "class_labels=[207]": "class_labels=[7]",
        "num_inference_steps=50": "num_inference_steps=2",
    }
    names = run(snippet().partition("images = ")[0] + snippet(": fuse"), changes)
    assert names["images"][0].size == (32, 32)
    layers = quant_layers(names["pipe"].transformer)
    assert all(layer.act_scale is not None for name, layer in layers.items() if name != "proj_out_1")
    assert Fused.of(names["pipe"].transformer) is not None


@pytest.mark.slow
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
    names = run(snippet().partition("images = ")[0] + snippet(": cache", "docs/caching.md"), changes)
    assert names["images"][0].size == (32, 32)
    cache = get_cache(names["pipe"].transformer)
    assert (cache.compute_steps, cache.reuse_steps) == (3, 5)
    assert CalibratedSchedule.load("schedule.json").config() == cache.config
    assert capsys.readouterr().out.count("*") == 3


@pytest.mark.slow
def test_tap_snippet_follows_the_first():
    from qandc import fashion_dit_path

    changes = {
        '"facebook/DiT-XL-2-256"': repr(str(fashion_dit_path())),
        "[207, 360, 387, 974]": "[2, 3, 4, 5]",
        '"num_inference_steps": 50': '"num_inference_steps": 8',
        "select(40": "select(9",
        "clusters=10": "clusters=3",
    }
    names = run(snippet().partition("images = ")[0] + snippet(": tap", "docs/calibration.md"), changes)
    assert len(names["pool"]) == 4 * 8
    assert len(names["chosen"]) == 9
    layers = quant_layers(names["pipe"].transformer)
    assert all(layer.act_scale is not None for name, layer in layers.items() if name != "proj_out_1")


def test_diffusers_snippet(tmp_path, monkeypatch):

    monkeypatch.chdir(tmp_path)
    names = run(snippet(": diffusers"), {})
    layers = quant_layers(names["pipe"].transformer)
    assert {layer.w_bits for layer in layers.values()} == {4}
    assert len(layers) == 12 * 6 + 2


@pytest.mark.slow
def test_vc_snippet(tmp_path, monkeypatch):
    from qandc import Compensation

    monkeypatch.chdir(tmp_path)
    names = run(
        snippet(": vc", "docs/calibration.md"),
        {'"num_inference_steps": 50': '"num_inference_steps": 6', "range(50)": "range(4)"},
    )
    assert names["images"][0].size == (32, 32)
    assert torch.equal(Compensation.load("vc.safetensors").gain, names["compensation"].gain)
    assert names["latents"].shape == (1, 4, 16, 16)


@pytest.mark.slow
def test_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "update_tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_and_named_files_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        base = ROOT if target.startswith("/") else (ROOT / document).parent
        assert (base / target.lstrip("/")).exists(), target
    for name in re.findall(r"`((?:qandc|qandc_kernels|tests|docs|training)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    rooms = ("qandc", "qandc_kernels", "tests", "docs")
    sources = [path.as_posix() for room in rooms for path in ROOT.glob(f"{room}/**/*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).exists() or any(path.endswith(f"/{name}") for path in sources), name

    for name in re.findall(r"`(qandc(?:_kernels)?(?:\.(?!(?:png|json|safetensors)`)\w+)+)(?:\(.*?\))?`", text):
        assert pkgutil.resolve_name(name) is not None


def test_architecture_names_every_file():
    text = (ROOT / "docs/architecture.md").read_text()
    for path in [*(ROOT / "qandc").rglob("*.py"), *(ROOT / "qandc_kernels").rglob("*.py")]:
        assert path.name.startswith("__") or re.search(rf"\b{path.name}\b", text), path


def test_the_table_of_models_says_what_is_tested():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs/models.md").read_text(), re.MULTILINE)
    cells = {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}
    assert cells.keys() == TINY.keys()
    for name, (_, whole, graphed, lora, projections, cached, fused) in cells.items():
        assert (whole, graphed) == ("yes", "no graph" if name in UNCAPTURED else "yes")
        assert lora == ("PEFT" if name in WITHOUT_PEFT else "diffusers")
        assert projections == ("yes" if name in PROJECTIONS_FUSED else "")
        assert cached == ("yes" if name in FAMILIES else "")
        assert fused == ("yes" if name in FUSED else "")


def test_the_table_of_pipelines_says_what_is_tested():
    """Each column is a test of test_optimize.py, or of test_prompt_calibration.py, for each of these pipelines."""
    pytest.importorskip("transformers")
    import diffusers

    text = (ROOT / "docs/text-to-image.md").read_text()
    header, *rows = re.findall(r"^\| (`?\w+Pipeline`?|pipeline) \|(.*)\|$", text, re.MULTILINE)
    assert [cell.strip() for cell in header[1].split("|")] == ["steps", *CELLS, "calibrate_on", "LoRA", "offload"]
    assert [name.strip("`") for name, _ in rows] == list(PIPELINES)
    for (name, rest), (transformer, *_) in zip(rows, PIPELINES.values(), strict=True):
        steps, *cells = (cell.strip() for cell in rest.split("|"))
        pipe = getattr(diffusers, name.strip("`"))
        assert int(steps) == inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
        lora = "" if transformer in WITHOUT_PEFT else "yes"
        assert cells == [*["yes"] * len(CELLS), "yes", lora, "yes"]


def test_the_likeness_that_generate_prints_is_the_measured_one():
    from qandc.method.saved import LIKENESS, shipped_settings

    rows = json.loads((ROOT / "results/h200/presets.json").read_text())["rows"]
    measured = {f"w{row['w_bits']}a8": row for row in rows if row["compensation"] == "none"}
    shipped = json.loads((shipped_settings("fashion-dit", 8).parent / LIKENESS).read_text())
    assert shipped.keys() == measured.keys()
    for name, figures in shipped.items():
        assert figures.items() <= measured[name].items()
