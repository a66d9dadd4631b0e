"""The watch over a model: what it notices, in each way to change one."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from qandc.support.watch import Watch


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(()))
        self.plain = torch.ones(2)
        self.bits, self.sizes, self.options, self.array = 8, [1, 2], {"a": 1, "nested": {"theta": 1}}, np.ones(3)
        self.second, self.keyed = nn.Identity(), {(1,): 1}


def set_size(layer):
    layer.sizes[0] = 3


def change_inside(layer):
    options = dict(layer.options)
    options["nested"]["theta"] = 2
    layer.options = options


def rename(layer):
    layer.__dict__["other"] = layer.__dict__.pop("array")


CHANGES = {
    "weight": lambda layer: setattr(layer.linear, "weight", nn.Parameter(layer.linear.weight.detach().clone())),
    "equal scalar": lambda layer: setattr(layer, "scale", torch.ones(())),
    "plain tensor": lambda layer: setattr(layer, "plain", torch.ones(2)),
    "moved": lambda layer: layer.linear.to(torch.float64),
    "module": lambda layer: setattr(layer, "linear", nn.Linear(3, 3)),
    "another module": lambda layer: setattr(layer, "more", nn.Identity()),
    "number": lambda layer: setattr(layer, "bits", 4),
    "number as a tensor": lambda layer: setattr(layer, "bits", torch.ones(2)),
    "array": lambda layer: setattr(layer, "array", np.ones(3)),
    "element of a list": set_size,
    "another list": lambda layer: setattr(layer, "sizes", [1, 3]),
    "key of a dictionary": lambda layer: layer.options.update(b=2),
    "another dictionary": lambda layer: setattr(layer, "options", {"a": 2}),
    "hook": lambda layer: layer.linear.register_forward_hook(lambda *given: None),
    "hook in other hooks": lambda layer: setattr(layer, "_forward_hooks", OrderedDict({1: print})),
    "forward": lambda layer: setattr(layer, "forward", lambda x: x),
    "training": lambda layer: layer.train(),
    "equal number": lambda layer: setattr(layer, "bits", 8.0),
    "copy that was changed inside": change_inside,
    "order": lambda layer: setattr(layer, "_modules", dict(reversed(layer._modules.items()))),
    "key that is no name": lambda layer: layer.keyed.update({(2,): layer.keyed.pop((1,))}),
    "name": rename,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    layer = Layer().eval()
    watch = Watch(layer)
    assert watch.unchanged()
    CHANGES[change](layer)
    assert not watch.unchanged()
    assert Watch(layer).unchanged()


def test_modules_are_left_out_with_what_they_hold():
    def model():
        return nn.Sequential(Layer(), nn.ModuleDict({"kept": Layer()}))

    for changed, left in ((lambda m: m[0].linear, False), (lambda m: m[1]["kept"].linear, True)):
        whole = model()
        watch = Watch(whole, without=[whole[0]])
        changed(whole).weight = nn.Parameter(torch.zeros(3, 3))
        assert watch.unchanged() == (not left)
        watch = Watch(whole, without=[whole[0]])
        changed(whole).weight.data = torch.ones(3, 3)
        assert watch.in_place() == (not left)
    watch = Watch(whole, without=[whole[0]])
    whole[0] = Layer()
    assert not watch.unchanged()


def test_what_is_written_in_place_stays():
    """Whoever reads a tensor reads what is there now."""
    layer = Layer()
    watch = Watch(layer)
    layer.linear.weight.data.zero_()
    layer.scale.fill_(3)
    assert watch.unchanged()
