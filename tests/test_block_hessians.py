"""Hessians block by block: those of all layers at once, in less memory, and each block runs once."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

from qandc import (
    DataError,
    ModelError,
    apply_cache,
    block_hessians,
    input_hessians,
    pool_from_run,
    quantize_model,
    remove_cache,
    smoothing_factors,
)
from qandc.models import FAMILIES
from qandc.quantization.conversion import quant_layers
from qandc.quantizer import gptq_round
from tests.test_families import forwards, run_of
from tests.tiny_models import make_tiny, output_of

FLUX, SD3 = "FluxTransformer2DModel", "SD3Transformer2DModel"


def batches_of(name, steps=(900, 600, 300)):
    return [{**given, "return_dict": False} for given in run_of(name, steps)]


def test_blocks_that_are_offloaded():
    """diffusers brings the weights of a block when it is entered; those that are passed over stay where they are."""
    model, batches, device = make_tiny(FLUX), batches_of(FLUX), torch.device("cpu")
    expected = input_hessians(model, batches)
    model.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)
    for layer, found in block_hessians(model, batches).items():
        assert torch.equal(found, expected[layer])


@pytest.mark.gpu
def test_offloaded_weights_are_rounded_where_blocks_run(monkeypatch):
    where, models, device = [], [make_tiny(FLUX), make_tiny(FLUX).cuda()], torch.device("cuda")
    models[0].enable_group_offload(device, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    batches = tree_map_only(torch.Tensor, lambda x: x.cuda(), batches_of(FLUX))

    def noted(weight, *args):
        where.append(weight.device.type)
        return gptq_round(weight, *args)

    monkeypatch.setattr("qandc.quantization.linear.gptq_round", noted)
    for model in models:
        quantize_model(model, w_bits=4, weight_clip="mse", hessians=block_hessians(model, batches))
    assert set(where) == {"cuda"}
    ours, theirs = (quant_layers(model) for model in models)
    for name, layer in ours.items():
        assert layer.qweight.is_cpu
        assert torch.equal(layer.qweight, theirs[name].qweight.cpu())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("skip_patterns", [None, ["norm"]], ids=["blocks", "all"])
def test_hessians_are_those_of_all_layers_at_once(name, skip_patterns):
    model, batches = make_tiny(name), batches_of(name)
    expected = input_hessians(model, batches, skip_patterns)
    found = block_hessians(model, batches, skip_patterns)
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    for layer in found:
        assert torch.equal(found[layer], expected[layer]), layer
    plain = output_of(make_tiny(name), batches[0])
    assert torch.equal(output_of(model, batches[0]), plain)


def test_blocks_may_be_asked_for_in_any_order():
    model, batches = make_tiny(FLUX), batches_of(FLUX)
    expected, found = input_hessians(model, batches), block_hessians(model, lambda: iter(batches))
    for layer in (*reversed(expected), *list(expected)[::3]):
        assert torch.equal(found[layer], expected[layer])


@pytest.mark.slow
def test_weights_are_rounded_as_with_all_hessians_at_once():
    """Also where layers are smoothed: the model stays in full precision until all are rounded."""
    name, models = FLUX, [make_tiny(FLUX) for _ in range(2)]
    pool = pool_from_run(models[0], forwards(name, models[0]))
    smoothing = smoothing_factors(models[0], pool.batches())
    for model, hessians in zip(
        models, (block_hessians(models[0], pool.batches), input_hessians(models[1], pool.batches())), strict=True
    ):
        quantize_model(model, w_bits=4, weight_clip="mse", smoothing=smoothing, hessians=hessians)
    ours, theirs = (model.state_dict() for model in models)
    nearest = quantize_model(make_tiny(FLUX), w_bits=4, weight_clip="mse", smoothing=smoothing).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert any(not torch.equal(value, nearest[key]) for key, value in ours.items() if key.endswith("qweight"))


def square_numbers():
    """Count the numbers of all square float32 matrices that are alive, of Hessians, no parameters."""
    found = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.float32 and x.ndim == 2)
    return sum(x.numel() for x in found if x.shape[0] == x.shape[1])


def test_each_block_runs_once_and_its_hessians_alone_are_in_memory():
    model, batches = make_tiny(FLUX, num_layers=3, num_single_layers=4), batches_of(FLUX)
    before, ran, alive = square_numbers(), Counter(), []
    whole = input_hessians(model, batches)
    of_all = square_numbers() - before
    del whole
    smoothing = dict(reversed(smoothing_factors(model, batches).items()))

    def look(norm, *args):  # layers that are quantized must have no hooks; norms come first in blocks
        ran[norm] += 1
        alive.append(square_numbers() - before)

    norms = [model.get_submodule(f"transformer_blocks.{i}.norm1") for i in range(3)]
    norms += [model.get_submodule(f"single_transformer_blocks.{i}.norm") for i in range(4)]
    for norm in norms:
        norm.register_forward_hook(look)
    quantize_model(model, w_bits=4, smoothing=smoothing, hessians=block_hessians(model, batches))
    assert ran == dict.fromkeys(norms, len(batches))
    assert 0 < max(alive) < of_all / 3


def test_a_model_with_a_cache_or_compiled_blocks():
    model, batches = make_tiny(FLUX), batches_of(FLUX)
    expected = input_hessians(model, batches)
    apply_cache(model)
    for layer, found in block_hessians(model, batches).items():
        assert torch.equal(found, expected[layer])
    remove_cache(model)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="eager")
    for layer, found in block_hessians(model, batches).items():
        assert torch.equal(found, expected[layer])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_added_between_blocks_is_added():
    model, batches = make_tiny(FLUX), batches_of(FLUX)
    noise = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    given = [{**batch, "controlnet_block_samples": [noise, -noise]} for batch in batches]
    expected, without = input_hessians(model, given), input_hessians(model, batches)
    found = block_hessians(model, given)
    for layer in expected:
        assert torch.equal(found[layer], expected[layer])
    assert not torch.equal(
        expected["single_transformer_blocks.0.attn.to_q"], without["single_transformer_blocks.0.attn.to_q"]
    )


def test_what_cannot_be_gathered_is_refused():
    model, batches = make_tiny(SD3), batches_of(SD3)
    with pytest.raises(ModelError, match=r"blocks are known of diffusers' DiT.*; got Linear \(input_hessians takes"):
        block_hessians(torch.nn.Linear(2, 2), batches)
    with pytest.raises(DataError, match="batches can be seen once only; give a list, or a function"):
        block_hessians(model, iter(batches))
    with pytest.raises(ModelError, match="gather Hessians before quantizing"):
        block_hessians(quantize_model(copy.deepcopy(model)), batches)
    found = block_hessians(model, partial(list, [{"hidden_states": 3}]))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="a batch is no input of SD3Transformer2DModel"):
        quantize_model(model, hessians=found)
    with pytest.raises(DataError, match="the calibration set is empty"):
        quantize_model(model, hessians=block_hessians(model, []))
    skipping = [*batches, {**batches[0], "skip_layers": [1]}]
    with pytest.raises(DataError, match=r"batch 3 does not run block 1 \(skip_layers\?\); leave it out"):
        quantize_model(model, hessians=block_hessians(model, skipping))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
