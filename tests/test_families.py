"""Caches of every family of models equal their definition, computed from a model without a cache."""

from __future__ import annotations

import copy

import pytest
import torch

from qandc import CacheConfig, apply_cache, calibrate, get_cache, quantize_model, remove_cache, reset_all_caches
from qandc.caching.schedule import forecast_weights
from qandc.models import FAMILIES, family_of
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


@pytest.mark.parametrize("mode", ["block", "branch", "taylor"])
def test_pixart_is_sampled_through_its_own_pipeline(mode):
    pytest.importorskip("transformers")  # which the pipeline wants, though no text is encoded here
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline

    model = quantize_model(make_tiny("PixArtTransformer2DModel"))
    latents, channels = model.config.in_channels, model.config.caption_channels
    vae = AutoencoderKL(latent_channels=latents, block_out_channels=(8,), norm_num_groups=4)
    pipe = PixArtSigmaPipeline(None, None, vae, model, DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    cache = apply_cache(model, config=CacheConfig(mode, 2))
    prompt, mask = torch.randn(1, 4, channels), torch.ones(1, 4)
    arguments = {
        "prompt_embeds": prompt, "prompt_attention_mask": mask, "negative_prompt_embeds": -prompt,
        "negative_prompt_attention_mask": mask, "prompt": None, "negative_prompt": None, "num_inference_steps": 5,
        "height": 16, "width": 16, "use_resolution_binning": False, "output_type": "latent",
    }  # fmt: skip
    first = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert (cache.compute_steps, cache.reuse_steps) == (3, 2)
    again = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(first, again)
    assert get_cache(model) is cache
    remove_cache(model)
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain)
