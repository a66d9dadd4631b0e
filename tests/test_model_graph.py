"""graph(model): the same outputs from CUDA graphs, a reason where there is none, and the model back afterwards."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from collections import OrderedDict

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from qandc import (
    CacheConfig,
    ModelError,
    apply_cache,
    fit_feature_compensation,
    get_cache,
    graph,
    quantize_model,
    remove_cache,
    ungraph,
)
from qandc.caching.features import FeatureStore
from qandc.fusion.graphs import unknown_part
from qandc.fusion.model_graph import Graphed, UnknownArgumentError, rebuild, structure_of
from qandc.support.watch import Watch
from tests.conftest import make_dit
from tests.tiny_models import inputs_of, make_tiny, output_of

GPU = pytest.mark.gpu


class Mixed(nn.Module):
    """Takes what pipelines pass: keywords, dictionaries, lists of tuples, numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, 8), 1.0
        self.scaling = {"default": 1.0}

    def forward(self, x, extra=None, shapes=(), factor=1, return_dict=True):
        y = self.linear(x) * self.factor * self.scaling["default"] * factor
        for part in (extra or {}).values():
            y = y + (sum(part) if isinstance(part, list) else part)
        y = y * (1 + sum(a for a, _ in shapes))
        return {"sample": y, "twice": [2 * y, None]} if return_dict else (y,)


def inputs(device="cpu", rows=3):
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)).to(device)
    return {"x": x, "extra": {"a": x + 1, "b": [x * 2, x * 3]}, "shapes": [(1, 2), (3, 4)]}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "qandc")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("qandc")]


def test_structures_are_told_apart_and_rebuilt():
    x, y = torch.zeros(2), torch.ones(3)
    for value in (x, [x, (y, None)], {"a": [x], "b": {"c": y, 1: 2.5}}, ((), {"k": (True, "s", torch.float16)})):
        tensors: list[torch.Tensor] = []
        structure = structure_of(value, tensors)
        assert hash(structure) == hash(structure_of(value, []))
        rebuilt = rebuild(structure, iter(tensors))
        assert str(rebuilt) == str(value)
        assert type(rebuilt) is type(value)
    different = [1, True, 1.0, "1", None, [1], (1,), {1: 1}, [x], (x,), x]
    assert len({structure_of(value, []) for value in different}) == len(different)
    for value in (object(), {1, 2}, OrderedDict(a=1), torch.eye(2).to_sparse()):
        with pytest.raises(UnknownArgumentError):
            structure_of([value], [])


@dataclasses.dataclass
class Unregistered:
    sample: torch.Tensor


def test_results_that_cannot_be_copied_are_told():
    """Torch's pytree knows outputs of diffusers, and not any dataclass: its tensors would be those of the next call."""
    x = torch.ones(2)
    for known in (x, (x, None), {"a": [x, 1.5, "b"]}, Transformer2DModelOutput(sample=x)):
        assert unknown_part(known) is None
    assert unknown_part((x, [Unregistered(x)])) == "Unregistered"
    assert unknown_part({1: object()}) == "object"


@GPU
def test_results_of_unknown_types_are_not_overwritten(said):
    class Wrapping(Mixed):
        def forward(self, x):
            return Unregistered(super().forward(x, return_dict=False)[0])

    model = graph(Wrapping().eval().cuda())
    with torch.no_grad():
        first = model(inputs("cuda")["x"])
        before = first.sample.clone()
        model(inputs("cuda")["x"] + 1)
    assert torch.equal(first.sample, before)
    assert "its result holds a Unregistered" in said()[0]


def test_a_model_without_a_gpu_runs_as_before_and_says_why(said):
    plain, graphed = Mixed().eval(), Mixed().eval()
    graphed.load_state_dict(plain.state_dict())
    assert graph(graphed) is graphed
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(graphed(**inputs()), plain(**inputs()), rtol=0, atol=0)
    assert said() == ["no CUDA graph: all tensors among the arguments must be on one CUDA device; they are on: cpu"]


def test_ungraph_restores_the_model():
    model = Mixed()
    before = (type(model), set(model.__dict__))
    assert isinstance(graph(model), Mixed)
    assert type(model) is not Mixed
    assert ungraph(model) is model
    assert (type(model), set(model.__dict__)) == before


def test_copies_and_pickles_are_graphed_models_of_their_own():
    model = graph(make_dit())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert Graphed.of(other) is not Graphed.of(model)
        assert type(ungraph(other)) is type(make_dit())


