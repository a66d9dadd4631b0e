"""Train fashion-dit, the pipeline that qandc ships: a classifier, an autoencoder, a diffusion transformer.

    python training/train_fashion_dit.py --work build/fashion-dit --out qandc/assets

Every stage saves a checkpoint once a minute; started again with the same settings it goes on where it stopped. All
randomness of a step is drawn from a generator seeded by (seed, stage, step), so a resumed run sees the same batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from fashion_mnist import DEFAULT_DIRECTORY, LABELS, Data, load_split
from qandc.evaluation.compare import ReferenceStatistics
from qandc.evaluation.metrics import FashionClassifier, FeatureStatistics, class_accuracy, extract_features
from qandc.evaluation.pixels import to_float
from stage import Stage, autocast, pick

NUM_CLASSES = 10
NULL_CLASS = 1000  # DiTPipeline always passes this id for the unconditional rows


@dataclass(frozen=True)
class Settings:
    """Hold what decides the result."""

    seed: int = 0
    classifier_steps: int = 3000
    vae_steps: int = 5000
    vae_kl_weight: float = 5e-4
    dit_steps: int = 14000
    dit_batch: int = 1024
    dit_learning_rate: float = 6e-4
    dit_snr_gamma: float = 5.0
    dit_ema: float = 0.9995
    dit_label_dropout: float = 0.1

    def of(self, *stages: str) -> dict[str, int | float]:
        """Return the seed and the settings whose names begin with these words."""
        return {key: value for key, value in asdict(self).items() if key.startswith(("seed", *stages))}


def train_classifier(images: torch.Tensor, labels: torch.Tensor, settings: Settings, work: Path) -> nn.Module:
    device = images.device

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        index = pick(generator, images, 512)
        # shift by up to two pixels: the padding is black, so a roll is a translation
        dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator, device=device).cpu())
        return to_float(images[index]).roll((dy, dx), (2, 3)), labels[index]

    def loss(model: nn.Module, batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return F.cross_entropy(model(batch)[1].float(), targets)

    model = FashionClassifier().to(device)
    kind = {"steps": settings.classifier_steps, "ema_decay": 0.99}
    return Stage("classifier", model, draw, loss, settings.of("classifier"), work, **kind).run()


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_autoencoder(
    model: AutoencoderKL,
    draw: Callable[[torch.Generator], tuple[torch.Tensor, ...]],
    decides: dict[str, int | float],
    work: Path,
    *,
    compile_model: bool,
) -> AutoencoderKL:
    """Train an autoencoder with squared error and a small Kullback-Leibler weight; ``draw`` gives a batch and noise."""
    steps, kl_weight = int(decides["vae_steps"]), decides["vae_kl_weight"]

    def forward(model: AutoencoderKL, batch: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        posterior = model.encode(batch).latent_dist
        latents = posterior.mean + posterior.std * noise
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        return F.mse_loss(model.decode(latents).sample.float(), batch) + kl_weight * kl.float().mean()

    compiled = torch.compile(forward) if compile_model else forward

    def loss(model: nn.Module, batch: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast(batch.device):
            return compiled(model, batch, noise)

    return Stage("vae", model, draw, loss, decides, work, steps=steps, ema_decay=0.999).run()


def train_vae(images: torch.Tensor, settings: Settings, work: Path, *, compile_model: bool) -> AutoencoderKL:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        batch = to_float(images[pick(generator, images, 512)])
        return batch, torch.randn(512, 4, 16, 16, generator=generator, device=images.device)

    return train_autoencoder(make_vae().to(images.device), draw, settings.of("vae"), work, compile_model=compile_model)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute posterior mean and standard deviation of all images, ``[N, C, 16, 16]`` each."""
    posteriors = [vae.encode(to_float(batch)).latent_dist for batch in images.split(1000)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold a per-channel shift and scale into the two 1x1 convolutions, so that latents have mean 0 and variance 1.

    ``DiTPipeline`` knows one scalar ``scaling_factor``; this way it can stay 1.
    """
    mean, std = encode(vae, images)
    shift = mean.mean((0, 2, 3))
    scale = (mean - shift[:, None, None]).square().add(std.square()).mean((0, 2, 3)).sqrt()
    quant, post_quant, channels = vae.quant_conv, vae.post_quant_conv, len(shift)
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ shift
    post_quant.weight *= scale[None, :, None, None]
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()


def make_dit() -> DiTTransformer2DModel:
    """Make a DiT with 12 layers of 6 heads x 32, initialised as in Peebles and Xie 2023 (adaLN-Zero)."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        nn.init.zeros_(table)
        nn.init.normal_(table[:NUM_CLASSES], std=0.02)
        nn.init.normal_(table[NULL_CLASS], std=0.02)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    return model.eval()  # in train mode every block would drop labels on its own


def make_noise_scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def train_dit(
    mean: torch.Tensor, std: torch.Tensor, labels: torch.Tensor, settings: Settings, work: Path, *, compile_model: bool
) -> DiTTransformer2DModel:
    """Train ε-prediction with min-SNR weights (Hang et al. 2023): ``min(SNR, γ)/SNR · (ε̂ - ε)²``."""
    device = mean.device
    alphas_cumprod = make_noise_scheduler().alphas_cumprod.to(device)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp(max=settings.dit_snr_gamma) / snr

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        batch = settings.dit_batch
        index = pick(generator, mean, batch)
        posterior_noise, noise = torch.randn(2, batch, *mean.shape[1:], generator=generator, device=device)
        latents = mean[index] + std[index] * posterior_noise
        timestep = torch.randint(1000, (batch,), generator=generator, device=device)
        dropped = torch.rand(batch, generator=generator, device=device) < settings.dit_label_dropout
        return latents, noise, timestep, labels[index].masked_fill(dropped, NULL_CLASS)

    def loss(
        model: nn.Module, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        signal = alphas_cumprod[timestep][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        with autocast(device):
            prediction = model(noisy, timestep=timestep, class_labels=class_labels, return_dict=False)[0]
        error = (prediction.float() - noise).square().mean((1, 2, 3))
        return (weights[timestep] * error).mean()

    model = make_dit().to(device)
    kind = {"steps": settings.dit_steps, "ema_decay": settings.dit_ema, "learning_rate": settings.dit_learning_rate}
    stage = Stage("dit", model, draw, loss, settings.of("dit", "vae"), work, **kind)
    if compile_model:
        for block in model.transformer_blocks:
            block.compile()
    return stage.run()


def export(vae: AutoencoderKL, dit: DiTTransformer2DModel, out: Path) -> None:
    """Write the pipeline directory with fp16 weights, each file under 16 MB."""
    pipe = DiTPipeline(transformer=dit.cpu().half(), vae=vae.cpu().half(), scheduler=make_noise_scheduler())
    pipe.save_pretrained(out, max_shard_size="12MB")
    index = json.loads((out / "model_index.json").read_text())
    index["id2label"] = {str(i): name for i, name in enumerate(LABELS)}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(
    work: Annotated[Path, typer.Option(help="Directory for checkpoints.")] = Path("build/fashion-dit"),
    out: Annotated[Path, typer.Option(help="Directory that receives the two asset folders.")] = Path("build/assets"),
    data: Data = DEFAULT_DIRECTORY,
    seed: Annotated[int, typer.Option(min=0, max=2**20)] = 0,
    classifier_steps: int = Settings.classifier_steps,
    vae_steps: int = Settings.vae_steps,
    dit_steps: int = Settings.dit_steps,
    dit_batch: int = Settings.dit_batch,
    stop_before_dit: Annotated[bool, typer.Option(help="Train classifier and autoencoder only.")] = False,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile the models.")] = True,
    device: str = "cuda",
) -> None:
    """Train fashion-dit and its classifier on Fashion-MNIST and export them."""
    settings = Settings(
        seed=seed, classifier_steps=classifier_steps, vae_steps=vae_steps, dit_steps=dit_steps, dit_batch=dit_batch
    )
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    images, labels = (x.to(device) for x in load_split(data, "train"))
    test_images, test_labels = (x.to(device) for x in load_split(data, "t10k"))

    classifier = train_classifier(images, labels, settings, work)
    features, _ = extract_features(classifier, images)
    _, logits = extract_features(classifier, test_images)
    typer.echo(f"classifier: test accuracy {class_accuracy(logits, test_labels):.4f}")
    folder = out / "fashion-classifier"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in classifier.state_dict().items()}, folder / "classifier.safetensors")
    ReferenceStatistics(FeatureStatistics.of(features)).save(folder / "train-statistics.npz")

    vae = train_vae(images, settings, work, compile_model=compile_model)
    if stop_before_dit:
        return
    normalize_latents(vae, images)
    mean, std = encode(vae, images)
    dit = train_dit(mean, std, labels, settings, work, compile_model=compile_model)
    export(vae, dit, out / "fashion-dit")
    typer.echo(f"wrote {out / 'fashion-dit'} and {folder}")


if __name__ == "__main__":
    typer.run(main)
