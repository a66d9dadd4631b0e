"""Static ranges from samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qandc import (
    ConfigError,
    DataError,
    ModelError,
    QuantLinear,
    RangeConfig,
    calibrate,
    calibrate_steps,
    calibration,
    fuse_dit,
    quantize_model,
    smoothing_factors,
)
from qandc.quantization.conversion import quant_layers
from qandc.quantization.ranges import Histogram, estimate_range, squared_errors
from qandc.quantizer import quantize_weight, scale_and_zero_point
from tests.conftest import make_dit


def model_and_batches():
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)))
    return model, [torch.randn(10, 8) for _ in range(3)]


def test_ranges_are_the_extremes_of_all_batches():
    """The largest value is in the first batch, the smallest in the second."""
    model, batches = model_and_batches()
    batches[0][0, 0], batches[1][0, 0] = 7.0, -5.0
    assert calibrate(model, iter(batches)) is model
    x = torch.cat(batches)
    scale = (x.max() - x.min()) / 255
    torch.testing.assert_close(model[0].act_scale, scale)
    assert model[0].act_zero_point == (-128 - x.min() / scale).round().int()


def test_range_of_the_input_after_gelu():
    model, batches = model_and_batches()
    calibrate(model, batches)
    assert model[2].act_zero_point < -100  # nearly all levels are above zero


def test_a_layer_that_saw_zeros_only_stays_dynamic_and_is_logged(caplog):
    model, _ = model_and_batches()
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    with caplog.at_level("WARNING", "qandc.quantization.observe"):
        calibrate(model, [torch.zeros(3, 8)])
    assert model[0].act_scale is None
    assert model[2].act_scale is not None
    assert "no range for 1 layers" in caplog.text


@pytest.mark.parametrize("batches", [torch.zeros(2, 8), {"input": torch.zeros(2, 8)}], ids=["tensor", "mapping"])
def test_one_batch_outside_a_list_is_refused(batches):
    model, _ = model_and_batches()
    with pytest.raises(DataError, match="put it in a list"):
        calibrate(model, batches)


def test_a_range_too_wide_changes_nothing():
    model, batches = model_and_batches()
    calibrate(model, batches)
    before = [model[0].act_scale.clone(), model[2].act_scale.clone()]
    batches[0][0, :2] = torch.tensor([-2e38, 2e38])
    with pytest.raises(DataError, match=r"layer [02]: activation range"):
        calibrate(model, batches)
    assert [model[0].act_scale, model[2].act_scale] == before


def test_symmetric_ranges_have_no_zero_point():
    model, batches = model_and_batches()
    calibrate(model, batches, symmetric=True)
    torch.testing.assert_close(model[0].act_scale, torch.cat(batches).abs().max() / 127)
    assert model[0].act_zero_point is None


def test_batches_may_be_mappings_sequences_or_tensors(dit, dit_inputs):
    quantize_model(dit)
    calibrate(dit, [dit_inputs])
    dynamic = [name for name, layer in quant_layers(dit).items() if layer.act_scale is None]
    assert dynamic == ["proj_out_1"]  # of the final modulation
    scale = dit.proj_out_2.act_scale.clone()
    calibrate(dit, [tuple(dit_inputs.values())])
    assert torch.equal(dit.proj_out_2.act_scale, scale)


def test_any_code_may_run_the_model_inside_the_block():
    model, batches = model_and_batches()
    expected, _ = model_and_batches()
    calibrate(expected, batches, ranges=RangeConfig("mse", symmetric=True))
    by_function, _ = model_and_batches()
    calibrate(by_function, lambda: [by_function(x) for x in batches], ranges=RangeConfig("mse", symmetric=True))
    calibrate(model, [100 * x for x in batches])  # ranges that must not be in the way of what comes
    with calibration(model, ranges=RangeConfig("mse", symmetric=True)):
        for x in batches:
            assert model[0].act_scale is None
            with torch.inference_mode():
                model(input=x)
    for index in (0, 2):
        assert torch.equal(model[index].act_scale, expected[index].act_scale)
        assert torch.equal(by_function[index].act_scale, expected[index].act_scale)
        assert not model[index]._forward_pre_hooks


def test_after_an_exception_inside_the_block_the_model_is_as_before():
    model, batches = model_and_batches()
    calibrate(model, batches)
    before = [(model[i].act_scale.clone(), model[i].act_zero_point.clone()) for i in (0, 2)]
    with pytest.raises(ValueError, match="agree in K"), calibration(model):
        model(torch.cat([model(batches[0] * 10)] * 4))
    with pytest.raises(DataError, match="run it inside the block"), calibration(model):
        pass
    assert [(model[i].act_scale, model[i].act_zero_point) for i in (0, 2)] == before
    assert not model[0]._forward_pre_hooks


def test_a_full_precision_model_is_told_what_comes_first():
    with pytest.raises(ModelError, match="call quantize_model first"), calibration(nn.Sequential(nn.Linear(2, 2))):
        pass


class Modulated(nn.Module):
    """A block in the small: tokens, and a modulation of one row per sample that follows the timestep."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, tokens, t):
        sizes = torch.arange(1, 17) / 16
        scale = self.time(torch.cos(t[:, None] * sizes) * (1 + t[:, None] / 10))
        return self.down(torch.relu(self.up(tokens * (1 + torch.tanh(scale[:, None])))))


