"""The benchmark suite where it can be tested without a GPU: its goals, its tables, its run on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import conftest, goals, models, report, timing
from benchmarks.timing import relative_error
from qandc import get_cache
from tests.conftest import make_dit
from tests.tiny_models import inputs_of, make_tiny, output_of

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Ours without a GPU, and without what tells pytest-benchmark that it runs in a worker of xdist, which it won't."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}


def row(op: str, layer: str, m: int | None, candidate: str, median_us: float, **others) -> dict:
    found = {"op": op, "layer": layer, "m": m, "n": None, "k": None, "candidate": candidate, "method": "graph"}
    return {**found, "ceiling": "int8", "median_us": median_us, "min_us": median_us, **others}


@pytest.fixture
def rows() -> list[dict]:
    return [
        row("linear", "qkv", 4096, goals.BF16, 30.0, tops=1.0, ceiling="bf16"),
        row("linear", "qkv", 4096, "W8A8", 20.0, tops=1.5),
        row("linear", "qkv", 4096, "W4A8", 24.0, tops=1.25),
        row("linear", "qkv", 4096, goals.INT_MM, 60.0, tops=0.5),
        row("linear", "qkv", 4096, goals.INT_MM_COMPILED, 36.0, tops=0.8),
        row("linear", "qkv", 4096, "W8A16", 40.0, tops=0.7, ceiling="bf16"),
        row("linear", "qkv", 4096, "dynamic quantize + W8A8", 28.0, tops=1.1),
        row("linear", "qkv", 4096, "gemlite A8W8", 14.0, tops=2.2),
        {"op": "linear", "layer": "out", "m": 512, "n": 1, "k": 1, "candidate": "W8A8", "skipped": "not installed: x"},
        row("linear", goals.SQUARE_LAYER, 8192, "W8A8", 900.0, tops=1250.0),
        row("linear", goals.SQUARE_LAYER, 8192, "torch._int_mm", 800.0, tops=1400.0),
        row("epilogue", "fc1", 512, goals.PLAIN, 10.0, tops=1.0),
        row("epilogue", "fc1", 512, goals.GELU, 10.5, tops=1.0),
        row("copy", "1 GiB", None, "torch.neg", 1.0, gbytes_per_s=4000.0, ceiling="copy"),
        row("copy", "38 MB", None, "torch.neg", 1.0, gbytes_per_s=3000.0, ceiling="copy"),
        row("adaln", "LN", 16384, goals.ADALN, 1.0, gbytes_per_s=3400.0, ceiling="copy"),
    ]


def test_goals(rows):
    found = {goal.pop("name"): goal for goal in goals.goals(rows)}
    assert len(found) == 39
    measured = {name: goal["value"] for name, goal in found.items() if goal["value"] is not None}
    assert measured == pytest.approx(
        {
            "w8a8_over_bf16_qkv_4096": 1.5,
            "gelu_requantize_time_over_bf16_store_fc1_512": 1.05,
            "w8a8_8192": 1250.0,
            "w4a8_over_bf16_qkv_4096": 1.25,
            "adaln_quantize_share_of_copy_bandwidth_16384": 0.85,
            "w8a8_over_int_mm_dequantize_qkv_4096": 1.8,
        }
    )
    assert found["w8a8_over_bf16_qkv_4096"] == {
        "value": 1.5, "unit": "1", "better": "higher", "must": 1.25, "goal": 1.5
    }  # fmt: skip
    assert found["w4a8_over_bf16_qkv_4096"]["goal"] == 1.5  # what W8A8 reached
    assert found["w4a8_over_bf16_out_4096"]["goal"] is None


def test_reached(rows):
    found = {goal["name"]: goal for goal in goals.goals(rows)}
    gelu, w8a8 = found["gelu_requantize_time_over_bf16_store_fc1_512"], found["w8a8_over_bf16_qkv_4096"]
    assert (goals.reached(gelu, "must"), goals.reached(gelu, "goal")) == (True, False)
    assert (goals.reached(w8a8, "must"), goals.reached(w8a8, "goal")) == (True, True)
    assert goals.reached(found["w4a8_over_bf16_out_4096"], "must") is None


def test_every_kind_of_row_has_a_file_goals_and_a_baseline():
    assert {op for ops, _ in goals.SUITES.values() for op in ops} == set(report.BASELINES)
    rows = [{"op": op, "layer": layer} for op in ("images", "linear") for layer in ("qkv", "FLUX.1-dev")]
    assert set(map(goals.file_of, rows)) == {"images-qkv", "images-FLUX.1-dev", "kernels"}


def test_rows_are_completed(rows):
    report.complete(rows)
    by_name = {(r["op"], r["candidate"]): r for r in rows if r["layer"] in ("qkv", "fc1", "LN")}
    assert by_name["linear", "W8A8"]["ratio_to_bf16"] == 1.5
    assert by_name["linear", "W8A8"]["share_of_ceiling"] == 1.5 / 1400  # the best int8 product
    assert by_name["linear", goals.BF16]["share_of_ceiling"] is None  # no bf16 product of that size
    assert by_name["epilogue", goals.GELU]["ratio_to_bf16_store"] == pytest.approx(10 / 10.5)
    assert by_name["adaln", goals.ADALN]["share_of_ceiling"] == 0.85


def test_losses_and_missing_rows_are_printed(rows):
    report.complete(rows)
    losses = "\n".join(report.losses(rows))
    assert "W8A16 takes 1.33 times the baseline's time" in losses
    assert "gemlite A8W8 is 2.00 times as fast as dynamic quantize + W8A8" in losses
    assert "_int_mm" not in losses
    table = list(report.table(rows))
    assert any("W8A8" in line and "not installed" in line for line in table)
    assert any("20.0 µs  1.50x" in line for line in table)
    assert any(line.startswith("w8a8_8192") and "must reached" in line for line in report.goal_lines(rows))
    (first, rest) = report.goal_lines(
        [row("host", "a call", goals.HOST_ROWS, "int8_linear", 1.0, rival="F.linear", rival_ratio=0.4)]
    )
    assert re.match(r"host_int8_linear_over_F.linear +2.500 +must", first)
    assert rest == "2 goals not measured"


@pytest.mark.parametrize("name", [name for name in models.CANDIDATES if "torchao" not in name])
def test_candidates_for_a_step(monkeypatch, name):
    """Build each candidate from a small model, and run it; blocks are traced for the compiler, but not compiled."""

    def trace_blocks(model):
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False, backend="eager")
        return model

    monkeypatch.setattr(models, "compile_blocks", trace_blocks)
    build, bound = models.CANDIDATES[name]
    base = torch.nn.Module.to(make_dit(num_layers=2, heads=4), torch.bfloat16)
    arguments = models.inputs(base, 4)
    with torch.no_grad():
        model = build(base)
        error = relative_error(model(**arguments)[0], base(**arguments)[0])
    assert error <= bound
    assert (error > 0) == ("W" in name)
    before, after = models.block_linear_bytes(base), models.block_linear_bytes(model)
    if "simulated" not in name:
        assert before / after == pytest.approx(1 if "bf16" in name else 3.4 if "W4" in name else 1.9, rel=0.12)


def test_model_goals():
    times = {goals.COMPILED: 3000.0, "fused W8A8": 1500.0, goals.INT8DQ: 4500.0, goals.DROP_IN: 2900.0}
    found = {
        g["name"]: g["value"] for g in goals.model_goals([row("model", goals.MODEL, 16, *t) for t in times.items()])
    }
    assert {name: value for name, value in found.items() if value is not None} == {
        "fused_w8a8_over_compiled_bf16_16": 2.0,
        "fused_w8a8_over_torchao_int8dq_16": 3.0,
        "compiled_quantlinear_over_compiled_bf16_16": 3000 / 2900,
    }


def test_pipeline_goals():
    times = {goals.PIPELINE_COMPILED: 180.0, goals.FULL_METHOD: 50.0, "decoder alone": 20.0}
    rows = [row("pipeline", "50 steps", 1, *t) for t in times.items()]
    found = {g["name"]: g["value"] for g in goals.pipeline_goals(rows)}
    assert {name: value for name, value in found.items() if value is not None} == {
        "full_method_over_compiled_bf16_1": 3.6,
        "full_method_over_compiled_bf16_1_denoising": pytest.approx(160 / 30),
    }
    assert len(found) == 5


@pytest.mark.slow
def test_a_run_that_is_cut_keeps_its_rows(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "kernels.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-q", f"--save={path.parent}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert [r for r in json.loads(path.read_text())["rows"] if "median_us" in r]


@pytest.mark.slow
def test_run_on_a_cpu(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "folder" / "kernels.json"

    def run(what, *options, commit="a"):
        command = [sys.executable, "-m", "pytest", what, "--benchmark-only", "-q", f"--save={path.parent}", *options]
        return subprocess.run(
            command, cwd=ROOT, env={**environment(), "QANDC_COMMIT": commit}, capture_output=True, text=True
        )

    done = run("benchmarks/")
    assert done.returncode == 0, done.stdout
    result = json.loads(path.read_text())
    assert {"command", "commit", "date", "machine", "versions", "settings", "rows", "goals"} == set(result)
    assert result["goals"] == []  # none of a CPU
    assert [each.name for each in path.parent.iterdir()] == ["kernels.json"]  # of other rows nothing was measured
    measured = [r for r in result["rows"] if "median_us" in r]
    assert {(r["layer"], r["candidate"]) for r in measured} == {
        (layer, name) for layer in ("qkv", "out", "fc1", "fc2") for name in (goals.FP32, "simulated W8A8")
    }
    for r in measured:
        assert (r["m"], r["method"]) == (64, "wall clock")
        assert r["error"] < 0.03
        assert 0 < r["min_us"] <= r["median_us"]
        assert r["tops"] == pytest.approx(2 * 64 * r["n"] * r["k"] / r["median_us"] / 1e6)
        assert r["ratio_to_fp32"] > 0
    assert {r["skipped"] for r in result["rows"] if "median_us" not in r} == {"needs an NVIDIA GPU"}
    assert "simulated W8A8" in done.stdout
    assert "rows: needs an NVIDIA GPU" in done.stdout

    again = run("benchmarks/test_linear.py", "--layers", "qkv", "-k", "fp32")  # one row of all is measured anew
    assert again.returncode == 0, again.stdout
    kept = json.loads(path.read_text())
    changed = [r for r in kept["rows"] if r not in result["rows"]]
    assert [(r["layer"], r["candidate"]) for r in changed] == [("qkv", goals.FP32)]
    assert len(kept["rows"]) == len(result["rows"])
    ours = [r for r in kept["rows"] if r["layer"] == "qkv" and "median_us" in r and r["candidate"] != goals.FP32]
    failed = [{key: r[key] for key in ("op", "layer", "m", "candidate")} | {"skipped": "failed"} for r in changed]
    others = [r for r in kept["rows"] if r not in ours + changed]
    path.write_text(json.dumps({**kept, "rows": [*failed, *others]}))
    resumed = run("benchmarks/test_linear.py", "--resume", "--layers", "qkv")
    assert resumed.returncode == 0, resumed.stdout
    before, kept = kept, json.loads(path.read_text())
    changed = [r for r in kept["rows"] if r not in before["rows"]]
    assert {(r["layer"], r["candidate"]) for r in changed} == {("qkv", goals.FP32), ("qkv", ours[0]["candidate"])}
    assert all(r["ratio_to_fp32"] > 0 for r in changed)
    path.write_text(json.dumps({**kept, "rows": [r for r in kept["rows"] if r["candidate"] == goals.FP32]}))
    resumed = run("benchmarks/test_linear.py", "--resume", "--layers", "qkv")
    assert resumed.returncode == 0, resumed.stdout
    before, kept = kept, json.loads(path.read_text())
    (added,) = (r for r in kept["rows"] if "median_us" in r and r not in before["rows"])
    assert (added["layer"], added["candidate"]) == ("qkv", ours[0]["candidate"])
    assert added["ratio_to_fp32"] > 0  # to what was measured before
    other = run("benchmarks/test_linear.py", "--layers", "qkv", "-k", "fp32", commit="b")
    assert other.returncode == 1
    assert "was measured at commit a, this is b" in other.stdout
    assert json.loads(path.read_text()) == kept


def test_a_rival_measured_by_turns_decides():
    rows = [
        row("models", "Qwen-Image", 4224, "bf16 eager", 100.0),
        row("models", "Qwen-Image", 4224, "QuantLinear W8A8", 160.0, rival="bf16 eager", rival_ratio=1.2),
        row("models", "FLUX.1-dev", 4608, "bf16 eager", 120.0),
        row("models", "FLUX.1-dev", 4608, "QuantLinear W8A8", 100.0),
        row("models", "FLUX.1-dev", 4608, "QuantLinear W4A8 + W4A16, fused, graph()", 85_000.0),
    ]
    found = {goal["name"]: goal["value"] for goal in goals.models_goals(rows)}
    measured = {name.partition("_")[0]: value for name, value in found.items() if value is not None}
    assert measured == {"Qwen-Image": 1.2, "FLUX.1-dev": 1.2, "ms": 85.0}
    completed = [{**r, "tops": 1.0} for r in rows]
    report.complete(completed)
    assert [r.get("ratio_to_eager") for r in completed[:2]] == [1, 1.2]


class Rounds:
    """Stands in the place of pytest-benchmark's fixture."""

    stats = None

    def __init__(self):
        self.extra_info: dict = {}

    def pedantic(self, target, args=(), setup=None, rounds=1, warmup_rounds=0):
        for _ in range(rounds):
            if setup is not None:
                setup()
            target(*args)


