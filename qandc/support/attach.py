"""Attach to a module without forking it: for a while it is an instance of a subclass of its own class.

``__class__`` changes and nothing else: attributes, parameters and state-dict keys stay, diffusers and other tools see
the class that they know, and setting it back restores the module exactly.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch

__all__ = [
    "Attachment",
    "attach",
    "attachments",
    "class_before",
    "derived_class",
    "detach",
    "eager",
    "has_other_forward",
    "original_class",
    "paused",
]

_eager_lock = threading.Lock()
_eager_users = 0
_eager_stance = contextlib.ExitStack()


Kind = TypeVar("Kind", bound="Attachment")


class Attachment:
    """Stand for something attached to a model, an attribute of it, to code that does not know what it is.

    Attributes:
        attribute: its name.
        paused: every step is computed as if nothing were attached.
    """

    attribute: ClassVar[str]
    paused = False

    @classmethod
    def of(cls: type[Kind], model: Any) -> Kind | None:
        """Return what of this kind is attached to a model, or None."""
        return model.__dict__.get(cls.attribute)

    def reset(self) -> None:
        """Forget what was computed by the model as it was."""

    def take_back(self, model: torch.nn.Module) -> None:
        """Move weights that are kept elsewhere to where the model is."""

    def kernels_of(self, model: torch.nn.Module) -> dict[str, tuple[str, str]]:
        """Return by layer name what runs in the place of layers, and why."""
        return {}


def attachments(model: torch.nn.Module) -> list[Attachment]:
    """List what is attached to a model, or to the model inside ``torch.compile(model)``."""
    held = getattr(model, "_orig_mod", model).__dict__
    return [value for value in held.values() if isinstance(value, Attachment)]


@contextlib.contextmanager
def paused(model: torch.nn.Module) -> Iterator[None]:
    """Compute every step inside, whatever is attached, and forget all features afterwards."""
    found = attachments(model)
    for attachment in found:
        attachment.paused = True
    try:
        yield
    finally:
        for attachment in found:
            attachment.paused = False
            attachment.reset()


@functools.cache
def derived_class(mixin: Any, base: Any) -> Any:
    """Derive ``base`` with the methods of ``mixin`` first: one class for each pair, so that it can be recognised.

    A call of it, as ``type(x).from_config(...)`` makes one, gives an object of ``base``, which nothing is attached to.
    """
    # the name of the base, because diffusers writes it into saved configurations
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_qandc_lineage": (mixin, base),
    }
    found: Any = type(base.__name__, (mixin, base), names)
    found.__new__ = lambda cls, *given, **named: base(*given, **named) if cls is found else object.__new__(cls)
    return found


def attach(module: Any, mixin: Any, *attachments: Attachment, **attributes: Any) -> None:
    """Make ``module`` an instance of its class with the methods of ``mixin`` first, and give it what these need."""
    module.__dict__.update({each.attribute: each for each in attachments}, **attributes)
    base: Any = type(module)
    module.__class__ = derived_class(mixin, base)


def detach(parts: Sequence[tuple[Any, Any]], *names: str, error: type[Exception]) -> None:
    """Undo :func:`attach` of mixins on modules, pairs of which are given, and of attributes; of all or of none.

    Raises:
        error: another tool has wrapped a module since.
    """
    for module, mixin in parts:
        if has_other_forward(module) or class_before(module, mixin) is None:
            raise error(
                f"this {type(module).__name__} was wrapped since (by accelerate's offload hooks, or a cache, for "
                "example); undo that first"
            )
    for module, mixin in parts:
        module.__class__ = class_before(module, mixin)
        for name in names:
            module.__dict__.pop(name, None)


def class_before(module: Any, mixin: Any) -> Any:
    """Return the class of ``module`` before ``mixin`` was attached; None if something else was attached last."""
    attached, base = vars(type(module)).get("_qandc_lineage", (None, None))
    return base if attached is mixin else None


def original_class(module: Any) -> Any:
    """Return the class of ``module`` before anything of ours was attached."""
    cls = type(module)
    while "_qandc_lineage" in vars(cls):
        cls = vars(cls)["_qandc_lineage"][1]
    return cls


def has_other_forward(module: Any) -> bool:
    """Tell whether ``forward`` was replaced on the instance, which would bypass that of a class.

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


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules uncompiled inside the block, so that hooks registered since they were compiled are called.

    Compiled code calls the hooks that were there when it was compiled, and no later ones. It is kept, for afterwards.
    The stance of torch's compiler belongs to the process: the last of several threads inside restores it.
    """
    global _eager_users
    with _eager_lock:
        if _eager_users == 0:
            _eager_stance.enter_context(torch.compiler.set_stance("force_eager"))
        _eager_users += 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_users -= 1
            if _eager_users == 0:
                _eager_stance.close()


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Reduce a module for ``copy`` and ``pickle`` as its original class does; derived classes have no importable name.

    What that class keeps out of its state stays out: of ``nn.Module``, code compiled for the weights of this module.
    """
    cls: Any = type(module)
    mixins: list[Any] = []
    while "_qandc_lineage" in vars(cls):
        mixin, cls = vars(cls)["_qandc_lineage"]
        mixins.append(mixin)
    # a class that another tool derived from one of ours inherits this function
    reduce: Any = object.__reduce_ex__ if cls.__reduce_ex__ is _reduce else cls.__reduce_ex__
    function, arguments, *state = reduce(module, protocol)
    call = (cls if part is type(module) else part for part in (function, *arguments))
    return _restored, (tuple(reversed(mixins)), *call), *state


def _restored(mixins: tuple[Any, ...], function: Any, *arguments: Any) -> Any:
    module = function(*arguments)
    for mixin in mixins:
        attach(module, mixin)
    return module
