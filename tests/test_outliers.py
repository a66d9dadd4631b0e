"""Outliers in activations, planted into fashion-dit: what they cost, and what smoothing gains."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from qandc import calibrate, load_pipeline, make_scheduler, quantize_model, sample_latents, smoothing_factors
from qandc.evaluation.metrics import snr
from tests.conftest import recorded_calls


@pytest.fixture(scope="module")
def plant_outliers():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[1] / "training")
        from measure_outliers import plant_outliers
    return plant_outliers


@pytest.fixture(scope="module")
def recorded():
    """The full-precision model, inputs of it to calibrate with, others to measure with, and its outputs of these."""
    pipe = load_pipeline()
    model, scheduler = pipe.transformer, make_scheduler("ddim", pipe.scheduler.config)

    def inputs(first_seed):
        run = {"num_inference_steps": 4, "guidance_scale": 1.5, "seeds": [first_seed, first_seed + 1]}
        return recorded_calls(model, lambda: sample_latents(model, scheduler, [2, 8], **run))

    samples, others = inputs(100), inputs(0)
    return model, samples, others, outputs(model, others)


@torch.no_grad()
def outputs(model, calls):
    return torch.stack([model(*args, **kwargs)[0] for args, kwargs in calls])


@pytest.mark.slow
def test_planting_changes_no_output_and_many_inputs(plant_outliers, recorded):
    model, _, others, expected = recorded
    planted = plant_outliers(copy.deepcopy(model), 100)
    assert snr(outputs(planted, others), expected).mean() > 90
    largest = []
    for block in (model.transformer_blocks[5], planted.transformer_blocks[5]):
        seen = {}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name, seen=seen: seen.update({name: args[0].amax()}))
            for name, layer in (
                ("qkv", block.attn1.to_q),
                ("out", block.attn1.to_out[0]),
                ("fc1", block.ff.net[0].proj),
            )
        ]
        outputs(model if not largest else planted, others[:1])
        largest.append(seen)
        for handle in handles:
            handle.remove()
    assert all(largest[1][name] > 10 * value for name, value in largest[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(("times", "at_least"), [(1, -1), (100, 20)])
def test_what_smoothing_gains(plant_outliers, recorded, times, at_least):
    """W8A8 with static ranges: more than 20 dB beside outliers, and at most one less without any."""
    model, samples, others, expected = recorded
    found = {}
    for smooth in (False, True):
        planted = plant_outliers(copy.deepcopy(model), times)

        def run(planted=planted):
            outputs(planted, samples)

        quantize_model(planted, smoothing=smoothing_factors(planted, run) if smooth else None)
        calibrate(planted, run)
        found[smooth] = snr(outputs(planted, others), expected).mean().item()
    assert found[True] > 30
    assert found[True] - found[False] > at_least, found
