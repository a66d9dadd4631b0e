"""The whole method on a tiny pipeline: what it writes is what it measured; it resumes; it refuses early."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise

import pytest
import torch
from diffusers import DiTPipeline

import qandc.method.pipeline_calibration
import qandc.method.pool
import qandc.method.saved
from qandc import (
    CacheConfig,
    CalibrationConfig,
    CandidatePool,
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    Preset,
    RangeConfig,
    apply_cache_to_dit,
    calibrate_pipeline,
    decode_latents,
    load,
    load_pipeline,
    make_scheduler,
    quantize_model,
    remove_cache,
    sample_latents,
)
from qandc.evaluation.metrics import psnr
from qandc.method.pipeline_calibration import check_directory
from qandc.quantization.conversion import quant_layers

STEPS = 4
TINY = {"num_inference_steps": STEPS, "pool_images": 12, "samples": 20, "clusters": 3, "vc_samples": 4}
TINY |= {"feature_images": 12, "compensation": "features"}


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr(qandc.method.pipeline_calibration, "SCHEDULE_IMAGES", 4)
    monkeypatch.setattr(qandc.method.pipeline_calibration, "SHOWN_IMAGES", 2)


@pytest.fixture
def pool_runs(monkeypatch) -> list[int]:
    """Images of each run that was sampled for the pool."""
    runs = []

    def counted(transformer, scheduler, class_labels, **run):
        runs.append(len(class_labels))
        return sample_latents(transformer, scheduler, class_labels, **run)

    monkeypatch.setattr(qandc.method.pool, "sample_latents", counted)
    return runs


def run(pipeline_dir, directory, *, overwrite=False, progress=lambda *done: None, **changes):
    settings = CalibrationConfig(**{**TINY, **changes})
    return calibrate_pipeline(
        load_pipeline(pipeline_dir), settings, directory, overwrite=overwrite, source="a/b", progress=progress
    )


def same(first: Preset, second: Preset) -> bool:
    tensors = [{**p.layers, **p.features.tensors} for p in (first, second)]
    values = [(p.config, p.schedule, p.scheduler, p.guidance_scale, p.structure, p.model) for p in (first, second)]
    return values[0] == values[1] and all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())


VARIANTS = {
    "W8A8": {},
    "W4A8 with GPTQ": {"w_bits": 4},
    "W8A6, no compensation, no smoothing": {"a_bits": 6, "compensation": "none", "smoothing": False},
    "W8A8 with VC": {"compensation": "samples"},
    "uniform block cache, ddim, of the noise": {
        "cache_mode": "delta", "uniform": True, "scheduler": "ddim",
        "vc_target": "noise", "vc_start": 2, "vc": "variance_ratio", "compensation": "samples",
    },
    "no guidance, mse": {"guidance_scale": 1.0, "ranges": RangeConfig("mse", symmetric=True), "rounding": "gptq"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_preset_draws_what_was_measured(tmp_path, pipeline_dir, changes):
    report = run(pipeline_dir, tmp_path, **changes)
    preset = Preset.load(tmp_path)
    pipe = load_pipeline(pipeline_dir)
    scheduler = make_scheduler(changes.get("scheduler", "ddpm"), pipe.scheduler.config)
    guidance_scale = changes.get("guidance_scale", 1.5)
    run_of = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale}
    preset.check(pipe.transformer, scheduler, STEPS, guidance_scale)

    def draw(compensation=None, features=None):
        apply_cache_to_dit(pipe.transformer, config=preset.schedule.config(), compensation=features)
        latents = sample_latents(pipe.transformer, scheduler, [0, 1], seeds=[0, 1], compensation=compensation, **run_of)
        remove_cache(pipe.transformer)
        return decode_latents(pipe.vae, latents)

    full = decode_latents(pipe.vae, sample_latents(pipe.transformer, scheduler, [0, 1], seeds=[0, 1], **run_of))
    preset.quantize(pipe.transformer)
    assert torch.equal(psnr(draw(), full), report.psnr_uncompensated)
    kind = changes.get("compensation", "samples" if "vc" in changes else "features")
    assert (preset.compensation is not None, preset.features is not None) == (kind == "samples", kind == "features")
    if kind == "none":
        assert report.psnr_compensated is None
    else:
        likeness = psnr(draw(preset.compensation, preset.features), full)
        assert torch.equal(likeness, report.psnr_compensated)
        assert not torch.equal(likeness, report.psnr_uncompensated)
    assert len(report.quantization.quantized) == 20
    layers = quant_layers(pipe.transformer).keys() - {"proj_out_1"}  # of the final modulation
    assert preset.buffers("act_scale").keys() == layers
    assert preset.buffers("smoothing").keys() == (layers if changes.get("smoothing", True) else set())


def test_settings_reach_what_they_are_of(tmp_path, pipeline_dir):
    changes = VARIANTS["uniform block cache, ddim, of the noise"]
    preset = run(pipeline_dir, tmp_path, **changes).preset
    assert preset.schedule.schedule == CacheConfig("delta", interval=3).of_steps(STEPS) == (True, False, False, True)
    assert (preset.schedule.mode, preset.schedule.order, preset.schedule.error) == ("delta", 0, None)
    assert (preset.scheduler, preset.guidance_scale, preset.model) == ("DDIMScheduler", 1.5, "a/b")
    assert (preset.compensation.form, preset.compensation.target) == ("variance_ratio", "noise")
    assert (preset.compensation.gain[:2] == 1).all()
    assert (preset.compensation.gain[2:] != 1).all()
    assert preset.buffers("act_zero_point")


@pytest.mark.slow
def test_weights_are_kept_only_if_rounded_with_error_feedback(tmp_path, pipeline_dir):
    four = run(pipeline_dir, tmp_path / "4", w_bits=4, smoothing=False, ranges=RangeConfig(symmetric=True)).preset
    assert not four.buffers("act_zero_point")
    assert four.config.weight_clip == "mse"
    nearest = quantize_model(load_pipeline(pipeline_dir).transformer, 4, weight_clip="mse")
    name, layer = next(iter(quant_layers(nearest).items()))
    assert torch.equal(four.layers[f"{name}.weight_scale"], layer.weight_scale)
    assert not torch.equal(four.layers[f"{name}.qweight"], layer.qweight)
    eight = run(pipeline_dir, tmp_path / "8").preset
    assert eight.config.weight_clip == "max"
    assert not eight.buffers("qweight")  # smoothed, they are made again
    assert eight.buffers("smoothing")
    assert not (tmp_path / "8" / "weights.safetensors").exists()


def test_the_schedule_has_as_many_computed_steps_as_the_uniform_one(tmp_path, pipeline_dir):
    found = run(pipeline_dir, tmp_path, num_inference_steps=8, compensation="none").preset.schedule
    assert sum(found.schedule) == sum(CacheConfig("taylor", interval=3).of_steps(8)) == 4
    assert found.error < found.uniform_error


def test_without_reuse_nothing_is_searched(tmp_path, pipeline_dir, caplog):
    stages = {}
    report = run(pipeline_dir, tmp_path, cache_interval=1, progress=lambda stage, *done: stages.update({stage: done}))
    assert report.preset.schedule.schedule == (True,) * STEPS
    assert not {"schedule", "features"} & stages.keys()
    assert report.preset.features is None
    assert "every step is computed: nothing is reused whose features could be compensated" in caplog.text
    assert report.psnr_uncompensated.min() > 30


@pytest.mark.slow
def test_an_interrupted_pool_goes_on(tmp_path, pipeline_dir, pool_runs):
    """Stopped in the second shard: the first is not sampled again, and the result is that of a run without a stop."""

    def stop_late(stage, completed, total):
        if completed > 10 * STEPS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipeline_dir, tmp_path / "a", progress=stop_late)
    assert pool_runs == [10, 2]
    check_directory(tmp_path / "a")
    pool_runs.clear()
    resumed = run(pipeline_dir, tmp_path / "a").preset
    assert pool_runs == [2]
    assert same(resumed, run(pipeline_dir, tmp_path / "b").preset)


@pytest.mark.slow
def test_what_was_quantized_is_kept(tmp_path, pipeline_dir, monkeypatch):
    """Stopped while features are fitted: what the stages before found is read, by other compensations too."""

    def stop_late(stage, completed, total):
        if stage == "features" and completed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipeline_dir, tmp_path / "a", w_bits=4, progress=stop_late)
    expected = run(pipeline_dir, tmp_path / "b", w_bits=4)
    stages = []
    monkeypatch.setattr(CandidatePool, "select", None)
    resumed = run(pipeline_dir, tmp_path / "a", w_bits=4, progress=lambda stage, *done: stages.append(stage))
    kept = ["candidate pool", "full precision", "without compensation", "features", "with compensation"]
    assert list(dict.fromkeys(stages)) == kept
    assert same(resumed.preset, expected.preset)
    assert torch.equal(resumed.psnr_compensated, expected.psnr_compensated)
    other = run(pipeline_dir, tmp_path / "a", w_bits=4, compensation="samples", overwrite=True).preset
    assert (other.compensation is not None, other.features) == (True, None)
    assert all(torch.equal(tensor, other.layers[name]) for name, tensor in expected.preset.layers.items())
    for changes in ({"w_bits": 8}, {"w_bits": 4, "samples": 19}, {"w_bits": 4, "ranges": RangeConfig("mse")}):
        with pytest.raises(TypeError, match="not callable"):  # chooses anew
            run(pipeline_dir, tmp_path / "a", overwrite=True, **changes)


@pytest.mark.slow
def test_features_are_fitted_on_noise_nobody_draws(tmp_path, pipeline_dir, monkeypatch):
    drawn = []

    def note(*model, conditions, seeds, **run):
        drawn.append(list(zip(conditions, seeds, strict=True)))
        return sample_latents(*model, conditions, seeds=seeds, **run)

    run(pipeline_dir, tmp_path)
    monkeypatch.setattr(qandc.method.pipeline_calibration, "sample_latents", note)
    run(pipeline_dir, tmp_path, overwrite=True, compensation="none")
    without = len(drawn)
    run(pipeline_dir, tmp_path, overwrite=True)
    of_features = [batch for batch in drawn[without:] if batch not in drawn[:without]]
    assert of_features == [[(i % 10, 23_000_000 + i) for i in part] for part in (range(10), range(10, 12))]


@pytest.mark.slow
def test_a_finished_pool_serves_other_settings(tmp_path, pipeline_dir, pool_runs):
    def stop_after_the_pool(stage, completed, total):
        if stage == "choosing samples":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipeline_dir, tmp_path, progress=stop_after_the_pool)
    pool_runs.clear()
    run(pipeline_dir, tmp_path)
    run(pipeline_dir, tmp_path, w_bits=4, select="random", compensation="none", overwrite=True)
    assert pool_runs == []


@pytest.mark.slow
def test_every_stage_runs_from_nothing_to_its_total(tmp_path, pipeline_dir):
    found = "choosing samples", "smoothing", "rounding weights", "ranges", "schedule"
    for part, quantizing in (("new", found), ("quantized before", ())):
        seen = {}

        def note(stage, *done, seen=seen):
            seen.setdefault(stage, []).append(done)

        run(pipeline_dir, tmp_path, w_bits=4, overwrite=part != "new", progress=note)
        assert list(seen) == [
            *("candidate pool", "full precision"), *quantizing,
            *("without compensation", "features", "with compensation"),
        ]  # fmt: skip
        for stage, steps in seen.items():
            total = steps[0][1]
            assert (steps[0], steps[-1]) == ((0, total), (total, total)), stage
            assert all(before < after for (before, _), (after, _) in pairwise(steps)), stage
        assert seen["candidate pool"][0][1] == 12 * STEPS


@pytest.mark.slow
def test_the_pool_is_of_the_cached_model_and_of_noise_nobody_draws(tmp_path, pipeline_dir):
    run(pipeline_dir, tmp_path, compensation="none")
    recorded = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert (recorded["model"], recorded["schemes"]) == ("3 blocks of 32", [])
    uniform = CacheConfig("taylor", interval=3).of_steps(STEPS)
    assert (recorded["cache_mode"], recorded["cache_schedule"]) == ("taylor", [*uniform])
    assert recorded["class_labels"] == [*range(10), 0, 1]
    assert recorded["seeds"] == list(range(21_000_000, 21_000_012))
    with pytest.raises(ConfigError, match="holds a pool of cache_mode taylor; this one would have None"):
        run(pipeline_dir, tmp_path, compensation="none", overwrite=True, pool_with_cache=False)
    run(pipeline_dir, tmp_path / "other", compensation="none", pool_with_cache=False)
    assert json.loads((tmp_path / "other" / "pool" / "pool.json").read_text())["cache_mode"] is None


def test_samples_are_chosen_as_asked(tmp_path, pipeline_dir, monkeypatch):
    seen = []

    def select(self, count, config, *, method, seed):
        seen.append((len(self), count, config.clusters, method, seed))
        raise KeyboardInterrupt

    monkeypatch.setattr(CandidatePool, "select", select)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline_dir, tmp_path, compensation="none", select="kmeans", seed=7)
    assert seen == [(12 * STEPS, 20, 3, "kmeans", 7)]


@pytest.mark.slow
def test_a_finished_preset_is_replaced_only_if_asked(tmp_path, pipeline_dir):
    run(pipeline_dir, tmp_path, w_bits=4)
    with pytest.raises(OutputError, match="holds a calibrated model; give another directory, or overwrite it"):
        run(pipeline_dir, tmp_path)
    run(pipeline_dir, tmp_path, compensation="none", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_index.json", "pool", "qandc.json", "qandc.safetensors", "report.json", "scheduler", "transformer", "vae"
    }  # fmt: skip
    assert Preset.load(tmp_path).config.w_bits == 8


@pytest.mark.slow
def test_one_directory_is_read_by_three(tmp_path, pipeline_dir):
    """diffusers, qandc.load and Preset.load make the model that was calibrated; no file holds a path from here."""
    pipe = load_pipeline(pipeline_dir)
    settings = CalibrationConfig(**{**TINY, "w_bits": 4})
    report = calibrate_pipeline(pipe, settings, tmp_path)
    found, ours = load(tmp_path), pipe.transformer.state_dict()
    of_settings = Preset.load(tmp_path).quantize(load_pipeline(pipeline_dir).transformer)
    for model in (found.model, DiTPipeline.from_pretrained(tmp_path).transformer, of_settings):
        theirs = model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for path in tmp_path.rglob("*.*"):
        assert path.is_dir() or str(pipeline_dir).encode() not in path.read_bytes(), path
    assert found.schedule == report.preset.schedule
    assert torch.equal(found.features.gains, report.preset.features.gains)
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["settings"]["w_bits"] == 4
    assert record["rows"][0]["psnr_to_fp"]["with compensation"] == report.psnr_compensated.tolist()
    calibrate_pipeline(load_pipeline(pipeline_dir), settings, tmp_path, overwrite=True, checkpoint=False)
    assert not list((tmp_path / "transformer").iterdir())  # it would be of other settings
    assert Preset.load(tmp_path).layers.keys() == report.preset.layers.keys()


@pytest.mark.slow
def test_settings_that_are_replaced_in_part_are_not_finished(tmp_path, pipeline_dir, monkeypatch):
    run(pipeline_dir, tmp_path, compensation="none")

    write = qandc.method.saved.FileKind.write

    def full(kind, path, content):
        if path.parent == tmp_path:
            raise OutputError("No space left on device")
        write(kind, path, content)

    monkeypatch.setattr(qandc.method.saved.FileKind, "write", full)
    with pytest.raises(OutputError, match="No space"):
        run(pipeline_dir, tmp_path, compensation="none", w_bits=4, overwrite=True)
    with pytest.raises(ConfigError, match="holds no calibrated model"):
        Preset.load(tmp_path)


def test_a_strange_file_where_the_model_goes_is_refused_before_any_work(tmp_path, pipeline_dir, pool_runs):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("")
    with pytest.raises(OutputError, match=r"holds 'transformer/config\.json', which is no part of a calibrated model"):
        run(pipeline_dir, tmp_path)
    assert pool_runs == []


def test_directories_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file' is a file; give a directory"):
        check_directory(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        check_directory(tmp_path / ("x" * 300))
    check_directory(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
        check_directory(tmp_path / "new")


def test_a_damaged_shard_is_named(tmp_path, pipeline_dir):
    run(pipeline_dir, tmp_path, compensation="none")
    shard = tmp_path / "pool" / "pool-000010.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(DataError, match=r"pool-000010.safetensors' is no shard of a pool"):
        run(pipeline_dir, tmp_path, compensation="none", overwrite=True)


@pytest.mark.parametrize("change", [quantize_model, apply_cache_to_dit], ids=["quantized", "cached"])
def test_only_a_plain_model_is_calibrated(tmp_path, pipeline_dir, change):
    pipe = load_pipeline(pipeline_dir)
    change(pipe.transformer)
    with pytest.raises(ModelError, match="quantized or has a cache already"):
        calibrate_pipeline(pipe, CalibrationConfig(**TINY), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_the_model_cannot_run_is_refused_before_any_work(tmp_path, pipeline_dir):
    for changes, message in (
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(pipeline_dir, tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()


REFUSALS = {
    "steps": ({"num_inference_steps": 0}, "num_inference_steps is 0; give an integer >= 1"),
    "pool": ({"pool_images": 0}, "pool_images is 0; give an integer >= 1"),
    "boolean": ({"vc_samples": True}, "vc_samples is True; give an integer >= 1"),
    "samples": ({"samples": 49}, "samples is 49; a pool of 12 images of 4 steps has 48 candidates"),
    "clusters": ({"clusters": 49}, "clusters is 49; a pool of 12 images of 4 steps has 48 candidates"),
    "select": ({"select": "best"}, "select 'best' is unknown; choose one of tap, random, uniform, kmeans"),
    "rounding": ({"rounding": "up"}, "rounding 'up' is unknown; choose one of nearest, gptq"),
    "scheduler": ({"scheduler": "euler"}, "scheduler 'euler' is unknown; choose one of ddpm, ddim"),
    "compensation": ({"compensation": "all"}, "compensation 'all' is unknown; choose one of features, samples, none"),
    "feature images": ({"feature_images": 0}, "feature_images is 0; give an integer >= 1"),
    "vc": ({"vc": "some"}, "vc 'some' is unknown; choose one of variance_ratio, least_squares, paper, none"),
    "no form": ({"compensation": "samples", "vc": "none"}, "choose one of variance_ratio, least_squares, paper$"),
    "vc target": ({"vc_target": "mean"}, "vc_target 'mean' is unknown; choose one of sample, noise"),
    "vc start": ({"vc_start": 4}, "vc_start is 4; the run has steps 0 to 3"),
    "form of none": (
        {"vc": "paper", "compensation": "features"},
        "vc is 'paper', which is for .* compensation is features",
    ),
    "target of none": ({"vc_target": "noise"}, "vc_target is 'noise', .* but compensation is features"),
    "start of none": (
        {"vc_start": 1, "vc": "none", "compensation": None},
        "vc_start is 1, .* but compensation is none",
    ),
    "cache mode": ({"cache_mode": "all"}, "cache mode 'all' is unknown"),
    "interval": ({"cache_interval": 0}, "cache_interval is 0; give an integer >= 1"),
    "weights": ({"w_bits": 3}, "w_bits is 3; allowed are 4 and 8"),
    "activations": ({"a_bits": 9}, "a_bits is 9; allowed are"),
    "activations as they are": ({"a_bits": 16}, "a_bits is 16: activations .* have no ranges to calibrate"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_settings_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationConfig(**{**TINY, **changes})


def test_what_is_compensated_depends_on_the_scheduler_and_the_form_of_vc():
    for given, expected in (
        ({}, "none"), ({"scheduler": "ddim"}, "features"), ({"cache_mode": "block"}, "features"),
        ({"vc": "paper"}, "samples"), ({"vc": "none"}, "none"), ({"vc": "none", "compensation": "none"}, "none"),
    ):  # fmt: skip
        assert CalibrationConfig(**given).compensation == expected


def test_clusters_matter_only_where_there_are_any():
    assert CalibrationConfig(**{**TINY, "clusters": 49, "select": "random"}).select == "random"


@pytest.mark.parametrize(
    ("w_bits", "rounding", "feedback"), [(4, None, True), (8, None, False), (4, "nearest", False), (8, "gptq", True)]
)
def test_rounding_follows_the_bits_unless_it_is_given(w_bits, rounding, feedback):
    settings = CalibrationConfig(w_bits=w_bits, rounding=rounding)
    assert settings.gptq is feedback
    assert settings.quant_config.weight_clip == ("mse" if feedback else "max")
