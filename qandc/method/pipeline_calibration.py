"""Calibrate one pipeline: pool, samples, smoothing, quantized weights, ranges, schedule, compensation.

After Q&C (arXiv 2503.02508). What comes of it is a directory: a calibrated model (:mod:`qandc.method.saved`), the
candidate pool and ``report.json``.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qandc.cache import attached_cache, get_cache
from qandc.caching.compensation import FeatureCompensation
from qandc.caching.schedule import CalibratedSchedule
from qandc.errors import ModelError, OutputError
from qandc.evaluation.metrics import psnr
from qandc.method.feature_compensation import fit_feature_compensation
from qandc.method.pool import CandidatePool, record_pool
from qandc.method.saved import PIPELINE_FILES, Preset, check_target, is_finished
from qandc.method.schedule_calibration import calibrate_schedule
from qandc.method.settings import CalibrationConfig
from qandc.method.stages import Stage, StageProgress, quantize_on
from qandc.models import class_conditional
from qandc.quantization.conversion import QuantizationReport, quant_layers, quantization_report
from qandc.sampling.loop import check_sampling, decode_latents, make_scheduler, sample_latents, set_timesteps
from qandc.sampling.pipelines import class_names, fingerprint
from qandc.sampling.trajectories import Trajectory, fit_compensation, record_trajectory
from qandc.support.arguments import Pipeline, check_fields, checked
from qandc.support.files import make_directory, write_json
from qandc.support.results import result_header, versions
from qandc.tap import TapConfig
from qandc.variance_compensation import Compensation

__all__ = ["CalibrationConfig", "CalibrationReport", "calibrate_pipeline", "check_directory"]

logger = logging.getLogger(__name__)

POOL, REPORT = "pool", "report.json"  # of a directory
CLASSES = 10  # the first of the model, in turn
FIRST_SEED = 20_000_000  # far from what anybody draws
POOL_SEED, SCHEDULE_SEED, FEATURES_SEED = (FIRST_SEED + 1_000_000 * k for k in (1, 2, 3))
POOL_BATCH = 10  # images of a shard: at most so many are sampled again after an interruption
FEATURES_BATCH = 10  # images whose features are compared at once
SAMPLES_AT_ONCE = 50  # samples that layers see at once
SCHEDULE_IMAGES = 30
OF_COMPENSATION = ("compensation", "feature_images", "vc", "vc_target", "vc_start", "vc_samples")  # settings
SHOWN_IMAGES = 10  # seeds from 0: those of qandc generate


@dataclass(frozen=True)
class CalibrationReport:
    """Report what came of a calibration.

    Attributes:
        preset: as saved.
        quantization: of all linear layers.
        psnr_uncompensated, psnr_compensated: of images that nothing was calibrated on, to those of full precision,
            ``[10]`` in dB; None without compensation.
    """

    preset: Preset
    quantization: QuantizationReport
    psnr_uncompensated: torch.Tensor
    psnr_compensated: torch.Tensor | None

    def __post_init__(self) -> None:
        check_fields(self)

    @checked
    def record(self, settings: CalibrationConfig, source: str | None) -> dict[str, Any]:
        """Write the calibration as a measured result (:mod:`qandc.support.results`): settings, bytes, likeness."""
        before, after = self.quantization.quantized_bytes
        described = {name: value for name, value in asdict(settings).items() if name not in ("cache", "quant_config")}
        likeness = {"without compensation": self.psnr_uncompensated, "with compensation": self.psnr_compensated}
        row = {
            "layers": len(self.quantization.quantized),
            "quantized_bytes_before": before,
            "quantized_bytes_after": after,
            "computed_steps": sum(self.preset.schedule.schedule),
            "psnr_to_fp": {name: psnrs.tolist() for name, psnrs in likeness.items() if psnrs is not None},
        }
        return {**result_header({**described, "model": source}), "rows": [row], "goals": []}


def check_directory(directory: str | Path, overwrite: bool = False, names: tuple[str, ...] = PIPELINE_FILES) -> None:
    """Refuse, before the work begins, a directory that must not or cannot be written.

    Raises:
        OutputError: it holds a calibrated model and is not to be overwritten, or cannot be written.
    """
    directory = Path(directory)
    try:
        nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise OutputError(f"{str(nearest)!r} is a file; give a directory to write settings to")
        with tempfile.TemporaryFile(dir=nearest):
            pass
        check_target(directory, names, overwrite)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{str(directory)!r} cannot be written ({reason}); give another directory") from None


@checked
def calibrate_pipeline(
    pipe: Pipeline,
    settings: CalibrationConfig,
    directory: str | Path,
    *,
    overwrite: bool = False,
    source: str | None = None,
    pool_directory: str | Path | None = None,
    checkpoint: bool = True,
    progress: StageProgress = lambda stage, completed, total: None,
) -> CalibrationReport:
    """Calibrate a pipeline; write it to a directory that ``from_pretrained`` and ``qandc.load`` read, with a report.

    The candidate pool is kept in ``directory/pool`` as it is recorded, and beside it what the model is quantized with,
    and its schedule. The same call after an interruption goes on with both, as does one with another compensation; one
    with another choice of samples or other bits goes on with the pool.

    Args:
        pipe: a ``DiTPipeline`` in full precision, without a cache. Its transformer is quantized in place.
        settings: of the calibration.
        directory: to write to.
        overwrite: replace a calibrated model in it.
        source: directory or hub id that the pipeline came from, noted in the preset; None for fashion-dit.
        pool_directory: where these are kept instead, for several calibrations to share.
        checkpoint: write the pipeline too, not what was calibrated alone.
        progress: called as ``progress(stage, completed, total)``, first with 0, last with the total.

    Raises:
        OutputError: as :func:`check_directory`; a file cannot be written.
        ModelError: the transformer is quantized or cached already, or cannot be quantized.
        ConfigError: the model or its scheduler cannot be sampled so, or the directory holds another pool.
        DataError: samples or features are NaN, infinite or do not vary.
    """
    directory, model = Path(directory), pipe.transformer
    class_conditional(model)
    check_directory(directory, overwrite)
    if quant_layers(model) or get_cache(model) is not None:
        raise ModelError("the transformer is quantized or has a cache already; load the pipeline anew to calibrate it")
    work = _Calibration(pipe, settings, progress)
    pool_directory = directory / POOL if pool_directory is None else Path(pool_directory)
    pool = work.record_pool(pool_directory)
    quantized = pool_directory / f"quantized-{work.digest()}"
    reference = work.record_reference()
    full = work.draw("full precision")
    if is_finished(quantized):
        before = Preset.load(quantized)
        before.quantize(model)
        schedule = before.schedule
    else:
        work.quantize(pool, work.choose(pool))
        schedule = work.find_schedule()
        work.preset(schedule).save(quantized)
    with attached_cache(model, schedule.config()):
        plain = psnr(work.draw("without compensation"), full)
    features = work.compensate_features(schedule)
    with attached_cache(model, schedule.config(), features):
        compensation, compensated = work.compensate(reference), None
        if features is not None or compensation is not None:
            compensated = psnr(work.draw("with compensation", compensation), full)
    preset = work.preset(schedule, compensation, features=features, source=source)
    report = CalibrationReport(preset, quantization_report(model), plain, compensated)
    make_directory(directory)
    preset.save(directory, pipe if checkpoint else None)
    write_json(directory / REPORT, report.record(settings, source))
    return report


class _Calibration:
    """Do the parts of a calibration, in their order."""

    def __init__(self, pipe: Any, settings: CalibrationConfig, progress: StageProgress) -> None:
        self.pipe, self.settings, self.progress = pipe, settings, progress
        self.model = pipe.transformer
        self.scheduler = make_scheduler(settings.scheduler, pipe.scheduler.config)
        self.classes = tuple(class_names(pipe))[:CLASSES]
        steps, guidance_scale = settings.num_inference_steps, settings.guidance_scale
        check_sampling(self.model, self.scheduler, self.classes, steps, guidance_scale)
        self.run: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}

    def digest(self) -> str:
        """Hash all that decides how the model, in full precision still, is quantized, and about its schedule."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in OF_COMPENSATION}
        version = versions()["qandc-kernels"]
        about = repr((settings, fingerprint(self.model), sorted(self.scheduler.config.items()), version))
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def preset(self, schedule: CalibratedSchedule, compensation: Compensation | None = None, **others: Any) -> Preset:
        return Preset.of(
            self.model,
            self.settings.quant_config,
            schedule,
            compensation,
            scheduler=type(self.scheduler).__name__,
            guidance_scale=self.settings.guidance_scale,
            keep_weights=self.settings.gptq,
            **others,
        )

    def _noise(self, first_seed: int, count: int) -> dict[str, Any]:
        """Return class-balanced class ids with a seed each, as arguments of a run."""
        labels = [self.classes[i % len(self.classes)] for i in range(count)]
        return {"conditions": labels, "seeds": list(range(first_seed, first_seed + count)), **self.run}

    def _stage(self, name: str, images: int) -> Stage:
        return Stage(name, images * self.settings.num_inference_steps, self.progress)

    def record_pool(self, directory: Path) -> CandidatePool:
        count = self.settings.pool_images
        cache = self.settings.cache if self.settings.pool_with_cache else None
        with attached_cache(self.model, cache), self._stage("candidate pool", count) as stage:
            return record_pool(
                self.model,
                self.scheduler,
                batch_size=POOL_BATCH,
                directory=directory,
                callback=stage.step,
                **self._noise(POOL_SEED, count),
            )

    def record_reference(self) -> Trajectory | None:
        count = self.settings.vc_samples
        if self.settings.compensation != "samples":
            return None
        with self._stage("reference", count) as stage:
            return record_trajectory(self.model, self.scheduler, callback=stage.step, **self._noise(FIRST_SEED, count))

    def draw(self, name: str, compensation: Compensation | None = None) -> torch.Tensor:
        """Draw images of noise that nothing was calibrated on."""
        with self._stage(name, SHOWN_IMAGES) as stage:
            latents = sample_latents(
                self.model,
                self.scheduler,
                compensation=compensation,
                callback=stage.step,
                **self._noise(0, SHOWN_IMAGES),
            )
            return decode_latents(self.pipe.vae, latents)

    def choose(self, pool: CandidatePool) -> np.ndarray:
        settings = self.settings
        if settings.samples == len(pool):
            logger.warning("all %d candidates of the pool are taken: there is nothing to choose", len(pool))
        with Stage("choosing samples", 1, self.progress):
            config = TapConfig(settings.clusters)
            return pool.select(settings.samples, config, method=settings.select, seed=settings.seed)

    def quantize(self, pool: CandidatePool, chosen: np.ndarray) -> None:
        settings, model = self.settings, self.model

        def batches() -> Iterator[dict[str, Any]]:
            return pool.batches(chosen, batch_size=SAMPLES_AT_ONCE, device=model.device, dtype=model.dtype)

        quantize_on(
            model,
            batches,
            -(-len(chosen) // SAMPLES_AT_ONCE),
            settings.quant_config,
            self.progress,
            smoothing=settings.smoothing,
            gptq=settings.gptq,
            ranges=settings.ranges,
        )

    def find_schedule(self) -> CalibratedSchedule:
        """Find a schedule of as many compute steps as the uniform one has, where they serve the others best."""
        cache = self.settings.cache
        uniform = cache.of_steps(self.settings.num_inference_steps)
        if self.settings.uniform or all(uniform):
            timesteps = set_timesteps(self.scheduler, self.settings.num_inference_steps)
            return CalibratedSchedule(uniform, timesteps, cache.mode, cache.history - 1)
        with self._stage("schedule", SCHEDULE_IMAGES) as stage:
            return calibrate_schedule(
                self.model,
                self.scheduler,
                mode=cache.mode,
                order=cache.order,
                computed_steps=sum(uniform),
                compensated=self.settings.compensation == "features",
                callback=stage.step,
                **self._noise(SCHEDULE_SEED, SCHEDULE_IMAGES),
            )

    def compensate_features(self, schedule: CalibratedSchedule) -> FeatureCompensation | None:
        """Correct the features that reuse steps take towards those of the same quantized model."""
        count = self.settings.feature_images
        if self.settings.compensation != "features":
            return None
        if all(schedule.schedule):
            logger.warning("every step is computed: nothing is reused whose features could be compensated")
            return None
        with self._stage("features", count) as stage:

            def run() -> None:
                for first in range(0, count, FEATURES_BATCH):
                    noise = self._noise(FEATURES_SEED + first, min(FEATURES_BATCH, count - first))
                    sample_latents(self.model, self.scheduler, callback=stage.step, **noise)

            return fit_feature_compensation(self.model, run, config=schedule.config())

    def compensate(self, reference: Trajectory | None) -> Compensation | None:
        if reference is None:
            return None
        with self._stage("compensation", len(reference.seeds)) as stage:
            return fit_compensation(
                reference,
                self.model,
                self.scheduler,
                form=self.settings.vc or "least_squares",
                target=self.settings.vc_target,
                start_step=self.settings.vc_start,
                callback=stage.step,
            )
