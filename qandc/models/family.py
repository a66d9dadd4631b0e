"""Describe a family of models: what caches, fused kernels and calibration have to know of a transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from qandc.caching.plan import Plan
from qandc.quantization.ranges import StepRanges

__all__ = ["Call", "Family", "Launch", "Program", "arguments_of"]

Call = Mapping[str, Any]  # the arguments of a forward, by name


class Launch(NamedTuple):
    """Hold what a step runs, ``function(*inputs, *extra)``, and a key for the CUDA graph of it."""

    kind: Hashable
    function: Callable[..., torch.Tensor]
    extra: tuple[torch.Tensor, ...] = ()


class Program(Protocol):
    """Run the forward of a transformer on fused kernels, built for its layers as they are; nothing waits for the GPU.

    Attributes:
        reasons: by name of a layer that such a program can run, why this one does not, or None.
        graphable: nothing runs as it is in diffusers, so that a CUDA graph can hold the step.
    """

    reasons: Mapping[str, str | None]
    graphable: bool

    def __init__(self, transformer: Any, ranges: StepRanges | None) -> None: ...

    @staticmethod
    def why_not(transformer: Any, ranges: StepRanges | None) -> dict[str, str | None]:
        """Return ``reasons`` of a program that is not built."""

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        """Say why a forward with these arguments can't run fused, or None."""

    @staticmethod
    def check_conditions(conditions: torch.Tensor) -> None:
        """Refuse, with a DataError, what is not the ``run_key`` argument of a forward."""

    def unchanged(self) -> bool:
        """Tell whether the layers are those that the program was built for."""

    def inputs(self, call: Call) -> tuple[torch.Tensor, ...]:
        """Return what every step takes, latents first, each with a row per sample."""

    def residual_shape(self, latents: torch.Tensor) -> tuple[int, int, int]:
        """Return the shape of the residual stream, ``[B, tokens, D]``."""

    def compute(self, ahead: tuple[torch.Tensor, ...], plan: Plan) -> Launch:
        """Prepare a step that computes the blocks; ``ahead`` is its part of :meth:`prepare`, or empty."""

    def reuse(self, ahead: tuple[torch.Tensor, ...], plan: Plan) -> Launch:
        """Prepare a step that adds the features of its plan in the place of the blocks."""

    def prepare(self, timesteps: torch.Tensor, conditions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute tensors ``[S, ...]`` for the steps of a run ahead; none where they would be too large."""

    def output(self, prediction: torch.Tensor) -> Any:
        """Wrap what a step gives as the forward of diffusers does."""

    def nan_flags(self) -> dict[str, torch.Tensor]:
        """Map names of layers to the flag that the kernel before them raises when it meets NaN."""


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
        program: runs it on fused kernels; None where there are none.
        classes: gives for a transformer its number n of classes: ``run_key`` holds their ids, n in unconditional rows.
            None where images are of other things.
    """

    transformer: str
    run_key: str
    branches: tuple[str, ...]
    gates: Callable[[Any, Call], torch.Tensor]
    why_not: Callable[[Any], str | None]
    program: type[Program] | None = None
    classes: Callable[[Any], int] | None = None

    def all_gates(self, blocks: Sequence[Any], call: Call) -> torch.Tensor:
        """Return the gates of all blocks, ``[L, branches, B, D]``, from what the first of them is given."""
        return torch.stack([self.gates(block, call) for block in blocks])


_NAMES: dict[type, tuple[str, ...]] = {}  # class of a module: the arguments of its forward


def arguments_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``module(*args, **kwargs)`` by name, those that were given."""
    names = _NAMES.get(type(module))  # nothing that a compiler cannot trace
    if names is None:
        names = _NAMES[type(module)] = tuple(inspect.signature(forward_of(module)).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def forward_of(module: Any) -> Any:
    """Return the forward of a module's class, not of what was derived from it to attach something."""
    own = (cls for cls in type(module).__mro__ if "forward" in vars(cls) and not cls.__module__.startswith("qandc."))
    return vars(next(own))["forward"]
