"""Describe a family of models: what caches, fused kernels and calibration have to know of a transformer."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from qandc.caching.features import Target
from qandc.caching.plan import Plan
from qandc.errors import CacheError
from qandc.quantization.ranges import StepRanges

__all__ = [
    "Block",
    "BlockProgram",
    "Blocks",
    "Call",
    "Family",
    "Launch",
    "Modulated",
    "Program",
    "Stack",
    "adaln_gates",
    "adds_between",
    "arguments_of",
    "check_added_once",
    "image_of",
    "image_part",
    "only",
    "stream_of",
    "with_image",
    "zero_gates",
]

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

    @classmethod
    def why_not_whole(cls, transformer: Any) -> str | None:
        """Say why a program that is not built would not be ``graphable``, or None."""

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

    def features_shape(self, latents: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of what the branches add in one step, ``[L, K, B, tokens, D]``."""

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


class BlockProgram(Protocol):
    """Run a block on fused kernels, built for its layers as they are; nothing waits for the GPU.

    Attributes:
        layers: names of the quantized layers in whose place it runs.
        arguments: those of a forward that it reads; with any other a block runs unfused.
    """

    layers: ClassVar[tuple[str, ...]]
    arguments: ClassVar[tuple[str, ...]]

    def __init__(self, block: Any) -> None:
        """Put weights side by side where one product reads them; a ModelError where that can't be."""

    @staticmethod
    def why_not(block: Any) -> str | None:
        """Say why a block can't run fused, or None."""

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        """Say why a forward of a block with these arguments can't run fused, or None."""

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> Any:
        """Return what the block returns; ``targets`` take what its branches add before their gates."""


@dataclass(frozen=True)
class Stack:
    """Describe the blocks of one list of a transformer, which add the outputs of branches to the stream of the image.

    A block computes ``x ← x + Σ_k gate_k · f_k`` for its branches k, with gates of the current timestep. Other streams,
    of text, are read by the blocks alone: where all blocks are reused, nobody reads them, so a cache leaves them out.

    Attributes:
        blocks: name of the list.
        branches: modules of a block whose outputs it adds; a block may lack some.
        gates: gives for a block and the arguments of its forward the gates ``[K, B, D]`` of the branches that it has;
            on a reuse step too each block is called, with the modulation of that step.
            As ``why_not`` it can be pickled, since blocks of a cached model hold it.
        why_not: says why the branches of a block can't be reused on their own, or None.
        returns: the arguments of a block that it returns, in that order; the stream of the image is the last, or the
            end of it, behind the text.
        fused: runs one of these blocks on fused kernels; None where there are none, or ``Family.program`` runs all.
        modulations: layers of a block that are given SiLU of the vector of ``Family.modulated``; a block may lack some.
        gated_by: modules of a block that ``gates`` calls, beside reading attributes of the block itself.
    """

    blocks: str
    branches: tuple[str, ...]
    gates: Callable[[Any, Call], torch.Tensor]
    why_not: Callable[[Any], str | None]
    returns: tuple[str, ...] = ("hidden_states",)
    fused: type[BlockProgram] | None = None
    modulations: tuple[str, ...] = ()
    gated_by: tuple[str, ...] = ()

    def returned(self, call: Call, x: torch.Tensor) -> Any:
        """Return what a block called so returns, with ``x`` as its last stream and the others as they come."""
        others = tuple(call[name] for name in self.returns[:-1])
        return (*others, x) if others else x


class Modulated(NamedTuple):
    """Describe the vector of each sample that blocks make their modulations of.

    Attributes:
        arguments: of a forward, which it is made of beside ``timestep``.
        divisor: what pipelines divide a timestep of their scheduler by.
        vector: gives it, ``[B, D]``, for a transformer and the arguments of its forward.
        embedder: the module that makes it.
    """

    arguments: tuple[str, ...]
    divisor: int
    vector: Callable[[Any, Call], torch.Tensor]
    embedder: str = "time_text_embed"


class Block(NamedTuple):
    """Hold a block of a transformer, and by name of a branch its place ``(l, k)`` among features ``[L, K]``."""

    module: Any
    stack: Stack
    places: dict[str, tuple[int, int]]

    def stream(self, call: Call) -> torch.Tensor:
        """Return the stream that holds the image in the arguments of this block."""
        return call[self.stack.returns[-1]]


class Blocks(NamedTuple):
    """Hold all blocks of a transformer in order, and the shape (L, K) of what their branches add.

    L blocks with K branches each; where their numbers differ, L branches, and K is 1.
    """

    blocks: list[Block]
    shape: tuple[int, int]

    def join(self, gates: list[torch.Tensor]) -> torch.Tensor | None:
        """Join the gates of all blocks to ``[L, K, B, D]``; None where none are noted, as with ``delta``."""
        return torch.cat(gates).unflatten(0, self.shape) if gates else None


