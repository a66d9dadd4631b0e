"""Run layers that are given one tensor, as q, k and v are, as one quantization and one product.

Which layers these are nobody is told: layers that were called in a row with the same tensor form a group. When the
first of a group is called again it multiplies with the weights of all, and the others find their outputs waiting. A
guess that turns out wrong costs a product that nobody asks for, ends the group, and is made less readily each time.

The weights of a group become parts of one tensor, row by row, so that one product can read them: no memory more, and
none that outlives the layers, which alone hold it. Where a layer moves away (``.to``, offloading) each runs on its own
until the weights have been left in place for a while.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Membership", "Placing", "put_side_by_side", "settle", "shared_output", "shared_output_to_compile"]

Tensor = torch.Tensor
MaybeTensor = torch.Tensor | None

WEIGHTS = ("qweight", "weight_scale", "weight_sum")  # and bias: parts of one tensor
RANGES = ("act_scale", "act_zero_point", "smoothing")  # what must be equal: how the input is quantized
LARGEST = 8  # layers of a group: their outputs are in memory together
WORTH_IT = 8  # products that pay for putting the weights side by side
_packing = threading.Lock()
_latest = threading.local()  # of each thread: the layer called last, and what it was given
# memory that weights were in, until the next call: another thread may be about to read it
_left_behind: list[Tensor] = []


class _Given(NamedTuple):
    """Hold an input, recognised as long as it lives and is not written to."""

    tensor: weakref.ref[Tensor]
    version: int | None  # inference tensors have none

    def is_(self, x: Tensor, version: int | None) -> bool:
        return self.tensor() is x and self.version == version


class _Waiting(NamedTuple):
    """Hold outputs that the first layer of a group has computed for the others."""

    given: _Given
    dtype: torch.dtype | None
    outputs: dict[Membership, Tensor]


class Membership:
    """Tell a layer to which group it belongs; copies and pickles of the layer begin without one.

    Attributes:
        patience: of the groups that it is the first of (:class:`_Group`).
        compiled: what compiled code runs for the group, and the place of the layer in it; None where it runs alone.
    """

    __slots__ = ("compiled", "group", "patience", "place")

    def __init__(self) -> None:
        self.group: _Group | None = None
        self.patience = 1
        self.compiled: _Compiled | None = None
        self.place = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Membership, ()

    def forget_weights(self) -> None:
        """Let go of the weights of the layer, which are about to move or be replaced."""
        if self.group is not None:
            self.group.restart()

    def forget_compiled(self) -> None:
        """Have compiled code run the layer alone, whose tensors are being replaced or filled anew."""
        if self.group is not None:
            self.group.forget_compiled()


def shared_output(layer: Any, x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Return the output of ``layer`` for ``x`` in ``dtype``, a part of a product shared with others, or None.

    None means: compute it alone. Called once for each forward of a layer, as it learns from the order of the calls.
    """
    if type(x) is not Tensor:
        return None
    version = None if x.is_inference() else x._version
    membership = layer.membership
    latest = getattr(_latest, "call", None)
    before = latest[0]() if latest is not None and latest[1].is_(x, version) else None
    given: _Given = latest[1] if latest is not None and before is not None else _Given(weakref.ref(x), version)
    _latest.call = weakref.ref(layer), given
    group = membership.group
    if group is None:
        if before is not None and before is not layer:
            _join(before, layer)
        return None
    _left_behind.clear()
    layers = group.layers  # other threads may change it meanwhile
    if layers[0]() is layer:
        output: Tensor | None = group.lead(layers, x, given, dtype)
        return output
    return group.follow(layer, x, version, dtype, before)


class _Compiled:
    """Hold what compiled code reads to run the layers of a group as one product.

    Attributes:
        wholes: weights, scales, sums and biases of all layers.
        ends: of each layer's columns.
        kept: what the layer called last was given and the product of all, while others have yet to ask for it.
    """

    def __init__(self, wholes: Sequence[MaybeTensor], sizes: Sequence[int]) -> None:
        self.weight, self.weight_scale, self.weight_sum, self.bias = wholes
        self.ends = tuple(itertools.accumulate(sizes))
        self.kept: tuple[Tensor, Tensor] | None = None