def modulated_batches(timesteps):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 6, 16, generator=generator), torch.full((2,), float(t))) for t in timesteps]


def test_layers_that_see_one_row_per_sample_stay_dynamic(caplog):
    """A range of the timestep layer that was found at other timesteps would be many times too wide."""
    model = quantize_model(Modulated())
    reference, batches = Modulated(), modulated_batches([900, 500, 100])
    model.time.set_static_range(torch.tensor(1.0))
    with caplog.at_level("INFO", "qandc.quantization.observe"):
        calibrate(model, batches)
    assert caplog.text.count("1 layers keep dynamic ranges") == 1
    assert "from step to step: time\n" in caplog.text
    assert model.time.act_scale is None
    assert model.up.act_scale is not None
    assert model.down.act_scale is not None

    def error(model):
        elsewhere = modulated_batches([7, 3])
        pairs = [(model(*batch), reference(*batch)) for batch in elsewhere]
        return max(((found - exact).norm() / exact.norm()).item() for found, exact in pairs)

    kept = error(model)
    model.time.set_static_range(torch.tensor((1 + 900 / 10) / 127))  # the largest input that was seen
    assert kept < 0.03
    assert error(model) > 2 * kept


@pytest.mark.parametrize("shape", [(5, 8), (8,), (5, 1, 8)], ids=["rows", "vector", "one token"])
def test_layers_that_all_see_one_row_per_sample_get_static_ranges(shape):
    torch.manual_seed(0)
    model = quantize_model(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)))
    calibrate(model, [torch.randn(shape)])
    assert model[0].act_scale is not None
    assert model[2].act_scale is not None


@pytest.mark.parametrize("how", ["by name", "by position", "by function"])
def test_the_timestep_is_found_by_the_signature(how):
    model = quantize_model(Modulated())
    batches = modulated_batches([900, 100])
    as_given = {
        "by name": [{"tokens": tokens, "t": t} for tokens, t in batches],
        "by position": batches,
        "by function": lambda: [model(*batch) for batch in batches],
    }[how]
    found = calibrate_steps(model, as_given)
    assert found.timesteps.tolist() == [900, 100]
    assert found.scales.keys() == {"up", "down"}
    for i, batch in enumerate(batches):
        calibrate(model, [batch])
        assert found.scales["up"][i] == model.up.act_scale
    assert not model._forward_pre_hooks


def test_static_is_close_to_dynamic():
    model, batches = model_and_batches()
    dynamic = model(batches[0])
    calibrate(model, batches)
    error = (model(batches[0]) - dynamic).norm() / dynamic.norm()
    assert 0 < error < 0.05


def test_layers_that_no_batch_reaches_stay_dynamic():
    model, batches = model_and_batches()
    model.unused = QuantLinear(8, 8)
    model.forward = lambda x: nn.Sequential(model[0], model[1], model[2])(x)
    calibrate(model, batches)
    assert model.unused.act_scale is None


def test_empty_set_is_refused():
    model, _ = model_and_batches()
    with pytest.raises(DataError, match="calibration set is empty"):
        calibrate(model, [])


