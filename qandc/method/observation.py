"""Watch a model draw: attach hooks that look at its features, run it, and tell the timesteps of its runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from qandc.caching.runs import weakly
from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.fuse import is_fused
from qandc.models import FAMILIES, Family, family_of
from qandc.models.family import Block, Call, arguments_of, check_added_once, image_part, stream_of, with_image
from qandc.sampling.loop import plain_timestep
from qandc.support.attach import eager, paused

__all__ = ["Branches", "Observer", "Run", "observe"]


class Branches:
    """Call ``see(layer, branch, feature)`` for what each branch of a model adds, or all blocks together."""

    def __init__(
        self, family: Family, model: Any, per_branch: bool, see: Callable[[int, int, torch.Tensor], None]
    ) -> None:
        self.blocks, self.per_branch = family.blocks(model), per_branch
        self.shape = self.blocks.shape if per_branch else (1, 1)
        self.stream = torch.empty(0)  # of the image, in what the first block was given
        self.seeing = True  # what belongs to a step
        self._see = see
        self._gates: list[torch.Tensor] = []
        modules = [block.module for block in self.blocks.blocks]
        self.handles = [modules[0].register_forward_pre_hook(self._begin, with_kwargs=True)]
        if not per_branch:
            self.handles.append(modules[-1].register_forward_hook(self._leave))
            return
        for block in self.blocks.blocks:
            self.handles.append(
                block.module.register_forward_pre_hook(partial(self._note_gates, block), with_kwargs=True)
            )
            for name, place in block.places.items():
                self.handles.append(getattr(block.module, name).register_forward_hook(self._hook(*place)))

    def gates(self) -> torch.Tensor | None:
        """Return the gates of this step, ``[L, K, B, D]``; None of all blocks together."""
        return self.blocks.join(self._gates)

    def _begin(self, block: Any, args: Any, kwargs: Any) -> None:
        self.stream, self._gates = self.blocks.blocks[0].stream(arguments_of(block, args, kwargs)), []

    def _note_gates(self, block: Block, module: Any, args: Any, kwargs: Any) -> None:
        if self.seeing:
            self._gates.append(block.stack.gates(module, arguments_of(module, args, kwargs)))

    def _leave(self, block: Any, args: Any, output: Any) -> None:
        if self.seeing:
            self._see(0, 0, stream_of(output, self.stream.shape[1]) - self.stream)

    def _hook(self, layer: int, branch: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.seeing:
                self._see(layer, branch, image_part(output, self.stream.shape[1]))

        return hook


class Run:
    """Hold one run while it is observed, by the tensor that a cache would know it by.

    Attributes:
        timesteps: of its steps so far.
    """

    def __init__(self, *known_by: Any) -> None:
        self.known_by = [weakly(tensor) for tensor in known_by]  # when nobody holds the first, the run is over
        self.timesteps: list[float] = []

    def is_of(self, *known_by: Any) -> bool:
        """Tell whether it is known by these tensors."""
        return all(ours() is theirs for ours, theirs in zip(self.known_by, known_by, strict=True))


AnyRun = TypeVar("AnyRun", bound=Run)


class Observer(Generic[AnyRun]):
    """Look at the features of a model at every step of its runs. A run is let go when the next begins after it.

    Attributes:
        run: the one that the current step belongs to.
        timesteps: of the runs that are over, which have the same; empty before.
        handles: of hooks, which are removed after the runs.
    """

    run: AnyRun

    def __init__(self, family: Family, model: Any, per_branch: bool) -> None:
        self.branches = Branches(family, model, per_branch, self.see)
        self.timesteps: tuple[float, ...] = ()
        self._family = family
        self._runs: list[AnyRun] = []
        self.handles = [*self.branches.handles, model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        # after the hooks of branches
        self.handles.append(self.branches.blocks.blocks[-1].module.register_forward_hook(self._end))

    def make_run(self, *known_by: Any) -> AnyRun:
        """Make what holds a run."""
        raise NotImplementedError

    def begin(self, call: Call, args: Any, kwargs: Any) -> None:
        """Take what the model is given at the next step of ``run``, by name in ``call``."""

    def see(self, layer: int, branch: int, feature: torch.Tensor) -> None:
        """Take a feature of this step, ``[B, tokens, D]``."""
        raise NotImplementedError

    def end(self, stream: torch.Tensor) -> torch.Tensor | None:
        """Take the stream of the image behind all blocks, and return what the model goes on with instead, or None."""

    def finish(self, run: AnyRun) -> None:
        """Take what a run that is over holds."""

    def finish_all(self, runs: list[AnyRun] | None = None) -> None:
        """Finish these runs, or all that have begun.

        Raises:
            ConfigError: one run has other timesteps than another.
        """
        for run in list(self._runs) if runs is None else runs:
            self._runs.remove(run)
            first, found = self.timesteps or tuple(run.timesteps), tuple(run.timesteps)
            if found != first:
                raise ConfigError(
                    f"one run has {len(first)} steps from timestep {first[0]:g} on and another {len(found)} from "
                    f"{found[0]:g} on; give a function whose runs have the same steps"
                )
            self.timesteps = first
            self.finish(run)
        if not self._runs:
            self.__dict__.pop("run", None)  # what it holds is large, and an observer is in a circle with its hooks

    def _begin(self, model: Any, args: Any, kwargs: Any) -> None:
        call = self._family.call_of(model, args, kwargs)
        self.branches.seeing = self._family.is_step(call)
        if not self.branches.seeing:
            return
        check_added_once(call, self.branches.per_branch)
        known_by = self._family.run_of(call)
        known = next((run for run in self._runs if run.is_of(*known_by)), None)
        if known is None:
            # two may take turns: conditional and unconditional rows apart
            self.finish_all([run for run in self._runs if run.known_by[0]() is None or run is not self._runs[-1]])
            known = self.make_run(*known_by)
            self._runs.append(known)
        self.run = known
        known.timesteps.append(plain_timestep(torch.as_tensor(call["timestep"]).reshape(-1)[0]))
        self.begin(call, args, kwargs)

    def _end(self, block: Any, args: Any, output: Any) -> Any:
        if not self.branches.seeing:
            return None
        image = self.end(stream_of(output, self.branches.stream.shape[1]))
        if image is None:
            return None
        return (*output[:-1], with_image(output[-1], image)) if isinstance(output, tuple) else with_image(output, image)


Watching = TypeVar("Watching", bound=Observer[Any])


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
        raise ModelError(f"{known} diffusers' {', '.join(FAMILIES)}; got {type(model).__name__}")
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
    observer.finish_all()
    if not observer.timesteps:
        raise DataError(f"the function did not run this {type(model).__name__}; give one that draws with its pipeline")
    return observer, observer.timesteps
