"""What attaching by a change of class must keep: hooks that are called, copies that are models of their own."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from qandc.derived import eager
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
