"""Tell which parts of a DiT can run on the fused kernels, and why others cannot."""

from __future__ import annotations

from typing import Any

from torch import nn

from qandc.models.products import (
    is_gelu_mlp,
    plain_attention,
    plain_norm,
    touched,
    why_not_layer,
    why_not_layers,
    why_not_one_input,
    why_not_one_product,
)
from qandc.quantization.linear import QuantLinear
from qandc.quantization.ranges import StepRanges
from qandc.support.attach import original_class

__all__ = [
    "BLOCK_LAYERS",
    "OUTPUT",
    "is_batchable",
    "is_graphable",
    "is_plain_embedding",
    "why_not_block",
    "why_not_output",
]

QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
OUTPUT = "proj_out_2"
BLOCK_LAYERS = (*QKV, "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


def why_not_block(block: Any, prefix: str, ranges: StepRanges | None) -> str | None:
    """Say why a block can't run on the fused kernels, or None. ``prefix`` is what its layers' names begin with."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.normalization import AdaLayerNormZero

    if original_class(block) is not BasicTransformerBlock or block.norm_type != "ada_norm_zero":
        return f"the block is {original_class(block).__name__}, not diffusers' adaLN-Zero block"
    if not plain_attention(block.attn1):
        return "its attention is not the plain one of DiT"
    if block.attn2 is not None or block.pos_embed is not None or block._chunk_size is not None:
        return "it has cross-attention, a position embedding or a chunked feed-forward"
    if type(block.norm1) is not AdaLayerNormZero or not plain_norm(block.norm1.norm) or not plain_norm(block.norm3):
        return "its norms are not those of DiT, without weights"
    if not is_gelu_mlp(block.ff):
        return "its activation is not tanh-GELU"
    return (
        why_not_layers(block, BLOCK_LAYERS)
        or why_not_one_product(block, QKV)
        or why_not_one_input(block, QKV, prefix, ranges)
    )


def why_not_output(transformer: Any) -> str | None:
    """Say why the last norm and projection can't run fused, or None."""
    if not plain_norm(transformer.norm_out):
        return "norm_out is not a LayerNorm without weights"
    reason = why_not_layer(OUTPUT, transformer.proj_out_2)
    return reason or touched(transformer.proj_out_2) or touched(transformer.norm_out)


def is_graphable(transformer: Any) -> bool:
    """Tell whether all around the blocks is as diffusers made it: a graph replays no Python of other modules."""
    ends = (transformer.pos_embed, transformer.norm_out, transformer.proj_out_1, transformer.proj_out_2)
    kinds = all(type(end) in (nn.Linear, QuantLinear) for end in ends[2:]) and type(ends[1]) is nn.LayerNorm
    return kinds and is_plain_embedding(ends[0]) and all(touched(end) is None for end in ends[1:])


def is_plain_embedding(module: Any) -> bool:
    """Tell whether a module computes ``Conv2d(latents) + position`` and nothing else."""
    from diffusers.models.embeddings import PatchEmbed

    return (
        type(module) is PatchEmbed
        and type(module.proj) is nn.Conv2d
        and module.flatten
        and not module.layer_norm
        and module.pos_embed is not None
        and module.pos_embed_max_size is None
        and touched(module) is None
    )


def is_batchable(blocks: list[Any]) -> bool:
    """Tell whether all embedders and adaLN layers are as diffusers made them, and can run as batched products."""
    from diffusers.models.embeddings import (
        CombinedTimestepLabelEmbeddings,
        LabelEmbedding,
        TimestepEmbedding,
        Timesteps,
    )
    from diffusers.models.normalization import AdaLayerNormZero

    def plain(norm: Any) -> bool:
        if type(norm) is not AdaLayerNormZero or type(norm.emb) is not CombinedTimestepLabelEmbeddings:
            return False
        emb, time = norm.emb, norm.emb.timestep_embedder
        parts = (type(emb.time_proj), type(time), type(emb.class_embedder), type(emb.class_embedder.embedding_table))
        return (
            parts == (Timesteps, TimestepEmbedding, LabelEmbedding, nn.Embedding)
            and touched(norm) is None
            and all(
                type(linear) is nn.Linear and linear.bias is not None
                for linear in (norm.linear, time.linear_1, time.linear_2)
            )
            and type(norm.silu) is nn.SiLU
            and type(time.act) is nn.SiLU
            and time.cond_proj is None
            and time.post_act is None
            and emb.time_proj.flip_sin_to_cos
            and emb.time_proj.num_channels % 2 == 0
        )

    norms = [getattr(block, "norm1", None) for block in blocks]
    if not all(plain(norm) for norm in norms):
        return False
    projections = [norm.emb.time_proj for norm in norms if norm is not None]
    alike = {(p.num_channels, p.downscale_freq_shift, p.scale) for p in projections}
    return (
        len(alike) == 1 and len({tuple(p.shape for p in norm.parameters()) for norm in norms if norm is not None}) == 1
    )
