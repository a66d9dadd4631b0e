"""Models that people run, at their real sizes, on the meta device, where they take no memory."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["REAL", "make_real"]

REAL: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {"out_channels": 8},  # DiT-XL/2
    "PixArtTransformer2DModel": {"caption_channels": 4096, "use_additional_conditions": False},  # Sigma
    "SD3Transformer2DModel": {  # SD3.5-large
        "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "caption_projection_dim": 2432,
        "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {"guidance_embeds": True},  # FLUX.1-dev
    "Flux2Transformer2DModel": {},
    "ChromaTransformer2DModel": {},
    "QwenImageTransformer2DModel": {},
    "ZImageTransformer2DModel": {},
    "Lumina2Transformer2DModel": {"cap_feat_dim": 2304},
    "SanaTransformer2DModel": {},
    "AuraFlowTransformer2DModel": {},
    "CogView4Transformer2DModel": {},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "axes_dims_rope": (64, 32, 32),
        "llama_layers": [*range(48)],
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408, "num_layers": 40,
        "mlp_ratio": 4.3637,
    },
    "WanTransformer3DModel": {},  # 14B
    "HunyuanVideoTransformer3DModel": {},
    "HunyuanVideo15Transformer3DModel": {},
    "CogVideoXTransformer3DModel": {  # 5B
        "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True,
    },
    "LTXVideoTransformer3DModel": {},
    "StableAudioDiTModel": {},
    "UNet2DConditionModel": {  # SDXL
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


def make_real(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Build a model of a class without memory for its weights."""
    import diffusers

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return getattr(diffusers, name)(**REAL[name])
    finally:
        torch.set_default_dtype(default)
