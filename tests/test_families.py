"""Compare caches, fused kernels, ranges and schedules of every family of models with their slow definition."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_pre_hook

from qandc import (
    CacheConfig,
    CacheError,
    ConfigError,
    DataError,
    ModelError,
    apply_cache,
    calibrate,
    calibration,
    fit_feature_compensation,
    fuse,
    graph,
    quantize_model,
    remove_cache,
    reset_all_caches,
    schedule_from_run,
    unfuse,
)
from qandc.cache import unread
from qandc.caching.timestep_watch import TimestepWatch
from qandc.models import FAMILIES, family_of
from qandc.models.family import arguments_of
from qandc.quantization.conversion import quant_layers
from qandc.quantization.linear import QuantLinear
from qandc.quantizer import scale_and_zero_point
from tests.conftest import made_once
from tests.definition import (
    BRANCHES,
    CONFIGS,
    LENGTH,
    assert_equal_runs,
    by_definition,
    cases,
    each,
    forecast,
    of_image,
    step_of,
)
from tests.tiny_models import as_one, each_class, inputs_of, make_tiny, output_of
from tests.tiny_pipelines import qwen_vae, vae, wan_vae

STEPS = tuple(range(900, 400, -50))
CHROMA, Z_IMAGE = "ChromaTransformer2DModel", "ZImageTransformer2DModel"
FRACTIONS = ("FluxTransformer2DModel", CHROMA, "QwenImageTransformer2DModel", Z_IMAGE)  # their timesteps end at 1
FUSED = [f"{name}Transformer2DModel" for name in ("DiT", "PixArt", "Flux", "Chroma", "QwenImage", "SD3")]
OF_EACH_MODE = ("delta", "branch", "taylor 2 uneven", "hicache 2 uneven", "crf")


def later(order):
    """Return modes and an order for what takes longer."""
    return [pytest.param(mode, order, marks=pytest.mark.slow) for mode in ("hicache", "crf")]


def timesteps_of(name, steps=STEPS):
    """Return timesteps in the unit of a class, exact in float32."""
    return tuple(step / 1024 for step in steps) if name in FRACTIONS else steps


def run_of(name, steps=STEPS):
    """Make the arguments of all forwards of a run; what it is known by is one tensor."""
    first, run = inputs_of(name), []
    x, t = ("x", "t") if name == Z_IMAGE else ("hidden_states", "timestep")
    noise = torch.randn(2, len(first[x]), *first[x][0].shape, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(timesteps_of(name, steps)):
        latents = math.cos(step / 4) * noise[0] + math.sin(step / 4) * noise[1]  # neighbours are alike
        if name == Z_IMAGE:
            latents, timestep = list(latents), 1 - timestep
        run.append({**first, x: latents, t: torch.full_like(first[t], timestep)})
    return run


def forwards(name, model, steps=STEPS):
    """Give a function that runs the model through all steps of a run."""
    inputs = run_of(name, steps)

    def run():
        with torch.no_grad():
            return [output_of(model, given) for given in inputs]

    return run


@made_once
def tiny(name, precision="fp"):
    """Make the small model of a class once; tests get copies of it."""
    return make_tiny(name) if precision == "fp" else calibrate(quantize_model(make_tiny(name)), [inputs_of(name)])


@functools.cache
def steps_known(name, mode, precision="fp"):
    """Run the small model of a class without a cache, once for all tests."""
    model = tiny(name, precision)
    return [step_of(model, given, mode) for given in run_of(name)]


@pytest.mark.parametrize(("name", "config", "precision"), [*cases(CONFIGS, "fp"), *cases(OF_EACH_MODE, "w8a8")])
def test_a_cached_model_equals_the_definition(name, config, precision):
    model, plain = tiny(name, precision), steps_known(name, config.mode, precision)
    expected = by_definition(model, config, run_of(name), known=plain)
    cache = apply_cache(model, config=config)
    found = forwards(name, model)()
    assert_equal_runs(found, expected)
    assert (cache.compute_steps, cache.reuse_steps) == (sum(config.of_steps(LENGTH)), LENGTH - cache.compute_steps)
    for step, (mine, theirs) in enumerate(zip(found, plain, strict=True)):
        assert config.computes(step) or not torch.allclose(mine, theirs.output, atol=1e-3)  # else nothing was compared
    remove_cache(model)
    for mine, theirs in zip(forwards(name, model, STEPS[:3])(), plain, strict=False):
        assert torch.equal(mine, theirs.output)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(list(FAMILIES)),
    mode=st.sampled_from(["delta", "branch", "taylor", "hicache", "crf"]),
    order=st.integers(1, 2),
    later=st.lists(st.booleans(), min_size=1, max_size=7),
    layers=st.integers(1, 3),
)
def test_any_schedule_equals_the_definition(name, mode, order, later, layers):
    history = order + 1 if mode in ("taylor", "hicache", "crf") else 1
    config = CacheConfig(mode, schedule=[True] * history + later, order=order)
    model = make_tiny(name, num_layers=layers)
    steps = STEPS[: config.length]
    expected = by_definition(model, config, run_of(name, steps))
    apply_cache(model, config=config)
    assert_equal_runs(forwards(name, model, steps)(), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_prompt_or_class_begins_a_run(name):
    model = make_tiny(name)
    cache = apply_cache(model, cache_interval=5)
    for _ in range(2):
        forwards(name, model, STEPS[:3])()
    assert (cache.compute_steps, cache.reuse_steps) == (2, 4)
    reset_all_caches(model)
    assert cache.compute_steps == 0


def test_families_know_their_classes():
    assert set(BRANCHES) == set(FAMILIES)
    assert family_of(torch.nn.Linear(2, 2)) is None
    for name, family in FAMILIES.items():
        model = make_tiny(name)
        assert family_of(model) is family
        others = [stack for other in FAMILIES.values() if other is not family for stack in other.stacks]
        for block, stack, _ in family.blocks(model).blocks:
            assert stack.why_not(block) is None
            assert all(other.why_not(block) for other in others)


@pytest.mark.parametrize("config", [None, *CONFIGS.values()], ids=["no cache", *CONFIGS])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_model_equals_the_same_model_unfused(fused_anywhere, monkeypatch, name, config):
    model, family = make_tiny(name), FAMILIES[name]
    model = calibrate(quantize_model(model), forwards(name, model))
    cache = None if config is None else apply_cache(model, config=config)
    expected = forwards(name, model)()
    ran, blocks = [], family.blocks(model).blocks
    fusable = sum(block.stack.fused is not None and block.stack.fused.why_not(block.module) is None for block in blocks)
    kinds = [(stack.fused, "__call__") for stack in family.stacks if family.program is None]
    for kind, method in kinds or [(family.program, "inputs")]:
        original = getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda *a, o=original: ran.append(a) or o(*a))
    found = forwards(name, fuse(model))()
    computed = len(STEPS) if cache is None or not kinds else cache.compute_steps
    assert len(ran) >= computed * (fusable if kinds else 1)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 0.05 * theirs.norm()  # some codes may differ
    for mine, theirs in zip(forwards(name, unfuse(model))(), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FUSED])
def test_without_fused_kernels_nothing_is_fused(name):
    model = calibrate(quantize_model(make_tiny(name)), [inputs_of(name)])
    with pytest.raises(ModelError, match=f"fused kernels for diffusers' DiT.* and Flux.* and QwenImage.*; got {name}"):
        fuse(model)


@pytest.mark.parametrize("mode", ["delta", "branch"])
@each_class(FAMILIES)
@torch.no_grad()
def test_no_reuse_step_enters_what_is_unread(name, mode):
    model = make_tiny(name)
    cache = apply_cache(model, config=CacheConfig(mode, interval=2))
    left = {part for module in unread(model) for part in module.modules()}
    entered = []
    for call in run_of(name, STEPS[:2]):
        entered.append(set())
        with register_module_forward_pre_hook(lambda module, args, found=entered[-1]: found.add(module)):
            model(**call)
    assert (cache.compute_steps, cache.reuse_steps) == (1, 1)
    assert left & entered[0]
    assert not left & entered[1]


@each_class(FAMILIES)
def test_ranges_are_those_of_all_that_layers_are_given(name):
    model = quantize_model(make_tiny(name))
    bounds = {}

    def see(layer, args):
        low, high = bounds.get(layer, (0.0, 0.0))
        bounds[layer] = min(low, args[0].min().item()), max(high, args[0].max().item())

    slow = copy.deepcopy(model)
    names = {layer: name for name, layer in quant_layers(slow).items()}
    handles = [layer.register_forward_pre_hook(see) for layer in names]
    forwards(name, slow)()
    calibrate(model, forwards(name, model))
    static = {name for name, layer in quant_layers(model).items() if layer.act_scale is not None}
    assert len(static) >= 6 * len(FAMILIES[name].blocks(model).blocks)
    for layer, (low, high) in bounds.items():
        if names[layer] in static:
            scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), 8)
            found = model.get_submodule(names[layer])
            assert torch.equal(found.act_zero_point, zero_point)
            torch.testing.assert_close(found.act_scale, scale)
    for handle in handles:
        handle.remove()


def added(model, given, mode, step, features):
    """Return the square of what each feature adds to the image at a step, alone."""
    if mode in ("delta", "crf"):
        return sum(features).square().sum()
    total = 0
    for k, feature in enumerate(features):
        only = [each(torch.zeros_like, f) for f in step.features]
        of_image(model, mode, only)[k].copy_(feature)
        total += step_of(model, given, mode, only).added.square().sum()
    return total


@functools.cache
def added_by_blocks(name, mode):
    """Return the square of what the model's own features add to the image, at each of six steps."""
    model, steps = tiny(name), steps_known(name, mode)
    of_step = enumerate(run_of(name, STEPS[:6]))
    return [added(model, given, mode, steps[i], of_image(model, mode, steps[i].features)) for i, given in of_step]


