"""Describe a family of models: what a feature cache has to know of a transformer of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Family", "arguments_of"]

Call = Mapping[str, Any]  # the arguments of a forward, by name


@dataclass(frozen=True)
class Family:
    """Describe one class of transformers, whose ``transformer_blocks`` add branches to one stream.

    A block computes ``x ← x + gate_k · f_k`` for its branches k in their order, with gates of the current timestep.

    Attributes:
        transformer: its class in diffusers.
        run_key: the argument of its forward that is one tensor for all steps of a run.
        branches: modules of a block, in the order in which it adds their outputs.
        gates: gives for a block and the arguments of its forward the gates ``[branches, B, D]``.
        why_not: says why the branches of a block can't be reused on their own, or None.
    """

    transformer: str
    run_key: str
    branches: tuple[str, ...]
    gates: Callable[[Any, Call], torch.Tensor]
    why_not: Callable[[Any], str | None]


_NAMES: dict[type, tuple[str, ...]] = {}  # class of a module: the arguments of its forward


def arguments_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``module(*args, **kwargs)`` by name, those that were given."""
    names = _NAMES.get(type(module))  # nothing that a compiler cannot trace
    if names is None:
        names = _NAMES[type(module)] = _names_of(type(module))
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _names_of(cls: type) -> tuple[str, ...]:
    """List the arguments of the forward of a class, not of what was derived from it to attach something."""
    own = (base for base in cls.__mro__ if "forward" in vars(base) and not base.__module__.startswith("qandc."))
    return tuple(inspect.signature(vars(next(own))["forward"]).parameters)[1:]
