"""Attaching to a module without forking it: for a while it is an instance of a subclass of its own class.

``__class__`` changes and nothing else: attributes, parameters and state-dict keys stay, diffusers and other tools see
the class that they know, and setting it back restores the module exactly.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["class_before", "derived_class", "has_other_forward", "original_class"]


@functools.cache
def derived_class(mixin: Any, base: Any) -> Any:
    """``base`` with the methods of ``mixin`` first; one class for each pair, so that it can be recognised."""
    # the name of the base, because diffusers writes it into saved configurations
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_qandc_lineage": (mixin, base),
    }
    return type(base.__name__, (mixin, base), names)


def class_before(module: Any, mixin: Any) -> Any:
    """The class of ``module`` before ``mixin`` was attached; None where that was not the last to be attached."""
    attached, base = vars(type(module)).get("_qandc_lineage", (None, None))
    return base if attached is mixin else None


def original_class(module: Any) -> Any:
    """The class of ``module`` before anything of ours was attached."""
    cls = type(module)
    while "_qandc_lineage" in vars(cls):
        cls = vars(cls)["_qandc_lineage"][1]
    return cls


def has_other_forward(module: Any) -> bool:
    """Whether ``forward`` was replaced on the instance, which would bypass that of a class.

    accelerate leaves the module's own forward there when it takes its hooks away; that is removed.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    cls: Any = type(module)
    if getattr(forward, "__self__", None) is module and forward.__func__ is cls.forward:
        del module.__dict__["forward"]
        return False
    return True


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """For ``copy`` and ``pickle``: derived classes have no importable name."""
    cls, mixins = type(module), []
    while "_qandc_lineage" in vars(cls):
        mixin, cls = vars(cls)["_qandc_lineage"]
        mixins.append(mixin)
    return _new, (cls, *reversed(mixins)), module.__dict__.copy()


def _new(base: Any, *mixins: Any) -> Any:
    cls = functools.reduce(lambda derived, mixin: derived_class(mixin, derived), mixins, base)
    return cls.__new__(cls)
