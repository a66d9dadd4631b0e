"""Run blocks of two streams, text and image, on fused kernels: what FLUX.1, Chroma, Qwen-Image and SD3.5 share.

Each stream is LayerNorm + modulate + quantize, one product for q, k and v, norms and rotation of their heads; then
comes one attention; then of each stream its quantization, a product that adds gate · y to the residual stream, and the
MLP: LayerNorm + modulate + quantize, a product that applies GELU and quantizes (without a static range another kernel
does), and one more that adds gate · y.

What a block is given is left alone, as others may hold it: the first kernel copies it while it reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qandc.caching.features import Target
from qandc.models.attention import attend
from qandc.models.family import Call
from qandc.models.products import (
    Mlp,
    divided,
    is_gelu_mlp,
    joined,
    modulated,
    plain_norm,
    product_of,
    quantized,
    why_not_layers,
    why_not_one_input,
    why_not_one_product,
)
from qandc_kernels import qk_norm_rope_

__all__ = [
    "ADALN_IMAGE",
    "ADALN_TEXT",
    "ADDED_HEAD_NORMS",
    "ADDED_QKV",
    "ARGUMENTS",
    "HEAD_NORMS",
    "QKV",
    "Projection",
    "SelfAttention",
    "Stream",
    "Tables",
    "TwoStreams",
    "clip_",
    "outer_mask",
    "plain_adaln",
    "why_not_heads",
    "why_not_rotary",
]

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
HEAD_NORMS, ADDED_HEAD_NORMS = ("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")  # of attention
LARGEST = 65504  # of float16, to which these blocks clip
Tensor = torch.Tensor
Tables = tuple[Tensor, Tensor] | tuple[None, None]  # cosines and sines of each token, if heads are rotated


def _mlp_of(name: str) -> tuple[str, str]:
    """Return the names of the layers of a feed-forward of diffusers."""
    return f"{name}.net.0.proj", f"{name}.net.2"


class Projection:
    """Normalize, modulate and quantize a stream, and compute q, k and v of it."""

    def __init__(self, block: Any, norm: Any, names: Sequence[str], head_norms: Sequence[str]) -> None:
        layers = [block.get_submodule(name) for name in names]
        attention = block.get_submodule(names[0].rpartition(".")[0])
        self.qkv, self.smoothing = joined(layers), layers[0].smoothing
        self.eps, self.heads = norm.eps, attention.heads
        self.head_norms = [getattr(attention, name) for name in head_norms]

    def __call__(
        self, x: Tensor, modulation: Sequence[Tensor], tables: Tables, out: Tensor, copy: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write q, k, v to ``out [B, tokens, 3 · D]`` and ``x`` to ``copy``; return ``x`` quantized, and its scale."""
        xq, qkv = modulated(x, modulation, self.qkv, self.smoothing, self.eps, copy)
        qkv.into_(out, xq)
        (q, k), (cos, sin) = self.head_norms, tables
        qk_norm_rope_(out.unflatten(2, (3, self.heads, -1)), q.weight, k.weight, cos, sin, q.eps)
        return xq, qkv.x_scale