def shared_output_to_compile(layer: Any, x: Tensor) -> Tensor | None:
    """Return what :func:`shared_output` does, in code that a compiler traces."""
    compiled, place = layer.membership.compiled, layer.membership.place
    if compiled is None:
        return None
    kept = compiled.kept
    if place == 0:
        product = layer.product_to_compile(
            x, compiled.weight, compiled.weight_scale, compiled.weight_sum, compiled.bias
        )
    elif kept is not None and kept[0] is x:
        product = kept[1]
    else:
        return None
    compiled.kept = (x, product) if place < len(compiled.ends) - 1 else None
    end: int = compiled.ends[place]
    output: Tensor = product[..., end - layer.out_features : end]
    return output


def settle(layers: Sequence[Any]) -> None:
    """Put the weights of groups side by side for compiled code to read, now that ranges have been set."""
    for group in dict.fromkeys(layer.membership.group for layer in layers):
        if group is not None:
            group.settle()


def _join(before: Any, layer: Any) -> None:
    """Make ``layer`` the last of the group of ``before``, which was given the same tensor just now."""
    alike = ("in_features", "w_bits", "a_bits")
    if any(getattr(before, name) != getattr(layer, name) for name in alike) or layer.a_bits > 8:
        return
    group = before.membership.group
    if group is None:
        group = _Group(before)
    elif group.layers[-1]() is not before or len(group.layers) == LARGEST:
        return
    group.add(layer)


class Placing:
    """Decide when the weights of layers are put side by side, so that what moves them all the time is left alone.

    Attributes:
        streak: how often in a row the layers could have run as one since anything changed; counted by others.
        patience: the streak after which they do; doubles each time that was no use.
        served: products since the weights were put side by side.
        placed: where the weights then were, or None.
    """

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
        self.streak = self.served = 0
        self.placed: _Placed | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Placing, ()

    def restart(self, streak: int = 0) -> None:
        """Forget where weights were, and wait until the layers have been called together again."""
        self.placed, self.streak = None, streak

    def no_use(self) -> None:
        """Double the patience before weights are put side by side again, after an attempt that did not pay."""
        self.patience, self.streak = self.patience * 2, 0

    def ready(self, layers: Sequence[Any]) -> Sequence[MaybeTensor] | None:
        """Return the operands of the product of all layers; where weights have moved, they are put side by side."""
        if self.streak < self.patience:
            return None
        placed = self.placed
        if placed is not None:
            operands = placed.operands(layers)
            self.served += 1
            if operands is None:
                if self.served < WORTH_IT:
                    self.no_use()
                self.restart()
            elif self.served == WORTH_IT:  # nothing moves them all the time: worth keeping
                placed.wholes = operands
            return operands
        if _capturing(layers[0].qweight) or not _packing.acquire(blocking=False):
            return None
        try:
            operands = self.place(layers)
        finally:
            _packing.release()
        if operands is None:
            self.no_use()
        return operands

    def place(self, layers: Sequence[Any]) -> list[MaybeTensor] | None:
        """Put the weights of layers side by side and return them; None where one product can't serve the layers."""
        operands = put_side_by_side(layers)
        self.served, self.placed = 0, None if operands is None else _Placed(layers, operands)
        return operands


