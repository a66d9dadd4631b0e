"""Quantization kernels against the reference: every integer equal, every scale equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc_kernels import gelu_quantize_per_token, quantize_per_tensor, quantize_per_token, reference
from tests.kernels.oracle import NAN, assert_rounded, float_dtypes, gelu

SHAPES = [(1, 1), (1, 192), (17, 33), (256, 100), (727, 7), (3, 1152), (2, 4608)]
ZERO_POINTS = [None, -128, 11]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_per_tensor_equals_reference(kernel_device, shape, zero_point, seeded):
    z = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
    for dtype in float_dtypes(kernel_device):
        x = (torch.randn(shape, generator=seeded) * 4).to(dtype)
        for bits in (4, 6, 8):
            scale = torch.tensor(0.037)
            expected = reference.quantize_per_tensor(x, scale, z, bits)
            actual = quantize_per_tensor(
                x.to(kernel_device), scale.to(kernel_device), None if z is None else z.to(kernel_device), bits
            )
            assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_per_token_equals_reference(kernel_device, shape, seeded):
    for dtype in float_dtypes(kernel_device):
        x = (torch.randn(shape, generator=seeded) * torch.logspace(-6, 4, shape[0])[:, None]).to(dtype)
        for bits in (4, 8):
            q, scale = quantize_per_token(x.to(kernel_device), bits)
            expected_q, expected_scale = reference.quantize_per_token(x, bits)
            assert torch.equal(q.cpu(), expected_q)
            assert torch.equal(scale.cpu(), expected_scale)


def test_strided_input(kernel_device, seeded):
    base = torch.randn(40, 66, generator=seeded).to(kernel_device)
    for x in (base.t(), base[::3, ::2], base[:, 5:38]):
        assert not x.is_contiguous()
        q, scale = quantize_per_token(x)
        expected_q, expected_scale = reference.quantize_per_token(x.cpu())
        assert torch.equal(q.cpu(), expected_q)
        assert torch.equal(scale.cpu(), expected_scale)
        s = torch.tensor(0.02)
        actual = quantize_per_tensor(x, s.to(kernel_device))
        assert torch.equal(actual.cpu(), reference.quantize_per_tensor(x.cpu(), s))


def attention_output(kind, generator):
    """What scaled_dot_product_attention returns: [batch, heads, tokens, head_dim], contiguous or not."""
    if kind == "heads first":
        return torch.randn(2, 4, 9, 24, generator=generator)
    return torch.randn(2, 9, 4, 24, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("kind", ["heads first", "tokens first"])
def test_attention_output_as_it_is(kernel_device, kind, seeded):
    """One token is [heads, head_dim]; nothing is copied first."""
    x = attention_output(kind, seeded).transpose(1, 2)
    expected_q, expected_scale = reference.quantize_per_token(x.reshape(2, 9, 96))
    q, scale = quantize_per_token(x.to(kernel_device), token_dims=2)
    assert torch.equal(q.flatten(2).cpu(), expected_q)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(reference.quantize_per_token(x, token_dims=2)[0], expected_q.view(x.shape))
    s, z = torch.tensor(0.02), torch.tensor(5, dtype=torch.int32)
    q = quantize_per_tensor(*(t.to(kernel_device) for t in (x, s, z)))
    assert torch.equal(q.cpu(), reference.quantize_per_tensor(x, s, z))


def test_wild_strides(kernel_device, seeded):
    """More strides than a kernel takes: five dimensions in reverse order."""
    x = torch.randn(2, 3, 4, 5, 6, generator=seeded).to(kernel_device).permute(4, 3, 2, 1, 0)
    expected = reference.quantize_per_tensor(x.cpu(), torch.tensor(0.05))
    assert torch.equal(quantize_per_tensor(x, torch.tensor(0.05, device=kernel_device)).cpu(), expected)
    assert torch.equal(quantize_per_token(x, token_dims=2)[0].cpu(), reference.quantize_per_token(x.cpu(), 8, 2)[0])


def test_no_rows(kernel_device):
    x = torch.zeros(0, 64, device=kernel_device)
    q, scale = quantize_per_token(x)
    assert quantize_per_token(x.t())[1].tolist() == [pytest.approx(1e-10 / 127)] * 64
    assert q.shape == (0, 64)
    assert scale.shape == (0,)
    assert quantize_per_tensor(x, torch.tensor(1.0, device=kernel_device)).shape == (0, 64)


def test_rows_of_zeros(kernel_device):
    q, scale = quantize_per_token(torch.zeros(3, 40, device=kernel_device))
    assert torch.equal(q.cpu(), torch.zeros(3, 40, dtype=torch.int8))
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, tells of the overflow
def test_extreme_values(kernel_device):
    x = torch.tensor([[3e38, -3e38, 0.0, 1e-38, float("inf"), float("-inf"), float("nan"), 1.0]])
    scale, zero_point = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    expected = torch.tensor([[127, -128, 3, 3, 127, -128, 3, 5]], dtype=torch.int8)
    assert torch.equal(reference.quantize_per_tensor(x, scale, zero_point), expected)
    actual = quantize_per_tensor(x.to(kernel_device), scale.to(kernel_device), zero_point.to(kernel_device))
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", [(5, 33), (300, 100), (2, 9, 4, 24)], ids=str)
@pytest.mark.parametrize("quantize", [quantize_per_tensor, reference.quantize_per_tensor], ids=["op", "reference"])
def test_nan_raises_the_flag_and_nothing_else_does(kernel_device, quantize, shape, seeded):
    scale, zero_point = torch.tensor(0.5, device=kernel_device), torch.tensor(3, dtype=torch.int32).to(kernel_device)
    for dtype in float_dtypes(kernel_device):
        x = torch.randn(shape, generator=seeded).to(dtype).to(kernel_device)
        x.view(-1)[0], x.view(-1)[1] = float("inf"), float("-inf")
        expected = quantize(x, scale, zero_point)
        for strided in (x, x.transpose(0, 1)):
            for before in (0, 1, 77):
                flag = torch.full((), before, dtype=torch.int32, device=kernel_device)
                quantize(strided, scale, zero_point, nan_flag=flag)
                assert flag.item() == before
        for place in (0, x.numel() // 2, x.numel() - 1):
            dirty = x.clone()
            dirty.view(-1)[place] = float("nan")
            for flag in (torch.zeros((), dtype=torch.int32), torch.full((1,), 5, dtype=torch.int32)):
                flag = flag.to(kernel_device)
                for strided in (dirty, dirty.transpose(0, 1)):
                    flag.fill_(0)
                    q = quantize(strided, scale, zero_point, nan_flag=flag)
                    assert flag.item() == 1
                    assert torch.equal(
                        q.cpu(), reference.quantize_per_tensor(strided.cpu(), scale.cpu(), zero_point.cpu())
                    )
            q = quantize(dirty, scale, zero_point)
            assert q.view(-1)[place].item() == 3
            q.view(-1)[place] = expected.view(-1)[place]
            assert torch.equal(q, expected)


def test_a_compiled_graph_raises_the_flag(seeded):
    """The flag is an argument that the op writes to: torch must neither drop nor copy it."""

    def layer(x, scale, flag):
        return quantize_per_tensor(x * 2, scale, nan_flag=flag).to(torch.float32) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, scale, flag = torch.randn(4, 16, generator=seeded), torch.tensor(0.1), torch.zeros((), dtype=torch.int32)
    assert torch.equal(compiled(x, scale, flag), layer(x, scale, None))
    assert flag.item() == 0
    x[2, 3] = float("nan")
    compiled(x, scale, flag)
    assert flag.item() == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_with_nan_says_so_and_others_do_not_notice(kernel_device):
    x = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.5, -2.0]])
    x[0, 1] = NAN
    expected_q, expected_scale = reference.quantize_per_token(x)
    assert expected_scale[0].isnan()
    assert torch.equal(expected_q[1], torch.tensor([64, 32, -127], dtype=torch.int8))
    q, scale = quantize_per_token(x.to(kernel_device))
    assert torch.equal(q.cpu(), expected_q)
    torch.testing.assert_close(scale.cpu(), expected_scale, atol=0, rtol=0, equal_nan=True)


def test_smallest_rows(kernel_device):
    """Below 1e-10 a row counts as zeros; above, it fills the range."""
    x = torch.tensor([[1e-12, 0.0], [1e-9, 0.0]])
    assert torch.equal(reference.quantize_per_token(x)[0], torch.tensor([[1, 0], [127, 0]], dtype=torch.int8))
    assert torch.equal(quantize_per_token(x.to(kernel_device))[0].cpu(), reference.quantize_per_token(x)[0])


def test_rounds_half_to_even(kernel_device):
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5]])
    expected = torch.tensor([[-2, -2, 0, 0, 2, 2, 126, 127]], dtype=torch.int8)
    one = torch.tensor(1.0)
    assert torch.equal(reference.quantize_per_tensor(x, one), expected)
    assert torch.equal(quantize_per_tensor(x.to(kernel_device), one.to(kernel_device)).cpu(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_reference_error_is_at_most_half_a_step(bits, seeded):
    x = torch.randn(50, 64, generator=seeded)
    q, scale = reference.quantize_per_token(x, bits)
    assert int(q.abs().max()) == 2 ** (bits - 1) - 1
    error = (q * scale[:, None] - x).abs()
    assert (error <= scale[:, None] * 0.5001).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    scale=st.floats(1e-4, 1e3),
    zero_point=st.integers(-128, 127),
    seed=st.integers(0, 2**31),
)
def test_random_shapes_and_scales(kernel_device, rows, columns, scale, zero_point, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 50
    s, z = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    expected = reference.quantize_per_tensor(x, s, z)
    assert torch.equal(quantize_per_tensor(*(t.to(kernel_device) for t in (x, s, z))).cpu(), expected)


def assert_gelu_per_token(x, multiplier=None, beside=None):
    """Compare the op and its reference with float64: the scales, and the integers for the scales that were found."""
    y = gelu(x.cpu().double())
    if multiplier is not None:
        y = y * multiplier.cpu().double()
    if beside is not None:
        y = torch.cat([beside.cpu().double().flatten(-2), y], -1)
    amax = y.abs().amax(-1) if y.shape[-1] else y.new_zeros(y.shape[:-1])
    for function in (gelu_quantize_per_token, reference.gelu_quantize_per_token):
        q, scale = function(x, multiplier, beside)
        assert q.is_contiguous()
        torch.testing.assert_close(scale.cpu().double(), amax.clamp(min=1e-10) / 127, atol=0, rtol=1e-5)
        assert_rounded(q, y / scale.cpu().double()[..., None])
        assert (q != -128).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # where GELU is 0
@pytest.mark.parametrize("heads", [None, (1, 1), (3, 5), (2, 64)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (2, 5, 300), (3, 1152), (1, 2, 4608)], ids=str)
def test_gelu_per_token(kernel_device, shape, heads, seeded):
    multiplier = torch.rand(shape[-1], generator=seeded) + 0.5
    for dtype in float_dtypes(kernel_device):
        x = (torch.randn(shape, generator=seeded) * 3).to(dtype).to(kernel_device)
        beside = None
        if heads is not None:
            beside = (torch.randn(*shape[:-1], *heads, generator=seeded) * 4).to(dtype).to(kernel_device)
        assert_gelu_per_token(x, None, beside)
        assert_gelu_per_token(x, multiplier.to(kernel_device), beside)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_gelu_per_token_of_any_strides(kernel_device, seeded):
    base = torch.randn(4, 40, 66, generator=seeded).to(kernel_device)
    heads = torch.randn(4, 2, 40, 24, generator=seeded).to(kernel_device).transpose(1, 2)  # as attention leaves them
    wild = torch.randn(24, 40, 2, 2, 4, generator=seeded).to(kernel_device).permute(4, 1, 2, 3, 0).flatten(2, 3)
    factors = torch.rand(132, generator=seeded).to(kernel_device)[::2] + 0.5
    for beside in (heads, wild, heads[..., ::2], None):
        assert_gelu_per_token(base, factors, beside)
    assert_gelu_per_token(base.mT, factors[:40], heads[:, :1].expand(-1, 66, -1, -1))
    assert_gelu_per_token(base[:, ::3, ::2], factors[::2], heads[:, ::3])
    assert_gelu_per_token(base[:, :, 5:38], factors[:33])


def test_gelu_per_token_of_nothing(kernel_device, seeded):
    x, heads = torch.randn(3, 8, generator=seeded).to(kernel_device), torch.randn(3, 2, 4, generator=seeded)
    for k, columns in ((0, 4), (8, 0), (0, 0)):
        assert_gelu_per_token(x[:, :k], None, heads[..., :columns].to(kernel_device))
    q, scale = gelu_quantize_per_token(x[:0], None, heads[:0].to(kernel_device))
    assert (q.shape, scale.shape) == ((0, 16), (0,))
    q, scale = gelu_quantize_per_token(torch.zeros(3, 40, device=kernel_device))
    assert torch.equal(q.cpu(), torch.zeros(3, 40, dtype=torch.int8))
    assert (scale > 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ["x", "beside"])
def test_gelu_per_token_of_nan_and_infinities(kernel_device, where):
    """Give a token with NaN the scale NaN, it and one with an infinity only zeros, and leave the other tokens alone."""
    x, beside = torch.full((4, 6), 2.0), torch.full((4, 1, 2), -3.0)
    spoiled = x if where == "x" else beside[:, 0]
    spoiled[1, 1], spoiled[2, 1] = NAN, float("inf")
    for function in (gelu_quantize_per_token, reference.gelu_quantize_per_token):
        q, scale = (t.cpu() for t in function(x.to(kernel_device), None, beside.to(kernel_device)))
        torch.testing.assert_close(scale[0], torch.tensor(3 / 127))
        assert scale[1].isnan()
        assert scale[2] == float("inf")
        assert not q[1:3].any()
        assert torch.equal(scale[::3], scale[:1].expand(2))
        assert torch.equal(q[::3], torch.tensor([[-127, -127, *[83] * 6]] * 2, dtype=torch.int8))


def test_ops_keep_leading_dimensions(seeded):
    x = torch.randn(2, 3, 5, 16, generator=seeded).transpose(1, 2)
    q, scale = quantize_per_token(x)
    assert q.shape == x.shape
    assert scale.shape == x.shape[:-1]
    assert torch.equal(q, reference.quantize_per_token(x)[0])
    s = torch.tensor(0.1)
    assert torch.equal(quantize_per_tensor(x, s), reference.quantize_per_tensor(x, s))


def test_results_are_contiguous_and_carry_no_gradient(seeded):
    x = torch.randn(16, 8, generator=seeded, requires_grad=True).t()
    q, scale = quantize_per_token(x)
    assert q.is_contiguous()
    assert quantize_per_tensor(x, torch.tensor(0.1)).is_contiguous()
    assert not scale.requires_grad


@pytest.mark.gpu
def test_ops_run_the_kernels_on_the_gpu(seeded):
    x = torch.randn(2, 3, 5, 16, generator=seeded).transpose(1, 2)
    for actual, expected in zip(quantize_per_token(x.cuda()), reference.quantize_per_token(x), strict=True):
        assert torch.equal(actual.cpu(), expected)
    scale, zero_point = torch.tensor(0.1), torch.tensor(-7, dtype=torch.int32)
    actual = quantize_per_tensor(x.cuda(), scale.cuda(), zero_point.cuda(), bits=6)
    assert torch.equal(actual.cpu(), reference.quantize_per_tensor(x, scale, zero_point, bits=6))