class Stream(NamedTuple):
    """Name the parts of a block that one stream runs through.

    Attributes:
        norms: before attention and before the MLP.
        modulation: the layer that gives shift, scale and gate ``[B, 6 · D]`` of attention and MLP, ``[B, 9 · D]`` with
            those of :attr:`TwoStreams.beside`; None where a block is given them.
        qkv, out, mlp: names of layers.
        head_norms: names of the norms of q and k in the attention.
    """

    norms: tuple[str, str]
    modulation: str | None
    qkv: tuple[str, str, str]
    head_norms: tuple[str, str]
    out: str
    mlp: str

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the names of all quantized layers."""
        return *self.qkv, self.out, *_mlp_of(self.mlp)


class _Branch:
    """Run what comes before and after an attention, in one stream."""

    def __init__(self, block: Any, norm: Any, qkv: Sequence[str], head_norms: Sequence[str], out: str) -> None:
        self.project = Projection(block, norm, qkv, head_norms)
        self.out_layer = block.get_submodule(out)
        self.out = product_of(self.out_layer)

    def add_attention_(self, x: Tensor, attended: Tensor, gate: Tensor, target: Target | None) -> None:
        """Add attention to the stream, in place."""
        xq, out = quantized(divided(attended, self.out_layer), self.out, self.out_layer.nan_flag)
        out.gate_residual_(x, xq, gate, target)


class _FusedStream(_Branch):
    """Run one of two streams, before and after attention."""

    def __init__(self, block: Any, parts: Stream) -> None:
        norm, norm_mlp = (block.get_submodule(name) for name in parts.norms)
        super().__init__(block, norm, parts.qkv, parts.head_norms, parts.out)
        self.modulation = None if parts.modulation is None else block.get_submodule(parts.modulation)
        self.mlp = Mlp(norm_mlp, getattr(block, parts.mlp))

    def add_mlp_(self, x: Tensor, modulation: Sequence[Tensor], target: Target | None) -> None:
        """Add the MLP to the stream, in place."""
        self.mlp.add_(x, modulation, target)
        clip_(x)


class SelfAttention(_Branch):
    """Attend among the tokens of the image alone, beside the attention of both streams."""

    def __init__(self, block: Any, norm: Any, qkv: Sequence[str], out: str) -> None:
        super().__init__(block, norm, qkv, HEAD_NORMS, out)
        self.processor = block.get_submodule(qkv[0].rpartition(".")[0]).processor

    def __call__(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """Return attention ``[B, tokens, heads, D]`` among what is modulated."""
        qkv = x.new_empty(*x.shape[:2], 3 * x.shape[2])
        self.project(x, modulation, (None, None), qkv)
        return attend(qkv.unflatten(2, (3, self.project.heads, -1)), self.processor)


ADALN_TEXT = Stream(
    ("norm1_context.norm", "norm2_context"),
    "norm1_context.linear",
    ADDED_QKV,
    ADDED_HEAD_NORMS,
    "attn.to_add_out",
    "ff_context",
)
ADALN_IMAGE = Stream(("norm1.norm", "norm2"), "norm1.linear", QKV, HEAD_NORMS, "attn.to_out.0", "ff")


class TwoStreams:
    """Run a block of two streams with one attention; a family says what its parts are called.

    Attributes:
        text, image: the parts of each stream.
        beside: a second attention of the image, on what the first reads too, or None.
    """

    arguments: ClassVar[tuple[str, ...]] = ARGUMENTS

    text: Stream
    image: Stream

    def __init__(self, block: Any) -> None:
        self.processor, self.heads = block.attn.processor, block.attn.heads
        self.streams = _FusedStream(block, self.text), _FusedStream(block, self.image)
        self.beside: SelfAttention | None = None

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        return None

    @staticmethod
    def tables_of(call: Call) -> tuple[Tables, Tables]:
        """Return cosines and sines of text and image."""
        raise NotImplementedError

    def modulations_of(self, temb: Tensor) -> list[Sequence[Tensor]]:
        """Return shift, scale and gate of each attention and MLP, ``[B, D]``, of text and image."""
        layers = [stream.modulation for stream in self.streams]
        return [layer(F.silu(temb)).split(temb.shape[-1], 1) for layer in layers if layer is not None]

    @classmethod
    def why_not_streams(cls, block: Any, kind: type[Any]) -> str | None:
        """Say why norms, MLPs or layers of the streams can't run fused, or None; ``kind``: of the norms of heads."""
        streams = cls.text, cls.image
        if not all(plain_norm(block.get_submodule(name)) for stream in streams for name in stream.norms):
            return "its norms have weights"
        if not all(is_gelu_mlp(getattr(block, stream.mlp)) for stream in streams):
            return "its activation is not tanh-GELU"
        reason = why_not_heads(block.attn, [stream.head_norms for stream in streams], kind)
        for stream in streams:
            reason = reason or why_not_layers(block, stream.layers)
            reason = reason or why_not_one_product(block, stream.qkv) or why_not_one_input(block, stream.qkv)
        return reason

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> tuple[Tensor, Tensor]:
        given, temb = [call["encoder_hidden_states"], call["hidden_states"]], call["temb"]
        samples = max(map(len, (*given, temb)))  # there may be one negative prompt for several images
        given, tokens = [x.expand(samples, -1, -1) for x in given], [x.shape[1] for x in given]
        width = given[1].shape[2]
        if samples == 1:  # parts of one tensor, which a block of one sequence reads as it is
            text, image = given[1].new_empty(1, sum(tokens), width).split(tokens, 1)
        else:  # what is added to has no gaps
            text, image = (x.new_empty(x.shape) for x in given)
        modulations = [[part.expand(samples, -1) for part in parts] for parts in self.modulations_of(temb)]
        qkv = given[1].new_empty(samples, sum(tokens), 3 * width)
        rest = zip(modulations, self.tables_of(call), qkv.split(tokens, 1), (text, image), strict=True)
        for stream, x, (modulation, tables, out, copy) in zip(self.streams, given, rest, strict=True):
            stream.project(x, modulation, tables, out, copy)
        mask = outer_mask(call.get("attention_mask"))
        attended = attend(qkv.unflatten(2, (3, self.heads, -1)), self.processor, mask).split(tokens, 1)
        of_text, of_image = modulations
        self.streams[0].add_attention_(text, attended[0], of_text[2], None)
        self.streams[0].add_mlp_(text, of_text[3:], None)
        self.streams[1].add_attention_(image, attended[1], of_image[2], targets[0])
        if self.beside is not None:
            self.beside.add_attention_(image, self.beside(given[1], of_image[6:]), of_image[8], targets[2])
        self.streams[1].add_mlp_(image, of_image[3:], targets[1])
        return text, image


