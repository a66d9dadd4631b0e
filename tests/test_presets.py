"""Calibrated settings: saved and loaded whole, refused where they do not belong, those that ship used as they are."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

from qandc import (
    CacheConfig,
    CalibratedSchedule,
    ConfigError,
    ModelError,
    OutputError,
    Preset,
    QuantConfig,
    apply_cache_to_dit,
    calibrate,
    fashion_dit_preset,
    fit_compensation,
    input_hessians,
    load_pipeline,
    make_scheduler,
    quantize_model,
    record_trajectory,
    sample_latents,
    smoothing_factors,
)
from qandc.method.presets import is_finished
from qandc.quantization.conversion import quant_layers
from tests.conftest import make_dit
from tests.test_calibration import dit_batches

RUN = {"num_inference_steps": 6, "guidance_scale": 1.5}
LABELS = (1, 2)


def scheduler():
    return make_scheduler("ddim", {"num_train_timesteps": 1000, "clip_sample": False})


def make_preset(symmetric=False, rounding="nearest"):
    model = make_dit(num_layers=2)
    reference = record_trajectory(model, scheduler(), LABELS, **RUN)
    config = QuantConfig(4, 8, weight_clip="mse")
    batches = list(dit_batches([900, 400]))
    hessians = input_hessians(model, batches)
    factors = smoothing_factors(model, batches, [name for name in hessians if "blocks" in name])
    changes = {"nearest": {}, "error feedback": {"hessians": hessians}, "smoothing": {"smoothing": factors}}[rounding]
    quantize_model(model, 4, 8, weight_clip="mse", **changes)
    calibrate(model, batches, symmetric=symmetric)
    timesteps = tuple(int(t) for t in scheduler_timesteps())
    schedule = CalibratedSchedule((True, True, False, True, False, False), timesteps, "taylor", 1, 0.1, 0.2)
    apply_cache_to_dit(model, config=schedule.config())
    compensation = fit_compensation(reference, model, scheduler())
    return Preset.of(model, config, schedule, compensation, keep_weights=rounding == "error feedback"), model


def scheduler_timesteps():
    made = scheduler()
    made.set_timesteps(6)
    return made.timesteps


@pytest.mark.parametrize(
    ("symmetric", "rounding"),
    [(False, "nearest"), (True, "nearest"), (False, "error feedback"), (True, "smoothing")],
)
def test_a_loaded_preset_makes_the_same_model(tmp_path, symmetric, rounding):
    """Bit for bit; weights are kept only where rounding to nearest would not make them again."""
    preset, model = make_preset(symmetric, rounding)
    preset.save(tmp_path / "preset")
    loaded = Preset.load(tmp_path / "preset")
    assert (loaded.config, loaded.schedule) == (preset.config, preset.schedule)
    assert (
        bool(loaded.weights) is (tmp_path / "preset" / "weights.safetensors").exists() is (rounding == "error feedback")
    )
    assert bool(loaded.smoothing) is (rounding == "smoothing")
    assert bool(loaded.zero_points) is not symmetric
    other = loaded.quantize(make_dit(num_layers=2))
    apply_cache_to_dit(other, config=loaded.schedule.config())
    samples = [
        sample_latents(m, scheduler(), LABELS, seeds=[5, 6], compensation=p.compensation, **RUN)
        for m, p in ((model, preset), (other, loaded))
    ]
    assert torch.equal(*samples)
    layers = quant_layers(other)
    for name, layer in quant_layers(model).items():
        for buffer, tensor in layer.state_dict().items():
            assert torch.equal(tensor, layers[name].state_dict()[buffer]), f"{name}.{buffer}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, "made for num_layers 2, this one has 1"),
        ({"num_layers": 2, "heads": 4}, "made for num_attention_heads 2, this one has 4"),
        ({"num_layers": 2, "head_dim": 32}, "made for attention_head_dim 16, this one has 32"),
        ({"num_layers": 2, "patch_size": 4}, "made for patch_size 2, this one has 4"),
    ],
)
def test_of_another_model_it_is_refused(changes, message):
    preset, _ = make_preset()
    model = make_dit(**changes)
    for use in (preset.quantize, lambda model: preset.check(model, scheduler(), 6, 1.5)):
        with pytest.raises(ModelError, match=f"these settings are of another model: they were {message}"):
            use(model)
    assert not quant_layers(model)


def test_ranges_of_a_layer_that_is_not_there_are_refused():
    preset, _ = make_preset()
    other = dataclasses.replace(preset, scales={**preset.scales, "attention": torch.tensor(1.0)})
    model = make_dit(num_layers=2)
    with pytest.raises(ModelError, match="it has no quantized layer 'attention'"):
        other.quantize(model)
    assert not quant_layers(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: None, r"qweight must be \[32, 16\] torch.uint8; weights.safetensors holds nothing"),
        (lambda q: q[:16], r"qweight must be \[32, 16\] torch.uint8; weights.safetensors holds \[16, 16\]"),
        (lambda q: q.to(torch.int8), r"weights.safetensors holds \[32, 16\] torch.int8"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    preset, _ = make_preset(rounding="error feedback")
    name = "transformer_blocks.1.attn1.to_q.qweight"
    kept = {**preset.weights, name: change(preset.weights[name])}
    other = dataclasses.replace(preset, weights={key: value for key, value in kept.items() if value is not None})
    model = make_dit(num_layers=2)
    with pytest.raises(ModelError, match=message):
        other.quantize(model)
    assert not quant_layers(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "made for num_inference_steps 6; this run has 7"),
        ({"guidance": 4}, r"made for guidance_scale 1\.5; this run has 4\.0"),
        ({"made": make_scheduler("ddpm", {})}, "made for scheduler DDIMScheduler; this run has DDPMScheduler"),
        (
            {"made": make_scheduler("ddim", {"num_train_timesteps": 100})},
            r"made for timesteps 830, 664 \.\. 0; this run has 80, 64 \.\. 0",
        ),
    ],
    ids=["steps", "guidance", "scheduler", "timesteps"],
)
def test_another_run_is_refused(changes, message):
    preset, _ = make_preset()
    model, run = make_dit(num_layers=2), {"made": scheduler(), "steps": 6, "guidance": 1.5}
    preset.check(model, *run.values())
    with pytest.raises(ConfigError, match=message):
        preset.check(model, *{**run, **changes}.values())


def test_without_compensation(tmp_path):
    """The run is then to be told, and no file of a compensation is left from settings that were there before."""
    preset, model = make_preset()
    preset.save(tmp_path)
    with pytest.raises(ConfigError, match="need the scheduler and guidance_scale they are for"):
        Preset.of(model, preset.config, preset.schedule, None)
    plain = Preset.of(model, preset.config, preset.schedule, None, scheduler="DDIMScheduler", guidance_scale=1.5)
    plain.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"preset.json", "ranges.safetensors", "schedule.json"}
    loaded = Preset.load(tmp_path)
    assert loaded.compensation is None
    assert (loaded.scheduler_name, loaded.num_inference_steps, loaded.guidance_scale) == ("ddim", 6, 1.5)


FILES = ["preset.json", "ranges.safetensors", "weights.safetensors", "schedule.json", "compensation.safetensors"]


@pytest.mark.parametrize("broken", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_broken_directories_are_refused(tmp_path, broken, how):
    make_preset(rounding="error feedback")[0].save(tmp_path)
    path = tmp_path / broken
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError):
        Preset.load(tmp_path)


def test_versions_and_folders_are_checked(tmp_path):
    preset, _ = make_preset()
    preset.save(tmp_path)
    values = json.loads((tmp_path / "preset.json").read_text())
    for version, what in ((4, "update qandc"), (2, "make them anew with qandc calibrate")):
        (tmp_path / "preset.json").write_text(json.dumps({**values, "version": version}))
        with pytest.raises(ConfigError, match=f"has version {version}, known is 3; {what}"):
            Preset.load(tmp_path)
    (tmp_path / "preset.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no part of calibrated settings: it holds list, not an object"):
        Preset.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        preset.save(tmp_path / "file" / "preset")


SETTINGS = [
    "version", "w_bits", "a_bits", "skip_patterns", "weight_clip", "smoothing", "weights", "compensation",
    "scheduler",
    "guidance_scale", "model", "structure",
]  # fmt: skip


def test_a_setting_that_is_missing_is_named(tmp_path):
    """As in a file of a version that did not know it: never guessed, and every one that is written is needed."""
    make_preset()[0].save(tmp_path)
    path = tmp_path / "preset.json"
    values = json.loads(path.read_text())
    assert set(values) == set(SETTINGS)
    for name in SETTINGS:
        path.write_text(json.dumps({key: value for key, value in values.items() if key != name}))
        with pytest.raises(ConfigError, match=f"preset.json' is no .*: it has no '{name}'; make them anew"):
            Preset.load(tmp_path)
    path.write_text(json.dumps({**values, "structure": {"num_layers": 2}}))
    with pytest.raises(ConfigError, match=r"preset.json' is no .*: it has no 'num_attention_heads'"):
        Preset.load(tmp_path)
    path.write_text(json.dumps(values))
    Preset.load(tmp_path)


def test_smoothing_that_is_not_the_models_is_refused(tmp_path):
    preset, _ = make_preset(rounding="smoothing")
    other = dataclasses.replace(preset, smoothing={**preset.smoothing, "attention": torch.ones(32)})
    with pytest.raises(ModelError, match="it has no layer 'attention' to smooth"):
        other.quantize(make_dit(num_layers=2))
    preset.save(tmp_path)
    path = tmp_path / "preset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "smoothing": False}))
    with pytest.raises(ConfigError, match="smoothing is False in"):
        Preset.load(tmp_path)


def test_a_digest_tells_settings_apart():
    """Whatever a run depends on: one number of any tensor, the schedule, the bits, the run."""
    preset, _ = make_preset(rounding="error feedback")
    compensation = preset.compensation

    def nudged(tensor):
        other = tensor.clone()
        other.view(-1)[-1] += 1
        return other

    first = next(iter(preset.scales))
    schedule = dataclasses.replace(preset.schedule, schedule=(True, True, False, False, True, False))
    fitted_for = dataclasses.replace(compensation.fitted_for, guidance_scale=2.0)
    changes = {
        "gain": {"compensation": dataclasses.replace(compensation, gain=nudged(compensation.gain))},
        "mean": {"compensation": dataclasses.replace(compensation, mean=nudged(compensation.mean))},
        "both exchanged": {
            "compensation": dataclasses.replace(compensation, gain=compensation.mean.abs(), mean=compensation.gain)
        },
        "target": {"compensation": dataclasses.replace(compensation, target="noise")},
        "fitted for": {"compensation": dataclasses.replace(compensation, fitted_for=fitted_for)},
        "no compensation": {"compensation": None},
        "scale": {"scales": {**preset.scales, first: nudged(preset.scales[first])}},
        "zero point": {"zero_points": {**preset.zero_points, first: nudged(preset.zero_points[first])}},
        "smoothing": {"smoothing": {first: torch.ones(32)}},
        "weight": {"weights": {**preset.weights, f"{first}.qweight": nudged(preset.weights[f"{first}.qweight"])}},
        "schedule": {"schedule": schedule},
        "bits": {"config": QuantConfig(4, 7, weight_clip="mse")},
        "guidance": {"guidance_scale": 3.0},
        "scheduler": {"scheduler": "DDPMScheduler"},
    }
    digests = {name: dataclasses.replace(preset, **change).digest() for name, change in changes.items()}
    digests["as it is"] = preset.digest()
    assert len(set(digests.values())) == len(digests)
    assert dataclasses.replace(preset, scales=dict(reversed(preset.scales.items()))).digest() == preset.digest()


@pytest.mark.parametrize("name", FILES)
def test_a_failed_write_leaves_no_fragment_and_nothing_finished(tmp_path, monkeypatch, name):
    preset, _ = make_preset(rounding="error feedback")
    preset.save(tmp_path)
    replace = os.replace

    def full(source, target):
        if target.name == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        preset.save(tmp_path)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))
    assert not is_finished(tmp_path)
    monkeypatch.undo()
    preset.save(tmp_path)
    assert is_finished(tmp_path)


@pytest.mark.parametrize(("w_bits", "computed"), [(8, 18), (4, 17)])
def test_the_shipped_settings_fit_the_shipped_model(w_bits, computed):
    """Layers that see tokens are smoothed and have ranges; the schedule is of the default run, VC passes the check."""
    preset = fashion_dit_preset(w_bits)
    assert (preset.config.w_bits, preset.config.a_bits) == (w_bits, 8)
    assert (len(preset.schedule.schedule), sum(preset.schedule.schedule)) == (50, computed)
    assert preset.compensation.gain.shape == (50, 4)
    pipe = load_pipeline()
    model = preset.quantize(pipe.transformer)
    layers = quant_layers(model)
    assert layers.pop("proj_out_1").act_scale is None  # modulation: sees a row per sample
    assert all(layer.smoothing is not None and layer.act_scale is not None for layer in layers.values())
    apply_cache_to_dit(model, config=preset.schedule.config())
    made = make_scheduler("ddpm", pipe.scheduler.config)
    from qandc.sampling.loop import describe_run

    preset.check(load_pipeline().transformer, made, 50, 1.5)
    preset.compensation.check(describe_run(model, made, 1.5))
    with pytest.raises(ConfigError, match=r"fitted for guidance_scale 1\.5"):
        preset.compensation.check(describe_run(model, made, 4.0))


def test_there_are_no_settings_of_other_bits():
    with pytest.raises(ConfigError, match="w_bits is 6; allowed are 4 and 8"):
        fashion_dit_preset(6)


def test_cache_config_of_a_preset():
    preset, _ = make_preset()
    assert preset.schedule.config() == CacheConfig("taylor", schedule=(True, True, False, True, False, False))
