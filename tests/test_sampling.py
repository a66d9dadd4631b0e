"""The denoising loop: equal to the pipeline where both are deterministic, and one noise stream per image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qandc import (
    ConfigError,
    Trajectory,
    calibrate_schedule,
    decode_latents,
    fit_compensation,
    load_pipeline,
    make_scheduler,
    record_pool,
    record_trajectory,
    sample_latents,
)


@pytest.fixture
def pipe(pipeline_dir):
    return load_pipeline(pipeline_dir)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_equals_diffusers_pipeline_with_ddim(pipe, guidance_scale):
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = torch.from_numpy(pipe([5, 6], guidance_scale, generator, 6, output_type="np").images)
    latents = sample_latents(
        pipe.transformer,
        make_scheduler("ddim", pipe.scheduler.config),
        [5, 6],
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        seeds=[3, 4],
    )
    actual = (decode_latents(pipe.vae, latents) / 2 + 0.5).permute(0, 2, 3, 1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_an_image_does_not_depend_on_its_batch(pipe, name):
    def draw(labels, seeds):
        scheduler = make_scheduler(name, pipe.scheduler.config)
        return sample_latents(pipe.transformer, scheduler, labels, num_inference_steps=4, seeds=seeds)

    together = draw([1, 2, 3], [10, 11, 12])
    for index in range(3):
        alone = draw([index + 1], [10 + index])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_other_seeds_give_other_step_noise(pipe):
    def draw(seed):
        scheduler = make_scheduler("ddpm", pipe.scheduler.config)
        return sample_latents(pipe.transformer, scheduler, [1], num_inference_steps=4, seeds=[seed])

    assert torch.equal(draw(0), draw(0))
    assert not torch.allclose(draw(0), draw(1), atol=0.1)


def test_callback_sees_every_step(pipe):
    seen = []
    latents = sample_latents(
        pipe.transformer,
        make_scheduler("ddpm", pipe.scheduler.config),
        [1],
        num_inference_steps=5,
        seeds=[0],
        callback=lambda step, timestep, latents: seen.append((step, timestep, latents)),
    )
    assert [(step, timestep) for step, timestep, _ in seen] == [(i, 800 - 200 * i) for i in range(5)]
    assert torch.equal(seen[-1][2], latents)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_noise_is_the_first_half_of_what_is_predicted(pipe, guidance_scale, seeded):
    """Sample with a model that predicts a variance in four more channels, as DiT-XL/2 does: it changes no image."""
    from tests.conftest import make_dit

    narrow, wide = make_dit(), make_dit()
    wide.proj_out_2, wide.out_channels = torch.nn.Linear(32, 2 * 2 * 8), 8
    run = {"num_inference_steps": 2, "seeds": [0], "guidance_scale": guidance_scale}
    expected = sample_latents(narrow, make_scheduler("ddpm", pipe.scheduler.config), [1], **run)
    with torch.no_grad():
        for name, tensor in narrow.proj_out_2.named_parameters():
            noise = tensor.unflatten(0, (2, 2, 4))  # patch, patch, channels
            variance = 10 * torch.randn(noise.shape, generator=seeded)
            getattr(wide.proj_out_2, name).copy_(torch.cat([noise, variance], 2).flatten(0, 2))
    found = sample_latents(wide, make_scheduler("ddpm", pipe.scheduler.config), [1], **run)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


INTEGERS = {
    "tensor": torch.tensor,
    "int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "array": np.array,
    "numpy ints": lambda values: [np.int64(value) for value in values],
    "0-d tensors": lambda values: [torch.tensor(value) for value in values],
    "tuple": tuple,
    "range": lambda values: range(values[0], values[-1] + 1),
}


@pytest.mark.parametrize("given", INTEGERS.values(), ids=INTEGERS)
def test_labels_and_seeds_of_any_integers(pipe, given):
    model, run = pipe.transformer, {"num_inference_steps": 2, "seeds": given([3, 4])}
    ddim = make_scheduler("ddim", pipe.scheduler.config)
    expected = sample_latents(model, ddim, [1, 2], num_inference_steps=2, seeds=[3, 4])
    assert torch.equal(sample_latents(model, ddim, given([1, 2]), **run), expected)
    reference = record_trajectory(model, ddim, given([1, 2]), **run)
    assert torch.equal(reference.samples[-1], expected)
    assert (reference.conditions, reference.seeds) == ((1, 2), (3, 4))
    fit_compensation(reference, model, ddim)
    fit_compensation(dataclasses.replace(reference, conditions=given([1, 2]), seeds=given([3, 4])), model, ddim)
    assert record_pool(model, ddim, given([1, 2]), **run).conditions.tolist() == [1, 2] * 2
    found = calibrate_schedule(model, ddim, given([1, 2]), computed_steps=1, **run)
    assert found == calibrate_schedule(model, ddim, [1, 2], computed_steps=1, **{**run, "seeds": [3, 4]})


def test_class_labels_are_conditions_by_their_older_name(pipe):
    model, run = pipe.transformer, {"num_inference_steps": 2, "seeds": [3, 4]}
    ddim = make_scheduler("ddim", pipe.scheduler.config)
    expected = record_trajectory(model, ddim, [1, 2], **run)
    assert torch.equal(sample_latents(model, ddim, class_labels=[1, 2], **run), expected.samples[-1])
    found = record_trajectory(model, ddim, class_labels=[1, 2], **run)
    assert found.class_labels == found.conditions == (1, 2)
    older = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    older["class_labels"] = older.pop("conditions")
    assert Trajectory(**older).conditions == (1, 2)
    pool = record_pool(model, ddim, class_labels=[1, 2], **run)
    assert torch.equal(pool.class_labels, pool.conditions)
    found = calibrate_schedule(model, ddim, class_labels=[1, 2], computed_steps=1, **run)
    assert found == calibrate_schedule(model, ddim, [1, 2], computed_steps=1, **run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": [1000]}, "class id 1000 is out of range; this model knows 0 to 999"),
        ({"conditions": [-1]}, "class id -1"),
        ({"conditions": [], "seeds": []}, "no class ids"),
        ({"seeds": [1, 2]}, "1 class ids need as many seeds; got 2"),
        ({"num_inference_steps": 1001}, "allows 1 to 1000"),
    ],
)
def test_refusals(pipe, changes, message):
    arguments = {"conditions": [1], "seeds": [0], "num_inference_steps": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        sample_latents(pipe.transformer, make_scheduler("ddpm", pipe.scheduler.config), **arguments)


def test_unknown_scheduler():
    with pytest.raises(ConfigError, match="scheduler 'euler' is unknown; choose one of ddpm, ddim"):
        make_scheduler("euler", {})


def test_decodes_in_the_dtype_that_the_decoder_computes_in(pipe):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = decode_latents(pipe.vae, latents)
    torch.testing.assert_close(decode_latents(pipe.vae.to(torch.bfloat16), latents), expected, atol=0.1, rtol=0)
    pipe.vae.to(torch.float32).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)  # stored in another
    assert pipe.vae.post_quant_conv.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(decode_latents(pipe.vae, latents), expected, atol=0.5, rtol=0)