def test_refusals():
    model = Mixed()
    with pytest.raises(ModelError, match="not graphed"):
        ungraph(model)
    with pytest.raises(ModelError, match="graphs already"):
        graph(graph(model))
    replaced = Mixed()
    replaced.forward = lambda x: x
    with pytest.raises(ModelError, match="was replaced"):
        graph(replaced)
    compiled = Mixed()
    compiled.compile(backend="eager")
    with pytest.raises(ModelError, match="was replaced"):
        graph(compiled)


def test_what_a_capture_needs_changes_nothing():
    """Chroma embeds its guidance without a copy from the host; copies of the model do so, too."""
    model, inputs = make_tiny("ChromaTransformer2DModel").bfloat16(), inputs_of("ChromaTransformer2DModel")
    inputs = {key: x.bfloat16() for key, x in inputs.items()}
    cls, expected = type(model.time_text_embed), output_of(model, inputs)
    for each in (graph(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(each.time_text_embed) is not cls
        assert torch.equal(output_of(each, inputs), expected)
        assert type(ungraph(each).time_text_embed) is cls
        assert torch.equal(output_of(each, inputs), expected)
    other = copy.deepcopy(model.time_text_embed)
    graph(model).time_text_embed = other  # which nothing was attached to
    assert type(ungraph(model).time_text_embed) is cls


@pytest.mark.parametrize("cached_first", [False, True])
@torch.no_grad()
def test_graphs_and_a_cache_come_and_go_in_any_order(cached_first, dit_inputs):
    model, by_hand = make_dit(), make_dit()
    apply_cache(by_hand)
    calls = [{**dit_inputs, "timestep": dit_inputs["timestep"] - step} for step in range(2)]
    cls, expected = type(model), [by_hand(**call).sample for call in calls]
    cache = apply_cache(model) if cached_first else None
    graph(model)
    cache = cache or apply_cache(model)
    assert get_cache(model) is cache
    for call, output in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(**call).sample, output)
    assert (cache.compute_steps, cache.reuse_steps) == (1, 1)
    ungraph(model)
    assert Graphed.of(model) is None
    assert get_cache(model) is cache
    remove_cache(graph(model))
    assert Graphed.of(model) is not None
    assert type(ungraph(model)) is cls


@pytest.mark.parametrize(
    ("change", "in_place", "by_settings"),  # whether a watch for the settings "factor" and "forward" notices it
    [
        (lambda m: m.linear.weight.data.mul_(2), None, False),
        (lambda m: setattr(m.linear, "weight", nn.Parameter(m.linear.weight * 2)), True, True),
        (lambda m: setattr(m.linear.weight, "data", m.linear.weight * 2), False, True),
        (lambda m: setattr(m.places, "data", m.places + 1), False, False),
        (lambda m: setattr(m, "places", m.places + 1), True, True),
        (lambda m: setattr(m, "factor", 3.0), True, True),
        (lambda m: setattr(m, "another", 3.0), True, False),
        (lambda m: setattr(m.linear, "forward", lambda x: x), True, True),
        (lambda m: m.__dict__.update(another=m.__dict__.pop("nothing")), True, False),
        (lambda m: m.scaling.update(default=3.0), True, False),
        (lambda m: m.scaling.update(another=3.0), True, False),
        (lambda m: m.sizes.__setitem__(0, 3), True, False),
        (lambda m: m.linear.register_forward_hook(lambda module, args, output: output), True, True),
        (lambda m: setattr(m, "linear", nn.Linear(4, 4)), True, True),
    ],
    ids=[
        "in place", "weight", "data", "buffer", "another buffer", "value", "attribute", "forward", "name",
        "within a dict", "entry", "within a list", "hook", "module",
    ],
)  # fmt: skip
def test_what_a_watch_notices(change, in_place, by_settings):
    model = Mixed()
    model.register_buffer("places", torch.ones(3))
    model.sizes, model.nothing = [1, 2], None
    watch, of_settings = Watch(model), Watch(model, ("factor", "forward"))
    change(model)
    assert watch.unchanged() == (in_place is None)
    assert of_settings.unchanged() == (not by_settings)
    assert watch.in_place() == (in_place is not False)


# on a GPU


def captures(model) -> int:
    return Graphed.of(model).graphs.captures


@GPU
@torch.no_grad()
def test_equals_the_model(said):
    model = Mixed().eval().cuda()
    calls = [
        inputs("cuda"),
        inputs("cuda", 5),
        {**inputs("cuda"), "factor": 2},
        {**inputs("cuda"), "return_dict": False},
    ]
    expected = [model(**call) for call in calls]
    graph(model)
    found = [[model(**call) for call in calls] for _ in range(3)]
    assert captures(model) == len(calls)
    for outputs in found:  # also those of calls before: later calls leave them alone
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert not said()
    with torch.inference_mode():
        torch.testing.assert_close(model(**calls[0]), expected[0], rtol=0, atol=0)


@GPU
@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.linear.weight.mul_(2),
        lambda m: setattr(m.linear, "weight", nn.Parameter(m.linear.weight * 2)),
        lambda m: setattr(m, "linear", nn.Linear(8, 8, device="cuda")),
        lambda m: setattr(m, "factor", 3.0),
        lambda m: m.scaling.update(default=3.0),
        lambda m: m.double().float(),
        lambda m: m.linear.register_forward_hook(lambda module, args, output: 2 * output),
    ],
    ids=["in place", "weight", "module", "attribute", "within an attribute", "moved", "hook"],
)
def test_changes_are_noticed(change):
    model = graph(Mixed().eval().cuda())
    model(**inputs("cuda"))
    change(model)
    changed = model(**inputs("cuda"))
    ungraph(model)
    torch.testing.assert_close(changed, model(**inputs("cuda")), rtol=0, atol=0)


