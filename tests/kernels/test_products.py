"""W8A8, W4A8 and weight-only products: integer sums bit for bit, outputs against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qandc_kernels import (
    capturing,
    int4_linear,
    int8_linear,
    int8_matmul,
    linear_gate_residual_,
    linear_gelu_quantize,
    linear_into_,
    pack_int4,
    quantize_per_tensor,
    quantized_linear,
    reference,
    unpack_int4,
    weight_only_linear,
)
from qandc_kernels.tiles.tables import GemmTile
from qandc_kernels.triton import linear as linear_kernels
from qandc_kernels.triton.int8_gemm import int8_gemm_triton
from qandc_kernels.triton.mixed_gemm import mixed_gemm_triton
from tests.kernels.oracle import (
    assert_close,
    assert_rounded,
    assert_summed,
    float_dtypes,
    gelu,
    make_layer,
    random_int8,
    terms_of,
    to,
)

# numpy, under the interpreter, tells of overflows that are meant to happen
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# (samples, tokens, N, K): tails in every dimension, rows of several samples in a tile; the last ones travel by TMA
SHAPES = [(1, 1, 5, 8), (3, 7, 33, 100), (2, 35, 40, 130), (2, 64, 32, 192), (2, 96, 32, 64), (1, 70, 48, 64)]
LARGE_SHAPES = [(1, 1, 4608, 1152), (1, 17, 3456, 1152), (2, 256, 1152, 4608), (8, 125, 1152, 1152)]
LARGE_SHAPES += [(16, 256, 4608, 1152), (3, 243, 577, 858)]


@pytest.fixture
def shape(request, kernel_device):
    """Small shapes everywhere, those of DiT-XL/2 on the GPU alone."""
    if kernel_device.type == "cpu" and request.param in LARGE_SHAPES:
        pytest.skip("too large for the interpreter")
    return request.param


all_shapes = pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES, ids=str, indirect=True)


def exact(xq, wq):
    return (xq.double() @ wq.double().t()).int()  # float64 counts to 2^53


@all_shapes
def test_sums_are_exact(kernel_device, shape, seeded):
    samples, tokens, n, k = shape
    xq, wq = random_int8((samples, tokens, k), seeded), random_int8((n, k), seeded)
    expected = exact(xq, wq)
    assert torch.equal(reference.int8_matmul(xq[:, :9], wq), expected[:, :9])
    assert torch.equal(int8_matmul(xq.to(kernel_device), wq.to(kernel_device)).cpu(), expected)


@all_shapes
def test_sums_of_int4_weights_are_exact(kernel_device, shape, seeded):
    samples, tokens, n, k = shape
    xq, wq = random_int8((samples * tokens, k), seeded), random_int8((n, k), seeded, 4)
    out = torch.empty(samples * tokens, n, dtype=torch.int32, device=kernel_device)
    mixed_gemm_triton(xq.to(kernel_device), pack_int4(wq).to(kernel_device), out)
    assert torch.equal(out.cpu(), exact(xq, wq))


def test_sums_are_exact_at_the_extremes(kernel_device):
    """K = 4608 products of 127 · 127: 7.4e7 in odd steps, which fp32 cannot count; and the largest, -128 · -128."""
    xq = torch.full((3, 4608), 127, dtype=torch.int8)
    xq[1, 7] = 126
    xq[2] = -128
    wq = torch.full((3, 4608), 127, dtype=torch.int8)
    wq[1, 4607] = 1
    wq[2] = -128
    assert int(exact(xq, wq)[1, 0]) != int(exact(xq, wq)[1, 0].float())  # else this shows nothing
    assert torch.equal(reference.int8_matmul(xq, wq), exact(xq, wq))
    assert torch.equal(int8_matmul(xq.to(kernel_device), wq.to(kernel_device)).cpu(), exact(xq, wq))


def test_a_cpu_multiplies_int8_or_float32_to_the_same_sums(monkeypatch, seeded):
    """Compare both ways of a CPU to multiply int8; torch's saturates without VNNI, and is not used then."""
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    asked = "from qandc_kernels import reference; assert not reference._cpu_multiplies_int8()"
    subprocess.run([sys.executable, "-c", asked], env=told, check=True)
    wide = random_int8((3, 5, 2 * 1100), seeded)
    wide[0], wide[1] = 127, -128
    for way in {False, reference._cpu_multiplies_int8()}:
        monkeypatch.setattr(reference, "_cpu_multiplies_int8", lambda way=way: way)
        for x in (wide[..., :1100], wide[..., ::2], wide[:1, :0, :1100], wide[0, 0, ::2]):
            for w in (wide[:, 0, 1100:], random_int8((1100, 7), seeded).t(), wide[:0, 0, ::2]):
                assert torch.equal(reference.int8_matmul(x, w), exact(x, w))


