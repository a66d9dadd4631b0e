"""What the evaluating scripts share: sampling many images of the same noise, and scoring them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fashion_mnist import DEFAULT_DIRECTORY, load_split
from qandc.evaluation.metrics import (
    EfficientNetFeatures,
    FeatureStatistics,
    class_accuracy,
    extract_features,
    frechet_distance,
    inception_score,
    load_fashion_classifier,
    load_statistics,
    psnr,
)
from qandc.sampling.loop import Corrector, decode_latents


@torch.no_grad()
def denoise(
    transformer: Any,
    scheduler: Any,
    labels: torch.Tensor,
    steps: int,
    guidance_scale: float,
    seed: int,
    corrector: Corrector | None = None,
) -> torch.Tensor:
    """As ``qandc.sample_latents``, with one generator for the batch instead of one per image, which is faster."""
    device, config = transformer.device, transformer.config
    generator = torch.Generator(device).manual_seed(seed)
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=generator, device=device)
    both = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)]).to(device)
    scheduler.set_timesteps(steps)
    for step, timestep in enumerate(scheduler.timesteps):
        x = latents.to(transformer.dtype)
        rows = timestep.to(device).expand(len(both))
        noise = transformer(torch.cat([x, x]), timestep=rows, class_labels=both, return_dict=False)[0].float()
        cond, uncond = noise.chunk(2)
        noise = uncond + guidance_scale * (cond - uncond)
        if corrector is not None:
            noise = corrector.noise(step, noise)
        latents = scheduler.step(noise, timestep, latents, generator=generator, return_dict=False)[0]
        if corrector is not None:
            latents = corrector.sample(step, latents)
    return latents


class Sampler:
    """Draws the same ``images``, class-balanced, with any transformer; noise depends on ``first_seed`` alone."""

    def __init__(
        self, vae: Any, scheduler: Any, images: int, batch: int, steps: int, guidance_scale: float, device: str
    ) -> None:
        self.vae, self.scheduler, self.batch = vae, scheduler, batch
        self.steps, self.guidance_scale = steps, guidance_scale
        self.labels = torch.arange(images) % 10
        self.synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def __call__(
        self, transformer: Any, first_seed: int = 0, corrector: Corrector | None = None
    ) -> tuple[torch.Tensor, float]:
        """Images ``[N, 1, H, W]`` in [-1, 1] on the CPU, and seconds per image of all batches but the first."""
        pixels, times = [], []
        for i, part in enumerate(self.labels.split(self.batch)):
            self.synchronize()
            begun = time.perf_counter()
            latents = denoise(
                transformer, self.scheduler, part, self.steps, self.guidance_scale, first_seed + i, corrector
            )
            self.synchronize()
            times.append((time.perf_counter() - begun) / len(part))
            pixels.append(decode_latents(self.vae, latents))
        return torch.cat(pixels), sum(times[1:]) / len(times[1:]) if len(times) > 1 else times[0]


class Judge:
    """Scores images with the shipped classifier, and with EfficientNet-Lite0 if a file of its statistics is named.

    A file that is not there is made from the training images of Fashion-MNIST: seconds on a GPU, half an hour on a CPU.
    """

    def __init__(self, device: str, efficientnet_statistics: Path | None = None) -> None:
        self.classifier, self.train = load_fashion_classifier(device), load_statistics()
        self.second: tuple[torch.nn.Module, FeatureStatistics] | None = None
        if efficientnet_statistics is not None:
            model = EfficientNetFeatures().to(device)
            if not efficientnet_statistics.exists():
                images, _ = load_split(DEFAULT_DIRECTORY, "train")
                FeatureStatistics.of(extract_features(model, images)[0]).save(efficientnet_statistics)
            self.second = model, load_statistics(efficientnet_statistics)

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """Distances to the training images, IS, class accuracy, and PSNR to the ``reference`` images of equal noise."""
        features, logits = extract_features(self.classifier, pixels)
        found = {
            "frechet_distance": frechet_distance(FeatureStatistics.of(features), self.train),
            "inception_score": inception_score(logits),
            "class_accuracy": class_accuracy(logits, labels),
            "psnr_to_fp": float(psnr(pixels, reference).clamp(max=100).mean()),
        }
        if self.second is not None:
            model, train = self.second
            statistics = FeatureStatistics.of(extract_features(model, pixels)[0])
            found["frechet_distance_efficientnet"] = frechet_distance(statistics, train)
        return found
