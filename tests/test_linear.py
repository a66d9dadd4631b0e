"""QuantLinear as a drop-in for nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qandc import ConfigError, DataError, QuantLinear, calibrate, quantize_model, smoothing_factors
from qandc.quantizer import quantize_weight
from qandc_kernels import reference, unpack_int4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _nothing_compiled_stays():
    yield
    torch._dynamo.reset()


def make(w_bits=8, bias=True, in_features=32, out_features=12, dtype=torch.float32):
    torch.manual_seed(1)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return linear, QuantLinear.from_linear(linear, w_bits=w_bits)


def smoothed(w_bits=8, a_bits=8):
    factors = torch.linspace(0.25, 4, 32)
    return QuantLinear.from_linear(make()[0], w_bits=w_bits, a_bits=a_bits, smoothing=factors)


def weight_only(w_bits=8, smooth=False, **changes):
    if smooth:
        return smoothed(w_bits, 16)
    return QuantLinear.from_linear(make(**changes)[0], w_bits=w_bits, a_bits=16)


def static(layer: QuantLinear, zero_point: int | None = 9) -> QuantLinear:
    z = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
    layer.set_static_range(torch.tensor(0.03), z)
    return layer


@pytest.mark.parametrize("mode", ["dynamic", "static", "symmetric"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_equals_its_definition(w_bits, bias, mode, seeded):
    """``dequantize(quantize(x)) · dequantize(quantize(W))ᵀ + bias`` in float64."""
    linear, layer = make(w_bits, bias)
    if mode != "dynamic":
        static(layer, 9 if mode == "static" else None)
    x = torch.randn(2, 5, 32, generator=seeded)
    q, scale = quantize_weight(linear.weight, w_bits)
    w = q.double() * scale.double()[:, None]
    if mode == "dynamic":
        xq, s = reference.quantize_per_token(x)
        x_hat = xq.double() * s.double()[..., None]
    else:
        z = layer.act_zero_point
        x_hat = (reference.quantize_per_tensor(x, layer.act_scale, z).double() - (9 if mode == "static" else 0)) * 0.03
    expected = x_hat @ w.t() + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("w_bits", "limit"), [(8, 0.02), (4, 0.2)])
def test_is_close_to_the_layer_it_replaces(w_bits, limit, seeded):
    linear, layer = make(w_bits, in_features=256)
    x = torch.randn(64, 256, generator=seeded)
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert error < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_output_has_the_dtype_of_the_input(w_bits, dtype, device, seeded):
    _, layer = make(w_bits, dtype=dtype)
    x = torch.randn(3, 32, generator=seeded).to(device, dtype)
    y = layer.to(device)(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_compiles_without_graph_break(w_bits, is_static, device, seeded):
    _, layer = make(w_bits)
    if is_static:
        static(layer)
    layer.to(device)
    x = torch.randn(3, 32, generator=seeded).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_gpu_and_cpu_agree(w_bits, is_static, seeded):
    _, layer = make(w_bits, in_features=1152, out_features=1152)
    if is_static:
        static(layer)
    x = torch.randn(300, 1152, generator=seeded)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_each_other(seeded):
    """A dynamic scale per token, not per batch: a row gives the same alone and in company."""
    _, layer = make()
    x = torch.randn(4, 32, generator=seeded) * torch.tensor([1.0, 100.0, 1e-3, 0.0])[:, None]
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))
    assert torch.equal(layer(x)[3], layer.bias)


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_state_dict_round_trip(is_static, seeded):
    _, layer = make()
    if is_static:
        static(layer)
    other = static(QuantLinear(32, 12), 3)  # in the opposite state: loading decides
    if is_static:
        other.set_static_range(None)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 32, generator=seeded)
    assert torch.equal(other(x), layer(x))
    assert other.scheme == layer.scheme


def test_state_dict_of_other_bits_is_refused():
    with pytest.raises(RuntimeError, match="this layer is W4A8, the state dict is W8A8"):
        make(w_bits=4)[1].load_state_dict(make(w_bits=8)[1].state_dict())


def test_deepcopy_is_independent(seeded):
    layer = static(make()[1])
    copied = copy.deepcopy(layer)
    x = torch.randn(5, 32, generator=seeded)
    assert torch.equal(copied(x), layer(x))
    copied.qweight.zero_()
    copied.set_static_range(None)
    assert not torch.equal(copied(x), layer(x))
    assert layer.act_scale is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_stay_float32(dtype):
    layer = static(make()[1])
    before = layer.weight_scale.clone()
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, before)
    assert layer.act_scale.dtype == torch.float32
    assert layer.act_zero_point.dtype == torch.int32


def test_moves_to_the_meta_device():
    layer = static(make()[1]).half().to("meta")
    assert {t.device.type for t in (*layer.buffers(), *layer.parameters())} == {"meta"}


def test_weight_is_the_dequantized_one():
    linear, layer = make(w_bits=4)
    assert layer.weight.shape == linear.weight.shape
    q, scale = quantize_weight(linear.weight, 4)
    assert torch.equal(unpack_int4(layer.qweight), q)
    torch.testing.assert_close(layer.weight, q * scale[:, None], atol=0, rtol=0)


@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_undoes_smoothing(w_bits):
    linear, factors = make()[0], torch.linspace(0.25, 4, 32)
    layer = smoothed(w_bits)
    q, scale = quantize_weight(linear.weight.detach() * factors, w_bits)
    torch.testing.assert_close(layer.weight, q * scale[:, None] / factors)
    step = scale[:, None] / factors
    assert ((layer.weight - linear.weight).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("a_bits", [8, 5])
def test_compiled_values_outside_the_range_are_clamped(symmetric, a_bits, seeded):
    layer = static(QuantLinear.from_linear(make()[0], a_bits=a_bits), None if symmetric else 9)
    x = 1e4 * torch.randn(3, 32, generator=seeded)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        limit = 1 << a_bits - 1
        q = torch.where(x > 0, limit - 1, -limit).double() - (0 if symmetric else 9)
        expected = 0.03 * q @ layer.weight.double().t() + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["dynamic", "static", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smoothing"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_runs_on_the_meta_device(w_bits, smooth, dtype, mode):
    """Shapes and dtypes alone, as tools that count operations or plan device maps want; with gradients too."""
    layer = smoothed(w_bits) if smooth else make(w_bits)[1]
    if mode != "dynamic":
        static(layer, 9 if mode == "static" else None)
    layer.to("meta", dtype)
    x = torch.randn(2, 8, 32, dtype=dtype, device="meta", requires_grad=True)
    y = layer(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 8, 12), dtype)
    y.sum().backward()
    assert (x.grad.device.type, x.grad.shape) == ("meta", x.shape)
    assert (layer.weight.device.type, layer.weight.shape) == ("meta", (12, 32))


def test_describes_itself():
    assert "in_features=32, out_features=12, bias=True, W8A8 dynamic per-token" in repr(make()[1])
    assert "W4A8 static per-tensor" in repr(static(make(4)[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_refuses_weights_that_are_not_finite(name, bad):
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        getattr(linear, name).view(-1)[1] = bad
    with pytest.raises(DataError, match=f"{name} holds 1 values that are NaN or inf"):
        QuantLinear.from_linear(linear)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40, 2e38])
def test_refuses_a_static_scale_that_is_no_scale(scale):
    with pytest.raises(DataError, match="one finite number > 0"):
        make()[1].set_static_range(torch.tensor(scale))


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf"), 1e-40, 2e38])
def test_refuses_smoothing_without_a_reciprocal(factor):
    factors = torch.ones(32)
    factors[3] = factor
    with pytest.raises(DataError, match="smoothing must be 32 finite float32 numbers > 0 whose reciprocals are such"):
        QuantLinear.from_linear(nn.Linear(32, 4), smoothing=factors)
    layer = smoothed()
    with pytest.raises(RuntimeError, match=r"smoothing is (not finite or not > 0|smaller than 1\.2e-38 or larger)"):
        layer.load_state_dict({**layer.state_dict(), "smoothing": factors})


def test_smoothing_factors_have_reciprocals(seeded):
    """Inputs or weights near the smallest float32 leave their channel unsmoothed."""
    x = torch.randn(8, 32, generator=seeded)
    x[:, 5] = 1e-44
    for alpha in (0.5, 1.0):
        model = nn.Sequential(nn.Linear(32, 4))
        quantize_model(model, smoothing=smoothing_factors(model, [x], alpha=alpha))
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (torch.ones(1), None, "0-d float tensor"),
        (torch.tensor(1), None, "0-d float tensor"),
        (None, torch.tensor(3), "a zero point needs a scale"),
        (torch.tensor(1.0), torch.tensor(3.7), "0-d integer tensor"),
        (torch.tensor(1.0), torch.tensor(128), "from -128 to 127"),
        (torch.tensor(1.0), torch.tensor([1]), "0-d integer tensor"),
    ],
)
def test_refuses_invalid_static_ranges(scale, zero_point, message):
    with pytest.raises(DataError, match=message):
        make()[1].set_static_range(scale, zero_point)


def test_static_range_is_a_copy():
    scale, zero_point = torch.tensor(0.5), torch.tensor(3)
    layer = make()[1]
    layer.set_static_range(scale, zero_point)
    scale.zero_()
    zero_point.zero_()
    assert layer.act_scale == 0.5
    assert layer.act_zero_point == 3
    assert layer.act_zero_point.dtype == torch.int32


def test_can_be_called_by_keyword_as_linear_is(seeded):
    linear, layer = make()
    x = torch.randn(2, 32, generator=seeded)
    assert linear(input=x).shape == layer(input=x).shape
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_output_dtype_as_for_linear(dtype, seeded):
    linear, layer = make()
    x = torch.randn(2, 32, generator=seeded)
    plain = layer(x)
    with torch.autocast("cpu", dtype):
        assert layer(x).dtype == linear(x).dtype == dtype
        assert torch.equal(layer(x), plain.to(dtype))


def test_weight_has_the_dtype_the_weight_had():
    linear, layer = make(bias=False, dtype=torch.bfloat16)
    assert layer.weight.dtype == linear.weight.dtype
    assert layer.float().weight.dtype == torch.float32


def test_training_flag_is_kept():
    linear = nn.Linear(4, 4)
    assert QuantLinear.from_linear(linear).training
    assert not QuantLinear.from_linear(linear.eval()).training


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 5, 32), (0, 32)], ids=str)
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smoothing"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_gradient_is_that_of_the_dequantized_product(w_bits, smooth, is_static, shape, seeded):
    layer = smoothed(w_bits) if smooth else make(w_bits)[1]
    if is_static:
        static(layer)
    layer.bias.requires_grad_()
    plain = nn.Linear(32, 12)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(shape, generator=seeded)
    upstream = torch.randn(*shape[:-1], 12, generator=seeded)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, given in zip((layer, plain), inputs, strict=True):
        module(given).backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
    tangent = torch.randn(shape, generator=seeded)
    y, derivative = torch.func.jvp(layer, (x,), (tangent,))
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(derivative, torch.func.jvp(plain, (x,), (tangent,))[1])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jacfwd(layer)(x), torch.func.jacfwd(plain)(x))


@pytest.mark.slow
@pytest.mark.parametrize("w_bits", [8, 4])
def test_gradient_under_autocast_and_compiled(w_bits, seeded):
    layer = make(w_bits)[1]
    plain = nn.Linear(32, 12)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(4, 32, generator=seeded)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = {}
    for name, module in (("plain", plain), ("eager", layer), ("compiled", compiled)):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(given)
        y.sum().backward()
        grads[name] = given.grad
    for name in ("eager", "compiled"):
        assert grads[name].dtype == torch.float32
        torch.testing.assert_close(grads[name], grads["plain"], atol=0.02, rtol=0.02)


def test_without_need_no_gradient(seeded):
    """No graph is made where nothing asks for one, and where it is the integers are the same."""
    layer = make()[1]
    x = torch.randn(2, 32, generator=seeded)
    with torch.no_grad():
        assert not layer(x.clone().requires_grad_()).requires_grad
    assert not layer(x).requires_grad
    assert torch.equal(layer(x.clone().requires_grad_()), layer(x))


@pytest.mark.parametrize("a_bits", [4, 6])
def test_fewer_dynamic_bits_equal_their_definition(a_bits, seeded):
    linear, _ = make()
    layer = QuantLinear.from_linear(linear, a_bits=a_bits)
    x = torch.randn(3, 32, generator=seeded)
    xq, scale = reference.quantize_per_token(x, a_bits)
    expected = (xq.double() * scale.double()[:, None]) @ layer.weight.double().t() + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-6, rtol=2e-6)


def test_state_dict_of_other_activation_bits_is_refused():
    linear, layer = make()
    other = QuantLinear.from_linear(linear, a_bits=4)
    with pytest.raises(RuntimeError, match="this layer is W8A4, the state dict is W8A8"):
        other.load_state_dict(static(layer).state_dict())
    assert other.act_scale is None  # a refused state changes nothing


def test_a_state_dict_without_this_layer_changes_nothing():
    layer = static(make()[1])
    layer.load_state_dict({}, strict=False)
    assert layer.act_scale is not None


FULL = ("bits", "qweight", "weight_scale", "weight_sum", "act_scale", "act_zero_point", "smoothing", "bias")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("name", FULL)
def test_state_dicts_of_another_meaning_are_refused(name, w_bits, assign):
    """Of another dtype or shape, or not finite; the message names layer and tensor, and nothing changes."""
    model = nn.Sequential(nn.Identity(), static(smoothed(w_bits)))
    state, key = model.state_dict(), f"1.{name}"
    right = state[key]
    wrong = [right.double(), right.reshape(1) if right.ndim == 0 else torch.cat([right, right])]
    if right.is_floating_point():
        wrong += [right * torch.nan, right + torch.inf]
        if name != "bias":
            wrong += [right * 0, -right]
    elif name not in ("bits", "qweight", "weight_sum"):
        wrong += [right * 0 + 128]
    for tensor in wrong:
        before = {name: value.clone() for name, value in state.items()}
        # no state dict of another scheme: what is refused is named
        with pytest.raises(RuntimeError, match=rf"1\.{name} is|1 is W{w_bits}A8, the state dict is"):
            model.load_state_dict({**before, key: tensor}, assign=assign)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state, assign=assign)


def test_a_zero_point_without_a_scale_is_refused():
    state = static(make()[1]).state_dict()
    del state["act_scale"]
    with pytest.raises(RuntimeError, match="act_zero_point has no act_scale beside it"):
        make()[1].load_state_dict(state)


@pytest.mark.slow
def test_strided_input_compiles_with_inductor(seeded):
    _, layer = make()
    x = torch.randn(32, 6, generator=seeded).t()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), atol=0, rtol=0)


def test_refuses_float64_input():
    with pytest.raises(TypeError, match="x must be float16 or bfloat16 or float32; got float64"):
        make()[1](torch.zeros(2, 32, dtype=torch.float64))


def test_refuses_input_of_another_width():
    with pytest.raises(ValueError, match="must agree in K"):
        make()[1](torch.zeros(2, 31))


def test_fewer_activation_bits_lose_more(seeded):
    linear, _ = make(in_features=128)
    x = torch.randn(50, 128, generator=seeded)
    errors = []
    for a_bits in (8, 6, 4):
        layer = nn.Sequential(QuantLinear.from_linear(linear, a_bits=a_bits))
        calibrate(layer, [x])
        errors.append((layer(x) - linear(x)).norm().item())
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smoothing"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only_equals_its_definition(w_bits, bias, smooth, dtype, device, seeded):
    """``x · dequantize(quantize(W))ᵀ + bias``: nothing but the weight is rounded."""
    layer = weight_only(w_bits, smooth)
    if not bias:
        layer.bias = None
    for shape in [(32,), (2, 5, 32), (40, 32), (0, 32)]:
        x = torch.randn(shape, generator=seeded).to(dtype)
        seen = (x.float() / layer.smoothing).to(dtype) if smooth else x
        weight = layer.weight * layer.smoothing if smooth else layer.weight
        expected = seen.double() @ weight.double().t() + (layer.bias.double() if bias else 0)
        y = copy.deepcopy(layer).to(device, dtype)(x.to(device)).cpu()
        assert (y.dtype, y.shape) == (dtype, (*shape[:-1], 12))
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, atol=4 * unit + 2e-6, rtol=2 * unit + 2e-6)


@pytest.mark.parametrize("smooth", [False, True], ids=["", "smoothing"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only_rounds_outliers_of_the_input_no_more_than_others(w_bits, smooth, seeded):
    """Give one channel values a thousand times as large: quantized activations would lose the others, these do not."""
    layer, x = weight_only(w_bits, smooth), torch.randn(4, 32, generator=seeded)
    x[:, 3] *= 1000
    plain = nn.Linear(32, 12)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smoothing"])
@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only_compiles_and_passes_gradients_on(w_bits, smooth, autocast, device, seeded):
    layer = weight_only(w_bits, smooth).to(device)
    plain = nn.Linear(32, 12, device=device)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    layer.bias.requires_grad_()
    x = torch.randn(3, 32, generator=seeded).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    results = []
    for module in (layer, compiled, plain):
        given = x.clone().requires_grad_()
        layer.bias.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = module(given)
        y.float().square().sum().backward()
        bias = plain.bias.grad if module is plain else layer.bias.grad
        results.append((y.detach(), given.grad, bias))
    assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    limit = {"atol": 0.1, "rtol": 0.02} if autocast else {"atol": 2e-5, "rtol": 1e-5}
    for eager, same, expected in zip(*results, strict=True):
        torch.testing.assert_close(same, eager, **(limit if device == "cuda" else {}))  # inductor sums in another order
        torch.testing.assert_close(eager, expected, **limit)


def test_weight_only_takes_no_range():
    layer = weight_only(4)
    layer.set_static_range(None)
    with pytest.raises(ConfigError, match="a W4A16 layer does not quantize its inputs and takes no static range"):
        static(layer)
    assert layer.act_scale is None
    assert "W4A16 weight-only" in repr(layer)


@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only_state_dicts(w_bits, seeded):
    layer, other = weight_only(w_bits, smooth=True), QuantLinear(32, 12, w_bits=w_bits, a_bits=16)
    state, x = layer.state_dict(), torch.randn(3, 32, generator=seeded)
    assert state["bits"].tolist() == [w_bits, 16]
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    for w, a in ((w_bits, 8), (12 - w_bits, 16)):
        with pytest.raises(RuntimeError, match=f"this layer is W{w}A{a}, the state dict is W{w_bits}A16"):
            QuantLinear(32, 12, w_bits=w, a_bits=a).load_state_dict(state)
    for name, value in (("act_scale", torch.tensor(0.1)), ("act_zero_point", torch.tensor(3, dtype=torch.int32))):
        with pytest.raises(RuntimeError, match=f"{name} is given; in a W{w_bits}A16 layer it must be left out"):
            other.load_state_dict({**state, "act_scale": torch.tensor(0.1), name: value})
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only_runs_on_the_meta_device(w_bits):
    layer = weight_only(w_bits, smooth=True).to("meta", torch.bfloat16)
    x = torch.randn(2, 8, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.device.type, y.shape, y.dtype, x.grad.shape) == ("meta", (2, 8, 12), torch.bfloat16, x.shape)