@dataclass(frozen=True)
class Family:
    """Describe one class of transformers, whose blocks all add to one stream of the image.

    Attributes:
        transformer: its class in diffusers.
        run_key: the argument of its forward that is one tensor for all steps of a run.
        run_mark: another one, which pipelines make anew in each call; for models whose ``run_key`` may be the user's.
        stacks: its blocks, in the order in which they run.
        program: runs all of it on fused kernels; None where there is none.
        classes: gives for a transformer its number n of classes: ``run_key`` holds their ids, n in unconditional rows.
            None where images are of other things.
        uncached: arguments with which a forward is no step of a run: it is computed as if no cache were attached.
        modulated: the vector that modulations are made of, where each block has layers of its own for that.
        captured: a submodule by name, and what is attached to it within CUDA graphs: a forward that gives the same
            without a copy from the host, which cannot be captured.
        named: adds ``hidden_states``, of which shape, dtype and device count, and a ``timestep`` of each sample, that
            falls, to the arguments of a forward that has others.
    """

    transformer: str
    run_key: str
    stacks: tuple[Stack, ...]
    program: type[Program] | None = None
    classes: Callable[[Any], int] | None = None
    uncached: tuple[str, ...] = ()
    run_mark: str | None = None
    named: Callable[[Call], Call] | None = None
    modulated: Modulated | None = None
    captured: tuple[str, type[torch.nn.Module]] | None = None

    def call_of(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the arguments of ``transformer(*args, **kwargs)`` by name."""
        call = arguments_of(transformer, args, kwargs)
        return call if self.named is None else self.named(call)

    def width(self, transformer: Any) -> int:
        """Return the number of channels of what blocks add to."""
        config = transformer.config
        return config.get("dim") or config.num_attention_heads * config.attention_head_dim

    def run_of(self, call: Call) -> tuple[Any, Any]:
        """Return the tensors that a run is known by, or None in the place of one."""
        return call.get(self.run_key), call.get(self.run_mark) if self.run_mark is not None else None

    def is_step(self, call: Call) -> bool:
        """Tell whether a forward with these arguments is a step of a run."""
        return all(call.get(name) is None for name in self.uncached)

    def blocks(self, transformer: Any) -> Blocks:
        """Return the blocks of a transformer of this family."""
        modules = [(module, stack) for stack in self.stacks for module in getattr(transformer, stack.blocks)]
        names = [[n for n in stack.branches if getattr(module, n, None) is not None] for module, stack in modules]
        longest = max(map(len, names))
        even = all(len(found) == longest for found in names)
        shape = (len(names), longest) if even else (sum(map(len, names)), 1)
        places = itertools.product(range(shape[0]), range(shape[1]))
        found = [{name: next(places) for name in of_block} for of_block in names]
        return Blocks([Block(*block, at) for block, at in zip(modules, found, strict=True)], shape)


def image_of(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the tokens of the image in a stream: its end, behind those of a text where both are one sequence."""
    return x if x.shape[1] == tokens else x[:, -tokens:]


def with_image(x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Return a stream with other tokens of the image."""
    return image if x.shape == image.shape else torch.cat([x[:, : -image.shape[1]], image], 1)


def stream_of(output: Any, tokens: int) -> torch.Tensor:
    """Return the image in what a block returns: of several streams the last, of a joint sequence the end."""
    return image_of(output[-1] if isinstance(output, tuple) else output, tokens)


def zero_gates(modulation: torch.Tensor, width: int) -> torch.Tensor:
    """Return the gates ``[K, B, D]`` of an adaLN-Zero modulation ``[B, K · 3 · D]``: K times shift, scale and gate."""
    return modulation.unflatten(1, (-1, 3, width))[:, :, 2].transpose(0, 1)


def adaln_gates(name: str, block: Any, call: Call) -> torch.Tensor:
    """Return the gates of a block whose norm of that name modulates with ``temb``, adaLN-Zero."""
    norm = getattr(block, name)
    return zero_gates(norm.linear(norm.silu(call["temb"])), call["hidden_states"].shape[-1])


def only(name: str, block: Any) -> str | None:
    """Say why a block can't be reused unless it has the forward of the class of that name."""
    return None if forward_of(block).__qualname__ == f"{name}.forward" else f"needs blocks of the class {name}"


def adds_between(call: Call) -> bool:
    """Tell whether a forward with these arguments adds what a ControlNet has made to the stream between blocks."""
    return any("controlnet" in name and value is not None and value is not False for name, value in call.items())


def check_added_once(call: Call, per_branch: bool) -> None:
    """Refuse, with a CacheError, a ControlNet where what it adds is stored with all that blocks add."""
    if not per_branch and adds_between(call):
        raise CacheError("what a ControlNet adds between blocks would be added twice: use mode 'branch' or 'taylor'")


def image_part(output: Any, tokens: int) -> torch.Tensor:
    """Return what a branch gives the stream of the image: of two outputs the first, of a joint sequence the end.

    Raises:
        CacheError: there are more outputs than streams.
    """
    if isinstance(output, tuple) and len(output) > 2:
        raise CacheError("an IP-Adapter adds to the image beside the attention: use cache mode 'delta' with it")
    return image_of(output[0] if isinstance(output, tuple) else output, tokens)


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
