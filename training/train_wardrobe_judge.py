"""Train the judge of scenes of garments, and score it on pictures of scenes that it has not seen.

    python training/train_wardrobe_judge.py --work build/wardrobe-judge --out qandc/assets/wardrobe-judge

Each picture is drawn anew, of images of the training split; 10,000 pictures of the test split are the score.
A checkpoint is saved once a minute; started again with the same settings it goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import nn

from fashion_mnist import DEFAULT_DIRECTORY, Data
from qandc.evaluation.compare import ReferenceStatistics
from qandc.evaluation.judge import REACH, STRIDE, Judge, compare_scenes
from qandc.evaluation.metrics import FeatureStatistics, extract_features
from qandc.evaluation.scenes import COLOURS, KINDS, SIZE, draw_scenes, scene_arrays
from stage import Stage, autocast
from wardrobe_pictures import GarmentImages

SCENES = 100_000  # layouts, kinds and colours in training; pictures of them are drawn anew
TEST_SCENES = 10_000
TEST_SEED = 1
NOISE = 0.1  # largest standard deviation: what generative models leave


def targets(kinds: torch.Tensor, colours: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make maps ``[B, 16, 16]`` of kinds (the number of kinds where no garment is) and colours (-100 there)."""
    cells = torch.arange(SIZE // STRIDE, device=kinds.device) * STRIDE + STRIDE / 2
    near = (cells - centres[..., None]).abs() < REACH  # [B, garments, 2, cells]
    inside = near[:, :, 1, :, None] & near[:, :, 0, None, :]
    kinds, colours = ((x.long() + 1)[..., None, None] * inside for x in (kinds, colours))  # no two share a cell
    found, shade = kinds.sum(1) - 1, colours.sum(1) - 1
    return found.masked_fill(found < 0, len(KINDS)), shade.masked_fill(found < 0, -100)


def disturb(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur half of the pictures and add noise to half, as much as chance wants."""
    device = pictures.device
    blur, noise = torch.rand(2, len(pictures), 1, 1, 1, generator=generator, device=device)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = torch.lerp(pictures, soft, (2 * blur - 1).clamp(min=0))  # half of them stay sharp
    scale = NOISE * (2 * noise - 1).clamp(min=0)
    return (pictures + scale * torch.randn(pictures.shape, generator=generator, device=device)).clamp(-1, 1)


def train(garments: GarmentImages, seed: int, steps: int, batch: int, work: Path) -> Judge:
    device = garments.device
    scenes = [array.to(device) for array in scene_arrays(draw_scenes(SCENES, seed))]

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        index = torch.randint(SCENES, (batch,), generator=generator, device=device)
        kinds, colours, places = (array[index] for array in scenes)
        pictures, centres = garments.draw_with_centres(kinds, colours, places, generator)
        pictures = disturb(pictures, generator).contiguous(memory_format=torch.channels_last)
        return pictures, *targets(kinds, colours, centres)

    def loss(model: nn.Module, pictures: torch.Tensor, kinds: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            logits = model(pictures)[1]
        found, shade = logits.float().split((len(KINDS) + 1, len(COLOURS)), 1)
        return F.cross_entropy(found, kinds) + 0.1 * F.cross_entropy(shade, colours, ignore_index=-100)

    torch.manual_seed(seed)
    settings = {"seed": seed, "steps": steps, "batch": batch}
    return Stage("judge", Judge().to(device), draw, loss, settings, work, steps=steps, ema_decay=0.999).run()


def draw_pictures(garments: GarmentImages, count: int, seed: int) -> tuple[list, torch.Tensor]:
    """Draw scenes and one picture of each, on the CPU."""
    scenes = draw_scenes(count, seed)
    generator = torch.Generator(garments.device).manual_seed(seed)
    arrays = [array.to(garments.device).split(500) for array in scene_arrays(scenes)]
    return scenes, torch.cat([garments.draw(*batch, generator).cpu() for batch in zip(*arrays, strict=True)])


def score(judge: Judge, garments: GarmentImages, count: int) -> dict[str, object]:
    """Score the judge on pictures of real garments, whose places it is asked for."""
    scenes, pictures = draw_pictures(garments, count, TEST_SEED)
    found = judge.find_garments(pictures)
    there, recalled, coloured = Counter(), Counter(), 0
    for scene, seen in zip(scenes, found, strict=True):
        at = {garment.place: garment for garment in seen}
        for garment in scene.garments:
            there[garment.kind] += 1
            hit = at.get(garment.place)
            if hit is not None and hit.kind == garment.kind:
                recalled[garment.kind] += 1
                coloured += hit.colour == garment.colour
    return {
        "pictures": count,
        "kind_recall": {kind: recalled[kind] / max(there[kind], 1) for kind in KINDS},
        "colour_accuracy": coloured / max(recalled.total(), 1),
        **compare_scenes(found, [scene.garments for scene in scenes]).shares(),
    }


def main(
    work: Annotated[Path, typer.Option(help="Directory for the checkpoint.")] = Path("build/wardrobe-judge"),
    out: Annotated[Path, typer.Option(help="Directory that receives the judge.")] = Path("build/assets/wardrobe-judge"),
    data: Data = DEFAULT_DIRECTORY,
    seed: Annotated[int, typer.Option(min=0, max=2**20)] = 0,
    steps: int = 6000,
    batch: int = 512,
    test_scenes: int = TEST_SCENES,
    device: str = "cuda",
) -> None:
    """Train the judge, score it on test images, and write judge.safetensors, statistics.npz and score.json."""
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    garments = GarmentImages.load(data, "train", device)
    typer.echo(f"{len(garments.cloth)} images of garments, {time.monotonic() - started:.0f} s")
    judge = train(garments, seed, steps, batch, work)
    # what is scored is what is shipped
    weights = {k: v.half() if v.ndim == 4 else v for k, v in judge.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, out / "judge.safetensors")
    judge = Judge.load(out / "judge.safetensors", device)
    features, _ = extract_features(judge, draw_pictures(garments, test_scenes, TEST_SEED)[1])
    ReferenceStatistics(FeatureStatistics.of(features), extractor="wardrobe-judge").save(out / "statistics.npz")
    result = score(judge, GarmentImages.load(data, "t10k", device), test_scenes)
    result |= {"seed": seed, "steps": steps, "seconds": round(time.monotonic() - started)}
    (out / "score.json").write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