@pytest.mark.parametrize(("rounds", "before"), [(2, []), (4, []), (6, ["theirs"])])
def test_a_rival_takes_turns(rounds, before):
    """Both get slower all the time: halves of theirs before and behind ours see none of it in a ratio.

    What takes seconds, and has fewer rounds, is not called once more before.
    """
    ran = []

    def timed(name, factor):
        def seconds():
            ran.append(name)
            return factor * (10 + len(ran))

        return types.SimpleNamespace(seconds=seconds)

    found = conftest.by_turns(Rounds(), timed("ours", 1), timed("theirs", 2), rounds)
    assert ran == [*before, *["theirs", "ours", "ours", "theirs"] * (rounds // 2)]
    assert found["rival_ratio_range"] == pytest.approx([2, 2])
    assert found["rival_ratio"] == pytest.approx(2)
    assert found["rival_min_us"] == 2e6 * (11 + len(before))


@pytest.mark.parametrize(
    ("seconds", "rounds", "calls"),
    [(1e-4, 50, 2), (2e-3, 38, 2), (5e-3, 16, 2), (0.5, 6, 2), (3.9, 4, 1), (25.0, 2, 1)],
)
def test_what_takes_long_has_fewer_rounds(monkeypatch, seconds, rounds, calls):
    ran = []
    timed = timing.Timed(lambda: ran.append(1), 1, "wall clock")
    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds * len(ran))
    assert timed.rounds() == rounds
    assert len(ran) == calls


def test_one_line_leaves_the_model_alone_that_others_are_made_of():
    from benchmarks import families
    from benchmarks import test_images as images

    name = "FluxTransformer2DModel"
    base, inputs = make_tiny(name), inputs_of(name)
    expected = output_of(base, inputs)
    pipe, row = types.SimpleNamespace(transformer=families.clone(base), components={}), {"m": 6}
    with images._one_line(pipe, row, None):
        assert row["compute_steps"] == 3
        assert get_cache(pipe.transformer) is not None
        assert not torch.equal(output_of(pipe.transformer, inputs), expected)
    assert torch.equal(output_of(base, inputs), expected)


def test_a_rival_of_images_is_checked_once(monkeypatch):
    """Keep a rival's pipeline beside other transformers; call it shortly where its blocks are compiled once more."""
    from benchmarks import test_images as images

    calls, made = [], []

    def launch(i, **others):
        calls.append(others)
        return torch.ones(2)

    monkeypatch.setattr(images, "rivals", {})
    monkeypatch.setattr(images, "current", {})
    monkeypatch.setattr(images, "RECIPES", {name: (lambda model, layer: made.append(layer), 0.1) for name in "ab"})
    monkeypatch.setattr(images, "model_of", lambda layer: None)
    monkeypatch.setattr(images, "pipeline", lambda layer, model: None)
    monkeypatch.setattr(images, "images", lambda layer, pipe, steps: launch)
    monkeypatch.setattr(images, "expected", {("x", 6): torch.ones(2)})
    images.transformer("x", "b", fresh=False)
    first = images.rival("x", 6, "a")
    assert images.rival("x", 6, "a") is first
    assert calls == [{}]
    images.transformer("x", "b", fresh=True)
    assert images.rival("x", 6, "a") is images.rival("x", 6, "a") is first
    assert calls == [{}, {"num_inference_steps": 2}]
    assert images.rival("x", 6, "b") is not first
    assert len(calls) == 3
    assert made == ["x"] * 4


def test_shares_of_a_run(monkeypatch):
    """The graphs of a call are replayed again alone, in their order; the decoder is left out."""
    from benchmarks import test_images as images

    class Graph:
        def __init__(self, name):
            self.name = name

        def replay(self):
            ran.append(self.name)

    def launch(i, output_type):
        assert output_type == "latent"
        ran.append("host")
        time.sleep(1e-3)
        for each in (first, second, second):
            each.replay()
        time.sleep(1e-3)

    ran, first, second = [], Graph("first"), Graph("second")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(images, "SHARES", 2)
    found = images.shares(launch)
    run = ["first", "second", "second"]
    assert ran == ["host", *run, *run] * 2
    assert found["replays"] == 3
    assert found["latents_us"] > found["before_us"] > 0
    assert found["replays_us"] > 0


@pytest.mark.slow
def test_parts_of_a_fused_forward(fused_anywhere):
    from training import measure_parts

    found, whole = measure_parts.parts("Qwen-Image", 8, per_token=True, num_layers=1, num_attention_heads=2)
    counts = {}
    for name, (count, milliseconds) in found.items():
        counts[name.split()[0]] = counts.get(name.split()[0], 0) + count
        assert milliseconds > 0
    assert whole == pytest.approx(sum(milliseconds for _, milliseconds in found.values()))
    fused = {"linear_into_": 2, "qk_norm_rope_": 2, "gelu_quantize_per_token": 2, "linear_gate_residual_": 4}
    fused |= {"adaln_quantize_per_token": 4, "quantize_per_token": 2}
    assert {op: counts[f"qandc.{op}"] for op in fused} == fused
