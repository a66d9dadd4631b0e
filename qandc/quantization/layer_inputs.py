"""Observe what layers of a model are given while batches run through it, and which are given the same tensor."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from qandc.errors import DataError, QandCError
from qandc.support.arguments import Batches
from qandc.support.attach import eager, paused

__all__ = ["SharedInputs", "TokenLayers", "input_of_call", "run_batch", "run_batches", "watch_inputs"]


def input_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "input") -> torch.Tensor:
    """Return the tensor that a forward got first or by its name, from the arguments of a hook ``with_kwargs``."""
    found: torch.Tensor = args[0] if args else kwargs[name]
    return found


@contextmanager
def watch_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, x)`` before each forward of a layer inside the block; nothing compiled runs, no step is reused.

    Inputs without a value are left out: they tell nothing.
    """

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of_call(args, kwargs)
            if x.numel():
                # a forward may be in inference mode, whose tensors could not be added to afterwards
                with torch.inference_mode(False), torch.no_grad():
                    see(name, x.detach())

        return note

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with paused(model), eager():
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_batches(model: nn.Module, batches: Batches, after_each: Callable[[], None] = lambda: None) -> None:
    """Call the model with each batch, or call ``batches``, if it is a function that runs the model.

    Raises:
        DataError: there is no batch, or one is no input of the model.
    """
    if not isinstance(batches, Iterable):
        batches()
        after_each()
        return
    empty = True
    for batch in batches:
        empty = False
        run_batch(model, batch)
        after_each()
    if empty:
        raise DataError("the calibration set is empty; give at least one batch of model inputs")


def run_batch(model: nn.Module, batch: Any) -> None:
    """Call the model with a batch.

    Raises:
        DataError: it is no input of the model.
    """
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple | list):
            model(*batch)
        else:
            model(batch)
    except (QandCError, torch.OutOfMemoryError):
        raise
    except (TypeError, AttributeError, ValueError, LookupError, RuntimeError) as error:
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise DataError(
            f"a batch is no input of {type(model).__name__} ({cause}); give what the model takes"
        ) from error


class TokenLayers:
    """Tell layers that see tokens, ``[B, tokens, K]``, from those that see one row per sample, as modulation does."""

    def __init__(self) -> None:
        self._sees_tokens: dict[str, bool] = {}

    def see(self, name: str, x: torch.Tensor) -> None:
        """Note the shape of an input of a layer."""
        tokens = x.ndim > 2 and x.shape[1:-1].numel() > 1
        self._sees_tokens[name] = tokens or self._sees_tokens.get(name, False)

    def others(self) -> list[str]:
        """Name the layers that saw one row per sample in every forward; none if no layer saw tokens."""
        found = self._sees_tokens
        return [name for name, tokens in found.items() if not tokens] if any(found.values()) else []


class _Group:
    """Hold layers that were given the same tensors in all forwards, and the total of these.

    Attributes:
        key: of the tensor seen last.
        latest: the statistic of a tensor that not all have seen yet, and is not in the total.
        waiting: the layers that have not.
    """

    def __init__(self, total: torch.Tensor, members: set[str]) -> None:
        self.total, self.members = total, members
        self.key: Any = None
        self.latest = total
        self.waiting: set[str] = set()


class SharedInputs:
    """Add up a statistic of the inputs of each layer, once for all layers that are given the same tensors.

    Names tell nothing of it: k and v of cross-attention read another tensor than q. So tensors are compared, and layers
    part at the first forward that gives one of them another tensor.

    Args:
        measure: makes the statistic of one input ``[rows, K]``, a new tensor in float32.
        merge: adds the second to the first, in place.
    """

    def __init__(
        self, measure: Callable[[torch.Tensor], torch.Tensor], merge: Callable[[torch.Tensor, torch.Tensor], Any]
    ) -> None:
        self._measure, self._merge = measure, merge
        self._groups: dict[str, _Group] = {}
        self._new: dict[Any, _Group] = {}  # by that tensor: those that have seen one in all

    def end_forward(self) -> None:
        """Separate layers that have not seen the same since the last call; call it after the last forward too."""
        for group in list(self._groups.values()):
            self._part(group)

    def see(self, name: str, x: torch.Tensor) -> None:
        """Add an input of a layer."""
        key = _identity(x)
        group = self._groups.get(name)
        if group is None:
            group = self._new.get(key)
            if group is None:
                group = self._new[key] = _Group(self._of(x), set())
                group.key = key
            group.members.add(name)
            self._groups[name] = group
            return
        if self._new.get(group.key) is group:
            del self._new[group.key]
        if name not in group.waiting or key != group.key:
            self._part(group)
            group = self._groups[name]
        if not group.waiting:
            group.key, group.latest, group.waiting = key, self._of(x), set(group.members)
        group.waiting.discard(name)
        if not group.waiting:
            self._merge(group.total, group.latest)
            group.latest = group.total

    def totals(self) -> dict[str, torch.Tensor]:
        """Map layer names to totals; layers that were given the same share one tensor."""
        return {name: group.total for name, group in self._groups.items()}

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        return self._measure(x.reshape(-1, x.shape[-1]))

    def _part(self, group: _Group) -> None:
        """Split off the layers of a group that were not given the tensor that the others were given last."""
        if not group.waiting:
            return
        late = _Group(group.total.clone(), group.waiting)
        self._groups.update(dict.fromkeys(late.members, late))
        group.members, group.waiting = group.members - late.members, set()
        self._merge(group.total, group.latest)
        group.latest = group.total


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common only if they are the same values in the same memory.

    The weak reference keeps the memory from being given to another tensor unnoticed, but does not keep the values.
    """
    version = 0 if x.is_inference() else x._version  # inference tensors do not count what is written to them
    return StorageWeakRef(x.untyped_storage()), version, x.storage_offset(), x.shape, x.stride(), x.dtype
