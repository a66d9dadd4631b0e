"""Run blocks of a transformer on fused kernels, each by itself; all around them stays diffusers' own.

As with the feature cache, no model is forked: a fused block is an instance of a subclass of its own class that
overrides ``forward``. Nothing in it waits for the GPU, so that :func:`qandc.graph` can hold the whole forward.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from qandc.cache import TARGET
from qandc.errors import ModelError
from qandc.models import Family, family_of
from qandc.models.family import BlockProgram, Call, Stack, arguments_of
from qandc.models.products import SETTINGS
from qandc.support.attach import Attachment, attach, detach
from qandc.support.watch import Watch
from qandc_kernels import select_backend

__all__ = ["FusedBlocks", "attach_blocks", "detach_blocks", "fuses_blocks", "why_not_here"]

logger = logging.getLogger(__name__)

BLOCK = "_qandc_fused_block"


class FusedBlocks(Attachment):
    """Stand for the fused blocks of a transformer, and log once why some run as they are.

    Attributes:
        compile_unfused: compile these when they first run.
    """

    attribute = "_qandc_fused_blocks"

    def __init__(self) -> None:
        self.compile_unfused = False
        self._said: set[str] = set()

    def say(self, reason: str, how_many: str = "") -> None:
        """Log a reason once."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("fuse: blocks run unfused: %s%s", reason, how_many)

    def kernels_of(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for name, block, program in _blocks(model):
            why = _why_not(program, block)
            how = ("unfused", why) if why else ("fused", "in a fused block")
            found |= dict.fromkeys((f"{name}.{layer}" for layer in program.layers), how)
        return found


class _Fused:
    """Hold the program of one block for its layers as they are, or why there is none."""

    def __init__(self, owner: FusedBlocks, stack: Stack) -> None:
        self.owner, self.stack = owner, stack
        self.compiled: Callable[..., Any] | None = None
        self.drop()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Fused, (self.owner, self.stack)  # a copy of the block builds its own

    def drop(self) -> None:
        """Forget what was built; the next forward builds it again."""
        self.program: BlockProgram | None = None
        self.reason: str | None = None
        self.watch: Watch | None = None

    def find(self, block: Any, call: Call, reason: str | None) -> BlockProgram | None:
        """Return the program for a call of the block, built anew where layers have changed; None if it runs unfused.

        Args:
            reason: why no block can run fused now, or None.
        """
        kind = self.stack.fused
        assert kind is not None
        reason = reason or _unread(kind, call) or kind.why_not_call(call)
        if reason is None and torch.is_grad_enabled():
            reason = "gradients are enabled, which fused kernels do not compute; use torch.no_grad()"
        if reason is None:
            if self.watch is None or not self.watch.unchanged():
                self._build(kind, block)
            reason = self.reason
        if reason is not None:
            self.owner.say(reason)
            return None
        return self.program

    def unfused(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward that diffusers wrote for the block, compiled if the owner of the blocks says so."""
        if not self.owner.compile_unfused:
            return forward
        if self.compiled is None:
            self.compiled = torch.compile(forward)
        return self.compiled

    def _build(self, kind: type[BlockProgram], block: Any) -> None:
        self.drop()
        self.reason = _why_not(kind, block)
        if self.reason is None:
            try:  # weights prepared in inference mode could not be used outside of it
                with torch.inference_mode(False), torch.no_grad():
                    self.program = kind(block)
            except ModelError as error:
                self.reason = str(error)
        self.watch = Watch(block, SETTINGS)  # only now: building has moved some weights together


class _FusedBlock(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        fused: _Fused = getattr(self, BLOCK)
        call = arguments_of(self, args, kwargs)
        reason = why_not_here(self, call["hidden_states"].device)
        program = fused.find(self, call, reason)
        if program is None:
            forward = super().forward if reason is not None else fused.unfused(super().forward)
            return forward(*args, **kwargs)
        branches = (getattr(self, name) for name in fused.stack.branches)
        return program(call, tuple(None if part is None else part.__dict__.get(TARGET) for part in branches))

    # a program holds tensors that .to() replaces, or made of weights; those that graphs read stay with the old one
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[BLOCK] = copy.copy(getattr(self, BLOCK))
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__[BLOCK] = copy.copy(getattr(self, BLOCK))
        super()._load_from_state_dict(*args, **kwargs)


def why_not_here(model: Any, device: torch.device) -> str | None:
    """Say why no forward can run fused on this device as things are, or None."""
    backend = select_backend(device)
    if backend.name != "triton":
        return f"on {device} there are no fused kernels ({backend.reason})"
    if model.training:
        return "it is in training mode; call eval()"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on; convert the model to the dtype you want instead"
    return "there are global hooks of modules, which would not see its layers" if _has_any_global_hook() else None


def _unread(program: type[BlockProgram], call: Call) -> str | None:
    """Say which arguments of a call a program would leave out, or None; those that say nothing it may."""
    given = {name for name, value in call.items() if value is not None and not (isinstance(value, dict) and not value)}
    unread = sorted(given - {*program.arguments})
    return f"a block is called with {', '.join(unread)}, which fused ones do not read" if unread else None


def fuses_blocks(family: Family) -> bool:
    """Tell whether there are fused kernels for blocks of a family."""
    return any(stack.fused is not None for stack in family.stacks)


def _why_not(program: type[BlockProgram], block: Any) -> str | None:
    """Say why a block can't run fused, or None."""
    compiled = "it is compiled (block.compile()), and runs compiled code"
    return program.why_not(block) if block._compiled_call_impl is None else compiled


def _blocks(model: Any) -> list[tuple[str, Any, type[BlockProgram]]]:
    """List name, block and program of all blocks for which there is one."""
    family = family_of(model)
    stacks = () if family is None else family.stacks
    return [
        (f"{stack.blocks}.{i}", block, stack.fused)
        for stack in stacks
        if stack.fused is not None
        for i, block in enumerate(getattr(model, stack.blocks))
    ]


def attach_blocks(model: Any, family: Family) -> None:
    """Have the blocks of a model run fused where they can.

    Raises:
        ModelError: no block can, or another tool has replaced the forward of one.
    """
    reasons = [_why_not(program, block) for _, block, program in _blocks(model)]
    if None not in reasons:
        raise ModelError(f"no block of this transformer can run fused: {reasons[0]}")
    owner = FusedBlocks()
    for reason, count in Counter(reasons).items():
        if reason is not None:
            owner.say(reason, f" ({count} of {len(reasons)})")
    for stack in family.stacks:
        for block in getattr(model, stack.blocks) if stack.fused is not None else ():
            attach(block, _FusedBlock, **{BLOCK: _Fused(owner, stack)})
    model.__dict__[FusedBlocks.attribute] = owner


def detach_blocks(model: Any) -> None:
    """Undo :func:`attach_blocks`.

    Raises:
        ModelError: another tool has wrapped a block since.
    """
    detach([(block, _FusedBlock) for _, block, _ in _blocks(model)], BLOCK, error=ModelError)
    del model.__dict__[FusedBlocks.attribute]
