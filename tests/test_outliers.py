"""Outliers in activations, planted into fashion-dit: what they cost, and what smoothing gains."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import typer

from qandc.evaluation.metrics import snr


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[1] / "training")
        import evaluate_outliers
    return evaluate_outliers


@pytest.fixture(scope="module")
def bench(study):
    return study.ClassConditional("fashion-dit", "cpu", images=2, steps=2, batch=2, fit=2)


@pytest.mark.slow
def test_planting_changes_no_output_and_many_inputs(study, bench):
    largest = []
    planted = study.plant_outliers(copy.deepcopy(bench.bench.base), 100)
    for model in (bench.bench.base, planted):
        block, seen = model.transformer_blocks[5], []
        layers = (block.attn1.to_q, block.attn1.to_out[0], block.ff.net[0].proj)
        hook = lambda _, args, seen=seen: seen.append(args[0].amax())  # noqa: E731
        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
        largest.append((seen, bench.predictions(model)))
        for handle in handles:
            handle.remove()
    (near, expected), (far, predicted) = largest
    assert snr(predicted, expected).mean() > 90
    assert len(near) == len(far) == 3 * len(bench.calls)
    assert all(y > 10 * x for x, y in zip(near, far, strict=True))


def test_rows_have_names_of_their_own(study):
    unfused, fused = ([row["name"] for row in study.rows(how)] for how in (False, True))
    assert len({*unfused, *fused}) == len(unfused) + len(fused) == 64 + 64
    assert "W4A8, outliers 30, ranges static, per token behind modulation, smoothing 0.5, fused" in fused
    with pytest.raises(typer.BadParameter, match="needs a GPU"):
        study.main(fused=True, device="cpu")


@pytest.mark.slow
def test_smoothing_withstands_outliers(study, tmp_path):
    """W8A8 beside outliers of 100 times: smoothing gains 20 dB, and loses none that count; a file is continued."""
    out = tmp_path / "out.json"
    for size, count in (("1", 6), ("(1|100)", 12), ("(1|100)", 12)):
        before = json.loads(out.read_text())["rows"] if out.exists() else []
        only = f"W8A8, outliers {size}, .*(no smoothing|0.5)$"
        study.main(out=out, images=2, steps=4, fit=2, device="cpu", only=only)
        result = json.loads(out.read_text())
        assert result["rows"][: len(before)] == before
        assert len(result["rows"]) == count
    found = {(row["outliers"], row["ranges"], row["smoothing"]): row["prediction_snr"] for row in result["rows"]}
    static, per_token, behind = study.RANGES
    for ranges in study.RANGES:
        assert found[100, ranges, 0.5] > 30
        assert found[1, ranges, 0.5] - found[100, ranges, 0.5] < 1
        assert found[100, ranges, None] < found[100, ranges, 0.5] - 20
    for times, smoothing in ((1, 0.5), (100, 0.5), (1, None), (100, None)):
        assert found[times, static, smoothing] < found[times, behind, smoothing] < found[times, per_token, smoothing]
    lost = {goal["name"]: goal["value"] for goal in result["goals"]}
    assert len(lost) == 6
    name = f"dB of predictions lost, fashion-dit, W8A8, outliers 100, ranges {behind}, smoothing 0.5"
    assert lost[name] == found[1, behind, 0.5] - found[100, behind, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("ranges", ["per token", "static, per token behind modulation"])
def test_fused_rows_measure_the_same(study, bench, fused_anywhere, ranges):
    how = {"outliers": 10, "ranges": ranges, "smoothing": 0.5}
    unfused, fused = (bench.measure(study.row("outliers", **how, **more)) for more in ({}, {"fused": True}))
    assert fused != unfused
    assert fused["prediction_snr"] == pytest.approx(unfused["prediction_snr"], abs=0.5)
    assert fused["psnr_to_fp"] == pytest.approx(unfused["psnr_to_fp"], abs=2)
    assert unfused["psnr_to_fp_worst"] < unfused["psnr_to_fp"]
