"""The caches of diffusers itself on quantized models: what docs/caching.md says of them."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import hooks

from qandc import CacheError, apply_cache, quantize_model
from tests.test_families import FLUX, WAN, Z_IMAGE, run_of
from tests.tiny_models import make_tiny, output_of, speed_of

QWEN = "QwenImageTransformer2DModel"
CONFIGS = {
    "taylorseer": diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
    "first block": diffusers.FirstBlockCacheConfig(threshold=0.5),
    "mag": diffusers.MagCacheConfig(threshold=0.5, mag_ratios=[1.0] * 10, num_inference_steps=10),
    "pyramid attention": diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        cross_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}
WORKS = [(name, kind) for name in (FLUX, QWEN, WAN) for kind in CONFIGS if (name, kind) != (WAN, "taylorseer")]


def run(model, inputs):
    """Return the outputs of all steps of a run, as one tensor."""
    with torch.no_grad(), model.cache_context("cond"):
        return torch.stack([output_of(model, given) for given in inputs])


@pytest.mark.parametrize(("name", "kind"), [pytest.param(*case, marks=speed_of(case[0])) for case in WORKS])
def test_they_change_a_quantized_model_as_they_change_the_model(name, kind):
    model, inputs, changes = make_tiny(name), run_of(name), []
    for quantized in (False, True):
        if quantized:
            quantize_model(model)
        plain = run(model, inputs)
        model.enable_cache(CONFIGS[kind])
        found = run(model, inputs)
        with pytest.raises(CacheError, match="was replaced on the instance"):
            apply_cache(model)
        model.disable_cache()
        assert torch.equal(run(model, inputs), plain)
        changes.append(found - plain)
    full, ours = changes
    assert full.norm() > 0.005 * plain.norm()
    assert (ours - full).norm() < 0.2 * full.norm()


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", WAN, Z_IMAGE])
def test_taylorseer_attaches_to_nothing_there(name):
    model, inputs = make_tiny(name), run_of(name)[:5]
    plain = [output_of(model, given) for given in inputs]
    hooks.apply_taylorseer_cache(model, CONFIGS["taylorseer"])
    for given, expected in zip(inputs, plain, strict=True):
        assert torch.equal(output_of(model, given), expected)
