"""The seven rows: what is switched on in each, what an interruption costs, what is refused; many processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import qandc.experiments.ablation
import qandc.experiments.many_images
from qandc import (
    CalibratedModel,
    CalibrationConfig,
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    Preset,
    apply_cache,
    calibrate_on_prompts,
    calibrate_pipeline,
    compensated_scheduler,
    get_cache,
    load,
    load_pipeline,
)
from qandc.cli.main import main
from qandc.evaluation.extractors import load_extractor
from qandc.evaluation.metrics import FashionClassifier
from qandc.evaluation.pixels import to_uint8
from qandc.experiments.ablation import ROWS, ExperimentConfig, run_experiment
from qandc.experiments.many_images import sample_file
from qandc.experiments.processes import Processes
from qandc.experiments.report import measure_rows
from qandc.experiments.scores import Scorer, load_images, scorer_for
from qandc.experiments.shards import SHARD, ImageSet
from qandc.quantization.conversion import quant_layers
from qandc.sampling.prompts import draw_prompt
from qandc.support.files import locked
from tests.conftest import in_a_thread
from tests.tiny_pipelines import PIPELINES, make_pipeline

CALIBRATION = CalibrationConfig(
    num_inference_steps=4, scheduler="ddim", guidance_scale=2.0, cache_mode="delta", cache_interval=2, uniform=True,
    pool_images=3, samples=6, clusters=2, vc_samples=4, feature_images=4,
)  # fmt: skip
WITH_VC = dataclasses.replace(CALIBRATION, compensation="samples", vc="variance_ratio")
SETTINGS = ExperimentConfig(images=6, calibration=WITH_VC, batch_size=4)


def experiment(pipeline_dir, directory, settings=SETTINGS, **changes) -> list[dict]:
    return run_experiment(load_pipeline(pipeline_dir), settings, directory, scorer=Scorer(), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pipeline_dir):
    directory = tmp_path_factory.mktemp("experiment")
    return directory, experiment(pipeline_dir, directory)


def images_of(directory, kind) -> np.ndarray:
    with np.load(directory / f"{kind.slug}.npz") as data:
        return data["arr_0"]


@pytest.mark.slow
def test_rows(finished):
    directory, rows = finished
    assert [row["row"] for row in rows] == [kind.name for kind in ROWS]
    assert [row["computed_steps"] for row in rows] == [4, 4, 2, 2, 2, 2, 2]
    full, quantized = rows[0]["transformer_bytes"], rows[1]["transformer_bytes"]
    assert [row["transformer_bytes"] for row in rows] == [full, quantized, full, *[quantized] * 4]
    assert quantized < full
    assert [row["cache_bytes"] > 0 for row in rows] == [kind.cached for kind in ROWS]
    pictures = [images_of(directory, kind) for kind in ROWS]
    assert {p.shape for p in pictures} == {(6, 16, 16, 3)}
    for i, ours in enumerate(pictures):
        for j, theirs in enumerate(pictures[:i]):
            same = {ROWS[i].name, ROWS[j].name} == {"Q&C naive", "Q&C + TAP"}  # may choose the same samples
            assert same or not np.array_equal(ours, theirs), (ROWS[i].name, ROWS[j].name)
    likeness = [row["metrics"]["psnr_to_fp"]["value"] for row in rows]
    assert likeness[0] == 100
    assert all(10 < value < 100 for value in likeness[1:])
    assert rows[0]["speed_ratio"] == 1
    assert not (directory / "fp.shards").exists()


@pytest.mark.slow
def test_full_precision_is_what_sampling_draws(finished, pipeline_dir):
    from qandc import decode_latents, make_scheduler, sample_latents

    pipe = load_pipeline(pipeline_dir)
    scheduler = make_scheduler("ddim", pipe.scheduler.config)
    run = {"num_inference_steps": 4, "guidance_scale": 2.0}
    drawn = decode_latents(pipe.vae, sample_latents(pipe.transformer, scheduler, [4, 5], seeds=[4, 5], **run))
    expected = to_uint8(drawn).permute(0, 2, 3, 1)
    assert np.array_equal(images_of(finished[0], ROWS[0])[4:], expected.numpy())


@pytest.mark.slow
def test_in_another_thread(finished, pipeline_dir, tmp_path):
    """As a notebook's executor or a web server runs it: the same images, the same refusals."""
    directory, _ = finished
    rows = in_a_thread(experiment, pipeline_dir, tmp_path)
    assert [row["row"] for row in rows] == [kind.name for kind in ROWS]
    for kind in ROWS:
        assert np.array_equal(images_of(tmp_path, kind), images_of(directory, kind))
    with pytest.raises(ConfigError, match="holds an experiment"):
        in_a_thread(experiment, pipeline_dir, tmp_path, dataclasses.replace(SETTINGS, images=8))


