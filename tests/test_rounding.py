"""Rounding with GPTQ: by its definition, what it gains, what it refuses; the Hessians it needs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qandc import (
    ConfigError,
    DataError,
    ModelError,
    QuantLinear,
    apply_cache_to_dit,
    input_hessians,
    quantize_model,
    smoothing_factors,
)
from qandc.quantization.conversion import quant_layers
from qandc.quantizer import gptq_round, quantize_weight
from qandc_kernels import unpack_int4

QMAX = 7


def correlated(n, k, generator, rows=400):
    """Inputs that share a few directions, as those of a network do."""
    return torch.randn(rows, 4, generator=generator) @ torch.randn(4, k, generator=generator) + 0.3 * torch.randn(
        rows, k, generator=generator
    )


def by_definition(weight, scale, hessian, qmax, damping=0.01):
    """Optimal brain quantization in a fixed order: round a column, let all that are left make good its error."""
    w, h = weight.double().clone(), hessian.double().clone()
    order = torch.argsort(h.diagonal(), descending=True)
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    q = torch.zeros_like(w)
    left = order.tolist()
    while left:
        i = left.pop(0)
        q[:, i] = (w[:, i] / scale).round().clamp(-qmax, qmax)
        error = w[:, i] - q[:, i] * scale
        if left:  # least squares over what is left: w_left -= error · H_left⁻¹ h_i, from the normal equations
            rest = torch.tensor(left)
            w[:, rest] += error[:, None] * torch.linalg.solve(h[rest][:, rest], h[rest, i])
    return q.to(torch.int8)


@pytest.mark.parametrize(("n", "k"), [(5, 1), (8, 12), (16, 40)])
def test_equals_its_definition(n, k, seeded):
    x, weight = correlated(n, k, seeded), torch.randn(n, k, generator=seeded)
    _, scale = quantize_weight(weight, 4)
    found = gptq_round(weight, scale, x.T @ x, QMAX)
    assert torch.equal(found, by_definition(weight, scale, x.T @ x, QMAX))


def test_blocks_of_columns_change_nothing(seeded, monkeypatch):
    """300 columns are three blocks, the last one short; one large block must agree but for rounding of ties."""
    x, weight = correlated(8, 300, seeded), torch.randn(8, 300, generator=seeded)
    _, scale = quantize_weight(weight, 4)
    found = gptq_round(weight, scale, x.T @ x, QMAX)
    monkeypatch.setattr("qandc.quantizer.FEEDBACK_BLOCK", 1000)
    assert (found != gptq_round(weight, scale, x.T @ x, QMAX)).double().mean() < 0.01


def test_independent_inputs_of_one_size_leave_rounding_to_nearest(seeded):
    weight = torch.randn(6, 20, generator=seeded)
    q, scale = quantize_weight(weight, 4)
    assert torch.equal(gptq_round(weight, scale, 3 * torch.eye(20), QMAX), q)


@pytest.mark.parametrize(("bits", "gain"), [(4, 4), (8, 4)])
def test_the_output_error_is_a_fraction_of_that_of_rounding_to_nearest(bits, gain, seeded):
    x, weight = correlated(32, 64, seeded, rows=2000), torch.randn(32, 64, generator=seeded)
    q, scale = quantize_weight(weight, bits)
    found = gptq_round(weight, scale, x.T @ x, (1 << bits - 1) - 1)
    nearest, better = (((weight - scale[:, None] * which) @ x.T).square().sum() for which in (q, found))
    assert better * gain < nearest


def test_inputs_that_were_always_zero(seeded):
    x, weight = correlated(4, 10, seeded), torch.randn(4, 10, generator=seeded)
    x[:, 3] = 0
    q, scale = quantize_weight(weight, 4)
    found = gptq_round(weight, scale, x.T @ x, QMAX)
    assert torch.equal(found[:, 3], q[:, 3])
    assert torch.equal(gptq_round(weight, scale, torch.zeros(10, 10), QMAX), q)


@pytest.mark.parametrize(
    ("hessian", "damping", "error", "message"),
    [
        (torch.eye(4), 0.01, DataError, r"\[5, 5\]; got \[4, 4\]"),
        (torch.full((5, 5), float("nan")), 0.01, DataError, "not positive definite or not finite"),
        (-torch.eye(5), 0.01, DataError, "not positive definite"),
        (torch.eye(5), 0.0, ConfigError, "damping is 0.0"),
    ],
)
def test_refused(hessian, damping, error, message):
    with pytest.raises(error, match=message):
        gptq_round(torch.ones(3, 5), torch.ones(3), hessian, QMAX, damping)


def test_hessians_are_sums_over_all_inputs(dit, dit_inputs):
    seen = []
    layer = dit.transformer_blocks[1].attn1.to_k
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    other = {**dit_inputs, "timestep": torch.tensor([20]).expand(4)}
    found = input_hessians(dit, [dit_inputs, other])
    handle.remove()
    x = torch.cat(seen).double()
    name = "transformer_blocks.1.attn1.to_"
    torch.testing.assert_close(found[f"{name}k"].double(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert found[f"{name}k"] is found[f"{name}q"] is found[f"{name}v"]
    assert found.keys() == quant_layers(quantize_model(copy.deepcopy(dit))).keys()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_hessians_of_half_precision_inputs_are_sums_in_float32(device, seeded):
    """Also under autocast, which would multiply in half precision."""
    model = nn.Sequential(nn.Linear(64, 64, device=device, dtype=torch.bfloat16))
    x = torch.randn(4096, 64, generator=seeded).to(device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        found = input_hessians(model, [x])["0"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-2)


def test_a_cache_does_not_hide_inputs(dit, dit_inputs):
    batches = [{**dit_inputs, "timestep": torch.tensor([t]).expand(4)} for t in (900, 800, 700)]
    expected = input_hessians(dit, batches)
    apply_cache_to_dit(dit, cache_interval=3)
    found = input_hessians(dit, batches)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hessians_need_layers(dit, dit_inputs):
    with pytest.raises(ModelError, match="before quantizing"):
        input_hessians(quantize_model(dit), [dit_inputs])


def test_whole_model(dit, dit_inputs):
    """The named layers hold the integers of their own Hessians, the others those nearest; the output comes closer."""
    with torch.no_grad():
        expected = dit(**dit_inputs)[0]
    hessians = input_hessians(dit, [dit_inputs])
    nearest = quantize_model(copy.deepcopy(dit), 4)
    name = "transformer_blocks.2.ff.net.2"
    one = quantize_model(copy.deepcopy(dit), 4, hessians={name: hessians[name]})
    for layer in quant_layers(one):
        same = torch.equal(quant_layers(one)[layer].qweight, quant_layers(nearest)[layer].qweight)
        assert same == (layer != name), layer
    weight = dit.get_submodule(name).weight
    q = gptq_round(weight, quantize_weight(weight, 4)[1], hessians[name], QMAX)
    found = quant_layers(one)[name]
    assert torch.equal(unpack_int4(found.qweight), q)
    assert torch.equal(found.weight_sum, q.sum(1, dtype=torch.int32))
    better = quantize_model(dit, 4, weight_clip="mse", hessians=hessians)
    with torch.no_grad():
        errors = [(model(**dit_inputs)[0] - expected).norm() for model in (nearest, better)]
    assert errors[1] < 0.75 * errors[0]


def test_smoothed_inputs_have_a_smoothed_hessian(seeded):
    layer, x = nn.Linear(12, 5), correlated(5, 12, seeded)
    factors = torch.rand(12, generator=seeded) + 0.5
    found = QuantLinear.from_linear(layer, 4, 8, factors, hessian=x.T @ x)
    weight = layer.weight.detach() * factors
    smoothed = x / factors
    q = gptq_round(weight, quantize_weight(weight, 4)[1], smoothed.T @ smoothed, QMAX)
    assert torch.equal(unpack_int4(found.qweight), q)


def test_names_must_be_of_layers_that_are_quantized(dit, dit_inputs):
    factors = smoothing_factors(dit, [dit_inputs], ["proj_out_2"])
    with pytest.raises(ConfigError, match=r"hessians names 'proj_out_3'"):
        quantize_model(dit, 4, smoothing=factors, hessians={"proj_out_3": torch.eye(32)})
    assert not quant_layers(dit)
