"""Guidance and an affine step per channel, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc_kernels import guided_step, reference
from tests.kernels.oracle import assert_close, float_dtypes

# (B, C, extra channels of the prediction, H, W)
SHAPES = [(1, 4, 4, 32, 32), (2, 4, 0, 8, 8), (3, 1, 2, 5, 7), (5, 3, 1, 1, 1)]
guidances = pytest.mark.parametrize("guidance_scale", [None, 0.0, 1.5, 7.0])


def make(shape, generator, dtype, guided):
    images, channels, extra, height, width = shape
    rows = 2 * images if guided else images
    prediction = torch.randn(rows, channels + extra, height, width, generator=generator).to(dtype)
    latents = torch.randn(images, channels, height, width, generator=generator)
    return prediction, latents, torch.randn(3, channels, generator=generator)


def expected_of(prediction, latents, coefficients, guidance_scale):
    """In float64, and the size of what is added up."""
    epsilon, channels = prediction.double(), latents.shape[1]
    size = 1.0
    if guidance_scale is not None:
        cond, uncond = epsilon.chunk(2)
        epsilon = uncond + guidance_scale * (cond - uncond)
        size += guidance_scale
    a, b, d = coefficients.double()[:, None, :, None, None]
    return a * latents.double() + b * epsilon[:, :channels] + d, 8 * size


def check(device, shape, generator, guidance_scale):
    for dtype in float_dtypes(device):
        arguments = make(shape, generator, dtype, guidance_scale is not None)
        expected, size = expected_of(*arguments, guidance_scale)
        for op, where in ((guided_step, device), (reference.guided_step, "cpu")):
            following, model_input = op(*(t.to(where) for t in arguments), guidance_scale)
            assert_close(following, expected, size)
            assert following.is_contiguous()
            assert model_input.dtype == dtype
            copies = following.to(dtype).repeat(len(arguments[0]) // shape[0], 1, 1, 1)
            assert torch.equal(model_input, copies)


@guidances
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guided_step(kernel_device, shape, guidance_scale, seeded):
    check(kernel_device, shape, seeded, guidance_scale)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 5), st.integers(1, 20), st.integers(1, 20)),
    guidance_scale=st.none() | st.floats(0, 10),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(kernel_device, shape, guidance_scale, seed):
    check(kernel_device, shape, torch.Generator().manual_seed(seed), guidance_scale)


@guidances
def test_any_strides(kernel_device, guidance_scale, seeded):
    arguments = make((2, 4, 1, 6, 10), seeded, torch.float16, guidance_scale is not None)
    expected, size = expected_of(*arguments, guidance_scale)
    scattered = [t.to(kernel_device).transpose(-1, -2).contiguous().transpose(-1, -2) for t in arguments]
    following, model_input = guided_step(*scattered, guidance_scale)
    assert_close(following, expected, size)
    assert following.is_contiguous()
    assert torch.equal(model_input, following.half().repeat(len(model_input) // 2, 1, 1, 1))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the interpreter
def test_extreme_values_go_where_they_belong(kernel_device, seeded):
    prediction, latents, coefficients = make((2, 3, 2, 4, 4), seeded, torch.float16, True)
    prediction[:, 3:] = float("nan")  # not read
    prediction[3, 1, 2, 0] = float("nan")  # without condition, image 1
    latents[0, 0, 1, 1] = 1e30  # beyond float16
    coefficients[0] = 1
    following, model_input = (
        t.cpu() for t in guided_step(*(t.to(kernel_device) for t in (prediction, latents, coefficients)), 2.0)
    )
    assert following.isnan().nonzero().tolist() == [[1, 1, 2, 0]]
    assert model_input.isnan().nonzero().tolist() == [[1, 1, 2, 0], [3, 1, 2, 0]]
    assert model_input.isinf().nonzero().tolist() == [[0, 0, 1, 1], [2, 0, 1, 1]]
    assert following[0, 0, 1, 1] == latents[0, 0, 1, 1]


def test_nothing_to_do(kernel_device):
    latents = torch.zeros(0, 4, 8, 8, device=kernel_device)
    following, model_input = guided_step(latents.half(), latents, torch.zeros(3, 4, device=kernel_device), 1.5)
    assert following.shape == model_input.shape == (0, 4, 8, 8)