class _Group(Placing):
    """Hold layers that were given the same tensors, the first called first.

    Attributes:
        layers: weak references, so that a layer keeps no other in memory.
        reached: the last layer that the latest tensor was seen to be given to, by its place.
    """

    def __init__(self, first: Any) -> None:
        super().__init__(first.membership.patience)
        self.layers: tuple[weakref.ref[Any], ...] = (weakref.ref(first),)
        first.membership.group = self
        self.reached = 0
        self.waiting: dict[int, _Waiting] = {}  # by thread
        self.stays = False  # whether an input that counts no writes was seen to stay what it was
        self.probe: tuple[_Given, Tensor] | None = None

    def add(self, layer: Any) -> None:
        """Append a layer that has just been given what the others were."""
        self.forget_compiled()
        layer.membership.group = self
        self.layers = (*self.layers, weakref.ref(layer))
        self.reached = len(self.layers) - 1
        self.restart(streak=1)

    def keep(self, number: int) -> None:
        """Let all but the first ``number`` layers go; one alone is no group."""
        self.forget_compiled()
        kept, gone = self.layers[: max(number, 1)], self.layers[max(number, 1) :]
        for ref in gone if len(kept) > 1 else self.layers:
            layer = ref()
            if layer is not None and layer.membership.group is self:
                layer.membership.group = None
        self.layers = kept
        self.reached = len(kept) - 1
        self.restart()

    def restart(self, streak: int = 0) -> None:
        super().restart(streak)
        self.probe, self.stays = None, False
        self.forget_compiled()

    def forget_compiled(self) -> None:
        for ref in self.layers:
            layer = ref()
            if layer is not None:
                layer.membership.compiled = None

    def settle(self) -> None:
        """Have compiled code run the layers as one, if they were called together when they were called last."""
        layers: list[Any] = [ref() for ref in self.layers]
        if self.streak < self.patience or None in layers or _capturing(layers[0].qweight):
            return
        with _packing:
            wholes = self.place(layers)
        if wholes is not None:
            compiled = _Compiled(wholes, [layer.out_features for layer in layers])
            for place, layer in enumerate(layers):
                layer.membership.compiled, layer.membership.place = compiled, place

    def no_use(self) -> None:
        super().no_use()
        first = self.layers[0]()
        if first is not None:
            first.membership.patience = self.patience

    def lead(
        self, members: tuple[weakref.ref[Any], ...], x: Tensor, given: _Given, dtype: torch.dtype | None
    ) -> Tensor | None:
        """Compute the outputs of all layers for ``x`` if they are ready, and return that of the first."""
        thread = threading.get_ident()
        left = self.waiting.pop(thread, None)
        if left is not None:
            self._wasted(left)
        if self.streak < self.patience:
            if self.reached < len(members) - 1:  # the last round ended before it reached all
                self.keep(self.reached + 1)
            self.reached = 0
            return None
        layers: list[Any] = [member() for member in members]
        if len(layers) < 2 or None in layers:
            self.keep(1)
            return None
        if given.version is None and not self.stays:
            if self.probe is None and not _capturing(x):
                self.probe = given, x.clone()
            self.reached = 0
            return None
        operands = self.ready(layers)
        if operands is None:
            self.reached = 0
            return None
        out = layers[0].multiply(x, operands, dtype)
        # no views to autograd: what is done to them later does not depend on how they were made
        first, *others = torch.unsafe_split_with_sizes(out, [layer.out_features for layer in layers], -1)
        outputs = {layer.membership: output for layer, output in zip(layers[1:], others, strict=True)}
        # what waits is gone when the input is: nobody can ask for it any more
        owner = weakref.ref(self)

        def drop(gone: weakref.ref[Tensor]) -> None:
            group = owner()
            left = group.waiting.get(thread) if group is not None else None
            if group is not None and left is not None and left.given.tensor is gone:
                del group.waiting[thread]
                group._wasted(left)

        self.waiting[thread] = _Waiting(_Given(weakref.ref(x, drop), given.version), dtype, outputs)
        return first

    def follow(
        self, layer: Any, x: Tensor, version: int | None, dtype: torch.dtype | None, before: Any
    ) -> Tensor | None:
        """Return the output that the first layer has computed for ``layer``, another member; None if there is none."""
        thread = threading.get_ident()
        waiting = self.waiting.get(thread)
        if waiting is not None:
            if waiting.dtype != dtype or not waiting.given.is_(x, version):
                return None
            output = waiting.outputs.pop(layer.membership, None)
            if not waiting.outputs:
                self.waiting.pop(thread, None)
            return output
        members = [member() for member in self.layers]
        place = members.index(layer) if layer in members else 0
        if before is None or place == 0 or members[place - 1] is not before:
            self.keep(max(place, 1))
            return None
        self.reached = place
        if place == len(members) - 1:
            self.streak += 1
            if self.probe is not None and self.probe[0].is_(x, version) and not _capturing(x):
                self.stays = torch.equal(x, self.probe[1])
                if not self.stays:
                    self.no_use()
            self.probe = None
        return None

    def _wasted(self, left: _Waiting) -> None:
        """Shrink the group and wait longer, after outputs of a shared product that no layer asked for."""
        self.no_use()
        asked = [member() for member in self.layers]
        self.keep(next((i for i, layer in enumerate(asked) if layer is None or layer.membership in left.outputs), 1))


