"""Keep quantized what ``fuse_qkv_projections`` of diffusers makes one layer: its weights, in the memory they are in.

diffusers reads the weights of ``to_q``, ``to_k`` and ``to_v``, which would dequantize them, and writes them into a new
``nn.Linear``. Its own method still decides which layers become which, on layers without memory put in their place;
what it has made is then replaced by a :class:`FusedProjection`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qandc.errors import ModelError
from qandc.quantization.linear import QuantLinear, _autocast_dtype
from qandc.quantization.shared_products import Placing, put_side_by_side

__all__ = ["FusedProjection", "keep_fused_quantized"]

MEMBERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
TENSORS = ("qweight", "weight_scale", "weight_sum", "bias")


class FusedProjection(nn.Module):
    """Compute ``torch.cat([layer(x) for layer in members], -1)`` as one quantization and one product.

    The layers stay the owners of weights and ranges: they are saved, loaded, calibrated and reported, and back in use
    after ``unfuse_qkv_projections``. What this module holds are the same bytes again, as one tensor, which no state
    dict knows.

    Attributes:
        members: the layers; a tuple, so that they are submodules of their attention alone.
        qweight, weight_scale, weight_sum, bias: those of all layers, row by row; empty while they are not in one place.
    """

    qweight: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, members: tuple[QuantLinear, ...]) -> None:
        super().__init__()
        self.members = members
        self.in_features = members[0].in_features
        self.out_features = sum(layer.out_features for layer in members)
        self.w_bits, self.a_bits = members[0].w_bits, members[0].a_bits
        self.placing = Placing(patience=0)
        for name in TENSORS:
            tensor = getattr(members[0], name)
            empty = None if tensor is None else tensor.new_empty(0, requires_grad=False)
            self.register_buffer(name, empty, persistent=False)
        self._place()

    def _place(self) -> None:
        """Hold the weights of the layers, which are put side by side, as one tensor each."""
        wholes = self.placing.place(self.members)
        self._hold(wholes)

    def _hold(self, wholes: Sequence[torch.Tensor | None] | None) -> None:
        for i, name in enumerate(TENSORS):
            held, whole = self._buffers[name], None if wholes is None else wholes[i]
            if held is None:
                continue
            with torch.inference_mode(held.is_inference()), torch.no_grad():
                usable = whole is not None and whole.is_inference() == held.is_inference()
                held.data = whole.detach() if usable and whole is not None else held.new_empty(0)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedProjection:
        self._place()  # the layers, which are submodules that come before this one, have moved
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._place()  # the layers may hold other tensors now

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._place()  # a pickle does not know that tensors share memory

    @property
    def act_scale(self) -> torch.Tensor | None:
        """Return the activation scale that all fused layers have."""
        return self.members[0].act_scale

    @property
    def act_zero_point(self) -> torch.Tensor | None:
        """Return the zero point that all fused layers have."""
        return self.members[0].act_zero_point

    @property
    def smoothing(self) -> torch.Tensor | None:
        """Return the smoothing factors that all fused layers have."""
        return self.members[0].smoothing

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., K]`` to the outputs of all layers, side by side in the last dimension."""
        if torch.compiler.is_compiling():
            if self.qweight.numel():
                weights = self.qweight, self.weight_scale, self.weight_sum, self.bias
                return QuantLinear.product_to_compile(self, input, *weights)  # type: ignore[arg-type]
        elif not any(map(_has_hooks, self.members)) and not (torch.is_grad_enabled() and self._needs_grad(input)):
            self.placing.streak += 1
            placed = self.placing.placed
            operands = self.placing.ready(self.members)
            if operands is not None:
                if self.placing.placed is not placed:
                    self._hold(operands)
                return self.members[0].multiply(input, operands, _autocast_dtype(input))
        return torch.cat([layer(input) for layer in self.members], -1)

    def _needs_grad(self, input: torch.Tensor) -> bool:
        return input.requires_grad or any(m.bias is not None and m.bias.requires_grad for m in self.members)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.members[0].scheme}"


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def keep_fused_quantized(model: nn.Module) -> None:
    """Have the attentions of ``model`` fuse their projections into a :class:`FusedProjection`.

    The classes of these attentions get a ``fuse_projections`` that does what it did for attentions that are not
    quantized. A class, not each attention: a method stored in a module would be copied and pickled with it.
    """
    for module in model.modules():
        layers = dict(module.named_children())  # scripted modules have no other mapping
        if any(isinstance(layers.get(name), QuantLinear) for name in ("to_q", "to_k", "add_k_proj")):
            for owner in type(module).__mro__:
                method = vars(owner).get("fuse_projections")
                if inspect.isfunction(method) and not hasattr(method, "_qandc_original"):
                    owner.fuse_projections = _quantized_too(method)  # type: ignore[attr-defined]


