"""Draw the same noise with the full-precision and with the quantized, cached model: the main job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from qandc.cache import attached_cache
from qandc.caching.schedule import CacheConfig
from qandc.evaluation.metrics import psnr
from qandc.evaluation.pixels import to_uint8
from qandc.method.saved import Preset
from qandc.quantization.conversion import QuantizationReport, quantization_report, quantize_model
from qandc.quantization.observe import smoothing_factors
from qandc.quantizer import QuantConfig
from qandc.sampling.loop import check_sampling, decode_latents, make_scheduler, sample_latents, set_timesteps
from qandc.support.attach import paused
from qandc.support.results import result_header
from qandc.variance_compensation import Compensation

__all__ = [
    "Comparison",
    "GenerateConfig",
    "ModelImages",
    "comparison_record",
    "draw_grid",
    "generate",
    "name_of",
    "quantized_name",
]

IMAGES_AT_ONCE = 32
SMOOTHING_IMAGES, SMOOTHING_STEPS = 10, 10  # of the run that shows the outliers
SMOOTHING_SEED = 20_000_000  # far from what anybody draws


@dataclass(frozen=True)
class GenerateConfig:
    """Say what ``qandc generate`` draws; the functions that use a value validate it."""

    conditions: tuple[int, ...]
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    scheduler: str = "ddpm"
    config: QuantConfig = field(default_factory=QuantConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig("branch", interval=3))
    seed: int = 0
    preset: Preset | None = None
    """Calibrated settings that ``config`` and ``cache`` are of; they add smoothing, ranges, weights, compensations."""
    smoothing: bool = True
    """Move outliers from activations to weights; with a preset, whether that does."""

    def check(self, pipe: Any) -> None:
        """Refuse, before any work, what a pipeline cannot draw so.

        Raises:
            ConfigError, ModelError: as :func:`qandc.sample_latents`; or the cache, or the preset, is for another run.
        """
        scheduler = make_scheduler(self.scheduler, pipe.scheduler.config)
        check_sampling(pipe.transformer, scheduler, self.conditions, self.num_inference_steps, self.guidance_scale)
        if self.preset is not None:
            self.preset.check(pipe.transformer, scheduler, self.num_inference_steps, self.guidance_scale)
        self.cache.check_run(set_timesteps(scheduler, self.num_inference_steps))

    def described(self) -> dict[str, Any]:
        """Return what a record holds of it."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "preset"}
        found |= {"config": asdict(self.config), "cache": str(self.cache)}
        if self.preset is not None:
            compensation = self.preset.compensation
            found["compensation"] = None if compensation is None else compensation.form
            found["features_compensated"] = self.preset.features is not None
        return found


@dataclass
class ModelImages:
    """Hold one model's images, batch by batch as they are finished, and the seconds these took."""

    name: str
    transformer_bytes: int
    batches: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    right: dict[str, float] | None = None
    """Shares of images that a judge found right, in what; None of images that nobody judges."""

    @property
    def images(self) -> torch.Tensor:
        """Return all images, ``[B, C, H, W]`` in [-1, 1]."""
        return torch.cat(self.batches)

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / len(self.images)


@dataclass
class Comparison:
    """Hold the rows in the order they were begun; ``report`` belongs to the quantized one."""

    rows: list[ModelImages] = field(default_factory=list)
    report: QuantizationReport | None = None

    @property
    def speed_ratio(self) -> float:
        """Divide the seconds per image in full precision by those of the quantized model."""
        full, quantized = self.rows
        return full.seconds_per_image / quantized.seconds_per_image

    @property
    def psnr(self) -> torch.Tensor:
        """Compute the PSNR of each quantized image to the one of full precision, in dB."""
        full, quantized = self.rows
        return psnr(quantized.images, full.images)