class _Placed:
    """Hold weights that lie side by side and inputs that are quantized alike, as long as nobody has changed that.

    Attributes:
        wholes: the weights as one tensor each; None as long as it may be that another tool moves them now and then,
            whom a reference would keep from freeing memory.
    """

    def __init__(self, layers: Sequence[Any], wholes: Sequence[MaybeTensor]) -> None:
        self.addresses = _addresses(layers)
        self.ranges = _ranges(layers)
        self.versions = _versions(self.ranges)
        self.forms = [None if whole is None else (whole.shape, whole.stride()) for whole in wholes]
        self.wholes: Sequence[MaybeTensor] | None = None

    def operands(self, layers: Sequence[Any]) -> Sequence[MaybeTensor] | None:
        """Return weights, scales, sums and biases as one tensor each; None if anything has changed."""
        ranges = _ranges(layers)
        if not all(map(operator.is_, ranges, self.ranges)) or _versions(ranges) != self.versions:
            return None
        if _addresses(layers) != self.addresses:
            return None
        if self.wholes is not None:
            return self.wholes
        held = layers[0]._buffers
        tensors = (held["qweight"], held["weight_scale"], held["weight_sum"], layers[0]._parameters["bias"])
        try:
            return [
                None if form is None else tensor.as_strided(*form)
                for tensor, form in zip(tensors, self.forms, strict=True)
            ]
        except RuntimeError:  # at the same addresses, but in storages of their own
            return None


def _ranges(layers: Sequence[Any]) -> list[MaybeTensor]:
    found: list[MaybeTensor] = []
    for layer in layers:
        held = layer._buffers
        found += (held["act_scale"], held["act_zero_point"], held["smoothing"])
    return found


def _versions(tensors: Sequence[MaybeTensor]) -> list[int]:
    return [t._version for t in tensors if t is not None and not t.is_inference()]


def _addresses(layers: Sequence[Any]) -> list[int]:
    found: list[int] = []
    for layer in layers:
        held, bias = layer._buffers, layer._parameters["bias"]
        found += (held["qweight"].data_ptr(), held["weight_scale"].data_ptr(), held["weight_sum"].data_ptr())
        found.append(0 if bias is None else bias.data_ptr())
    return found


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _columns(layers: Sequence[Any]) -> list[list[MaybeTensor]]:
    """List the tensors of each kind, layer by layer."""
    columns: list[list[MaybeTensor]] = [[layer._buffers[name] for layer in layers] for name in WEIGHTS]
    return [*columns, [layer._parameters["bias"] for layer in layers]]


def _joined(tensors: Sequence[MaybeTensor]) -> Any:
    """Return tensors that follow each other in one storage as one; None if there are none, False if they do not."""
    first = tensors[0]
    if first is None:
        return None
    address, rows = first.data_ptr(), 0
    for t in tensors:
        assert t is not None
        if t.data_ptr() != address:
            return False
        address += t.nbytes
        rows += len(t)
    try:
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    except RuntimeError:  # neighbours by chance, each with a storage of its own
        return False


def put_side_by_side(layers: Sequence[Any]) -> list[MaybeTensor] | None:
    """Make the weights of layers parts of one tensor each, and return these; None where one product can't serve them.

    Values stay what they are, and tensors the same objects, as tools that offload know them. Waits for the device.
    """
    columns = _columns(layers)
    ranges = [[layer._buffers[name] for layer in layers] for name in RANGES]
    if not all(map(_alike, (*columns, *ranges))) or not all(map(_equal, ranges)):
        return None
    wholes = []
    for column in columns:
        whole = _joined(column)
        wholes.append(_join_memory([t for t in column if t is not None]) if whole is False else whole)
    return wholes


def _join_memory(tensors: Sequence[Tensor]) -> Tensor:
    """Copy tensors into one, and make them its rows."""
    with torch.inference_mode(tensors[0].is_inference()), torch.no_grad():
        whole = torch.cat([t.detach() for t in tensors])
        if whole.is_cuda:  # all that reads the old memory, on any stream, ends before it can be given up
            torch.cuda.synchronize(whole.device)
        for t, rows in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
            _left_behind.append(t.detach())
            t.data = rows
    return whole


def _alike(tensors: Sequence[MaybeTensor]) -> bool:
    """Tell whether tensors differ in their number of rows at most, or are all None."""
    first = tensors[0]
    if first is None:
        return all(t is None for t in tensors)
    return not first.is_meta and all(
        t is not None
        and (t.dtype, t.device, t.shape[1:], t.is_inference())
        == (first.dtype, first.device, first.shape[1:], first.is_inference())
        and t.is_contiguous()
        for t in tensors
    )


def _equal(tensors: Sequence[MaybeTensor]) -> bool:
    first = tensors[0]
    return first is None or all(t is first or (t is not None and torch.equal(t, first)) for t in tensors)
