"""What every family of models can: caches, fused kernels, ranges and schedules equal their slow definition."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from qandc import (
    CacheConfig,
    ConfigError,
    DataError,
    ModelError,
    apply_cache,
    calibrate,
    calibration,
    fuse,
    quantize_model,
    remove_cache,
    reset_all_caches,
    schedule_from_run,
    unfuse,
)
from qandc.caching.schedule import forecast_weights
from qandc.models import FAMILIES, family_of
from qandc.quantization.conversion import quant_layers
from qandc.quantizer import scale_and_zero_point
from qandc_kernels import Backend
from tests.tiny_models import inputs_of, make_tiny

STEPS = (900, 800, 700, 600, 500)
CONFIGS = [CacheConfig("block", 2), CacheConfig("branch", 3), CacheConfig("taylor", 2, order=1)]
BRANCHES = {"DiTTransformer2DModel": ("attn1", "ff"), "PixArtTransformer2DModel": ("attn1", "attn2", "ff")}


def step_inputs(name, timestep, step):
    """Arguments of one step; what is one tensor for the whole run is."""
    given = inputs_of(name)
    torch.manual_seed(step)
    latents = torch.randn_like(given["hidden_states"])
    return {**given, "hidden_states": latents, "timestep": torch.full_like(given["timestep"], timestep)}


def run_of(name):
    first = step_inputs(name, STEPS[0], 0)
    key = FAMILIES[name].run_key
    return [{**step_inputs(name, timestep, i), key: first[key]} for i, timestep in enumerate(STEPS)]


def block_modulation(name, block, kwargs):
    """The six parts of a block's modulation, as its forward computes them."""
    if name == "DiTTransformer2DModel":
        embedding = block.norm1.emb(kwargs["timestep"], kwargs["class_labels"], hidden_dtype=torch.float32)
        return block.norm1.linear(torch.nn.functional.silu(embedding)).chunk(6, 1)
    return (block.scale_shift_table[None] + kwargs["timestep"].view(-1, 6, block.scale_shift_table.shape[1])).unbind(1)


class Observed:
    """A forward of a model without a cache: what its stack is given and gives, branches and their gates."""

    def __init__(self, name, model, inputs, leave=None):
        blocks = list(model.transformer_blocks)
        self.features, self.gates = [], []
        handles = [blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        handles.append(blocks[-1].register_forward_hook(lambda m, a, y: leave(self) if leave else self._out(y)))
        for block in blocks:
            handles.append(block.register_forward_pre_hook(self._gate(name), with_kwargs=True))
            for branch in BRANCHES[name]:
                handles.append(getattr(block, branch).register_forward_hook(lambda m, a, y: self.features.append(y)))
        with torch.no_grad():
            self.output = model(**inputs)[0]
        for handle in handles:
            handle.remove()

    def _enter(self, module, args, kwargs):
        self.given = args[0] if args else kwargs["hidden_states"]

    def _out(self, y):
        self.made = y

    def _gate(self, name):
        def note(block, args, kwargs):
            _, _, attention, _, _, mlp = block_modulation(name, block, kwargs)
            one = torch.ones_like(mlp)
            self.gates += [attention, mlp] if len(BRANCHES[name]) == 2 else [attention, one, mlp]

        return note


def defined(name, model, config, inputs):
    """Outputs of all steps by the definition of the mode."""
    outputs, kept, computed = [], [], []
    history = config.order + 1 if config.mode == "taylor" else 1
    for step, given in enumerate(inputs):
        if config.computes(step):
            seen = Observed(name, model, given)
            kept, computed = [seen, *kept][:history], [step, *computed][:history]
            outputs.append(seen.output)
            continue
        weights = forecast_weights(computed, step, config.order) if config.mode == "taylor" else [1.0]

        def replaced(now, kept=kept, weights=weights):
            if config.mode == "block":
                return now.given + kept[0].made - kept[0].given
            pairs = zip(now.gates, *(then.features for then in kept), strict=True)
            return now.given + sum(
                gate[:, None] * sum(w * f for w, f in zip(weights, features, strict=True)) for gate, *features in pairs
            )

        outputs.append(Observed(name, model, given, leave=replaced).output)
    return outputs


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.mode)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_cached_model_equals_the_definition(name, config, quantized):
    model = make_tiny(name)
    if quantized:
        model = calibrate(quantize_model(model), [inputs_of(name)])
    inputs = run_of(name)
    expected = defined(name, copy.deepcopy(model), config, inputs)
    cache = apply_cache(model, config=config)
    with torch.no_grad():
        found = [model(**given)[0] for given in inputs]
    assert (cache.compute_steps, cache.reuse_steps) == {2: (3, 2), 3: (2, 3)}[config.interval]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    remove_cache(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs[1])[0], Observed(name, model, inputs[1]).output)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_prompt_or_class_begins_a_run(name):
    model = make_tiny(name)
    cache = apply_cache(model, cache_interval=5)
    with torch.no_grad():
        for _ in range(2):
            for given in run_of(name)[:3]:
                model(**given)
    assert (cache.compute_steps, cache.reuse_steps) == (2, 4)
    reset_all_caches(model)
    assert cache.compute_steps == 0