def test_weight_only_layers_have_no_range_and_no_warning(dit, caplog):
    quantize_model(dit, a_bits=16, skip_patterns=["emb", "attn1", "ff", "proj_out"])
    with pytest.raises(ModelError, match=r"weight-only \(a_bits 16\), .* nothing to calibrate"):
        calibrate(dit, dit_batches([900]))
    quantize_model(dit)
    calibrate(dit, dit_batches([900]))
    found = calibrate_steps(dit, dit_batches([900, 100]))
    assert not any("norm" in name for name in found.scales)
    assert len(found.scales) == 3 * 6 + 1
    schemes = {name: layer.scheme for name, layer in quant_layers(dit).items()}
    assert {scheme for name, scheme in schemes.items() if "norm" in name} == {"W8A16 weight-only"}
    assert schemes.pop("proj_out_1") == "W8A8 dynamic per-token"  # it sees one row per sample
    assert {scheme for name, scheme in schemes.items() if "norm" not in name} == {"W8A8 static per-tensor"}
    assert not caplog.records


# ---- estimators


def seen_by(*tensors):
    histogram = Histogram()
    for tensor in tensors:
        histogram.add(tensor)
    return histogram


def test_a_histogram_counts_every_value_where_it_is():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1000, generator=generator) * size for size in (0.1, 1.0, 30.0, 0.001)]
    histogram = seen_by(*parts)
    whole = torch.cat(parts)
    assert histogram.counts.sum() == 4000
    assert (histogram.minimum, histogram.maximum) == (whole.min(), whole.max())
    width = 2 * histogram.reach / len(histogram.counts)
    for bound in (-5.0, -0.01, 0.0, 0.5, 20.0):
        below = histogram.counts[histogram.values() < bound].sum().item()
        # exact but for values within a bin of the bound
        near = ((whole - bound).abs() <= width).sum().item()
        assert abs(below - (whole < bound).sum().item()) <= near


def test_merged_histograms_are_those_of_all_values():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(500, generator=generator), torch.randn(500, generator=generator) * 100
    for first, second in ((small, large), (large, small), (small, small)):
        merged = seen_by(first)
        merged.merge(seen_by(second))
        together = seen_by(first, second)
        assert merged.reach == together.reach
        assert torch.equal(merged.counts, together.counts)
        assert (merged.minimum, merged.maximum) == (together.minimum, together.maximum)
    empty = Histogram()
    empty.merge(seen_by(small))
    empty.merge(Histogram())
    assert torch.equal(empty.counts, seen_by(small).counts)


def test_bins_are_told_by_the_bits_of_a_value():
    """Each value falls into the bin whose edges, in float64, are around it; values on an edge go away from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator) * 2.0 ** torch.randint(-60, 20, (20_000,), generator=generator)
    edges = seen_by(x).edges()
    on_edges = edges[1:-1].float()
    x = torch.cat([x, on_edges, torch.tensor([0.0, -0.0, 1e-45, -1e-45])])
    histogram = seen_by(x)
    assert torch.equal(histogram.edges(), edges)
    assert (edges.diff() > 0).all()
    middle = len(histogram.counts) // 2
    size = torch.bucketize(x.double().abs(), edges[middle + 1 : -1], right=True)
    place = torch.where(x < 0, middle - size, middle + size)
    assert torch.equal(histogram.counts, torch.bincount(place, minlength=len(histogram.counts)))
    assert histogram.counts[middle] > 4  # the smallest ones


def test_counts_are_exact_whatever_their_number(monkeypatch):
    """Above 2^24, where float32 cannot count, in one batch and in many, and when the reach grows afterwards."""
    monkeypatch.setattr("qandc.quantization.ranges.CHUNK", 1 << 20)
    batch = torch.full(((1 << 24) + 6,), 0.001)
    batch[:3] = 1.0
    histogram = seen_by(batch, batch, torch.tensor([5000.0]))
    assert histogram.counts.dtype == torch.int64
    assert histogram.counts.sum() == 2 * len(batch) + 1
    assert histogram.counts.max() == 2 * (len(batch) - 3)
    assert sorted(histogram.counts[histogram.counts > 0].tolist()) == [1, 6, 2 * (len(batch) - 3)]
    histogram.counts *= 1 << 27  # as many values as 2^27 such sets have
    merged = seen_by(batch[:10])
    merged.merge(histogram)
    assert merged.counts.sum() == (2 * len(batch) + 1 << 27) + 10


@pytest.mark.parametrize("percentile", [97.0, 99.0, 99.9])
@pytest.mark.parametrize("outlier", [1e3, 1e6, -1e6, 1e9])
def test_percentiles_beside_outliers(outlier, percentile):
    """A bin is never wider than a 32nd of its values, so bounds within the range are as good as without outliers."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[17] = outlier
    bounds = estimate_range(seen_by(x), RangeConfig("percentile", percentile), 8)
    outside = (100 - percentile) / 200
    expected = torch.quantile(x.double(), torch.tensor([outside, 1 - outside], dtype=torch.float64))
    assert [bound.item() for bound in bounds] == pytest.approx(expected.tolist(), rel=1 / 32)


