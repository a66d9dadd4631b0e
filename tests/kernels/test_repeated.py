"""A layer that is called again and again: the same results, whatever it was called with before."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from qandc_kernels import Backend, RepeatedLinear, pack_int4, quantized_linear, use_backend
from qandc_kernels.ops import repeated
from tests.kernels.oracle import assert_close, to

N, K = 96, 64


def layer_of(generator, *, w_bits=8, static=True, smoothing=False, bias_dtype=torch.bfloat16, flag=False):
    """All that ``quantized_linear`` takes but x, out_dtype and nan_flag last."""
    wq = torch.randint(-7, 8, (N, K), generator=generator, dtype=torch.int8)
    return {
        "weight": pack_int4(wq) if w_bits == 4 else wq,
        "w_scale": torch.rand(N, generator=generator) / 100,
        "bias": None if bias_dtype is None else torch.randn(N, generator=generator).to(bias_dtype),
        "act_scale": torch.tensor(0.03) if static else None,
        "act_zero_point": torch.tensor(4, dtype=torch.int32) if static else None,
        "w_sum": wq.sum(1, dtype=torch.int32),
        "smoothing": torch.rand(K, generator=generator) + 0.5 if smoothing else None,
        "bits": 8,
        "out_dtype": None,
        "nan_flag": torch.zeros(1, dtype=torch.int32) if flag else None,
    }


class Recorded:
    """Stand for kernels that were kept: notes the addresses of their operands, or refuses to start."""

    def __init__(self, starts: bool = True) -> None:
        self.starts, self.addresses = starts, []

    def __call__(self, addresses) -> bool:
        self.addresses.append(list(addresses))
        return self.starts


@pytest.fixture
def kept(monkeypatch):
    """List the starts that a RepeatedLinear keeps, as if the CPU had kernels."""
    found: list[Recorded] = []

    def keep(*given):
        found.append(Recorded())
        return found[-1]

    monkeypatch.setattr(repeated, "_goes_straight", lambda x: True)
    monkeypatch.setattr(repeated, "backend_of", lambda device: Backend("triton", ""))
    monkeypatch.setattr("qandc_kernels.triton.linear.kept_starts", keep)
    return found


@pytest.mark.parametrize("static", [True, False])
def test_without_kernels_it_is_the_op(seeded, static):
    layer, x = layer_of(seeded, static=static), torch.randn(5, K, generator=seeded)
    call = RepeatedLinear()
    for _ in range(2):
        assert torch.equal(call(x, *layer.values()), quantized_linear(x, *layer.values()))


@pytest.mark.parametrize("static", [True, False])
def test_the_second_call_is_started_on_the_addresses_of_its_operands(seeded, kept, static):
    layer, call = layer_of(seeded, static=static, smoothing=True, flag=True), RepeatedLinear()
    x, y = torch.randn(5, K, generator=seeded), torch.randn(5, K, generator=seeded)
    assert torch.equal(call(x, *layer.values()), quantized_linear(x, *layer.values()))
    out = call(y, *layer.values())
    assert (out.shape, out.dtype) == ((5, N), torch.float32)
    assert len(kept) == 1
    (addresses,) = kept[0].addresses
    names = [None, None, "act_scale", "act_zero_point", "nan_flag", "smoothing", "weight", None, "w_scale", "bias"]
    for name, address in zip([*names, "w_sum"], addresses, strict=True):
        if name is not None and layer[name] is not None:
            assert address == layer[name].data_ptr(), name
    assert addresses[0] == y.data_ptr()
    assert addresses[7] == out.data_ptr()
    assert (addresses[3] is None) != static


def test_kernels_that_cannot_start_now_leave_it_to_the_op(seeded, kept):
    layer, call, x = layer_of(seeded), RepeatedLinear(), torch.randn(5, K, generator=seeded)
    call(x, *layer.values())
    kept[0].starts = False
    assert torch.equal(call(x, *layer.values()), quantized_linear(x, *layer.values()))
    assert len(kept) == 1


def test_whether_there_are_kernels_to_keep_is_asked_once(seeded, kept, monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr("qandc_kernels.triton.linear.kept_starts", lambda *given: asked.append(given))
    layer, call, x = layer_of(seeded), RepeatedLinear(), torch.randn(5, K, generator=seeded)
    for _ in range(3):
        assert torch.equal(call(x, *layer.values()), quantized_linear(x, *layer.values()))
    assert len(asked) == 1


CHANGES = {
    "dtype": lambda x, layer: (x.double().to(torch.bfloat16), layer),
    "shape": lambda x, layer: (x[:3], layer),
    "strides": lambda x, layer: (x.t().contiguous().t(), layer),
    "alignment": lambda x, layer: (torch.zeros(5 * K + 1)[1:].view(5, K), layer),
    "bits": lambda x, layer: (x, {**layer, "bits": 4}),
    "output": lambda x, layer: (x, {**layer, "out_dtype": torch.float16}),
    "moved weight": lambda x, layer: (x, {**layer, "weight": layer["weight"].clone()}),
    "a part of the weight": lambda x, layer: (
        x,
        {**layer, **{name: layer[name][:32] for name in ("weight", "w_scale", "bias", "w_sum")}},
    ),
    "dtype of the bias": lambda x, layer: (x, {**layer, "bias": layer["bias"].view(torch.float16)}),
    "no bias": lambda x, layer: (x, {**layer, "bias": None}),
    "dynamic": lambda x, layer: (x, {**layer, "act_scale": None, "act_zero_point": None}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_start_depends_on_is_told_apart(seeded, kept, change):
    layer, call, x = layer_of(seeded), RepeatedLinear(), torch.randn(5, K, generator=seeded)
    other, changed = CHANGES[change](x, layer)
    for _ in range(2):
        call(x, *layer.values())
        call(other, *changed.values())
    assert len(kept) == 2
    assert [len(each.addresses) for each in kept] == [1, 1]


def test_what_is_kept_is_bounded_and_not_copied(seeded, kept, monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 3)
    layer, call = layer_of(seeded), RepeatedLinear()
    for rows in (1, 2, 3, 4, 1):
        call(torch.randn(rows, K, generator=seeded), *layer.values())
    assert len(kept) == 5
    for twin in (copy.deepcopy(call), pickle.loads(pickle.dumps(call))):
        twin(torch.randn(1, K, generator=seeded), *layer.values())
    assert len(kept) == 7


def test_modes_and_transforms_see_the_op(seeded):
    layer, call, x = layer_of(seeded), RepeatedLinear(), torch.randn(5, K, generator=seeded)

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Mode():
        call(x, *layer.values())
    assert "qandc.quantized_linear.default" in seen


@pytest.mark.gpu
@pytest.mark.parametrize("w_bits", [8, 4])
def test_calls_in_any_order_equal_the_op(seeded, w_bits):
    kinds = list(itertools.product([True, False], [True, False], [torch.bfloat16, torch.float16, None]))
    layers = [
        to("cuda", layer_of(seeded, w_bits=w_bits, static=static, smoothing=smoothing, bias_dtype=bias, flag=static))
        for static, smoothing, bias in kinds
    ]
    call = RepeatedLinear()
    for turn in range(3):
        for rows, dtype, layer in itertools.product([1, 33], [torch.bfloat16, torch.float16, torch.float32], layers):
            whole = torch.randn(rows + 1, K + 8, generator=seeded).cuda().to(dtype)
            for x in (whole[1:, :K].contiguous(), whole[1:, :K], whole[1:, 1 : K + 1]):
                assert torch.equal(call(x, *layer.values()), quantized_linear(x, *layer.values()))
        if turn == 1:
            for layer in layers:  # what moves is read where it went
                layer["weight"] = layer["weight"].clone()
                layer["w_scale"].data = layer["w_scale"] * 2
                if layer["bias"] is not None:
                    layer["bias"].data = layer["bias"].float()


@pytest.mark.gpu
def test_nan_is_noticed_and_watchers_see_every_start(seeded):
    from triton import knobs

    layer = to("cuda", layer_of(seeded, flag=True))
    call, x = RepeatedLinear(), torch.randn(33, K, generator=seeded).cuda()
    for _ in range(2):
        call(x, *layer.values())
    assert layer["nan_flag"].item() == 0
    x[3, 3] = float("nan")
    call(x, *layer.values())
    assert layer["nan_flag"].item() == 1
    seen: list[object] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        call(x, *layer.values())
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 2


@pytest.mark.gpu
def test_a_chosen_backend_is_never_gone_past(seeded, monkeypatch):
    started: list[object] = []
    # refuses, as None does
    monkeypatch.setattr("qandc_kernels.triton.linear.kept_starts", lambda *given: started.append)
    layer = to("cuda", layer_of(seeded))
    call, x = RepeatedLinear(), torch.randn(33, K, generator=seeded).cuda()
    call(x, *layer.values())
    expected = call(x, *layer.values())
    assert len(started) == 1
    with use_backend("reference"):
        assert_close(call(x, *layer.values()), expected.cpu().double())
    assert len(started) == 1
