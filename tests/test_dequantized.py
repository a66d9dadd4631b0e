"""QuantLinear.weight: reads like any tensor, costs nothing until it is used, and refuses what would change it."""

from __future__ import annotations

import copy
import io
import pickle
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qandc import ModelError, QuantLinear, quantize_model
from qandc.quantization.dequantized import DequantizedWeight

UPDATE = torch.full((12, 32), 0.5)


@pytest.fixture(autouse=True)
def _nothing_compiled_stays():
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[(8, False), (4, True)], ids=["W8", "W4 smoothing"])
def layer(request):
    torch.manual_seed(1)
    w_bits, smooth = request.param
    return QuantLinear.from_linear(nn.Linear(32, 12), w_bits, smoothing=torch.linspace(0.5, 2, 32) if smooth else None)


def values_of(layer):
    return layer.weight.clone()


def data_add(layer):
    layer.weight.data += UPDATE


def data_set(layer):
    layer.weight.data = UPDATE


def data_of_data(layer):
    layer.weight.data.data -= UPDATE


def item(layer):
    layer.weight[0, 1] = 3


def item_of_data(layer):
    layer.weight.data[0] += 1


def copied_in(layer):
    with torch.no_grad():
        layer.weight.copy_(UPDATE)


def out_argument(layer):
    torch.add(UPDATE, UPDATE, out=layer.weight)


def out_tuple(layer):
    torch.max(UPDATE, 1, keepdim=True, out=(layer.weight[:, :1], torch.empty(12, 1, dtype=torch.int64)))


def through_list(layer):
    torch._foreach_add_([layer.weight], [UPDATE])


def optimizer(layer):
    weight = layer.weight.requires_grad_()
    F.linear(torch.ones(2, 32), weight).sum().backward()
    torch.optim.SGD([weight], 0.1).step()


def assigned(layer):
    layer.weight = UPDATE


def assigned_parameter(layer):
    layer.weight = nn.Parameter(UPDATE)


def assigned_none(layer):
    layer.weight = None


def deleted(layer):
    del layer.weight


WRITES = [data_add, data_set, data_of_data, item, item_of_data, copied_in, out_argument, out_tuple, through_list]
WRITES += [optimizer, assigned, assigned_parameter, assigned_none, deleted]
VIEWS = {
    "view": lambda weight: weight.data.view(-1),
    "t": lambda weight: weight.t(),
    "T of data": lambda weight: weight.data.T,
    "row": lambda weight: weight.data[0],
    "unbind": lambda weight: weight.unbind()[0],
    "chunk": lambda weight: weight.chunk(2)[1],
    "diagonal": lambda weight: weight.detach().diagonal(),
    "same dtype": lambda weight: weight.float(),
    "contiguous": lambda weight: weight.contiguous(),
    "inference": lambda weight: torch.inference_mode()(weight.detach)(),
}


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_are_refused(layer, write):
    before = values_of(layer)
    with pytest.raises(ModelError, match=r"before quantize_model, or keep them beside the layer"):
        write(layer)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["add_", "zero_", "normal_", "resize_", "apply_", "t_", "set_"])
def test_in_place_operations_are_refused(layer, name):
    arguments = {"add_": (1,), "resize_": ((3, 3),), "apply_": (abs,), "set_": (UPDATE,)}.get(name, ())
    with pytest.raises(ModelError, match=f"{name} may change the weight of a QuantLinear"):
        getattr(layer.weight, name)(*arguments)


@pytest.mark.parametrize("name", VIEWS)
def test_views_refuse_writes_too(layer, name):
    """A write to a view of a weight changes the weight; of this one it would be lost."""
    with pytest.raises(ModelError, match="the change would be lost"):
        VIEWS[name](layer.weight).add_(1)


def test_arrays_are_read_only(layer):
    for array in (layer.weight.numpy(), np.asarray(layer.weight)):
        np.testing.assert_array_equal(array, values_of(layer).numpy())
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_memory_that_is_not_there_is_not_handed_out(layer):
    for ask in (layer.weight.data_ptr, layer.weight.untyped_storage):
        with pytest.raises(ModelError):
            ask()
    other = nn.Linear(32, 12)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.weight.data = layer.weight
    other.weight.data = layer.weight.clone()


READS = {
    "product": lambda weight, x: F.linear(x, weight),
    "matmul": lambda weight, x: x @ weight.t(),
    "half": lambda weight, x: weight.to(torch.bfloat16),
    "sum": lambda weight, x: weight.float().sum(1),
    "compare": lambda weight, x: weight > 0,
    "concatenate": lambda weight, x: torch.cat([weight.data, weight]),
    "einsum": lambda weight, x: torch.einsum("nk,mk->nm", weight, x),
    "empty like": lambda weight, x: torch.zeros_like(weight),
    "norm": lambda weight, x: torch.linalg.norm(weight, dim=0),
    "other in place": lambda weight, x: torch.ones(12, 32).mul_(weight),
    "rows": lambda weight, x: torch.stack([row * 2 for row in weight]),
    "vmap": lambda weight, x: torch.vmap(lambda row: weight @ row)(x),
    "copy": lambda weight, x: copy.deepcopy(weight),
    "pickle": lambda weight, x: pickle.loads(pickle.dumps(weight)),
    "list": lambda weight, x: torch.tensor(weight.tolist()),
}


@pytest.mark.parametrize("name", READS)
def test_reads_give_ordinary_tensors(layer, name, seeded):
    x = torch.randn(5, 32, generator=seeded)
    found, expected = (READS[name](weight, x) for weight in (layer.weight, values_of(layer)))
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected)


def test_views_read_right(layer):
    for view in VIEWS.values():
        assert torch.equal(view(layer.weight), view(values_of(layer)))
    assert float(layer.weight[1, 2]) == float(values_of(layer)[1, 2])
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file), values_of(layer))


def test_a_look_computes_nothing(monkeypatch):
    layer = QuantLinear.from_linear(nn.Linear(1024, 1024, dtype=torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr("qandc.quantization.linear.dequantize", lambda *_: pytest.fail("dequantized"))
        weight = layer.weight
        assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (1024, 1024), "cpu")
        assert (weight.requires_grad, weight.is_leaf, weight.ndim, weight.numel()) == (False, True, 2, 1 << 20)
        assert weight.is_contiguous()
        assert weight.detach().data.dtype == torch.bfloat16
        started = time.perf_counter()
        for _ in range(100):
            layer.weight.dtype  # noqa: B018
        assert time.perf_counter() - started < 0.1  # a millisecond each; a dequantization takes longer


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_code_that_reads_it_compiles(layer, grad, seeded):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            weight = self.inner.weight
            if weight.dtype == x.dtype and weight.device == x.device:
                return F.linear(x, weight) + self.inner(x) + weight.detach()[0].sum()
            return x

    x = torch.randn(3, 32, generator=seeded)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(Reader(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), Reader()(x))


def calls_of(model, monkeypatch):
    """The quantized layers, and those that run, noted without hooks: torch goes another way where there are any."""
    calls = []
    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: calls.append(self) or forward(self, x))
    return [module for module in model.modules() if isinstance(module, QuantLinear)], calls


@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_encoder_layers_does_not_pass_by(nested, monkeypatch, seeded):
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = quantize_model((nn.TransformerEncoder(block, 2) if nested else block).eval())
    layers, calls = calls_of(model, monkeypatch)
    with torch.no_grad():
        model(torch.randn(2, 5, 32, generator=seeded))
    assert len(layers) == (4 if nested else 2)
    assert set(map(id, calls)) == set(map(id, layers))


def test_encoder_layers_ask_the_class_of_the_weight(monkeypatch, seeded):
    """Layers that somebody puts into an encoder by hand are not passed by either."""
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    block.linear1 = QuantLinear.from_linear(block.linear1)
    _, calls = calls_of(block, monkeypatch)
    with torch.no_grad():
        block(torch.randn(2, 5, 32, generator=seeded))
    assert len(calls) == 1


def test_compiled_encoder_layers_run_the_integers(seeded):
    block = quantize_model(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval())
    targets = []

    def noting(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend=noting)(torch.randn(2, 5, 32, generator=seeded))
    assert sum("int8_linear" in target for target in targets) == 2


def test_a_parameter_made_of_it_trains_nothing_silently(layer):
    plain = nn.Linear(32, 12)
    plain.weight = nn.Parameter(layer.weight)
    plain(torch.ones(2, 32)).sum().backward()
    torch.testing.assert_close(plain.weight.grad, torch.full((12, 32), 2.0))
    with pytest.raises(ModelError, match=r"weight\.clone\(\)"):
        torch.optim.SGD(plain.parameters(), 0.1).step()
    assert isinstance(layer.weight, DequantizedWeight)