def test_families_know_their_classes():
    assert set(BRANCHES) == set(FAMILIES)
    assert family_of(torch.nn.Linear(2, 2)) is None
    for name, family in FAMILIES.items():
        model = make_tiny(name)
        assert family_of(model) is family
        assert family.why_not(model.transformer_blocks[0]) is None
        others = [other for other in FAMILIES.values() if other is not family]
        assert all(other.why_not(model.transformer_blocks[0]) for other in others)


def forwards(name, model):
    """Give a function that runs the model through all steps of a run."""

    def run():
        with torch.no_grad():
            return [model(**given)[0] for given in run_of(name)]

    return run


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=lambda config: config and config.mode)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.program is not None])
def test_a_fused_model_equals_the_same_model_unfused(monkeypatch, name, config):
    monkeypatch.setattr("qandc.fusion.fuse.select_backend", lambda device: Backend("triton", "as if"))
    model = make_tiny(name)
    model = calibrate(quantize_model(model), forwards(name, model))
    if config is not None:
        apply_cache(model, config=config)
    expected = forwards(name, model)()
    ran = []
    program = FAMILIES[name].program
    original = program.inputs
    monkeypatch.setattr(program, "inputs", lambda self, call: ran.append(call) or original(self, call))
    found = forwards(name, fuse(model))()
    assert len(ran) == len(STEPS)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 0.05 * theirs.norm()  # some codes may differ
    for mine, theirs in zip(forwards(name, unfuse(model))(), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.program is None])
def test_without_a_program_nothing_is_fused(name):
    model = calibrate(quantize_model(make_tiny(name)), [inputs_of(name)])
    with pytest.raises(ModelError, match=f"there are fused kernels for diffusers' DiT.*; got {name}"):
        fuse(model)


@pytest.mark.parametrize("name", FAMILIES)
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
    assert len(static) >= 6 * len(model.transformer_blocks)
    for layer, (low, high) in bounds.items():
        if names[layer] in static:
            scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), 8)
            found = model.get_submodule(names[layer])
            assert torch.equal(found.act_zero_point, zero_point)
            torch.testing.assert_close(found.act_scale, scale)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("mode", "order"), [("block", 0), ("branch", 0), ("taylor", 1)])
def test_a_schedule_is_that_of_all_schedules_tried(monkeypatch, name, mode, order):
    """Compare what features add at every step with what a schedule would add in its place, and take the least error."""
    monkeypatch.setattr("qandc.method.schedule_calibration.POSITIONS", 50_000)  # far more than there are
    model = make_tiny(name)
    steps = [Observed(name, model, given) for given in run_of(name)]

    def added(features, step):
        if mode == "block":
            return features[0]
        return sum(gate[:, None] * f for gate, f in zip(steps[step].gates, features, strict=True))

    features = [[seen.made - seen.given] if mode == "block" else seen.features for seen in steps]

    def error(chosen):
        total = 0.0
        for step in set(range(len(STEPS))) - set(chosen):
            computed = sorted((c for c in chosen if c < step), reverse=True)[: order + 1]
            weights = forecast_weights(computed, step, order)
            forecast = [
                sum(w * features[c][i] for w, c in zip(weights, computed, strict=True)) for i in range(len(features[0]))
            ]
            truth = added(features[step], step)
            total += ((added(forecast, step) - truth).norm() / truth.norm()).item()
        return total

    first = tuple(range(order + 1))
    errors = {
        (*first, *rest): error((*first, *rest)) for rest in itertools.combinations(range(order + 1, 5), 2 - order)
    }
    found = schedule_from_run(model, forwards(name, model), mode=mode, computed_steps=3)
    chosen = tuple(step for step, computed in enumerate(found.schedule) if computed)
    assert found.timesteps == STEPS
    assert found.error == pytest.approx(errors[chosen], rel=0.03)
    assert errors[chosen] <= 1.03 * min(errors.values())
    assert max(errors.values()) > 1.05 * min(errors.values())


