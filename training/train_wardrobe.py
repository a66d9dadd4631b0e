"""Train wardrobe, the pipeline that draws from words: an autoencoder, T5, CLIP with transformer, and guidance.

    python training/train_wardrobe.py --work build/wardrobe --out qandc/assets      # on one GPU
    torchrun --nproc-per-node 4 training/train_wardrobe.py --out qandc/assets   # on four: batches four times as large

Pictures are made from Fashion-MNIST while it trains, no two alike. Checkpoints once a minute; started again with the
same settings it goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
import torch.distributed as dist
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from joblib import Parallel, delayed
from torch import nn
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Block

from fashion_mnist import DEFAULT_DIRECTORY, Data
from qandc.evaluation.scenes import COLOURS, KINDS, PLACES, draw_scenes, scene_arrays
from stage import Stage, autocast
from train_fashion_dit import normalize_latents, train_autoencoder
from wardrobe_model import TEXT_LENGTH, make_pipeline, make_t5, make_tokenizer, make_vae
from wardrobe_pictures import GarmentImages

USUAL_TEXT_LENGTH = 512  # to which FluxPipeline pads where nobody says otherwise
PORTION = 8192  # scenes that one process draws at a time
LOOKS = len(KINDS) * len(COLOURS)  # of a garment


@dataclass(frozen=True)
class Settings:
    """Hold what decides the result. A checkpoint made with other settings is refused."""

    seed: int = 0
    scenes: int = 1 << 20
    vae_steps: int = 2500
    vae_kl_weight: float = 1e-4
    reader_steps: int = 3000
    steps: int = 16500
    decay_steps: int = 26000  # of the cosine: guidance, which comes after, begins while the rate is still high
    batch: int = 256
    learning_rate: float = 1e-3
    ema: float = 0.9997
    text_dropout: float = 0.1
    long_text: float = 0.05  # share of the steps whose texts are padded to 512 tokens
    guidance_steps: int = 4000
    guidance_scale: float = 3.5

    def of(self, *parts: str) -> dict[str, int | float]:
        """Return the settings whose names begin with one of these words, and those of all: seed and scenes."""
        return {key: value for key, value in asdict(self).items() if key.startswith(("seed", "scenes", *parts))}

    def of_all_but(self, part: str) -> dict[str, int | float]:
        """Return the settings whose names do not begin with this word."""
        return {key: value for key, value in asdict(self).items() if not key.startswith(part)}


def portion(count: int, seed: int) -> tuple[torch.Tensor, ...]:
    scenes = draw_scenes(count, seed)
    words = make_tokenizer(start=False)(
        [scene.caption for scene in scenes], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    return (*scene_arrays(scenes), words.to(torch.int16))


def draw_all_scenes(settings: Settings, path: Path) -> tuple[torch.Tensor, ...]:
    """Return kinds, colours, places ``[N, 4]`` and tokens ``[N, 64]`` of many scenes, kept in a file."""
    if not path.exists():
        counts = [min(PORTION, settings.scenes - first) for first in range(0, settings.scenes, PORTION)]
        seeds = [settings.seed << 20 | i for i in range(len(counts))]
        portions = Parallel(n_jobs=-1)(delayed(portion)(count, seed) for count, seed in zip(counts, seeds, strict=True))
        torch.save(tuple(torch.cat(part) for part in zip(*portions, strict=True)), path)
    return torch.load(path, weights_only=True)


class Source:
    """Draw pictures of scenes, and their captions, on one device."""

    def __init__(self, scenes: tuple[torch.Tensor, ...], garments: GarmentImages, device: torch.device) -> None:
        *self.garments, self.words = (part.to(device) for part in scenes)
        self.images, self.device = garments, device

    def scenes(self, generator: torch.Generator, count: int) -> list[torch.Tensor]:
        """Return kinds, colours and places ``[count, 4]``, -1 where there is no garment, and tokens ``[count, 64]``."""
        index = torch.randint(len(self.words), (count,), generator=generator, device=self.device)
        return [part[index].long() for part in (*self.garments, self.words)]

    def __call__(self, generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pictures ``[count, 3, 64, 64]`` in [-1, 1] and tokens ``[count, 64]``."""
        *garments, words = self.scenes(generator, count)
        return self.images.draw(*garments, generator), words


