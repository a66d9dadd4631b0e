"""Notice that the modules of a model are no longer those that something was built from."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

__all__ = ["Watch"]

STRUCTURE = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_chain = itertools.chain.from_iterable


class Watch:
    """Notice that something a forward can read from its modules was replaced: weights, settings, hooks, submodules.

    Objects are compared by identity, in passes that run in C. Writing into a tensor needs no notice: whoever reads it
    reads what is there.

    Args:
        model: the module that is watched, with all that it holds.
        settings: attributes that are watched beside submodules, weights, buffers, hooks and a replaced forward. None
            for all attributes, those that are dictionaries or lists by what they hold: four times as many objects.
        without: modules that are not watched, nor what they hold; that another takes the place of one is noticed.
    """

    def __init__(
        self, model: nn.Module, settings: Collection[str] | None = None, without: Collection[nn.Module] = ()
    ) -> None:
        attributes = [module.__dict__ for _, module in model.named_modules(memo=set(without))]
        self.sized: list[Any]
        if settings is None:
            values = list(_chain(map(dict.values, attributes)))
            held = [*attributes, *(value for value in values if isinstance(value, dict))]
            self.lists = [value for value in values if type(value) is list]
            self.sized = [*held, *self.lists]
        else:
            held, self.lists = [own[name] for own in attributes for name in STRUCTURE], []
            self.sized = [*held, *attributes[1:]]  # the model's own attributes are for others to use
        self.settings = [(own, name) for own in attributes for name in settings or () if name in own]
        self.filled = [one for one in held if one]
        self.names = self.filled if settings is None else []  # modules and weights are not renamed in place
        self.sizes = self._sizes()
        self.held = self._held()
        kinds = ("_parameters", "_buffers") if settings is None else ("_parameters",)
        tensors = [t for own in attributes for kind in kinds for t in own[kind].values()]
        self.tensors = [t for t in tensors if t is not None]
        self.addresses = self._addresses()

    def _sizes(self) -> list[int]:
        return list(map(len, self.sized))

    def _held(self) -> list[Any]:
        """List names and values; the objects themselves, whose ids nothing else can get meanwhile."""
        settings = [own.get(name) for own, name in self.settings]
        return [*_chain(self.names), *_chain(map(dict.values, self.filled)), *_chain(self.lists), *settings]

    def _addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def in_place(self) -> bool:
        """Tell whether all memory that the model reads is what it was; whether it still is what to read is left open.

        ``.to()`` changes what is behind a parameter, not the parameter; what shares a product moves its buffers.
        """
        return self._addresses() == self.addresses

    def unchanged(self) -> bool:
        """Tell whether nothing was replaced or moved."""
        return self.in_place() and self._sizes() == self.sizes and all(map(operator.is_, self._held(), self.held))
