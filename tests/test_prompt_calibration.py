"""Calibration on prompts, through unmodified pipelines with text encoders."""

from __future__ import annotations

import logging

import pytest
import torch

from qandc import (
    CacheConfig,
    Compensation,
    ConfigError,
    ModelError,
    TapConfig,
    apply_cache,
    calibrate,
    compensated_scheduler,
    compensation_from_run,
    fit_feature_compensation,
    load,
    optimize,
    pool_from_run,
    quantize_model,
    remove_cache,
    save,
    schedule_from_run,
    smoothing_factors,
    trajectory_from_run,
)
from qandc.method.prompt_calibration import (
    FEATURES_SEED,
    FIRST_SEED,
    POOL_SEED,
    SCHEDULE_SEED,
    calibrate_on_prompts,
)
from qandc.quantization.conversion import quant_layers, quantization_report
from qandc.variance_compensation import FittedFor
from tests.conftest import recorded_calls

pytest.importorskip("transformers")
from tests.tiny_pipelines import PIPELINES, draw, make_pipeline

PROMPTS = ["a red coat", "a blue sneaker and a green bag"]
CACHE = CacheConfig("branch", interval=3)
SMALL = {"height": 16, "width": 16, "num_inference_steps": 6}
BRIEF = {"pool_images": 2, "samples": 8}


def arguments(name):
    return {**SMALL, **PIPELINES[name][3]}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_calibrated_and_saved(name, tmp_path):
    pipe = make_pipeline(name)
    found = calibrate_on_prompts(pipe, PROMPTS, cache=CACHE, **BRIEF, **arguments(name))
    assert found.model is pipe.transformer
    assert sum(layer.act_scale is not None for layer in quant_layers(found.model).values()) >= 12
    assert sum(layer.smoothing is not None for layer in quant_layers(found.model).values()) >= 12
    assert sum(found.schedule.schedule) == sum(CACHE.of_steps(6))
    apply_cache(found.model, config=found.schedule.config(), compensation=found.features)
    images = draw(pipe)
    assert torch.isfinite(images).all()
    save(found.model, tmp_path / "model", schedule=found.schedule, features=found.features)
    loaded = load(tmp_path / "model")
    pipe.transformer = loaded.model
    apply_cache(loaded.model, config=loaded.schedule.config(), compensation=loaded.features)
    torch.testing.assert_close(draw(pipe), images, atol=1e-3, rtol=0)  # memory elsewhere rounds otherwise


def test_prompts_are_padded_to_what_the_tokenizer_keeps():
    pipe, lengths = make_pipeline("FluxPipeline"), []
    pipe.tokenizer_2.model_max_length = 24

    def note(model, arguments, named):
        lengths.append(named["encoder_hidden_states"].shape[1])
        raise KeyboardInterrupt

    pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    for given in ({}, {"max_sequence_length": 8}):
        with pytest.raises(KeyboardInterrupt):
            calibrate_on_prompts(pipe, PROMPTS, **SMALL, **given)
    assert lengths == [24, 8]


def test_it_is_what_its_parts_do_by_hand():
    """Each image has a prompt in turn and noise of its own; pool, schedule and compensation have other images."""
    name = "FluxPipeline"
    given = {**arguments(name), "guidance_scale": 2.0}
    ours, theirs, stages = make_pipeline(name), make_pipeline(name), []
    found = calibrate_on_prompts(
        ours, PROMPTS, cache=CACHE, pool_images=3, samples=8, progress=lambda *told: stages.append(told), **given
    )

    def run(seed):
        for i, prompt in enumerate((*PROMPTS, PROMPTS[0])):
            theirs(prompt, generator=torch.Generator().manual_seed(seed + i), output_type="latent", **given)

    model = theirs.transformer
    apply_cache(model, config=CACHE)
    pool = pool_from_run(model, lambda: run(POOL_SEED))
    remove_cache(model)
    chosen = pool.select(8, TapConfig(clusters=1))
    quantize_model(model, conditioning="W8A16", smoothing=smoothing_factors(model, pool.batches(chosen)))
    calibrate(model, pool.batches(chosen))
    schedule = schedule_from_run(
        model, lambda: run(SCHEDULE_SEED), computed_steps=sum(CACHE.of_steps(6)), compensated=True
    )
    features = fit_feature_compensation(model, lambda: run(FEATURES_SEED), config=schedule.config())
    assert found.schedule == schedule
    assert torch.equal(found.features.gains, features.gains)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())
    assert [told for told in stages if told[1] == 0] == [
        ("candidate pool", 0, 3),
        ("choosing samples", 0, 1),
        ("smoothing", 0, 8),
        ("rounding weights", 0, 1),
        ("ranges", 0, 8),
        ("schedule", 0, 3),
        ("features", 0, 3),
    ]
    assert [told for told in stages if told[0] == "schedule"] == [("schedule", i, 3) for i in range(4)]