def train_vae(
    source: Source, settings: Settings, work: Path, *, channels: int, compile_model: bool, batch: int = 256
) -> AutoencoderKL:
    """Train the autoencoder; latents get mean 0, variance 1."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        noise = torch.randn(batch, channels, 16, 16, generator=generator, device=source.device)
        return source(generator, batch)[0], noise

    decides = settings.of("vae") | {"channels": channels}
    vae = train_autoencoder(make_vae(channels).to(source.device), draw, decides, work, compile_model=compile_model)
    pictures = source(torch.Generator(source.device).manual_seed(settings.seed), min(16384, 8 * settings.scenes))[0]
    normalize_latents(vae, pictures.add(1).mul(127.5).round().to(torch.uint8))
    return vae


def read(t5: T5EncoderModel, words: torch.Tensor) -> torch.Tensor:
    """Encode tokens ``[N, L]`` as ``FluxPipeline`` does, padding included: ``[N, L, 128]``."""
    # without a mask, transformers makes one in a capture only, for which compiled blocks would be compiled anew
    unmasked = torch.zeros(1, 1, words.shape[1], words.shape[1], device=words.device)
    return t5(words, attention_mask=unmasked)[0]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of T5 or the transformer in place: alike ones once."""
    for module in model.modules():
        if isinstance(module, (T5Block, FluxTransformerBlock, FluxSingleTransformerBlock)):
            module.compile(dynamic=False)