def test_memory_of_a_histogram_does_not_grow():
    histogram = seen_by(torch.tensor([1e-30]))
    bins = len(histogram.counts)
    for exponent in (-10, 0, 10, 30, 38):
        histogram.add(torch.tensor([-(10.0**exponent), 10.0**exponent]))
        assert len(histogram.counts) == len(histogram.edges()) - 1 == bins < 8192
    assert histogram.counts.sum() == 11


def test_what_is_infinite_reaches_the_extremes_and_nothing_else():
    for bad in (float("inf"), float("-inf"), float("nan")):
        histogram = seen_by(torch.tensor([1.0, -2.0]))
        before = histogram.counts.clone()
        histogram.add(torch.tensor([0.5, bad]))
        assert torch.equal(histogram.counts, before)
        extremes = torch.stack([histogram.minimum, histogram.maximum])
        assert not torch.isfinite(extremes).all()


def quantization_error(x, low, high, bits=8, symmetric=False):
    scale, zero_point = scale_and_zero_point(low, high, bits, symmetric=symmetric)
    shift = 0 if zero_point is None else zero_point
    q = (x / scale).round() + shift
    return ((q.clamp(-(1 << bits - 1), (1 << bits - 1) - 1) - shift) * scale - x).square().mean().item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_at_least_as_good_as_the_others(bits, symmetric):
    """Normal values with a few far outliers: cutting these off costs less than making room for them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(20_000, generator=generator))
    x[:3] = 40.0
    histogram = seen_by(x)
    errors = {}
    for estimator in ("minmax", "percentile", "mse"):
        config = RangeConfig(estimator, percentile=99.9, symmetric=symmetric)
        low, high = estimate_range(histogram, config, bits)
        assert histogram.minimum <= low <= high <= histogram.maximum
        errors[estimator] = quantization_error(x, low, high, bits, symmetric)
    assert errors["mse"] <= 1.02 * min(errors.values())
    assert errors["mse"] < (0.9 if bits == 4 else 1.001) * errors["minmax"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_that_is_searched_is_that_of_the_kernels(bits, symmetric):
    """Level by level, those below and above the range included: a level too many or too few is another error."""
    from qandc_kernels import quantize_per_tensor

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * 3 + 1
    highs = torch.tensor([1.0, 2.5, 6.0, 20.0])
    low = torch.tensor(-4.0)
    errors = squared_errors(x.double(), torch.ones(5000), low.double(), highs.double(), bits, symmetric)
    for high, error in zip(highs, errors, strict=True):
        scale, zero_point = scale_and_zero_point(-high if symmetric else low, high, bits, symmetric=symmetric)
        q = quantize_per_tensor(x, scale, zero_point, bits).double()
        back = (q - (0 if zero_point is None else zero_point)) * scale
        # float32 may round a value that lies between two levels to the other one, of the same error to 1e-4
        assert error.item() == pytest.approx((x - back).double().square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("outlier", [0.0, 25.0, 40.0])
def test_no_bounds_of_a_dense_grid_have_much_less_error(outlier, symmetric):
    """Clipping pays at any share of what was seen: far below a fifth of it, beside a few outliers and with 4 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(40_000, generator=generator))
    if outlier:
        x[:2] = outlier
    low, high = estimate_range(seen_by(x), RangeConfig("mse", symmetric=symmetric), 4)
    found = quantization_error(x, low, high, 4, symmetric)
    shares = torch.logspace(-9, 0, 200, base=2)
    lows = [x.min()] if symmetric else [x.min(), 0.7 * x.min(), 0.4 * x.min(), 0 * x.min()]
    others = [quantization_error(x, a, share * x.max(), 4, symmetric) for share in shares for a in lows]
    assert found <= 1.01 * min(others)


def test_percentile_leaves_the_same_share_at_either_end():
    x = torch.arange(-1000.0, 1001.0)
    low, high = estimate_range(seen_by(x), RangeConfig("percentile", percentile=90), 8)
    assert low.item() == pytest.approx(-900, abs=2)
    assert high.item() == pytest.approx(900, abs=2)
    low, high = estimate_range(seen_by(x), RangeConfig("percentile", percentile=100), 8)
    assert (low.item(), high.item()) == (-1000, 1000)