def test_runs_of_a_schedule():
    name = "PixArtTransformer2DModel"
    model = make_tiny(name)
    alone = schedule_from_run(model, forwards(name, model), computed_steps=2)
    both = schedule_from_run(model, lambda: [forwards(name, model)() for _ in range(2)], computed_steps=2)
    assert (both.schedule, both.timesteps) == (alone.schedule, alone.timesteps)
    assert both.error == pytest.approx(alone.error)
    inputs = run_of(name)
    prompt = inputs_of(name)["encoder_hidden_states"]
    other = [{**given, "encoder_hidden_states": prompt} for given in inputs[1:]]
    with pytest.raises(ConfigError, match="one run has 5 steps from timestep 900 on and another 4"):
        schedule_from_run(model, lambda: [model(**given) for given in (*inputs, *other)], computed_steps=2)
    with pytest.raises(ConfigError, match="timesteps rise from 500 to 900"):
        schedule_from_run(model, lambda: [model(**given) for given in (*inputs, *inputs)], computed_steps=2)
    with pytest.raises(DataError, match="the function did not run this PixArtTransformer2DModel"):
        schedule_from_run(model, lambda: None, computed_steps=2)
    with pytest.raises(ConfigError, match=r"computed_steps is 6; .* can compute 1 to 5"):
        schedule_from_run(model, forwards(name, model), computed_steps=6)
    with pytest.raises(ModelError, match="DiTTransformer2DModel and PixArtTransformer2DModel; got Linear"):
        schedule_from_run(torch.nn.Linear(2, 2), lambda: None, computed_steps=2)


@pytest.fixture(params=["PixArtAlphaPipeline", "PixArtSigmaPipeline"])
def pixart(request):
    """A pipeline of random weights, and a function that draws with it from two prompts."""
    pytest.importorskip("transformers")  # which the pipeline wants, though no text is encoded here
    import diffusers

    model = make_tiny("PixArtTransformer2DModel")
    latents, channels = model.config.in_channels, model.config.caption_channels
    vae = diffusers.AutoencoderKL(latent_channels=latents, block_out_channels=(8,), norm_num_groups=4)
    pipe = getattr(diffusers, request.param)(None, None, vae, model, diffusers.DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    prompt, mask = torch.randn(2, 4, channels), torch.ones(2, 4)

    def draw():
        return pipe(
            None, None, num_inference_steps=6, height=16, width=16, use_resolution_binning=False, output_type="latent",
            prompt_embeds=prompt, prompt_attention_mask=mask, negative_prompt_embeds=-prompt,
            negative_prompt_attention_mask=mask, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    return pipe, draw


@pytest.mark.parametrize(("mode", "order"), [("block", 1), ("branch", 1), ("taylor", 1), ("taylor", 2)])
def test_pixart_is_quantized_calibrated_cached_and_sampled_in_its_own_pipeline(pixart, mode, order):
    pipe, draw = pixart
    name, model = "PixArtTransformer2DModel", quantize_model(pipe.transformer)
    with calibration(model):
        draw()
    assert sum(layer.act_scale is not None for layer in quant_layers(model).values()) >= 12
    plain = draw()
    found = schedule_from_run(model, draw, mode=mode, order=order, computed_steps=4)
    assert found.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    slow = copy.deepcopy(model)
    cache = apply_cache(model, config=found.config())
    calls = []
    handle = model.register_forward_hook(
        lambda model, args, kwargs, output: calls.append(({"hidden_states": args[0], **kwargs}, output[0])),
        with_kwargs=True,
    )
    images = draw()
    handle.remove()
    assert (cache.compute_steps, cache.reuse_steps) == (4, 2)
    expected = defined(name, slow, found.config(), [given for given, _ in calls])
    for (_, mine), theirs in zip(calls, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert torch.isfinite(images).all()
    assert torch.equal(images, draw())
    assert not torch.equal(images, plain)
    remove_cache(model)
    assert torch.equal(draw(), plain)