def fitted(f, g, mode):
    """Return what a gain and an offset per channel make of f to be like g: in error for ``branch``, else in spread."""
    f, g = (t.flatten(0, -2).double() for t in (f, g))
    gain = g.std(0) / f.std(0)
    if mode == "branch":
        gain = ((f - f.mean(0)) * (g - g.mean(0))).mean(0) / f.var(0, correction=0)
    gain = gain if mode in ("delta", "branch") else (gain + 1) / 2
    return gain * f + (g - gain * f).mean(0)


@each_class(FAMILIES)
@pytest.mark.parametrize(("mode", "order"), [("delta", 0), ("branch", 0), ("taylor", 1), *later(1)])
@pytest.mark.parametrize("compensated", [False, True])
def test_a_schedule_is_that_of_all_schedules_tried(monkeypatch, name, mode, order, compensated):
    """Compare what features add at every step with what a schedule would add in its place, and take the least error."""
    monkeypatch.setattr("qandc.method.schedule_calibration.TOKENS", 1000)  # far more than there are
    model, inputs = make_tiny(name), run_of(name, STEPS[:6])
    steps = dict(enumerate(steps_known(name, mode)[:6]))

    @functools.cache
    def error(step, computed):
        reused, true = of_image(model, mode, forecast(steps, computed, step, order, mode)), truth[step]
        if mode in ("delta", "crf"):
            reused, true = [sum(reused)], [sum(true)]
        if compensated:
            reused = [fitted(f, g, mode).view_as(g).float() for f, g in zip(reused, true, strict=True)]
        errors = [f - g for f, g in zip(reused, true, strict=True)]
        return (added(model, inputs[step], mode, steps[step], errors) / whole[step]).sqrt().item()

    def error_of(chosen):
        """Sum the errors of the steps that are not chosen, each from the newest of those before it."""
        before = {step: tuple(c for c in reversed(chosen) if c < step) for step in steps.keys() - set(chosen)}
        return sum(error(step, computed[: order + 1]) for step, computed in before.items())

    truth = {step: of_image(model, mode, found.features) for step, found in steps.items()}
    whole = added_by_blocks(name, mode)
    first = tuple(range(order + 1))
    all_of_them = itertools.combinations(range(order + 1, 6), 2 - order)
    errors = {(*first, *rest): error_of((*first, *rest)) for rest in all_of_them}
    found = schedule_from_run(
        model, forwards(name, model, STEPS[:6]), mode=mode, computed_steps=3, compensated=compensated
    )
    chosen = tuple(step for step, computed in enumerate(found.schedule) if computed)
    assert found.timesteps == timesteps_of(name, STEPS[:6])
    assert found.error == pytest.approx(errors[chosen], rel=0.05)  # gates by their mean square over samples
    assert errors[chosen] <= 1.03 * min(errors.values())
    assert max(errors.values()) > 1.1 * min(errors.values())