@pytest.mark.parametrize("estimator", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("values", [[3.0], [-2.0, -2.0], [0.0, 0.0], [1e-38, 1e-30], [3e38, -3e38]], ids=str)
def test_estimators_take_any_finite_values(estimator, values):
    x = torch.tensor(values)
    low, high = estimate_range(seen_by(x), RangeConfig(estimator), 8)
    assert x.min() <= low <= high <= x.max()


@pytest.mark.parametrize("estimator", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_refused_by_every_estimator_and_ranges_are_kept(estimator, bad):
    model, batches = model_and_batches()
    calibrate(model, batches)
    before = model[0].act_scale.clone()
    batches[1][0, 0] = bad
    with pytest.raises(DataError, match="layer 0: activation range"):
        calibrate(model, batches, ranges=RangeConfig(estimator))
    assert torch.equal(model[0].act_scale, before)


def test_estimators_reach_the_layers():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1000, 8, generator=generator)]
    batches[0][0, 0] = 100.0
    scales = {}
    for estimator in ("minmax", "percentile", "mse"):
        model, _ = model_and_batches()
        calibrate(model, batches, ranges=RangeConfig(estimator, percentile=99.9))
        scales[estimator] = model[0].act_scale.item()
    assert scales["percentile"] < 0.2 * scales["minmax"]
    assert scales["mse"] < scales["minmax"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"estimator": "max"}, "estimator 'max' is unknown; choose one of minmax, percentile, mse"),
        ({"percentile": 50}, "percentile is 50"),
        ({"percentile": 101}, "percentile is 101"),
    ],
)
def test_range_settings_are_checked(setting, message):
    with pytest.raises(ConfigError, match=message):
        RangeConfig(**setting)


# ---- ranges of each step


def dit_batches(timesteps, rows=4):
    generator = torch.Generator().manual_seed(0)
    for timestep in timesteps:
        yield {
            "hidden_states": torch.randn(rows, 4, 8, 8, generator=generator) * (1 + timestep / 100),
            "timestep": torch.tensor([timestep]).expand(rows),
            "class_labels": torch.tensor([1, 2, 1000, 1000])[:rows],
        }


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_of_each_step_are_those_of_its_batches(symmetric):
    model = quantize_model(make_dit(num_layers=2))
    config = RangeConfig(symmetric=symmetric)
    found = calibrate_steps(model, dit_batches([900, 500, 100, 500]), ranges=config)
    assert found.timesteps.tolist() == [900, 500, 100]
    assert bool(found.zero_points) is not symmetric
    batches = list(dit_batches([900, 500, 100, 500]))
    for row, chosen in enumerate(([0], [1, 3], [2])):
        alone = calibrate(quantize_model(make_dit(num_layers=2)), [batches[i] for i in chosen], ranges=config)
        for name, layer in quant_layers(alone).items():
            if name == "proj_out_1":
                assert name not in found.scales
                continue
            assert found.scales[name][row] == layer.act_scale
            if not symmetric:
                assert found.zero_points[name][row] == layer.act_zero_point
    assert all(layer.act_scale is None for layer in quant_layers(model).values())


def test_groups_of_steps_share_a_range():
    model = quantize_model(make_dit(num_layers=1))
    found = calibrate_steps(model, dit_batches([900, 700, 500, 300]), groups=2)
    whole = calibrate(quantize_model(make_dit(num_layers=1)), dit_batches([900, 700, 500, 300]))
    one = calibrate_steps(model, dit_batches([900, 700, 500, 300]), groups=1)
    for name, layer in quant_layers(whole).items():
        if name == "proj_out_1":
            continue
        first, second, third, fourth = found.scales[name]
        assert first == second
        assert third == fourth
        assert (one.scales[name] == layer.act_scale).all()
    assert any(scales[0] != scales[3] for scales in found.scales.values())


