"""Static ranges from samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qandc import DataError, ModelError, QuantLinear, calibrate, quantize_model


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


def test_layers_called_by_keyword():
    model, batches = model_and_batches()
    model.forward = lambda x: model[2](input=model[1](model[0](input=x)))
    calibrate(model, batches)
    expected, _ = model_and_batches()
    calibrate(expected, batches)
    assert torch.equal(model[2].act_scale, expected[2].act_scale)


def test_a_layer_that_saw_zeros_only_stays_dynamic_and_is_logged(caplog):
    model, _ = model_and_batches()
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    with caplog.at_level("WARNING", "qandc.calibration"):
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
    assert all(m.act_scale is not None for m in dit.modules() if isinstance(m, QuantLinear))
    scale = dit.proj_out_2.act_scale.clone()
    calibrate(dit, [tuple(dit_inputs.values())])
    assert torch.equal(dit.proj_out_2.act_scale, scale)


def test_recalibration_forgets_the_old_ranges():
    model, batches = model_and_batches()
    calibrate(model, [batch * 100 for batch in batches])
    calibrate(model, batches)
    fresh, _ = model_and_batches()
    calibrate(fresh, batches)
    for index in (0, 2):
        assert torch.equal(model[index].act_scale, fresh[index].act_scale)
        assert torch.equal(model[index].act_zero_point, fresh[index].act_zero_point)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_data_is_refused_with_the_layer_and_ranges_are_kept(bad):
    model, batches = model_and_batches()
    calibrate(model, batches)
    before = model[0].act_scale.clone()
    batches[1][2, 3] = bad
    with pytest.raises(DataError, match="layer 0: activation range"):
        calibrate(model, batches)
    assert torch.equal(model[0].act_scale, before)


def test_an_exception_in_the_model_leaves_no_hook_and_no_change():
    model, batches = model_and_batches()
    calibrate(model, batches)
    before = model[0].act_scale.clone()
    with pytest.raises(ValueError, match="agree in K"):
        calibrate(model, [batches[0], torch.zeros(2, 7)])
    assert torch.equal(model[0].act_scale, before)
    assert not model[0]._forward_pre_hooks


def test_empty_set_is_refused():
    model, _ = model_and_batches()
    with pytest.raises(DataError, match="calibration set is empty"):
        calibrate(model, [])


def test_batches_without_rows_are_refused():
    model, _ = model_and_batches()
    with pytest.raises(DataError, match="no calibration batch reached"):
        calibrate(model, [torch.zeros(0, 8)])


def test_model_that_is_not_quantized_is_refused():
    with pytest.raises(ModelError, match="call quantize_model first"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)])
