"""Undo what was done to a tree of modules: replaced layers, classes, attributes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from qandc.errors import ModelError
from qandc.support.attach import has_other_forward

__all__ = ["Undo"]

MISSING = object()


class _Seen(NamedTuple):
    """Hold what a module was at a moment."""

    module: nn.Module
    kind: type
    attributes: dict[str, Any]
    children: dict[str, nn.Module | None]


def _look(modules: Any) -> list[_Seen]:
    return [_Seen(module, type(module), dict(module.__dict__), dict(module._modules)) for module in modules]


class Undo:
    """Hold what a model is, and later what was changed since, to undo these changes and no others.

    Weights are not copied: what is written into a tensor stays.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = _look(model.modules())
        self.after: list[_Seen] | None = None
        self.wrapped = self._wrapped()

    def _wrapped(self) -> set[int]:
        return {id(module) for module in self.model.modules() if has_other_forward(module)}

    def settle(self) -> None:
        """Note what was changed: what changes from here on is left alone, or refused."""
        self.after = _look(seen.module for seen in self.before)

    def check(self) -> None:
        """Refuse to undo a model that was changed again since :meth:`settle`.

        Raises:
            ModelError: layers were replaced, or forwards wrapped.
        """
        changed = self._wrapped() != self.wrapped
        for old, new in zip(self.before, self.after or (), strict=True):
            changed |= type(old.module) not in (old.kind, new.kind) or dict(old.module._modules) != new.children
        if changed:
            raise ModelError(
                f"this {type(self.model).__name__} was changed since (by an adapter, graph, fuse_qkv_projections or "
                "offloading, for example); undo that first"
            )

    def undo(self) -> None:
        """Make the model again what it was."""
        after = self.after or _look(seen.module for seen in self.before)
        for old, new in zip(self.before, after, strict=True):
            module = old.module
            module.__class__ = old.kind
            for name in old.attributes.keys() | new.attributes.keys():
                value = old.attributes.get(name, MISSING)
                if value is MISSING:
                    module.__dict__.pop(name, None)
                elif value is not new.attributes.get(name, MISSING):
                    module.__dict__[name] = value
            if old.children != new.children:
                module._modules.clear()
                module._modules.update(old.children)
        self.after = None  # which held what is gone now
