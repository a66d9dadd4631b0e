"""LayerNorm, modulation and quantization in one kernel, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc_kernels import adaln_quantize_per_tensor, adaln_quantize_per_token, reference
from qandc_kernels.tiles.tables import Gpu
from tests.kernels.oracle import NAN, assert_close, assert_rounded, float_dtypes

# numpy, under the interpreter, tells of infinities that are meant to happen
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# (samples, tokens, K); rows that are no multiple of those of a program, K below, at and above powers of two
SHAPES = [(2, 16, 192), (3, 5, 100), (1, 9, 1), (2, 8, 64), (1, 1, 65)]
LARGE_SHAPES = [(64, 256, 1152), (2, 1024, 1152), (3, 33, 4608), (1, 7, 10000)]


def make(shape, generator, dtype=torch.float32):
    samples, _, k = shape
    x = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    modulation = torch.randn(samples, 6 * k, generator=generator).to(dtype)
    return x, modulation


def exact(x, shift, scale):
    y = F.layer_norm(x.double(), x.shape[-1:], eps=1e-6)
    return y * (1 + scale.double()[:, None]) + shift.double()[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=str)
def test_against_float64(kernel_device, shape, seeded):
    if kernel_device.type == "cpu" and shape in LARGE_SHAPES:
        pytest.skip("too large for the interpreter")
    k = shape[2]
    q_scale, zero_point = torch.tensor(0.021), torch.tensor(17, dtype=torch.int32)
    for dtype in float_dtypes(kernel_device):
        x, modulation = make(shape, seeded, dtype)
        shift, scale = modulation[:, k : 2 * k], modulation[:, 2 * k : 3 * k]
        y = exact(x, shift, scale)
        on_device = modulation.to(kernel_device)
        arguments = x.to(kernel_device), on_device[:, k : 2 * k], on_device[:, 2 * k : 3 * k]
        q = adaln_quantize_per_tensor(*arguments, q_scale.to(kernel_device), zero_point.to(kernel_device))
        assert_rounded(q, y / q_scale.double() + 17)
        copied = torch.empty_like(arguments[0])
        q = adaln_quantize_per_tensor(*arguments, q_scale.to(kernel_device), out_x=copied)
        assert_rounded(q, y / q_scale.double())
        assert torch.equal(copied, arguments[0])
        q, token_scale = adaln_quantize_per_token(*arguments)
        # the smallest rows are all shift; the scale is that of the largest value
        assert_close(token_scale, y.abs().amax(-1).clamp(min=1e-10) / 127, size=0.1)
        assert_rounded(q, y / token_scale.cpu().double()[..., None])


def test_reference(seeded):
    x, modulation = make((3, 5, 100), seeded)
    shift, scale = modulation[:, :100], modulation[:, 100:200]
    y = exact(x, shift, scale)
    q_scale, zero_point = torch.tensor(0.05), torch.tensor(-3, dtype=torch.int32)
    assert_rounded(reference.adaln_quantize_per_tensor(x, shift, scale, q_scale, zero_point), y / q_scale.double() - 3)
    q, token_scale = reference.adaln_quantize_per_token(x, shift, scale)
    assert_close(token_scale, y.abs().amax(-1) / 127)
    assert_rounded(q, y / token_scale.double()[..., None])


def test_strided_input(kernel_device, seeded):
    x, modulation = make((2, 12, 128), seeded)
    shift, scale = modulation[:, :64], modulation[:, 64:128]
    x, shift, scale = x.to(kernel_device), shift.to(kernel_device), scale.to(kernel_device)
    q_scale = torch.tensor(0.05, device=kernel_device)
    for view in (x[..., :64], x[..., ::2], x[:, ::3, 64:], x.transpose(0, 1)[:2, :, :64]):
        assert not view.is_contiguous()
        expected = adaln_quantize_per_tensor(view.contiguous(), shift, scale, q_scale)
        for op, others in ((adaln_quantize_per_tensor, (q_scale,)), (adaln_quantize_per_token, ())):
            copied = torch.empty(view.shape, device=kernel_device)
            found = op(view, shift, scale, *others, out_x=copied)
            assert torch.equal(copied, view)
            assert op is adaln_quantize_per_token or torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 9, 7), (29, 1, 16), (2, 8, 33)], ids=str)
def test_several_rows_per_program(kernel_device, monkeypatch, shape, seeded):
    """As on a GPU with one multiprocessor: programs of four rows, the last one with fewer, samples of any length."""
    monkeypatch.setattr("qandc_kernels.triton.adaln.gpu_of", lambda device: Gpu("small", (9, 0), 1))
    x, modulation = make(shape, seeded)
    k = shape[2]
    shift, scale = modulation[:, :k], modulation[:, k : 2 * k]
    on_device = modulation.to(kernel_device)
    arguments = x.to(kernel_device), on_device[:, :k], on_device[:, k : 2 * k]
    q_scale = torch.tensor(0.03)
    y = exact(x, shift, scale)
    assert_rounded(adaln_quantize_per_tensor(*arguments, q_scale.to(kernel_device)), y / q_scale.double())
    q, token_scale = adaln_quantize_per_token(*arguments)
    assert_rounded(q, y / token_scale.cpu().double()[..., None])


def test_one_token_per_sample(kernel_device, seeded):
    """torch ignores the stride of a dimension of size 1, and calls such a view contiguous."""
    base = torch.randn(5, 3, 32, generator=seeded).to(kernel_device)
    shift, scale = torch.randn(2, 3, 32, generator=seeded).to(kernel_device)
    q_scale = torch.tensor(0.03, device=kernel_device)
    view = base.transpose(0, 1)[:, :1]
    assert view.shape == (3, 1, 32)
    expected = adaln_quantize_per_tensor(view.clone(memory_format=torch.contiguous_format), shift, scale, q_scale)
    assert torch.equal(adaln_quantize_per_tensor(view, shift, scale, q_scale), expected)
    assert_rounded(expected, exact(view.cpu(), shift.cpu(), scale.cpu()) / 0.03)


def test_eps_and_strided_modulation(kernel_device, seeded):
    x = torch.randn(2, 4, 48, generator=seeded) * 0.01
    shift, scale = torch.randn(48, 2, generator=seeded).t(), torch.randn(48, 2, generator=seeded).t()
    y = F.layer_norm(x.double(), (48,), eps=1e-2) * (1 + scale.double()[:, None]) + shift.double()[:, None]
    arguments = [t.to(kernel_device) for t in (x, shift, scale, torch.tensor(0.01))]
    assert_rounded(adaln_quantize_per_tensor(*arguments, eps=1e-2), y / torch.tensor(0.01).double())


def test_constant_rows_and_zero_rows(kernel_device, seeded):
    """Nothing varies: the normalized row is 0, what remains is the shift."""
    x = torch.full((2, 4, 48), 3.0)
    x[1] = 0
    shift, scale = torch.randn(2, 48, generator=seeded), torch.randn(2, 48, generator=seeded)
    shift[1] = 0
    arguments = [t.to(kernel_device) for t in (x, shift, scale)]
    q, token_scale = adaln_quantize_per_token(*arguments)
    assert_rounded(q[0], (shift[0] / token_scale[0, 0].cpu()).double().expand(4, 48))
    assert not q[1].any()
    assert (token_scale[1] > 0).all()


def test_nan_and_infinities(kernel_device):
    x = torch.ones(1, 4, 32)
    x[0, :3, 0] = torch.stack([torch.tensor(2.0), NAN, torch.tensor(float("inf"))])
    zeros, q_scale = torch.zeros(1, 32), torch.tensor(0.1)
    expected = reference.adaln_quantize_per_tensor(x, zeros, zeros, q_scale)
    assert (expected[0, 1:3] == -128).all()
    arguments = [t.to(kernel_device) for t in (x, zeros, zeros)]
    assert torch.equal(adaln_quantize_per_tensor(*arguments, q_scale.to(kernel_device)).cpu(), expected)
    q, token_scale = adaln_quantize_per_token(*arguments)
    assert torch.equal(q.cpu(), reference.adaln_quantize_per_token(x, zeros, zeros)[0])
    assert token_scale.isnan().cpu().tolist() == [[False, True, True, False]]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 3), tokens=st.integers(1, 20), k=st.integers(1, 200),
    size=st.integers(-3, 4), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes(kernel_device, samples, tokens, k, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, modulation = make((samples, tokens, k), generator)
    x *= 10.0**size
    shift, scale = modulation[:, :k].contiguous(), modulation[:, k : 2 * k].contiguous()
    y = exact(x, shift, scale)
    q_scale = torch.tensor(0.05)
    arguments = [t.to(kernel_device) for t in (x, shift, scale, q_scale)]
    # a mean of thousands takes its digits from the values around it
    lost = x.abs().max().item() * 2**-22 / (x.double().var(-1, correction=0).min().item() + 1e-6) ** 0.5
    if lost < 1e-5:
        assert_rounded(adaln_quantize_per_tensor(*arguments), y / q_scale.double())


def test_no_rows(kernel_device):
    x, vector = torch.zeros(0, 4, 8, device=kernel_device), torch.zeros(0, 8, device=kernel_device)
    assert adaln_quantize_per_tensor(x, vector, vector, torch.tensor(1.0, device=kernel_device)).shape == (0, 4, 8)
    q, token_scale = adaln_quantize_per_token(x, vector, vector)
    assert (q.shape, token_scale.shape) == ((0, 4, 8), (0, 4))
