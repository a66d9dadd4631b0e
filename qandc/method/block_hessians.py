"""Gather the Hessians that GPTQ needs block by block: those of all layers of a large model do not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from qandc.errors import DataError, ModelError
from qandc.models import FAMILIES, family_of
from qandc.models.family import Block, arguments_of
from qandc.quantization.layer_inputs import run_batch
from qandc.quantization.observe import hessians_of, unquantized
from qandc.support.arguments import Batches, Lazy, Model, checked

__all__ = ["BlockHessians", "block_hessians"]


class _Stop(Exception):  # noqa: N818
    """End a forward behind the block that is looked at."""


class BlockHessians(Lazy):
    """Compute the Hessians of the layers of one block when one of them is asked for, and forget those of another.

    A pass runs all batches through one block alone: blocks before it return at once what the last of them returned in
    the pass before, kept on the CPU, and the forward ends behind it. Layers outside of blocks have a pass of their own.

    Attributes:
        layers: of each pass, by name.
    """

    def __init__(self, model: Any, batches: Callable[[], Iterable[Any]], layers: dict[str, nn.Linear]) -> None:
        family = family_of(model)
        assert family is not None
        self.model, self.batches = model, batches
        self.blocks = family.blocks(model).blocks
        owners = {id(module): i for i, block in enumerate(self.blocks) for module in block.module.modules()}
        places = {name: owners.get(id(layer), -1) for name, layer in layers.items()}  # -1: outside of all blocks
        self.layers: dict[int, dict[str, nn.Linear]] = {place: {} for place in sorted(set(places.values()))}
        for name, layer in layers.items():
            self.layers[places[name]][name] = layer
        self._places = {name: place for place, group in self.layers.items() for name in group}
        self._found: tuple[int | None, dict[str, torch.Tensor]] = None, {}
        self._outputs: tuple[int, list[Any]] = -1, []  # of which block, for each batch

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._places[name]
        if self._found[0] != place:
            self._found = None, {}  # before there are others
            self._found = place, self._gather(place)
        return self._found[1][name]

    def _gather(self, place: int) -> dict[str, torch.Tensor]:
        if place < 0:
            return hessians_of(self.model, self.batches(), self.layers[place])
        last, outputs = self._outputs
        self._outputs = -1, []
        if last >= place:  # blocks are asked for in another order than theirs
            last, outputs = -1, []
        kept: list[Any] = []

        def run() -> None:
            for number, batch in enumerate(self.batches()):
                given = outputs[number] if outputs else None
                with self._alone(place, last, given, kept), contextlib.suppress(_Stop):
                    run_batch(self.model, batch)
                if len(kept) != number + 1:
                    raise DataError(f"batch {number} does not run block {place} (skip_layers?); leave it out")
                if outputs:
                    outputs[number] = None
            if not kept:
                raise DataError("the calibration set is empty; give at least one batch of model inputs")

        found = hessians_of(self.model, run, self.layers[place])
        self._outputs = place, kept
        return found

    @contextlib.contextmanager
    def _alone(self, place: int, last: int, output: Any, kept: list[Any]) -> Iterator[None]:
        """Have blocks up to ``last`` return at once, that one ``output``; keep what ``place`` returns and stop."""
        changed = [*self.blocks[: last + 1], self.blocks[place]]
        before = [block.module.__dict__.get("forward") for block in changed]
        for i, block in enumerate(changed[:-1]):
            block.module.forward = _returning(block, output if i == last else None)
        module = self.blocks[place].module
        forward = module.forward

        def look(*args: Any, **kwargs: Any) -> None:
            kept.append(tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), forward(*args, **kwargs)))
            raise _Stop

        module.forward = look
        try:
            yield
        finally:
            for block, own in zip(changed, before, strict=True):
                del block.module.forward
                if own is not None:
                    block.module.forward = own


def _returning(block: Block, output: Any) -> Callable[..., Any]:
    """Make a forward that returns what the block has returned before; without it, what it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = arguments_of(block.module, args, kwargs)
        stream = block.stream(call)
        if output is None:
            return block.stack.returned(call, stream)
        return tree_map_only(torch.Tensor, lambda x: x.to(stream.device), output)

    return forward


@checked
def block_hessians(model: Model, batches: Batches, skip_patterns: Iterable[str] | None = None) -> Lazy:
    """Give the same Hessians as :func:`qandc.input_hessians`, of one block at a time, to :func:`qandc.quantize_model`.

    ``quantize_model(model, w_bits=4, hessians=block_hessians(model, partial(pool.batches, chosen)))``.

    Those of all layers of FLUX.1 take 65 GB, those of a block 1.4 GB at most. Beside them the outputs of one block for
    all batches are kept on the CPU: 28 MB for a picture of 1024 x 1024 pixels in bfloat16. All batches run once through
    each block, and through what comes before the blocks as often as there are blocks.

    Args:
        model: of a family that :func:`qandc.apply_cache` knows; not quantized yet.
        batches: a list, or a function that returns batches, the same each time.
        skip_patterns: as for :func:`qandc.quantize_model`.

    Returns:
        Layer name to ``[K, K] float32``, computed when it is asked for.

    Raises:
        ModelError: a model of no family, or there is no linear layer to quantize.
        DataError: the batches can be seen once only; when Hessians are asked for, as :func:`qandc.input_hessians`, or
            a batch leaves a block out.
    """
    model = getattr(model, "_orig_mod", model)
    if family_of(model) is None:
        raise ModelError(
            f"blocks are known of diffusers' {', '.join(FAMILIES)}; got {type(model).__name__} (input_hessians takes "
            "any model)"
        )
    if isinstance(batches, Iterator):
        raise DataError("batches can be seen once only; give a list, or a function that returns them")
    again: Any = batches if not isinstance(batches, Iterable) else lambda: batches
    return BlockHessians(model, again, unquantized(model, skip_patterns, "gather Hessians"))