@pytest.mark.slow
def test_the_pipeline_stays_as_it_is(finished, pipeline_dir, tmp_path):
    pipe = load_pipeline(pipeline_dir)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    run_experiment(pipe, SETTINGS, tmp_path, scorer=Scorer())
    assert not quant_layers(pipe.transformer)
    assert get_cache(pipe.transformer) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


@pytest.mark.slow
def test_interrupted_anywhere_it_goes_on(finished, pipeline_dir, tmp_path, monkeypatch):
    """Ctrl-C at every fifth call that draws: what is finished is not made again, and the end is the same."""
    calls, drawn = 0, []
    draw = qandc.experiments.many_images.ImageDrawer.__call__

    def sometimes(self, labels, seeds):
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise KeyboardInterrupt
        drawn.append((id(self.model), tuple(seeds)))
        return draw(self, labels, seeds)

    monkeypatch.setattr(qandc.experiments.many_images.ImageDrawer, "__call__", sometimes)
    for _ in range(10):
        try:
            experiment(pipeline_dir, tmp_path)
        except KeyboardInterrupt:
            continue
        break
    assert len(drawn) == 14  # two shards of seven rows, none twice
    for kind in ROWS:
        assert np.array_equal(images_of(tmp_path, kind), images_of(finished[0], kind))


@pytest.mark.slow
def test_a_finished_experiment_is_only_read(finished, pipeline_dir, monkeypatch):
    directory, rows = finished
    monkeypatch.setattr(qandc.experiments.ablation, "calibrate_pipeline", None)
    monkeypatch.setattr(qandc.experiments.ablation, "draw_shards", None)
    assert experiment(pipeline_dir, directory) == rows


@pytest.mark.slow
def test_images_are_not_drawn_again_if_only_the_figures_are_lost(finished, pipeline_dir, tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(28, "No space left on device")

    delete = qandc.experiments.ablation.delete_shards
    monkeypatch.setattr(qandc.experiments.ablation, "delete_shards", fails)
    with pytest.raises(OSError, match="No space"):
        experiment(pipeline_dir, tmp_path)
    monkeypatch.setattr(qandc.experiments.ablation, "delete_shards", delete)
    (tmp_path / "fp.json").unlink()  # as if the disk had been full a moment before
    seen = []
    draw = qandc.experiments.many_images.ImageDrawer.__call__
    monkeypatch.setattr(
        qandc.experiments.many_images.ImageDrawer,
        "__call__",
        lambda self, *given: seen.append(given) or draw(self, *given),
    )
    experiment(pipeline_dir, tmp_path)
    assert len(seen) == 12  # six rows of two shards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 8}, r"an experiment of images 6; this one would have 8"),
        ({"batch_size": 3}, r"batch_size 4; this one would have 3"),
        ({"first_seed": 1}, r"first_seed 0; this one would have 1"),
    ],
)
def test_other_settings_are_not_mixed_in(finished, pipeline_dir, changes, message):
    settings = ExperimentConfig(**{"images": 6, "calibration": CALIBRATION, "batch_size": 4, **changes})
    with pytest.raises(ConfigError, match=message):
        experiment(pipeline_dir, finished[0], settings)


