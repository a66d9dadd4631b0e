"""What attaching by a change of class must keep: hooks that are called, copies that are models of their own."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from qandc import (
    CacheConfig,
    apply_cache_to_dit,
    calibrate,
    compensated_scheduler,
    fuse_dit,
    get_cache,
    make_scheduler,
    quantize_model,
)
from qandc.support.attach import derived_class, eager, original_class
from qandc.variance_compensation import FittedFor, epsilon_scaling
from tests.conftest import make_dit


def compile_blocks(model):
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    return model


def replace_blocks(model):
    for index, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[index] = torch.compile(block, backend="eager")
    return model


def compile_whole(model):
    model.compile(backend="eager")
    return model


WAYS = (compile_blocks, replace_blocks, compile_whole, lambda model: torch.compile(model, backend="eager"))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", WAYS, ids=["block.compile", "compile(block)", "model.compile", "compile(model)"])
def test_hooks_registered_after_a_compiled_run_are_called(compiled, dit_inputs):
    model = make_dit(num_layers=2)
    called = compiled(model)
    seen = set()
    with torch.no_grad():
        called(**dit_inputs)
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, args: seen.add(module))
        with eager():
            called(**dit_inputs)
    assert len(seen) == len(layers) > 0


def test_the_compiler_is_back_when_the_last_thread_has_left():
    """The first thread in is the first out: a stance restored by each would stay eager for good."""
    ran = []

    def backend(graph, inputs):
        ran.append(graph)
        return graph.forward

    def compiles():
        torch.compiler.reset()
        ran.clear()
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        return bool(ran)

    inside, leave, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        with eager():
            inside.set()
            assert leave.wait(60)
        left.set()

    assert compiles()
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    with eager():
        leave.set()
        assert left.wait(60)
        assert not compiles()
    thread.join()
    assert compiles()


# ---- copies


def saved_by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_by_torch,
}


def cached(model):
    apply_cache_to_dit(model, config=CacheConfig("branch", interval=2))
    return model


def fused(model):
    quantize_model(model)
    generator = torch.Generator().manual_seed(0)
    batch = {"hidden_states": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([5, 5])}
    return fuse_dit(calibrate(model, [{**batch, "class_labels": torch.tensor([1, 2])}]))


def cached_and_fused(model):
    return cached(fused(model))


@torch.no_grad()
def without_blocks(model, batch):
    """What is left where no block adds anything: every block has a gate, which is 0 here."""
    for block in model.transformer_blocks:
        block.norm1.linear.weight.zero_()
        block.norm1.linear.bias.zero_()
    return run(model, batch)


@torch.no_grad()
def run(model, batch):
    return model(**{**batch, "class_labels": batch["class_labels"].clone()}).sample


@pytest.mark.slow
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(cached, compile_blocks), (cached, compile_whole), (fused, compile_blocks), (cached_and_fused, compile_blocks)],
    ids=["cached", "cached, compiled as a whole", "fused", "cached and fused"],
)
def test_copies_of_compiled_models_compute_with_their_own_weights(kind, compiled, copied, dit_inputs):
    model = compiled(kind(make_dit(num_layers=2)))
    expected = run(model, dit_inputs)  # compiles
    other = copied(model)
    assert type(other) is type(model)
    torch.testing.assert_close(run(other, dit_inputs), expected, atol=1e-4, rtol=1e-4)
    wanted = without_blocks(kind(make_dit(num_layers=2)), dit_inputs)
    assert not torch.allclose(wanted, expected, atol=1e-2)
    torch.testing.assert_close(without_blocks(other, dit_inputs), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(model, dit_inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_shallow_copy_is_not_called_through_the_code_compiled_for_its_original():
    model = compile_whole(cached(make_dit(num_layers=1)))
    other = copy.copy(model)
    assert other._compiled_call_impl is None
    assert get_cache(other) is get_cache(model)  # it has the very blocks of its original


class Mixin: ...


class Stateful:
    def __init__(self, value):
        self.value, self.handle = value, threading.Lock()  # a lock can be neither copied nor pickled

    def __getstate__(self):
        return {"value": self.value}

    def __setstate__(self, state):
        self.__init__(state["value"])


class Reduced(Stateful):
    def __reduce__(self):
        return type(self), (self.value,)


@pytest.mark.parametrize("base", [Stateful, Reduced])
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_the_original_class_says_what_is_its_state(base, protocol):
    thing = base([1])
    thing.__class__ = derived_class(Mixin, base)
    for other in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing, protocol))):
        assert type(other) is type(thing)
        assert original_class(other) is base
        assert other.value == [1]
        assert other.value is not thing.value
        assert other.handle is not thing.handle


def test_a_scheduler_that_compensates_is_copied_and_pickled():
    ddim = make_scheduler("ddim", {"num_train_timesteps": 1000})
    fitted_for = FittedFor("DDIMScheduler", (500, 0), 1.5, "a model")
    scheduler = compensated_scheduler(ddim, epsilon_scaling(1.01, 4, fitted_for))
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        other.set_timesteps(2)
        x, noise = torch.ones(2, 1, 4, 2, 2)
        scheduler.set_timesteps(2)
        assert torch.equal(other.step(noise, 500, x).prev_sample, scheduler.step(noise, 500, x).prev_sample)


def test_what_the_class_of_an_object_makes_has_nothing_attached(tmp_path):
    ddim = make_scheduler("ddim", {"num_train_timesteps": 1000})
    corrected = compensated_scheduler(ddim, epsilon_scaling(1.01, 4, FittedFor("DDIMScheduler", (500, 0), 1.5, "x")))
    other = type(corrected).from_config(corrected.config, clip_sample=False)
    assert type(other) is type(ddim)
    assert other.config.clip_sample is False
    model = cached(make_dit(num_layers=1))
    model.save_pretrained(tmp_path)
    for other in (type(model).from_config(model.config), type(model).from_pretrained(tmp_path)):
        assert type(other) is type(make_dit(num_layers=1))
        assert get_cache(other) is None


def test_what_another_tool_derives_from_a_derived_class_is_copied():
    model = cached(make_dit(num_layers=1))
    torch.nn.utils.parametrize.register_parametrization(model.transformer_blocks[0].norm1.linear, "bias", nn.Identity())
    ours = type(model)
    model.__class__ = type("Another", (ours,), {})
    assert type(copy.copy(model)) is type(copy.deepcopy(model)) is type(model)
