"""Hold what fused blocks of all families are made of: products of quantized layers, and why some can take no part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from qandc.caching.features import Target
from qandc.errors import ModelError
from qandc.quantization.linear import QuantLinear
from qandc.quantization.ranges import StepRanges
from qandc.quantization.shared_products import put_side_by_side
from qandc.support.attach import original_class
from qandc_kernels import (
    adaln_quantize_per_tensor,
    adaln_quantize_per_token,
    gelu_quantize_per_token,
    int4_linear,
    int8_linear,
    linear_gate_residual_,
    linear_gelu_quantize,
    linear_into_,
    quantize_per_tensor,
    quantize_per_token,
)

__all__ = [
    "SETTINGS",
    "Mlp",
    "Product",
    "Ranges",
    "divided",
    "is_gelu_mlp",
    "joined",
    "modulated",
    "plain_attention",
    "plain_norm",
    "product_of",
    "quantized",
    "touched",
    "why_not_layer",
    "why_not_layers",
    "why_not_one_input",
    "why_not_one_product",
]

SETTINGS = ("a_bits", "approximate", "processor", "_chunk_size", "forward", "eps")  # what a fused block was built for


class Product(NamedTuple):
    """Hold the operands of a quantized linear layer, as the kernels take them."""

    weight: torch.Tensor  # [N, K] int8, or [N, K/2] uint8
    x_scale: Any  # of the range, or of each token; None until a kernel has found these
    w_scale: torch.Tensor
    bias: torch.Tensor | None
    x_zero_point: torch.Tensor | None
    w_sum: torch.Tensor

    def __call__(self, xq: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        linear = int4_linear if self.weight.dtype == torch.uint8 else int8_linear
        return linear(xq, *self, out_dtype=dtype)

    def last_divided(self, factors: torch.Tensor | None) -> Product:
        """Return a product whose last outputs are divided by ``factors``; for v the smoothing of what follows."""
        if factors is None:
            return self
        n, w_scale = len(factors), self.w_scale.clone()
        w_scale[-n:].view(n, -1).div_(factors[:, None])
        bias = None if self.bias is None else self.bias.to(torch.float32, copy=True)
        if bias is not None:
            bias[-n:].div_(factors)
        return self._replace(w_scale=w_scale, bias=bias)

    def into_(self, out: torch.Tensor, xq: torch.Tensor) -> None:
        """Write the product into ``out``."""
        linear_into_(out, xq, *self)

    def gelu_quantize(
        self,
        xq: torch.Tensor,
        following: Product,
        multiplier: torch.Tensor | None,
        dtype: torch.dtype,
        beside: torch.Tensor | None = None,
        nan_flag: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Product]:
        """Apply GELU to the product and quantize for ``following``, behind heads that it takes too; gives both.

        The largest of a token is known only behind all of it: without a range what GELU takes is stored as ``dtype``,
        in which it may overflow as that of the unfused layer may.
        """
        if following.x_scale is None:
            hidden, x_scale = gelu_quantize_per_token(self(xq, dtype), multiplier, beside)
            return hidden, following._replace(x_scale=x_scale)
        hidden = linear_gelu_quantize(
            xq,
            self.weight,
            self.x_scale,
            self.w_scale,
            following.x_scale,
            self.bias,
            following.x_zero_point,
            multiplier,
            self.x_zero_point,
            self.w_sum,
            beside,
            nan_flag,
        )
        return hidden, following

    def gate_residual_(self, x: torch.Tensor, xq: torch.Tensor, gate: torch.Tensor, target: Target | None) -> None:
        """Add the product y to the residual stream, ``x += gate · y``; ``target`` takes y, or the end of its tokens."""
        branch = None if target is None else target.values
        # a token's scale needs all of it first
        if branch is not None and target is not None and (target.scales is not None or branch.shape != x.shape):
            branch = torch.empty_like(x)
        linear_gate_residual_(
            x, xq, self.weight, self.x_scale, self.w_scale, gate, self.bias, self.x_zero_point, self.w_sum, branch
        )
        if branch is not None and target is not None and branch is not target.values:
            target.store_(branch[:, -target.values.shape[1] :])


class Ranges(NamedTuple):
    """Hold the activation range of a layer: fixed, a place in a vector that each step fills, or none."""

    scale: torch.Tensor | None  # None: a scale per token
    zero_point: torch.Tensor | None


def product_of(layer: QuantLinear, ranges: Ranges | None = None) -> Product:
    """Return the product of a layer with its own range, or with the one that is given."""
    scale, zero_point = ranges or (layer.act_scale, layer.act_zero_point)
    return Product(layer.qweight, scale, layer.weight_scale, layer.bias, zero_point, layer.weight_sum)


def joined(layers: Sequence[QuantLinear]) -> Product:
    """Return one product of layers that are given one input; their weights become parts of one tensor.

    Raises:
        ModelError: devices, dtypes or layouts of their weights differ.
    """
    wholes = put_side_by_side(layers)
    if wholes is None:
        raise ModelError("layers that see one input have weights of different devices, dtypes or layouts")
    weight, w_scale, w_sum, bias = wholes
    first = product_of(layers[0])
    assert weight is not None
    assert w_scale is not None
    assert w_sum is not None
    return first._replace(weight=weight, w_scale=w_scale, bias=bias, w_sum=w_sum)


def modulated(
    x: torch.Tensor,
    modulation: Sequence[torch.Tensor],
    product: Product,
    smoothing: torch.Tensor | None,
    eps: float,
    copy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Product]:
    """Normalize, modulate by shift and scale, and quantize for a product; gives the integers and the product for them.

    What is modulated is divided by ``smoothing``. A product without a range gets a scale per token; ``copy`` takes x.
    """
    shift, scale = modulation[:2]
    if smoothing is not None:
        shift, scale = shift.float() / smoothing, (1 + scale.float()) / smoothing - 1
    if product.x_scale is None:
        xq, x_scale = adaln_quantize_per_token(x, shift, scale, eps, copy)
        return xq, product._replace(x_scale=x_scale)
    return adaln_quantize_per_tensor(x, shift, scale, product.x_scale, product.x_zero_point, eps, copy), product


def divided(x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
    """Divide heads ``[B, tokens, heads, D]`` by the smoothing of a layer's first input channels."""
    if layer.smoothing is None:
        return x
    return x.float() * (1.0 / layer.smoothing[: x.shape[2] * x.shape[3]]).view(x.shape[2:])


