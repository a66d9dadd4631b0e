"""Find linear layers that must stay ``nn.Linear``: those whose weight is read past their forward, PEFT's adapters.

Code that computes with ``self.proj.weight`` instead of calling ``self.proj`` would dequantize a quantized layer in
every forward and never run it. Such code is found in the source of the modules that own the layers.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from qandc.support.attach import original_class

__all__ = ["kept_layers", "tuner_layers"]

logger = logging.getLogger(__name__)

LOOKS = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_meta", "is_cuda", "requires_grad", "grad"}


def kept_layers(model: nn.Module) -> dict[str, str]:
    """Map the name of each ``nn.Linear`` that is not to be replaced to the reason."""
    kept = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for path in sorted(_weights_read_by(module)):
            if original_class(_submodule(module, path)) is nn.Linear:
                kept[prefix + path] = f"{type(module).__name__} reads its weight past its forward"
    for name, tuner in tuner_layers(model):
        for path, module in tuner.named_modules():
            if original_class(module) is nn.Linear and path.split(".")[0] != "base_layer":
                kept[f"{name}.{path}"] = "an adapter of PEFT"
    return kept


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of PEFT's layers, which hold adapters beside the layer that was there, ``base_layer``."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "unmerge"):
            yield name, module


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _weights_read_by(module: nn.Module) -> set[str]:
    owner: Any = type(module)
    processor: Any = type(module.__dict__.get("processor"))  # of diffusers' attentions: processor(attention, ...)
    return _weights_read(owner, "forward", 0) | _weights_read(processor, "__call__", 1)


@functools.cache
def _weights_read(owner: type, entry: str, argument: int) -> set[str]:
    """Find the x of each ``self.x.weight`` that a method, or one that it calls on self, computes with.

    Args:
        owner: the class.
        entry: its method.
        argument: the position of ``self`` among the parameters; 1 where a processor is given its attention.
    """
    found: set[str] = set()
    waiting, seen = [entry], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in owner.__mro__:
            tree = _source_of(base.__dict__.get(name)) if base is not nn.Module else None
            parameters = [] if tree is None else tree.args.posonlyargs + tree.args.args
            if tree is None or len(parameters) <= argument:
                continue
            parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
            names = {getattr(node, "attr", getattr(node, "id", None)) for node in parents}
            for node, parent in parents.items():
                path = _path_of(node, parameters[argument].arg)
                if path is None:
                    continue
                if argument == 0 and isinstance(parent, ast.Call) and parent.func is node:
                    waiting.append(path)
                # code that asks has_torch_function leaves a tensor of a class of its own alone
                if path.endswith(".weight") and "has_torch_function" not in names and not _is_look(node, parents):
                    found.add(path.removesuffix(".weight"))
            if "super" not in names:
                break
    return found


def _source_of(function: Any) -> ast.FunctionDef | None:
    if not inspect.isfunction(function):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        logger.debug("no source of %s (%s): whether it reads weights is unknown", function, error)
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _path_of(node: ast.AST, root: str) -> str | None:
    """Return ``a.b.weight`` of ``self.a.b.weight``; an index by a number counts as a name, as in nn.Sequential."""
    names: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        else:
            break
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == root else None


def _is_look(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Tell whether nothing but dtype, shape and the like is asked of a weight."""
    parent = parents[node]
    while isinstance(parent, ast.Attribute) and parent.attr == "data":
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.Attribute):
        return parent.attr in LOOKS
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "getattr", "len", "type", "id")
    return isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