@pytest.mark.parametrize("k", [0, 8, 1024, 1025, 4096])
def test_a_layer_takes_the_same_values_from_float32_sums_as_from_int32(monkeypatch, seeded, k):
    """Compare a CPU's layers, both ways, with sums and zero point in int32: above 2^24 they are rounded once."""
    xq, wq = random_int8((6, k), seeded), random_int8((5, k), seeded)
    xq[:2], wq[:2], xq[2], wq[2], wq[2, -1:] = -128, -128, 127, 127, 126
    zero_point, w_sum = torch.tensor(127, dtype=torch.int32), wq.sum(1, dtype=torch.int32)
    sums = exact(xq, wq) - zero_point * w_sum
    assert k < 1000 or (sums.abs() > 2**24).any()  # else this shows nothing
    scales = torch.tensor(0.037), torch.rand(5, generator=seeded)
    expected = sums.to(torch.float32) * scales[0] * scales[1]
    for way in {False, reference._cpu_multiplies_int8()}:
        monkeypatch.setattr(reference, "_cpu_multiplies_int8", lambda way=way: way)
        actual = reference.int8_linear(xq, wq, *scales, None, zero_point, w_sum, out_dtype=torch.float32)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("bits", "per_token", "plain"),  # each pair of values is there
    [(8, False, False), (8, True, True), (4, False, True), (4, True, False)],
    ids=["int8 per_tensor", "int8 per_token plain", "int4 per_tensor plain", "int4 per_token"],
)
@all_shapes
def test_linear(kernel_device, shape, bits, per_token, plain, seeded):
    p, expected = make_layer(shape, seeded, bits=bits, per_token=per_token, bias=not plain, zero_point=not plain)
    weight = p.pop("weight")
    function = int4_linear if bits == 4 else int8_linear
    for dtype in float_dtypes(kernel_device):
        q = to(kernel_device, p)
        actual = function(q.pop("xq"), weight.to(kernel_device), **q, out_dtype=dtype)
        assert actual.dtype == dtype
        assert_close(actual, expected)
    if expected.numel() < 1e5:
        assert_close(function(p.pop("xq"), weight, **p, out_dtype=torch.float32), expected)


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero_points_and_multiplier"])
@all_shapes
def test_linear_gelu_quantize(kernel_device, shape, bits, asymmetric, seeded):
    p, y = make_layer(shape, seeded, bits=bits, zero_point=asymmetric)
    ending = {"out_scale": torch.tensor(0.013), "out_zero_point": None, "multiplier": None}
    expected = gelu(y) / ending["out_scale"].double()
    if asymmetric:
        ending["out_zero_point"] = torch.tensor(-101, dtype=torch.int32)
        ending["multiplier"] = torch.rand(shape[2], generator=seeded) + 0.5
        expected = expected * ending["multiplier"].double() - 101
    assert (expected > 127).any() or expected.numel() < 100  # clipping happens
    given = to(kernel_device, {**p, **ending})
    found = linear_gelu_quantize(**given)
    assert_rounded(found, expected)
    flag = torch.zeros((), dtype=torch.int32, device=kernel_device)
    for heads, width in ((4, 8), (1, 3)):  # rows that begin at multiples of 16 bytes or anywhere
        beside = torch.randn(shape[0], heads, shape[1], width, generator=seeded).to(kernel_device).transpose(1, 2)
        first = quantize_per_tensor(beside.flatten(2), given["out_scale"], given["out_zero_point"])
        joint = linear_gelu_quantize(**given, beside=beside, nan_flag=flag)
        assert torch.equal(joint, torch.cat([first, found], -1))
        assert not flag
    linear_gelu_quantize(**given, beside=beside * float("nan"), nan_flag=flag)
    assert flag
    if y.numel() < 1e5:
        assert_rounded(reference.linear_gelu_quantize(**p, **ending), expected)


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_a_last_wave_are_a_launch_of_their_own(kernel_device, monkeypatch, bits, kept, seeded):
    p = to(kernel_device, make_layer((1, 128, 40, 64), seeded, bits=bits)[0])
    gate, x = torch.randn(1, 40, generator=seeded).to(kernel_device), torch.randn(1, 128, 40, generator=seeded)
    calls, original = [], linear_kernels._LAUNCHES

    def run():
        calls.clear()
        residual = x.to(kernel_device, copy=True)
        branch = torch.empty_like(residual) if kept else None
        linear_gate_residual_(residual, gate=gate, out_branch=branch, **p)
        gelu = linear_gelu_quantize(out_scale=torch.tensor(0.01, device=kernel_device), **p)
        return residual, gelu, torch.zeros(()) if branch is None else branch

    monkeypatch.setattr(linear_kernels, "_LAUNCHES", lambda o, *a: calls.append(o[0].shape[-2]) or original(o, *a))
    expected = run()
    assert calls == [128, 128]
    monkeypatch.setattr(linear_kernels, "LONG_SUM", 64)
    monkeypatch.setattr(linear_kernels, "whole_waves", lambda kernel, m, *others: 64 if m == 128 else 0)
    assert all(map(torch.equal, run(), expected))
    assert calls == [64] * 4


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@all_shapes
@pytest.mark.parametrize("enough", [1, 1000])
def test_linear_into(kernel_device, monkeypatch, shape, bits, enough, seeded):
    """Some tokens of a joint sequence of one sample, or more, whose rows lie apart then; the others stay."""
    monkeypatch.setattr("qandc_kernels.ops.linear.LONG_ENOUGH", enough)  # tokens, for a launch of each sample
    p = to(kernel_device, make_layer(shape, seeded, bits=bits)[0])
    samples, tokens, n, _ = shape
    for dtype in float_dtypes(kernel_device):
        weights = {"wq_packed" if bits == 4 else "wq": p["weight"], **{k: v for k, v in p.items() if k != "weight"}}
        expected = (int4_linear if bits == 4 else int8_linear)(**weights, out_dtype=dtype)
        for op in (linear_into_, reference.linear_into_):
            joint = torch.full((samples, tokens + 5, n), 7.0, dtype=dtype, device=kernel_device)
            out = joint[:, 2:-3]
            assert op(out, **p) is out
            if op is linear_into_:
                assert torch.equal(out, expected)
            assert_close(out, expected.cpu().double())
            assert (joint[:, :2] == 7).all()
            assert (joint[:, -3:] == 7).all()


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per_tensor", "per_token"])
@all_shapes
def test_linear_gate_residual(kernel_device, shape, bits, per_token, seeded):
    samples, tokens, n, _ = shape
    p, y = make_layer(shape, seeded, bits=bits, per_token=per_token)
    modulation = torch.randn(samples, 6 * n, generator=seeded)
    for dtype in float_dtypes(kernel_device):
        residual = torch.randn(samples, tokens, n, generator=seeded).to(dtype)
        gate = modulation.to(dtype)[:, 2 * n : 3 * n]  # a chunk: rows are not next to each other
        expected = residual.double() + gate.double()[:, None] * y
        actual = residual.to(kernel_device, copy=True)
        gate = modulation.to(dtype).to(kernel_device)[:, 2 * n : 3 * n]
        assert linear_gate_residual_(actual, gate=gate, **to(kernel_device, p)) is actual
        assert_close(actual, expected, size=(gate.cpu().double().abs()[:, None] * y.abs()).max().item())
        if y.numel() < 1e5:
            linear_gate_residual_(residual, gate=gate.cpu(), **p)
            assert_close(residual, expected, size=(gate.cpu().double().abs()[:, None] * y.abs()).max().item())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    "shape",
    [(2, 35, 40, 384), (2, 35, 41, 384), (2, 64, 48, 128), (1, 40, 48, 192), (2, 256, 1152, 1152)],
    ids=str,
    indirect=True,
)
def test_int4_groups(kernel_device, shape, group, seeded):
    if kernel_device.type == "cpu" and shape[2] == 1152:
        pytest.skip("too large for the interpreter")
    if shape[3] % group:
        pytest.skip("groups must divide K")
    p, expected = make_layer(shape, seeded, bits=4, group=group)
    terms, weight = terms_of(p), p.pop("weight")
    q = to(kernel_device, p)
    actual = int4_linear(q.pop("xq"), weight.to(kernel_device), **q, out_dtype=torch.float32)
    assert_summed(actual, expected, terms, shape[3])
    assert_summed(int4_linear(p.pop("xq"), weight, **p, out_dtype=torch.float32), expected, terms, shape[3])


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 in groups"])
@all_shapes
def test_weight_only_linear(kernel_device, shape, kind, seeded):
    samples, tokens, n, k = shape
    if kind == "int4 in groups" and k % 64:
        pytest.skip("groups need a K that is a multiple of 64")
    wq = random_int8((n, k), seeded, 8 if kind == "int8" else 4)
    w_scale = (torch.rand((n, k // 32) if "groups" in kind else n, generator=seeded) + 0.5) / (k**0.5 * wq.abs().max())
    bias = torch.randn(n, generator=seeded)
    scales = w_scale.double().repeat_interleave(32, 1) if "groups" in kind else w_scale.double()[:, None]
    weight = wq if kind == "int8" else pack_int4(wq)
    for dtype in float_dtypes(kernel_device):
        x = torch.randn(samples, tokens, k, generator=seeded).to(dtype)
        expected = x.double() @ (wq.double() * scales).t() + bias.double()
        terms = x.double().abs() @ (wq.double() * scales).abs().t() + bias.double().abs()
        actual = weight_only_linear(*(t.to(kernel_device) for t in (x, weight, w_scale, bias)))
        assert_summed(actual, expected, terms, k)
        if expected.numel() < 1e5:
            assert_summed(reference.weight_only_linear(x, weight, w_scale, bias), expected, terms, k)


def weight_only_layer(n, k, bits, generator):
    """A weight as it is multiplied with, as it is stored, scales and bias."""
    wq = random_int8((n, k), generator, bits)
    w_scale = (torch.rand(n, generator=generator) + 0.5) / (k**0.5 * 2 ** (bits - 1))
    stored = wq if bits == 8 else pack_int4(wq)
    return wq.double() * w_scale.double()[:, None], stored, w_scale, torch.randn(n, generator=generator)


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("size", [(5, 2), (33, 258), (32, 512), (70, 600), (18432, 3072), (6912, 1152)], ids=str)
def test_weight_only_linear_of_few_rows(kernel_device, size, rows, bits, seeded):
    if kernel_device.type == "cpu" and size[0] > 1000:
        pytest.skip("too large for the interpreter")
    weight, *parameters = weight_only_layer(*size, bits, seeded)
    bias = parameters[-1].double()
    for dtype in float_dtypes(kernel_device):
        x = torch.randn(rows, size[1], generator=seeded).to(dtype)
        terms = x.double().abs() @ weight.abs().t() + bias.abs()
        actual = weight_only_linear(*(t.to(kernel_device) for t in (x, *parameters)))
        assert_summed(actual, x.double() @ weight.t() + bias, terms, size[1])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
def test_weight_only_linear_of_every_value(kernel_device, bits):
    """Each integer that a weight can be, by itself: what it becomes on its way to the product is exact."""
    low = -(1 << bits - 1)
    values = (
        torch.arange(low, -low, dtype=torch.int8).repeat_interleave(16)[:, None]
        * torch.eye(16, dtype=torch.int8)[torch.arange(16).repeat(-2 * low)]
    )
    weight = values if bits == 8 else pack_int4(values)
    for rows in (3, 40):
        for dtype in [d for d in float_dtypes(kernel_device) if d != torch.float32]:
            x = torch.ones(rows, 16, dtype=dtype)
            y = weight_only_linear(*(t.to(kernel_device) for t in (x, weight, torch.ones(len(values)))))
            assert torch.equal(y.cpu(), values.sum(1, dtype=torch.int32).to(dtype).expand(rows, -1))


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
def test_weight_only_linear_of_few_strided_rows(kernel_device, bits, seeded):
    weight, stored, w_scale, bias = weight_only_layer(40, 96, bits, seeded)
    x = torch.randn(96, 6, generator=seeded).half()
    for rows in (x.t(), torch.stack([x, x], 1).permute(2, 1, 0)[:, 0], x[:, :1].t().expand(4, -1)):
        actual = weight_only_linear(*(t.to(kernel_device) for t in (rows, spread(stored), spread(w_scale), bias)))
        terms = rows.double().abs() @ weight.abs().t() + bias.double().abs()
        assert_summed(actual, rows.double() @ weight.t() + bias.double(), terms, 96)


@pytest.mark.parametrize("bits", [8, 4], ids=["int8", "int4"])
def test_weight_only_rows_that_are_not_finite_keep_to_themselves(kernel_device, bits, seeded):
    """The largest float16 does not overflow on the way, infinity meets no zero beyond the edge of K."""
    weight, stored, w_scale, bias = weight_only_layer(40, 250, bits, seeded)
    x = torch.randn(6, 250, generator=seeded).half()
    x[1, 3], x[2, 249], x[4, 7:9] = float("nan"), float("inf"), 65504
    y = weight_only_linear(*(t.to(kernel_device) for t in (x, stored, w_scale, bias))).cpu()
    assert y[1].isnan().all()
    torch.testing.assert_close(y[2], (torch.inf * weight[:, 249]).half(), equal_nan=True)
    expected, terms = x.double() @ weight.t() + bias.double(), x.double().abs() @ weight.abs().t() + bias.abs()
    inside = expected[4].abs() < 65504
    assert inside.any()
    assert_summed(y[[0, 3, 5]], expected[[0, 3, 5]], terms[[0, 3, 5]], 250)
    assert_summed(y[4, inside], expected[4, inside], terms[4, inside], 250)


def test_strided_operands(kernel_device, seeded):
    xq = random_int8((60, 90), seeded).to(kernel_device)
    wq = random_int8((90, 50), seeded).to(kernel_device)
    for x, w in [(xq, wq.t()), (xq[::2, ::3], wq.t()[:, ::3]), (xq.t()[:, :40], random_int8((7, 40), seeded))]:
        w = w.to(kernel_device)
        assert torch.equal(int8_matmul(x, w).cpu(), exact(x.cpu(), w.cpu()))
    packed = pack_int4(wq.t().contiguous() >> 4)
    spread = torch.stack([packed, packed], dim=-1)[..., 0]
    out = torch.empty(60, 50, dtype=torch.int32, device=kernel_device)
    assert not spread.is_contiguous()
    mixed_gemm_triton(xq, spread, out)
    assert torch.equal(out.cpu(), exact(xq.cpu(), unpack_int4(packed).cpu()))


def test_strided_vectors_and_missing_weight_sum(kernel_device, seeded):
    p, expected = make_layer((1, 70, 40, 130), seeded, per_token=True)
    for name in ("x_scale", "w_scale", "bias"):
        p[name] = torch.stack([p[name], torch.full_like(p[name], float("nan"))], dim=-1)[..., 0]
        assert not p[name].is_contiguous()
    q = to(kernel_device, p)
    assert_close(int8_linear(q.pop("xq"), q.pop("weight"), **q, out_dtype=torch.float32), expected)


def spread(t):
    """The same values with something else between any two of them."""
    return torch.stack([t, torch.full_like(t, 77)], dim=-1)[..., 0]


def test_every_strided_operand(kernel_device, seeded):
    p, y = make_layer((2, 20, 40, 64), seeded, bits=4, group=32)
    p["w_sum"] = reference.weight_sum(p["weight"], p["w_scale"])
    multiplier, gate = torch.rand(40, generator=seeded) + 0.5, torch.randn(2, 40, generator=seeded)
    q = {name: t if t.ndim == 0 else spread(t) for name, t in to(kernel_device, p).items()}
    scale = torch.tensor(0.02, device=kernel_device)
    actual = linear_gelu_quantize(**q, out_scale=scale, multiplier=spread(multiplier.to(kernel_device)))
    assert_rounded(actual, gelu(y) * multiplier.double() / torch.tensor(0.02).double())
    residual = torch.zeros(2, 20, 40, device=kernel_device)
    linear_gate_residual_(residual, gate=spread(gate.to(kernel_device)), **q)
    assert_summed(residual, gate.double()[:, None] * y, gate.double().abs()[:, None] * terms_of(p), 64)


def test_k_of_zero(kernel_device):
    """Fresh tensors and slices of wider ones: sums of nothing."""
    for x, w in (
        (torch.zeros(40, 0, dtype=torch.int8), torch.zeros(32, 0, dtype=torch.int8)),
        (torch.zeros(40, 64, dtype=torch.int8)[:, :0], torch.zeros(32, 64, dtype=torch.int8)[:, :0]),
    ):
        assert not int8_matmul(x.to(kernel_device), w.to(kernel_device)).any()


def test_infinity_meets_no_zero(kernel_device):
    x = torch.ones(70, 160).half()
    x[:, 81] = float("inf")
    weight, scale = pack_int4(torch.ones(48, 160, dtype=torch.int8)), torch.ones(48)
    for n in (48, 47):
        y = weight_only_linear(*(t.to(kernel_device) for t in (x, weight[:n], scale[:n])))
        assert torch.equal(y.cpu(), torch.full((70, n), float("inf")).half())


@pytest.mark.parametrize(("m", "n"), [(0, 8), (8, 0)])
def test_no_rows_or_columns(kernel_device, m, n):
    xq = torch.zeros(m, 16, dtype=torch.int8, device=kernel_device)
    wq = torch.zeros(n, 16, dtype=torch.int8, device=kernel_device)
    assert int8_matmul(xq, wq).shape == (m, n)
    one, vector = torch.tensor(1.0, device=kernel_device), torch.ones(n, device=kernel_device)
    assert linear_gelu_quantize(xq, wq, one, vector, one).shape == (m, n)
    residual, gate = torch.zeros(1, m, n, device=kernel_device), torch.zeros(1, n, device=kernel_device)
    assert linear_gate_residual_(residual, xq[None], wq, one, vector, gate).shape == (1, m, n)


TILES = [
    GemmTile(16, 64, 32, 1, 4, 2),
    GemmTile(32, 64, 128, 4, 4, 3),
    GemmTile(64, 64, 64, 8, 4, 3, tma=0),
    GemmTile(64, 128, 64, 8, 4, 3, 2, 4),
    GemmTile(128, 128, 64, 2, 4, 2, 1, 2),
    GemmTile(128, 64, 64, 4, 8, 3, 0, 2, overlap=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, t)))
@pytest.mark.parametrize("n", [140, 144], ids=["pointers", "tma"])
def test_every_tile_gives_the_same(kernel_device, tile, n, seeded):
    """Persistent or not, in pieces or not; 140 columns of int32 are 16-byte rows, 100 deep rows of int8 are not."""
    k = 100 if n == 140 else 160
    xq, wq = random_int8((300, k), seeded), random_int8((n, k), seeded, 4)
    out = torch.empty(300, n, dtype=torch.int32, device=kernel_device)
    int8_gemm_triton(xq.to(kernel_device), wq.to(kernel_device), out, tile=tile)
    assert torch.equal(out.cpu(), exact(xq, wq))
    for weight in (pack_int4(wq), wq):
        out = torch.empty_like(out)
        mixed_gemm_triton(xq.to(kernel_device), weight.to(kernel_device), out, tile=tile)
        assert torch.equal(out.cpu(), exact(xq, wq))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_layers(kernel_device, data):
    """Shapes, strides, scales, epilogues and operands at random."""
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    samples, tokens, n = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 70))
    k = 2 * draw(st.integers(1, 80))
    bits = draw(st.sampled_from([8, 4]))
    p, y = make_layer(
        (samples, tokens, n, k), generator, bits=bits,
        per_token=draw(st.booleans()), bias=draw(st.booleans()), zero_point=draw(st.booleans()),
    )  # fmt: skip
    size = 10.0 ** draw(st.integers(-6, 4))
    p["w_scale"] *= size
    y = (y - (p["bias"].double() if p["bias"] is not None else 0)) * size
    if p["bias"] is not None:
        y += p["bias"].double()
    q = to(kernel_device, p)
    if draw(st.booleans()):  # every second element of something twice as wide
        q["xq"] = torch.stack([q["xq"], q["xq"] + 1], dim=-1)[..., 0]
    scale = torch.tensor(float(y.abs().max().clamp(min=1e-6)) / 100)
    ending = draw(st.sampled_from(["store", "gelu", "gate"]))
    if ending == "store":
        function = int4_linear if bits == 4 else int8_linear
        actual = function(q.pop("xq"), q.pop("weight"), **q, out_dtype=torch.float32)
        assert_close(actual, y, size=max(1.0, size) * 2)
    elif ending == "gelu":
        actual = linear_gelu_quantize(**q, out_scale=scale.to(kernel_device))
        assert_rounded(actual, gelu(y) / scale.double())
    else:
        residual = torch.randn(samples, tokens, n, generator=generator)
        gate = torch.randn(samples, n, generator=generator)
        expected = residual.double() + gate.double()[:, None] * y
        actual = linear_gate_residual_(residual.to(kernel_device), gate=gate.to(kernel_device), **q)
        assert_close(actual, expected, size=max(1.0, size) * 8)


