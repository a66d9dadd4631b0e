"""What calibration learns from layers: in compiled models, called by keyword, empty, shared or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qandc import (
    DataError,
    calibrate,
    calibrate_steps,
    input_hessians,
    make_scheduler,
    quantize_model,
    record_pool,
    sample_latents,
    smoothing_factors,
)
from qandc.quantization.conversion import quant_layers
from tests.conftest import make_dit
from tests.test_calibration import dit_batches


def compiled(how, model):
    """The model with its parts compiled in one of the ways there are; names of layers may have _orig_mod in them."""
    if how == "blocks in place":
        for block in model.transformer_blocks:
            block.compile(backend="eager")
    elif how == "blocks wrapped":
        for i, block in enumerate(model.transformer_blocks):
            model.transformer_blocks[i] = torch.compile(block, backend="eager")
    elif how == "model in place":
        model.compile(backend="eager")
    elif how == "model wrapped":
        return torch.compile(model, backend="eager")
    elif how == "forwards":
        for block in model.transformer_blocks:
            block.forward = torch.compile(block.forward, backend="eager")
    return model


def ranges(model, batches):
    calibrate(model, batches)
    layers = {name: layer for name, layer in quant_layers(model).items() if layer.act_scale is not None}
    return {name: torch.stack([layer.act_scale, layer.act_zero_point]) for name, layer in layers.items()}


def all_factors(model, batches):
    return smoothing_factors(model, batches, [name for name in input_hessians(model, batches) if "blocks" in name])


LEARN = {
    "calibrate": (True, ranges),
    "calibrate_steps": (True, lambda model, batches: calibrate_steps(model, batches).scales),
    "input_hessians": (False, input_hessians),
    "smoothing_factors": (False, all_factors),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks in place", "blocks wrapped", "model in place", "model wrapped", "forwards"])
@pytest.mark.parametrize("what", LEARN)
def test_compiled_models_that_have_run_hide_nothing(what, how):
    quantized, learn = LEARN[what]
    model = make_dit(num_layers=2)
    if quantized:
        quantize_model(model)
    expected = learn(copy.deepcopy(model), list(dit_batches([500, 200])))
    model = compiled(how, model)
    batches = list(dit_batches([500, 200]))
    with torch.no_grad():
        before = model(**batches[0])[0]
    found = learn(model, batches)
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    if what != "calibrate":
        with torch.no_grad():
            torch.testing.assert_close(model(**batches[0])[0], before)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks in place", "model in place", "model wrapped"])
def test_a_pool_of_a_compiled_model(how):
    scheduler = make_scheduler("ddpm", {"clip_sample": False})
    run = {"num_inference_steps": 3, "guidance_scale": 2.0}
    expected = record_pool(make_dit(num_layers=1), scheduler, [1, 2, 3], batch_size=2, **run)
    model = compiled(how, make_dit(num_layers=1))
    sample_latents(model, scheduler, [1, 2], seeds=[0, 1], **run)
    for _ in range(2):  # what was compiled with the hook of the first recording must not serve the second
        found = record_pool(model, scheduler, [1, 2, 3], batch_size=2, **run)
        assert len(found) == 9
        torch.testing.assert_close(found.hidden_states, expected.hidden_states)


class Layers(nn.Module):
    """Linear layers by their names, called as a function of them says."""

    def __init__(self, call, **widths):
        super().__init__()
        torch.manual_seed(0)
        for name, width in widths.items():
            setattr(self, name, nn.Linear(width, 4))
        self.call = call

    def forward(self, *inputs):
        return self.call(self, *inputs)


def by_keyword(model, x):
    return model.a(input=x)


def test_calls_by_keyword_and_vectors(seeded):
    x = torch.randn(5, 8, generator=seeded)
    for call, batches in ((by_keyword, [x]), (lambda model, x: model.a(x), list(x))):
        model = Layers(call, a=8)
        torch.testing.assert_close(input_hessians(model, batches)["a"], x.T @ x)
        factors = smoothing_factors(model, batches, ["a"], alpha=1.0)["a"]
        assert torch.equal(factors, x.abs().amax(0))
        calibrate(quantize_model(model), batches)
        torch.testing.assert_close(model.a.act_scale, (x.max() - x.min()) / 255)


def test_empty_batches_tell_nothing(seeded):
    x, empty = torch.randn(5, 8, generator=seeded), torch.zeros(0, 8)
    model = Layers(by_keyword, a=8)
    torch.testing.assert_close(input_hessians(model, [empty, x, empty])["a"], x.T @ x)
    assert torch.equal(smoothing_factors(model, [empty, x], ["a"], alpha=1.0)["a"], x.abs().amax(0))
    for learn in (input_hessians, lambda *given: smoothing_factors(*given, ["a"])):
        with pytest.raises(DataError, match="a saw no input"):
            learn(model, [empty, empty])
        with pytest.raises(DataError, match="put it in a list"):
            learn(model, x)
    quantize_model(model)
    with pytest.raises(DataError, match="no quantized layer of Layers was given a value"):
        calibrate(model, [empty])
    calibrate(model, [empty, x])
    torch.testing.assert_close(model.a.act_scale, (x.max() - x.min()) / 255)


def gram(*inputs):
    return sum(x.double().T @ x.double() for x in inputs)


def learned(model, batches):
    """Hessians, checked against those of each layer's own inputs; and the sets of layers that share one."""
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0] + 0))
        for name, layer in model.named_children()
    ]
    found = input_hessians(model, copy.deepcopy(batches))  # a copy, as calls may write to them
    for handle in handles:
        handle.remove()
    assert list(found) == [name for name, _ in model.named_children()]
    for name, inputs in seen.items():
        torch.testing.assert_close(found[name].double(), gram(*inputs), rtol=1e-4, atol=1e-4, msg=name)
    largest = {name: torch.cat(inputs).abs().amax(0) for name, inputs in seen.items()}
    groups = {}
    for name, hessian in found.items():
        groups.setdefault(id(hessian), []).append(name)
    factors = smoothing_factors(model, copy.deepcopy(batches), list(found))
    for names in groups.values():
        weight = torch.stack([getattr(model, name).weight.detach().abs().amax(0) for name in names]).amax(0)
        for name in names:
            torch.testing.assert_close(factors[name], (largest[name] / weight).sqrt(), msg=name)
    return ["".join(names) for names in groups.values()]