class ReadsBack(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x * 3


class WritesToItsInput(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@GPU
@torch.no_grad()
@pytest.mark.parametrize("kind", [ReadsBack, WritesToItsInput, Draws])
def test_what_cannot_be_a_graph_runs_as_before(kind, said):
    model = graph(kind().eval())
    x = torch.ones(3, device="cuda")
    for sign in (1, -1):
        given = x * sign
        torch.manual_seed(0)
        found = model(given)
        torch.manual_seed(0)
        torch.testing.assert_close(found, kind()(x * sign))
    assert captures(model) == 0
    assert any("no CUDA graph for inputs of (3,)" in message for message in said())


@GPU
def test_reasons_that_come_and_go(said):
    model = graph(Mixed().eval().cuda())
    model(**inputs("cuda"))  # gradients are enabled here
    with torch.no_grad():
        model(**inputs("cuda"), factor=torch.tensor(2.0))  # on the CPU
        with torch.autocast("cuda"):
            model(**inputs("cuda"))
        model.train()
        model(**inputs("cuda"))
    assert captures(model) == 0
    assert len(said()) == 4
    with torch.no_grad():
        model.eval()(**inputs("cuda"))
    assert captures(model) == 1


@GPU
@torch.no_grad()
def test_graphs_are_bounded():
    model = graph(Mixed().eval().cuda(), limit=2)
    for rows in (1, 2, 3, 1):
        model(**inputs("cuda", rows))
    assert captures(model) == 4
    assert len(Graphed.of(model).graphs) == 2


@GPU
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_quantized_transformer(compiled, dit_inputs):
    model = quantize_model(make_dit()).cuda()
    given = {name: value.cuda() for name, value in dit_inputs.items()}
    if compiled:
        for block in model.transformer_blocks:
            block.compile()
    expected = model(**given).sample
    graph(model)
    for _ in range(2):
        torch.testing.assert_close(model(**given).sample, expected, rtol=0, atol=0)
    assert captures(model) == 1


FLUX = "FluxTransformer2DModel"


def two_runs(model, tokens=16, steps=7):
    """Draw an image: two prompts of two lengths take turns, as with a guidance of two calls a step."""
    given = {name: value.cuda() for name, value in inputs_of(FLUX, 0.5).items() if isinstance(value, torch.Tensor)}
    generator = torch.Generator().manual_seed(0)
    width = given["encoder_hidden_states"].shape[-1]
    texts = [torch.randn(1, length, width, generator=generator).cuda() for length in (5, 3)]
    places = [torch.zeros(length, 3, device="cuda") for length in (5, 3, tokens)]
    latents = torch.randn(1, tokens, given["hidden_states"].shape[-1], generator=generator).cuda()
    outputs = []
    for step in range(steps):
        for text, ids in zip(texts, places, strict=False):
            call = {**given, "hidden_states": latents * (1 - step / steps), "encoder_hidden_states": text}
            call |= {"txt_ids": ids, "img_ids": places[2], "timestep": torch.full((1,), 1 - step / steps).cuda()}
            call |= {name: call[name][:1] for name in ("pooled_projections", "guidance")}
            outputs.append(model(**call, return_dict=False)[0])
    return torch.stack([output.float() for output in outputs])


@GPU
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("mode", "order"), [("delta", 1), ("branch", 1), ("taylor", 2)])
def test_a_cached_transformer(mode, order, compiled, said, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)  # for each size, in both kinds of blocks
    model = quantize_model(make_tiny(FLUX)).cuda()
    if compiled:
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.compile(fullgraph=True, dynamic=False)
    config = CacheConfig(mode, interval=3, order=order)
    apply_cache(model, config=config)
    expected, larger = two_runs(model), two_runs(model, tokens=64)
    remove_cache(model)
    graph(model, limit=32)
    cache = apply_cache(model, config=config)
    for _ in range(2):
        torch.testing.assert_close(two_runs(model), expected, rtol=0, atol=0)
    taken = captures(model)
    assert taken == 2 * (1 + cache.config.history)  # for each run: a step that reuses, one for each set of features
    torch.testing.assert_close(two_runs(model), expected, rtol=0, atol=0)
    assert captures(model) == taken
    for _ in range(2):
        torch.testing.assert_close(two_runs(model, tokens=64), larger, rtol=0, atol=0)
    torch.testing.assert_close(two_runs(model), expected, rtol=0, atol=0)
    assert not said()
    remove_cache(model)
    plain = two_runs(model)
    assert not torch.equal(plain, expected)
    torch.testing.assert_close(plain, two_runs(ungraph(model)), rtol=0, atol=0)


BETWEEN = {  # what happens before a reuse step, and in which modes that step would not read it
    "weight of a block": (lambda m: setattr(m.transformer_blocks[1].ff.net[2], "bias", None), ("delta", "taylor")),
    "weight of gates": (lambda m: setattr(m.transformer_blocks[1].norm1.linear, "bias", None), ()),
    "outer weight": (lambda m: setattr(m.proj_out, "bias", None), ()),
    "outer module": (lambda m: setattr(m, "norm_out", copy.deepcopy(m.norm_out)), ()),
}


@GPU
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("mode", ["delta", "taylor"])
@pytest.mark.parametrize("change", BETWEEN)
def test_reuse_steps_look_at_what_they_read(change, mode):
    changes, unread = BETWEEN[change]
    model = make_tiny(FLUX).cuda()
    for parameter in model.parameters():  # such that each bias counts
        parameter.add_(0.1)
    plain = copy.deepcopy(model)
    graph(model, limit=32)
    config = CacheConfig(mode, interval=3)
    computed = [step for step, computes in enumerate(config.of_steps(7)) if computes]
    at = computed[-1] - 1  # reuses, and a step that computes comes behind it
    assert at not in computed
    for each in (plain, model):
        apply_cache(each, config=config)
    for _ in range(2):
        two_runs(model)
    before, outputs = captures(model), []
    for each in (plain, model):
        taken: list[int] = []

        def called(each=each, taken=taken, **call):
            taken.append(captures(model))
            if len(taken) == 2 * at + 1:  # in the first of two runs
                changes(each)
            return each(**call)

        outputs.append(two_runs(called))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert (taken[2 * at + 1] == before) == (mode in unread)  # captured anew at once, or by the next step that computes
    assert captures(model) > before


@GPU
@torch.no_grad()
def test_a_hook_and_another_shape():
    """Look before a capture too: one of a model with a hook would leave it out later."""
    model = graph(Mixed().eval().cuda())
    model(**inputs("cuda"))
    model.linear.register_forward_hook(lambda module, args, output: output * next(factors))
    for _ in range(2):
        factors = iter([2.0])
        found = model(**inputs("cuda", 5))
        factors = iter([2.0])
        torch.testing.assert_close(found, Mixed.forward(model, **inputs("cuda", 5)), rtol=0, atol=0)
    assert captures(model) == 1


@GPU
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_a_compensated_transformer(said):
    model = make_tiny(FLUX).cuda()
    config = CacheConfig("branch", interval=3)
    found = fit_feature_compensation(model, lambda: two_runs(model), config=config)
    apply_cache(model, compensation=found)
    expected = two_runs(model)
    graph(model)
    for _ in range(3):
        torch.testing.assert_close(two_runs(model), expected, rtol=0, atol=0)
    assert captures(model) == 6  # the last step of a run of known length keeps nothing, as none comes after it
    assert not said()


@torch.no_grad()
def test_runs_that_take_turns_find_their_memory_again(monkeypatch):
    """Check that two runs in turns find the feature buffers of the image before, which graphs were captured for."""
    made = []
    make = FeatureStore.make

    def counted(store, *args):
        made.append(make(store, *args))
        return made[-1]

    monkeypatch.setattr(FeatureStore, "make", counted)
    model = make_tiny(FLUX)
    apply_cache(model, config=CacheConfig("branch", interval=3))
    for _ in range(3):
        runs = [{name: inputs_of(FLUX, 0.5)[name] for name in ("encoder_hidden_states", "txt_ids")} for _ in range(2)]
        for step in range(4):
            for run in runs:
                model(**{**inputs_of(FLUX, 1 - step / 4), **run})
    assert sum(made) == 2
