"""Attention with an int8 output, against float64."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc.models import attention
from qandc.models.products import Product
from qandc_kernels import attention_quantize_per_tensor, capturing, reference
from qandc_kernels.tiles.tables import Gpu
from tests.kernels.oracle import assert_rounded, float_dtypes

# numpy, under the interpreter, tells of infinities that are meant to happen
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# (batch, tokens, heads, D): tokens below, at and beyond a block; D in one piece and in two
SHAPES = [(3, 1, 2, 40), (2, 1, 2, 72), (2, 64, 2, 72), (1, 50, 3, 32), (2, 100, 1, 64), (1, 130, 1, 128)]
SHAPES += [(1, 17, 2, 48), (1, 1, 1, 16)]
LARGE_SHAPES = [(2, 256, 16, 72), (16, 256, 16, 72), (64, 256, 16, 72), (2, 1024, 16, 72), (32, 64, 6, 32)]
SCALE, ZERO_POINT = 0.02, 7
# of the size of v: the softmax is rounded to the inputs' type before it is multiplied with v
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch, kernel_device):
    if kernel_device.type == "cpu":
        monkeypatch.setattr("qandc_kernels.triton.attention.gpu_of", lambda device: Gpu("", (9, 0), 132))


def make(shape, generator, dtype, device):
    """q, k, v as the parts of one tensor, as a product of all three leaves them."""
    batch, tokens, heads, width = shape
    return torch.randn(batch, tokens, 3, heads, width, generator=generator).to(dtype).to(device).unbind(2)


def exact(q, k, v, bias=None):
    """Attention in float64; 0 where all keys are left out."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (0.0 if bias is None else bias.double()[:, None, None])
    weights = scores.softmax(-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)
    return (weights @ v).transpose(1, 2).cpu()


def assert_quantized(out, q, k, v, scale=SCALE, zero_point=ZERO_POINT, bias=None):
    """Within half a step, a thousandth for rounding, and what the inputs' precision leaves."""
    expected = (exact(q, k, v, bias) / scale + zero_point).clamp(-128, 127)
    difference = (out.cpu().double() - expected).abs()
    largest = v.double().abs().amax((1, 3), keepdim=True).cpu()
    assert out.dtype == torch.int8
    assert out.is_contiguous()
    assert (difference <= 0.5 + 1e-3 + TOLERANCES[q.dtype] * largest / scale).all(), difference.max()
    # and on the whole as good as rounding the truth, of which a few outputs say nothing
    assert (out.cpu().double() != expected.round()).sum() <= 2 + 100 * TOLERANCES[q.dtype] * out.numel()


@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=str)
def test_against_float64(kernel_device, shape, seeded):
    if kernel_device.type == "cpu" and shape in LARGE_SHAPES:
        pytest.skip("too large for the interpreter")
    scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int32)
    for dtype in float_dtypes(kernel_device):
        q, k, v = make(shape, seeded, dtype, kernel_device)
        out = attention_quantize_per_tensor(q, k, v, scale.to(kernel_device), zero_point.to(kernel_device))
        assert_quantized(out, q, k, v)
        out = attention_quantize_per_tensor(q, k, v, scale.to(kernel_device))
        assert_quantized(out, q, k, v, zero_point=0)


@pytest.mark.parametrize("tokens", [attention.MANY_KEYS - 8, attention.MANY_KEYS])
def test_blocks_take_cudnn_for_many_keys(kernel_device, monkeypatch, seeded, tokens):
    hopper = kernel_device.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    if kernel_device.type == "cpu":
        monkeypatch.setattr(attention, "_cudnn_is_fastest", lambda q: True)
    calls, dtype = [], torch.float32 if kernel_device.type == "cpu" else torch.bfloat16
    own = lambda *args: calls.append(args) or attention_quantize_per_tensor(*args)  # noqa: E731
    monkeypatch.setattr(attention, "attention_quantize_per_tensor", own)
    scale = torch.tensor(SCALE, device=kernel_device)
    zero_point = torch.tensor(ZERO_POINT, dtype=torch.int32, device=kernel_device)
    flag = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    product = Product(None, scale, None, None, zero_point, None)
    q, k, v = make((1, tokens, 2, 72), seeded, dtype, kernel_device)
    out, following = attention.attend_quantized(q[:, :64], k, v, product, flag)
    assert following is product
    assert_quantized(out.unflatten(2, (2, 72)), q[:, :64], k, v)
    assert len(calls) == (not hopper or tokens < attention.MANY_KEYS)
    assert not flag
    v[0, 5, 1, 70] = float("nan")
    attention.attend_quantized(q[:, :64], k, v, product, flag)
    assert flag
    calls.clear()
    bias = torch.zeros(1, tokens, dtype=dtype, device=kernel_device)
    attention.attend_quantized(q[:, :64], k[:], v[:].nan_to_num(), product, flag, bias)
    assert len(calls) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_without_a_range_take_scales_per_token(kernel_device, seeded, masked):
    q, k, v = make((2, 40, 3, 24), seeded, torch.float32, kernel_device)
    bias = torch.zeros(2, 40, device=kernel_device)
    if masked:
        bias[0, 30:], bias[1, 7:] = float("-inf"), float("-inf")
    product = Product(None, None, None, None, None, None)
    out, following = attention.attend_quantized(q[:, :9], k, v, product, None, bias if masked else None)
    expected, scale = exact(q[:, :9], k, v, bias if masked else None).flatten(2), following.x_scale.cpu().double()
    torch.testing.assert_close(scale, expected.abs().amax(2) / 127, atol=0, rtol=2e-3)  # on a GPU torch may take TF32
    assert out.dtype == torch.int8
    assert ((out.cpu() * scale[..., None] - expected).abs() <= 0.7 * scale[..., None]).all()