def outer_mask(mask: Tensor | None) -> Tensor | None:
    """Return the mask of pairs ``[B, 1, tokens, tokens]`` that blocks of Chroma make of theirs, ``[B, tokens]``."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


def clip_(x: Tensor) -> None:
    """Clip a stream in float16 to what that holds, in place."""
    if x.dtype == torch.float16:
        x.clip_(-LARGEST, LARGEST)


def why_not_rotary(call: Call, dtype: torch.dtype) -> str | None:
    """Say why heads can't be rotated in a call of a block, by tables of ``dtype``, or None."""
    rotary, x = call.get("image_rotary_emb"), call["hidden_states"]
    known = isinstance(rotary, tuple) and all(t.dtype == dtype and t.ndim == 2 and t.device == x.device for t in rotary)
    return None if known else f"image_rotary_emb is no pair of {str(dtype).removeprefix('torch.')} tables"


def plain_adaln(norm: Any, kind: type) -> bool:
    """Tell whether a norm is an adaLN-Zero of that kind as diffusers makes it for FLUX.1 and SD3."""
    own = type(norm) is kind and getattr(norm, "emb", None) is None
    return own and type(norm.silu) is nn.SiLU and plain_norm(norm.norm)


def why_not_heads(attention: Any, pairs: Sequence[tuple[str, str]], kind: type[Any]) -> str | None:
    """Say why attention or norms of q and k can't run fused, or None."""
    if getattr(attention.processor, "_parallel_config", None) is not None:  # diffusers from 0.36 on
        return "its attention is spread over several GPUs"
    for names in pairs:
        norms: list[Any] = [getattr(attention, name, None) for name in names]
        weights = all(type(norm) is kind and norm.weight is not None for norm in norms)
        plain = weights and all(getattr(norm, "bias", None) is None and norm.eps for norm in norms)
        if not plain or len({norm.eps for norm in norms}) != 1:
            return "norms of its heads are not those of its family"
    return None
