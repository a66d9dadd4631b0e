"""Make small pipelines of all that draws from a prompt: tokenizers, text encoders, autoencoder; with transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.tiny_models import make_tiny

__all__ = ["PIPELINES", "draw", "make_pipeline"]

END, PAD = "<end>", "<pad>"
VOCABULARY = 256 + 2
T5 = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY, "d_model": 48}
QWEN = {
    "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCABULARY, "head_dim": 24,
}  # fmt: skip
FLOW, DPM = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"


def tokenizer(longest: int = 600) -> Any:
    """Make a tokenizer whose tokens are the bytes of a text, and one for its end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate((*letters, END, PAD))}
    found = Tokenizer(models.BPE(vocabulary, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, vocabulary[END])])
    made = PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, pad_token=PAD, model_max_length=longest)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def clip(width: int, projection: int | None = None) -> Any:
    """Make a text encoder as CLIP's, with a projection or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=projection or width, eos_token_id=256, bos_token_id=255, pad_token_id=257,
    )  # fmt: skip
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def t5(kind: str = "T5") -> Any:
    import transformers

    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**T5))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**QWEN))


def qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [4, 4, 4]}
    config = Qwen2_5_VLConfig(text_config={**QWEN, "rope_scaling": rope}, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def vae() -> Any:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**kinds, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, shift_factor=0.0)


def causal_vae(name: str) -> Any:
    """Make an autoencoder of videos, whose sides are halved."""
    import diffusers

    return getattr(diffusers, name)(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        **({"scale_factor_spatial": 2, "scale_factor_temporal": 2} if name == "AutoencoderKLWan" else {}),
    )  # fmt: skip


def of_clip_and_t5() -> dict[str, Any]:
    return {"tokenizer": tokenizer(77), "text_encoder": clip(32), "tokenizer_2": tokenizer(), "text_encoder_2": t5()}


def of_sd3() -> dict[str, Any]:
    clips = {"text_encoder": clip(16, 32), "text_encoder_2": clip(16, 32), "text_encoder_3": t5()}
    return {**clips, "tokenizer": tokenizer(77), "tokenizer_2": tokenizer(77), "tokenizer_3": tokenizer()}


def of_one(encoder: Any, decoder: Any = vae) -> dict[str, Any]:
    return {"tokenizer": tokenizer(), "text_encoder": encoder(), "vae": decoder()}


qwen_vae = functools.partial(causal_vae, "AutoencoderKLQwenImage")
wan_vae = functools.partial(causal_vae, "AutoencoderKLWan")

PIPELINES = {  # to transformer, scheduler, a function that makes the other parts, and arguments that keep calls small
    "FluxPipeline": ("FluxTransformer2DModel", FLOW, of_clip_and_t5, {"max_sequence_length": 32}),
    "QwenImagePipeline": (
        "QwenImageTransformer2DModel", FLOW, functools.partial(of_one, qwen_vl, qwen_vae), {"negative_prompt": " "}
    ),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", FLOW, of_sd3, {"max_sequence_length": 32}),
    "PixArtSigmaPipeline": (
        "PixArtTransformer2DModel", DPM, functools.partial(of_one, t5),
        {"use_resolution_binning": False, "clean_caption": False},
    ),
    "ChromaPipeline": ("ChromaTransformer2DModel", FLOW, functools.partial(of_one, t5), {"max_sequence_length": 32}),
    "ZImagePipeline": ("ZImageTransformer2DModel", FLOW, functools.partial(of_one, qwen3), {}),
    "WanPipeline": (
        "WanTransformer3DModel", FLOW, functools.partial(of_one, functools.partial(t5, "UMT5"), wan_vae),
        {"num_frames": 5, "max_sequence_length": 32},
    ),
}  # fmt: skip


def make_pipeline(name: str, **parts: Any) -> Any:
    """Build the small pipeline of a class with random weights; ``parts`` take the place of its own."""
    import diffusers

    transformer, scheduler, others, _ = PIPELINES[name]
    torch.manual_seed(0)
    own = {"transformer": make_tiny(transformer), "scheduler": getattr(diffusers, scheduler)()}
    own = {"vae": vae(), **own, **others(), **parts}
    pipe = getattr(diffusers, name)(**own)
    pipe.set_progress_bar_config(disable=True)
    for part in own.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def draw(pipe: Any, prompt: Any = "a red coat", steps: int = 6, size: int = 16, seed: int = 0, **given: Any) -> Any:
    """Draw from a prompt; returns pixels of images or frames, one tensor."""
    small = PIPELINES[type(pipe).__name__][3]
    made = pipe(
        **{"prompt": prompt, "num_inference_steps": steps, "height": size, "width": size, "output_type": "pt"},
        **{**small, **given},
        generator=torch.Generator().manual_seed(seed),
    )
    return made[0]
