"""Run the blocks of Chroma on fused kernels: those of FLUX.1, with modulations that they are given, and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from qandc.caching.features import Target
from qandc.models.family import Call
from qandc.models.flux_fused import FusedDoubleBlock, FusedSingleBlock, why_not_attention
from qandc.models.products import plain_norm
from qandc.models.two_streams import ADALN_IMAGE, ADALN_TEXT, ARGUMENTS
from qandc.support.attach import original_class

__all__ = ["FusedChromaDoubleBlock", "FusedChromaSingleBlock"]


class FusedChromaDoubleBlock(FusedDoubleBlock):
    """Run a block of two streams."""

    text, image = ADALN_TEXT._replace(modulation=None), ADALN_IMAGE._replace(modulation=None)
    arguments: ClassVar[tuple[str, ...]] = (*ARGUMENTS, "attention_mask")

    def modulations_of(self, temb: Tensor) -> list[Sequence[Tensor]]:
        return [temb[:, 6:].unbind(1), temb[:, :6].unbind(1)]

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.transformers import transformer_chroma

        return (
            _why_not_kind(block, transformer_chroma.ChromaTransformerBlock)
            or _why_not_norms(transformer_chroma.ChromaAdaLayerNormZeroPruned, block.norm1, block.norm1_context)
            or why_not_attention(block)
            or cls.why_not_streams(block, nn.RMSNorm)
        )


class FusedChromaSingleBlock(FusedSingleBlock):
    """Run a block of one sequence, text and image."""

    arguments: ClassVar[tuple[str, ...]] = ("hidden_states", "temb", "image_rotary_emb", "attention_mask")

    @classmethod
    def why_not(cls, block: Any) -> str | None:
        from diffusers.models.transformers import transformer_chroma

        return (
            _why_not_kind(block, transformer_chroma.ChromaSingleTransformerBlock)
            or _why_not_norms(transformer_chroma.ChromaAdaLayerNormZeroSinglePruned, block.norm)
            or cls.why_not_parts(block)
        )

    def __call__(self, call: Call, targets: tuple[Target | None, ...]) -> Any:
        return self.run(call["hidden_states"], call["temb"].unbind(1), call, targets[0])


def _why_not_kind(block: Any, kind: type[Any]) -> str | None:
    found = original_class(block)
    return None if found is kind else f"the block is {found.__name__}, not one of Chroma"


def _why_not_norms(kind: type[Any], *norms: Any) -> str | None:
    plain = all(type(norm) is kind and getattr(norm, "emb", None) is None and plain_norm(norm.norm) for norm in norms)
    return None if plain else "its norms are not those of Chroma"
