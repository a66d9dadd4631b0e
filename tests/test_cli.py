"""The command line: its main job, and one line with status 2 for everything it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

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
    assert f"W{w_bits}A8 + cache 3" in out
    assert re.search(r"FP \(float32\) +\d+\.\d{3} +1\.00x +[\d.]+ MB", out)
    assert "20 layers quantized" in out
    assert re.search(r"\d+\.\d dB \(worst \d+\.\d\)", out)
    assert "reference" in out
    assert str(target) in out.replace("\n", "")
    assert not list(tmp_path.glob("*.partial"))


def test_generate_is_reproducible_and_scheduler_and_seed_matter(capsys, tmp_path, pipeline_dir):
    def draw(name, *options):
        path = tmp_path / f"{name}.png"
        common = ("--model", pipeline_dir, "--steps", 3, "--classes", "5", "--device", "cpu", "--out", path)
        assert run(capsys, "generate", *common, *options)[0] == 0
        return path.read_bytes()

    first = draw("a")
    assert draw("b") == first
    assert draw("c", "--seed", 1) != first
    assert draw("d", "--scheduler", "ddim") != first
    assert draw("e", "--cache-interval", 1) != first
    assert draw("f", "--guidance-scale", 4) != first


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
    assert "wrote the finished row" in err
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
                   "--cache-interval", "--seed", "--device", "--dtype", "--out"):  # fmt: skip
        assert option in out


REFUSALS = {
    "class out of range": (["--classes", "1000"], "class id 1000 is out of range; this model knows 0"),
    "negative class": (["--classes", "-1"], "class id -1 is out of range"),
    "unknown class": (["--classes", "kangaroo"], "class 'kangaroo' is unknown"),
    "no steps": (["--steps", "0"], "--steps is 0; give an integer >= 1"),
    "too many steps": (["--steps", "1001"], "num_inference_steps is 1001; this scheduler allows 1 to 1000"),
    "steps not a number": (["--steps", "many"], "Invalid value for '--steps'"),
    "interval": (["--cache-interval", "0"], "--cache-interval is 0; give an integer >= 1"),
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
    # a progress bar may stand above; the error itself is the last line and the only one that begins so
    lines = [line for line in err.splitlines() if line.startswith("qandc: error:")]
    assert len(lines) == 1
    assert err.rstrip().splitlines()[-1] == lines[0]
    assert message in lines[0]
    assert "Traceback" not in err
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
    assert "is not writable (Permission denied)" in err


def test_model_that_is_no_pipeline(capsys, tmp_path):
    status, _, err = run(capsys, "generate", "--model", tmp_path, "--device", "cpu", "--out", tmp_path / "x.png")
    assert status == 2
    assert "is not a diffusers pipeline: it has no model_index.json" in err


def test_bad_weights_are_refused_in_one_line(capsys, tmp_path, pipeline_dir, monkeypatch):
    from qandc import pipelines

    load = pipelines.load_pipeline

    def load_broken(*args):
        pipe = load(*args)
        pipe.transformer.proj_out_2.weight.data[0, 0] = float("nan")
        return pipe

    monkeypatch.setattr(pipelines, "load_pipeline", load_broken)
    status, _, err = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 1, "--classes", "1", "--device", "cpu",
        "--out", tmp_path / "x.png",
    )  # fmt: skip
    assert status == 2
    assert "proj_out_2.weight holds 1 values that are NaN or inf" in err