def test_nan_scale_reaches_the_output(kernel_device, seeded):
    p, _ = make_layer((1, 20, 16, 32), seeded, per_token=True)
    p["x_scale"][0, 3] = float("nan")
    q = to(kernel_device, p)
    y = int8_linear(q.pop("xq"), q.pop("weight"), **q, out_dtype=torch.float32).cpu()
    assert y[0, 3].isnan().all()
    assert y.isnan().sum() == 16
    q = linear_gelu_quantize(**to(kernel_device, p), out_scale=torch.tensor(0.1, device=kernel_device)).cpu()
    assert (q[0, 3] == -128).all()
    assert torch.equal(q, reference.linear_gelu_quantize(**p, out_scale=torch.tensor(0.1)))


def test_ops_keep_leading_dimensions(seeded):
    xq, wq = random_int8((2, 3, 32), seeded), random_int8((5, 32), seeded)
    scale = torch.rand(2, 3, generator=seeded)
    y = int8_linear(xq, wq, scale, torch.ones(5), out_dtype=torch.float32)
    assert y.shape == (2, 3, 5)
    torch.testing.assert_close(y, exact(xq, wq).float() * scale[..., None])


def test_reference_stays_exact_under_autocast(seeded):
    xq, wq = random_int8((40, 1152), seeded), random_int8((30, 1152), seeded)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(int8_matmul(xq, wq), exact(xq, wq))