def attention(model, x, context):
    return model.q(x).sum() + model.k(context).sum() + model.v(context).sum()


def test_only_layers_that_see_the_same_tensors_share(seeded):
    """Whatever they are called; a factor is made of the weights of all that share it, and of no others."""

    def new(width=8, scale=1.0):
        return scale * torch.randn(6, width, generator=seeded)

    itself = [(x, x) for x in (new(), new())]
    apart = [(new(), new(scale=100.0)) for _ in range(2)]
    assert learned(Layers(attention, q=8, k=8, v=8), itself) == ["qkv"]
    assert learned(Layers(attention, q=8, k=8, v=8), apart) == ["q", "kv"]
    assert learned(Layers(attention, q=8, k=12, v=12), [(new(), new(12)) for _ in range(2)]) == ["q", "kv"]
    # as one in some calls, apart in others, in either order
    assert learned(Layers(attention, q=8, k=8, v=8), [*itself, *apart, *itself]) == ["q", "kv"]
    assert learned(Layers(attention, q=8, k=8, v=8), [*apart, *itself]) == ["q", "kv"]
    # equal values in other memory are not the same tensor, another view of the same memory is
    assert learned(Layers(attention, q=8, k=8, v=8), [(x, x.clone()) for x, _ in itself]) == ["q", "kv"]
    views = Layers(lambda m, x: m.q(x.T).sum() + m.k(x.T).sum() + m.v(x).sum(), q=8, k=8, v=8)
    assert learned(views, [torch.randn(8, 8, generator=seeded)]) == ["qk", "v"]


CALLS = {
    "in turn": lambda m, x, y: m.q(x).sum() + m.c(y).sum() + m.k(x).sum() + m.d(y).sum(),
    "twice each": lambda m, x, y: sum(layer(t).sum() for t in (x, y) for layer in (m.q, m.k, m.c, m.d)),
    "each twice": lambda m, x, y: sum(layer(t).sum() for layer in (m.q, m.k, m.c, m.d) for t in (x, y)),
    "one twice": lambda m, x, y: sum(layer(x).sum() for layer in (m.q, m.q, m.k, m.c, m.d)),
    "written to": lambda m, x, y: m.q(x).sum() + m.k(x.add_(y)).sum() + m.c(x).sum() + m.d(y).sum(),
}


@pytest.mark.parametrize(
    ("call", "groups"),
    [
        ("in turn", ["qk", "cd"]),
        ("twice each", ["qkcd"]),
        ("each twice", ["q", "k", "c", "d"]),
        ("one twice", ["q", "kcd"]),
        ("written to", ["q", "kc", "d"]),
    ],
)
def test_layers_in_other_orders(seeded, call, groups):
    """Totals are right in any order of calls; what is shared is what can be told when a layer is called."""
    batches = [(torch.randn(6, 8, generator=seeded), torch.randn(6, 8, generator=seeded)) for _ in range(3)]
    assert learned(Layers(CALLS[call], q=8, k=8, c=8, d=8), batches) == groups