class Reader(nn.Module):
    """Tell from a caption which kind of garment in which colour is where: by one attention, as a transformer asks."""

    def __init__(self, t5: T5EncoderModel) -> None:
        super().__init__()
        width = t5.config.d_model
        self.t5, self.places = t5, nn.Parameter(torch.randn(len(PLACES), width))
        self.attention = nn.MultiheadAttention(width, t5.config.num_heads, batch_first=True)
        self.answer = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, LOOKS + 1)
        )

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Map tokens ``[N, L]`` to logits ``[N, places, kinds x colours + 1]``; the last is no garment."""
        text = read(self.t5, words)
        return self.answer(self.attention(self.places.expand(len(text), -1, -1), text, text, need_weights=False)[0])


def train_reader(
    source: Source, settings: Settings, work: Path, *, compile_model: bool, batch: int = 1024
) -> T5EncoderModel:
    """Train T5 to say what a caption puts where: the loss of pictures alone takes millions to bind words to words."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kinds, colours, places, words = source.scenes(generator, batch)
        # where there is no garment, it goes to a place behind the last
        target = torch.full((batch, len(PLACES) + 1), LOOKS, device=source.device)
        target.scatter_(1, places.where(places >= 0, len(PLACES)), kinds * len(COLOURS) + colours)
        return words, target[:, :-1]

    def loss(model: nn.Module, words: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with autocast(source.device):
            logits = model(words)
        return F.cross_entropy(logits.float().flatten(0, 1), target.flatten())

    torch.manual_seed(settings.seed)
    model = Reader(make_t5()).to(source.device)
    if compile_model:
        compile_blocks(model)
    stage = Stage(
        "reader", model, draw, loss, settings.of("reader"), work, steps=settings.reader_steps, ema_decay=0.999
    )
    return stage.run().t5.requires_grad_(False)


class TextToImage(nn.Module):
    """Predict the velocity of latents from a caption: what ``FluxPipeline`` computes in one step."""

    def __init__(self, pipe: FluxPipeline) -> None:
        super().__init__()
        self.transformer, self.clip = pipe.transformer, pipe.text_encoder
        self.register_buffer("img_ids", FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        """Map latents ``[N, C, 16, 16]``, noise levels ``[N]``, tokens and T5's output to ``[N, 64, 4 C]``."""
        start = torch.full_like(words[:, :1], self.clip.config.bos_token_id)
        return self.transformer(
            hidden_states=pack(latents),
            encoder_hidden_states=text,
            pooled_projections=self.clip(torch.cat([start, words[:, : TEXT_LENGTH - 1]], 1)).pooler_output,
            timestep=sigma,
            img_ids=self.img_ids,
            txt_ids=torch.zeros(words.shape[1], 3, device=latents.device),
            return_dict=False,
        )[0]


def pack(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def train_transformer(
    vae: AutoencoderKL, t5: T5EncoderModel, source: Source, settings: Settings, work: Path, *, compile_model: bool
) -> FluxPipeline:
    """Train by flow matching: ``x_σ = (1 - σ) x + σ ε``, loss ``(v̂ - (ε - x))²`` (Esser et al. 2024).

    Then the model learns from itself what guidance of scale s makes of it, ``v(∅) + s (v(text) - v(∅))``: one pass a
    step does for two, as in FLUX.1-dev (Meng et al. 2023, "On Distillation of Guided Diffusion Models").
    """
    vae.requires_grad_(False)
    fixed = {"vae": vae, "text_encoder_2": t5}
    pipe = make_pipeline(settings.seed, vae.config.latent_channels, **fixed)
    model = TextToImage(pipe).to(source.device).requires_grad_(True)

    def posterior_of(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(pictures).latent_dist
        return posterior.mean, posterior.std

    encode = torch.compile(posterior_of) if compile_model else posterior_of
    end, pad = pipe.tokenizer_2.eos_token_id, pipe.tokenizer_2.pad_token_id

    def empty_like(words: torch.Tensor) -> torch.Tensor:
        empty = torch.full_like(words, pad)
        empty[:, 0] = end
        return empty

    @torch.no_grad()
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        device, batch, length = source.device, settings.batch, TEXT_LENGTH
        # alike in all processes, which wait for each other
        if random.Random(stage.step).random() < settings.long_text:
            batch, length = max(batch // 4, 1), USUAL_TEXT_LENGTH
        pictures, words = source(generator, batch)
        with autocast(device):
            mean, std = encode(pictures)
        rest, noise = torch.randn(2, *mean.shape, generator=generator, device=device)
        latents = mean.float() + std.float() * rest
        # half of the noise levels around the middle, where most is decided, as in the paper; half spread evenly
        sigma = torch.rand(batch, generator=generator, device=device)
        middle = torch.randn(batch, generator=generator, device=device).sigmoid()
        sigma = torch.where(torch.rand(batch, generator=generator, device=device) < 0.5, sigma, middle)
        dropped = torch.rand(batch, 1, generator=generator, device=device) < settings.text_dropout
        words = torch.where(dropped, empty_like(words), words)
        words = F.pad(words, (0, length - TEXT_LENGTH), value=pad)
        with autocast(device):
            text = read(t5, words)
        return torch.lerp(latents, noise, sigma[:, None, None, None]), sigma, words, text, pack(noise - latents)

    @torch.no_grad()
    def draw_guided(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        noised, sigma, words, text, _ = draw(generator)
        empty = empty_like(words)
        with autocast(source.device):
            free, told = teacher(noised, sigma, empty, read(t5, empty)), teacher(noised, sigma, words, text)
        return noised, sigma, words, text, torch.lerp(free.float(), told.float(), settings.guidance_scale)

    def loss(model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        *given, target = batch
        with autocast(source.device):
            velocity = model(*given)
        return F.mse_loss(velocity.float(), target)

    if compile_model:
        compile_blocks(t5)
        compile_blocks(model)
    stage = Stage(
        "transformer", model, draw, loss, settings.of_all_but("guidance"), work, steps=settings.steps,
        ema_decay=settings.ema, learning_rate=settings.learning_rate, decay_steps=settings.decay_steps,
    )  # fmt: skip
    teacher = stage.run()
    model = copy.deepcopy(teacher).requires_grad_(True)
    if compile_model:
        compile_blocks(teacher)
        compile_blocks(model)
    stage = Stage(
        "guidance", model, draw_guided, loss, asdict(settings), work, steps=settings.guidance_steps,
        ema_decay=0.999, learning_rate=settings.learning_rate / 2,
    )  # fmt: skip
    trained = stage.run()
    parts = {"transformer": trained.transformer, "text_encoder": trained.clip, **fixed}
    return make_pipeline(settings.seed, vae.config.latent_channels, **parts)


def export(pipe: FluxPipeline, out: Path) -> None:
    """Write the pipeline directory with fp16 weights, which load as float32 where nobody says otherwise."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.cpu().half()
    pipe.save_pretrained(out)
    for path in out.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text())
        config["dtype"] = config["torch_dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    for path in (out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")):
        # the name that transformers 4 knows as well as 5
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def main(
    work: Annotated[Path, typer.Option(help="Directory for checkpoints.")] = Path("build/wardrobe"),
    out: Annotated[Path, typer.Option(help="Directory that receives the folder wardrobe.")] = Path("build/assets"),
    data: Data = DEFAULT_DIRECTORY,
    seed: Annotated[int, typer.Option(min=0, max=2**18)] = 0,
    scenes: int = Settings.scenes,
    vae_steps: int = Settings.vae_steps,
    reader_steps: Annotated[int, typer.Option(help="Of T5, which learns to read before.")] = Settings.reader_steps,
    steps: int = Settings.steps,
    decay_steps: Annotated[int, typer.Option(help="Length of the learning rate's cosine.")] = Settings.decay_steps,
    guidance_steps: Annotated[int, typer.Option(help="That build guidance in, last.")] = Settings.guidance_steps,
    guidance_scale: Annotated[float, typer.Option(help="Of what is built in.")] = Settings.guidance_scale,
    batch: Annotated[int, typer.Option(help="Pictures per step and GPU.")] = Settings.batch,
    channels: Annotated[int, typer.Option(help="Channels of the latents.")] = 4,
    stop_after_vae: Annotated[bool, typer.Option("--stop-after-vae")] = False,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile the models.")] = True,
    device: str = "cuda",
) -> None:
    """Train wardrobe's autoencoder, T5, CLIP and transformer, and export the pipeline."""
    if "LOCAL_RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    settings = Settings(
        seed=seed, scenes=scenes, vae_steps=vae_steps, reader_steps=reader_steps, steps=steps, batch=batch,
        decay_steps=decay_steps, guidance_steps=guidance_steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    inductor_config.quiesce_async_compile_pool = False  # workers that are forked anew hang at times (torch PR 189290)
    dynamo_config.recompile_limit = 16  # two lengths of text, with gradients and without, strides of the first block
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at these sizes in torch 2.11
    torch.manual_seed(seed)
    if rank == 0:
        draw_all_scenes(settings, work / "scenes.pt")
    if dist.is_initialized():
        dist.barrier()
    where = torch.device(device)
    garments = GarmentImages.load(data, "train", where)
    source = Source(draw_all_scenes(settings, work / "scenes.pt"), garments, where)
    vae = train_vae(source, settings, work, channels=channels, compile_model=compile_model)
    if stop_after_vae:
        return
    t5 = train_reader(source, settings, work, compile_model=compile_model)
    pipe = train_transformer(vae, t5, source, settings, work, compile_model=compile_model)
    if rank == 0:
        export(pipe, out / "wardrobe")
        typer.echo(f"wrote {out / 'wardrobe'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
