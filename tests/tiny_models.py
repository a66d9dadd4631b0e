"""Small models of the classes that people quantize, two blocks each, and inputs for one forward on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch

__all__ = ["TINY", "Tiny", "as_one", "each_class", "inputs_of", "make_tiny", "output_of", "speed_of"]

Noise = Callable[..., torch.Tensor]


class Tiny(NamedTuple):
    """Arguments of a class of diffusers, and a function that makes inputs from noise and a time of 0 to 1."""

    config: dict[str, Any]
    inputs: Callable[[Noise, float], dict[str, Any]]


def _step(time: float) -> torch.Tensor:
    """Give both rows the timestep of the thousand that most classes count."""
    return torch.full((2,), 1000 * time)


def _text_and(noise: Noise, *sizes: int, **others: Any) -> dict[str, Any]:
    """Make what is denoised, two rows of it, and six tokens of text for each."""
    return {"hidden_states": noise(2, *sizes), "encoder_hidden_states": noise(2, 6, 48), **others}


def _text_and_image(noise: Noise, time: float) -> dict[str, Any]:
    return _text_and(noise, 4, 8, 8, timestep=_step(time))


def _text_and_patches(noise: Noise, time: float) -> dict[str, Any]:
    return _text_and(noise, 16, 16, timestep=torch.full((2,), time))


def _dit(noise: Noise, time: float) -> dict[str, Any]:
    return {"hidden_states": noise(2, 4, 8, 8), "timestep": _step(time).long(), "class_labels": torch.tensor([1, 7])}


def _pixart(noise: Noise, time: float) -> dict[str, Any]:
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {**_text_and_image(noise, time), **sizes, "encoder_attention_mask": torch.ones(2, 6)}


def _sd3(noise: Noise, time: float) -> dict[str, Any]:
    return {**_text_and_image(noise, time), "pooled_projections": noise(2, 64)}


def _places(axes: int) -> dict[str, torch.Tensor]:
    """Positions of six tokens of text and of 4 x 4 of an image."""
    image = torch.zeros(16, axes)
    image[:, 1:3] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return {"img_ids": image, "txt_ids": torch.zeros(6, axes)}


def _chroma(noise: Noise, time: float) -> dict[str, Any]:
    return {**_text_and_patches(noise, time), **_places(3)}


def _flux(noise: Noise, time: float) -> dict[str, Any]:
    return {**_chroma(noise, time), "pooled_projections": noise(2, 32), "guidance": torch.full((2,), 3.5)}


def _flux2(noise: Noise, time: float) -> dict[str, Any]:
    return {**_text_and_patches(noise, time), "guidance": torch.full((2,), 3.5), **_places(4)}


def _qwen(noise: Noise, time: float) -> dict[str, Any]:
    from diffusers.models.transformers import transformer_qwenimage

    found = {**_text_and_patches(noise, time), "encoder_hidden_states_mask": None, "img_shapes": [[(1, 4, 4)]] * 2}
    newer = hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")  # diffusers from 0.37 on
    return found if newer else {**found, "txt_seq_lens": [6, 6]}


def _z_image(noise: Noise, time: float) -> dict[str, Any]:
    return {
        "x": [noise(4, 1, 8, 8) for _ in range(2)],
        "t": torch.full((2,), 1 - time),
        "cap_feats": [noise(6, 48) for _ in range(2)],
    }


def _lumina(noise: Noise, time: float) -> dict[str, Any]:
    mask = torch.ones(2, 6, dtype=torch.bool)
    return _text_and(noise, 4, 8, 8, timestep=torch.full((2,), 1 - time), encoder_attention_mask=mask)


def _aura(noise: Noise, time: float) -> dict[str, Any]:
    return _text_and(noise, 4, 8, 8, timestep=torch.full((2,), time))


def _cogview(noise: Noise, time: float) -> dict[str, Any]:
    size = torch.full((2, 2), 64.0)
    sizes = {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2)}
    return {**_text_and_image(noise, time), **sizes}


def _hidream(noise: Noise, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timesteps": _step(time),
        "encoder_hidden_states_t5": noise(2, 6, 48),
        "encoder_hidden_states_llama3": noise(4, 2, 6, 48),
        "pooled_embeds": noise(2, 32),
    }


def _hunyuan_dit(noise: Noise, time: float) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": _step(time),
        "encoder_hidden_states": noise(2, 5, 32),
        "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": noise(2, 6, 48),
        "text_embedding_mask_t5": torch.ones(2, 6),
        "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]]).repeat(2, 1),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
    }


def _wan(noise: Noise, time: float) -> dict[str, Any]:
    return _text_and(noise, 4, 2, 8, 8, timestep=_step(time))


def _hunyuan_video(noise: Noise, time: float) -> dict[str, Any]:
    others = {"encoder_attention_mask": torch.ones(2, 6), "guidance": torch.full((2,), 6000.0)}
    return {**_wan(noise, time), **others, "pooled_projections": noise(2, 32)}


def _hunyuan_video_15(noise: Noise, time: float) -> dict[str, Any]:
    return {
        **_text_and(noise, 4, 2, 4, 4, timestep=_step(time), encoder_attention_mask=torch.ones(2, 6)),
        "encoder_hidden_states_2": noise(2, 5, 32),
        "encoder_attention_mask_2": torch.ones(2, 5),
        "image_embeds": noise(2, 4, 32),
    }


def _cogvideo(noise: Noise, time: float) -> dict[str, Any]:
    return _text_and(noise, 1, 4, 8, 8, timestep=_step(time))


def _ltx(noise: Noise, time: float) -> dict[str, Any]:
    others = {"encoder_attention_mask": torch.ones(2, 6), "num_frames": 1, "height": 4, "width": 4}
    return _text_and(noise, 16, 16, timestep=_step(time), **others)


def _stable_audio(noise: Noise, time: float) -> dict[str, Any]:
    return {
        **_text_and(noise, 4, 16, timestep=torch.full((2,), time)),
        "global_hidden_states": noise(2, 1, 32),
        "rotary_embedding": (torch.ones(17, 8), torch.zeros(17, 8)),
    }


def _unet(noise: Noise, time: float) -> dict[str, Any]:
    return {
        "sample": noise(2, 4, 8, 8),
        "timestep": _step(time),
        "encoder_hidden_states": noise(2, 6, 48),
        "added_cond_kwargs": {"text_embeds": noise(2, 32), "time_ids": torch.ones(2, 6)},
    }


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, **HEADS, "joint_attention_dim": 48}
TINY = {
    "DiTTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10},
        _dit,
    ),
    "PixArtTransformer2DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 32,
            "caption_channels": 48, "use_additional_conditions": False,
        },
        _pixart,
    ),
    "SD3Transformer2DModel": Tiny(
        {
            **HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "joint_attention_dim": 48, "caption_projection_dim": 32, "pooled_projection_dim": 64,
            "pos_embed_max_size": 8, "qk_norm": "rms_norm",
        },
        _sd3,
    ),
    "FluxTransformer2DModel": Tiny(
        {**FLUX, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}, _flux
    ),
    "Flux2Transformer2DModel": Tiny(
        {**FLUX, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}, _flux2
    ),
    "ChromaTransformer2DModel": Tiny(
        {
            **FLUX, "axes_dims_rope": (4, 6, 6), "approximator_num_channels": 16, "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        _chroma,
    ),
    "QwenImageTransformer2DModel": Tiny(
        {
            **HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 48,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen,
    ),
    "ZImageTransformer2DModel": Tiny(
        {
            "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3,
            "cap_feat_dim": 48, "axes_dims": [4, 6, 6], "axes_lens": [128, 16, 16],
        },
        _z_image,
    ),
    "Lumina2Transformer2DModel": Tiny(
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 2,
            "num_attention_heads": 3, "num_kv_heads": 3, "multiple_of": 16, "cap_feat_dim": 48,
            "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 16, 16),
        },
        _lumina,
    ),
    "SanaTransformer2DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 48, "sample_size": 8,
        },
        _text_and_image,
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {
            **HEADS, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": 48,
            "caption_projection_dim": 32, "pos_embed_max_size": 16,
        },
        _aura,
    ),
    "CogView4Transformer2DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 48, "time_embed_dim": 32,
            "condition_dim": 16, "sample_size": 8, "rope_axes_dim": (16, 16),
        },
        _cogview,
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {
            **HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "caption_channels": [48, 48], "text_emb_dim": 32, "axes_dims_rope": (4, 6, 6), "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 3],
        },
        _hidream,
    ),
    "HunyuanDiT2DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 2,
            "cross_attention_dim": 32, "cross_attention_dim_t5": 48, "pooled_projection_dim": 32, "text_len": 5,
            "text_len_t5": 6,
        },
        _hunyuan_dit,
    ),
    "WanTransformer3DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 48, "freq_dim": 32, "ffn_dim": 64,
            "num_layers": 2, "rope_max_seq_len": 32,
        },
        _wan,
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "num_refiner_layers": 2, "text_embed_dim": 48, "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6),
        },
        _hunyuan_video,
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 2,
            "text_embed_dim": 48, "text_embed_2_dim": 32, "image_embed_dim": 32, "rope_axes_dim": (4, 6, 6),
            "target_size": 64,
        },
        _hunyuan_video_15,
    ),
    "CogVideoXTransformer3DModel": Tiny(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32, "text_embed_dim": 48, "num_layers": 2,
            "sample_width": 8, "sample_height": 8, "sample_frames": 1, "max_text_seq_length": 6,
        },
        _cogvideo,
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {
            **HEADS, "in_channels": 16, "out_channels": 16, "cross_attention_dim": 32, "num_layers": 2,
            "caption_channels": 48,
        },
        _ltx,
    ),
    "StableAudioDiTModel": Tiny(
        {
            **HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "num_key_value_attention_heads": 1, "cross_attention_dim": 32, "time_proj_dim": 32,
            "global_states_input_dim": 32, "cross_attention_input_dim": 48,
        },
        _stable_audio,
    ),
    "UNet2DConditionModel": Tiny(
        {
            "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 48,
            "transformer_layers_per_block": 2, "attention_head_dim": (2, 4), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        _unet,
    ),
}  # fmt: skip


def make_tiny(name: str, **changes: Any) -> Any:
    """Build the small model of a class, in eval mode, with random weights and biases that carry signal everywhere."""
    import diffusers

    torch.manual_seed(0)
    if "n_layers" in TINY[name].config and "num_layers" in changes:
        changes["n_layers"] = changes.pop("num_layers")
    model = getattr(diffusers, name)(**{**TINY[name].config, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or parameter.isnan().any():  # zero at the start, as gates are; or torch.empty
                parameter.normal_(std=0.05)
    return model.eval()


def speed_of(name: str) -> list[pytest.MarkDecorator]:
    """Mark tests of a class of models as slow, but for one class with one stream and one with two."""
    return [] if name in ("DiTTransformer2DModel", "FluxTransformer2DModel") else [pytest.mark.slow]


def each_class(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test for each class of models, in its parameter ``name``; most are slow tests."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=speed_of(name)) for name in names])


def inputs_of(name: str, time: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """Make the arguments of a forward of two rows; ``time`` goes from 0 (an image) to 1 (noise)."""
    generator = torch.Generator().manual_seed(seed)
    return TINY[name].inputs(lambda *shape: torch.randn(shape, generator=generator), time)


def output_of(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Run a forward and return what it predicts, as one tensor."""
    with torch.no_grad():
        return as_one(model(**{**arguments, "return_dict": False})[0])


def as_one(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Return what a model predicts as one tensor."""
    return torch.stack(result) if isinstance(result, list) else result
