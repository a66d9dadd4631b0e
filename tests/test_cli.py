"""The command line: its main job, and one line with status 2 for everything it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qandc import CalibratedSchedule, fashion_dit_preset
from qandc.cli.main import main


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
    CalibratedSchedule((True, True, False, False), (750, 500, 250, 0), "taylor", 1, 0.1, 0.2).save(path)
    arguments = ["generate", "--model", pipeline_dir, "--classes", "1", "--schedule", path, "--device", "cpu"]
    status, out, _ = run(capsys, *arguments, "--steps", 4, "-o", target)
    assert status == 0
    assert "W8A8 + taylor, 2 steps" in out
    status, _, err = run(capsys, *arguments, "--steps", 5, "-o", target)
    assert status == 2
    assert "schedule has 4 steps and the run 5" in err


@pytest.mark.slow
def test_the_main_job_uses_the_settings_that_ship(capsys, tmp_path):
    target = tmp_path / "images.png"
    status, out, _ = run(capsys, "generate", "--classes", "bag", "--w-bits", 4, "--device", "cpu", "-o", target)
    assert status == 0
    assert f"W4A8 + branch 17/50{fashion_dit_preset(4).compensations}" in out
    assert "(W4A8 static per-tensor)" in out
    assert "PSNR of 1000 other images, measured before: 27.3 dB (worst 7.7)" in out
    for changes in (["--no-calibrated"], ["--steps", 3], ["--scheduler", "ddim"], ["--cache-interval", 3]):
        status, out, _ = run(capsys, "generate", "--classes", "bag", "--device", "cpu", "-o", target, *changes)
        assert status == 0
        assert "W8A8 + branch cache 3" in out
        assert "(W8A8 dynamic per-token)" in out
        assert "other images" not in out
    _, out, _ = run(
        capsys, "generate", "--classes", "bag", "--device", "cpu", "-o", target, "--cache-mode", "first_block"
    )
    assert "W8A8 + first_block cache" in out


TINY = ("--steps", 4, "--pool-images", 12, "--samples", 20, "--clusters", 3, "--feature-images", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def settings_dir(tmp_path_factory, pipeline_dir):
    """What ``qandc calibrate`` wrote for the tiny pipeline: W4A8, 4 DDIM steps, guidance 2."""
    path = tmp_path_factory.mktemp("calibrated") / "my settings"
    options = ("--w-bits", 4, "--scheduler", "ddim", "--guidance-scale", 2, "--cache-mode", "branch")
    assert main([str(a) for a in ("calibrate", "--model", pipeline_dir, *TINY, *options, "--out", path)]) == 0
    return path


@pytest.mark.slow
def test_calibrate_then_generate(capsys, tmp_path, pipeline_dir):
    """The likeness of the ten images that calibrate prints is the one that generate, told nothing else, measures."""
    directory, target = tmp_path / "my settings", tmp_path / "images.png"
    status, out, err = run(
        capsys,
        "calibrate",
        "--model",
        pipeline_dir,
        *TINY,
        "--w-bits",
        4,
        "--compensation",
        "features",
        "-o",
        directory,
    )
    assert status == 0
    for stage in ("candidate pool", "choosing samples", "rounding weights", "ranges", "schedule", "features"):
        assert err.splitlines().count(f"{stage}: done") == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "layers 20 (W4A8 static per-tensor)"
    assert re.fullmatch(r"their weights 0\.\d MB -> 0\.\d MB", lines[1])
    assert lines[2] == "computed steps 2 of 4 (taylor)"
    assert re.fullmatch(r"PSNR to FP \d+\.\d dB \(worst \d+\.\d\)", lines[3])
    likeness = re.fullmatch(r"PSNR to FP, with FC (\d+\.\d dB \(worst \d+\.\d\))", lines[4])[1]
    if lines[5].startswith("FC made these images less like"):  # as it may, of a random model
        del lines[5]
    assert lines[5].split() == ["750*", "500*", "250", "0"]
    assert lines[6:] == [f"wrote {directory}", f"next: qandc generate --calibrated '{directory}'"]
    status, out, _ = run(capsys, "generate", "--calibrated", directory, "--device", "cpu", "-o", target)
    assert status == 0
    assert "W4A8 + taylor 2/4 + FC" in out
    assert "20 layers quantized (W4A8 static per-tensor)" in out
    assert likeness in out
    status, out, _ = run(capsys, "generate", "--model", directory, "--device", "cpu", "-o", target)  # says it too
    assert status == 0
    assert likeness in out


@pytest.mark.slow
def test_calibrate_without_compensation(capsys, tmp_path, pipeline_dir):
    directory, target = tmp_path / "settings", tmp_path / "images.png"
    status, out, _ = run(
        capsys, "calibrate", "--model", pipeline_dir, *TINY, "--compensation", "none", "--uniform", "--interval", 2,
        "-o", directory,
    )  # fmt: skip
    assert status == 0
    assert "with VC" not in out
    assert "with FC" not in out
    assert "computed steps 3 of 4 (taylor)" in " ".join(out.split())
    status, out, _ = run(
        capsys, "generate", "--settings", directory, "--device", "cpu", "-o", target, "--json", tmp_path / "x.json"
    )
    assert status == 0
    assert "W8A8 + taylor 3/4 " in out
    assert "VC" not in out
    assert "FC" not in out
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["compensation"] is None


def test_options_of_calibrate_reach_the_settings(capsys, tmp_path, pipeline_dir, monkeypatch):
    import qandc.method.pipeline_calibration
    from qandc import CalibrationConfig, RangeConfig

    seen = []

    def note(pipe, settings, directory, *, overwrite, source, progress):
        seen.append((pipe.transformer.dtype, settings, directory, overwrite, source))
        raise KeyboardInterrupt

    monkeypatch.setattr(qandc.method.pipeline_calibration, "calibrate_pipeline", note)
    arguments = (
        "--model", pipeline_dir, "--out", tmp_path / "x", "--steps", 5, "--guidance-scale", 3, "--scheduler", "ddim",
        "--w-bits", 4, "--a-bits", 7, "--rounding", "nearest", "--no-smoothing", "--ranges", "mse", "--symmetric",
        "--cache-mode", "block", "--interval", 2, "--uniform", "--pool-images", 6, "--pool-without-cache",
        "--select", "kmeans", "--samples", 7, "--clusters", 3, "--seed", 9, "--vc", "paper",
        "--vc-target", "noise", "--vc-start", 1, "--vc-samples", 8, "--feature-images", 9, "--device", "cpu",
        "--dtype", "bfloat16", "--overwrite",
    )  # fmt: skip
    assert run(capsys, "calibrate", *arguments)[0] == 130
    ranges = RangeConfig("mse", symmetric=True)
    settings = CalibrationConfig(
        num_inference_steps=5, guidance_scale=3, scheduler="ddim", w_bits=4, a_bits=7, rounding="nearest",
        smoothing=False, ranges=ranges, cache_mode="delta", cache_interval=2, uniform=True, pool_images=6,
        pool_with_cache=False, select="kmeans", samples=7, clusters=3, seed=9, vc="paper", vc_target="noise",
        vc_start=1, vc_samples=8, feature_images=9, compensation="samples",
    )  # fmt: skip
    assert seen == [(torch.bfloat16, settings, tmp_path / "x", True, str(pipeline_dir))]


@pytest.mark.slow
def test_calibrate_resumes_after_ctrl_c(capsys, tmp_path, pipeline_dir, monkeypatch):
    import qandc.method.pool
    import qandc.method.stages

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    arguments = ("calibrate", "--model", pipeline_dir, *TINY, "--compensation", "none", "--out", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(qandc.method.stages, "quantize_model", interrupt)
        status, _, err = run(capsys, *arguments)
    assert status == 130
    assert "stopped early; what was finished is kept, the same command goes on with it" in err
    assert err.splitlines()[-1] == "interrupted"
    monkeypatch.setattr(qandc.method.pool, "sample_latents", interrupt)  # nothing is left to record
    assert run(capsys, *arguments)[0] == 0


CALIBRATE_REFUSALS = {
    "no directory": (["--out"], "Missing option '--out'"),
    "clusters": (["--clusters", "49"], "clusters is 49; a pool of 12 images of 4 steps has 48 candidates"),
    "samples": (["--samples", "49"], "samples is 49; a pool of 12 images of 4 steps has 48 candidates"),
    "select": (["--select", "best"], "select 'best' is unknown; choose one of tap, random"),
    "ranges": (["--ranges", "best"], "estimator 'best' is unknown; choose one of minmax, percentile, mse"),
    "rounding": (["--rounding", "up"], "rounding 'up' is unknown; choose one of nearest, gptq"),
    "compensation": (["--compensation", "all"], "compensation 'all' is unknown; choose one of features, samples, none"),
    "vc": (["--vc", "some"], "vc 'some' is unknown; choose one of variance_ratio, least_squares, paper, none"),
    "target of no vc": (["--vc-target", "noise"], "vc_target is 'noise', which is for compensation samples, but"),
    "interval": (["--interval", "0"], "--cache-interval is 0; give an integer >= 1"),
    "steps": (["--steps", "1001"], "num_inference_steps is 1001; this scheduler allows 1 to 1000"),
    "guidance": (["--guidance-scale", "nan"], "--guidance-scale is nan; give a finite number >= 0"),
    "file": (["--out", __file__], "test_cli.py' is a file; give a directory"),
    "model": (["--model", "./no/such/model"], "model directory './no/such/model' does not exist"),
}


@pytest.mark.parametrize(("options", "message"), CALIBRATE_REFUSALS.values(), ids=CALIBRATE_REFUSALS)
def test_refusals_of_calibrate(capsys, tmp_path, pipeline_dir, options, message):
    defaults = {"--model": pipeline_dir, "--out": tmp_path / "x", **dict(zip(TINY[::2], TINY[1::2], strict=True))}
    defaults.pop(options[0], None)
    given = options if len(options) == 2 else []
    status, out, err = run(capsys, "calibrate", *[x for pair in defaults.items() for x in pair], *given)
    assert status == 2
    assert out == ""
    assert err.strip().startswith("qandc: error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert not (tmp_path / "x").exists()


def test_calibrate_keeps_finished_settings(capsys, settings_dir, pipeline_dir):
    before = {path.name: path.read_bytes() for path in settings_dir.iterdir() if path.is_file()}
    status, _, err = run(capsys, "calibrate", "--model", pipeline_dir, *TINY, "--out", settings_dir)
    assert status == 2
    assert "holds a calibrated model; give another directory, or overwrite it (--overwrite" in err
    status, _, err = run(capsys, "calibrate", "--model", "./no/such/model", *TINY, "--out", settings_dir)
    assert "holds a calibrated model" in err  # before a pipeline is loaded
    status, _, err = run(capsys, "calibrate", "--model", pipeline_dir, *TINY, "--out", settings_dir, "--overwrite")
    assert status == 2
    assert "holds a pool of scheduler DDIMScheduler; this one would have DDPMScheduler" in err
    assert before == {path.name: path.read_bytes() for path in settings_dir.iterdir() if path.is_file()}


CONTRADICTIONS = {
    "steps": (["--steps", "5"], "--steps is 5, but the settings in {} are for 4; leave it out"),
    "guidance": (["--guidance-scale", "1.5"], "--guidance-scale is 1.5, but the settings in {} are for 2.0"),
    "scheduler": (["--scheduler", "ddpm"], "--scheduler is ddpm, but the settings in {} are for ddim"),
    "weights": (["--w-bits", "8"], "--w-bits is 8, but the settings in {} are for 4"),
    "activations": (["--a-bits", "4"], "--a-bits is 4, but the settings in {} are for 8"),
    "smoothing": (["--no-smoothing"], "--no-smoothing is given, but the settings in {} are for smoothing True"),
    "mode": (["--cache-mode", "delta"], "--cache-mode is delta, but the settings in {} are for branch"),
    "interval": (["--cache-interval", "2"], "--cache-interval is 2, but the settings in {} are for a schedule of 2"),
    "schedule": (["--schedule", "x.json"], "--schedule and --calibrated {} contradict each other; give one"),
    "not calibrated": (["--no-calibrated"], "--calibrated and --no-calibrated contradict each other"),
    "other settings": (["--settings", "/no/such"], "'/no/such' holds no calibrated model"),
}


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_options_that_contradict_the_settings(capsys, tmp_path, settings_dir, options, message):
    target = tmp_path / "x.png"
    status, out, err = run(capsys, "generate", "--settings", settings_dir, *options, "--device", "cpu", "-o", target)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message.format(repr(str(settings_dir))) in err
    assert not target.exists()


def test_options_that_repeat_the_settings(capsys, tmp_path, settings_dir):
    status, out, _ = run(
        capsys, "generate", "--settings", settings_dir, "--steps", 4, "--guidance-scale", 2, "--scheduler", "ddim",
        "--w-bits", 4, "--a-bits", 8, "--cache-mode", "branch", "--classes", "3", "--device", "cpu",
        "-o", tmp_path / "x.png",
    )  # fmt: skip
    assert status == 0
    assert "W4A8 + branch 2/4 + FC" in out


def test_settings_of_another_model(capsys, tmp_path, settings_dir):
    """Refused before an image is drawn."""
    from qandc import fashion_dit_path

    status, _, err = run(
        capsys, "generate", "--settings", settings_dir, "--model", fashion_dit_path(), "--device", "cpu", "-o",
        tmp_path / "x.png",
    )  # fmt: skip
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "these settings are of another model: they were made for num_layers 3, this one has 12" in err


def test_damaged_settings(capsys, tmp_path, settings_dir):
    broken = tmp_path / "broken"
    shutil.copytree(settings_dir, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    status, _, err = run(capsys, "generate", "--settings", broken, "--device", "cpu", "-o", tmp_path / "x.png")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "is no part of a calibrated model" in err


def test_classes_by_name():
    from qandc.cli.generate import parse_classes

    names = {0: "T-shirt", 1: "Trouser", 2: "Bag"}
    assert parse_classes(None, names) == (0, 1, 2)
    assert parse_classes("bag, 0", names) == (2, 0)


def test_ctrl_c_keeps_the_finished_row(capsys, tmp_path, pipeline_dir, monkeypatch):
    import qandc.experiments.generate

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(qandc.experiments.generate, "quantize_model", interrupt)
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
                   "--no-smoothing", "--cache-mode", "--cache-interval", "--schedule", "--calibrated", "--settings",
                   "--seed",
                   "--device", "--dtype", "--out"):  # fmt: skip
        assert option in out
    status, out, _ = run(capsys, "calibrate", "--help")
    assert status == 0
    for option in ("--out", "--model", "--rounding", "--no-smoothing", "--ranges", "--cache-interval", "--pool-images",
                   "--pool-without-cache", "--select", "--samples", "--clusters", "--compensation",
                   "--feature-images", "--vc", "--overwrite"):  # fmt: skip
        assert option in out


REFUSALS = {
    "class out of range": (["--classes", "1000"], "class id 1000 is out of range; this model knows 1000 classes, 0"),
    "negative class": (["--classes", "-1"], "class id -1 is out of range"),
    "empty class": (["--classes", "0,"], "there is an empty class in '0,'; give ids or names"),
    "unknown class": (["--classes", "kangaroo"], "class 'kangaroo' is unknown"),
    "no steps": (["--steps", "0"], "--steps is 0; give an integer >= 1"),
    "too many steps": (["--steps", "1001"], "num_inference_steps is 1001; this scheduler allows 1 to 1000"),
    "steps not a number": (["--steps", "many"], "Invalid value for '--steps'"),
    "interval": (["--cache-interval", "0"], "--cache-interval is 0; give an integer >= 1"),
    "no cache mode": (["--cache-mode", ""], "cache mode '' is unknown"),
    "cache mode": (["--cache-mode", "all"], "cache mode 'all' is unknown; choose one of delta, branch, taylor"),
    "no interval": (
        ["--cache-mode", "first_block", "--cache-interval", "3"],
        "so it has no interval; choose one of delta",
    ),
    "schedule": (["--schedule", "none.json"], "'none.json' is no schedule"),
    "weight bits": (["--w-bits", "3"], "w_bits is 3; allowed are 4 and 8"),
    "activation bits": (["--a-bits", "9"], "a_bits is 9; allowed are"),
    "guidance": (["--guidance-scale", "-1"], "--guidance-scale is -1.0; give a finite number >= 0"),
    "guidance nan": (["--guidance-scale", "nan"], "--guidance-scale is nan"),
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
    import qandc.experiments.generate

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(qandc.experiments.generate, "attached_cache", fail)
    target = tmp_path / "x.png"
    status, _, err = run(
        capsys, "generate", "--model", pipeline_dir, "--steps", 1, "--classes", "1", "--device", "cpu", "-o", target
    )
    assert status == 2
    assert err.splitlines()[-1] == "qandc: error: OutOfMemoryError: no memory at all (qandc --verbose shows where)"
    assert f"stopped early; wrote {target}" in err
    assert target.exists()


def test_files_that_the_system_refuses(capsys, tmp_path, monkeypatch):
    import qandc.sampling.pipelines

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(qandc.sampling.pipelines, "load_pipeline", refuse)
    status, _, err = run(capsys, "generate", "--device", "cpu", "--out", tmp_path / "x.png")
    assert status == 2
    assert err == (
        "qandc: error: 'model.safetensors' cannot be used (Permission denied); give another path, or mend it\n"
    )


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
    from qandc.cli.terminal import print_comparison
    from qandc.experiments.generate import Comparison, ModelImages
    from qandc.quantization.conversion import LayerReport, QuantizationReport

    black = torch.full((2, 1, 4, 4), -1.0)
    grey = black + torch.tensor([0.2, 0.02])[:, None, None, None]  # 20 and 40 dB
    layers = (LayerReport("a", True, "W8A8 dynamic per-token", 4_000_000, 1_000_000, "triton int8_gemm", "sm_90"),) * 2
    result = Comparison(
        [
            ModelImages("FP", 8_000_000, [black], 6.0),
            ModelImages("W8A8 + branch cache 3", 2_000_000, [grey[:1], grey[1:]], 3.0),
        ],
        QuantizationReport(layers),
    )
    print_comparison(result, "bfloat16")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "s / image speed transformer PSNR to FP",
        "FP (bfloat16) 3.000 1.00x 8.0 MB",
        "W8A8 + branch cache 3 1.500 2.00x 2.0 MB 30.0 dB (worst 20.0)",
        "2 layers quantized (W8A8 dynamic per-token), their weights 8.0 -> 2.0 MB",
        "kernel: triton int8_gemm (sm_90)",
    ]


@pytest.mark.parametrize("command", ["generate", "sample", "ablate"])
def test_a_pipeline_that_was_saved_quantized_is_refused(capsys, tmp_path, pipeline_dir, command):
    from qandc import load_pipeline, quantize_model

    pipe = load_pipeline(pipeline_dir)
    quantize_model(pipe.transformer)
    pipe.save_pretrained(tmp_path / "quantized")
    options = {
        "generate": ["-o", tmp_path / "x.png"],
        "sample": ["-n", 2, "-o", tmp_path / "x.npz", "--full-precision"],
    }
    arguments = [command, "--model", tmp_path / "quantized", "--device", "cpu", *options.get(command, ["-o", tmp_path])]
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "is quantized already; give the full-precision pipeline it was made from" in err
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]
