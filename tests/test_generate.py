"""The comparison behind the command line: same noise for both models, batch by batch, and the picture."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import qandc.experiments.generate
from qandc import (
    CacheConfig,
    CalibratedSchedule,
    CalibrationConfig,
    ConfigError,
    FeatureCompensation,
    QuantConfig,
    calibrate_pipeline,
    fashion_dit_preset,
    get_cache,
    load_pipeline,
)
from qandc.evaluation.pixels import to_uint8
from qandc.experiments.generate import (
    Comparison,
    GenerateConfig,
    ModelImages,
    draw_grid,
    generate,
    module_bytes,
    quantized_name,
)
from qandc.quantization.conversion import quant_layers
from qandc.variance_compensation import FittedFor, epsilon_scaling


def compare(pipeline_dir, **changes) -> Comparison:
    settings = GenerateConfig(**{"conditions": (1, 2, 3), "num_inference_steps": 3, **changes})
    result = Comparison()
    pipe = load_pipeline(pipeline_dir)
    generate(pipe, settings, result)
    assert get_cache(pipe.transformer) is None
    return result


def images(pipeline_dir, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    full, quantized = compare(pipeline_dir, **changes).rows
    return full.images, quantized.images


def test_same_settings_give_the_same_images(pipeline_dir):
    for first, second in zip(images(pipeline_dir), images(pipeline_dir), strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"scheduler": "ddim"}, {"guidance_scale": 4.0}, {"num_inference_steps": 4}], ids=str
)
def test_settings_change_both_rows(pipeline_dir, changes):
    for base, changed in zip(images(pipeline_dir), images(pipeline_dir, **changes), strict=True):
        assert not torch.allclose(base, changed, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"cache": CacheConfig(interval=1)}, {"config": QuantConfig(w_bits=4)}, {"config": QuantConfig(a_bits=4)}],
    ids=str,
)
def test_quantizer_and_cache_change_the_second_row_alone(pipeline_dir, changes):
    base, changed = images(pipeline_dir), images(pipeline_dir, **changes)
    assert torch.equal(base[0], changed[0])
    assert not torch.equal(base[1], changed[1])


def test_both_models_see_the_same_noise(pipeline_dir):
    """With 8 bits and no reuse the images nearly agree; with other noise they would not."""
    result = compare(pipeline_dir, cache=CacheConfig(interval=1))
    assert result.psnr.min() > 30


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["features", "samples"])
def test_a_preset_compensates_the_second_row(tmp_path, pipeline_dir, compensation):
    few = {"num_inference_steps": 3, "pool_images": 2, "samples": 4, "vc_samples": 4, "feature_images": 2}
    settings = CalibrationConfig(**few, select="random", compensation=compensation)
    preset = calibrate_pipeline(load_pipeline(pipeline_dir), settings, tmp_path).preset
    changes = {"config": preset.config, "cache": preset.schedule.config()}
    with_it = images(pipeline_dir, preset=preset, **changes)
    plain = dataclasses.replace(preset, compensation=None, features=None)
    without = images(pipeline_dir, preset=plain, **changes)
    assert torch.equal(with_it[0], without[0])
    assert not torch.equal(with_it[1], without[1])


def test_a_schedule_of_another_run_is_refused_before_any_work(pipeline_dir):
    result = Comparison()
    cache = CalibratedSchedule((True, True, False), (901, 501, 101), "taylor", 1).config()
    settings = GenerateConfig(conditions=(1,), num_inference_steps=3, cache=cache)
    with pytest.raises(ConfigError, match="step 1 at timestep 901; this one has it at 666"):
        generate(load_pipeline(pipeline_dir), settings, result)
    assert result.rows == []


def test_batches_continue_the_seeds(pipeline_dir, monkeypatch):
    together = images(pipeline_dir, conditions=(1, 2, 3, 4, 5))
    monkeypatch.setattr(qandc.experiments.generate, "IMAGES_AT_ONCE", 2)
    for whole, split in zip(together, images(pipeline_dir, conditions=(1, 2, 3, 4, 5)), strict=True):
        torch.testing.assert_close(split, whole, atol=2e-2, rtol=0)


def test_an_interrupt_keeps_finished_batches(pipeline_dir, monkeypatch):
    monkeypatch.setattr(qandc.experiments.generate, "IMAGES_AT_ONCE", 2)
    result = Comparison()
    calls = []

    def interrupt(name: str, done: int) -> None:
        calls.append(done)
        if len(calls) == 8:  # second step of the third batch
            raise KeyboardInterrupt

    settings = GenerateConfig((1, 2, 3, 4, 5), 3)
    with pytest.raises(KeyboardInterrupt):
        generate(load_pipeline(pipeline_dir), settings, result, interrupt)
    assert len(result.rows[0].images) == 4


def test_progress_counts_every_image_and_step(pipeline_dir):
    done = {}
    settings = GenerateConfig((1, 2, 3), 4)

    def count(name: str, images: int) -> None:
        done[name] = done.get(name, 0) + images

    generate(load_pipeline(pipeline_dir), settings, Comparison(), count)
    assert done == {"FP": 12, "W8A8 + branch cache 3": 12}


@pytest.mark.parametrize("smoothing", [True, False])
def test_smoothing_is_on_by_default_and_found_with_other_noise(pipeline_dir, monkeypatch, smoothing):
    import qandc.experiments.generate

    seeds = []
    original = qandc.experiments.generate.sample_latents
    monkeypatch.setattr(
        qandc.experiments.generate,
        "sample_latents",
        lambda *a, **k: seeds.append(list(k["seeds"])) or original(*a, **k),
    )
    pipe = load_pipeline(pipeline_dir)
    settings = GenerateConfig((1, 2, 3), 4) if smoothing else GenerateConfig((1, 2, 3), 4, smoothing=False)
    generate(pipe, settings, Comparison())
    layers = quant_layers(pipe.transformer)
    assert (layers["transformer_blocks.0.attn1.to_q"].smoothing is not None) is smoothing
    assert layers["proj_out_1"].smoothing is None
    others = [found for found in seeds if found != [0, 1, 2]]
    assert others == ([[20_000_000, 20_000_001, 20_000_002]] if smoothing else [])


def test_names_of_the_rows():
    assert quantized_name(GenerateConfig((1,), config=QuantConfig(w_bits=4))) == "W4A8 + branch cache 3"
    assert quantized_name(GenerateConfig((1,), cache=CacheConfig(interval=1))) == "W8A8"
    schedule = CacheConfig("taylor", schedule=(True, True, False))
    assert quantized_name(GenerateConfig((1,), cache=schedule)) == "W8A8 + taylor, 2 steps"
    preset = fashion_dit_preset(4)
    calibrated = GenerateConfig((1,), config=preset.config, cache=preset.schedule.config(), preset=preset)
    zeros = torch.zeros(33, 12, 2, 192)
    schedule = preset.schedule
    features = FeatureCompensation(schedule.config(), zeros, zeros)
    compensation = epsilon_scaling(1.0, 4, FittedFor(preset.scheduler, schedule.timesteps, 1.5, "a model"))
    for found, name in (
        ((None, None), ""), ((features, None), " + FC"), ((None, compensation), " + VC"),
        ((features, compensation), " + FC + VC"),
    ):  # fmt: skip
        changed = dataclasses.replace(preset, features=found[0], compensation=found[1])
        assert quantized_name(dataclasses.replace(calibrated, preset=changed)) == f"W4A8 + branch 17/50{name}"


def test_bytes_are_those_of_the_models(pipeline_dir):
    result = compare(pipeline_dir)
    assert result.rows[0].transformer_bytes == module_bytes(load_pipeline(pipeline_dir).transformer)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in result.report.quantized)
    layers = result.report.quantized
    extra = 2 * len(layers)  # the bit widths each layer remembers
    modules = dict(load_pipeline(pipeline_dir).transformer.named_modules())
    smoothed = [layer.name for layer in layers if layer.name != "proj_out_1"]
    extra += sum(4 * modules[name].in_features for name in smoothed)  # a factor per channel
    assert result.rows[0].transformer_bytes - result.rows[1].transformer_bytes == saved - extra


@pytest.mark.gpu
def test_embedded_model_gives_the_same_images_on_gpu_and_cpu():
    """Full precision agrees to the last visible bit. Quantized, a layer makes the same integers from the same input,
    but over 12 layers and 17 compute steps rounding decisions drift apart, for single images as far as quantization and
    cache move them; for most far less."""
    from qandc import fashion_dit_path
    from qandc.evaluation.metrics import psnr

    settings = GenerateConfig(tuple(range(10)))
    results = {}
    for device in ("cpu", "cuda"):
        results[device] = Comparison()
        generate(load_pipeline(fashion_dit_path(), device), settings, results[device])
    full, quantized = (
        psnr(gpu.images, cpu.images) for gpu, cpu in zip(results["cuda"].rows, results["cpu"].rows, strict=True)
    )
    assert full.min() > 70
    cpu_full, cpu_quantized = (row.images for row in results["cpu"].rows)
    assert quantized.median() > psnr(cpu_quantized, cpu_full).median() + 10
    assert (quantized > 28).sum() >= 8


def test_grid_shows_each_image_in_its_place():
    values = torch.tensor([[-1.0, 0.0], [0.5, 1.0]])
    rows = [
        ModelImages(name, 0, [row[:, None, None, None].expand(2, 1, 32, 32)])
        for name, row in zip("ab", values, strict=True)
    ]
    grid = draw_grid(rows, ["left", "right"], "caption")
    size = 32 * 3
    left = grid.width - 2 * (size + 6)
    pixels = to_uint8(values)
    for line in range(2):
        for column in range(2):
            x, y = left + column * (size + 6), 28 + line * (size + 6)
            grey = int(pixels[line, column])
            for corner in ((x, y), (x + size - 1, y + size - 1)):
                assert grid.getpixel(corner) == (grey,) * 3
            assert grid.getpixel((x + size, y)) == (255,) * 3


def test_grid_of_colour_images_and_an_unfinished_row():
    rows = [ModelImages("a", 0, [torch.zeros(2, 3, 16, 16)]), ModelImages("b", 0, [torch.ones(1, 3, 16, 16)])]
    grid = draw_grid(rows, ["x" * 100, "two\nlines"], "caption " * 20)
    assert grid.height == 28 + 2 * (112 + 6) + 30
    for words, lines in ((4, 2), (99, 4)):
        grid = draw_grid(rows, ["words " * words, ""], "")
        assert grid.height == 28 + 16 * (lines - 1) + 2 * (112 + 6) + 30
        left = grid.width - 2 * (112 + 6)
        dark = [y for y in range(grid.height) if any(grid.getpixel((left + x, y))[0] < 128 for x in range(112))]
        assert min(dark) < 16
        assert not set(dark) & set(range(24 + 16 * (lines - 1), 28 + 16 * (lines - 1)))  # between names and images
