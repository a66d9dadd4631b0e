"""Keys and values of a prompt: made at the first step of a run that graphs run, and never those of another prompt."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qandc import CacheConfig, apply_cache, calibrate, fuse, graph, quantize_model
from qandc.fusion.graphs import GraphCache
from qandc.fusion.model_graph import Graphed
from qandc.models.pixart_fused import FusedPixArtBlock
from qandc.models.products import Mlp
from tests.tiny_models import inputs_of, make_tiny, output_of

NAME, BLOCKS = "PixArtTransformer2DModel", 2
TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Run:
    """Call a fused model and a copy without graphs with the same, and count the products of captions of the first."""

    def __init__(self, monkeypatch, device="cpu", dtype=torch.float32):
        model = calibrate(quantize_model(make_tiny(NAME)), [inputs_of(NAME, time) for time in (0.9, 0.1)])
        self.model, self.device, self.dtype = fuse(model.to(device, dtype)), device, dtype
        self.given = self.call(0)
        output_of(self.model, self.given)  # builds its blocks
        self.plain = copy.deepcopy(self.model)
        graph(self.model)
        self.made, make = 0, FusedPixArtBlock._of_caption

        def counted(block, caption):
            self.made += 1
            return make(block, caption)

        monkeypatch.setattr(FusedPixArtBlock, "_of_caption", counted)

    def call(self, step):
        found = inputs_of(NAME, TIMES[step], seed=step)
        found = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in found.items()}
        floats = {k: v.to(self.dtype) for k, v in found.items() if k in ("hidden_states", "encoder_hidden_states")}
        return {**found, **floats}

    def step(self, step):
        """Return how many captions were read, after comparing what the models return."""
        prompt = {name: self.given[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
        call, self.made = {**self.call(step), **prompt}, 0
        found, made = output_of(self.model, call), self.made
        assert torch.equal(found, output_of(self.plain, call))
        return made

    def change(self, name, change):
        self.given[name] = change(self.given[name])

    def weights(self, change):
        for model in (self.model, self.plain):
            change(model.caption_projection.linear_1)


@pytest.fixture
def run(fused_anywhere, monkeypatch):
    """A run of a machine without a GPU, on which graphs are the functions that they would be captured from."""
    known = set()

    def called(graphs, function, inputs, kind=None):
        how = "replayed" if kind in known else "captured"
        known.add(kind)
        graphs._graphs[graphs._key(inputs, kind)] = None
        return function(*inputs), how

    monkeypatch.setattr(GraphCache, "run", called)
    monkeypatch.setattr("qandc.fusion.model_graph._why_not_now", lambda model, tensors: None)
    with torch.no_grad():
        yield Run(monkeypatch)


CHANGES = {  # what happens between two steps, and how many blocks read the caption again
    "nothing": (lambda run: None, 0),
    "another prompt": (lambda run: run.change("encoder_hidden_states", lambda x: x * 2), BLOCKS),
    "an equal prompt": (lambda run: run.change("encoder_hidden_states", torch.clone), BLOCKS),
    "written into": (lambda run: run.change("encoder_hidden_states", lambda x: x.mul_(2)), BLOCKS),
    "other weights": (lambda run: run.weights(lambda layer: layer.weight.mul_(2)), BLOCKS),
    "no weight": (lambda run: run.weights(lambda layer: setattr(layer, "bias", None)), BLOCKS),
    "another mask": (lambda run: run.change("encoder_attention_mask", lambda x: x * 0.5), 0),
    "no mask": (lambda run: run.change("encoder_attention_mask", lambda x: None), BLOCKS),
}


@pytest.mark.parametrize("change", CHANGES)
def test_captions_are_read_once(run, change):
    assert [run.step(i) for i in range(3)] == [BLOCKS, 0, 0]
    change, again = CHANGES[change]
    change(run)
    assert run.step(3) in (again, again + BLOCKS)  # once more where what a replay began with is found to have changed
    assert run.step(4) == 0


def test_each_step_reads_a_caption_of_inference_mode(run):
    """Where tensors do not tell that they were written into."""
    with torch.inference_mode():
        run.change("encoder_hidden_states", torch.clone)
        assert [run.step(i) for i in range(2)] == [BLOCKS, BLOCKS]
        run.change("encoder_hidden_states", lambda x: x.mul_(2))
        assert run.step(2) == BLOCKS


def test_threads_have_memory_of_their_own(run):
    assert run.step(0) == BLOCKS

    @torch.no_grad()
    def other():
        return run.step(1), run.step(2)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result() == (BLOCKS, 0)
    assert run.step(3) == 0


def test_a_step_that_failed_filled_nothing(run, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Mlp, "add_", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.step(0)
    assert [run.step(0), run.step(1)] == [BLOCKS, 0]


def test_kinds_of_calls_are_few(run):
    for i in range(6):
        run.change("encoder_hidden_states", lambda x, i=i: x[:, : 6 - i // 2])
        run.change("encoder_attention_mask", lambda x, i=i: x[:, : 6 - i // 2])
        run.step(i)
    assert len(Graphed.of(run.model).prompts) == 3


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("config", [None, CacheConfig("taylor", interval=2)])
def test_graphs_read_what_is_kept(monkeypatch, config):
    run = Run(monkeypatch, "cuda", torch.bfloat16)
    for model in (run.model, run.plain) if config is not None else ():
        apply_cache(model, config=config)
    prompts = [run.call(i)["encoder_hidden_states"] for i in range(2)]
    for prompt in (*prompts, *prompts):
        run.change("encoder_hidden_states", lambda x, prompt=prompt: prompt.clone())  # a run of a cache has its own
        for i in range(len(TIMES)):
            run.step(i)
    taken = Graphed.of(run.model).graphs.captures
    for prompt in (*prompts, *prompts) if config is None else ():  # in turns
        run.change("encoder_hidden_states", lambda x, prompt=prompt: prompt)
        run.step(0)
    for prompt in prompts:
        run.change("encoder_hidden_states", lambda x, prompt=prompt: prompt.clone())
        for i in range(len(TIMES)):
            assert run.step(i) == 0  # by no block in Python
    assert Graphed.of(run.model).graphs.captures == taken