def test_a_layer_that_is_left_out_of_a_forward(seeded):
    def call(model, x, all_of_them):
        return model.q(x).sum() + (model.k(x).sum() if all_of_them else 0) + model.v(x).sum()

    for chosen in ([True, False, True], [False, True, True], [True, True, False]):
        batches = [(torch.randn(6, 8, generator=seeded), which) for which in chosen]
        assert learned(Layers(call, q=8, k=8, v=8), batches) == ["qv", "k"]
    # k sees for the first time what q saw in a forward before, too
    first = Layers(lambda m, x, both: (m.k(x).sum() if both else 0) + m.q(x).sum(), k=8, q=8)
    assert learned(first, [(batches[0][0], False), (batches[0][0], True)]) == ["k", "q"]


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_forwards_in_modes_of_their_own(context, seeded):
    """Inference tensors must not be written to afterwards; a product must not be one of half precision."""

    def call(model, x, all_of_them):
        with context():
            x = x + 1
            return model.q(x).sum() + (model.k(x).sum() if all_of_them else 0)

    x, y = torch.randn(6, 8, generator=seeded), torch.randn(6, 8, generator=seeded)
    found = input_hessians(Layers(call, q=8, k=8), [(x, True), (y, False)])  # the second is added after the forward
    torch.testing.assert_close(found["q"].double(), gram(x + 1, y + 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["k"].double(), gram(x + 1), rtol=1e-5, atol=1e-5)


def test_layers_with_two_names_and_those_that_are_skipped(seeded):
    """Hessians are of the layers that quantize_model takes: not of one that is skipped under another name."""
    x = torch.randn(6, 8, generator=seeded)
    model = Layers(lambda m, x: m.q(x).sum() + m.k(x).sum(), q=8, k=8)
    model.norm, model.again = model.q, model.k
    hessians = input_hessians(model, [x])
    assert list(hessians) == ["k", "again"]
    torch.testing.assert_close(hessians["k"], x.T @ x)
    assert hessians["k"] is hessians["again"]
    factors = smoothing_factors(model, [x], ["again"])
    quantize_model(model, 4, hessians=hessians, smoothing={"k": factors["again"]})


def test_memory_is_that_of_what_is_shared(dit, dit_inputs):
    """One Hessian for q, k and v of each block."""
    found = input_hessians(dit, [dit_inputs, dit_inputs])
    tensors = {id(hessian) for hessian in found.values()}
    assert len(found) - len(tensors) == 2 * len(dit.transformer_blocks)


class CrossAttention(nn.Module):
    """Self- and cross-attention and a gate by the timestep: three inputs, of which two are tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("to_q", "to_k", "to_v", "cross_q", "cross_k", "cross_v", "gate", "unused"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x, text, time):
        x = x + self.to_q(x) + self.to_k(x) + self.to_v(x)
        x = x + self.cross_q(x) + (self.cross_k(text) + self.cross_v(text)).mean(1, keepdim=True)
        return x * self.gate(time)[:, None]


@pytest.mark.parametrize("how", ["batches", "function"])
def test_factors_by_default_are_of_what_sees_tokens_and_common_to_one_input(seeded, how, caplog):
    model = CrossAttention()
    batches = [
        (torch.randn(2, 5, 8, generator=seeded), torch.randn(2, 3, 8, generator=seeded) * 9, torch.randn(2, 8))
        for _ in range(2)
    ]
    given = batches if how == "batches" else lambda: [model(*batch) for batch in batches]
    with caplog.at_level("INFO", "qandc.quantization.observe"):
        factors = smoothing_factors(model, given)
    assert list(factors) == ["to_q", "to_k", "to_v", "cross_q", "cross_k", "cross_v"]
    assert "2 layers are not smoothed" in caplog.text
    assert "tokens: gate, unused" in caplog.text
    for names in (("to_q", "to_k", "to_v"), ("cross_k", "cross_v")):
        assert all(torch.equal(factors[names[0]], factors[name]) for name in names)
    text = torch.cat([batch[1] for batch in batches]).abs().amax((0, 1))
    weight = torch.maximum(
        *(model.get_submodule(name).weight.detach().abs().amax(0) for name in ("cross_k", "cross_v"))
    )
    torch.testing.assert_close(factors["cross_k"], (text / weight).sqrt())
    assert not torch.equal(factors["cross_q"], factors["to_q"])
    others = smoothing_factors(model, given, skip_patterns=["to_"])
    assert list(others) == ["cross_q", "cross_k", "cross_v"]


def test_hessians_of_a_function_that_runs_the_model(seeded):
    model = CrossAttention()
    del model.unused
    batch = (torch.randn(2, 5, 8, generator=seeded), torch.randn(2, 3, 8, generator=seeded), torch.randn(2, 8))
    expected = input_hessians(model, [batch])
    found = input_hessians(model, lambda: model(*batch))
    assert all(torch.equal(found[name], hessian) for name, hessian in expected.items())
    assert found["cross_k"] is found["cross_v"]
    assert found["cross_k"] is not found["cross_q"]
    with pytest.raises(ZeroDivisionError):  # what is wrong with a function is told as it is
        input_hessians(model, lambda: 1 / 0)
    assert not model.to_q._forward_pre_hooks


def test_layers_of_one_input_part_at_the_end_of_a_function(seeded):
    """The second forward leaves one of them out."""
    first, second = torch.randn(5, 8, generator=seeded), torch.randn(5, 8, generator=seeded)
    model = Layers(lambda model, x, both: model.a(x) + (model.b(x) if both else 0), a=8, b=8)

    def run():
        model(first, True)
        model(second, False)

    found = input_hessians(model, run)
    torch.testing.assert_close(found["a"], first.T @ first + second.T @ second)
    torch.testing.assert_close(found["b"], first.T @ first)
