"""Watch a model draw: attach hooks that look at its features, run it, and tell the timesteps of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.fuse import is_fused
from qandc.models import FAMILIES, Family, family_of
from qandc.support.attach import eager, paused

__all__ = ["observe"]


class _Run(Protocol):
    timesteps: list[float]


class Observer(Protocol):
    """Hold hooks on a model, and what they have seen of each run.

    Attributes:
        handles: of the hooks; they are removed after the runs.
        runs: by the id of the tensor that a cache would know a run by.
    """

    handles: list[RemovableHandle]

    @property
    def runs(self) -> Mapping[int, _Run]: ...


Watching = TypeVar("Watching", bound=Observer)


def observe(
    model: Any, run: Callable[[], Any], attach: Callable[[Family], Watching], *, known: str, instead: str
) -> tuple[Watching, tuple[float, ...]]:
    """Call ``run`` while an observer is attached to ``model``; return the observer, and the timesteps of all runs.

    Caches and graphs are paused, and compiled modules run uncompiled, so that hooks are called at every step.

    Args:
        attach: makes the observer, for the family of the model.
        known, instead: begin the message for a model of no family, and end that for a fused one.

    Raises:
        ModelError: no family is known of the model, or it is fused.
        DataError: ``run`` did not run it.
        ConfigError: one run has other timesteps than another.
    """
    family = family_of(model)
    if family is None:
        raise ModelError(f"{known} diffusers' {' and '.join(FAMILIES)}; got {type(model).__name__}")
    if is_fused(model):
        raise ModelError(f"the features of a fused transformer cannot be seen; {instead} before fuse")
    with paused(model), eager():
        observer = attach(family)
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in observer.handles:
                handle.remove()
    runs = [tuple(found.timesteps) for found in observer.runs.values()]
    if not runs:
        raise DataError(f"the function did not run this {type(model).__name__}; give one that draws with its pipeline")
    for timesteps in runs:
        if timesteps != runs[0]:
            raise ConfigError(
                f"one run has {len(runs[0])} steps from timestep {runs[0][0]:g} on and another {len(timesteps)} from "
                f"{timesteps[0]:g} on; give a function whose runs have the same steps"
            )
    return observer, runs[0]