def test_empty_inputs_of_the_ops():
    wq, one = torch.ones(5, 0, dtype=torch.int8), torch.tensor(1.0)
    y = int8_linear(torch.zeros(2, 3, 0, dtype=torch.int8), wq, one, torch.ones(5), torch.arange(5.0))
    assert torch.equal(y, torch.arange(5.0).expand(2, 3, 5).to(torch.bfloat16))
    assert int8_matmul(torch.zeros(0, 4, 8, dtype=torch.int8), torch.zeros(5, 8, dtype=torch.int8)).shape == (0, 4, 5)


def test_weight_sum_may_be_left_out(seeded):
    p, _ = make_layer((1, 9, 12, 64), seeded)
    weight, xq = p.pop("weight"), p.pop("xq")
    given_sum = int8_linear(xq, weight, **p, w_sum=weight.sum(1, dtype=torch.int32), out_dtype=torch.float32)
    assert torch.equal(int8_linear(xq, weight, **p, out_dtype=torch.float32), given_sum)
    p, _ = make_layer((1, 9, 12, 64), seeded, bits=4, group=32)
    weight, xq = p.pop("weight"), p.pop("xq")
    w_sum = (unpack_int4(weight) * p["w_scale"].repeat_interleave(32, 1)).sum(1)
    given_sum = int4_linear(xq, weight, **p, w_sum=w_sum, out_dtype=torch.float32)
    assert torch.equal(int4_linear(xq, weight, **p, out_dtype=torch.float32), given_sum)


