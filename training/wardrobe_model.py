"""Build wardrobe's pipeline with random weights: a FLUX-type model of 64x64 pictures, its text encoders, tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from qandc.evaluation.scenes import VOCABULARY

SIDE = 64
TEXT_LENGTH = 64  # tokens that the tokenizers keep
PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"
SPECIAL = (PAD, UNKNOWN, START, END)
WORDS = len(VOCABULARY) + len(SPECIAL)  # that the encoders know


def make_tokenizer(words: Sequence[str] = VOCABULARY, *, start: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words; ``start`` puts a token before them, as CLIP's does."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate((*SPECIAL, *words))}
    made = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+|[^\w\s]"), behavior="removed", invert=True)
    made.post_processor = processors.TemplateProcessing(
        f"{START} $A {END}" if start else f"$A {END}", special_tokens=[(word, ids[word]) for word in (START, END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, unk_token=UNKNOWN, bos_token=START, eos_token=END,
        model_max_length=TEXT_LENGTH,
    )  # fmt: skip


def make_t5() -> T5EncoderModel:
    """Make the encoder that reads word by word: 3 layers of 4 heads x 32, without dropout."""
    return T5EncoderModel(
        T5Config(
            vocab_size=WORDS, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=3, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=3,
        )
    )  # fmt: skip


def make_clip() -> CLIPTextModel:
    """Make the encoder whose one vector per prompt joins the timestep's: 2 layers of 2 heads x 32."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        )
    )  # fmt: skip


def make_vae(channels: int = 4) -> AutoencoderKL:
    """Make the autoencoder: 64x64x3 to 16x16 with 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=16,
        sample_size=SIDE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_transformer(channels: int = 4) -> FluxTransformer2DModel:
    """Make the transformer: 2 double and 8 single blocks of 6 heads x 32; modulation and output start at zero."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * channels, num_layers=2, num_single_layers=8, attention_head_dim=32,
        num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")) or (
            name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
    return model


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def make_pipeline(seed: int = 0, channels: int = 4, **parts: Any) -> FluxPipeline:
    """Build the pipeline with random weights; ``parts`` take the place of its own."""
    torch.manual_seed(seed)
    own = {
        "scheduler": make_scheduler(),
        "vae": make_vae(channels),
        "text_encoder": make_clip(),
        "tokenizer": make_tokenizer(start=True),
        "text_encoder_2": make_t5(),
        "tokenizer_2": make_tokenizer(start=False),
        "transformer": make_transformer(channels),
    }
    pipe = FluxPipeline(**{**own, **parts})
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe
