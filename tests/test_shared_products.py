"""Layers that are given one tensor run as one product, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import qandc.quantization.shared_products
import qandc_kernels.ops.repeated
from qandc import calibrate, quantize_model
from qandc.fusion.nan_flags import lower_nan_flags, raised_nan_flag
from qandc.quantization.conversion import quant_layers
from qandc.quantization.linear import QuantLinear
from qandc.support.watch import Watch
from tests.tiny_models import each_class, inputs_of, make_tiny, output_of

K = 16


@pytest.fixture
def products(monkeypatch):
    """The output widths of all products since the list was cleared."""
    widths: list[int] = []
    multiply = qandc_kernels.ops.repeated.quantized_linear

    def counted(x, weight, *others):
        widths.append(weight.shape[0])
        return multiply(x, weight, *others)

    monkeypatch.setattr(qandc_kernels.ops.repeated, "quantized_linear", counted)
    return widths


@pytest.fixture
def alone(monkeypatch):
    """Compute what a function returns where each layer runs on its own."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(qandc.quantization.linear, "shared_output", lambda *args: None)
            return function(*args)

    return run


class Attention(nn.Module):
    """q, k and v of one tensor, or of what ``between`` makes of it for k and v."""

    def __init__(self, widths=(8, 8, 24), w_bits=8, bias=True, smoothing=None):
        super().__init__()
        torch.manual_seed(0)
        for name, width in zip(("to_q", "to_k", "to_v"), widths, strict=True):
            linear = nn.Linear(K, width, bias=bias)
            setattr(self, name, QuantLinear.from_linear(linear, w_bits, smoothing=smoothing))
        self.between = lambda x: x

    @property
    def layers(self):
        return [self.to_q, self.to_k, self.to_v]

    def forward(self, x):
        q = self.to_q(x)
        y = self.between(x)
        return q, self.to_k(y), self.to_v(y)


def equal(results, others):
    return all(torch.equal(result, other) for result, other in zip(results, others, strict=True))


def x_of(seed=0):
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(seed))


def settle(attention, forwards=3):
    """Run it until its layers share."""
    with torch.no_grad():
        for seed in range(forwards):
            attention(x_of(seed))


def run(attention, forwards, alone, products):
    """Count the products of each forward, on inputs of its own; outputs are those of layers that run alone."""
    found = []
    with torch.no_grad():
        for forward in range(forwards):
            x = x_of(forward)
            wanted = alone(attention, x)
            products.clear()
            assert equal(attention(x), wanted)
            found.append(list(products))
    return found


SHARED = {  # products of a forward where each layer runs alone, and where they share
    "DiTTransformer2DModel": 2 * 2,
    "PixArtTransformer2DModel": 2 * (2 + 1),
    "SD3Transformer2DModel": 2 * (2 + 2),
    "FluxTransformer2DModel": 2 * (2 + 2) + 2 * 3,
    "QwenImageTransformer2DModel": 2 * (2 + 2),
    "WanTransformer3DModel": 2 * (2 + 1),
    "ZImageTransformer2DModel": 6 * (2 + 1),  # w1 and w3 of the MLP too
}


@each_class(SHARED)
@pytest.mark.parametrize("way", ["W8A8", "W4A8", "static", "inference"])
def test_models_compute_the_same_bits_with_fewer_products(name, way, products, alone):
    model = quantize_model(make_tiny(name), w_bits=4 if way == "W4A8" else 8)
    inputs = inputs_of(name)
    if way == "static":
        calibrate(model, [inputs])
    products.clear()
    wanted = alone(output_of, model, inputs)
    count = len(products)
    for forward in range(4):
        products.clear()
        with torch.inference_mode(way == "inference"):
            assert torch.equal(output_of(model, inputs), wanted)
        if forward != 1:  # inference tensors are looked at once more, and calibration was a forward too
            assert len(products) == count - (SHARED[name] if forward or way == "static" else 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("ranges", ["dynamic", "symmetric", "asymmetric", "smooth"])
def test_one_product_from_the_second_forward_on(bias, w_bits, ranges, products, alone):
    smoothing = torch.rand(K) + 0.5 if ranges == "smooth" else None
    attention = Attention(bias=bias, w_bits=w_bits, smoothing=smoothing)
    if ranges in ("symmetric", "asymmetric"):
        for layer in attention.layers:
            layer.set_static_range(torch.tensor(0.02), torch.tensor(5) if ranges == "asymmetric" else None)
    assert run(attention, 12, alone, products) == [[8, 8, 24]] + [[40]] * 11


@pytest.mark.parametrize("buffer", ["act_scale", "act_zero_point", "smoothing"])
def test_layers_that_quantize_differently_run_alone(buffer, products, alone):
    attention = Attention(smoothing=torch.ones(K))
    for layer in attention.layers:
        layer.set_static_range(torch.tensor(0.02), torch.tensor(5))
    settle(attention)
    assert products[-1] == 40
    getattr(attention.to_v, buffer).mul_(2)  # in place: the same object
    assert run(attention, 6, alone, products) == [[8, 8, 24]] * 6
    getattr(attention.to_v, buffer).copy_(getattr(attention.to_q, buffer))
    settle(attention, 20)
    assert products[-1] == 40


def test_new_ranges_count_at_once(products, alone):
    attention = Attention()
    settle(attention)
    x = x_of()
    for scale in (0.02, 0.05):
        attention.to_k.set_static_range(torch.tensor(scale))
        with torch.no_grad():
            assert equal(attention(x), alone(attention, x))
    calibrate(attention, [x])
    settle(attention, 8)
    with torch.no_grad():
        assert equal(attention(x), alone(attention, x))
    assert products[-3:] == [8, 8, 24]
    assert 40 in products


def test_another_input_gets_its_own_product(products, alone):
    attention = Attention()
    settle(attention)
    attention.between = lambda x: x + 1
    assert run(attention, 6, alone, products)[-1] == [8, 32]  # k and v have found each other


def test_a_guess_that_keeps_being_wrong_is_made_less_and_less(products):
    attention = Attention()
    with torch.no_grad():
        for forward in range(400):
            attention.between = (lambda x: x) if forward % 4 else (lambda x: x.clone())
            attention(x_of(forward))
    assert sum(products) < 400 * 40 * 1.1


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_that_was_written_to_is_another(inference, alone):
    attention = Attention()
    attention.between = lambda x: x.add_(1)
    with torch.inference_mode(inference), torch.no_grad():
        for forward in range(5):
            x = x_of(forward)
            assert equal(attention(x.clone()), alone(attention, x.clone()))


def test_a_layer_asked_twice_or_alone_computes(alone):
    attention = Attention()
    settle(attention)
    x = x_of(7)
    with torch.no_grad():
        wanted = alone(attention, x)
        assert equal(attention(x), wanted)
        for layer, y in zip(attention.layers, wanted, strict=True):
            assert torch.equal(layer(x), y)
            assert torch.equal(layer(x), y)


def test_outputs_can_be_written_to_without_touching_the_others(alone):
    attention = Attention()
    settle(attention)
    x = x_of(7)
    with torch.no_grad():
        q, k, v = attention(x)
        _, *wanted = alone(attention, x)
        q.zero_()
    assert equal([k, v], wanted)
    weight = nn.Parameter(torch.ones(()))
    k.mul_(weight)  # a view made without gradients would refuse
    k.sum().backward()
    assert torch.allclose(weight.grad, wanted[0].sum())


def test_autocast_between_calls_gives_its_dtype():
    attention = Attention()
    settle(attention)
    x = x_of()
    with torch.no_grad():
        q = attention.to_q(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = attention.to_k(x)
    assert (q.dtype, k.dtype) == (torch.float32, torch.bfloat16)


def test_gradients_pass_through_each_layer():
    attention = Attention()
    settle(attention)
    x = x_of().requires_grad_()
    sum(y.sum() for y in attention(x)).backward()
    assert torch.allclose(x.grad, sum(layer.weight.sum(0) for layer in attention.layers).expand_as(x), atol=1e-5)


def test_hooks_of_a_member_run(alone):
    attention = Attention()
    settle(attention)
    seen = []
    attention.to_k.register_forward_hook(lambda module, args, y: seen.append(y) or y + 1)
    attention.to_v.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = x_of()
    with torch.no_grad():
        wanted = alone(attention, x)
        for _ in range(4):
            assert equal(attention(x), wanted)
    assert len(seen) == 5


def test_nothing_waits_once_the_input_is_gone():
    attention = Attention()
    settle(attention)
    with torch.no_grad():
        x = x_of()
        attention.to_q(x)
        (waiting,) = attention.to_q.membership.group.waiting.values()
        storage = StorageWeakRef(next(iter(waiting.outputs.values())).untyped_storage())
        del waiting
        assert not storage.expired()
        del x
        assert storage.expired()


def test_the_weights_are_one_tensor_and_no_byte_more():
    attention = Attention()
    before = copy.deepcopy(attention).state_dict()
    settle(attention)
    for name in ("qweight", "weight_scale", "weight_sum", "bias"):
        storages = {getattr(layer, name).untyped_storage() for layer in attention.layers}
        assert len({storage.data_ptr() for storage in storages}) == 1
        assert storages.pop().nbytes() == sum(getattr(layer, name).nbytes for layer in attention.layers)
    after = attention.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_copies_and_pickles_hold_what_they_held(tmp_path, products):
    attention, x = Attention(), x_of()
    save_file(attention.state_dict(), tmp_path / "before.safetensors")
    settle(attention)
    save_file(attention.state_dict(), tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    other = Attention()
    other.load_state_dict(load_file(tmp_path / "after.safetensors"))
    with torch.no_grad():
        wanted = attention(x)
        del attention.between  # no pickle of a local function
        copies = [other, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))]
        attention.between = lambda x: x
        for copied in copies:
            copied.between = attention.between
            for _ in range(2):
                assert equal(copied(x.clone()), wanted)
            assert products[-1] == 40
        for layer in copies[1].layers:
            layer.qweight.zero_()
        assert equal(attention(x), wanted)


def test_a_loaded_state_counts_at_once(alone):
    attention, other = Attention(), Attention()
    for layer in other.layers:
        layer.qweight.neg_()
        layer.weight_sum.neg_()
    settle(attention)
    for assign in (False, True):
        attention.load_state_dict(other.state_dict(), assign=assign)
        x = x_of(3)
        with torch.no_grad():
            for _ in range(3):
                assert equal(attention(x), alone(other, x))


def storages_of(attention):
    return [StorageWeakRef(layer.qweight.untyped_storage()) for layer in attention.layers]


@pytest.mark.parametrize("forwards", [3, 30])
def test_moving_frees_the_memory_and_sharing_comes_back(forwards, products):
    attention = Attention()
    settle(attention, forwards)
    old = storages_of(attention)
    attention._apply(torch.clone)  # as .to(device)
    assert all(storage.expired() for storage in old)
    settle(attention)
    assert products[-1] == 40
    old = storages_of(attention)
    del attention
    gc.disable()
    try:
        assert all(storage.expired() for storage in old)
    finally:
        gc.enable()


def test_memory_that_is_swapped_each_forward_is_left_alone(products, alone):
    """diffusers' group offloading swaps ``.data``, accelerate's replaces the buffer."""
    attention = Attention()
    settle(attention)
    at_rest = {id(t): t.clone() for layer in attention.layers for t in (*layer.buffers(), layer.bias)}
    moves = 0
    with torch.no_grad():
        for forward in range(100):
            for layer in attention.layers:
                for t in (*layer.buffers(), layer.bias):
                    t.data = at_rest[id(t)].clone()
            x = x_of(forward)
            wanted = alone(attention, x)
            addresses = [layer.qweight.data_ptr() for layer in attention.layers]
            assert equal(attention(x), wanted)
            moves += addresses != [layer.qweight.data_ptr() for layer in attention.layers]
            old = storages_of(attention)
            for layer in attention.layers:
                for t in (*layer.buffers(), layer.bias):
                    t.data = at_rest[id(t)]
            assert all(storage.expired() for storage in old)
    assert moves < 10


@pytest.mark.parametrize("forwards", [4, 30])
@pytest.mark.parametrize("name", ["qweight", "weight_scale", "weight_sum", "bias"])
def test_a_member_that_gets_other_memory_counts_at_once(name, forwards, alone):
    attention = Attention()
    for layer in attention.layers:
        layer.set_static_range(torch.tensor(0.02), torch.tensor(5))
    settle(attention, forwards)
    tensor = getattr(attention.to_k, name)
    tensor.data = -tensor.data if name != "weight_scale" else tensor.data * 2
    with torch.no_grad():
        for _ in range(4):
            x = x_of(5)
            assert equal(attention(x), alone(attention, x))


def test_memory_is_not_held_before_it_has_stayed_for_a_while():
    attention = Attention()
    settle(attention, 5)
    old = storages_of(attention)
    for layer in attention.layers:
        for t in (*layer.buffers(), layer.bias):
            t.data = t.data.clone()
    assert all(storage.expired() for storage in old)


def test_a_model_under_accelerates_offload_computes_the_same(alone):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = quantize_model(make_tiny("FluxTransformer2DModel")), inputs_of("FluxTransformer2DModel")
    wanted = output_of(model, inputs)
    settled = [output_of(model, inputs) for _ in range(2)]
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    for _ in range(4):
        assert torch.equal(output_of(model, inputs), wanted)
    assert equal(settled, [wanted] * 2)


@pytest.mark.slow
def test_threads_do_not_mix(alone):
    attention = Attention()
    inputs = [x_of(seed) for seed in range(8)]
    with torch.no_grad():
        wanted = [alone(attention, x) for x in inputs]

    def run(i):
        with torch.no_grad():
            return all(equal(attention(inputs[i]), wanted[i]) for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


def test_layers_die_with_the_last_reference():
    attention = Attention()
    settle(attention, 30)
    layer = weakref.ref(attention.to_q)
    gc.disable()
    try:
        del attention
        assert layer() is None
    finally:
        gc.enable()


def test_graphs_notice_that_weights_have_moved():
    attention = Attention(bias=False)
    watch = Watch(attention)
    with torch.no_grad():
        attention(x_of())
        assert watch.unchanged()
        attention(x_of())
        assert not watch.unchanged()
        watch = Watch(attention)
        for _ in range(20):
            attention(x_of())
        assert watch.unchanged()


def test_nan_is_noticed_at_the_first_layer_that_saw_it():
    model, inputs = quantize_model(make_tiny("DiTTransformer2DModel")), inputs_of("DiTTransformer2DModel")
    calibrate(model, [inputs])
    for _ in range(3):
        output_of(model, inputs)
    lower_nan_flags(model)
    output_of(model, inputs)
    assert raised_nan_flag(model) is None
    with torch.no_grad():
        model.transformer_blocks[1].norm1.linear.bias.fill_(float("nan"))
    output_of(model, inputs)
    assert raised_nan_flag(model) == "transformer_blocks.1.attn1.to_q"


def test_layers_on_the_meta_device_and_of_other_kinds_run_alone():
    attention = Attention().to("meta")
    with torch.no_grad():
        for _ in range(4):
            assert [y.shape for y in attention(x_of().to("meta"))] == [(2, 3, 8), (2, 3, 8), (2, 3, 24)]
    mixed = Attention()
    mixed.to_k = QuantLinear.from_linear(nn.Linear(K, 8), 4)
    mixed.to_v = QuantLinear.from_linear(nn.Linear(K, 8), 8, 6)
    settle(mixed)
    assert [layer.membership.group for layer in mixed.layers] == [None] * 3


@pytest.fixture
def compiled_products():
    """Compile, and note the output widths of the products in each graph."""
    graphs: list[list[int]] = []

    def backend(graph, inputs):
        ops = (torch.ops.qandc.int8_linear, torch.ops.qandc.int4_linear)
        nodes = [node for node in graph.graph.nodes if node.target in ops]
        graphs.append([node.meta["example_value"].shape[-1] for node in nodes])
        return graph

    def compile_(module, dynamic=False):
        torch._dynamo.reset()
        return torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)

    compile_.graphs = graphs
    return compile_


def calibrated(w_bits=8):
    attention = Attention(w_bits=w_bits, smoothing=torch.linspace(0.5, 2, K))
    return calibrate(attention, [(torch.randn(2, 5, K),)])


@pytest.mark.parametrize("w_bits", [8, 4])
def test_compiled_code_runs_one_product_once_ranges_are_set(w_bits, compiled_products, alone, seeded):
    attention, x = calibrated(w_bits), torch.randn(2, 5, K, generator=seeded)
    expected = alone(attention, x)
    compiled = compiled_products(attention)
    for _ in range(2):
        assert equal(compiled(x), expected)
    assert compiled_products.graphs == [[40]]
    assert attention.to_q.membership.compiled.kept is None


def test_one_graph_serves_all_batches(compiled_products, alone, seeded):
    attention = calibrated()
    compiled = compiled_products(attention, dynamic=True)
    for batch, tokens in ((2, 5), (3, 5), (7, 4)):
        x = torch.randn(batch, tokens, K, generator=seeded)
        assert equal(compiled(x), alone(attention, x))
    assert compiled_products.graphs == [[40]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.to_k.set_static_range(torch.tensor(0.5), torch.tensor(3)),
        lambda a: a.load_state_dict({**a.state_dict(), "to_v.act_scale": torch.tensor(0.25)}),
        lambda a: a.load_state_dict({**a.state_dict(), "to_v.weight_scale": torch.ones(24)}),
        lambda a: a.to(torch.float16),
        lambda a: setattr(a.to_q, "qweight", a.to_q.qweight.flip(0)),
        lambda a: a._apply(torch.clone).to_k.qweight.zero_(),
    ],
    ids=["range", "loaded range", "loaded weight", "dtype", "weight", "other memory"],
)
def test_compiled_code_notices_what_has_changed(change, compiled_products, alone, seeded):
    attention, x = calibrated(), torch.randn(2, 5, K, generator=seeded)
    compiled = compiled_products(attention)
    before = compiled(x)
    change(attention)
    x = x.to(attention.to_q.bias.dtype)
    result, expected = compiled(x), alone(attention, x)
    assert equal(result, expected)
    assert not equal(result, before)


def test_compiled_layers_that_are_given_another_tensor_run_alone(compiled_products, alone, seeded):
    attention, x = calibrated(), torch.randn(2, 5, K, generator=seeded)
    attention.between = lambda x: x * 2
    expected = alone(attention, x)
    assert equal(compiled_products(attention)(x), expected)
    assert compiled_products.graphs == [[40, 8, 24]]


def test_compiled_gradients_pass_through_each_layer(compiled_products, seeded):
    attention = calibrated()
    gradients = []
    for module in (attention, compiled_products(attention)):
        x = torch.randn(2, 5, K, generator=seeded.manual_seed(3)).requires_grad_()
        sum(y.square().sum() for y in module(x)).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("ranges", ["dynamic", "static"])
def test_on_a_gpu_all_bits_are_the_same(w_bits, ranges, alone, products):
    torch.manual_seed(0)
    attention = Attention()
    for name, width in (("to_q", 3072), ("to_k", 3072), ("to_v", 1024)):
        linear = nn.Linear(1024, width, device="cuda", dtype=torch.bfloat16)
        setattr(attention, name, QuantLinear.from_linear(linear, w_bits))
    if ranges == "static":
        for layer in attention.layers:
            layer.set_static_range(torch.tensor(0.03), torch.tensor(7))
    with torch.no_grad():
        for rows in (1, 77, 512, 4608):
            x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
            wanted = alone(attention, x)
            for _ in range(3):
                assert equal(attention(x), wanted)
            assert products[-1] == 7168


@pytest.mark.gpu
def test_on_a_gpu_moving_away_frees_all_memory():
    model = quantize_model(make_tiny("FluxTransformer2DModel")).cuda()
    inputs = {name: x.cuda() for name, x in inputs_of("FluxTransformer2DModel").items()}
    for _ in range(20):
        output_of(model, inputs)
    assert len(quant_layers(model)) > 0
    held = torch.cuda.memory_allocated()
    model.cpu()
    freed = held - torch.cuda.memory_allocated()
    assert freed >= sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