def test_one_thread_at_a_time_prefers_cudnn():
    """Torch's order of backends is one for all threads: of two at once the second would leave that of the first."""
    entered = []

    def other():
        with attention._preferring_cudnn():
            entered.append(True)

    thread = threading.Thread(target=other)
    with attention._preferring_cudnn():
        thread.start()
        thread.join(0.2)
        assert not entered
    thread.join()
    assert entered


def test_reference(seeded):
    q, k, v = make((2, 50, 3, 24), seeded, torch.float32, "cpu")
    scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int32)
    out = reference.attention_quantize_per_tensor(q, k, v, scale, zero_point)
    for quantized in (out, attention_quantize_per_tensor(q, k, v, scale, zero_point)):
        assert_rounded(quantized, exact(q, k, v) / SCALE + ZERO_POINT)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes_and_strides(kernel_device, data):
    draw = data.draw
    batch, tokens, heads = draw(st.integers(1, 3)), draw(st.integers(1, 140)), draw(st.integers(1, 3))
    width = draw(st.sampled_from([8, 16, 20, 24, 40, 72, 96, 136]))  # 8, 20 and 136 take torch's attention
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = draw(st.permutations([0, 1, 2, 3]))
    back = [order.index(d) for d in range(4)]
    keys, bias = draw(st.one_of(st.just(tokens), st.integers(1, 140))), None
    sizes = [[(batch, rows, heads, width)[d] for d in order] for rows in (tokens, keys, keys)]
    q, k, v = (torch.randn(size, generator=generator).half().to(kernel_device).permute(back) for size in sizes)
    if draw(st.booleans()):
        bias = 2 * torch.randn(keys, batch, generator=generator)
        bias = bias.masked_fill(bias > draw(st.sampled_from([-9.0, 0.0, 9.0])), float("-inf")).to(kernel_device).T
    scale = draw(st.sampled_from([1e-3, 0.02, 1.0]))
    out = attention_quantize_per_tensor(q, k, v, torch.tensor(scale, device=kernel_device), key_bias=bias)
    assert_quantized(out, q, k, v, scale, 0, bias)


