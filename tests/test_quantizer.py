"""The quantizer's equations (Q&C Eq. 1-3), and what its settings refuse."""

from __future__ import annotations

import pytest
import torch

from qandc import ConfigError, DataError, QuantConfig
from qandc.quantizer import parse_scheme, quantize_weight, scale_and_zero_point


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weight_error_is_at_most_half_a_step(bits, dtype, seeded):
    weight = torch.randn(7, 33, generator=seeded).to(dtype)
    q, scale = quantize_weight(weight, bits)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(q.abs().amax(1), torch.full((7,), 2 ** (bits - 1) - 1, dtype=torch.int8))
    assert ((q * scale[:, None] - weight.float()).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [3, 16, 64, 300])
def test_mse_finds_the_least_squared_error(bits, k, seeded):
    """Compare the clipped scale's error with the best of 1001 scales, half of the largest weight to all: within 1 %."""
    qmax = 2 ** (bits - 1) - 1
    for weight in (torch.randn(24, k, generator=seeded), torch.rand(24, k, generator=seeded) - 0.5):
        widest = weight.abs().amax(1) / qmax

        def error(scale, weight=weight):
            q = (weight / scale[:, None]).round().clamp(-qmax, qmax)
            return (q * scale[:, None] - weight).double().square().sum(1)

        least = torch.stack([error(widest * factor) for factor in torch.linspace(0.5, 1, 1001)]).amin(0)
        q, scale = quantize_weight(weight, bits, "mse")
        assert ((scale >= widest * 0.4999) & (scale <= widest * 1.0001)).all()
        assert torch.equal(q, (weight / scale[:, None]).round().clamp(-qmax, qmax).to(torch.int8))
        assert (error(scale) <= 1.01 * least + 1e-12).all()


def test_mse_keeps_what_is_exact():
    weight = torch.tensor([[1.0, -3.0, 7.0], [0.0, 0.0, 0.0]])
    q, scale = quantize_weight(weight, 4, "mse")
    assert torch.equal(q, torch.tensor([[1, -3, 7], [0, 0, 0]], dtype=torch.int8))
    assert scale[0] == 1
    assert torch.isfinite(scale).all()


def test_channel_of_zeros():
    q, scale = quantize_weight(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), 8)
    assert torch.equal(q, torch.tensor([[0, 0], [64, -127]], dtype=torch.int8))
    assert (scale > 0).all()


def test_asymmetric_range_uses_all_levels():
    scale, zero_point = scale_and_zero_point(torch.tensor(-0.17), torch.tensor(5.0), 8)
    torch.testing.assert_close(scale, torch.tensor(5.17 / 255))
    assert zero_point.dtype == torch.int32
    low, high = (round(v / scale.item()) + zero_point.item() for v in (-0.17, 5.0))
    assert (low, high) == (-128, 127)


@pytest.mark.parametrize(("low", "high", "z"), [(1.0, 3.0, -128), (-3.0, -1.0, 127), (0.0, 0.0, -128)])
def test_range_is_extended_to_hold_zero(low, high, z):
    scale, zero_point = scale_and_zero_point(torch.tensor(low), torch.tensor(high), 8)
    assert zero_point.item() == z
    assert scale > 0


def test_symmetric_range():
    scale, zero_point = scale_and_zero_point(torch.tensor(-2.0), torch.tensor(1.0), 8, symmetric=True)
    assert zero_point is None
    torch.testing.assert_close(scale, torch.tensor(2 / 127))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_range_must_be_finite(bad):
    with pytest.raises(DataError, match="not finite"):
        scale_and_zero_point(torch.tensor(0.0), torch.tensor(bad), 8)


def test_range_wider_than_float32_is_refused():
    with pytest.raises(DataError, match="wider than float32"):
        scale_and_zero_point(torch.tensor(-2e38), torch.tensor(2e38), 8)


def test_empty_range_is_refused():
    with pytest.raises(DataError, match="empty"):
        scale_and_zero_point(torch.tensor(1.0), torch.tensor(-1.0), 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_bits": 3}, "w_bits is 3; allowed are 4 and 8"),
        ({"a_bits": 9}, "a_bits is 9; allowed are 4, 5, 6, 7, 8, 16"),
        ({"a_bits": 32}, "a_bits is 32; allowed are"),
        ({"skip_patterns": [""]}, "non-empty"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**settings)


def test_config_is_a_value():
    assert QuantConfig(skip_patterns=["norm"]) == QuantConfig(skip_patterns=("norm",))
    assert QuantConfig(w_bits=4).scheme == "W4A8"
    config = QuantConfig(skip_patterns=("pos_embed", "norm"))
    assert config.skips("transformer_blocks.0.norm1.linear")
    assert not config.skips("transformer_blocks.0.attn1.to_q")
    with pytest.raises(ConfigError, match="skip_patterns is None, which depends on the model"):
        QuantConfig().skips("proj_out")


def test_schemes_are_read():
    assert parse_scheme("W4A8") == (4, 8)
    for scheme, message in {
        "W8": "'W8' is no scheme; give bits of weights and of activations, as 'W8A8'",
        "W8A8 ": "is no scheme",
        "W3A8": "w_bits is 3; allowed are 4 and 8",
        "W8A99": "a_bits is 99; allowed are 4",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_scheme(scheme)
        with pytest.raises(ConfigError, match=message):
            QuantConfig(conditioning=scheme)
