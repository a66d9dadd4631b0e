"""Check what a public function was given against its annotations, before any work.

Annotations say what kind of value is meant, :class:`Between` within ``Annotated`` from where to where; another
annotation within ``Annotated`` counts instead of the first. What several arguments must have in common, and names that
must be known, are left to the functions.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import numpy as np
import torch
from torch import nn

from qandc.errors import ConfigError, DataError, DeviceError, ModelError, QandCError

__all__ = [
    "Batches",
    "Between",
    "Count",
    "Integers",
    "Lazy",
    "Model",
    "Pipeline",
    "Scheduler",
    "Seed",
    "Seeds",
    "Share",
    "Steps",
    "check_fields",
    "check_value",
    "checked",
    "regular_expression",
]

LARGEST_INTEGER = 2**63 - 1
SHOWN = 80  # characters of a value in a message
LONGEST_PATH, LONGEST_NAME = 4000, 240  # bytes; file systems allow 4095 and 255, and some names get an ending
LONGEST = 1 << 20  # elements of a sequence: each is looked at
SHOWN_WHOLE = (int, float, str, bytes, tuple, list, dict, type(None), Path)
NAMES = {str: "a string", type(None): "None"}

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Between:
    """Hold the bounds of a number, both included."""

    least: float
    most: float = math.inf


Count = Annotated[int, Between(1, 2**31 - 1)]
Seed = Annotated[int, Between(0, 2**63 - 1)]
Batches = Iterable[Any] | Callable[[], Any]  # inputs of a model, or a function that runs it
Model = Annotated[Any, nn.Module]  # whose attributes a type checker does not know
Steps = Annotated[int, Between(1, 10_000)]
Share = Annotated[float, Between(0, 1)]
Integers = Annotated[Sequence[int] | torch.Tensor | np.ndarray, Sequence[int]]
Seeds = Annotated[Sequence[int] | torch.Tensor | np.ndarray, Sequence[Seed]]


class Lazy(Mapping[str, torch.Tensor]):
    """Compute tensors by name when they are asked for: not all are in memory at once, and none is checked ahead."""


@runtime_checkable
class Scheduler(Protocol):
    """Stand for a diffusers scheduler."""

    config: Any

    def set_timesteps(self, num_inference_steps: Any) -> Any: ...

    def step(self, model_output: Any, timestep: Any, sample: Any) -> Any: ...


@runtime_checkable
class Pipeline(Protocol):
    """Stand for a diffusers pipeline around a transformer."""

    transformer: Any
    scheduler: Any


class _Refused(Exception):  # noqa: N818 (it never leaves this module)
    """Tell what is allowed in the place of a value."""

    def __init__(self, allowed: str, error: type[QandCError] = ConfigError) -> None:
        super().__init__(allowed)
        self.allowed, self.error = allowed, error


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        odd = nn.parameter.is_lazy(value) or value.is_nested  # without a shape
        shape = "" if odd else f" {tuple(value.shape)}"
        return f"a {str(value.layout).removeprefix('torch.')} {type(value).__name__}{shape} of {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, nn.Module) or not isinstance(value, SHOWN_WHOLE):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        text = repr(value[:SHOWN] if isinstance(value, tuple | list | str | bytes) else value)
    except ValueError:  # an integer of too many digits
        return f"a {type(value).__qualname__} too long to print"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _bounds(least: float, most: float) -> str:
    lower = f" >= {least:g}" if least > -LARGEST_INTEGER else ""
    return f"{lower} (at most {most})" if most < 2**31 - 1 else lower


def _integer(value: Any, least: float, most: float) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise _Refused(f"an integer{_bounds(least, most)}")
    return int(value)


def _number(value: Any, least: float, most: float) -> float:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max or not least <= value <= most:
        raise _Refused(f"a finite number{_bounds(least, most)}")
    return float(value) if not isinstance(value, int) else value


def _path(value: Any) -> Any:
    try:
        name = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        name = b""
    if isinstance(value, bytes) or not name or b"\0" in name or len(name) > LONGEST_PATH:
        raise _Refused("a path (a string or pathlib.Path)")
    if any(len(part) > LONGEST_NAME for part in name.split(os.sep.encode())):
        raise _Refused(f"a path whose names have at most {LONGEST_NAME} bytes")
    return value


def _is_dense(value: torch.Tensor) -> bool:
    """Tell whether a tensor holds real numbers that can be read as they are."""
    if nn.parameter.is_lazy(value) or value.layout != torch.strided:
        return False
    odd = value.is_nested or value.is_quantized or value.is_meta or value.is_complex()
    return not odd and value.dtype != torch.bool


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not _is_dense(value):
        raise _Refused("a dense torch.Tensor that holds numbers", DataError)
    return value


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor) and _is_dense(value):
        value = (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    if not isinstance(value, np.ndarray | list | tuple):
        raise _Refused("a NumPy array of numbers", DataError)
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        raise _Refused("a NumPy array of numbers", DataError) from None
    if array.dtype.kind not in "fiu":
        raise _Refused("a NumPy array of numbers", DataError)
    return array


def _device(value: Any) -> torch.device:
    try:
        if not isinstance(value, str | torch.device):
            raise RuntimeError
        device = torch.device(value)
    except RuntimeError:
        raise _Refused("a device such as 'cpu' or 'cuda:0'") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that is built without CUDA
        reason = str(error).partition("\n")[0][:SHOWN]
        raise _Refused(f"a device that is here, such as 'cpu' ({reason})", DeviceError) from None
    return device


def _sequence(value: Any, element: Any) -> list[Any]:
    if isinstance(value, torch.Tensor | np.ndarray):
        dense = _is_dense(value) or value.dtype == torch.bool if isinstance(value, torch.Tensor) else True
        if not dense or value.ndim != 1 or len(value) > LONGEST:
            raise _Refused(f"a list or another sequence in one dimension, of at most {LONGEST} elements")
        value = value.tolist()
    if not isinstance(value, collections.abc.Sequence) or isinstance(value, str | bytes | bytearray):
        raise _Refused("a list or another sequence")
    return _elements(value, element)


def _scalar(part: Any) -> Any:
    """Return an element of a list as a Python number where it is a tensor or array without dimension."""
    if isinstance(part, torch.Tensor):
        return part.item() if _is_dense(part) and part.ndim == 0 else part
    return part.item() if isinstance(part, np.ndarray) and part.ndim == 0 else part


def _iterable(value: Any, element: Any) -> Any:
    single = isinstance(value, torch.Tensor | collections.abc.Mapping | str | bytes | bytearray | nn.Module)
    if single or not isinstance(value, collections.abc.Iterable) or getattr(value, "shape", None) == ():
        raise _Refused("an iterable of such values (if it is one, put it in a list)", DataError)
    # batches are made, and looked at, one by one
    return _elements(value, element) if element is str else value


def _elements(values: collections.abc.Iterable[Any], element: Any) -> list[Any]:
    found = []
    for part in itertools.islice(values, LONGEST + 1):
        try:
            found.append(_checked(element, _scalar(part)))
        except _Refused as refused:
            raise _Refused(f"a sequence whose every element is {refused.allowed} ({_shown(part)} is not)") from None
    if len(found) > LONGEST:
        raise _Refused(f"a sequence of at most {LONGEST} elements")
    return found


def _mapping(value: Any, key: Any, element: Any) -> Any:
    if isinstance(value, Lazy):
        return value
    if not isinstance(value, collections.abc.Mapping):
        raise _Refused("a mapping such as a dictionary")
    return {_checked(key, name): _checked(element, part) for name, part in value.items()}


def _instance(kind: Any, value: Any) -> Any:
    if isinstance(value, kind) and not isinstance(value, type):
        return value
    if kind is nn.Module:
        raise _Refused("a model (a torch.nn.Module; of a pipeline, pass pipe.transformer)", ModelError)
    if kind in (Scheduler, Pipeline):
        raise _Refused(f"a diffusers {kind.__name__.lower()}", ModelError)
    if issubclass(kind, nn.Module):
        raise _Refused(f"a torch.nn.{kind.__qualname__}", ModelError)
    raise _Refused(NAMES.get(kind) or f"a {kind.__module__.partition('.')[0]}.{kind.__qualname__}")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _Refused("True or False")
    return bool(value)


PLAIN: dict[Any, Callable[[Any], Any]] = {
    torch.Tensor: _tensor,
    np.ndarray: _array,
    torch.device: _device,
    Path: _path,
    bool: _flag,
    int: lambda value: _integer(value, -LARGEST_INTEGER, LARGEST_INTEGER),
    float: lambda value: _number(value, -math.inf, math.inf),
}


def _checked(hint: Any, value: Any) -> Any:
    """Return ``value`` as the annotation means it: sequences as lists, NumPy's numbers as Python's."""
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, instead = parts
        if not isinstance(instead, Between):
            return _checked(instead, value)
        return (_integer if kind is int else _number)(value, instead.least, instead.most)
    if origin in (typing.Union, types.UnionType):
        return _one_of(parts, value)
    if isinstance(hint, TypeVar):
        return value if hint.__bound__ is None else _checked(hint.__bound__, value)
    if origin is collections.abc.Callable:
        return _function(value, without_arguments=parts[0] == [])
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


def _function(value: Any, without_arguments: bool) -> Any:
    if not callable(value) or isinstance(value, nn.Module):
        raise _Refused("a function")
    if without_arguments:
        try:
            inspect.signature(value).bind()
        except TypeError:
            raise _Refused("a function without arguments") from None
        except ValueError:  # a built-in one that does not tell
            pass
    return value


def _one_of(hints: tuple[Any, ...], value: Any) -> Any:
    """Return ``value`` as the first of several annotations that takes it."""
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


def check_value(name: str, hint: Any, value: Any, where: str = "") -> Any:
    """Return a value as its annotation means it; an error calls it ``name``, and tells ``where`` it was given.

    Raises:
        ConfigError, ModelError, DataError: as :func:`checked`.
    """
    try:
        return _checked(hint, value)
    except _Refused as refused:
        raise refused.error(f"{name} is {_shown(value)}; give {refused.allowed}{where and f' ({where})'}") from None


def checked(function: Function) -> Function:
    """Have a function's arguments checked, and converted, by its annotations each time it is called.

    Raises:
        ConfigError: a setting is of the wrong type or outside its bounds.
        ModelError: something else stands in the place of a model, scheduler or pipeline.
        DataError: something else stands in the place of a tensor, an array or batches.
    """
    signature, where = inspect.signature(function), function.__qualname__.removesuffix(".__init__")

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints():
                bound.arguments[name] = check_value(name, hints()[name], value, where)
        return function(*bound.args, **bound.kwargs)

    return wrapper  # type: ignore[return-value]


def regular_expression(text: str, what: str) -> re.Pattern[str]:
    """Compile a regular expression that a user gave.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{what} is no regular expression: {error}") from error


def check_fields(settings: Any) -> None:
    """Check, and convert, the fields of a frozen dataclass by its annotations; for ``__post_init__``.

    Raises:
        ConfigError, DataError: as :func:`checked`.
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        if field.init:
            value = getattr(settings, field.name)
            value = check_value(field.name, hints[field.name], value, type(settings).__name__)
            object.__setattr__(settings, field.name, value)
