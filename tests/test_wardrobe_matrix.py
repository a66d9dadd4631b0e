"""The measurement of wardrobe: intervals, comparisons, rows, goals; one row of each kind is drawn."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qandc import quantization_plan
from qandc.evaluation.judge import Judge

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def matrix():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "training")
        import evaluate_wardrobe
    return evaluate_wardrobe


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (1, 3), (4321, 6000), (5990, 6000)])
def test_wilson_is_where_a_score_test_of_the_share_turns(matrix, right, count):
    for bound, outer in zip(matrix.wilson(right, count), (0.0, 1.0), strict=True):
        if right == count * outer:
            assert bound == pytest.approx(outer, abs=1e-12)
        else:  # the share is 1.96 standard deviations, those of the bound, from the bound
            deviation = abs(right / count - bound) / math.sqrt(bound * (1 - bound) / count)
            assert deviation == pytest.approx(1.959964, rel=1e-6)
    low, high = matrix.wilson(right, count)
    assert low <= right / count <= high


def test_losses_are_compared_picture_by_picture(matrix):
    random = np.random.default_rng(0)
    theirs = torch.from_numpy(random.random(4000) < 0.9)
    ours = theirs & torch.from_numpy(random.random(4000) < 0.98)
    value, half = matrix.lost(ours, theirs)
    assert value == pytest.approx(float(theirs.double().mean() - ours.double().mean()))
    means = [np.mean((theirs.double() - ours.double()).numpy()[random.integers(0, 4000, 4000)]) for _ in range(2000)]
    assert half == pytest.approx(1.96 * np.std(means), rel=0.1)  # a bootstrap over pictures
    assert matrix.lost(theirs, ours)[0] == -value
    assert matrix.lost(ours, ours) == (0.0, 0.0)


def test_rows_have_names_of_their_own_and_known_settings(matrix):
    rows = list(matrix.rows())
    assert len({(row["part"], row["name"]) for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() <= {"part", "name", "precision", *matrix.PLAIN}
        assert row["name"].startswith(row["precision"])
    whole = matrix.settings_of(next(row for row in rows if row["name"] == "W4A8, delta, interval 3"))
    assert (whole["weights"], whole["mode"], whole["interval"], whole["corrected"]) == ("gptq", "delta", 3, "none")


@pytest.fixture(scope="module")
def pipeline(matrix, tmp_path_factory):
    pytest.importorskip("transformers", reason="wardrobe's text encoders are those of transformers")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "training")
        from wardrobe_model import make_pipeline
    directory = tmp_path_factory.mktemp("wardrobe")
    pipe = make_pipeline()
    for module in pipe.transformer.modules():
        if isinstance(module, torch.nn.Linear):  # some begin with zeros
            torch.nn.init.normal_(module.weight, std=0.05)
    pipe.save_pretrained(directory)
    return directory, pipe


def test_groups_of_layers_are_all_layers_once(matrix, pipeline):
    model = pipeline[1].transformer
    plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    chosen = []
    overlapping = ("first block", "last block", "modulation, first of one stream", "all")
    for group in matrix.LAYERS:
        report = quantization_plan(model, skip_patterns=matrix.skip_patterns(group, model))
        names = [layer.name for layer in report.quantized]
        assert names
        if group not in overlapping:
            chosen += names
        elif group == "all":
            assert set(names) == plain
        elif group == "last block":
            assert {name.split(".")[1] for name in names} == {str(len(model.single_transformer_blocks) - 1)}
    assert sorted(chosen) == sorted(plain)


def test_planted_outliers_change_nothing_in_full_precision(matrix, pipeline):
    model = copy.deepcopy(pipeline[1].transformer)
    inputs = {
        "hidden_states": torch.randn(2, 64, model.config.in_channels),
        "encoder_hidden_states": torch.randn(2, 5, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(2, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.3, 0.3]),
        "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    block, single = model.transformer_blocks[1], model.single_transformer_blocks[3]
    attention, mlps = block.attn, (block.ff, block.ff_context)
    layers = [single.attn.to_q, single.proj_mlp, single.proj_out, attention.to_out[0], attention.to_add_out]
    layers += [attention.to_q, attention.add_k_proj, *(mlp.net[0].proj for mlp in mlps)]
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    with torch.no_grad():
        before = model(**inputs)[0]
        matrix.plant_outliers(model, 30.0)
        after = model(**inputs)[0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    plain, planted = seen[: len(layers)], seen[len(layers) :]
    assert all(far > 5 * near for near, far in zip(plain, planted, strict=True)), (plain, planted)


def test_goals_are_of_the_rows_they_name(matrix):
    rows = [
        {**row, "everything": share, "everything_lost": loss}
        for row, share, loss in (
            (matrix.row("model", "real"), 0.96, 0), (matrix.row("model", "FP"), 0.72, 0),
            (matrix.row("precision"), 0.7, 0.004), (matrix.row("fewer steps", steps=10), 0.6, 0.09),
            (matrix.row("cache", mode="delta", interval=3, schedule="uniform"), 0.6, 0.03),
            (matrix.row("cache", mode="crf", interval=3, schedule="uniform"), 0.6, 0.01),
            (matrix.row("cache", mode="crf", interval=2, schedule="uniform"), 0.6, 0.0),
            (matrix.row("cache", "FP", mode="crf", interval=3, schedule="uniform"), 0.6, 0.0),
            (matrix.row("cache", scenes="held-out", mode="taylor", interval=3), 0.6, 0.0),
        )
    ]  # fmt: skip
    refused = {**matrix.row("precision", "W4A8"), "refused": "why"}
    values = [goal["value"] for goal in matrix.goals([*rows, refused])]
    assert values == [pytest.approx(0.75), None, pytest.approx(0.4), None, pytest.approx(1.0), pytest.approx(8.0)]
    assert [goal["value"] for goal in matrix.goals([])] == [None] * 6


def test_tables_have_a_cell_for_each_row(matrix, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from update_tables import wardrobe_grid, wardrobe_table

    found = {"images": 6000, "everything": 0.75, "everything_ci95": [0.74, 0.76], "psnr_to_fp": 30.0}
    found |= {"everything_lost_ci95": 0.005, "psnr_to_fp_worst": 20.0, "frechet_distance": 0.5}
    found |= {"images_per_second": 900, **dict.fromkeys(("objects", "colours", "places"), 0.9)}
    rows = [
        {**matrix.row("TAP", selection=selection, samples=samples, repeat=repeat), **found, "everything_lost": lost}
        for selection, samples, repeat, lost in (
            ("tap", 16, 0, 0.01), ("random", 16, 0, 0.02), ("tap", 16, 1, 0.03), ("tap", 64, 0, -0.01)
        )
    ]  # fmt: skip
    refused = {**matrix.row("TAP", selection="random", samples=64), "refused": "why"}
    grid = wardrobe_grid({"rows": [*rows, refused]}, "TAP", ("precision", "samples"), "selection")
    assert grid[0] == "| points lost / PSNR, dB | selection tap | selection random |"
    assert grid[2:] == [
        "| W8A8, samples 16 | 2.0 (1.0 to 3.0) / 30.0 | 2.0 ± 0.5 / 30.0 |",
        "| W8A8, samples 64 | -1.0 ± 0.5 / 30.0 |  |",
    ]
    heads, _, *lines = wardrobe_table({"rows": [rows[0], refused, {"part": "other"}]}, ("TAP",))
    assert lines[0].startswith(f"| {rows[0]['name']} | 75.0% of 6,000 (74.0% to 76.0%) | 1.0 ± 0.5 | 90.0% |")
    assert lines[0].endswith("| 0.500 | 30.0 dB (worst 20.0) | 900 |")
    assert "refused: why" in lines[1]
    assert {line.count("|") for line in lines} == {heads.count("|")}


@pytest.mark.slow
def test_script_measures_rows_and_goes_on(tmp_path, matrix, pipeline):
    data = matrix.DEFAULT_DIRECTORY
    if not data.is_dir():
        pytest.skip(f"Fashion-MNIST is not in {data}; install the Debian package dataset-fashion-mnist")
    save_file(Judge().state_dict(), tmp_path / "judge.safetensors")
    only = "^(precision: W8A8|VC: W8A8, corrected samples, paper|cache: W8A8, crf, .* 3, uniform, corrected .*"
    only += "|shift: FP, shift 3.16(, crf, interval 3, calibrated)?)$"
    options = ["--model", pipeline[0], "--judge", tmp_path / "judge.safetensors", "--out", tmp_path / "out.json"]
    options += ["--prompts", "2", "--seeds", "0", "--steps", "6", "--fit", "2", "--device", "cpu"]
    for pattern, count in (("^precision: W8A8$", 1), (only, 5)):  # the second goes on
        command = [sys.executable, ROOT / "training/evaluate_wardrobe.py", *options, "--only", pattern]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "out.json").read_text())
        assert len(result["rows"]) == count
    for row in result["rows"]:
        low, high = row["everything_ci95"]
        assert low <= row["everything"] <= high
        assert row["images"] == 2
        if row["name"] == "FP, shift 3.16":
            assert row["psnr_to_fp_worst"] == 100  # it is compared with itself: timesteps are shifted in both
        else:
            assert 0 < row["psnr_to_fp_worst"] <= row["psnr_to_fp"] < 100


@pytest.mark.slow
def test_outliers_of_wardrobe_are_measured_alike(tmp_path, matrix, pipeline):
    if not matrix.DEFAULT_DIRECTORY.is_dir():
        pytest.skip("Fashion-MNIST is not there")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "training")
        patched.syspath_prepend(ROOT / "docs")
        from update_tables import outliers_table

        import evaluate_outliers as study
    save_file(Judge().state_dict(), tmp_path / "judge.safetensors")
    how = {"model": str(pipeline[0]), "judge": tmp_path / "judge.safetensors", "out": tmp_path / "out.json"}
    how |= {"images": 2, "steps": 2, "fit": 2, "device": "cpu"}
    study.main(**how, only="W8A8, outliers 100, .*(no smoothing|0.5)$")
    result = json.loads((tmp_path / "out.json").read_text())
    found = {(row["ranges"], row["smoothing"]): row for row in result["rows"]}
    lines = outliers_table(result)
    assert lines[0] == "| | ranges | smoothing α | x 100 |"
    for row, line in zip(result["rows"], lines[2:], strict=True):
        psnr = f"{row['psnr_to_fp']:.1f} ± {row['psnr_to_fp_ci95']:.1f}"
        assert f"| {psnr} / {100 * row['everything_lost']:.1f} ±" in line
    assert len(found) == 6
    assert all(row["images"] == 2 and row["everything_lost_ci95"] >= 0 for row in found.values())
    likeness = {how: row["psnr_to_fp"] for how, row in found.items()}
    assert len({*likeness.values()}) == 6
    for ranges in study.RANGES:
        assert likeness[ranges, 0.5] > likeness[ranges, None]


def test_rows_are_chosen_or_refused_in_a_line(matrix, tmp_path, capsys, monkeypatch):
    def main():
        matrix.measure_chosen(tmp_path / "x.json", {}, [], lambda row: row, lambda rows: [], only="[", seconds=1)

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as left:
        matrix.command(main)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--only is no regular expression: unterminated")
