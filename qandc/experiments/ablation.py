"""Run the ablation of Q&C on a DiT pipeline: seven configurations, the same noise for all, scored and written down.

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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qandc.cache import apply_cache, get_cache, remove_cache
from qandc.errors import ConfigError, DataError, ModelError, ProcessError
from qandc.experiments.generate import module_bytes
from qandc.experiments.many_images import ImageDrawer, describe_pipeline
from qandc.experiments.processes import Processes
from qandc.experiments.scores import Scorer, load_images
from qandc.experiments.shards import ImageSet, delete_shards, draw_shards, merge_shards, missing_shards
from qandc.fusion.fuse import fuse
from qandc.method.pipeline_calibration import StageProgress, calibrate_pipeline
from qandc.method.saved import Preset, is_finished
from qandc.method.settings import CalibrationConfig
from qandc.quantization.conversion import quant_layers
from qandc.sampling.loop import check_sampling, make_scheduler
from qandc.sampling.pipelines import class_names
from qandc.support.files import FileKind, keep_settings, locked, make_directory
from qandc.variance_compensation import Compensation

__all__ = ["ROWS", "ExperimentConfig", "RowKind", "check_experiment", "run_experiment"]

FORMAT_VERSION = 2
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
        images: of each row, the classes of the model in turn.
        calibration: bits, cache, pool, samples; ``select`` is of the rows with TAP, ``vc`` of the one with VC.
            ``compensation`` is that of each row.
        first_seed: of image 0.
        batch_size: images drawn at once.

    Raises:
        ConfigError: fewer than two images; a compensation of no form; a schedule that is not uniform.
    """

    images: int = 160
    calibration: CalibrationConfig = field(default_factory=lambda: CalibrationConfig(uniform=True))
    first_seed: int = 0
    batch_size: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.images, int) or self.images < 2:
            raise ConfigError(f"images is {self.images!r}; give an integer >= 2")
        if self.calibration.vc == "none":
            raise ConfigError("vc is 'none', but one row is with VC; give a form")
        if not self.calibration.uniform:
            raise ConfigError("uniform is False, but the row 'cache only' has a uniform schedule; give True")

    def described(self) -> dict[str, Any]:
        """Return the settings as the file holds them that a resumed run is compared with."""
        calibration = asdict(self.calibration)
        for name in ("cache", "quant_config", "compensation"):  # they follow from the others, or from the row
            calibration.pop(name)
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
        pipe: a ``DiTPipeline`` in full precision, without a cache, on its device. It stays as it is.
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
    work = _Experiment(pipe, settings, directory, scorer, source, processes, progress)
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
    if quant_layers(pipe.transformer) or get_cache(pipe.transformer) is not None:
        raise ModelError("the transformer is quantized or has a cache already; load the pipeline anew")
    calibration = settings.calibration
    scheduler = make_scheduler(calibration.scheduler, pipe.scheduler.config)
    run = calibration.num_inference_steps, calibration.guidance_scale
    check_sampling(pipe.transformer, scheduler, tuple(class_names(pipe)), *run)
    return scheduler


class _Experiment:
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
        self.images = ImageSet(settings.images, tuple(class_names(pipe)), settings.first_seed, settings.batch_size)

    def calibrate(self) -> None:
        """Calibrate with both choices of samples and both compensations, from one pool."""
        tap = self.settings.calibration
        for name, chosen in (
            ("random", replace(tap, select="random", compensation="none")),
            ("tap", replace(tap, compensation="samples")),
            ("tap-features", replace(tap, compensation="features")),
        ):
            if is_finished(self.directory / name):
                continue
            pipe = copy.copy(self.pipe)  # calibration quantizes in place
            pipe.register_modules(transformer=copy.deepcopy(self.pipe.transformer))
            calibrate_pipeline(
                pipe,
                chosen,
                self.directory / name,
                source=self.source,
                pool_directory=self.directory / "pool",
                checkpoint=False,
                progress=lambda stage, done, total, name=name: self.progress(f"{name}: {stage}", done, total),  # type: ignore[misc]
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
        model, compensation = self.model(kind)
        draw = ImageDrawer(self.pipe.vae, model, self.scheduler, self.run, compensation)
        try:
            if missing_shards(shards, self.images):
                draw.warm_up(min(self.images.batch_size, self.images.count))
            draw_shards(shards, self.images, draw, self.processes, self.progress, kind.name, draw.memory)
            return {
                "computed_steps": self.computed_steps(kind),
                "transformer_bytes": module_bytes(model),
            }
        finally:
            if kind.cached:
                remove_cache(model)

    def model(self, kind: RowKind) -> tuple[Any, Compensation | None]:
        """Make the transformer of a row, with its cache attached, and its compensation."""
        model, preset = torch.nn.Module.to(self.pipe.transformer, self.device), None
        if kind.calibration is not None:
            preset = Preset.load(self.directory / kind.calibration)
            model = preset.quantize(copy.deepcopy(model))
            if self.device.type == "cuda":
                torch.nn.Module.to(self.pipe.transformer, "cpu")  # so that it does not count as memory of this row
                fuse(model)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        compensation = features = None
        if preset is not None and kind.compensated:
            compensation, features = preset.compensation, preset.features
        if kind.cached:
            config = self.settings.calibration.cache if preset is None else preset.schedule.config()
            apply_cache(model, config=config, compensation=features)
        return model, compensation

    def computed_steps(self, kind: RowKind) -> int:
        steps = self.settings.calibration.num_inference_steps
        return sum(self.settings.calibration.cache.of_steps(steps)) if kind.cached else steps

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
            "steps": self.settings.calibration.num_inference_steps,
            **record,
            "speed_ratio": full / seconds,
            "images_per_second": 1 / seconds,
        }
