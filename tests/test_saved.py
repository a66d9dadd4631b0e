"""Calibrated settings: saved and loaded whole, refused where they do not belong, those that ship used as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import pytest
import torch

from qandc import (
    CacheConfig,
    CalibratedSchedule,
    ConfigError,
    DataError,
    FeatureCompensation,
    ModelError,
    OutputError,
    Preset,
    QuantConfig,
    apply_cache_to_dit,
    calibrate,
    fashion_dit_preset,
    fit_compensation,
    input_hessians,
    load,
    load_pipeline,
    make_scheduler,
    quantize_model,
    record_trajectory,
    remove_cache,
    sample_latents,
    smoothing_factors,
)
from qandc.method.saved import is_finished
from qandc.quantization.conversion import quant_layers
from qandc.sampling.loop import describe_run
from tests.conftest import made_once, make_dit
from tests.test_calibration import dit_batches
from tests.tiny_models import make_tiny

RUN = {"num_inference_steps": 6, "guidance_scale": 1.5}
LABELS = (1, 2)


def scheduler():
    return make_scheduler("ddim", {"num_train_timesteps": 1000, "clip_sample": False})


@made_once
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


def make_features(schedule, reused=3):
    """Return gains and offsets for the reuse steps of a schedule and two blocks of 32 channels."""
    gains = torch.randn(reused, 2, 2, 32, generator=torch.Generator().manual_seed(1)) / 10
    return FeatureCompensation(schedule.config(), 1 + gains, gains)


def scheduler_timesteps():
    made = scheduler()
    made.set_timesteps(6)
    return made.timesteps


@pytest.mark.parametrize(
    ("symmetric", "rounding"), [(False, "nearest"), (True, "nearest"), (False, "error feedback"), (True, "smoothing")]
)
def test_a_loaded_preset_makes_the_same_model(tmp_path, symmetric, rounding):
    """Bit for bit; weights are kept only where rounding to nearest would not make them again."""
    preset, model = make_preset(symmetric, rounding)
    preset.save(tmp_path / "preset")
    loaded = Preset.load(tmp_path / "preset")
    assert (loaded.config, loaded.schedule) == (preset.config, preset.schedule)
    assert bool(loaded.buffers("qweight")) is (rounding == "error feedback")
    assert bool(loaded.buffers("smoothing")) is (rounding == "smoothing")
    assert bool(loaded.buffers("act_zero_point")) is not symmetric
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
    other = dataclasses.replace(preset, layers={**preset.layers, "attention.act_scale": torch.tensor(1.0)})
    model = make_dit(num_layers=2)
    with pytest.raises(ModelError, match="it has no quantized layer 'attention'"):
        other.quantize(model)
    assert not quant_layers(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: None, "qweight is missing; it must be there"),
        (lambda q: q[:16], r"qweight is of shape \[16, 16\]; it must be of shape \[32, 16\]"),
        (lambda q: q.to(torch.int8), "qweight is torch.int8; it must be stored as torch.uint8"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    preset, _ = make_preset(rounding="error feedback")
    name = "transformer_blocks.1.attn1.to_q.qweight"
    kept = {**preset.layers, name: change(preset.layers[name])}
    other = dataclasses.replace(preset, layers={key: value for key, value in kept.items() if value is not None})
    model = make_dit(num_layers=2)
    with pytest.raises(ModelError, match=message):
        other.quantize(model)
    assert not quant_layers(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "made for num_inference_steps 6; this run has 7"),
        ({"guidance": 4}, r"made for guidance_scale 1\.5; this run has 4\.0"),
        ({"made": make_scheduler("ddpm", {})}, "made for scheduler 'DDIMScheduler'; this run has 'DDPMScheduler'"),
        (
            {"made": make_scheduler("ddim", {"num_train_timesteps": 100})},
            r"made for timesteps 6 steps, 830 \.\. 0; this run has 6 steps, 80 \.\. 0",
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
    assert {path.name for path in tmp_path.iterdir()} == {"qandc.json", "qandc.safetensors"}
    loaded = Preset.load(tmp_path)
    assert loaded.compensation is None
    assert (loaded.scheduler_name, loaded.num_inference_steps, loaded.guidance_scale) == ("ddim", 6, 1.5)


@pytest.mark.parametrize("keep_weights", [False, True])
def test_modulation_with_a_scheme_of_its_own(tmp_path, keep_weights):
    """int8 weights beside int4 ones, of layers that a config without the scheme would leave."""
    name, config = "FluxTransformer2DModel", QuantConfig(4, 8, conditioning="W8A16")
    model = quantize_model(make_tiny(name), 4, conditioning="W8A16")
    preset = Preset.of(
        model, config, make_preset()[0].schedule, None, scheduler="x", guidance_scale=1, keep_weights=keep_weights
    )
    preset.save(tmp_path)
    again = Preset.load(tmp_path).quantize(make_tiny(name))
    schemes = {name: layer.scheme for name, layer in quant_layers(model).items()}
    assert {name: layer.scheme for name, layer in quant_layers(again).items()} == schemes
    assert {scheme.split()[0] for scheme in schemes.values()} == {"W4A8", "W8A16"}
    for mine, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def rewrite(directory, change):
    """Change a manifest and make its checksum true again, as other hands could."""
    path = directory / "qandc.json"
    envelope = json.loads(path.read_text())
    change(envelope["content"])
    body = json.dumps(envelope.pop("content"))
    envelope["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(f'{json.dumps(envelope)[:-1]}, "content": {body}}}')


def test_compensations_of_features_and_samples(tmp_path):
    """Keep either, or both, as they were; a directory without features is as it was before there were any."""
    preset, model = make_preset()
    features = make_features(preset.schedule)
    for name, changes in {"FC": {"compensation": None, "features": features}, "both": {"features": features}}.items():
        changed = dataclasses.replace(preset, **changes)
        changed.save(tmp_path / name)
        for found in (Preset.load(tmp_path / name), changed):
            assert found.features.config == preset.schedule.config()
            assert torch.equal(found.features.gains, features.gains)
            assert torch.equal(found.features.offsets, features.offsets)
            assert (found.compensation is None) is (name == "FC")
            assert found.compensations == (" + FC" if name == "FC" else " + FC + VC")
        assert Preset.load(tmp_path / name).digest() == changed.digest()
    model = Preset.load(tmp_path / "FC").quantize(make_dit(num_layers=2))
    apply_cache_to_dit(model, compensation=Preset.load(tmp_path / "FC").features)
    corrected = sample_latents(model, scheduler(), LABELS, seeds=[5, 6], **RUN)
    with pytest.raises(ConfigError, match="fitted for cache_compensated False; this run has True"):
        sample_latents(model, scheduler(), LABELS, seeds=[5, 6], compensation=preset.compensation, **RUN)
    gains = fit_compensation(record_trajectory(make_dit(num_layers=2), scheduler(), LABELS, **RUN), model, scheduler())
    with_both = sample_latents(model, scheduler(), LABELS, seeds=[5, 6], compensation=gains, **RUN)
    assert not torch.equal(with_both, corrected)
    remove_cache(model)
    apply_cache_to_dit(model, config=preset.schedule.config())
    assert not torch.equal(sample_latents(model, scheduler(), LABELS, seeds=[5, 6], **RUN), corrected)
    preset.save(tmp_path / "FC")
    assert Preset.load(tmp_path / "FC").features is None
    assert "features" not in json.loads((tmp_path / "FC" / "qandc.json").read_text())["content"]


def test_features_of_another_cache_are_refused(tmp_path):
    preset, _ = make_preset()
    schedule = preset.schedule
    with pytest.raises(ConfigError, match="fitted for mode 'branch'; this cache has 'taylor'"):
        dataclasses.replace(preset, features=make_features(dataclasses.replace(schedule, mode="branch", order=0)))
    both = dataclasses.replace(preset, features=make_features(schedule))
    schedule = [True, True, False, False, True, False]
    for change in ({"mode": "branch"}, {"schedule": schedule}, {"timesteps": [0] * 6}):
        both.save(tmp_path)
        rewrite(tmp_path, lambda content, change=change: content["features"].update(change))
        with pytest.raises(ConfigError, match=f"fitted for {next(iter(change))} .* this cache has"):
            Preset.load(tmp_path)


def test_versions_and_folders_are_checked(tmp_path):
    preset, _ = make_preset()
    preset.save(tmp_path)
    values = json.loads((tmp_path / "qandc.json").read_text())
    for version, what in ((2, "update qandc"), (0, r"make it again \(qandc calibrate, or qandc.save\)")):
        (tmp_path / "qandc.json").write_text(json.dumps({**values, "version": version}))
        with pytest.raises(ConfigError, match=f"has version {version}, known is 1; {what}"):
            Preset.load(tmp_path)
    (tmp_path / "qandc.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no calibrated model: Expected `object`, got `array`"):
        Preset.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        preset.save(tmp_path / "file" / "preset")


@pytest.mark.parametrize("name", ["preset.json", "quantized.json"])
def test_directories_of_older_versions_say_what_to_do(tmp_path, name):
    (tmp_path / name).write_text("{}")
    for reader in (Preset.load, load):
        with pytest.raises(ConfigError, match=r"an older qandc wrote it; make it again \(qandc calibrate"):
            reader(tmp_path)


ALTERED = {
    "no bits": (lambda m: m["calibration"].pop("quantization"), "missing required field `quantization`"),
    "bits": (lambda m: m["calibration"]["quantization"].update(w_bits=3), "w_bits is 3; allowed are 4 and 8"),
    "text": (lambda m: m["calibration"]["quantization"].update(w_bits="4"), "Expected `int`, got `str`"),
    "guidance": (lambda m: m["calibration"].update(guidance_scale=-1), "guidance_scale is -1"),
    "unknown": (lambda m: m.update(more=1), "unknown field `more`"),
    "structure": (lambda m: m["calibration"].update(structure={"num_layers": 2}), "structure has"),
    "no schedule": (lambda m: m.pop("schedule"), "no settings for runs"),
    "rising": (lambda m: m["schedule"]["timesteps"].reverse(), "timesteps rise"),
    "gains of rising": (
        lambda m: m["compensation"]["fitted_for"]["timesteps"].reverse(),
        "timesteps of a compensation",
    ),
    "first": (lambda m: m["schedule"]["schedule"].__setitem__(0, False), "the first step of the schedule"),
    "integer for boolean": (lambda m: m["schedule"]["schedule"].__setitem__(0, 1), "Expected `bool`, got `int`"),
    "target": (lambda m: m["compensation"].update(target="x"), "target 'x' is unknown"),
    "steps": (lambda m: m["compensation"]["fitted_for"]["timesteps"].pop(), r"gain must be \[5 steps"),
    "outside": (
        lambda m: m["files"].update({"../secret": m["files"]["qandc.safetensors"]}),
        r"names the files '\.\./sec",
    ),
    "device": (
        lambda m: m["files"].update({"/dev/zero": m["files"]["qandc.safetensors"]}),
        "names the files '/dev/zero'",
    ),
    "itself": (lambda m: m["files"].update({"qandc.json": m["files"]["qandc.safetensors"]}), "which make no model"),
    "a part": (lambda m: m["files"].update({"config.json": m["files"]["qandc.safetensors"]}), "which make no model"),
    "no files": (lambda m: m["files"].clear(), "which make no model"),
    "size": (lambda m: m["files"]["qandc.safetensors"].update(bytes=1), r"not as it was written \(checksum\)"),
    "checksum": (lambda m: m["files"]["qandc.safetensors"].update(sha256=""), r"not as it was written \(checksum\)"),
}


@pytest.mark.parametrize(("change", "message"), ALTERED.values(), ids=ALTERED)
def test_a_manifest_that_was_never_written(tmp_path, change, message):
    make_preset()[0].save(tmp_path)
    rewrite(tmp_path, lambda content: None)
    Preset.load(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises((ConfigError, DataError), match=message):
        Preset.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.act_scale": torch.tensor(float("nan"))}, r"the range of a: its scale must be \[\] finite float32 numbers"),
        ({"a.act_scale": torch.tensor(0.0)}, "finite float32 numbers > 0"),
        ({"a.act_scale": torch.tensor(1e-40)}, "finite float32 numbers > 0 whose reciprocals are such"),
        ({"a.act_scale": torch.ones(2)}, "finite float32 numbers > 0"),
        ({"a.act_scale": torch.ones((), dtype=torch.float64)}, "finite float32 numbers > 0"),
        ({"b.act_zero_point": torch.tensor(128, dtype=torch.int32)}, r"its zero point must be \[\] int32 from -128 to"),
        ({"b.act_zero_point": torch.tensor(1)}, "int32 from -128 to 127"),
        ({"a.act_zero_point": torch.tensor(1, dtype=torch.int32)}, "a zero point and no scale"),
        ({"a.smoothing": torch.tensor([1.0, float("inf")])}, "the smoothing of a must be finite"),
        ({"a.smoothing": torch.tensor([1.0, 2e38])}, "the smoothing of a must be .* such reciprocals"),
        ({"a.weight": torch.ones(1)}, "'a.weight' is nothing that settings of a quantized layer hold"),
    ],
)
def test_values_that_no_calibration_gives(changes, message):
    preset, _ = make_preset()
    with pytest.raises(DataError, match=message):
        dataclasses.replace(preset, layers={"b.act_scale": torch.tensor(1.0), **changes})


def test_smoothing_that_is_not_the_models_is_refused():
    preset, _ = make_preset(rounding="smoothing")
    other = dataclasses.replace(preset, layers={**preset.layers, "attention.smoothing": torch.ones(32)})
    with pytest.raises(ModelError, match="it has no quantized layer 'attention'"):
        other.quantize(make_dit(num_layers=2))


def test_where_the_full_precision_model_is(tmp_path, caplog):
    """A directory is noted by its way from here, never by its place; a hub id is told when it is to be loaded."""
    preset, _ = make_preset()
    assert preset.base_model() is None
    assert preset.base_model("mine") == "mine"
    dataclasses.replace(preset, model=str(tmp_path / "models" / "base")).save(tmp_path / "a" / "b")
    assert str(tmp_path) not in (tmp_path / "a" / "b" / "qandc.json").read_text()
    (tmp_path / "a").rename(tmp_path / "c")
    assert Preset.load(tmp_path / "c" / "b").model == str(tmp_path / "models" / "base")
    dataclasses.replace(preset, model="owner/name").save(tmp_path / "hub")
    found = Preset.load(tmp_path / "hub")
    assert not caplog.records
    assert found.base_model() == "owner/name"
    assert "the calibrated settings are for owner/name, which is loaded" in caplog.text


def test_a_digest_tells_settings_apart():
    """Whatever a run depends on: one number of any tensor, the schedule, the bits, the run."""
    preset, _ = make_preset(rounding="error feedback")
    compensation = preset.compensation

    def nudged(tensor):
        other = tensor.clone()
        other.view(-1)[-1] += 1
        return other

    first, features = next(iter(preset.buffers("act_scale"))), make_features(preset.schedule)
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
        "features": {"features": features},
        "gains": {"features": dataclasses.replace(features, gains=nudged(features.gains))},
        "offsets": {"features": dataclasses.replace(features, offsets=nudged(features.offsets))},
        "features alone": {"features": features, "compensation": None},
        **{
            name: {"layers": {**preset.layers, f"{first}.{name}": nudged(preset.layers[f"{first}.{name}"])}}
            for name in ("act_scale", "act_zero_point", "qweight")
        },
        "smoothing": {"layers": {**preset.layers, f"{first}.smoothing": torch.ones(32)}},
        "schedule": {"schedule": schedule},
        "bits": {"config": QuantConfig(4, 7, weight_clip="mse")},
        "guidance": {"guidance_scale": 3.0},
        "scheduler": {"scheduler": "DDPMScheduler"},
    }
    for buffer in ("act_scale", "act_zero_point", "qweight"):
        name = f"{first}.{buffer}"
        changes[buffer] = {"layers": {**preset.layers, name: nudged(preset.layers[name])}}
    digests = {name: dataclasses.replace(preset, **change).digest() for name, change in changes.items()}
    digests["as it is"] = preset.digest()
    assert len(set(digests.values())) == len(digests)
    assert dataclasses.replace(preset, layers=dict(reversed(preset.layers.items()))).digest() == preset.digest()


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        make_preset()[0].save(tmp_path / "x")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()} == {0o640}


@pytest.mark.parametrize("stage", ["beside", "moved", "manifest"])
def test_a_failed_write_leaves_no_fragment(tmp_path, monkeypatch, stage):
    """Interrupt saving: the earlier model stays whole until all new files are written, then has no manifest."""
    preset, _ = make_preset(rounding="error feedback")
    preset.save(tmp_path)
    before = (tmp_path / "qandc.json").read_bytes()
    replace = os.replace

    def full(source, target):
        where = "beside" if target.parent != tmp_path else "manifest" if target.name == "qandc.json" else "moved"
        if where == stage:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        dataclasses.replace(preset, compensation=None).save(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert is_finished(tmp_path) is (stage == "beside")
    if is_finished(tmp_path):
        assert (tmp_path / "qandc.json").read_bytes() == before
        assert Preset.load(tmp_path).digest() == preset.digest()
    monkeypatch.undo()
    preset.save(tmp_path)
    assert Preset.load(tmp_path).digest() == preset.digest()


@pytest.mark.parametrize(("w_bits", "computed"), [(8, 18), (4, 17)])
def test_the_shipped_settings_fit_the_shipped_model(w_bits, computed):
    """Layers that see tokens are smoothed and have ranges; schedule and compensation are for the default run."""
    preset = fashion_dit_preset(w_bits)
    assert (preset.config.w_bits, preset.config.a_bits) == (w_bits, 8)
    assert (len(preset.schedule.schedule), sum(preset.schedule.schedule)) == (50, computed)
    assert preset.compensations == ""  # none wins with DDPM: docs/compensation.md
    pipe = load_pipeline()
    model = preset.quantize(pipe.transformer)
    layers = quant_layers(model)
    assert layers.pop("proj_out_1").act_scale is None  # modulation: sees a row per sample
    assert all(layer.smoothing is not None and layer.act_scale is not None for layer in layers.values())
    apply_cache_to_dit(model, config=preset.schedule.config(), compensation=preset.features)
    made = make_scheduler("ddpm", pipe.scheduler.config)
    preset.check(load_pipeline().transformer, made, 50, 1.5)
    if preset.compensation is not None:
        preset.compensation.check(describe_run(model, made, 1.5))


def test_there_are_no_settings_of_other_bits():
    with pytest.raises(ConfigError, match="w_bits is 6; allowed are 4 and 8"):
        fashion_dit_preset(6)


def test_cache_config_of_a_preset():
    preset, _ = make_preset()
    assert preset.schedule.config() == CacheConfig("taylor", schedule=(True, True, False, True, False, False))
