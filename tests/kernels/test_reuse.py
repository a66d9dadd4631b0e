"""The sum of a reuse step, and the branch output that a compute step leaves for it, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc_kernels import corrected_gates, gated_sum, linear_gate_residual_, reference
from tests.kernels.oracle import assert_close, assert_summed, float_dtypes, make_layer, to

# (S, L, K, samples, tokens, D)
SHAPES = [(1, 1, 1, 2, 16, 128), (2, 3, 2, 2, 7, 40), (3, 2, 2, 1, 1, 1), (1, 2, 2, 3, 5, 129), (2, 1, 1, 5, 8, 64)]
LARGE_SHAPES = [(1, 28, 2, 2, 256, 1152), (2, 28, 2, 2, 256, 1152), (1, 7, 2, 3, 255, 1152)]


def make(shape, generator, dtype=torch.float32, gated=True, integers=False, with_offset=False):
    sets, layers, branches, samples, tokens, width = shape
    x = torch.randn(samples, tokens, width, generator=generator).to(dtype)
    features, scales = torch.randn(*shape, generator=generator).to(dtype), None
    value = features.double()
    if integers:
        features = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scales = torch.rand(*shape[:5], generator=generator) / 50
        value = features.double() * scales.double()[..., None]
    weights = torch.randn(sets, generator=generator)
    expected = value * weights.double().view(-1, *[1] * 5)
    gates = None
    if gated:  # as a modulation holds them: rows are not next to each other
        modulation = torch.randn(layers, samples, 3 * branches, width, generator=generator).to(dtype)
        gates = modulation[:, :, 2::3].transpose(1, 2)
        expected = expected * gates.double()[:, :, :, None]
    offset = torch.randn(samples, width, generator=generator) if with_offset else None
    moved = 0 if offset is None else offset.double()[:, None]
    return (
        (x, features, gates, weights, scales, offset),
        x.double() + expected.sum((0, 1, 2)) + moved,
        x.double().abs() + expected.abs().sum((0, 1, 2)) + abs(moved),
    )


def moved(arguments, device):
    """On the device, with the strides they have."""
    x, features, gates, *others = arguments
    if gates is not None:
        whole = torch.zeros(gates.shape[0], gates.shape[2], 3 * gates.shape[1], gates.shape[3], dtype=gates.dtype)
        whole[:, :, 2::3] = gates.transpose(1, 2)
        gates = whole.to(device)[:, :, 2::3].transpose(1, 2)
    return [x.to(device), features.to(device), gates, *(None if t is None else t.to(device) for t in others)]


def check(device, shape, generator, **kinds):
    for dtype in float_dtypes(device):
        arguments, expected, terms = make(shape, generator, dtype, **kinds)
        additions = 4 * shape[0] * shape[1] * shape[2] + 1  # a feature times scale, gate and weight; and the offset
        actual = gated_sum(*moved(arguments, device))
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_summed(actual, expected, terms, additions)
        if expected.numel() < 1e5:
            assert_summed(reference.gated_sum(*arguments), expected, terms, additions)


@pytest.mark.parametrize(
    ("gated", "integers", "with_offset"),  # each pair of values is there
    [(False, False, False), (True, True, False), (True, False, True), (False, True, True)],
    ids=["plain", "gated int8", "gated offset", "int8 offset"],
)
@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=str)
def test_gated_sum(kernel_device, shape, gated, integers, with_offset, seeded):
    if kernel_device.type == "cpu" and shape in LARGE_SHAPES:
        pytest.skip("too large for the interpreter")
    check(kernel_device, shape, seeded, gated=gated, integers=integers, with_offset=with_offset)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 3, 2, 3, 70, 150))),
    gated=st.booleans(),
    integers=st.booleans(),
    with_offset=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(kernel_device, shape, gated, integers, with_offset, seed):
    generator = torch.Generator().manual_seed(seed)
    check(kernel_device, shape, generator, gated=gated, integers=integers, with_offset=with_offset)


def test_what_has_no_weight_is_not_read(kernel_device, seeded):
    (x, features, gates, *_), _, _ = make((3, 2, 2, 2, 9, 20), seeded)
    features[1] = float("nan")
    weights = torch.tensor([1.0, 0.0, -0.5])
    expected = reference.gated_sum(x, features[::2].contiguous(), gates, weights[::2].contiguous())
    assert torch.isfinite(expected).all()
    actual = gated_sum(*moved((x, features, gates, weights, None), kernel_device))
    assert_close(actual, expected.double(), size=10)


def test_no_weights_are_ones(kernel_device, seeded):
    (x, features, gates, *_), _, _ = make((2, 2, 2, 2, 9, 20), seeded)
    expected = reference.gated_sum(x, features, gates, torch.ones(2))
    assert_close(gated_sum(*moved((x, features, gates, None, None), kernel_device)), expected.double(), size=10)


def test_one_offset_of_all_samples(kernel_device, seeded):
    (x, features, *_), _, _ = make((1, 1, 1, 3, 9, 20), seeded)
    offset = torch.randn(1, 20, generator=seeded).expand(3, -1)
    expected = x.double() + features[0, 0, 0].double() + offset.double()[:, None]
    y = gated_sum(x.to(kernel_device), features.to(kernel_device), offset=offset[:1].to(kernel_device).expand(3, -1))
    assert_close(y, expected, size=4)


def test_nan_of_one_sample_stays_there(kernel_device, seeded):
    (x, features, gates, weights, *_), _, _ = make((1, 2, 2, 3, 9, 20), seeded)
    features[0, 1, 0, 1] = float("nan")
    y = gated_sum(*moved((x, features, gates, weights, None), kernel_device)).cpu()
    assert y[1].isnan().all()
    assert torch.isfinite(y[::2]).all()


def test_nothing_to_do(kernel_device):
    x = torch.zeros(0, 4, 8, device=kernel_device)
    assert gated_sum(x, x.new_zeros(1, 2, 2, 0, 4, 8)).shape == (0, 4, 8)


# L, K, samples, D
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 128), (3, 2, 2, 40), (2, 3, 1, 1), (28, 2, 2, 1152), (9, 2, 5, 129)], ids=str
)
def test_corrected_gates(kernel_device, shape, seeded):
    """Compare folded gates and offset with the float64 product of gates and gains, and sum of gates and offsets."""
    layers, branches, samples, width = shape
    gains, offsets = torch.randn(2, layers, branches, width, generator=seeded)
    for dtype in float_dtypes(kernel_device):
        whole = torch.randn(layers, samples, 3 * branches, width, generator=seeded).to(dtype)
        gates = whole[:, :, 2::3].transpose(1, 2)
        factors = gates.double()
        product, terms = factors * gains[:, :, None], factors * offsets[:, :, None]
        on_device = whole.to(kernel_device)[:, :, 2::3].transpose(1, 2)
        for found, offset in (
            corrected_gates(on_device, gains.to(kernel_device), offsets.to(kernel_device)),
            reference.corrected_gates(gates, gains, offsets),
        ):
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert_close(found, product, size=product.abs().max().item())
            assert offset.dtype == torch.float32
            assert_summed(offset, terms.sum((0, 1)), terms.abs().sum((0, 1)), layers * branches)


def test_corrected_gates_of_nothing(kernel_device):
    gates, gains = (torch.zeros(*shape, 8, device=kernel_device) for shape in ((2, 2, 0), (2, 2)))
    found, offset = corrected_gates(gates, gains, gains)
    assert (found.shape, offset.shape) == (gates.shape, (0, 8))


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@pytest.mark.parametrize("shape", [(2, 64, 48, 64), (3, 35, 40, 96), (2, 1, 33, 32), (2, 256, 1152, 1152)], ids=str)
def test_a_product_leaves_its_branch(kernel_device, shape, bits, seeded):
    """``out_branch`` takes y before its gate; the residual is what it is without it."""
    if kernel_device.type == "cpu" and shape[2] == 1152:
        pytest.skip("too large for the interpreter")
    samples, tokens, n, _ = shape
    p, y = make_layer(shape, seeded, bits=bits)
    gate = torch.randn(samples, n, generator=seeded)
    for dtype in float_dtypes(kernel_device):
        residual = torch.randn(samples, tokens, n, generator=seeded).to(dtype)
        expected = residual.double() + gate.double()[:, None] * y
        for kept in {dtype, torch.float32}:
            actual = residual.to(kernel_device, copy=True)
            branch = torch.empty(y.shape, dtype=kept, device=kernel_device)
            linear_gate_residual_(actual, gate=gate.to(kernel_device), **to(kernel_device, p), out_branch=branch)
            assert_close(branch, y)
            assert_close(actual, expected, size=(gate.double().abs()[:, None] * y.abs()).max().item())
            if y.numel() < 1e5:
                on_cpu, branch = residual.clone(), torch.empty(y.shape, dtype=kept)
                reference.linear_gate_residual_(on_cpu, gate=gate, **p, out_branch=branch)
                assert_close(branch, y)
                assert_close(on_cpu, expected, size=(gate.double().abs()[:, None] * y.abs()).max().item())
