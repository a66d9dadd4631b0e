"""Draw many images of the same noise with variants of fashion-dit, and score them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiTPipeline

from fashion_mnist import DEFAULT_DIRECTORY, load_split
from qandc import fashion_dit_path
from qandc.errors import QandCError
from qandc.evaluation.compare import ReferenceStatistics
from qandc.evaluation.metrics import (
    EfficientNetFeatures,
    FeatureStatistics,
    class_accuracy,
    extract_features,
    fashion_classifier_path,
    frechet_distance,
    inception_score,
    load_fashion_classifier,
    psnr,
)
from qandc.experiments.report import measure_rows
from qandc.sampling.loop import Corrector, decode_latents, make_scheduler
from qandc.support.arguments import regular_expression

Out = Annotated[Path, typer.Option(help="JSON file to write; one that is there is continued.")]
Images = Annotated[int, typer.Option(min=20, help="Samples of a row, class-balanced.")]
Seconds = Annotated[float, typer.Option(help="Begin no row after so long.")]
Only = Annotated[str, typer.Option(help='Measure rows whose "part: name" this regular expression finds.')]
logger = logging.getLogger("training")


class Bench:
    """Hold fashion-dit, and draw the same ``images``, class-balanced, with any transformer.

    The noise of a batch, of the start and of every step, comes from one generator, which is faster than one per image
    and depends on ``first_seed`` alone.

    Args:
        efficientnet: file of EfficientNet-Lite0's statistics of the training images, for a second opinion. One that is
            not there is made: seconds on a GPU, half an hour on a CPU.
    """

    def __init__(
        self,
        device: str,
        images: int,
        batch: int,
        steps: int,
        guidance_scale: float,
        scheduler: str = "ddpm",
        *,
        dtype: torch.dtype | None = None,
        pipeline: Path | None = None,
        efficientnet: Path | None = None,
    ) -> None:
        torch.set_float32_matmul_precision("high")
        self.device, self.batch = device, batch
        self.dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        pipe = DiTPipeline.from_pretrained(pipeline or fashion_dit_path()).to(device)
        self.base, self.vae = pipe.transformer.to(self.dtype).eval(), pipe.vae
        self.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
        self.run: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        self.labels = torch.arange(images) % 10
        self.classifier = load_fashion_classifier(device)
        self.train = ReferenceStatistics.load(fashion_classifier_path() / "train-statistics.npz").features
        self.second: tuple[torch.nn.Module, FeatureStatistics] | None = None
        if efficientnet is not None:
            model = EfficientNetFeatures().to(device)
            if not efficientnet.exists():
                pixels, _ = load_split(DEFAULT_DIRECTORY, "train")
                ReferenceStatistics(FeatureStatistics.of(extract_features(model, pixels)[0])).save(efficientnet)
            self.second = model, ReferenceStatistics.load(efficientnet).features
        self.settings: dict[str, Any] = {
            "images": images,
            "batch": batch,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
            "features": ["fashion-classifier"] + (["EfficientNet-Lite0 at 112 x 112"] if efficientnet else []),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def denoise(
        self, transformer: Any, labels: torch.Tensor, seed: int, corrector: Corrector | None, scheduler: Any
    ) -> torch.Tensor:
        device, config = transformer.device, transformer.config
        generator = torch.Generator(device).manual_seed(seed)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        latents = torch.randn(shape, generator=generator, device=device)
        both = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)]).to(device)
        scheduler.set_timesteps(self.run["num_inference_steps"])
        for step, timestep in enumerate(scheduler.timesteps):
            x = latents.to(transformer.dtype)
            timesteps = timestep.to(device).expand(len(both))
            noise = transformer(torch.cat([x, x]), timestep=timesteps, class_labels=both, return_dict=False)[0].float()
            cond, uncond = noise.chunk(2)
            noise = uncond + self.run["guidance_scale"] * (cond - uncond)
            if corrector is not None:
                noise = corrector.noise(step, noise)
            latents = scheduler.step(noise, timestep, latents, generator=generator, return_dict=False)[0]
            if corrector is not None:
                latents = corrector.sample(step, latents)
        return latents

    def sample(
        self, transformer: Any, first_seed: int = 0, corrector: Corrector | None = None, scheduler: Any = None
    ) -> tuple[torch.Tensor, float]:
        """Draw images ``[N, 1, H, W]`` in [-1, 1] on the CPU; and seconds per image of all batches but the first."""
        pixels, times = [], []
        synchronize = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        for i, part in enumerate(self.labels.split(self.batch)):
            synchronize()
            begun = time.perf_counter()
            latents = self.denoise(transformer, part, first_seed + i, corrector, scheduler or self.scheduler)
            synchronize()
            times.append((time.perf_counter() - begun) / len(part))
            pixels.append(decode_latents(self.vae, latents))
        return torch.cat(pixels), sum(times[1:]) / len(times[1:]) if len(times) > 1 else times[0]

    def score(
        self,
        pixels: torch.Tensor,
        reference: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        second: bool = False,
    ) -> dict[str, float]:
        """Compute distances to the training images, IS, class accuracy, and PSNR to ``reference``, if there is one."""
        features, logits = extract_features(self.classifier, pixels)
        found = {
            "frechet_distance": frechet_distance(FeatureStatistics.of(features), self.train),
            "inception_score": inception_score(logits),
            "class_accuracy": class_accuracy(logits, self.labels if labels is None else labels),
        }
        if reference is not None:
            found["psnr_to_fp"] = float(psnr(pixels, reference).clamp(max=100).mean())
        if second and self.second is not None:
            model, train = self.second
            statistics = FeatureStatistics.of(extract_features(model, pixels)[0])
            found["frechet_distance_efficientnet"] = frechet_distance(statistics, train)
        return found


def measure_chosen(
    out: Path, settings: dict[str, Any], rows: Iterable[dict[str, Any]], measure: Callable[[Any], dict[str, Any]],
    goals: Callable[[list[Any]], list[Any]], only: str, seconds: float,
) -> None:  # fmt: skip
    """Measure some of the rows into one file; a row that fails is logged, and the rest go on."""
    wanted = regular_expression(only, "--only")
    work = [row for row in rows if wanted.search(f"{row['part']}: {row['name']}")]
    failed, started = [], time.perf_counter()
    for number, each in enumerate(work):
        if time.perf_counter() - started > seconds:
            logger.warning("out of time, %d rows are left; the same command goes on", len(work) - number)
            break
        try:
            measure_rows(out, settings, [each], measure, goals=goals)
        except QandCError:
            raise  # what no row can do without
        except Exception:
            logger.exception("%s: %s failed", each["part"], each["name"])
            failed.append(each["name"])
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where no later row would come through either
    if failed:
        logger.error("%d rows failed: %s", len(failed), "; ".join(failed))
        raise typer.Exit(1)


def command(main: Callable[..., None]) -> None:
    """Run a script's ``main`` with options of the command line; each row is told as it is measured."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        typer.run(main)
    except QandCError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
