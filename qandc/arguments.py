"""Check what a public function was given against its annotations, before any work.

Annotations say what kind of value is meant, :class:`Between` within ``Annotated`` from where to where. What several
arguments must have in common, and names that must be known, are left to the functions.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import numpy as np
import torch
from torch import nn

from qandc.errors import ConfigError, DataError, ModelError, QandCError

__all__ = ["Between", "Count", "Pipeline", "Scheduler", "Seed", "check_fields", "checked"]

LARGEST_INTEGER = 2**63 - 1
SHOWN = 80  # characters of a value in a message
NAMES = {bool: "True or False", str: "a string", type(None): "None"}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Between:
    """Bounds of a number, both included."""

    least: float
    most: float = math.inf


Count = Annotated[int, Between(1, 2**31 - 1)]
Seed = Annotated[int, Between(0, 2**63 - 1)]


@runtime_checkable
class Scheduler(Protocol):
    """A diffusers scheduler."""

    config: Any

    def set_timesteps(self, num_inference_steps: Any) -> Any: ...

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any: ...


@runtime_checkable
class Pipeline(Protocol):
    """A diffusers pipeline around a transformer."""

    transformer: Any
    scheduler: Any


class _Refused(Exception):  # noqa: N818 (it never leaves this module)
    """Tell what is allowed in the place of a value."""

    def __init__(self, allowed: str, error: type[QandCError] = ConfigError) -> None:
        super().__init__(allowed)
        self.allowed, self.error = allowed, error


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.layout).removeprefix('torch.')} tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, nn.Module) or not isinstance(value, int | float | str | bytes | tuple | list | dict | None):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    text = repr(value[:4] if isinstance(value, tuple | list | str | bytes) else value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _integer(value: Any, least: float, most: float) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not least <= value <= most:
        bounds = "" if least < 0 and most >= 2**31 else f" from {least} to {most}" if most < 2**31 else f" >= {least}"
        raise _Refused(f"an integer{bounds}")
    return int(value)


def _number(value: Any, least: float, most: float) -> float:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max or not least <= value <= most:
        bounds = "" if least == -math.inf else f" from {least:g} to {most:g}" if most < math.inf else f" >= {least:g}"
        raise _Refused(f"a finite number{bounds}")
    return float(value) if not isinstance(value, int) else value


def _path(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in str(value):
        raise _Refused("a path (a string or pathlib.Path)")
    return value


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_nested:
        raise _Refused("a dense torch.Tensor", DataError)
    return value


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested:
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray | list | tuple):
        raise _Refused("a NumPy array of numbers", DataError)
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        raise _Refused("a NumPy array of numbers", DataError) from None
    if array.dtype.kind not in "fiu":
        raise _Refused("a NumPy array of numbers", DataError)
    return array


def _device(value: Any) -> Any:
    try:
        if isinstance(value, str | torch.device):
            torch.device(value)
            return value
    except RuntimeError:
        pass
    raise _Refused("a device such as 'cpu' or 'cuda:0'")


def _sequence(value: Any, element: Any) -> list[Any]:
    if isinstance(value, torch.Tensor | np.ndarray):
        dense = not isinstance(value, torch.Tensor) or (value.layout == torch.strided and not value.is_nested)
        if not dense or value.ndim != 1:
            raise _Refused("a list or another sequence in one dimension")
        value = value.tolist()
    if not isinstance(value, collections.abc.Sequence) or isinstance(value, str | bytes | bytearray):
        raise _Refused("a list or another sequence")
    return [_checked(element, part) for part in value]


def _iterable(value: Any, element: Any) -> Any:
    single = isinstance(value, torch.Tensor | collections.abc.Mapping | str | bytes | nn.Module)
    if single or not isinstance(value, collections.abc.Iterable):
        raise _Refused("an iterable of such values (put a single one in a list)", DataError)
    return value


def _mapping(value: Any, key: Any, element: Any) -> Any:
    if not isinstance(value, collections.abc.Mapping):
        raise _Refused("a mapping such as a dictionary")
    return {_checked(key, name): _checked(element, part) for name, part in value.items()}


def _instance(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if kind is nn.Module:
        raise _Refused("a model (a torch.nn.Module; of a pipeline, pass pipe.transformer)", ModelError)
    if kind in (Scheduler, Pipeline):
        raise _Refused(f"a diffusers {kind.__name__.lower()}", ModelError)
    raise _Refused(NAMES.get(kind) or f"a {kind.__module__.partition('.')[0]}.{kind.__qualname__}")


PLAIN: dict[Any, Callable[[Any], Any]] = {
    torch.Tensor: _tensor,
    np.ndarray: _array,
    torch.device: _device,
    Path: _path,
    int: lambda value: _integer(value, -LARGEST_INTEGER, LARGEST_INTEGER),
    float: lambda value: _number(value, -math.inf, math.inf),
}


def _checked(hint: Any, value: Any) -> Any:
    """``value`` as the annotation means it: sequences as lists, NumPy's numbers as Python's."""
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, bounds = parts[0], next((part for part in parts[1:] if isinstance(part, Between)), None)
        if bounds is None:
            return _checked(kind, value)
        return (_integer if kind is int else _number)(value, bounds.least, bounds.most)
    if origin in (typing.Union, types.UnionType):
        return _one_of(parts, value)
    if isinstance(hint, TypeVar):
        return value if hint.__bound__ is None else _checked(hint.__bound__, value)
    if origin is collections.abc.Callable:
        return _instance_of_callable(value)
    if origin in (collections.abc.Iterable, collections.abc.Iterator):
        return _iterable(value, parts[0])
    if origin in (collections.abc.Mapping, dict):
        return _mapping(value, *parts)
    if origin in (collections.abc.Sequence, list, tuple):
        found = _sequence(value, parts[0])
        return tuple(found) if origin is tuple else found
    if hint is None or hint is type(None):
        return _instance(type(None), value)
    if hint in PLAIN:
        return PLAIN[hint](value)
    return _instance(hint, value)


def _instance_of_callable(value: Any) -> Any:
    if not callable(value):
        raise _Refused("a function")
    return value


def _one_of(hints: tuple[Any, ...], value: Any) -> Any:
    """``value`` as the first of several annotations that takes it."""
    if value is None and type(None) in hints:
        return None
    if Path in hints or torch.device in hints:  # which take strings, and look at them
        hints = tuple(hint for hint in hints if hint is not str)
    refusals = []
    for hint in hints:
        try:
            return _checked(hint, value)
        except _Refused as refused:
            refusals.append(refused)
    raise _Refused(" or ".join(dict.fromkeys(refused.allowed for refused in refusals)), refusals[0].error)


def _check(where: str, name: str, hint: Any, value: Any) -> Any:
    try:
        return _checked(hint, value)
    except _Refused as refused:
        raise refused.error(f"{where}: {name} must be {refused.allowed}; got {_shown(value)}") from None


def checked(function: Function) -> Function:
    """Have a function's arguments checked, and converted, by its annotations each time it is called.

    Raises:
        ConfigError: a setting is of the wrong type or outside its bounds.
        ModelError: something else stands in the place of a model, scheduler or pipeline.
        DataError: something else stands in the place of a tensor, an array or batches.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = _check(function.__qualname__, name, hints()[name], value)
        return function(*bound.args, **bound.kwargs)

    return wrapper  # type: ignore[return-value]


def check_fields(settings: Any) -> None:
    """Check, and convert, the fields of a frozen dataclass by its annotations; for ``__post_init__``.

    Raises:
        ConfigError, DataError: as :func:`checked`.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        if field.init:
            value = _check(type(settings).__name__, field.name, hints[field.name], getattr(settings, field.name))
            object.__setattr__(settings, field.name, value)