def test_int4_equals_int8_of_the_unpacked_weight(seeded):
    p, _ = make_layer((1, 9, 12, 20), seeded, bits=4)
    weight, xq = p.pop("weight"), p.pop("xq")
    expected = int8_linear(xq, unpack_int4(weight), **p, out_dtype=torch.float32)
    assert torch.equal(int4_linear(xq, weight, **p, out_dtype=torch.float32), expected)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scale(seeded):
    """Scales are read on the device: a replay uses what they hold then."""
    p, _ = make_layer((1, 256, 192, 192), seeded)
    q = to(torch.device("cuda"), p)
    args = (q.pop("xq"), q.pop("weight"))
    int8_linear(*args, **q, out_dtype=torch.float32)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        y = int8_linear(*args, **q, out_dtype=torch.float32)
    q["x_scale"] *= 3
    graph.replay()
    assert torch.equal(y, int8_linear(*args, **q, out_dtype=torch.float32))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_whole_layer_in_one_call(kernel_device, seeded, packed, static, smooth):
    """The integers of the two ops it stands for; NaN raises the flag behind a static range, and passes without."""
    k, n = 72, 40  # tails everywhere
    x = torch.randn(3, 7, k, generator=seeded).half()[:, ::2]
    weight = torch.randint(-7, 8, (n, k), generator=seeded, dtype=torch.int8)
    w_scale, w_sum = torch.rand(n, generator=seeded), weight.sum(1, dtype=torch.int32)
    smoothing = torch.rand(k, generator=seeded) + 0.5 if smooth else None
    scale, zero = (torch.tensor(0.03), torch.tensor(9, dtype=torch.int32)) if static else (None, None)
    weight = pack_int4(weight) if packed else weight
    bias, flag = torch.randn(n, generator=seeded).half(), torch.zeros((), dtype=torch.int32)

    def run(x, flag):
        operands = (x, weight, w_scale, bias, scale, zero, w_sum, smoothing, 8, torch.float32, flag)
        on_device = [t.to(kernel_device) if isinstance(t, torch.Tensor) else t for t in operands]
        y = quantized_linear(*on_device)
        expected = reference.quantized_linear(*operands)
        return y.cpu(), expected, None if flag is None else on_device[-1].cpu()

    y, expected, raised = run(x, flag.clone())
    y_smooth = x if smoothing is None else x.float() * (1.0 / smoothing)
    quantized = (
        reference.quantize_per_token(y_smooth)
        if scale is None
        else (reference.quantize_per_tensor(y_smooth, scale, zero), scale)
    )
    linear = reference.int4_linear if packed else reference.int8_linear
    assert torch.equal(expected, linear(quantized[0], weight, quantized[1], w_scale, bias, zero, w_sum, torch.float32))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert not raised
    x = x.clone()
    x[1, 2, 5] = float("nan")
    y, _, raised = run(x, flag)
    assert bool(raised) is static
    assert y.isnan().any() != static
    assert run(x[:0], None)[0].shape == (0, 4, n)
