"""Linear layers of many blocks at once, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc_kernels import batched_linear
from qandc_kernels.tiles.tables import Gpu
from tests.kernels.oracle import assert_summed, float_dtypes

# (L, M, N, K)
SHAPES = [(3, 2, 128, 128), (2, 1, 70, 100), (1, 17, 64, 33), (2, 64, 65, 129), (2, 65, 16, 16), (1, 1, 1, 1)]
LARGE_SHAPES = [(28, 2, 6912, 1152), (4, 16, 1152, 256), (5, 64, 6912, 1152)]


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch, kernel_device):
    if kernel_device.type == "cpu":
        monkeypatch.setattr("qandc_kernels.triton.batched.gpu_of", lambda device: Gpu("", (9, 0), 4))


def assert_product(y, x, weight, bias):
    expected, terms = (
        f(x.double()) @ f(weight.double()).mT + f(bias.double())[:, None] for f in (torch.positive, torch.abs)
    )
    assert_summed(y, expected, terms, x.shape[2], casts=2 if x.shape[1] > 64 else 1)  # those take torch's product


def check(device, shape, generator, dtype, share=1.0, shared_input=False):
    layers, m, n, k = shape
    x = torch.randn(1 if shared_input else layers, m, k, generator=generator).to(dtype).expand(layers, m, k)
    weight = (torch.randn(layers, n, k, generator=generator) * k**-0.5).to(dtype)
    bias = torch.randn(layers, n, generator=generator).to(dtype)
    y = batched_linear(x.to(device), weight.to(device), bias.to(device), share)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_product(y, x, weight, bias)


@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=str)
def test_against_float64(kernel_device, shape, seeded):
    if kernel_device.type == "cpu" and shape in LARGE_SHAPES:
        pytest.skip("too large for the interpreter")
    for dtype in float_dtypes(kernel_device):
        for shared_input in (False, True):
            check(kernel_device, shape, seeded, dtype, shared_input=shared_input)


def test_every_third_layer_is_read_where_it_is(kernel_device, seeded):
    for dtype in float_dtypes(kernel_device):
        x = torch.randn(2, 3, 40, generator=seeded).to(dtype)
        weight, bias = (
            torch.randn(6, 70, 40, generator=seeded).to(dtype),
            torch.randn(6, 70, generator=seeded).to(dtype),
        )
        y = batched_linear(x.to(kernel_device), weight.to(kernel_device)[2::3], bias.to(kernel_device)[2::3])
        assert_product(y, x, weight[2::3], bias[2::3])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 150), st.integers(1, 150)),
    share=st.sampled_from([0.01, 0.5, 3]),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(kernel_device, shape, share, seed):
    check(kernel_device, shape, torch.Generator().manual_seed(seed), torch.float16, share)
