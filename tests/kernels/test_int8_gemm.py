"""The W8A8 product: integer accumulators bit for bit, scaled outputs within rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_kernels import int4_linear, int8_linear, int8_matmul, pack_int4, reference
from qandc_kernels.int8_gemm import int8_gemm_triton
from qandc_kernels.tiles import GemmTile, int8_gemm_tile

# (M, N, K); tails in every dimension for every tile. The interpreter gets the small ones.
SHAPES = [(1, 5, 7), (17, 33, 100), (64, 64, 128), (70, 40, 130), (1, 192, 192), (256, 96, 192)]
LARGE_SHAPES = [
    (727, 577, 859),
    (1, 1152, 1152),
    (17, 3456, 1152),
    (256, 4608, 1152),
    (727, 1152, 4608),
    (4096, 80, 1152),
]
# an output is the exact sum scaled in fp32, then cast once: fp32 keeps a few ulp, the others half an ulp of theirs
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}


def random_int8(shape, generator):
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def exact(xq, wq):
    return (xq.long() @ wq.long().t()).int()


def problem(shape, generator):
    m, n, k = shape
    return {
        "xq": random_int8((m, k), generator),
        "wq": random_int8((n, k), generator),
        "x_scale": torch.rand(m, generator=generator) * 0.01 + 1e-4,
        "w_scale": torch.rand(n, generator=generator) * 0.01 + 1e-4,
        "bias": torch.randn(n, generator=generator),
        "x_zero_point": torch.tensor(-37, dtype=torch.int32),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulators_are_exact(kernel_device, shape, seeded):
    xq, wq = random_int8((shape[0], shape[2]), seeded), random_int8((shape[1], shape[2]), seeded)
    assert torch.equal(reference.int8_matmul(xq, wq), exact(xq, wq))
    assert torch.equal(int8_gemm_triton(xq.to(kernel_device), wq.to(kernel_device)).cpu(), exact(xq, wq))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_accumulators_are_exact_at_dit_sizes(shape, seeded):
    xq, wq = random_int8((shape[0], shape[2]), seeded), random_int8((shape[1], shape[2]), seeded)
    assert torch.equal(int8_matmul(xq.cuda(), wq.cuda()).cpu(), exact(xq, wq))


def test_accumulators_are_exact_at_the_extremes(kernel_device):
    """K = 4608 products of 127 · 127: 7.4e7 in odd steps, which fp32 cannot count; and the largest, -128 · -128."""
    xq = torch.full((3, 4608), 127, dtype=torch.int8)
    xq[1, 7] = 126
    xq[2] = -128
    wq = torch.full((3, 4608), 127, dtype=torch.int8)
    wq[1, 4607] = 1
    wq[2] = -128
    assert int(exact(xq, wq)[1, 0]) != int(exact(xq, wq)[1, 0].float())  # else this shows nothing
    assert torch.equal(reference.int8_matmul(xq, wq), exact(xq, wq))
    assert torch.equal(int8_gemm_triton(xq.to(kernel_device), wq.to(kernel_device)).cpu(), exact(xq, wq))


@pytest.mark.parametrize("per_token", [False, True], ids=["per_tensor", "per_token"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("has_zero_point", [False, True], ids=["symmetric", "zero_point"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (70, 40, 130)], ids=str)
def test_linear_equals_float64(kernel_device, shape, per_token, has_bias, has_zero_point, seeded):
    p = problem(shape, seeded)
    if not per_token:
        p["x_scale"] = p["x_scale"][0]
    z = int(p["x_zero_point"]) if has_zero_point else 0
    exact_rows = p["x_scale"].double().reshape(-1, 1)
    y = (p["xq"].double() - z) @ p["wq"].double().t() * exact_rows * p["w_scale"].double()
    if has_bias:
        y += p["bias"].double()
    else:
        p["bias"] = None
    if not has_zero_point:
        p["x_zero_point"] = None
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if kernel_device.type == "cuda" else [])
    w_sum = p["wq"].sum(1, dtype=torch.int32) if has_zero_point else None
    on_device = {name: None if t is None else t.to(kernel_device) for name, t in p.items()}
    for dtype in dtypes:
        atol, rtol = TOLERANCES[dtype]
        expected = y.to(dtype)
        actual = int8_gemm_triton(
            **on_device, w_sum=None if w_sum is None else w_sum.to(kernel_device), out_dtype=dtype
        )
        torch.testing.assert_close(actual.cpu(), expected, atol=atol, rtol=rtol)
        torch.testing.assert_close(reference.int8_linear(**p, out_dtype=dtype), expected, atol=atol, rtol=rtol)


def test_strided_operands(kernel_device, seeded):
    xq = random_int8((60, 90), seeded).to(kernel_device)
    wq = random_int8((90, 50), seeded).to(kernel_device)
    for x, w in [(xq, wq.t()), (xq[::2, ::3], wq.t()[:, ::3]), (xq.t()[:, :40], random_int8((7, 40), seeded))]:
        w = w.to(kernel_device)
        assert torch.equal(int8_gemm_triton(x, w).cpu(), exact(x.cpu(), w.cpu()))


@pytest.mark.parametrize(("m", "n"), [(0, 8), (8, 0)])
def test_no_rows_or_columns(kernel_device, m, n):
    xq = torch.zeros(m, 16, dtype=torch.int8, device=kernel_device)
    wq = torch.zeros(n, 16, dtype=torch.int8, device=kernel_device)
    assert int8_gemm_triton(xq, wq).shape == (m, n)


@pytest.mark.parametrize(
    "tile",
    [GemmTile(16, 64, 32, 1, 4, 2), GemmTile(32, 64, 128, 4, 4, 3), GemmTile(64, 128, 64, 8, 4, 4)],
    ids=lambda t: f"{t.block_m}x{t.block_n}x{t.block_k}",
)
def test_every_tile_gives_the_same(kernel_device, tile, seeded):
    xq, wq = random_int8((150, 100), seeded), random_int8((140, 100), seeded)
    actual = int8_gemm_triton(xq.to(kernel_device), wq.to(kernel_device), tile=tile)
    assert torch.equal(actual.cpu(), exact(xq, wq))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), k=st.integers(1, 150), seed=st.integers(0, 2**31))
@pytest.mark.interpret
def test_random_shapes(m, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    xq, wq = random_int8((m, k), generator), random_int8((n, k), generator)
    assert torch.equal(int8_gemm_triton(xq, wq), exact(xq, wq))


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


@pytest.mark.gpu
def test_strided_scales_and_missing_weight_sum_on_the_gpu(seeded):
    p = problem((70, 40, 130), seeded)
    expected = int8_linear(**p, out_dtype=torch.float32)
    q = {name: t.cuda() for name, t in p.items()}
    for name in ("x_scale", "w_scale", "bias"):
        q[name] = torch.stack([q[name], torch.full_like(q[name], float("nan"))], dim=1)[:, 0]
        assert not q[name].is_contiguous()
    torch.testing.assert_close(int8_linear(**q, out_dtype=torch.float32).cpu(), expected, atol=1e-6, rtol=1e-6)


def test_weight_sum_may_be_left_out(seeded):
    p = problem((9, 12, 20), seeded)
    given_sum = int8_linear(**p, w_sum=p["wq"].sum(1, dtype=torch.int32), out_dtype=torch.float32)
    assert torch.equal(int8_linear(**p, out_dtype=torch.float32), given_sum)


def test_int4_equals_int8_of_the_unpacked_weight(seeded):
    p = problem((9, 12, 20), seeded)
    p["wq"] = torch.randint(-8, 8, (12, 20), generator=seeded, dtype=torch.int8)
    expected = int8_linear(**p, out_dtype=torch.float32)
    p["wq_packed"] = pack_int4(p.pop("wq"))
    assert torch.equal(int4_linear(**p, out_dtype=torch.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("op", ["int8", "int4"])
def test_ops_agree_on_gpu_and_cpu(op, out_dtype, seeded):
    p = problem((256, 1152, 1152), seeded)
    if op == "int4":
        p["wq_packed"] = pack_int4(torch.randint(-8, 8, (1152, 1152), generator=seeded, dtype=torch.int8))
        del p["wq"]
    function = int8_linear if op == "int8" else int4_linear
    expected = function(**p, out_dtype=out_dtype)
    actual = function(**{name: t.cuda() for name, t in p.items()}, out_dtype=out_dtype).cpu()
    atol, rtol = TOLERANCES[out_dtype]
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_heuristic_tiles_fit_shared_memory(capability):
    limits = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
    for m in (1, 17, 64, 256, 1000, 4096, 16384):
        for n in (32, 1152, 3456, 4608):
            tile = int8_gemm_tile(m, n, capability)
            stage = (tile.block_m + tile.block_n) * tile.block_k
            assert stage * tile.num_stages <= limits[capability] * 1024