def _quantized_too(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @torch.no_grad()
    def fuse_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layers = {name: self._modules.get(name) for names in MEMBERS.values() for name in names}
        layers = {name: layer for name, layer in layers.items() if layer is not None}
        if not any(isinstance(getattr(layer, "base_layer", layer), QuantLinear) for layer in layers.values()):
            return original(self, *args, **kwargs)
        before, fused = dict(self._modules), getattr(self, "fused_projections", False)
        try:
            self._modules.update({name: _without_memory(name, layer) for name, layer in layers.items()})
            try:
                result = original(self, *args, **kwargs)
            finally:
                self._modules.update(layers)
            for name, made in self._modules.items():
                if made is not before.get(name):
                    self._modules[name] = _fused(name, layers)
        except ModelError:
            self._modules.clear()
            self._modules.update(before)
            self.__dict__["fused_projections"] = fused
            raise
        return result

    fuse_projections._qandc_original = original  # type: ignore[attr-defined]
    return fuse_projections


def _without_memory(name: str, layer: Any) -> nn.Linear:
    if type(layer) not in (nn.Linear, QuantLinear):
        raise ModelError(
            f"{name} is a {type(layer).__name__} around a quantized layer, which a fused product would leave out; "
            "remove adapters first (delete_adapters), or do without fusing: layers that are given one tensor share a "
            "product anyway"
        )
    bias, dtype = layer.bias is not None, layer.weight.dtype
    return nn.Linear(layer.in_features, layer.out_features, bias, device="meta", dtype=dtype)


def _fused(name: str, layers: dict[str, Any]) -> nn.Module:
    """Make the layer that diffusers calls ``name`` of those that it stands for."""
    if name not in MEMBERS:
        raise ModelError(f"this diffusers fuses quantized layers into {name}, which qandc does not know; update qandc")
    members = tuple(layers[member] for member in MEMBERS[name])
    if all(type(layer) is nn.Linear for layer in members):
        bias: list[Any] = [layer.bias for layer in members]
        whole: Any = _without_memory(name, members[0])
        whole.out_features = sum(layer.out_features for layer in members)
        whole.weight = nn.Parameter(torch.cat([layer.weight for layer in members]))
        whole.bias = None if bias[0] is None else nn.Parameter(torch.cat(bias))
        return whole
    schemes = [f"W{m.w_bits}A{m.a_bits}" if isinstance(m, QuantLinear) else "not quantized" for m in members]
    if "W8A16" in schemes or "W4A16" in schemes:
        raise ModelError(
            f"{name} would be one product of weight-only layers ({schemes[0]}), of which there is none; "
            "leave them unfused"
        )
    if len(set(schemes)) == 1 and (members[0].qweight.is_meta or put_side_by_side(members) is not None):
        return FusedProjection(members)
    how = ", ".join(f"{member}: {scheme}" for member, scheme in zip(MEMBERS[name], schemes, strict=True))
    raise ModelError(
        f"{name} would be one product of layers that quantize their input differently ({how}; ranges or smoothing "
        "differ if bits do not); calibrate them together (qandc.calibrate), or leave them unfused"
    )