def module_bytes(module: nn.Module) -> int:
    """Count the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _sample(
    pipe: Any,
    settings: GenerateConfig,
    row: ModelImages,
    progress: Callable[[int], None],
    compensation: Compensation | None = None,
) -> None:
    """Add all images of one model to ``row``, decoding included in the clock."""

    def batch(first: int, steps: int, progress: Callable[[int], None]) -> torch.Tensor:
        labels = settings.conditions[first : first + IMAGES_AT_ONCE]
        latents = sample_latents(
            pipe.transformer,
            make_scheduler(settings.scheduler, pipe.scheduler.config),
            labels,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            seeds=[settings.seed + first + index for index in range(len(labels))],
            callback=lambda step, timestep, latents: progress(len(labels)),
            compensation=compensation if steps == settings.num_inference_steps else None,
        )
        return decode_latents(pipe.vae, latents)

    # outside the clock: compilation and the loading of kernels belong to no image
    with paused(pipe.transformer):  # whose schedule may have another length
        batch(0, 1, lambda done: None)
    for first in range(0, len(settings.conditions), IMAGES_AT_ONCE):
        started = time.perf_counter()
        row.batches.append(batch(first, settings.num_inference_steps, progress))
        row.seconds += time.perf_counter() - started


def _smoothing(pipe: Any, settings: GenerateConfig) -> dict[str, torch.Tensor]:
    """Find smoothing factors on a short run of other noise than that of the images."""
    labels = settings.conditions[:SMOOTHING_IMAGES]

    def run() -> torch.Tensor:
        return sample_latents(
            pipe.transformer,
            make_scheduler(settings.scheduler, pipe.scheduler.config),
            labels,
            num_inference_steps=min(SMOOTHING_STEPS, settings.num_inference_steps),
            guidance_scale=settings.guidance_scale,
            seeds=range(SMOOTHING_SEED, SMOOTHING_SEED + len(labels)),
        )

    return smoothing_factors(pipe.transformer, run, skip_patterns=settings.config.skip_patterns)


def generate(
    pipe: Any,
    settings: GenerateConfig,
    result: Comparison,
    progress: Callable[[str, int], None] = lambda row, done: None,
) -> None:
    """Sample in full precision, quantize ``pipe.transformer`` in place, attach the cache, sample the same noise again.

    Args:
        result: receives rows and images as they are finished, so that an interrupted run keeps them.
        progress: called as ``progress(row name, images denoised by one step)``.

    Raises:
        ConfigError, ModelError: before any work, as :meth:`GenerateConfig.check`.
    """
    settings.check(pipe)
    full = ModelImages("FP", module_bytes(pipe.transformer))
    result.rows.append(full)
    _sample(pipe, settings, full, lambda done: progress(full.name, done))

    preset, config = settings.preset, settings.config
    if preset is None:
        smoothing = _smoothing(pipe, settings) if settings.smoothing and config.a_bits < 16 else None
        quantize_model(pipe.transformer, config.w_bits, config.a_bits, config.skip_patterns, smoothing=smoothing)
    else:
        preset.quantize(pipe.transformer)
    quantized = ModelImages(quantized_name(settings), module_bytes(pipe.transformer))
    result.rows.append(quantized)
    result.report = quantization_report(pipe.transformer)
    compensation, features = (None, None) if preset is None else (preset.compensation, preset.features)
    with attached_cache(pipe.transformer, settings.cache, features):
        _sample(pipe, settings, quantized, lambda done: progress(quantized.name, done), compensation)


def quantized_name(settings: GenerateConfig) -> str:
    """Name the quantized row: "W8A8 + branch cache 3", "W8A8" with no cache, "W8A8 + taylor 17/50 + FC" calibrated."""
    cache = settings.cache
    if settings.preset is not None and cache.schedule is not None:
        computed = f"{sum(cache.schedule)}/{len(cache.schedule)}"
        return f"{settings.config.scheme} + {cache.mode} {computed}{settings.preset.compensations}"
    return name_of(settings.config.scheme, cache)


def name_of(scheme: str, cache: CacheConfig | None) -> str:
    """Name what a model was made: "W8A8 + branch cache 3"."""
    if cache is not None and cache.schedule is not None:
        return f"{scheme} + {cache.mode}, {sum(cache.schedule)} steps"
    every = f" {cache.interval}" if cache is not None and cache.planned else ""
    return scheme + ("" if cache is None or cache.interval == 1 else f" + {cache.mode} cache{every}")


def comparison_record(result: Comparison, settings: Mapping[str, Any], device: str, dtype: str) -> dict[str, Any]:
    """Return the finished comparison as a measured result (:mod:`qandc.support.results`)."""
    assert result.report is not None
    full, quantized = (
        {
            "name": row.name,
            "images": len(row.images),
            "seconds_per_image": row.seconds_per_image,
            "transformer_bytes": row.transformer_bytes,
            **({} if row.right is None else {"right": row.right}),
        }
        for row in result.rows
    )
    layers = result.report.quantized
    before, after = result.report.quantized_bytes
    quantized |= {
        "speed_ratio": result.speed_ratio,
        "psnr_mean": float(result.psnr.mean()),
        "psnr_min": float(result.psnr.min()),
        "layers_quantized": len(layers),
        "quantized_bytes_before": before,
        "quantized_bytes_after": after,
        "kernel": layers[0].kernel,
    }
    header = result_header({**settings, "device": device, "dtype": dtype})
    return {**header, "rows": [full, quantized], "goals": []}


def _wrapped(text: str, fits: Callable[[str], bool], most: int = 4) -> list[str]:
    """Break a text at spaces into lines that fit; what is too long, a word or the last line, ends before it does."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(next(word[:end] for end in range(len(word), -1, -1) if fits(word[:end])))
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]}…"]


def draw_grid(rows: Sequence[ModelImages], column_names: Sequence[str], caption: str) -> Image.Image:
    """Draw one labelled picture: a line of images per row, names of columns above, of rows beside, a caption below.

    Raises:
        DataError: an image contains NaN or inf.
    """
    height, width = rows[0].images.shape[-2:]
    zoom = max(1, round(110 / width))
    cell_h, cell_w, gap = height * zoom, width * zoom, 6
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(measure.textlength(row.name, font)) for row in rows) + 3 * gap
    names = [_wrapped(name, lambda text: measure.textlength(text, small) <= cell_w) for name in column_names]
    line_height, bottom = 16, 30
    top = 12 + line_height * max(1, *map(len, names))
    caption_width = int(measure.textlength(caption, small)) + left + gap
    canvas_size = (
        max(left + len(column_names) * (cell_w + gap), caption_width),
        top + len(rows) * (cell_h + gap) + bottom,
    )
    canvas = Image.new("RGB", canvas_size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(names):
        for i, text in enumerate(lines):
            middle = left + column * (cell_w + gap) + cell_w / 2, top - 6 - line_height * (len(lines) - i - 0.5)
            draw.text(middle, text, "black", small, anchor="mm")
    for line, row in enumerate(rows):
        y = top + line * (cell_h + gap)
        draw.text((left - 2 * gap, y + cell_h / 2), row.name, "black", font, anchor="rm")
        for column, image in enumerate(to_uint8(row.images, f"{row.name}: images")):
            pixels = image.permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            tile = tile.resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (cell_w + gap), y))
    draw.text((left, canvas_size[1] - bottom / 2), caption, "dimgray", small, anchor="lm")
    return canvas
