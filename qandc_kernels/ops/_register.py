"""Make public ops from the definitions in the reference; choose Triton or the reference per device."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qandc_kernels.backend import backend_of
from qandc_kernels.ops import _checks

__all__ = ["launcher", "public_op", "rows_of"]

Function = TypeVar("Function", bound=Callable[..., Any])
_LIBRARY = torch.library.Library("qandc", "FRAGMENT")  # kept: its registrations end with it


def launcher(path: str) -> Callable[..., Any]:
    """Return a function of :mod:`qandc_kernels.triton`, "module.name", that is imported, as Triton is, when called."""
    module, _, name = path.partition(".")

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"qandc_kernels.triton.{module}"), name)

    return lambda *args, **kwargs: found()(*args, **kwargs)


def public_op(
    definition: Function,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    writes: tuple[str, ...] = (),
    late_check: bool = False,
) -> Function:
    """Return the public op of a definition, and make ``torch.ops.qandc.<name>``, for inference: no gradients.

    The op has the name, signature and docstring of the definition, checks its arguments, and runs ``launch`` where
    there are Triton kernels, the definition elsewhere. One whose name ends with an underscore returns its first
    argument.

    Args:
        definition: a function of :mod:`qandc_kernels.reference`.
        launch: takes all arguments by position, checked.
        fake: takes the same, and makes the results without values.
        writes: names of the arguments that are written to.
        late_check: on a GPU, check arguments only if ``launch`` raises; it has to check what it does not know yet.
    """
    name, plain = definition.__name__, definition.__wrapped__  # type: ignore[attr-defined]
    parameters = inspect.signature(plain).parameters
    in_place, first = name.endswith("_"), next(iter(parameters))
    defaults = tuple(parameter.default for parameter in parameters.values())
    schema = torch.library.infer_schema(inspect.unwrap(plain), mutates_args=writes).replace("SymInt", "int")
    if in_place:
        schema = schema.removesuffix("Tensor") + "()"

    def implementation(*given: Any) -> Any:
        run = launch if backend_of(given[0].device).name == "triton" else plain
        result = run(*given, *defaults[len(given) :])  # torch leaves out defaults at the end
        return None if in_place else result

    torch.library.define(f"qandc::{name}", schema)
    torch.library.impl(f"qandc::{name}", "default", implementation)
    torch.library.register_fake(f"qandc::{name}", lambda *given: fake(*given, *defaults[len(given) :]))
    # without this torch would mark results as differentiable and give zeros in the backward pass
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    check, op = getattr(_checks, f"check_{name}"), getattr(torch.ops.qandc, name)

    def checked_first(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        result = op(*args, **kwargs)
        return (args[0] if args else kwargs[first]) if in_place else result

    def checked_late(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(first)
        if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor) or not x.is_cuda:
            return checked_first(*args, **kwargs)
        try:
            return op(*args, **kwargs)
        except (TypeError, RuntimeError):
            check(*args, **kwargs)
            raise

    public = checked_late if late_check else checked_first
    public.__code__ = public.__code__.replace(co_name=name)  # of its own: torch.compile counts recompilations per code
    functools.update_wrapper(public, definition)
    public.__module__ = fake.__module__  # where pickle finds it
    return public  # type: ignore[return-value]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Return ``[..., K]`` as ``[M, K]``; a view where strides allow and the kernels' int32 offsets along K suffice."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x.contiguous() if x.shape[-1] * x.stride(-1) >= 2**31 else x