def test_two_runs_at_once_are_refused(pipeline_dir, tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(OutputError, match="another run is writing to"):
        experiment(pipeline_dir, tmp_path)


def test_a_quantized_pipeline_is_refused(pipeline_dir, tmp_path):
    pipe = load_pipeline(pipeline_dir)
    qandc.quantize_model(pipe.transformer)
    with pytest.raises(ModelError, match="quantized or has a cache already; load the pipeline anew"):
        run_experiment(pipe, SETTINGS, tmp_path, scorer=Scorer())


def test_settings_that_make_no_experiment():
    with pytest.raises(ConfigError, match="images is 1"):
        ExperimentConfig(images=1)
    with pytest.raises(ConfigError, match="vc is 'none'"):
        ExperimentConfig(calibration=CalibrationConfig(vc="none", uniform=True))
    with pytest.raises(ConfigError, match="uniform is False"):
        ExperimentConfig(calibration=CalibrationConfig())


def test_scores_and_their_intervals():
    generator = np.random.default_rng(1)
    full = generator.integers(0, 256, (200, 32, 32, 1), dtype=np.uint8)
    off = np.where(full > 128, full - 4, full + 4).astype(np.uint8)
    network = dataclasses.replace(load_extractor("fashion-classifier"), model=(model := FashionClassifier().eval()))
    scorer = Scorer(dataclasses.replace(network, layer=model.body[14]), accuracy=True)
    found = scorer(off, full, np.arange(200) % 10)
    assert set(found) == {"psnr_to_fp", "psnr_worst", "inception_score", "class_accuracy"}
    assert found["psnr_to_fp"]["value"] == pytest.approx(10 * np.log10(255**2 / 16))
    assert found["psnr_to_fp"]["ci95"] == pytest.approx(0, abs=1e-9)
    share = found["class_accuracy"]["value"]  # of a binomial distribution
    assert found["class_accuracy"]["ci95"] == pytest.approx(1.96 * (share * (1 - share) / 200) ** 0.5, rel=0.35)
    with pytest.raises(DataError, match=r"\[200, 32, 32, 1\] and those of full precision \[199, 32, 32, 1\]"):
        scorer(off, full[1:], np.arange(200))
    for images, labels in (
        (full[:0], np.arange(0)),
        (full.astype(np.float32), np.arange(200)),
        (full[..., 0], np.arange(200)),
        (torch.from_numpy(full), np.arange(200)),
        (full, np.arange(199)),
        (full, np.arange(200.0)),
        (full, list(range(200))),
    ):
        for score in (scorer, Scorer()):
            with pytest.raises(DataError, match="got"):
                score(images, images, labels)


def test_likeness_of_more_images_than_are_compared_at_a_time():
    generator = np.random.default_rng(2)
    ours, full = (generator.integers(0, 256, (501, 4, 6, 3), dtype=np.uint8) for _ in range(2))
    ours[:3] = full[:3]
    error = np.square(ours.astype(float) - full).mean((1, 2, 3))
    expected = np.minimum(100, 10 * np.log10(255**2 / np.maximum(error, 1e-12)))
    found = Scorer()(ours, full, np.arange(501))
    assert found["psnr_to_fp"]["value"] == pytest.approx(expected.mean(), rel=1e-12)
    assert found["psnr_worst"]["value"] == pytest.approx(expected.min(), rel=1e-12)


def test_images_of_a_run_that_are_damaged(tmp_path):
    path = tmp_path / "x.npz"
    images = np.zeros((2, 4, 4, 1), np.uint8)
    np.savez(path, images)
    assert np.array_equal(load_images(path), images)
    for wrong in (images[0], images.astype(np.float32), np.array([{}])):
        np.savez(path, wrong)
        with pytest.raises(DataError, match=r"holds no images .*delete it and run the same command again"):
            load_images(path)
    np.savez(path, images=images)
    with pytest.raises(DataError, match="holds no images"):
        load_images(path)
    path.unlink()
    with pytest.raises(DataError, match=r"holds no images .*No such file"):
        load_images(path)


def test_the_classifier_scores_only_the_classes_it_knows(pipeline_dir, tmp_path):
    assert scorer_for(load_pipeline()).name == "fashion-classifier"
    assert scorer_for(load_pipeline(), "none").extractor is None
    assert scorer_for(load_pipeline(pipeline_dir)).extractor is None
    with pytest.raises(ConfigError, match="choose one of auto, none, fashion-classifier"):
        scorer_for(load_pipeline(), "fid")
    with pytest.raises(ConfigError, match="inception need the path of their weights"):
        scorer_for(load_pipeline(), "inception")
    with pytest.raises(ConfigError, match="a reference or Inception weights need --features"):
        scorer_for(load_pipeline(pipeline_dir), reference=tmp_path)


@pytest.mark.slow
def test_the_distance_is_the_one_that_evaluate_finds(tmp_path):
    from qandc.evaluation.compare import evaluate

    generator = np.random.default_rng(2)
    ours, theirs = (generator.integers(0, 256, (40, 32, 32, 1), dtype=np.uint8) for _ in range(2))
    for name, images in (("ours", ours), ("theirs", theirs)):
        np.savez(tmp_path / f"{name}.npz", images)
    pipe = load_pipeline()
    expected = evaluate(tmp_path / "ours.npz", tmp_path / "theirs.npz")
    found = scorer_for(pipe, reference=tmp_path / "theirs.npz")(ours, ours, np.arange(40) % 10)
    assert found["frechet_distance"]["value"] == pytest.approx(expected.frechet_distance, rel=1e-4)
    assert found["inception_score"]["value"] == pytest.approx(expected.inception_score, rel=1e-6)
    shipped = scorer_for(pipe)(ours, ours, np.arange(40) % 10)
    expected = evaluate(tmp_path / "ours.npz", "fashion-mnist", allow_unequal=True)
    assert shipped["frechet_distance"]["value"] == pytest.approx(expected.frechet_distance, rel=1e-4)


PROMPTS = ("a red coat", "a hat")
OF_PROMPTS = CalibrationConfig(
    num_inference_steps=6, cache_mode="taylor", cache_interval=3, pool_images=2, samples=6, clusters=1, uniform=True
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxPipeline", "PixArtSigmaPipeline", "WanPipeline"])
def test_rows_of_prompts(name, tmp_path, monkeypatch):
    """Each is drawn as by hand, in the form of rows of classes; Ctrl-C loses nothing; the pipeline stays what it is."""
    pytest.importorskip("transformers")
    pipe = make_pipeline(name)
    before = {key: tensor.clone() for key, tensor in pipe.transformer.state_dict().items()}
    given = {"height": 16, "width": 16, **PIPELINES[name][3]}
    settings = ExperimentConfig(3, OF_PROMPTS, first_seed=5, batch_size=2, prompts=PROMPTS, arguments=given)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(qandc.experiments.ablation, "draw_shards", interrupted)
        calibrated = []
        patched.setattr(
            qandc.experiments.ablation,
            "calibrate_on_prompts",
            lambda *args, **kwargs: calibrated.append(kwargs["select"]) or calibrate_on_prompts(*args, **kwargs),
        )
        with pytest.raises(KeyboardInterrupt):
            run_experiment(pipe, settings, tmp_path, scorer=Scorer())
    assert calibrated == ["random", "tap"]  # quantized once for both compensations, which changes no bit
    few = {"cache": OF_PROMPTS.cache, "pool_images": 2, "samples": 6, "uniform": True, "num_inference_steps": 6}
    by_itself = calibrate_on_prompts(make_pipeline(name), PROMPTS, compensation="features", **few, **given)
    shared = load(tmp_path / "tap-features")
    found = shared.model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in by_itself.model.state_dict().items())
    for key, tensor in by_itself.features.tensors.items():  # fits show where MKL sums by the alignment of memory
        torch.testing.assert_close(shared.features.tensors[key], tensor, rtol=0, atol=0.003)
    monkeypatch.setattr(qandc.experiments.ablation, "calibrate_on_prompts", None)  # all are finished
    rows = run_experiment(pipe, settings, tmp_path, scorer=scorer_for(pipe))
    assert [row["row"] for row in rows] == [kind.name for kind in ROWS]
    computed = sum(OF_PROMPTS.cache.of_steps(6))
    assert [(row["computed_steps"], row["steps"]) for row in rows] == [(6, 6), (6, 6), *[(computed, 6)] * 5]
    assert [row["cache_bytes"] > 0 for row in rows] == [kind.cached for kind in ROWS]
    assert rows[1]["transformer_bytes"] < rows[2]["transformer_bytes"] == rows[0]["transformer_bytes"]
    assert all(row["metrics"]["psnr_worst"]["value"] <= row["metrics"]["psnr_to_fp"]["value"] for row in rows)
    assert not quant_layers(pipe.transformer)
    assert get_cache(pipe.transformer) is None
    assert all(torch.equal(before[key], tensor) for key, tensor in pipe.transformer.state_dict().items())
    run = {**given, "num_inference_steps": 6}
    for kind in ROWS:
        by_hand = make_pipeline(name)
        if kind.calibration is None:
            if kind.cached:
                apply_cache(by_hand.transformer, config=OF_PROMPTS.cache)
        else:
            found = load(tmp_path / kind.calibration)
            by_hand.transformer, corrected = found.model, found if kind.compensated else CalibratedModel(found.model)
            assert (found.compensation is not None, found.features is not None) == (
                kind.calibration == "tap",
                kind.calibration == "tap-features",
            )
            if kind.cached:
                apply_cache(found.model, config=found.schedule.config(), compensation=corrected.features)
            if corrected.compensation is not None:
                by_hand.scheduler = compensated_scheduler(by_hand.scheduler, corrected.compensation)
        drawn = torch.cat([draw_prompt(by_hand, PROMPTS[i % 2], 5 + i, run) for i in range(3)])
        expected = to_uint8(drawn).permute(0, 2, 3, 1).numpy()
        assert np.abs(images_of(tmp_path, kind).astype(int) - expected.astype(int)).mean() < 0.005, kind.name
    other = dataclasses.replace(settings, prompts=("a hat", "a red coat"))
    with pytest.raises(ConfigError, match="prompts"):
        run_experiment(pipe, other, tmp_path, scorer=Scorer())


def test_two_transformers_have_no_rows(tmp_path):
    pytest.importorskip("transformers")
    pipe = make_pipeline("WanPipeline")
    pipe.register_modules(transformer_2=pipe.transformer)
    settings = ExperimentConfig(calibration=OF_PROMPTS, prompts=PROMPTS)
    with pytest.raises(ConfigError, match="WanPipeline has transformer, transformer_2; rows are of one transformer"):
        run_experiment(pipe, settings, tmp_path, scorer=Scorer())


TINY = ("--steps", "4", "--images", "6", "--pool-images", "3", "--samples", "6", "--clusters", "2",
        "--vc-samples", "4", "--feature-images", "4", "--batch-size", "4", "--interval", "2",
        "--device", "cpu")  # fmt: skip


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_ablate(capsys, pipeline_dir, tmp_path):
    arguments = ("ablate", "--model", pipeline_dir, "--out", tmp_path, *TINY)
    status, out, _ = run(capsys, *arguments, "--steps", "4,3")
    assert status == 0
    assert (out.count("| Q&C + TAP + VC |"), out.count("| Q&C + TAP + FC |")) == (2, 2)
    summary = json.loads((tmp_path / "experiment_summary.json").read_text())
    assert {"command", "commit", "date", "machine", "versions", "settings"} <= summary.keys()
    assert [(row["steps"], row["row"]) for row in summary["rows"]] == [(n, k.name) for n in (4, 3) for k in ROWS]
    assert summary["settings"]["num_inference_steps"] == [4, 3]
    assert (tmp_path / "experiment_summary.md").read_text().strip() == out.strip()
    with Image.open(tmp_path / "experiment_summary.png") as figure:
        assert min(figure.size) > 300
    status, _, err = run(capsys, *arguments, "--w-bits", "4")
    assert status == 2
    assert "w_bits 8; this one would have 4" in err
    status, _, err = run(capsys, *arguments, "--w-bits", "4", "--steps", "2")  # nor beside it
    assert status == 2
    assert "holds an ablation of w_bits 8; this one would have 4" in err


@pytest.mark.slow
def test_ablate_says_that_distances_of_few_images_are_too_large(capsys, tmp_path):
    few = (
        "--steps",
        "2",
        "--images",
        "2",
        "--pool-images",
        "1",
        "--samples",
        "2",
        "--clusters",
        "1",
        "--interval",
        "2",
    )
    few += ("--vc-samples", "2", "--feature-images", "2", "--device", "cpu")
    status, out, err = run(capsys, "ablate", "--out", tmp_path, *few)
    assert status == 0, err
    assert "2 images: Fréchet distances are too large, compare them only with equal numbers" in err
    assert "| Fréchet distance |" in out


@pytest.mark.slow
def test_ablate_takes_the_settings_that_calibrate_wrote(capsys, pipeline_dir, tmp_path):
    small = ("--pool-images", "3", "--samples", "6", "--clusters", "2", "--vc-samples", "4", "--device", "cpu",
             "--feature-images", "4")  # fmt: skip
    wanted = ("--steps", "3", "--scheduler", "ddim", "--guidance-scale", "2", "--w-bits", "4", "--cache-mode", "branch")
    status, *_ = run(capsys, "calibrate", "--model", pipeline_dir, *small, *wanted, "--out", tmp_path / "settings")
    assert status == 0
    arguments = ("ablate", "--model", tmp_path / "settings", *small, "--images", "2", "--batch-size", "2")
    status, _, err = run(capsys, *arguments, "--out", tmp_path / "ablation", "--w-bits", "8")
    assert status == 0, err
    found = json.loads((tmp_path / "ablation" / "steps-3" / "experiment.json").read_text())
    expected = {"scheduler": "ddim", "guidance_scale": 2.0, "w_bits": 8, "cache_mode": "branch"}
    assert expected.items() <= found.items()
    assert found["model"] == str(pipeline_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "large"), "--size 'large' is unknown; choose one of small, paper"),
        (("--steps", "4;5"), "--steps is '4;5'; give numbers, separated by commas"),
        (("--steps", ""), "--steps is ''; give numbers, separated by commas"),
        (("--images", "1"), "images is 1; give an integer >= 2"),
        (("--features", "x"), "choose one of auto, none"),
        (("--features", "inception"), "need the path of their weights"),
        (("--vc", "none"), "vc is 'none'"),
        (("--guidance-scale", "-1"), "--guidance-scale is -1.0"),
        (("--samples", "900"), "samples is 900; a pool of 3 images of 4 steps has 12 candidates"),
    ],
)
def test_ablate_refuses(capsys, pipeline_dir, tmp_path, options, message):
    status, _, err = run(capsys, "ablate", "--model", pipeline_dir, "--out", tmp_path, *TINY, *options)
    assert status == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_sample(capsys, pipeline_dir, tmp_path):
    target = tmp_path / "images.npz"
    arguments = ("sample", "-n", "5", "-o", target, "--batch-size", "2", "--steps", "3", "--device", "cpu")
    status, out, _ = run(capsys, *arguments, "--model", pipeline_dir, "--full-precision", "--json", tmp_path / "a.json")
    assert status == 0
    assert "5 images" in out
    with np.load(target, allow_pickle=False) as data:
        assert data["arr_0"].shape == (5, 16, 16, 3)
        assert data["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".images.npz.lock", "a.json", "images.npz"]
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["images_per_second"] > 0
    status, _, err = run(capsys, *arguments, "--model", pipeline_dir, "--full-precision")
    assert status == 2
    assert "is there already; delete it, or give another file" in err
    target.unlink()
    for options, message in (
        (("--model", pipeline_dir), "needs --calibrated, which qandc calibrate writes for it, or --full-precision"),
        (("--full-precision", "--calibrated", tmp_path), "contradict each other"),
        ((), "--steps is 3, but the settings that come with fashion-dit are for 50; leave it out, or give other"),
        (("-n", "0"), "--images is 0; give an integer >= 1"),
        (("--full-precision", "--w-bits", "4"), "--w-bits is for a model that is quantized here: leave it out"),
        (("--full-precision", "-o", tmp_path / "x.png"), "must end in .npz"),
    ):
        status, _, err = run(capsys, *arguments, *options)
        assert status == 2
        assert message in err


def interrupted_sample(pipe, target, monkeypatch, **changes) -> None:
    """Ends in the second shard."""
    draw, drawn = qandc.experiments.many_images.ImageDrawer.__call__, []

    def once(self, labels, seeds):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return draw(self, labels, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(qandc.experiments.many_images.ImageDrawer, "__call__", once)
        with pytest.raises(KeyboardInterrupt):
            sample_images(pipe, target, **changes)


def sample_images(pipe, target, **changes) -> float | None:
    settings = {"steps": 3, "guidance_scale": 2.0, "scheduler": "ddim", **changes}
    image_set = settings.pop("image_set", ImageSet(6, (1, 2), batch_size=3))
    return sample_file(pipe, target, image_set, **settings)


def test_images_are_sampled_in_another_thread(pipeline_dir, tmp_path):
    ours, theirs = tmp_path / "thread.npz", tmp_path / "main.npz"
    in_a_thread(sample_images, load_pipeline(pipeline_dir), ours)
    sample_images(load_pipeline(pipeline_dir), theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(OutputError, match="is there already"):
        in_a_thread(sample_images, load_pipeline(pipeline_dir), ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_scale": 3.0}, "guidance_scale 2.0; this one would have 3.0"),
        ({"steps": 4}, "steps 3; this one would have 4"),
        ({"source": "elsewhere"}, "model None; this one would have elsewhere"),
        ({"image_set": ImageSet(6, (1, 2), first_seed=9, batch_size=3)}, "first_seed 0; this one would have 9"),
        ({"image_set": ImageSet(6, (1, 3), batch_size=3)}, "classes"),
    ],
)
def test_sample_goes_on_only_with_its_own_settings(pipeline_dir, tmp_path, monkeypatch, changes, message):
    target = tmp_path / "x.npz"
    interrupted_sample(load_pipeline(pipeline_dir), target, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        sample_images(load_pipeline(pipeline_dir), target, **changes)
    assert sample_images(load_pipeline(pipeline_dir), target) > 0
    assert target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["features", "samples"])
def test_sample_draws_with_the_compensation_of_the_preset(pipeline_dir, tmp_path, compensation):
    settings = dataclasses.replace(CALIBRATION, compensation=compensation)
    preset = calibrate_pipeline(load_pipeline(pipeline_dir), settings, tmp_path / "preset").preset
    drawn = []
    for changes in ({}, {"compensation": None, "features": None}):
        target = tmp_path / f"{len(drawn)}.npz"
        changed = dataclasses.replace(preset, **changes)
        sample_images(load_pipeline(pipeline_dir), target, preset=changed, steps=4)
        drawn.append(np.load(target)["arr_0"])
    assert not np.array_equal(*drawn)


@pytest.mark.slow
def test_sample_knows_another_model_scheduler_or_preset(pipeline_dir, tmp_path, monkeypatch):
    target = tmp_path / "x.npz"
    pipe = load_pipeline(pipeline_dir)
    calibrate_pipeline(load_pipeline(pipeline_dir), dataclasses.replace(CALIBRATION, seed=0), tmp_path / "preset")
    preset = Preset.load(tmp_path / "preset")
    run = {"preset": preset, "steps": 4}
    interrupted_sample(pipe, target, monkeypatch, **run)
    name = min(name for name in preset.layers if name.endswith("act_scale"))
    other = dataclasses.replace(preset, layers={**preset.layers, name: 2 * preset.layers[name]})
    with pytest.raises(ConfigError, match="holds shards of preset"):
        sample_images(load_pipeline(pipeline_dir), target, **{**run, "preset": other})
    changed = load_pipeline(pipeline_dir)
    changed.transformer.proj_out_1.bias.data[3] += 0.5
    with pytest.raises(ConfigError, match="holds shards of weights_sha256"):
        sample_images(changed, target, **run)
    changed = load_pipeline(pipeline_dir)
    changed.scheduler.register_to_config(beta_end=0.1)
    with pytest.raises(ConfigError, match="holds shards of scheduler_config"):
        sample_images(changed, target, **run)
    with locked(tmp_path / ".x.npz.lock"), pytest.raises(OutputError, match="another run is writing"):
        sample_images(load_pipeline(pipeline_dir), target, **run)
    sample_images(load_pipeline(pipeline_dir), target, **run)


def launch(*arguments, count: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "qandc", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def workers_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_processes_share_the_images_and_a_killed_one_loses_nothing(pipeline_dir, tmp_path):
    """Two processes; one is killed; three finish: the images are those of one process alone."""
    common = ["sample", "-n", 40, "--batch-size", 1, "--steps", 40, "--model", pipeline_dir, "--full-precision"]
    common += ["--device", "cpu"]
    target = tmp_path / "shared.npz"
    shards = tmp_path / "shared.npz.shards"
    process = launch(*common, "-o", target)
    try:
        deadline = time.monotonic() + 120
        while len(list(shards.glob("images-*"))) < 4:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "run the same command again" in output
    kept = sorted(path.name for path in shards.glob("images-*"))
    assert 4 <= len(kept) < 40
    for name in kept:  # marked, as by another model: what is kept must come through
        tensors = load_file(shards / name)
        SHARD.write_tensors(shards / name, {"images": 255 - tensors["images"]}, {"seconds": 1.0})
    assert not target.exists()
    again = launch(*common, "-o", target, count=3)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    alone, threads = tmp_path / "alone.npz", torch.get_num_threads()
    torch.set_num_threads(1)  # as in the others: products are summed in another order otherwise
    try:
        assert main([str(argument) for argument in (*common, "-o", alone)]) == 0
    finally:
        torch.set_num_threads(threads)
    with np.load(target) as shared, np.load(alone) as single:
        expected = single["arr_0"].copy()
        numbers = [int(name.removeprefix("images-").partition(".")[0]) for name in kept]
        expected[numbers] = 255 - expected[numbers]
        assert np.array_equal(shared["arr_0"], expected)
    assert not shards.exists()


def test_a_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert Processes(5, 8, local_rank=1).device(cuda) == torch.device("cuda", 1)
    assert Processes(0, 1).device(cuda) == cuda
    assert Processes(2, 3, local_rank=2).device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU of its own, torch sees 2"):
        Processes(2, 3, local_rank=2).device(cuda)


def test_variables_that_are_no_numbers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="must be numbers"), Processes.joined():
        pass


def test_rows_are_written_one_by_one_and_measured_once(tmp_path, caplog, monkeypatch):
    path, rows, measured = tmp_path / "new" / "result.json", [{"name": name} for name in "abc"], []

    def measure(row):
        if row["name"] == "b" and len(measured) < 2:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(row["name"])
        return {"length": 2.5}

    def run(settings=None, **changes):
        goals = changes.pop("goals", lambda rows: [{"name": "count", "value": len(rows)}])
        return measure_rows(path, settings or {"steps": 3}, rows, measure, goals=goals, **changes)

    with pytest.raises(KeyboardInterrupt):
        run()
    kept = json.loads(path.read_text())
    assert kept["rows"] == [{"name": "a", "length": 2.5}]
    assert kept["goals"] == [{"name": "count", "value": 1}]
    assert kept["settings"] == {"steps": 3}
    assert run(seconds=-1) == kept["rows"]
    assert "out of time" in caplog.text
    assert [row["name"] for row in run()] == ["a", "b", "c"]
    assert measured == ["a", "interrupted", "b", "c"]
    assert json.loads(path.read_text())["goals"][0]["value"] == 3
    with pytest.raises(ConfigError, match="was measured with"):
        run({"steps": 4})
    monkeypatch.setenv("QANDC_COMMIT", "another")
    with pytest.raises(ConfigError, match=r"was measured at commit .*, this is another"):
        run()
    monkeypatch.undo()
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": {"gpu": "another"}}))
    with pytest.raises(ConfigError, match="was measured on another, this is"):
        run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "first"),
    [
        ("evaluate_cache.py", ("--precisions", "W8A8"), {"precision": "W8A8", "mode": "none"}),
        (
            "ablate_fashion_dit.py",
            ("--repeats", "0", "--parts", "ranges", "--pool-images", "2", "--samples", "4", "--fit-images", "2"),
            {"part": "FP", "row": {"w_bits": 16}},
        ),
    ],
)
def test_scripts_measure_a_row_and_stop_in_time(tmp_path, script, options, first):
    root, out = Path(__file__).parents[1], tmp_path / "result.json"
    command = [sys.executable, root / "training" / script, "--images", "20", "--steps", "2", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(
        [*command, "--out", out, "--seconds", "0.01", *options], check=True, env=environment, capture_output=True
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert first.items() <= row.items()
    assert {"frechet_distance", "inception_score", "class_accuracy", "psnr_to_fp"} <= set(row)
