"""RMSNorm of heads and rotary embedding in one kernel, against diffusers' modules and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qandc_kernels import qk_norm_rope_, reference
from tests.kernels.oracle import assert_close, float_dtypes

SHAPES = [(1, 5, 2, 16), (2, 7, 3, 24), (1, 3, 24, 128), (2, 1, 1, 2), (1, 4, 40, 64)]  # samples, tokens, heads, D


def make(shape, generator, dtype=torch.float32, device="cpu"):
    samples, tokens, heads, width = shape
    qkv = torch.randn(samples, tokens, 3, heads, width, generator=generator).mul(3).to(dtype)
    weights = (torch.rand(2, width, generator=generator) + 0.5).to(dtype)
    angles = torch.randn(tokens, width, generator=generator) * 3
    return tuple(t.to(device) for t in (qkv, *weights, angles.cos(), (angles + 1).sin()))


def exact(qkv, q_weight, k_weight, cos, sin, eps=1e-6):
    """q and k in float64, rounded between norm and rotation."""
    both = []
    for x, weight in ((qkv[:, :, 0], q_weight), (qkv[:, :, 1], k_weight)):
        y = F.rms_norm(x.double(), x.shape[-1:], weight.double(), eps).to(qkv.dtype).double()
        pairs = y.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
        both.append(y * cos.double()[:, None] + turned * sin.double()[:, None])
    return torch.stack(both, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(kernel_device, shape, seeded):
    for dtype in float_dtypes(kernel_device):
        arguments = make(shape, seeded, dtype)
        expected = exact(*arguments)
        for op, device in ((qk_norm_rope_, kernel_device), (reference.qk_norm_rope_, "cpu")):
            qkv, *others = (t.to(device, copy=True) for t in arguments)
            assert op(qkv, *others) is qkv
            # a norm that falls on the other side of a rounding boundary turns into two values
            assert_close(qkv[:, :, :2], expected, size=8)
            assert torch.equal(qkv[:, :, 2].cpu(), arguments[0][:, :, 2])


def test_rounds_where_diffusers_does(kernel_device, seeded):
    from diffusers.models.embeddings import apply_rotary_emb

    for dtype in float_dtypes(kernel_device)[1:]:
        qkv, q_weight, k_weight, cos, sin = make((2, 9, 3, 64), seeded, dtype, kernel_device)
        for norm_in in (1e-4, 1.0):
            expected = [
                apply_rotary_emb(F.rms_norm(x * norm_in, (64,), weight, 1e-6), (cos, sin), sequence_dim=1)
                for x, weight in ((qkv[:, :, 0], q_weight), (qkv[:, :, 1], k_weight))
            ]
            found = qk_norm_rope_(qkv * norm_in, q_weight, k_weight, cos, sin)
            # but for sums of squares in another order, which can move one norm in a thousand to its neighbour
            for x, y in zip(found.unbind(2), expected, strict=False):
                assert (x != y).float().mean() < 0.02
                torch.testing.assert_close(x, y, atol=0.01, rtol=0.01)


def test_rows_of_a_joint_sequence(kernel_device, seeded):
    """Text and image have norms of their own: two calls, each on its tokens and its rows of the tables."""
    qkv, q_weight, k_weight, cos, sin = make((2, 9, 3, 16), seeded, device=kernel_device)
    expected = torch.cat(
        [
            qk_norm_rope_(qkv[:, rows].contiguous(), first, second, cos[rows], sin[rows])
            for rows, first, second in ((slice(0, 4), k_weight, q_weight), (slice(4, 9), q_weight, k_weight))
        ],
        1,
    )
    qk_norm_rope_(qkv[:, :4], k_weight, q_weight, cos[:4], sin[:4])
    assert torch.equal(qkv[:, :4], expected[:, :4])
    qk_norm_rope_(qkv[:, 4:], q_weight, k_weight, cos[4:], sin[4:])
    assert torch.equal(qkv, expected)


def test_any_strides(kernel_device, seeded):
    qkv, q_weight, k_weight, cos, sin = make((2, 6, 3, 24), seeded, device=kernel_device)
    expected = qk_norm_rope_(qkv.clone(), q_weight, k_weight, cos, sin, 1e-3)
    within = torch.full((3, 2, 6, 3, 30), 7.0, device=kernel_device)  # parts first, heads with gaps
    view = within[..., :24].permute(1, 2, 0, 3, 4)
    view.copy_(qkv)
    twice = [t.repeat_interleave(2, -1)[..., ::2] for t in (q_weight, k_weight, cos, sin)]
    assert torch.equal(qk_norm_rope_(view, *twice, 1e-3), expected)
    assert (within[..., 24:] == 7).all()


def test_tables_of_pairs(kernel_device, seeded):
    """Make rotary tables as a complex tensor holds them, cosine and sine in turn: one angle for two values."""
    qkv, q_weight, k_weight, cos, sin = make((2, 6, 3, 24), seeded, device=kernel_device)
    cos, sin = cos[:, :12], sin[:, :12]
    pairs = torch.view_as_real(torch.complex(cos, sin)).unbind(-1)
    expected = qk_norm_rope_(qkv.clone(), q_weight, k_weight, *(t.repeat_interleave(2, -1) for t in (cos, sin)))
    for op in (qk_norm_rope_, reference.qk_norm_rope_):
        torch.testing.assert_close(op(qkv.clone(), q_weight, k_weight, *pairs), expected)


def test_norms_alone(kernel_device, seeded):
    qkv, q_weight, k_weight, cos, _ = make((2, 6, 3, 24), seeded, device=kernel_device)
    still = torch.ones_like(cos), torch.zeros_like(cos)
    expected = reference.qk_norm_rope_(qkv.clone(), q_weight, k_weight, *still)
    for op in (qk_norm_rope_, reference.qk_norm_rope_):
        torch.testing.assert_close(op(qkv.clone(), q_weight, k_weight, None, None), expected)


def test_nan_and_no_tokens(kernel_device, seeded):
    qkv, *others = make((1, 3, 2, 16), seeded, device=kernel_device)
    qkv[0, 1, 0, 1, 3] = float("nan")
    found = qk_norm_rope_(qkv, *others).isnan().nonzero().cpu()
    assert found[:, :4].unique(dim=0).tolist() == [[0, 1, 0, 1]]  # that head alone
    assert len(found) == 16
    assert qk_norm_rope_(qkv[:0], *others).shape == (0, 3, 3, 2, 16)
