"""The command line: its main job, and one line with status 2 for everything it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qandc import CalibratedSchedule
from qandc.cli import main


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def picture_size(path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("w_bits", [8, 4])
def test_generate_draws_both_rows(capsys, tmp_path, pipeline_dir, w_bits):
    target = tmp_path / "images.png"
    status, out, _ = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 4, "--classes", "1,2,3", "--w-bits", w_bits,
        "--device", "cpu", "--out", target,
    )  # fmt: skip
    assert status == 0
    # three tiles of 16 x 7 pixels side by side, two above each other, and room for labels
    width, height = picture_size(target)
    assert width >= 3 * 112
    assert height >= 2 * 112
    assert f"W{w_bits}A8 + branch cache 3" in out
    assert re.search(r"FP \(float32\) +\d+\.\d{3} +1\.00x +[\d.]+ MB", out)
    assert "20 layers quantized" in out
    assert re.search(r"\d+\.\d dB \(worst \d+\.\d\)", out)
    assert "reference" in out
    assert str(target) in out.replace("\n", "")
    assert not list(tmp_path.glob("*.partial"))


def test_a_calibrated_schedule(capsys, tmp_path, pipeline_dir):
    path, target = tmp_path / "schedule.json", tmp_path / "images.png"
    CalibratedSchedule((True, True, False, False), (751, 501, 251, 1), "taylor", 1, 0.1, 0.2).save(path)
    arguments = ["generate", "--model", pipeline_dir, "--classes", "1", "--schedule", path, "--device", "cpu"]
    status, out, _ = run(capsys, *arguments, "--steps", 4, "-o", target)
    assert status == 0
    assert "W8A8 + taylor, 2 steps" in out
    status, _, err = run(capsys, *arguments, "--steps", 5, "-o", target)
    assert status == 2
    assert "schedule has 4 steps and the run 5" in err


def test_the_main_job_uses_the_settings_that_ship(capsys, tmp_path):
    target = tmp_path / "images.png"
    status, out, _ = run(capsys, "generate", "--classes", "bag", "--w-bits", 4, "--device", "cpu", "-o", target)
    assert status == 0
    assert "W4A8 + taylor 17/50 + VC" in out
    assert "(W4A8 static per-tensor)" in out
    for changes in (["--no-calibrated"], ["--steps", 3], ["--scheduler", "ddim"], ["--cache-interval", 3]):
        status, out, _ = run(capsys, "generate", "--classes", "bag", "--device", "cpu", "-o", target, *changes)
        assert status == 0
        assert "W8A8 + branch cache 3" in out
        assert "(W8A8 dynamic per-token)" in out


def test_classes_by_name():
    from qandc.cli import _parse_classes

    names = {0: "T-shirt", 1: "Trouser", 2: "Bag"}
    assert _parse_classes(None, names) == (0, 1, 2)
    assert _parse_classes("bag, 0", names) == (2, 0)


def test_ctrl_c_keeps_the_finished_row(capsys, tmp_path, pipeline_dir, monkeypatch):
    import qandc.generate

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(qandc.generate, "quantize_model", interrupt)
    target = tmp_path / "images.png"
    status, _, err = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 2, "--classes", "1", "--device", "cpu", "-o", target
    )
    assert status == 130
    assert f"stopped early; wrote {target}" in err
    assert err.splitlines()[-1] == "interrupted"
    assert picture_size(target)[1] < 2 * 112


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for word in ("torch", "triton", "diffusers", "int8_linear", "fashion-dit", "cpu"):
        assert word in out
    if not torch.cuda.is_available():
        assert "not available" in out


def test_help(capsys):
    status, out, _ = run(capsys, "generate", "--help")
    assert status == 0
    for option in ("--model", "--classes", "--steps", "--guidance-scale", "--scheduler", "--w-bits", "--a-bits",
                   "--cache-mode", "--cache-interval", "--schedule", "--seed", "--device", "--dtype",
                   "--out"):  # fmt: skip
        assert option in out


REFUSALS = {
    "class out of range": (["--classes", "1000"], "class id 1000 is out of range; this model knows 1000 classes, 0"),
    "negative class": (["--classes", "-1"], "class id -1 is out of range"),
    "empty class": (["--classes", "0,"], "there is an empty class between the commas of '0,'"),
    "unknown class": (["--classes", "kangaroo"], "class 'kangaroo' is unknown"),
    "no steps": (["--steps", "0"], "--steps is 0; give an integer >= 1"),
    "too many steps": (["--steps", "1001"], "num_inference_steps is 1001; this scheduler allows 1 to 1000"),
    "steps not a number": (["--steps", "many"], "Invalid value for '--steps'"),
    "interval": (["--cache-interval", "0"], "--cache-interval is 0; give an integer >= 1"),
    "cache mode": (["--cache-mode", "all"], "cache mode 'all' is unknown; choose one of block, branch, taylor"),
    "schedule": (["--schedule", "none.json"], "'none.json' is no schedule"),
    "weight bits": (["--w-bits", "3"], "w_bits is 3; allowed are 4 and 8"),
    "activation bits": (["--a-bits", "16"], "a_bits is 16; allowed are"),
    "guidance": (["--guidance-scale", "-1"], "guidance_scale is -1.0; give a finite number >= 0"),
    "guidance nan": (["--guidance-scale", "nan"], "guidance_scale is nan"),
    "scheduler": (["--scheduler", "euler"], "scheduler 'euler' is unknown; choose one of ddpm, ddim"),
    "seed": (["--seed", "-5"], "--seed is -5"),
    "device": (["--device", "tpu"], "device 'tpu' is unknown; choose auto, cpu, cuda"),
    "dtype": (["--dtype", "int8"], "dtype 'int8' is unknown; choose auto, float32"),
    "model missing": (["--model", "./no/such/model"], "model directory './no/such/model' does not exist"),
    "hub": (["--model", "owner/model"], "the hub did not deliver it"),
    "output folder": (["--out", "/no/such/folder/x.png"], "output folder '/no/such/folder' does not exist"),
    "output type": (["--out", "x.jpg"], "must end in .png"),
    "option": (["--stepps", "3"], "No such option: --stepps"),
}


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_line_and_status_2(capsys, tmp_path, pipeline_dir, options, message):
    defaults = {"--model": pipeline_dir, "--device": "cpu", "--steps": "2", "--out": tmp_path / "x.png"}
    for name in options[::2]:
        defaults.pop(name, None)
    status, out, err = run(capsys, "generate", *[x for pair in defaults.items() for x in pair], *options)
    assert status == 2
    assert out == ""
    assert err.startswith("qandc: error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_cuda(capsys, tmp_path):
    status, _, err = run(capsys, "generate", "--device", "cuda", "--out", tmp_path / "x.png")
    assert status == 2
    assert "torch sees no CUDA GPU" in err


def test_output_that_is_a_directory(capsys, tmp_path):
    status, _, err = run(capsys, "generate", "--out", tmp_path)
    assert status == 2
    assert "is a directory; give a file name" in err


def test_output_folder_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    """As root every folder is writable, so the probe is made to fail as a read-only one would."""
    import tempfile

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    status, _, err = run(capsys, "generate", "--out", tmp_path / "x.png")
    assert status == 2
    assert "cannot be written (Permission denied)" in err


def test_model_that_is_no_pipeline(capsys, tmp_path):
    status, _, err = run(capsys, "generate", "--model", tmp_path, "--device", "cpu", "--out", tmp_path / "x.png")
    assert status == 2
    assert "is not a diffusers pipeline: it has no model_index.json" in err


@pytest.mark.parametrize(
    ("part", "weight"), [("transformer", "pos_embed.proj.weight"), ("vae", "post_quant_conv.bias")]
)
def test_bad_weights_are_refused_in_one_line(capsys, tmp_path, pipeline_dir, part, weight):
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_dir, broken)
    file = next((broken / part).glob("*.safetensors"))
    state = load_file(file)
    state[weight].view(-1)[0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    status, _, err = run(
        capsys, "generate", "--model", broken, "--steps", 1, "--device", "cpu", "--out", tmp_path / "x.png"
    )
    assert status == 2
    assert len(err.splitlines()) == 1
    assert f"{part}.{weight} holds NaN or inf" in err


def test_pipeline_whose_parts_do_not_fit(capsys, tmp_path, pipeline_dir):
    from tests.conftest import make_dit

    broken = tmp_path / "broken"
    shutil.copytree(pipeline_dir, broken)
    shutil.rmtree(broken / "transformer")
    from diffusers import DiTTransformer2DModel

    DiTTransformer2DModel(**{**make_dit().config, "in_channels": 3}).save_pretrained(broken / "transformer")
    status, _, err = run(capsys, "generate", "--model", broken, "--device", "cpu", "--out", tmp_path / "x.png")
    assert status == 2
    assert "the autoencoder has 4 latent channels, the transformer 3" in err


def test_file_name_that_is_too_long(capsys, tmp_path, pipeline_dir):
    target = tmp_path / ("x" * 300 + ".png")
    status, _, err = run(capsys, "generate", "--model", pipeline_dir, "--device", "cpu", "--out", target)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "cannot be written" in err


@pytest.mark.parametrize("model", ["x" * 300, "~nosuchuser/x", ""], ids=["too long", "unknown user", "empty"])
def test_model_names_that_are_no_path(capsys, tmp_path, model):
    status, _, err = run(capsys, "generate", "--model", model, "--device", "cpu", "--out", tmp_path / "x.png")
    assert status == 2
    assert len(err.splitlines()) == 1


def test_brackets_in_file_names_are_printed(capsys, tmp_path, pipeline_dir):
    target = tmp_path / ("x[red]" + "y" * 230 + ".png")
    status, out, _ = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 1, "--classes", "1", "--device", "cpu", "-o", target
    )
    assert status == 0
    assert f"wrote {target}" in out.splitlines()


def test_unexpected_errors_are_one_line_and_keep_what_is_finished(capsys, tmp_path, pipeline_dir, monkeypatch):
    import qandc.generate

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(qandc.generate, "apply_cache_to_dit", fail)
    target = tmp_path / "x.png"
    status, _, err = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 1, "--classes", "1", "--device", "cpu", "-o", target
    )
    assert status == 2
    assert err.splitlines()[-1] == "qandc: error: OutOfMemoryError: no memory at all (qandc --verbose shows where)"
    assert f"stopped early; wrote {target}" in err
    assert target.exists()


def test_a_failed_write_is_one_line_and_leaves_no_fragment(capsys, tmp_path, pipeline_dir, monkeypatch):
    import os

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status, _, err = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 1, "--classes", "1", "--device", "cpu",
        "--out", tmp_path / "x.png",
    )  # fmt: skip
    assert status == 2
    assert err.splitlines()[-1].endswith("No space left on device")
    assert not list(tmp_path.iterdir())


def test_json_output(capsys, tmp_path, pipeline_dir):
    target = tmp_path / "x.json"
    status, _, _ = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 2, "--classes", "1,2", "--device", "cpu",
        "--out", tmp_path / "x.png", "--json", target,
    )  # fmt: skip
    assert status == 0
    result = json.loads(target.read_text())
    assert {"command", "commit", "date", "machine", "versions", "settings", "rows", "goals"} == set(result)
    full, quantized = result["rows"]
    assert (full["name"], quantized["name"]) == ("FP", "W8A8 + branch cache 3")
    assert quantized["speed_ratio"] == full["seconds_per_image"] / quantized["seconds_per_image"]
    assert quantized["psnr_min"] <= quantized["psnr_mean"]
    assert quantized["layers_quantized"] == 20


def test_the_table_says_what_was_measured(capsys):
    from qandc.cli import _print_comparison
    from qandc.conversion import LayerReport, QuantizationReport
    from qandc.generate import Comparison, Row

    black = torch.full((2, 1, 4, 4), -1.0)
    grey = black + torch.tensor([0.2, 0.02])[:, None, None, None]  # 20 and 40 dB
    layers = (LayerReport("a", True, "W8A8 dynamic per-token", 4_000_000, 1_000_000, "triton int8_gemm", "sm_90"),) * 2
    result = Comparison(
        [Row("FP", 8_000_000, [black], 6.0), Row("W8A8 + branch cache 3", 2_000_000, [grey[:1], grey[1:]], 3.0)],
        QuantizationReport(layers),
    )
    _print_comparison(result, "bfloat16")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "s / image speed transformer PSNR to FP",
        "FP (bfloat16) 3.000 1.00x 8.0 MB",
        "W8A8 + branch cache 3 1.500 2.00x 2.0 MB 30.0 dB (worst 20.0)",
        "2 layers quantized (W8A8 dynamic per-token), their weights 8.0 -> 2.0 MB",
        "kernel: triton int8_gemm (sm_90)",
    ]