def test_samples_and_steps_that_are_not_chosen():
    """Samples at random, and every third step, for whose timesteps one image is drawn."""
    ours, theirs, stages = make_pipeline("FluxPipeline"), make_pipeline("FluxPipeline"), []
    given = {**BRIEF, "compensation": "none", "smoothing": False, **arguments("FluxPipeline")}
    chosen = {"select": "random", "uniform": True}
    found = calibrate_on_prompts(
        ours, PROMPTS, cache=CACHE, progress=lambda *told: stages.append(told), **chosen, **given
    )
    assert found.schedule.schedule == CACHE.of_steps(6)
    assert found.schedule.error is None
    assert [told for told in stages if told[0] == "schedule"] == [("schedule", 0, 1), ("schedule", 1, 1)]

    def run():
        for i, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(POOL_SEED + i)
            theirs(prompt, generator=generator, output_type="latent", **arguments("FluxPipeline"))

    apply_cache(theirs.transformer, config=CACHE)
    pool = pool_from_run(theirs.transformer, run)
    remove_cache(theirs.transformer)
    batches = pool.batches(pool.select(8, TapConfig(clusters=1), method="random"))
    state = calibrate(quantize_model(theirs.transformer, conditioning="W8A16"), batches).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.model.state_dict().items())


def test_four_bits_are_rounded_with_hessians():
    pipes = [make_pipeline("PixArtSigmaPipeline") for _ in range(2)]
    for pipe, gptq in zip(pipes, (None, False), strict=True):
        found = calibrate_on_prompts(
            pipe, PROMPTS, w_bits=4, gptq=gptq, smoothing=False, **BRIEF, **arguments("PixArtSigmaPipeline")
        )
        assert (found.schedule, found.features) == (None, None)
    assert {row.scheme for row in quantization_report(pipes[0].transformer).quantized} >= {"W4A8 static per-tensor"}
    ours, nearest = (quant_layers(pipe.transformer) for pipe in pipes)
    assert not any(torch.equal(layer.qweight, nearest[name].qweight) for name, layer in ours.items() if "attn" in name)


def test_a_schedule_and_what_is_stored_are_kept(tmp_path):
    name, pipe = "PixArtSigmaPipeline", make_pipeline("PixArtSigmaPipeline")
    cache = CacheConfig("taylor", schedule=(True, True, False, False, True, False), order=1, storage_dtype="bfloat16")
    found = calibrate_on_prompts(pipe, PROMPTS, cache=cache, **BRIEF, **arguments(name))
    assert found.schedule.schedule == cache.schedule
    assert found.features.config == found.schedule.config("bfloat16")
    save(found.model, tmp_path / "saved", schedule=found.schedule, features=found.features)
    (part,) = optimize(make_pipeline(name), calibrated=tmp_path / "saved").transformers
    assert part.cache == found.features.config
    pipe = make_pipeline(name)
    found = calibrate_on_prompts(pipe, PROMPTS, cache=cache, compensation="none", **BRIEF, **arguments(name))
    assert found.features is None
    with pytest.raises(ConfigError, match="6 steps"):
        calibrate_on_prompts(
            make_pipeline(name), PROMPTS, cache=cache, **BRIEF, **arguments(name) | {"num_inference_steps": 4}
        )


def test_blocks_that_are_offloaded():
    name = "FluxPipeline"
    models = []
    for offloaded in (False, True):
        pipe, device = make_pipeline(name), torch.device("cpu")
        if offloaded:
            pipe.transformer.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)
        models.append(calibrate_on_prompts(pipe, PROMPTS, w_bits=4, **BRIEF, **arguments(name)).model)
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("cache", [None, CACHE], ids=["no cache", "cache"])
def test_samples_are_compensated(cache, tmp_path):
    """Gains are those of images that are drawn at once, before and after the model is quantized and cached."""
    name, given = "FluxPipeline", arguments("FluxPipeline")
    pipe, theirs = make_pipeline(name), make_pipeline(name)
    found = calibrate_on_prompts(pipe, PROMPTS, cache=cache, compensation="samples", **BRIEF, **given)
    assert found.features is None
    assert found.compensation.gain.shape == (6, 16)
    generators = [torch.Generator().manual_seed(FIRST_SEED + i) for i in range(2)]
    reference = trajectory_from_run(
        theirs, lambda: theirs(PROMPTS, generator=generators, output_type="latent", **given)
    )
    if cache is not None:
        apply_cache(pipe.transformer, config=found.schedule.config())
    generators = [torch.Generator().manual_seed(FIRST_SEED + i) for i in range(2)]
    expected = compensation_from_run(
        pipe, lambda: pipe(PROMPTS, generator=generators, output_type="latent", **given), reference
    )
    torch.testing.assert_close(found.compensation.gain, expected.gain)
    assert found.compensation.fitted_for == expected.fitted_for
    save(found.model, tmp_path / "model", schedule=found.schedule, compensation=found.compensation)
    kept = load(tmp_path / "model").compensation
    assert torch.equal(kept.gain, found.compensation.gain)
    pipe.scheduler = compensated_scheduler(pipe.scheduler, kept)
    draw(pipe)