def test_runs_of_a_schedule():
    name = "PixArtTransformer2DModel"
    model = make_tiny(name)
    alone = schedule_from_run(model, forwards(name, model), computed_steps=2)
    both = schedule_from_run(model, lambda: [forwards(name, model)() for _ in range(2)], computed_steps=2)
    assert (both.schedule, both.timesteps) == (alone.schedule, alone.timesteps)
    assert both.error == pytest.approx(alone.error)
    inputs = run_of(name)
    small = [{**given, "hidden_states": given["hidden_states"][..., :4, :4]} for given in run_of(name)]
    both = schedule_from_run(model, lambda: [model(**given) for given in (*inputs, *small)], computed_steps=2)
    assert both.error == pytest.approx(alone.error, rel=0.5)
    other = run_of(name)[1:]
    with pytest.raises(ConfigError, match="one run has 10 steps from timestep 900 on and another 9"):
        schedule_from_run(model, lambda: [model(**given) for given in (*inputs, *other)], computed_steps=2)
    with pytest.raises(ConfigError, match="timesteps rise from 450 to 900"):
        schedule_from_run(model, lambda: [model(**given) for given in (*inputs, *inputs)], computed_steps=2)
    with pytest.raises(DataError, match="the function did not run this PixArtTransformer2DModel"):
        schedule_from_run(model, lambda: None, computed_steps=2)
    with pytest.raises(ConfigError, match=r"computed_steps is 11; .* can compute 1 to 10"):
        schedule_from_run(model, forwards(name, model), computed_steps=11)
    with pytest.raises(ModelError, match=", ".join(FAMILIES) + "; got Linear"):
        schedule_from_run(torch.nn.Linear(2, 2), lambda: None, computed_steps=2)