@pytest.mark.parametrize("tokens", [1, 70, 128])
@pytest.mark.parametrize("keys", [1, 6, 128, 130])
def test_keys_of_another_length_some_of_them_left_out(kernel_device, seeded, tokens, keys):
    """Attend to keys of another length, of which a sample keeps none, one or all, and write every integer."""
    scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int32)
    scale, zero_point = scale.to(kernel_device), zero_point.to(kernel_device)
    for dtype in float_dtypes(kernel_device):
        q = torch.randn(4, tokens, 2, 72, generator=seeded).to(kernel_device, dtype)
        k, v = torch.randn(4, keys, 2, 2, 72, generator=seeded).to(kernel_device, dtype).unbind(2)
        assert_quantized(attention_quantize_per_tensor(q, k, v, scale, zero_point), q, k, v)
        left_out = (torch.arange(keys) >= torch.tensor([[0], [1], [keys // 2], [keys]])).to(kernel_device)
        mask = torch.randn(4, keys, generator=seeded).to(kernel_device, dtype).masked_fill(left_out, float("-inf"))
        out = attention_quantize_per_tensor(q, k, v, scale, zero_point, None, mask)
        assert_quantized(out, q, k, v, bias=mask)
        assert (out[0] == ZERO_POINT).all()
        if dtype != torch.float32:  # which has no more than three digits behind 10,000
            mask = torch.zeros(4, keys, dtype=dtype, device=kernel_device).masked_fill(left_out, -10000.0)
            assert_quantized(attention_quantize_per_tensor(q, k, v, scale, zero_point, None, mask), q, k, v, bias=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_of_a_bias_is_told(kernel_device, seeded, dtype):
    q, k, v = make((2, 50, 3, 72), seeded, dtype, kernel_device)
    scale, bias = torch.tensor(SCALE, device=kernel_device), torch.zeros(2, 50, device=kernel_device)
    clean = attention_quantize_per_tensor(q, k, v, scale)
    bias[1, 49] = float("nan")
    for call in (attention_quantize_per_tensor, reference.attention_quantize_per_tensor):
        flag = torch.zeros((), dtype=torch.int32, device=kernel_device)
        out = call(q, k, v, scale, None, flag, bias)
        assert flag.item() == 1
        assert (out[1] == -128).all()
        if call is attention_quantize_per_tensor:
            assert torch.equal(out[0], clean[0])


@pytest.mark.parametrize("tokens", [64, 70])
def test_large_scores_do_not_overflow(kernel_device, seeded, tokens):
    q, k, v = make((1, tokens, 2, 72), seeded, torch.float16, kernel_device)
    scale = torch.tensor(SCALE, device=kernel_device)
    out = attention_quantize_per_tensor(q * 100, k * 100, v, scale)
    assert_quantized(out, q * 100, k * 100, v, zero_point=0)


def test_nan_does_not_leave_its_head(kernel_device, seeded):
    q, k, v = make((2, 50, 3, 72), seeded, torch.float16, kernel_device)
    scale = torch.tensor(SCALE, device=kernel_device)
    clean = attention_quantize_per_tensor(q, k, v, scale)
    for tensor in (q, k, v):
        tensor[0, 20, 1] = float("nan")
    out = attention_quantize_per_tensor(q, k, v, scale)
    assert (out[0, :, 1] == -128).all()
    out[0, :, 1] = clean[0, :, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 50, 3, 72), torch.float16), ((1, 64, 2, 16), torch.float16), ((2, 5, 2, 20), torch.float32)],
    ids=str,
)
def test_nan_becomes_the_smallest_integer_and_raises_the_flag(kernel_device, seeded, shape, dtype):
    """In the kernel, in two pieces of a head and in one, and where torch's attention is taken."""
    clean = make(shape, seeded, dtype, kernel_device)
    scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int32)
    scale, zero_point = scale.to(kernel_device), zero_point.to(kernel_device)
    expected = attention_quantize_per_tensor(*clean, scale, zero_point)
    for before in (0, 77):
        flag = torch.full((), before, dtype=torch.int32, device=kernel_device)
        assert torch.equal(attention_quantize_per_tensor(*clean, scale, zero_point, flag), expected)
        reference.attention_quantize_per_tensor(*clean, scale, zero_point, flag)
        assert flag.item() == before
    for part, head_column in itertools.product(range(3), (0, shape[3] - 1)):
        dirty = [t.clone() for t in clean]
        dirty[part][0, 3, 1, head_column] = float("nan")
        flag.zero_()
        out = attention_quantize_per_tensor(*dirty, scale, zero_point, flag)
        assert flag.item() == 1
        flag.zero_()
        told = reference.attention_quantize_per_tensor(*dirty, scale, zero_point, flag).cpu()
        assert flag.item() == 1
        lost = exact(*dirty).isnan()
        assert lost.any()
        assert (out.cpu()[lost] == -128).all()
        assert (told[lost] == -128).all()
        assert torch.equal(out.cpu()[~lost], expected.cpu()[~lost])


def test_infinities_outside_of_the_tensor_are_no_nan(kernel_device, seeded):
    """A block reaches beyond the tokens, where queries are 0, and 0 times an infinite key is NaN."""
    q, k, v = make((1, 50, 2, 72), seeded, torch.float16, kernel_device)
    q, k = q.abs() + 1, k.clone()
    k[0, 7] = float("-inf")  # no query looks there
    flag = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    out = attention_quantize_per_tensor(q, k, v, torch.tensor(SCALE, device=kernel_device), nan_flag=flag)
    assert exact(q, k, v).isfinite().all()
    assert_quantized(out, q, k, v, zero_point=0)
    assert flag.item() == 0


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scale(seeded):
    q, k, v = make((2, 64, 2, 72), seeded, torch.bfloat16, "cuda")
    scale = torch.tensor(SCALE, device="cuda")
    attention_quantize_per_tensor(q, k, v, scale)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        out = attention_quantize_per_tensor(q, k, v, scale)
    scale.fill_(0.05)
    graph.replay()
    assert_quantized(out, q, k, v, 0.05, 0)


@pytest.mark.parametrize("shape", [(3, 4, 1, 16), (1, 4, 3, 16)], ids=str)
def test_more_samples_or_heads_than_a_grid_has_take_torchs_attention(kernel_device, monkeypatch, seeded, shape):
    monkeypatch.setattr("qandc_kernels.ops.attention.LARGEST_GRID", 2)
    monkeypatch.setattr("qandc_kernels.ops.attention.attention_quantize_triton", None)
    q, k, v = make(shape, seeded, torch.float16, kernel_device)
    out = attention_quantize_per_tensor(q, k, v, torch.tensor(SCALE, device=kernel_device))
    assert_quantized(out, q, k, v, zero_point=0)


def test_no_tokens_no_work(kernel_device):
    empty = torch.zeros(2, 0, 3, 72, dtype=torch.float16, device=kernel_device)
    out = attention_quantize_per_tensor(empty, empty, empty, torch.ones((), device=kernel_device))
    assert out.shape == (2, 0, 3, 72)