def quantized(x: torch.Tensor, product: Product, nan_flag: torch.Tensor | None) -> tuple[torch.Tensor, Product]:
    """Quantize heads ``[B, tokens, heads, D]`` for a product; gives ``[B, tokens, K]`` and the product for them."""
    if product.x_scale is None:
        xq, x_scale = quantize_per_token(x, token_dims=2)
        product = product._replace(x_scale=x_scale)
    else:
        xq = quantize_per_tensor(x, product.x_scale, product.x_zero_point, 8, nan_flag)
    return xq.flatten(2), product


class Mlp:
    """Run a feed-forward of diffusers, with the norm before it, as three launches, or four without a range of GELU."""

    def __init__(
        self, norm: Any, feed_forward: Any, of_fc1: Ranges | None = None, of_fc2: Ranges | None = None
    ) -> None:
        fc1, fc2 = feed_forward.net[0].proj, feed_forward.net[2]
        self.eps, self.smoothing = norm.eps, fc1.smoothing
        self.fc1, self.fc2 = product_of(fc1, of_fc1), product_of(fc2, of_fc2)
        self.multiplier = None if fc2.smoothing is None else 1 / fc2.smoothing

    def add_(self, x: torch.Tensor, modulation: Sequence[torch.Tensor], target: Target | None) -> None:
        """Add its output to the stream that it reads; ``modulation`` is shift, scale and gate."""
        xq, fc1 = modulated(x, modulation, self.fc1, self.smoothing, self.eps)
        hidden, fc2 = fc1.gelu_quantize(xq, self.fc2, self.multiplier, x.dtype)
        fc2.gate_residual_(x, hidden, modulation[2], target)


def touched(module: nn.Module) -> str | None:
    """Say what is put around a module that using its weights directly would leave out, or None."""
    for name, part in module.named_modules():
        where = name or type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{where} has forward hooks"
        if "forward" in part.__dict__:
            return f"{where} has a replaced forward"
        if parametrize.is_parametrized(part):
            return f"{where} has parametrizations"
    return None


def plain_norm(norm: Any) -> bool:
    """Tell whether a norm is a LayerNorm without weights."""
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


def plain_attention(attention: Any) -> bool:
    """Tell whether an attention is diffusers' own for queries, keys and values, without norms."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    norms = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "group_norm")
    return (
        original_class(attention) is Attention
        and type(attention.processor) in (AttnProcessor, AttnProcessor2_0)
        and not any(getattr(attention, name, None) for name in norms)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def is_gelu_mlp(module: Any) -> bool:
    """Tell whether a module is diffusers' feed-forward with tanh-GELU."""
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward

    first = module.net[0] if original_class(module) is FeedForward else None
    return type(first) is GELU and first.approximate == "tanh"


def why_not_layer(name: str, layer: Any) -> str | None:
    """Say why a layer can't be a product of a fused block, or None."""
    if original_class(layer) is not QuantLinear:  # of a branch that is cached too
        return f"{name} is {type(layer).__name__}, not a QuantLinear"
    if layer.weight_only:
        return f"{name} is weight-only (a_bits 16), fused kernels quantize activations to 8 bits"
    if layer.a_bits != 8:
        return f"{name} quantizes activations to {layer.a_bits} bits, fused kernels to 8"
    return None


def why_not_layers(block: Any, names: Sequence[str]) -> str | None:
    """Say why layers of a block can't be products of a fused one, or None."""
    reasons = (why_not_layer(name, block.get_submodule(name)) for name in names)
    return touched(block) or next((reason for reason in reasons if reason is not None), None)


def why_not_one_input(
    block: Any, names: Sequence[str], prefix: str = "", ranges: StepRanges | None = None
) -> str | None:
    """Say why layers of a block can't be given one quantized input, or None; ``ranges`` know ``prefix + name``."""
    layers = {name: block.get_submodule(name) for name in names}
    first, *others = ((layer.smoothing, *_range_of(prefix + name, layer, ranges)) for name, layer in layers.items())
    if all(_equal(mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True)):
        return None
    return f"{_listed(names)}, which see one input, have different ranges for it"


def why_not_one_product(block: Any, names: Sequence[str]) -> str | None:
    """Say why layers of a block can't be one product, or None."""
    layers = [block.get_submodule(name) for name in names]
    alike = len({(layer.w_bits, layer.bias is None) for layer in layers}) == 1
    return None if alike else f"{_listed(names)} have different bits or biases"


def _listed(names: Sequence[str]) -> str:
    *others, last = (name.rpartition(".")[2].removeprefix("to_") for name in names)
    return f"{', '.join(others)} and {last}"


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _range_of(
    name: str, layer: QuantLinear, ranges: StepRanges | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if ranges is not None and name in ranges.scales:
        return ranges.scales[name], ranges.zero_points.get(name)
    return layer.act_scale, layer.act_zero_point