def test_fused_models_take_them(fused_anywhere):
    model = quantize_model(make_dit(num_layers=2))
    found = calibrate_steps(model, dit_batches([900, 100]), ranges=RangeConfig("mse"))
    fused = fuse_dit(calibrate(model, dit_batches([900, 100])), step_ranges=found)
    (batch,) = dit_batches([900])
    expected = make_dit(num_layers=2)(**batch).sample
    assert ((fused(**batch).sample - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(
    ("batches", "groups", "error", "message"),
    [
        (
            [torch.zeros(1, 4, 8, 8)],
            None,
            DataError,
            "no argument of DiTTransformer2DModel that is named timestep, timesteps or t was",
        ),
        ([{"timestep": torch.tensor([1, 2])}], None, DataError, "at one timestep"),
        (None, 3, ConfigError, "groups is 3; 2 timesteps can form 1 to 2"),
        (None, 0, ConfigError, "groups is 0"),
    ],
)
def test_steps_that_cannot_be_calibrated(batches, groups, error, message):
    model = quantize_model(make_dit(num_layers=1))
    batches = list(dit_batches([900, 100])) if batches is None else batches
    with pytest.raises(error, match=message):
        calibrate_steps(model, batches, groups=groups)


# ---- smoothing and clipped weights


def with_outliers():
    """Inputs of which two channels are a hundred times as large as the others."""
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 8), torch.randn(200, 16)
    x[:, [3, 11]] *= 100
    with torch.no_grad():
        linear.weight[:, [3, 11]] /= 100  # that matters as much as they
    return linear, x


def test_smoothing_changes_nothing_in_exact_arithmetic():
    linear, x = with_outliers()
    (factors,) = smoothing_factors(nn.Sequential(linear), [x], ["0"]).values()
    y = torch.nn.functional.linear(x.double() / factors, linear.weight.double() * factors, linear.bias.double())
    torch.testing.assert_close(y, torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double()))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_factors_by_definition(alpha):
    linear, x = with_outliers()
    (factors,) = smoothing_factors(nn.Sequential(linear), [x[:100], x[100:]], ["0"], alpha=alpha).values()
    expected = x.abs().amax(0) ** alpha / linear.weight.abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(factors, expected.detach())


def test_smoothing_helps_where_there_are_outliers():
    linear, x = with_outliers()
    expected = linear(x)
    errors = {}
    for alpha in (None, 0.5):
        model = nn.Sequential(copy.deepcopy(linear))
        smoothing = None if alpha is None else smoothing_factors(model, [x], ["0"], alpha=alpha)
        quantize_model(model, smoothing=smoothing)
        calibrate(model, [x])
        errors[alpha] = (model(x) - expected).norm().item()
    assert errors[0.5] < 0.2 * errors[None]


def test_q_k_and_v_share_factors_and_zeros_get_one():
    model = make_dit(num_layers=1)
    with torch.no_grad():
        model.transformer_blocks[0].attn1.to_q.weight[:, 5] = 0
        for name in ("to_q", "to_k", "to_v"):
            getattr(model.transformer_blocks[0].attn1, name).weight[:, 6] = 0
    names = [f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
    factors = smoothing_factors(model, dit_batches([500]), [*names, "transformer_blocks.0.ff.net.2"])
    assert torch.equal(factors[names[0]], factors[names[1]])
    assert torch.equal(factors[names[0]], factors[names[2]])
    assert factors[names[0]][6] == 1
    assert factors[names[0]][5] != 1
    quantize_model(model, smoothing=factors)
    assert torch.equal(model.transformer_blocks[0].attn1.to_k.smoothing, factors[names[1]])
    assert model.proj_out_2.smoothing is None


def test_smoothing_is_checked():
    linear, x = with_outliers()
    model = nn.Sequential(linear)
    with pytest.raises(ConfigError, match=r"'1' is no nn\.Linear"):
        smoothing_factors(model, [x], ["1"])
    with pytest.raises(DataError, match="0 saw no input, or NaN"):
        smoothing_factors(model, [x * float("nan")], ["0"])
    with pytest.raises(ConfigError, match="smoothing names 'x'"):
        quantize_model(model, smoothing={"x": torch.ones(16)})
    assert type(model[0]) is nn.Linear


def test_clipped_weights_have_less_error():
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    weight[:, 0] *= 4
    errors = {}
    for bits in (4, 8):
        for clip in ("max", "mse"):
            q, scale = quantize_weight(weight, bits, clip)
            assert q.abs().max() <= (1 << bits - 1) - 1
            errors[bits, clip] = (q * scale[:, None] - weight).square().sum(1)
        assert (errors[bits, "mse"] <= errors[bits, "max"]).all()
    assert errors[4, "mse"].sum() < 0.8 * errors[4, "max"].sum()
    model = quantize_model(nn.Sequential(nn.Linear(256, 32)), w_bits=4, weight_clip="mse")
    assert isinstance(model[0], QuantLinear)
    for call in (lambda: quantize_weight(weight, 4, "no"), lambda: quantize_model(make_dit(), weight_clip="no")):
        with pytest.raises(ConfigError, match="weight_clip 'no' is unknown; choose one of max, mse"):
            call()
