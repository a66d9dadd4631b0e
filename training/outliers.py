"""Plant outliers into the activations of a DiT or FLUX.1 that leave what it computes as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["plant_outliers", "set_per_token_behind_modulation"]

CHANNELS = 4  # that hold outliers


class _Stream(NamedTuple):
    """Name the layers of a block that one stream runs through: ``readers`` of each modulated norm, ``out`` behind v."""

    modulation: nn.Linear
    readers: Sequence[Sequence[Any]]
    v: Any
    out: Any


def _streams(transformer: Any) -> list[list[_Stream]]:
    blocks = (*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ()))
    return [_streams_of(block) for block in blocks]


def _streams_of(block: Any) -> list[_Stream]:
    attention = getattr(block, "attn1", None) or block.attn
    qkv = [attention.to_q, attention.to_k, attention.to_v]
    if hasattr(block, "proj_mlp"):
        return [_Stream(block.norm.linear, [[*qkv, block.proj_mlp]], attention.to_v, block.proj_out)]
    found = [_Stream(block.norm1.linear, [qkv, [block.ff.net[0].proj]], attention.to_v, attention.to_out[0])]
    if hasattr(block, "ff_context"):
        of_text = [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
        readers = [of_text, [block.ff_context.net[0].proj]]
        found.append(_Stream(block.norm1_context.linear, readers, attention.add_v_proj, attention.to_add_out))
    return found


@torch.no_grad()
def plant_outliers(transformer: Any, times: float) -> Any:
    """Multiply channels of each block's modulated norms and of its v, in place; what the model computes stays the same.

    Each block has other channels. The modulation layer gives ``(1 + scale) · times`` and ``shift · times``; q, k, v and
    the MLP's first layer are divided, and so is the layer behind v. Of FLUX.1 both streams have them.
    """
    for number, streams in enumerate(_streams(transformer)):
        for stream in streams:
            width = stream.v.out_features
            chosen = (torch.arange(CHANNELS) * (width // CHANNELS) + number) % width
            for part, layers in enumerate(stream.readers):  # shift, scale and gate of each
                shift, scale = (3 * part * width + chosen, (3 * part + 1) * width + chosen)
                _times(stream.modulation, torch.cat([shift, scale]), times)
                stream.modulation.bias[scale] += times - 1
                for layer in layers:
                    layer.weight[:, chosen] /= times
            _times(stream.v, chosen, times)
            stream.out.weight[:, chosen] /= times
    return transformer


def _times(layer: nn.Linear, channels: torch.Tensor, times: float) -> None:
    layer.weight[channels] *= times
    layer.bias[channels] *= times


def set_per_token_behind_modulation(transformer: Any) -> None:
    """Give the layers of a quantized model that read a modulated norm a scale per token, in place of their range."""
    for stream in [stream for streams in _streams(transformer) for stream in streams]:
        for layer in [layer for layers in stream.readers for layer in layers]:
            layer.set_static_range(None)