def embeddings(seed, size, **widths):
    """Make the arguments that say what prompts and negative prompts mean, in place of a text encoder."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in widths.items():
        for negative in ("", "negative_"):
            found[negative + name] = torch.randn(2, *shape, generator=generator)
    return {**found, "height": size, "width": size}


def of_pixart(seed, size):
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(2, 4))
    return {
        **embeddings(seed, size, prompt_embeds=(4, 48)),
        **masks,
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def of_flux(seed, size):
    return {**embeddings(seed, size, prompt_embeds=(5, 48), pooled_prompt_embeds=(32,)), "true_cfg_scale": 2.0}


def of_qwen(seed, size):
    masks = dict.fromkeys(
        ("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    )
    return {**embeddings(seed, size, prompt_embeds=(5, 48)), **masks, "true_cfg_scale": 2.0}


def of_sd3(seed, size):
    return embeddings(seed, size, prompt_embeds=(5, 48), pooled_prompt_embeds=(64,))


def of_wan(seed, size):
    return {**embeddings(seed, size, prompt_embeds=(5, 48)), "num_frames": 5}


def of_z_image(seed, size):
    texts = embeddings(seed, size, prompt_embeds=(40, 48))
    texts |= {name: [texts[name][0], texts[name][1, :6]] for name in ("prompt_embeds", "negative_prompt_embeds")}
    return texts  # rows of two lengths


def of_chroma(seed, size):
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(2, 5))
    return {**embeddings(seed, size, prompt_embeds=(5, 48)), **masks}


PIPELINES = {  # to their transformer, their scheduler, their arguments, and how many runs take turns
    "PixArtAlphaPipeline": ("PixArtTransformer2DModel", "DPMSolverMultistepScheduler", of_pixart, 1),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", "DPMSolverMultistepScheduler", of_pixart, 1),
    "FluxPipeline": ("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler", of_flux, 2),
    "ChromaPipeline": (CHROMA, "FlowMatchEulerDiscreteScheduler", of_chroma, 2),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", "FlowMatchEulerDiscreteScheduler", of_qwen, 2),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler", of_sd3, 1),
    "WanPipeline": ("WanTransformer3DModel", "UniPCMultistepScheduler", of_wan, 2),
    "ZImagePipeline": (Z_IMAGE, "FlowMatchEulerDiscreteScheduler", of_z_image, 1),
}


def make_pipeline(name, transformer, scheduler, **others):
    """Make a pipeline of a class without encoders of text."""
    pytest.importorskip("transformers")  # which pipelines want, though no text is encoded here
    import diffusers

    cls = getattr(diffusers, name)
    parts = {"transformer": transformer, "scheduler": getattr(diffusers, scheduler)(), **others}
    pipe = cls(**{**dict.fromkeys(inspect.signature(cls).parameters), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    """Make a pipeline of random weights, a function that draws from two prompts with it, and count runs in turns."""
    name, scheduler, arguments, runs = PIPELINES[request.param]
    pipe = make_pipeline(request.param, make_tiny(name), scheduler)

    def draw(seed=0, size=64, steps=6):
        given = {**arguments(seed, size), "num_inference_steps": steps, "output_type": "latent"}
        return pipe(**given, generator=torch.Generator().manual_seed(0))[0]

    return pipe, draw, runs


@pytest.mark.parametrize(("mode", "order"), [("delta", 1), ("branch", 1), ("taylor", 1), ("taylor", 2), *later(2)])
def test_a_model_is_quantized_calibrated_cached_and_sampled_in_its_own_pipeline(pipeline, mode, order):
    pipe, draw, number = pipeline
    model = quantize_model(pipe.transformer)
    with calibration(model):
        draw()
    assert sum(layer.act_scale is not None for layer in quant_layers(model).values()) >= 12
    plain = draw()
    found = schedule_from_run(model, draw, mode=mode, order=order, computed_steps=4)
    unit = 1000 if type(model).__name__ in FRACTIONS else 1
    assert [unit * t for t in found.timesteps] == pytest.approx(pipe.scheduler.timesteps.tolist())
    slow = copy.deepcopy(model)
    cache = apply_cache(model, config=found.config())
    runs = {}  # by what they are known by

    def note(model, args, kwargs, output):
        given = arguments_of(model, args, kwargs)
        key = given["cap_feats"][0] if "cap_feats" in given else given["encoder_hidden_states"]
        runs.setdefault(id(key), []).append((given, as_one(output[0])))

    handle = model.register_forward_hook(note, with_kwargs=True)
    images = draw()
    handle.remove()
    assert len(runs) == number
    assert (cache.compute_steps, cache.reuse_steps) == (4 * number, 2 * number)
    for calls in runs.values():
        expected = by_definition(slow, found.config(), [given for given, _ in calls])
        assert_equal_runs([mine for _, mine in calls], expected)
    assert torch.isfinite(images).all()
    assert torch.equal(images, draw())
    assert not torch.equal(images, plain)
    remove_cache(model)
    assert torch.equal(draw(), plain)


def draw_in_order(monkeypatch, model, draw, changes):
    """Draw with one cache and compare with a cache for each image; return these images and the cache."""
    images, config = [], CacheConfig("branch", interval=3)
    for change in changes:
        apply_cache(model, config=config)
        images.append(draw(**change))
        remove_cache(model)
    cache = apply_cache(model, config=config)
    with monkeypatch.context() as patched:  # as on a GPU, where nothing waits for timesteps
        patched.setattr(TimestepWatch, "rises", lambda *args: False)
        for change, wanted in zip(changes, images, strict=True):
            assert torch.equal(draw(**change), wanted)
    remove_cache(model)
    return images, cache


def test_other_prompts_sizes_and_steps_are_runs_of_their_own(pipeline, monkeypatch):
    pipe, draw, number = pipeline
    changes = [{}, {"seed": 1}, {"size": 32}, {"steps": 4}, {"seed": 1, "steps": 5}, {}]
    _, cache = draw_in_order(monkeypatch, pipe.transformer, draw, changes)
    assert cache.reuse_steps == number * (4 * 4 + 2 + 3)


SDE = {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "scheduler", "settings", "calls"),
    [
        ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler", {}, 6),
        ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler", SDE, 6),
        ("PixArtSigmaPipeline", "DPMSolverSinglestepScheduler", {}, 6),
        ("PixArtSigmaPipeline", "UniPCMultistepScheduler", {}, 6),
        ("PixArtSigmaPipeline", "DDIMScheduler", {}, 6),
        ("PixArtSigmaPipeline", "HeunDiscreteScheduler", {}, 11),
        ("PixArtSigmaPipeline", "KDPM2DiscreteScheduler", {}, 11),
        ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler", {}, 6),
        ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", {}, 11),
        ("WanPipeline", "UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, 6),
        ("WanPipeline", "DPMSolverSinglestepScheduler", {}, 6),
    ],
    indirect=["pipeline"],
)
def test_a_schedule_counts_calls_of_the_model(pipeline, scheduler, settings, calls):
    import diffusers

    pipe, draw, number = pipeline
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    found = schedule_from_run(pipe.transformer, draw, computed_steps=4)
    assert found.timesteps == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert len(found.schedule) == calls
    cache = apply_cache(pipe.transformer, config=found.config())
    images = draw()
    assert (cache.compute_steps, cache.reuse_steps) == (4 * number, (calls - 4) * number)
    assert torch.equal(draw(), images)
    assert torch.isfinite(images).all()
    for steps in (4, 7):
        with pytest.raises(CacheError, match=f"for a run of {calls} steps, with step . at timestep .* this run has it"):
            draw(steps=steps)


FROM_IMAGES = {  # pipelines that begin with an image, to one with the same prompts, and to changes of its transformer
    "FluxImg2ImgPipeline": ("FluxPipeline", {}),
    "FluxInpaintPipeline": ("FluxPipeline", {}),
    "FluxFillPipeline": ("FluxPipeline", {"in_channels": 48, "out_channels": 16}),
    "FluxKontextPipeline": ("FluxPipeline", {}),
    "ChromaImg2ImgPipeline": ("ChromaPipeline", {}),
    "QwenImageImg2ImgPipeline": ("QwenImagePipeline", {}),
    "QwenImageEditPipeline": ("QwenImagePipeline", {}),
    "StableDiffusion3Img2ImgPipeline": ("StableDiffusion3Pipeline", {}),
    "WanImageToVideoPipeline": ("WanPipeline", {"in_channels": 10}),
}


def make_from_image(kind, monkeypatch, text, changes, **others):
    """Make a pipeline that begins with an image, and a function that draws with it."""
    from PIL import Image

    name, scheduler, arguments, _ = PIPELINES[text]
    coder = {"QwenImagePipeline": qwen_vae, "WanPipeline": wan_vae}.get(text, vae)
    pipe = make_pipeline(kind, make_tiny(name, **changes), scheduler, vae=coder().eval(), **others)
    known = inspect.signature(pipe.__call__).parameters

    def draw(seed=0, size=16, steps=6, pipe=pipe, strength=0.7):
        module = inspect.getmodule(type(pipe))
        if hasattr(module, "calculate_dimensions"):  # of a million pixels
            monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (size, size, None))
        image, mask = (Image.linear_gradient("L").resize((size, size)).convert(mode) for mode in ("RGB", "L"))
        given = {**arguments(seed, size), "image": image, "mask_image": mask, "strength": strength}
        given |= {"_auto_resize": False, "max_area": size * size, "num_inference_steps": steps, "output_type": "latent"}
        given = {key: value for key, value in given.items() if key in known}
        return pipe(**given, generator=torch.Generator().manual_seed(0))[0]

    return pipe, draw


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_pipelines_that_begin_with_an_image(name, monkeypatch):
    pipe, draw = make_from_image(name, monkeypatch, *FROM_IMAGES[name])
    model, plain = pipe.transformer, draw()
    cache = apply_cache(model, cache_interval=1)
    assert torch.equal(draw(), plain)
    steps = cache.compute_steps
    remove_cache(model)
    other = type(pipe)(**pipe.components)  # shares the transformer
    other.set_progress_bar_config(disable=True)
    changes = [{}, {"seed": 1}, {"size": 32}, {"strength": 0.9}, {"pipe": other, "seed": 1}, {"steps": 5}, {}]
    images, cache = draw_in_order(monkeypatch, model, draw, changes)
    assert not torch.equal(images[0], plain)
    assert cache.reuse_steps > 0
    found = schedule_from_run(model, draw, computed_steps=3)
    assert len(found.schedule) in (steps, steps // 2)  # conditional and unconditional passes are runs apart
    cache = apply_cache(model, config=found.config())
    assert torch.isfinite(draw()).all()
    assert cache.compute_steps + cache.reuse_steps == steps
    with pytest.raises(CacheError, match=f"for a run of {len(found.schedule)} steps, with step"):
        draw(steps=9)


@pytest.mark.parametrize(
    ("pipeline", "given"),
    [
        ("FluxPipeline", {**of_flux(0, 64), "true_cfg_scale": 1.0}),
        ("ChromaPipeline", {**of_chroma(0, 64), "guidance_scale": 1.0}),
    ],
    indirect=["pipeline"],
)
def test_a_prompt_that_is_encoded_once_serves_two_calls(pipeline, given, monkeypatch):
    """FLUX.1 hands the embeddings on as they are given: calls are told apart by what else they make."""
    pipe, _, _ = pipeline
    model, config = pipe.transformer, CacheConfig("branch", interval=4)
    given = {**given, "num_inference_steps": 6, "output_type": "latent"}
    monkeypatch.setattr(TimestepWatch, "rises", lambda *args: False)  # as on a GPU, where nothing waits for timesteps

    def draw():
        return pipe(**given, generator=torch.Generator().manual_seed(0)).images

    cache = apply_cache(model, config=config)
    images = draw()
    assert torch.equal(draw(), images)
    assert (cache.compute_steps, cache.reuse_steps) == (4, 8)
    remove_cache(model)
    found = fit_feature_compensation(model, lambda: (draw(), draw()), config=config)
    assert len(found.config.timesteps) == 6


@pytest.mark.parametrize("pipeline", ["WanPipeline"], indirect=True)
def test_two_transformers_that_share_a_run_have_a_cache_each(pipeline):
    pipe, draw, _ = pipeline
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.6)
    models = [quantize_model(model) for model in (pipe.transformer, pipe.transformer_2)]
    with calibration(models[0]), calibration(models[1]):
        draw()
    assert all(layer.act_scale is not None for model in models for layer in quant_layers(model.blocks).values())
    plain, caches = draw(), [apply_cache(model, config=CacheConfig("branch", interval=3)) for model in models]
    images = draw()
    assert [(cache.compute_steps, cache.reuse_steps) for cache in caches] == [(2, 4), (2, 4)]
    assert torch.equal(draw(), images)
    assert not torch.equal(images, plain)
    schedules = [schedule_from_run(model, draw, computed_steps=2) for model in models]  # of the calls of each
    assert sum((found.timesteps for found in schedules), ()) == tuple(pipe.scheduler.timesteps.tolist())
    for model, found in zip(models, schedules, strict=True):
        remove_cache(model)
        apply_cache(model, config=found.config())
    draw()
    with pytest.raises(CacheError, match="for a run of 3 steps, with step 2"):
        draw(steps=7)


FLUX, SD3, WAN = "FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"


def assert_as_defined(model, config, inputs):
    expected = by_definition(model, config, inputs)
    apply_cache(model, config=config)
    with torch.no_grad():
        assert_equal_runs([model(**given)[0] for given in inputs], expected)


def test_blocks_of_sd35_that_have_a_second_attention():
    assert_as_defined(make_tiny(SD3, dual_attention_layers=(0,)), CONFIGS["taylor uneven"], run_of(SD3))


@each_class(FAMILIES)
def test_copies_and_pickles_are_cached(name):
    model = make_tiny(name)
    apply_cache(model, config=CONFIGS["branch"])
    expected = forwards(name, model)()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_runs(forwards(name, other)(), expected, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize(("name", "graphs"), [("FluxTransformer2DModel", 3), ("QwenImageTransformer2DModel", 1)])
def test_blocks_that_diffusers_compiles(name, graphs, attach_first):
    """Copies and pickles of a model with compiled blocks compute with weights of their own."""

    def cached(model):
        apply_cache(model, config=CONFIGS["branch"])
        return model

    def halved(model):
        for layer in quant_layers(model).values():
            layer.weight_scale.mul_(0.5)
        return forwards(name, model)()

    torch._dynamo.reset()
    model = copy.deepcopy(tiny(name, "w8a8"))
    expected = forwards(name, cached(copy.deepcopy(model)))()
    expected_halved = halved(cached(copy.deepcopy(model)))
    if attach_first:
        cached(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter, dynamic=False)
    if not attach_first:
        cached(model)
    assert_equal_runs(forwards(name, model)(), expected)
    assert counter.frame_count == graphs  # not one for each block
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_runs(halved(other), expected_halved)
    assert_equal_runs(forwards(name, model)(), expected)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PixArtTransformer2DModel"])
def test_blocks_that_are_offloaded_one_by_one(name, tmp_path):
    """Their weights are not there on a reuse step, which enters no block; ``delta`` needs none."""

    def offloaded(config):
        model, device = make_tiny(name), torch.device("cpu")
        apply_cache(model, config=config)
        model.enable_group_offload(
            device,
            device,
            offload_type="block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=tmp_path / config.mode,
        )
        return model

    assert_equal_runs(
        forwards(name, offloaded(CONFIGS["delta"]))(), by_definition(make_tiny(name), CONFIGS["delta"], run_of(name))
    )
    with pytest.raises(CacheError, match=r"weights of their gates may not be here .*: use mode 'delta'"):
        forwards(name, offloaded(CONFIGS["branch"]))()


@pytest.mark.parametrize("mode", ["delta", "branch"])
def test_passes_that_skip_layers_are_not_observed(mode):
    model, config = make_tiny(SD3, num_layers=3), CONFIGS[mode]

    def run():
        with torch.no_grad():
            for given in run_of(SD3):
                model(**given)
                skipped = {name: given[name][:1] for name in ("hidden_states", "timestep", "pooled_projections")}
                model(**{**given, **skipped, "encoder_hidden_states": prompt}, skip_layers=[1])

    prompt = run_of(SD3)[0]["encoder_hidden_states"][:1]
    alone = forwards(SD3, model)
    found, expected = (schedule_from_run(model, r, mode=mode, computed_steps=4) for r in (run, alone))
    assert found == expected
    for along in ("uncached", "corrected"):
        found, expected = (fit_feature_compensation(model, r, config=config, along=along) for r in (run, alone))
        assert torch.equal(found.gains, expected.gains)
        assert torch.equal(found.offsets, expected.offsets)


def test_passes_that_skip_layers_are_no_steps():
    model, plain, config = make_tiny(SD3), make_tiny(SD3), CONFIGS["delta"]
    apply_cache(model, config=config)
    found = []
    with torch.no_grad():
        for given in run_of(SD3):
            found.append(model(**given)[0])
            assert torch.equal(*(each(**given, skip_layers=[0])[0] for each in (model, plain)))
    assert_equal_runs(found, by_definition(plain, config, run_of(SD3)))


def test_a_branch_that_was_quantized_since():
    """Quantize the output layer of a single block of FLUX after the cache was attached: it is kept all the same."""
    config, model = CONFIGS["branch"], make_tiny(FLUX)
    expected = by_definition(quantize_model(make_tiny(FLUX)), config, run_of(FLUX))
    apply_cache(model, config=config)
    quantize_model(model)
    assert_equal_runs(forwards(FLUX, model)(), expected)
    remove_cache(model)
    assert type(model.single_transformer_blocks[1].proj_out) is QuantLinear


@pytest.mark.parametrize("name", [FLUX, CHROMA])
def test_what_a_controlnet_adds_between_blocks_is_added_once(name):
    noise = torch.randn(4, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    residuals = {"controlnet_block_samples": [*noise[:2]], "controlnet_single_block_samples": [*noise[2:]]}
    inputs = [{**given, **residuals} for given in run_of(name)]
    assert_as_defined(make_tiny(name), CONFIGS["branch"], inputs)
    model = make_tiny(name)
    apply_cache(model, config=CONFIGS["delta"])
    model(**run_of(name)[0], controlnet_blocks_repeat=False)  # adds nothing
    with pytest.raises(CacheError, match=r"ControlNet .* would be added twice: use mode 'branch'"):
        model(**inputs[0])
    run = functools.partial(model, **inputs[0])
    schedule_from_run(model, run, computed_steps=1)  # the cache is paused
    remove_cache(model)
    for learn in (schedule_from_run, fit_feature_compensation):
        given = {"computed_steps": 1, "mode": "delta"} if learn is schedule_from_run else {"config": CONFIGS["delta"]}
        with pytest.raises(CacheError, match="would be added twice: use mode 'branch'"):
            learn(model, run, **given)
    with pytest.raises(ConfigError, match=r"ControlNet .* is lost along='corrected'; use along='uncached'"):
        fit_feature_compensation(model, run, config=CONFIGS["branch"], along="corrected")


def test_what_an_ip_adapter_adds_is_reused_with_all_that_blocks_add():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class WithAdapter(FluxAttnProcessor):
        def __call__(self, *args, **kwargs):
            image, *others = super().__call__(*args, **kwargs)
            return image, *others, image / 2

    model = make_tiny(FLUX)
    for block in model.transformer_blocks:
        block.attn.set_processor(WithAdapter())
    assert_as_defined(model, CONFIGS["delta"], run_of(FLUX))
    remove_cache(model)
    apply_cache(model, config=CONFIGS["branch"])
    with pytest.raises(CacheError, match=r"IP-Adapter .* use cache mode 'delta'"):
        forwards(FLUX, model)()


def test_a_modulation_for_each_token_is_cached_for_all_blocks_alone():
    name = "QwenImageTransformer2DModel"
    model = make_tiny(name, zero_cond_t=True)
    with pytest.raises(CacheError, match=r"needs one modulation for all tokens \(zero_cond_t=False\)"):
        apply_cache(model, config=CONFIGS["branch"])
    assert_as_defined(model, CONFIGS["delta"], run_of(name))


def test_videos_of_an_image_attend_to_it_too():
    model = make_tiny(WAN, image_dim=24, added_kv_proj_dim=32)
    seen = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    inputs = [{**given, "encoder_hidden_states_image": seen} for given in run_of(WAN)]
    cache = apply_cache(model, config=CONFIGS["taylor uneven"])
    with torch.no_grad():
        found = [model(**given)[0] for given in inputs]
        model(**{**inputs[-1], "encoder_hidden_states_image": seen.clone()})  # the same prompt in another call
    assert (cache.compute_steps, cache.reuse_steps) == (6, 5)
    assert_equal_runs(found, by_definition(make_tiny(WAN, image_dim=24, added_kv_proj_dim=32), cache.config, inputs))


def test_a_timestep_for_each_token_is_cached_for_all_blocks_alone():
    model = make_tiny(WAN)
    noisy = torch.arange(32) >= 16  # not the frame that a video begins with
    inputs = [{**given, "timestep": given["timestep"][:, None] * noisy} for given in run_of(WAN)]
    assert_as_defined(model, CONFIGS["delta"], inputs)
    remove_cache(model)
    apply_cache(model, config=CONFIGS["branch"])
    with pytest.raises(CacheError, match=r"timestep for each token .* needs cache mode 'delta'"):
        [model(**given) for given in inputs]


@pytest.mark.slow
def test_a_schedule_for_a_pipeline_that_gives_each_token_a_timestep(monkeypatch):
    """Wan 2.2 (5B) gives the tokens of the first frame, an image, the timestep 0."""
    pipe, draw = make_from_image("WanImageToVideoPipeline", monkeypatch, "WanPipeline", {}, expand_timesteps=True)
    model, plain = pipe.transformer, draw()
    for mode in ("delta", "crf"):
        found = schedule_from_run(model, draw, mode=mode, computed_steps=3)
        assert found.timesteps == tuple(pipe.scheduler.timesteps.tolist())
        cache = apply_cache(model, config=found.config())
        assert not torch.equal(draw(), plain)
        assert (cache.compute_steps, cache.reuse_steps) == (6, 6)
        with pytest.raises(CacheError, match="for a run of 6 steps, with step 2"):
            draw(steps=9)
        remove_cache(model)
    with pytest.raises(CacheError, match="needs cache mode 'delta' or 'crf'"):
        schedule_from_run(model, draw, mode="branch", computed_steps=3)


def test_images_of_z_image_that_share_a_prompt_are_other_runs():
    model, given = make_tiny(Z_IMAGE), inputs_of(Z_IMAGE)
    cache = apply_cache(model, cache_interval=5)
    a, b = given["cap_feats"]
    for texts in ([a, b], [a, a.clone(), b], [a, b.clone(), b.clone()]):
        for step in range(2):
            rows = {"x": given["x"][:1] * len(texts), "t": given["t"][:1].repeat(len(texts)) + 0.1 * step}
            output_of(model, {**rows, "cap_feats": texts})
    assert (cache.compute_steps, cache.reuse_steps) == (3, 3)


def test_images_beside_the_one_that_z_image_draws_are_refused():
    model, given = make_tiny(Z_IMAGE), inputs_of(Z_IMAGE)
    cache = apply_cache(model)
    with pytest.raises(CacheError, match=r"knows no images beside .* \(omni\): call remove_cache"):
        model(**{**given, "x": [[x] for x in given["x"]]})
    assert cache.compute_steps == 0


# on a GPU


def on_a_gpu(run):
    """Move the arguments of all forwards of a run; what is one tensor stays one."""
    moved = {}

    def move(value):
        if isinstance(value, torch.Tensor):
            return moved.setdefault(id(value), value.cuda())
        return [move(part) for part in value] if isinstance(value, list) else value

    return [{name: move(value) for name, value in given.items()} for given in run]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("kind", OF_EACH_MODE)
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compiled_and_steps_in_graphs_change_nothing(name, kind):
    model, inputs, config = make_tiny(name).cuda(), on_a_gpu(run_of(name)), CONFIGS[kind]
    expected = by_definition(model, config, inputs)
    apply_cache(model, config=config)
    assert_equal_runs([output_of(model, given) for given in inputs], expected)
    remove_cache(model)
    for block in family_of(model).blocks(model).blocks:
        block.module.compile(fullgraph=True, dynamic=False)
    graph(model)
    apply_cache(model, config=config)
    for _ in range(3):  # a run makes memory, one captures, one replays
        inputs = on_a_gpu(run_of(name))
        assert_equal_runs([output_of(model, given) for given in inputs], expected)
