"""Run the blocks of FLUX.1 on fused kernels.

A block of one sequence is LayerNorm + modulate + quantize, one product for q, k and v, norms and rotation of their
heads, attention, its quantization, a product that applies GELU and quantizes, and one that adds gate · y to the
residual stream. A block of two streams does that for each of them, but for attention, which is common.

What a block is given is left alone, as others may hold it: each writes into memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qandc.caching.features import Target
from qandc.models.family import Call
from qandc.models.products import (
    is_gelu_mlp,
    joined,
    plain_norm,
    product_of,
    quantized,
    smoothed,
    touched,
    why_not_layer,
    why_not_one_input,
    why_not_one_product,
)
from qandc.quantization.linear import QuantLinear
from qandc.support.attach import original_class
from qandc_kernels import adaln_quantize_per_tensor, qk_norm_rope_

__all__ = ["FusedDoubleBlock", "FusedSingleBlock"]

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FF, FF_CONTEXT = (tuple(f"{name}.net.{i}" for i in ("0.proj", "2")) for name in ("ff", "ff_context"))
LARGEST = 65504  # of float16, to which these blocks clip
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class _Projection:
    """Normalize, modulate and quantize a stream, and compute q, k and v of it."""

    def __init__(
        self, norm: Any, layers: Sequence[QuantLinear], head_norms: tuple[nn.RMSNorm, nn.RMSNorm], heads: int
    ) -> None:
        self.qkv, self.smoothing = joined(layers), layers[0].smoothing
        self.eps, self.heads = norm.eps, heads
        self.head_norms = head_norms

    def __call__(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the quantized stream, and q, k and v as they come, ``[B, tokens, 3, heads, D]``."""
        shift, scale = smoothed(shift, scale, self.smoothing)
        xq = adaln_quantize_per_tensor(x, shift, scale, self.qkv.x_scale, self.qkv.x_zero_point, self.eps)
        return xq, self.qkv(xq, x.dtype).view(*x.shape[:2], 3, self.heads, -1)

    def turn_(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Normalize and rotate the heads of q and k, in place."""
        q, k = self.head_norms
        assert q.eps is not None
        qk_norm_rope_(qkv, q.weight, k.weight, cos, sin, q.eps)


class _FluxBlock:
    """Know which calls of a block of FLUX.1 can run fused."""

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        rotary, x = call.get("image_rotary_emb"), call["hidden_states"]
        if call.get("joint_attention_kwargs"):
            return "its attention is given joint_attention_kwargs"
        if not isinstance(rotary, tuple) or any(
            t.dtype != torch.float32 or t.ndim != 2 or t.device != x.device for t in rotary
        ):
            return "image_rotary_emb is no pair of float32 tables"
        return None


class FusedSingleBlock(_FluxBlock):
    """Run a block of one sequence, text and image."""

    layers: ClassVar[tuple[str, ...]] = (*QKV, "proj_mlp", "proj_out")

    def __init__(self, block: Any) -> None:
        attention, self.norm, self.out_layer = block.attn, block.norm, block.proj_out
        head_norms = attention.norm_q, attention.norm_k
        layers = [block.get_submodule(name) for name in QKV]
        self.project = _Projection(block.norm.norm, layers, head_norms, attention.heads)
        self.processor = attention.processor
        self.mlp, self.out = product_of(block.proj_mlp), product_of(block.proj_out)
        smoothing = block.proj_out.smoothing
        self.multiplier = None if smoothing is None else 1 / smoothing[-block.proj_mlp.out_features :]

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.normalization import AdaLayerNormZeroSingle
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

        if original_class(block) is not FluxSingleTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of FLUX.1"
        if not _plain_modulation(block.norm, AdaLayerNormZeroSingle):
            return "its norm is not that of FLUX.1"
        if type(block.act_mlp) is not nn.GELU or block.act_mlp.approximate != "tanh":
            return "its activation is not tanh-GELU"
        return (
            _why_not_attention(block, ("norm_q", "norm_k"))
            or _why_not_layers(block, cls.layers)
            or why_not_one_product(block, QKV)
            or why_not_one_input(block, (*QKV, "proj_mlp"))
        )

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        text, image = call["encoder_hidden_states"], call["hidden_states"]
        x = torch.cat([text, image], 1)
        shift, scale, gate = self.norm.linear(self.norm.silu(call["temb"])).chunk(3, 1)
        xq, qkv = self.project(x, shift, scale)
        self.project.turn_(qkv, *call["image_rotary_emb"])
        aq = quantized(_attend(qkv, self.processor), self.out_layer)
        self.out.gate_residual_(x, self.mlp.gelu_quantize(xq, self.out, self.multiplier, aq), gate, targets[0])
        if x.dtype == torch.float16:
            x.clip_(-LARGEST, LARGEST)
        return x[:, : text.shape[1]], x[:, text.shape[1] :]


class _Stream:
    """Run one of two streams, before and after attention."""

    def __init__(
        self, block: Any, norms: tuple[Any, Any], qkv: Sequence[str], head_norms: Any, out: QuantLinear, ff: Any
    ) -> None:
        self.norm, self.out_layer = norms[0], out
        layers = [block.get_submodule(name) for name in qkv]
        self.project = _Projection(norms[0].norm, layers, head_norms, block.attn.heads)
        fc1, fc2 = ff.net[0].proj, ff.net[2]
        self.eps = norms[1].eps
        self.out, self.fc1, self.fc2 = map(product_of, (out, fc1, fc2))
        self.fc1_smoothing = fc1.smoothing
        self.multiplier = None if fc2.smoothing is None else 1 / fc2.smoothing

    def modulation(self, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.norm.linear(self.norm.silu(temb)).chunk(6, 1)

    def finish_(
        self,
        x: torch.Tensor,
        attended: torch.Tensor,
        modulation: tuple[torch.Tensor, ...],
        targets: tuple[Target | None, ...],
    ) -> None:
        """Add attention and MLP to the stream, in place."""
        gate, shift_mlp, scale_mlp, gate_mlp = modulation[2:]
        self.out.gate_residual_(x, quantized(attended, self.out_layer), gate, targets[0])
        shift, scale = smoothed(shift_mlp, scale_mlp, self.fc1_smoothing)
        xq = adaln_quantize_per_tensor(x, shift, scale, self.fc1.x_scale, self.fc1.x_zero_point, self.eps)
        self.fc2.gate_residual_(x, self.fc1.gelu_quantize(xq, self.fc2, self.multiplier), gate_mlp, targets[1])


class FusedDoubleBlock(_FluxBlock):
    """Run a block of two streams, text and image, with one attention."""

    layers: ClassVar[tuple[str, ...]] = (*QKV, "attn.to_out.0", *FF, *ADDED_QKV, "attn.to_add_out", *FF_CONTEXT)

    def __init__(self, block: Any) -> None:
        attention = block.attn
        self.processor = attention.processor
        added_norms, norms = (attention.norm_added_q, attention.norm_added_k), (attention.norm_q, attention.norm_k)
        context = block.norm1_context, block.norm2_context
        self.text = _Stream(block, context, ADDED_QKV, added_norms, attention.to_add_out, block.ff_context)
        self.image = _Stream(block, (block.norm1, block.norm2), QKV, norms, attention.to_out[0], block.ff)

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.normalization import AdaLayerNormZero
        from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

        if original_class(block) is not FluxTransformerBlock:
            return f"the block is {original_class(block).__name__}, not one of FLUX.1"
        modulated = all(_plain_modulation(norm, AdaLayerNormZero) for norm in (block.norm1, block.norm1_context))
        if not modulated or not plain_norm(block.norm2) or not plain_norm(block.norm2_context):
            return "its norms are not those of FLUX.1"
        if not is_gelu_mlp(block.ff) or not is_gelu_mlp(block.ff_context):
            return "its activation is not tanh-GELU"
        reason = _why_not_attention(block, ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        reason = reason or _why_not_layers(block, cls.layers)
        for names in (QKV, ADDED_QKV):
            reason = reason or why_not_one_product(block, names) or why_not_one_input(block, names)
        return reason

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        given = call["encoder_hidden_states"], call["hidden_states"]
        streams, tokens = (self.text, self.image), [x.shape[1] for x in given]
        residuals = [x.clone(memory_format=torch.contiguous_format) for x in given]
        modulations = [stream.modulation(call["temb"]) for stream in streams]
        qkv = torch.cat([s.project(x, *m[:2])[1] for s, x, m in zip(streams, residuals, modulations, strict=True)], 1)
        cos, sin = (table.split(tokens) for table in call["image_rotary_emb"])
        for stream, part, its_cos, its_sin in zip(streams, qkv.split(tokens, 1), cos, sin, strict=True):
            stream.project.turn_(part, its_cos, its_sin)
        text, image = residuals
        of_text, of_image = _attend(qkv, self.processor).split(tokens, 1)
        self.text.finish_(text, of_text, modulations[0], (None, None))
        self.image.finish_(image, of_image, modulations[1], targets)
        return text.clip_(-LARGEST, LARGEST) if text.dtype == torch.float16 else text, image


def _attend(qkv: torch.Tensor, processor: Any) -> torch.Tensor:
    """Return attention ``[B, tokens, heads, D]`` by diffusers' backend, if one was chosen, or the fastest of torch."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q, k, v = qkv.unbind(2)
    with _fastest(q):
        return dispatch_attention_fn(q, k, v, backend=processor._attention_backend)


def _fastest(q: torch.Tensor) -> AbstractContextManager[Any]:
    """Prefer cuDNN's attention on sm_90 and newer, for 4,608 tokens of 24 heads of 128 twice as fast as torch's flash.

    Not cuDNN before 9.15.1 where the number of tokens is no multiple of 128, which it got wrong (pytorch#169849).
    """
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) < (9, 0):
        return nullcontext()
    right = q.shape[1] % 128 == 0 or (torch.backends.cudnn.version() or 0) >= 91501
    return sdpa_kernel(CUDNN_FIRST, set_priority=True) if right else nullcontext()


def _plain_modulation(norm: Any, kind: type) -> bool:
    """Tell whether a norm is an adaLN-Zero of that kind as diffusers makes it for FLUX.1."""
    own = type(norm) is kind and getattr(norm, "emb", None) is None
    return own and type(norm.silu) is nn.SiLU and plain_norm(norm.norm)


def _why_not_attention(block: Any, norms: tuple[str, ...]) -> str | None:
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

    attention = block.attn
    if original_class(attention) is not FluxAttention or type(attention.processor) is not FluxAttnProcessor:
        return "its attention is not the plain one of FLUX.1 (an IP-Adapter, for example)"
    if getattr(attention.processor, "_parallel_config", None) is not None:  # diffusers from 0.36 on
        return "its attention is spread over several GPUs"
    found: list[Any] = [getattr(attention, name, None) for name in norms]
    plain = all(type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps for norm in found)
    return None if plain and len({norm.eps for norm in found}) == 1 else "norms of its heads are not those of FLUX.1"


def _why_not_layers(block: Any, names: tuple[str, ...]) -> str | None:
    reasons = (why_not_layer(name, block.get_submodule(name)) for name in names)
    return touched(block) or next((reason for reason in reasons if reason is not None), None)