def test_weights_alone():
    pipe = make_pipeline("PixArtSigmaPipeline")
    found = calibrate_on_prompts(pipe, PROMPTS, w_bits=4, a_bits=16, **BRIEF, **arguments("PixArtSigmaPipeline"))
    assert {row.scheme for row in quantization_report(found.model).quantized} == {"W4A16 weight-only"}
    assert all(layer.smoothing is None for layer in quant_layers(found.model).values())


def test_the_second_transformer_of_a_pipeline():
    pipe = make_pipeline("WanPipeline")
    pipe.register_modules(transformer_2=make_pipeline("WanPipeline").transformer)
    pipe.register_to_config(boundary_ratio=0.6)
    given = {**BRIEF, "samples": 4, **arguments("WanPipeline")}
    found = calibrate_on_prompts(pipe, PROMPTS, transformer="transformer_2", cache=CacheConfig(interval=2), **given)
    assert found.model is pipe.transformer_2
    assert not quant_layers(pipe.transformer)
    assert len(found.schedule.timesteps) < 6


def test_an_interrupted_recording_goes_on(tmp_path):
    name = "PixArtSigmaPipeline"
    pipe, given = make_pipeline(name), {**BRIEF, "pool_directory": tmp_path, **arguments(name)}
    calibrate_on_prompts(pipe, PROMPTS, **given)
    again = make_pipeline(name)
    assert not recorded_calls(again.text_encoder, lambda: calibrate_on_prompts(again, PROMPTS, **given))
    with pytest.raises(ConfigError, match=r'holds a pool of about .*a red coat.*this one would have .*"a coat"'):
        calibrate_on_prompts(make_pipeline(name), ["a coat"], **given)


def test_few_prompts_and_samples_are_said(caplog):
    caplog.set_level(logging.INFO)
    name = "PixArtSigmaPipeline"
    calibrate_on_prompts(make_pipeline(name), PROMPTS[:1], pool_images=2, samples=100, **arguments(name))
    assert "1 prompts for 2 images: they are taken in turn" in caplog.text
    assert "the pool has 12 samples, and all are taken: there are no 100" in caplog.text


def test_what_cannot_be_calibrated_is_refused_before_any_work(pipeline_dir):
    from diffusers import DiTPipeline

    pipe = make_pipeline("PixArtSigmaPipeline")
    for prompts, changes, message in (
        ([], {}, "there is no prompt; give text in each"),
        (["a coat", " "], {}, "prompt 2 is empty; give text in each"),
        (["a coat", 3], {}, r"a sequence whose every element is a string \(3 is not\)"),
        ("a coat", {}, "prompts is 'a coat'; give a list"),
        (PROMPTS, {"compensation": "all"}, "compensation 'all' is unknown; choose one of features, samples, none"),
        (PROMPTS, {"steps": 4}, "steps is no argument of PixArtSigmaPipeline"),
        (PROMPTS, {"output_type": "pil"}, "output_type is set here"),
        (PROMPTS, {"w_bits": 5}, "w_bits"),
        (PROMPTS, {"cache": CacheConfig("first_block")}, "mode 'first_block' decides .* no schedule can be found"),
        (PROMPTS, {"pool_images": 0}, "pool_images is 0; give an integer >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate_on_prompts(pipe, prompts, **changes)
    with pytest.raises(
        ModelError, match="DiTPipeline takes no prompt; calibrate a DiTPipeline with calibrate_pipeline"
    ):
        calibrate_on_prompts(DiTPipeline.from_pretrained(pipeline_dir), PROMPTS)
    with pytest.raises(ModelError, match="has no model 'transformer_2'"):
        calibrate_on_prompts(pipe, PROMPTS, transformer="transformer_2")
    scheduler, fitted_for = pipe.scheduler, FittedFor("DPMSolverMultistepScheduler", (2.0, 1.0), 4.0, "x")
    gains = Compensation(torch.ones(2, 4), torch.zeros(2, 4), "sample", "paper", fitted_for)
    pipe.scheduler = compensated_scheduler(scheduler, gains)
    for again in (
        lambda: compensated_scheduler(pipe.scheduler, gains),
        lambda: trajectory_from_run(pipe, lambda: draw(pipe)),
        lambda: calibrate_on_prompts(pipe, PROMPTS, compensation="samples"),
    ):
        with pytest.raises(ConfigError, match=r"this DPMSolver\S* is compensated already; give the one that it "):
            again()
    pipe.scheduler = scheduler
    apply_cache(pipe.transformer)
    with pytest.raises(ModelError, match="transformer is quantized or has a cache already"):
        calibrate_on_prompts(pipe, PROMPTS)
    remove_cache(pipe.transformer)
    assert not quant_layers(pipe.transformer)
