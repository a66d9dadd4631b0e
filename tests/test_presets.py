"""Calibrated settings: saved and loaded whole, refused where they do not belong, those that ship used as they are."""

from __future__ import annotations

import json

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
    load_pipeline,
    make_scheduler,
    quantize_model,
    record_trajectory,
    sample_latents,
)
from qandc.conversion import quant_layers
from tests.conftest import make_dit
from tests.test_calibration import dit_batches

RUN = {"num_inference_steps": 6, "guidance_scale": 1.5}
LABELS = (1, 2)


def scheduler():
    return make_scheduler("ddim", {"num_train_timesteps": 1000, "clip_sample": False})


def make_preset(symmetric=False):
    model = make_dit(num_layers=2)
    reference = record_trajectory(model, scheduler(), LABELS, **RUN)
    config = QuantConfig(4, 8, weight_clip="mse")
    quantize_model(model, 4, 8, weight_clip="mse")
    calibrate(model, dit_batches([900, 400]), symmetric=symmetric)
    timesteps = tuple(int(t) for t in scheduler_timesteps())
    schedule = CalibratedSchedule((True, True, False, True, False, False), timesteps, "taylor", 1, 0.1, 0.2)
    apply_cache_to_dit(model, config=schedule.config())
    return Preset.of(model, config, schedule, fit_compensation(reference, model, scheduler())), model


def scheduler_timesteps():
    made = scheduler()
    made.set_timesteps(6)
    return made.timesteps


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_loaded_preset_makes_the_same_model(tmp_path, symmetric):
    preset, model = make_preset(symmetric)
    preset.save(tmp_path / "preset")
    loaded = Preset.load(tmp_path / "preset")
    assert (loaded.config, loaded.schedule) == (preset.config, preset.schedule)
    assert bool(loaded.zero_points) is not symmetric
    other = loaded.quantize(make_dit(num_layers=2))
    apply_cache_to_dit(other, config=loaded.schedule.config())
    samples = [
        sample_latents(m, scheduler(), LABELS, seeds=[5, 6], compensation=p.compensation, **RUN)
        for m, p in ((model, preset), (other, loaded))
    ]
    assert torch.equal(*samples)


def test_of_another_model_it_is_refused():
    preset, _ = make_preset()
    with pytest.raises(ModelError, match=r"of another model: it has no quantized layer 'transformer_blocks.1"):
        preset.quantize(make_dit(num_layers=1))


@pytest.mark.parametrize("broken", ["preset.json", "ranges.safetensors", "schedule.json", "compensation.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_broken_directories_are_refused(tmp_path, broken, how):
    make_preset()[0].save(tmp_path)
    path = tmp_path / broken
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError):
        Preset.load(tmp_path)


def test_versions_and_folders_are_checked(tmp_path):
    preset, _ = make_preset()
    preset.save(tmp_path)
    values = json.loads((tmp_path / "preset.json").read_text())
    (tmp_path / "preset.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ConfigError, match="has version 2, known is 1"):
        Preset.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        preset.save(tmp_path / "file" / "preset")


@pytest.mark.parametrize("w_bits", [8, 4])
def test_the_shipped_settings_fit_the_shipped_model(w_bits):
    """All 74 layers have ranges, the schedule is of the default run, and its compensation passes the check of a run."""
    preset = fashion_dit_preset(w_bits)
    assert (preset.config.w_bits, preset.config.a_bits) == (w_bits, 8)
    assert (len(preset.schedule.schedule), sum(preset.schedule.schedule)) == (50, 17)
    assert preset.compensation.gain.shape == (50, 4)
    pipe = load_pipeline()
    model = preset.quantize(pipe.transformer)
    assert all(layer.act_scale is not None for layer in quant_layers(model).values())
    apply_cache_to_dit(model, config=preset.schedule.config())
    made = make_scheduler("ddpm", pipe.scheduler.config)
    from qandc.sampling import describe_run

    made.set_timesteps(50)
    preset.compensation.check(describe_run(model, made, 1.5))
    assert tuple(int(t) for t in made.timesteps) == preset.schedule.timesteps
    with pytest.raises(ConfigError, match=r"fitted for guidance_scale 1\.5"):
        preset.compensation.check(describe_run(model, made, 4.0))


def test_there_are_no_settings_of_other_bits():
    with pytest.raises(ConfigError, match="holds no calibrated settings"):
        fashion_dit_preset(6)


def test_cache_config_of_a_preset():
    preset, _ = make_preset()
    assert preset.schedule.config() == CacheConfig("taylor", schedule=(True, True, False, True, False, False))
