"""Run the ablation of Q&C on a pipeline: seven configurations, the same noise for all, scored and written down.

After Q&C (arXiv 2503.02508, Tables 1 and 4), with compensation of features (FC) beside the paper's of samples (VC).
Rows, in the order they are drawn:

=============== ========= ===== ======================================= ============
row             quantized cache calibrated on                           compensation
=============== ========= ===== ======================================= ============
FP              no        no    nothing                                 no
quant only      yes       no    samples at random                       no
cache only      no        yes   nothing                                 no
Q&C naive       yes       yes   samples at random                       no
Q&C + TAP       yes       yes   samples chosen by TAP                   no
Q&C + TAP + VC  yes       yes   samples chosen by TAP                   of samples
Q&C + TAP + FC  yes       yes   samples chosen by TAP                   of features
=============== ========= ===== ======================================= ============
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from qandc.cache import apply_cache, get_cache, remove_cache
from qandc.caching.compensation import config_for
from qandc.errors import ConfigError, DataError, ModelError, ProcessError
from qandc.experiments.generate import module_bytes
from qandc.experiments.many_images import ImageDrawer, describe_pipeline, memory_of
from qandc.experiments.processes import Processes
from qandc.experiments.prompts import PromptDrawer
from qandc.experiments.scores import Scorer, load_images
from qandc.experiments.shards import ImageSet, delete_shards, draw_shards, merge_shards, missing_shards
from qandc.fusion.fuse import fuse
from qandc.method.feature_compensation import fit_feature_compensation
from qandc.method.pipeline_calibration import FEATURES_SEED, calibrate_pipeline
from qandc.method.prompt_calibration import calibrate_on_prompts, draw_latents
from qandc.method.saved import Preset, is_finished, load, save, schedule_of
from qandc.method.settings import CalibrationConfig
from qandc.method.stages import Stage, StageProgress
from qandc.optimize import optimize, parts_of
from qandc.quantization.conversion import quant_layers
from qandc.sampling.loop import check_sampling, make_scheduler
from qandc.sampling.pipelines import class_names
from qandc.support.arguments import Between, check_value
from qandc.support.files import FileKind, keep_settings, locked, make_directory

__all__ = ["ROWS", "ExperimentConfig", "RowKind", "check_experiment", "run_experiment"]

FORMAT_VERSION = 2
OF_PROMPTS = ("num_inference_steps", "w_bits", "a_bits", "cache_mode", "cache_interval", "pool_images", "samples")
FIGURES = FileKind("record of a row", 1, dict, "delete it and run the same command again", DataError)


@dataclass(frozen=True)
class RowKind:
    """Say what is switched on in a row; ``calibration`` is the directory of its preset."""

    name: str
    calibration: str | None = None
    cached: bool = False
    compensated: bool = False

    @property
    def slug(self) -> str:
        """Return the name as part of a file name."""
        return self.name.lower().replace("&", "").replace(" + ", "-").replace(" ", "-")


ROWS = (
    RowKind("FP"),
    RowKind("quant only", "random"),
    RowKind("cache only", cached=True),
    RowKind("Q&C naive", "random", cached=True),
    RowKind("Q&C + TAP", "tap", cached=True),
    RowKind("Q&C + TAP + VC", "tap", cached=True, compensated=True),
    RowKind("Q&C + TAP + FC", "tap-features", cached=True, compensated=True),
)


@dataclass(frozen=True)
class ExperimentConfig:
    """Hold the settings of an ablation, which compares seven rows.

    Attributes:
        images: of each row, the classes of the model, or the prompts, in turn.
        calibration: bits, cache, pool, samples; ``select`` is of the rows with TAP, ``vc`` of the one with VC.
            ``compensation`` is that of each row. With prompts ``OF_PROMPTS`` of it count.
        first_seed: of image 0.
        batch_size: images of a shard, of classes drawn at once.
        prompts: what a pipeline of another class than ``DiTPipeline`` draws.
        arguments: of each of its calls.

    Raises:
        ConfigError: fewer than two images; a compensation of no form; a schedule that is not uniform.
    """

    images: int = 160
    calibration: CalibrationConfig = field(default_factory=lambda: CalibrationConfig(uniform=True))
    first_seed: int = 0
    batch_size: int = 20
    prompts: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_value("images", Annotated[int, Between(2)], self.images)
        if self.calibration.vc == "none":
            raise ConfigError("vc is 'none', but one row is with VC; give a form")
        if not self.calibration.uniform:
            raise ConfigError("uniform is False, but the row 'cache only' has a uniform schedule; give True")

    def described(self) -> dict[str, Any]:
        """Return the settings as the file holds them that a resumed run is compared with."""
        calibration = asdict(self.calibration)
        for name in ("cache", "quant_config", "compensation"):  # they follow from the others, or from the row
            calibration.pop(name)
        if self.prompts:
            calibration = {name: calibration[name] for name in OF_PROMPTS}
            calibration |= {"prompts": list(self.prompts), "arguments": dict(self.arguments)}
        return {"images": self.images, "first_seed": self.first_seed, "batch_size": self.batch_size, **calibration}


def run_experiment(
    pipe: Any,
    settings: ExperimentConfig,
    directory: str | Path,
    *,
    scorer: Scorer,
    source: str | None = None,
    processes: Processes | None = None,
    progress: StageProgress = lambda stage, completed, total: None,
) -> list[dict[str, Any]]:
    """Calibrate, draw and score the seven rows; go on where an earlier run of the same settings ended.

    Finished calibrations, shards and rows are read, not made again. The directory holds ``experiment.json`` (the
    settings), ``pool/``, ``random/``, ``tap/`` and ``tap-features/`` (presets), and of each row images (``.npz``) and
    figures (``.json``).

    Args:
        pipe: a ``DiTPipeline``, or with prompts another, in full precision, without a cache, on its device. It stays
            as it is.
        settings: of the experiment.
        directory: to write to.
        scorer: of images.
        source: directory or hub id of the pipeline; None for fashion-dit.
        processes: that share the images; all call this function.
        progress: called as ``progress(stage, completed, total)``.

    Returns:
        Rows as dictionaries, in the order of :data:`ROWS`; an empty list in all processes but the first. Times and
        images per second are those of one process.

    Raises:
        ConfigError: the directory holds an experiment with other settings, or the run cannot be sampled so.
        ModelError: the transformer is quantized or has a cache.
        OutputError: another run is writing to the directory, or it cannot be written.
        ProcessError: a process has ended, or was told to.
        DataError: images hold NaN, or a file of an earlier run is damaged.
    """
    directory = Path(directory)
    processes = Processes() if processes is None else processes
    kind_of_work = _PromptExperiment if settings.prompts else _Experiment
    work = kind_of_work(pipe, settings, directory, scorer, source, processes, progress)
    with ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(locked(directory / ".lock"))
            described = {"version": FORMAT_VERSION, **settings.described()}
            described |= {"scorer": scorer.name, "reference": scorer.reference_digest}
            described |= describe_pipeline(pipe, work.scheduler, source)
            keep_settings(directory / "experiment.json", described, "an experiment")
            work.calibrate()
        processes.barrier("calibration")
        stack.callback(torch.nn.Module.to, pipe.transformer, work.device)
        rows = []
        for kind in ROWS:
            work.draw(kind)
            if processes.is_main:
                rows.append(work.score(kind))
        return rows


def check_experiment(pipe: Any, settings: ExperimentConfig) -> Any:
    """Refuse what :func:`run_experiment` cannot run, before anything is written; returns the scheduler.

    Raises:
        ConfigError, ModelError: as there.
    """
    if settings.prompts and len(parts_of(pipe)) > 1:
        raise ConfigError(
            f"{type(pipe).__name__} has {', '.join(parts_of(pipe))}; rows are of one transformer (qandc generate "
            "compares what optimize makes of both)"
        )
    if quant_layers(pipe.transformer) or get_cache(pipe.transformer) is not None:
        raise ModelError("the transformer is quantized or has a cache already; load the pipeline anew")
    if settings.prompts:
        return pipe.scheduler
    calibration = settings.calibration
    scheduler = make_scheduler(calibration.scheduler, pipe.scheduler.config)
    run = calibration.num_inference_steps, calibration.guidance_scale
    check_sampling(pipe.transformer, scheduler, tuple(class_names(pipe)), *run)
    return scheduler


class _Experiment:
    """Calibrate a ``DiTPipeline`` and draw its rows, from class ids."""

    def __init__(
        self,
        pipe: Any,
        settings: ExperimentConfig,
        directory: Path,
        scorer: Scorer,
        source: str | None,
        processes: Processes,
        progress: StageProgress,
    ) -> None:
        self.pipe, self.settings, self.directory, self.scorer = pipe, settings, directory, scorer
        self.source, self.processes, self.progress = source, processes, progress
        self.device = pipe.transformer.device
        self.scheduler = check_experiment(pipe, settings)
        self.run: dict[str, Any] = {
            "num_inference_steps": settings.calibration.num_inference_steps,
            "guidance_scale": settings.calibration.guidance_scale,
        }
        conditions = tuple(range(len(settings.prompts))) or tuple(class_names(pipe))
        self.images = ImageSet(settings.images, conditions, settings.first_seed, settings.batch_size)

    def calibrate(self) -> None:
        """Calibrate with both choices of samples and both compensations, from one pool."""
        tap = self.settings.calibration
        no_vc = replace(tap, compensation="features", vc=None, vc_target="sample", vc_start=0)
        for name, chosen in (
            ("random", replace(no_vc, select="random", compensation="none")),
            ("tap", replace(tap, compensation="samples")),
            ("tap-features", no_vc),
        ):
            if is_finished(self.directory / name):
                continue
            self.calibrate_one(
                chosen,
                self.directory / name,
                lambda stage, done, total, name=name: self.progress(f"{name}: {stage}", done, total),  # type: ignore[misc]
            )

    def pipe_with(self, transformer: Any) -> Any:
        """Return the pipeline with another transformer."""
        pipe = copy.copy(self.pipe)
        pipe.register_modules(transformer=transformer)
        return pipe

    def calibrate_one(self, chosen: CalibrationConfig, path: Path, progress: StageProgress) -> None:
        """Calibrate a copy of the pipeline and save what was found."""
        calibrate_pipeline(
            self.pipe_with(copy.deepcopy(self.pipe.transformer)),
            chosen,
            path,
            source=self.source,
            pool_directory=self.directory / "pool",
            checkpoint=False,
            progress=progress,
        )

    def paths(self, kind: RowKind) -> tuple[Path, Path, Path]:
        """Return the paths of shards, images and figures of a row."""
        return tuple(self.directory / f"{kind.slug}{end}" for end in (".shards", ".npz", ".json"))  # type: ignore[return-value]

    def draw(self, kind: RowKind) -> None:
        """Draw the shards of this process; then the main process joins all shards into one file."""
        shards, images, figures = self.paths(kind)
        done = images.exists() and figures.exists()
        self.processes.barrier("the row before")  # so that all see the same files
        if done:
            self.progress(kind.name, self.settings.images, self.settings.images)
            if self.processes.is_main:
                delete_shards(shards)
            return
        if self.processes.is_main:
            make_directory(shards)
        self.processes.barrier("the folder of shards")
        record = self.draw_shards(kind, shards)
        gc.collect()
        self.processes.barrier(f"row {kind.name!r}")
        if not self.processes.is_main:
            return
        lacking = missing_shards(shards, self.images)
        if lacking:
            raise ProcessError(f"{len(lacking)} shards of row {kind.name!r} are not there; run the same command again")
        measured = merge_shards(shards, self.images, images)
        record["seconds_per_image"] = measured.pop("seconds") / self.settings.images
        record |= {name: int(value) for name, value in measured.items()}
        FIGURES.write(figures, record)
        delete_shards(shards)  # last: until then nothing needs to be drawn again

    def draw_shards(self, kind: RowKind, shards: Path) -> dict[str, Any]:
        """Draw the shards of this process; return figures of the model."""
        draw, model = self.drawer(kind)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            if missing_shards(shards, self.images):
                draw.warm_up(min(self.images.batch_size, self.images.count))
            measure = partial(memory_of, model)
            draw_shards(shards, self.images, draw, self.processes, self.progress, kind.name, measure)
            schedule = self.schedule
            return {
                "computed_steps": sum(schedule) if kind.cached else len(schedule),
                "transformer_bytes": module_bytes(model),
            }
        finally:
            if get_cache(self.pipe.transformer) is not None:
                remove_cache(self.pipe.transformer)

    @property
    def schedule(self) -> tuple[bool, ...]:
        """Return the steps that rows with a cache compute, which are those of all calibrations."""
        found = schedule_of(self.directory / "random")
        assert found is not None
        return found.schedule

    def drawer(self, kind: RowKind) -> tuple[ImageDrawer | PromptDrawer, Any]:
        """Make what draws a row, and its transformer, with its cache attached."""
        model, preset = self.full(kind), None
        if kind.calibration is not None:
            preset = Preset.load(self.directory / kind.calibration)
            model = preset.quantize(copy.deepcopy(model))
            if self.device.type == "cuda":
                torch.nn.Module.to(self.pipe.transformer, "cpu")  # so that it does not count as memory of this row
                fuse(model)
        compensation = features = None
        if preset is not None and kind.compensated:
            compensation, features = preset.compensation, preset.features
        if kind.cached and preset is not None:
            apply_cache(model, config=config_for(preset.schedule, features), compensation=features)
        return ImageDrawer(self.pipe.vae, model, self.scheduler, self.run, compensation), model

    def full(self, kind: RowKind) -> Any:
        """Return the transformer in full precision, with a cache if that is all that a row has."""
        model = torch.nn.Module.to(self.pipe.transformer, self.device)
        if kind.cached and kind.calibration is None:
            apply_cache(model, config=self.settings.calibration.cache)
        return model

    def score(self, kind: RowKind) -> dict[str, Any]:
        """Score a row, once, and return it."""
        _, images, figures = self.paths(kind)
        record = FIGURES.read(figures)
        if "metrics" not in record:
            reference = self.paths(ROWS[0])[1]
            self.progress(f"{kind.name}: metrics", 0, 1)
            record["metrics"] = self.scorer(load_images(images), load_images(reference), self.images.labels)
            FIGURES.write(figures, record)
        self.progress(f"{kind.name}: metrics", 1, 1)
        full = FIGURES.read(self.paths(ROWS[0])[2])["seconds_per_image"]
        seconds = record["seconds_per_image"]
        return {
            "row": kind.name,
            "steps": len(self.schedule),
            **record,
            "speed_ratio": full / seconds,
            "images_per_second": 1 / seconds,
        }


class _PromptExperiment(_Experiment):
    """Calibrate a pipeline that draws from prompts, and draw its rows, as :func:`qandc.optimize` makes them."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Return those of a call of the pipeline."""
        steps = self.settings.calibration.num_inference_steps
        return {**self.settings.arguments, "num_inference_steps": steps}

    def calibrate_one(self, chosen: CalibrationConfig, path: Path, progress: StageProgress) -> None:
        if chosen.compensation == "features":
            return self.compensate_features(chosen.pool_images, path, progress)
        names = ("w_bits", "a_bits", "cache", "pool_images", "samples", "select", "compensation", "gptq", "uniform")
        found = calibrate_on_prompts(
            self.pipe_with(copy.deepcopy(self.pipe.transformer)),
            self.settings.prompts,
            pool_directory=self.directory / "pool",
            progress=progress,
            **{name: getattr(chosen, name) for name in names},
            **self.arguments,
        )
        about = {name: getattr(found, name) for name in ("schedule", "compensation", "features")}
        save(found.model, path, **about)

    def compensate_features(self, images: int, path: Path, progress: StageProgress) -> None:
        """Save the model that has VC with a compensation of features in its place: it is quantized once."""
        found = load(self.directory / "tap", device=self.device, dtype=self.pipe.transformer.dtype)
        pipe, features = self.pipe_with(found.model), None
        assert found.schedule is not None
        if not all(found.schedule.schedule):
            with Stage("features", images, progress) as stage:

                def run() -> None:
                    for number in range(images):
                        draw_latents(pipe, self.settings.prompts, FEATURES_SEED, [number], self.arguments)
                        stage.add(1)

                features = fit_feature_compensation(found.model, run, config=found.schedule.config())
        save(found.model, path, schedule=found.schedule, features=features)

    def drawer(self, kind: RowKind) -> tuple[ImageDrawer | PromptDrawer, Any]:
        pipe, full = copy.copy(self.pipe), self.full(kind)
        if kind.calibration is not None:
            if self.device.type == "cuda":
                torch.nn.Module.to(full, "cpu")
            found = load(self.directory / kind.calibration, device=self.device, dtype=full.dtype)
            if not kind.compensated:
                found = replace(found, compensation=None, features=None)
            if not kind.cached:
                found = replace(found, schedule=None)
            optimize(pipe, calibrated=found, cache=None, restorable=False)
        return PromptDrawer(pipe, self.settings.prompts, self.arguments), pipe.transformer
