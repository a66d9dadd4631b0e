"""Save and load calibrated models: one directory, which diffusers reads too.

::

    qandc.json            what was calibrated for what, and size and SHA-256 of every other file
    qandc.safetensors     compensations, ranges per step; ranges, smoothing, GPTQ's weights where no model is there
    model_index.json, transformer/, vae/, scheduler/       as DiTPipeline.save_pretrained writes them   ┐ one of them,
    config.json, diffusion_pytorch_model.safetensors       as the model's save_pretrained writes them   ┘ or neither

``qandc.json`` goes first and comes back last: with it the others belong together. No file holds code or absolute paths.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import nn

from qandc.caching.compensation import FeatureCompensation, FeatureHeader, config_for
from qandc.caching.schedule import CalibratedSchedule
from qandc.errors import ConfigError, DataError, ModelError, OutputError
from qandc.quantization.conversion import quant_layers, quantize_model
from qandc.quantization.linear import OPTIONAL_BUFFERS, QUANTIZED_BUFFERS, skeleton_layer
from qandc.quantization.plan import assign, resolved
from qandc.quantization.ranges import StepRanges, check_range_values, check_step_ranges
from qandc.quantizer import QuantConfig, check_bits, fault_of_divisors
from qandc.sampling.loop import SCHEDULERS, Guidance, set_timesteps
from qandc.sampling.pipelines import ASSETS, DTYPES, EMBEDDED, load_pipeline, resolve_device
from qandc.support.arguments import Pipeline, Scheduler, Steps, check_fields, checked
from qandc.support.attach import original_class
from qandc.support.files import (
    FileEntry,
    FileKind,
    content_digest,
    read_json,
    reading,
    regular_size,
    settle,
    usual_mode,
)
from qandc.variance_compensation import Compensation, CompensationHeader, shown
from qandc_kernels import FLOAT_DTYPES

__all__ = [
    "CalibratedModel",
    "Preset",
    "check_target",
    "fashion_dit_preset",
    "is_finished",
    "load",
    "pipeline_of",
    "save",
    "schedule_of",
    "shipped_likeness",
    "shipped_settings",
]

logger = logging.getLogger(__name__)

MANIFEST, TENSORS = "qandc.json", "qandc.safetensors"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # names of diffusers
TRANSFORMER = "transformer/"
PIPELINE_FILES = (
    "model_index.json",
    f"{TRANSFORMER}{CONFIG}",
    f"{TRANSFORMER}{WEIGHTS}",
    f"vae/{CONFIG}",
    f"vae/{WEIGHTS}",
    "scheduler/scheduler_config.json",
)
MODEL_FILES = (CONFIG, WEIGHTS)
READ_INSTEAD = (f"{WEIGHTS}.index.json", "diffusion_pytorch_model.bin")  # what diffusers would read, were they there
OLDER = ("preset.json", "quantized.json")
STRUCTURE = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size")
SINGLE = "num_single_layers"  # of the structure of models with blocks of two kinds
WEIGHT_BUFFERS = ("qweight", "weight_scale", "weight_sum")
KEPT = (*WEIGHT_BUFFERS, *OPTIONAL_BUFFERS)


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Say how the full-precision model becomes the calibrated one, and which runs that is for."""

    quantization: QuantConfig
    structure: dict[str, int | None]
    scheduler: str
    guidance_scale: float
    hub: str | None = None  # id of the full-precision pipeline, if it is there, or name of an embedded one
    path: str | None = None  # from this directory to that pipeline's; fashion-dit if there is neither


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Hold the content of ``qandc.json``."""

    files: dict[str, FileEntry]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the model, if one is there
    calibration: Calibration | None = None
    schedule: CalibratedSchedule | None = None
    compensation: CompensationHeader | None = None
    features: FeatureHeader | None = None


WHAT, AGAIN = "calibrated model", "make it again (qandc calibrate, or qandc.save)"
FILE = FileKind(WHAT, 1, Manifest, AGAIN)
TENSOR_FILE = FileKind(f"part of a {WHAT}", 1, dict, AGAIN)


LIKENESS = "likeness.json"  # beside shipped settings, of many images drawn with them


def shipped_settings(name: str, w_bits: int) -> Path:
    """Return the directory of the settings that come with an embedded pipeline for W8A8 or W4A8."""
    return ASSETS / f"{name}-presets" / f"w{w_bits}a8"


def shipped_likeness(directory: Path) -> dict[str, Any] | None:
    """Read how many images were drawn with shipped settings, and their PSNR; None of other settings."""
    path = directory.parent / LIKENESS
    if directory.parent.parent != ASSETS or not path.exists():
        return None
    return dict(read_json(path, "measured likeness", "install qandc again")[directory.name])


@checked
def fashion_dit_preset(w_bits: int = 8) -> Preset:
    """Load the settings that come with the embedded model: 50 DDPM steps, guidance 1.5, W8A8 or W4A8."""
    check_bits(w_bits, 8)
    return Preset.load(shipped_settings("fashion-dit", w_bits))


def is_finished(directory: str | Path) -> bool:
    """Tell whether a directory holds a calibrated model; ``qandc.json`` is written last."""
    return (Path(directory) / MANIFEST).exists()


def pipeline_of(directory: str | Path) -> str | None:
    """Return the hub id, or name of an embedded pipeline, that settings are for; None if they name none so.

    Raises:
        ConfigError: there are no settings, or of another version.
    """
    about = _manifest(Path(directory)).calibration
    return None if about is None else about.hub


def schedule_of(directory: str | Path) -> CalibratedSchedule | None:
    """Return the schedule that a calibrated model was saved with; no weights are read.

    Raises:
        ConfigError: there is no such model, or of another version.
    """
    return _manifest(Path(directory)).schedule


def _manifest(directory: Path) -> Manifest:
    if not is_finished(directory):
        raise ConfigError(f"{str(directory)!r} holds no calibrated model: {_what_is_there(directory)}")
    return FILE.read(directory / MANIFEST)


@dataclass(frozen=True)
class Preset:
    """Hold what a quantized, cached model needs beside its full-precision weights.

    Attributes:
        config: bits, layers left out, how weights are clipped.
        layers: ``<layer>.<buffer>``, as a state dict of the quantized model names them: ``act_scale`` and
            ``act_zero_point`` of static ranges, ``smoothing``; and ``qweight``, ``weight_scale``, ``weight_sum`` of
            every layer if rounding to nearest would not make them again.
        schedule: of the feature cache.
        compensation: of samples, fitted for the model with these ranges and this cache, or None.
        features: compensation of what this cache reuses, fitted for the model with these ranges, or None.
        scheduler, guidance_scale: of the runs they are for; the steps are those of the schedule.
        structure: numbers of the model's config that say what its layers are.
        model: where the pipeline came from: a directory, hub id or name of an embedded pipeline, None for fashion-dit.
    """

    config: QuantConfig
    layers: dict[str, torch.Tensor]
    schedule: CalibratedSchedule
    compensation: Compensation | None
    scheduler: str
    guidance_scale: Guidance
    structure: dict[str, int | None]
    model: str | None = None
    features: FeatureCompensation | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.features is not None:
            self.features.check(config_for(self.schedule, self.features))
        object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        if self.structure.keys() - {SINGLE} != set(STRUCTURE):
            raise ConfigError(f"structure has {sorted(self.structure)}; it must have {', '.join(STRUCTURE)}")
        strangers = [name for name in self.layers if name.rpartition(".")[2] not in KEPT]
        if strangers:
            raise DataError(f"{strangers[0]!r} is nothing that settings of a quantized layer hold")
        check_range_values(self.buffers("act_scale"), self.buffers("act_zero_point"), (), "the range")
        for name, factors in self.buffers("smoothing").items():
            if factors.dtype != torch.float32 or fault_of_divisors(factors) is not None:
                raise DataError(f"the smoothing of {name} must be finite float32 numbers > 0 with such reciprocals")

    @checked
    def buffers(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors that layers have under this name, by layer."""
        return {key.removesuffix(f".{name}"): t for key, t in self.layers.items() if key.endswith(f".{name}")}

    @classmethod
    @checked
    def of(
        cls,
        model: nn.Module,
        config: QuantConfig,
        schedule: CalibratedSchedule,
        compensation: Compensation | None,
        *,
        features: FeatureCompensation | None = None,
        scheduler: str | None = None,
        guidance_scale: Guidance | None = None,
        keep_weights: bool = False,
        source: str | None = None,
    ) -> Preset:
        """Make a preset of the ranges of a calibrated model, and of the rest as given.

        Args:
            features: compensation of what the cache reuses.
            scheduler, guidance_scale: of the runs, the scheduler by its class name; by default those that the
                compensation of samples was fitted for.
            keep_weights: keep the quantized weights too. Those rounded with Hessians need it: they cannot be made again
                without the samples.
            source: directory, hub id or name of the pipeline, None for fashion-dit.

        Raises:
            ConfigError: neither a compensation of samples nor scheduler and guidance are given; or ``features`` are for
                another cache than the schedule's.
        """
        if compensation is not None:
            scheduler = compensation.fitted_for.scheduler if scheduler is None else scheduler
            guidance_scale = compensation.fitted_for.guidance_scale if guidance_scale is None else guidance_scale
        if scheduler is None or guidance_scale is None:
            raise ConfigError(
                "settings without compensation of samples need the scheduler and guidance_scale they are for"
            )
        kept = (*OPTIONAL_BUFFERS, *(WEIGHT_BUFFERS if keep_weights else ()))
        layers = {
            f"{name}.{buffer}": tensor
            for name, layer in quant_layers(model).items()
            for buffer in kept
            if (tensor := getattr(layer, buffer)) is not None
        }
        about = resolved(model, config), layers, schedule, compensation
        return cls(*about, scheduler, guidance_scale, _structure(model), source, features)

    @property
    def num_inference_steps(self) -> int:
        """Count the steps of the runs that these settings are for."""
        return len(self.schedule.schedule)

    @property
    def scheduler_name(self) -> str:
        """Name the scheduler as :func:`qandc.make_scheduler` takes it; by its class if that knows none."""
        return {known: name for name, known in SCHEDULERS.items()}.get(self.scheduler, self.scheduler)

    @property
    def compensations(self) -> str:
        """Name what is compensated, as the names of rows do: " + FC" (features), " + VC" (samples), both or nothing."""
        return " + FC" * (self.features is not None) + " + VC" * (self.compensation is not None)

    def digest(self) -> str:
        """Hash all tensors, the schedule and what runs they are for: equal for equal settings alone."""
        tensors, about = _stored(self.compensation, self.features)
        of_runs = self.config, self.schedule, self.scheduler, self.guidance_scale
        body = msgspec.json.encode((*of_runs, about["compensation"]))  # features are told by their tensors: the cache
        return content_digest(body, {**self.layers, **tensors})[:16]  # that they are for is the schedule's

    @checked
    def base_model(self, given: str | None = None) -> str | None:
        """Choose what :func:`qandc.load_pipeline` takes: ``given``, or what the settings name, which is then logged."""
        if given is not None or self.model is None:
            return given
        is_here = self.model in EMBEDDED or Path(self.model).is_dir()
        level = logging.INFO if is_here else logging.WARNING  # what the hub sends is another's
        logger.log(level, "the calibrated settings are for %s, which is loaded", self.model)
        return self.model

    @checked
    def check(
        self, transformer: nn.Module, scheduler: Scheduler, num_inference_steps: Steps, guidance_scale: Guidance
    ) -> None:
        """Refuse, before any work, a model or a run that these settings are not for.

        Raises:
            ModelError: the model has another structure.
            ConfigError: another scheduler, other timesteps or guidance.
        """
        self._check_structure(transformer)
        timesteps = set_timesteps(scheduler, num_inference_steps)
        for name, ours, theirs in (
            ("scheduler", self.scheduler, type(scheduler).__name__),
            ("num_inference_steps", self.num_inference_steps, num_inference_steps),
            ("guidance_scale", self.guidance_scale, float(guidance_scale)),
            ("timesteps", self.schedule.timesteps, timesteps),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"these settings were made for {name} {shown(ours)}; this run has {shown(theirs)} (calibrate for "
                    "this run)"
                )

    def _check_structure(self, model: Any) -> None:
        for name, number in _structure(model).items():
            ours = self.structure.get(name)
            if number != ours:
                raise ModelError(
                    f"these settings are of another model: they were made for {name} {ours}, this one has {number} "
                    "(give the model they were made for, or calibrate this one)"
                )

    @checked
    def quantize(self, model: nn.Module) -> Any:
        """Quantize a full-precision model with these settings, static ranges included; kept weights come as they were.

        Raises:
            ModelError: the model has another structure than the one these settings were made for. It is unchanged then.
        """
        self._check_structure(model)
        self._check_layers(model)
        config, weights = self.config, self.buffers("qweight")
        clip = "max" if weights else config.weight_clip  # kept weights take the place of what is rounded here
        quantize_model(
            model,
            config.w_bits,
            config.a_bits,
            config.skip_patterns,
            conditioning=config.conditioning,
            weight_clip=clip,
            smoothing=self.buffers("smoothing"),
        )
        for name, layer in quant_layers(model).items():
            names = {key: f"{name}.{key}" for key in KEPT}
            kept = {key: self.layers[full] for key, full in names.items() if full in self.layers}
            layer.load_state_dict({**{key: getattr(layer, key) for key in WEIGHT_BUFFERS}, **kept}, strict=False)
        return model

    def _check_layers(self, model: nn.Module) -> None:
        """Refuse ranges, smoothing and weights that the layers to be quantized do not take."""
        bits = assign(model, self.config).bits
        strangers = {name.rpartition(".")[0] for name in self.layers} - bits.keys()
        if strangers:
            raise ModelError(f"these settings are of another model: it has no quantized layer {min(strangers)!r}")
        for name, scheme in bits.items():
            linear: Any = model.get_submodule(name)
            sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
            layer = skeleton_layer(*sizes, bias=False, bits=scheme, dtype=dtype)
            for buffer in KEPT:
                kept = self.layers.get(f"{name}.{buffer}")
                if kept is None and (buffer in OPTIONAL_BUFFERS or not self.buffers("qweight")):
                    continue
                fault = ("missing", "there") if kept is None else layer.fault_of(buffer, kept)
                if fault is not None:
                    raise ModelError(
                        f"these settings are of another model: {name}.{buffer} is {fault[0]}; it must be {fault[1]}"
                    )

    @checked
    def save(self, directory: str | Path, pipe: Annotated[Any, Pipeline | None] = None) -> None:
        """Write a directory; what was calibrated there before is replaced.

        Args:
            directory: made with its parents, if it is not there.
            pipe: with the quantized transformer: written too, so that ``DiTPipeline.from_pretrained`` loads it.

        Raises:
            ModelError: the transformer of ``pipe`` is not quantized.
            OutputError: a file cannot be written, or would replace one that is no part of a calibrated model.
        """
        directory = Path(directory)
        if pipe is not None:
            _check_savable(pipe.transformer)
        base = {} if self.model is None else {"hub": self.model}
        if self.model is not None and Path(self.model).is_absolute():
            base = {"path": os.path.relpath(self.model, directory.absolute())}
        _write(
            directory,
            None if pipe is None else functools.partial(_write_pipeline, pipe),
            {} if pipe is not None else {f"layers.{name}": tensor for name, tensor in self.layers.items()},
            dtype=None if pipe is None else str(pipe.transformer.dtype).removeprefix("torch."),
            calibration=Calibration(self.config, self.structure, self.scheduler, self.guidance_scale, **base),
            schedule=self.schedule,
            compensation=self.compensation,
            features=self.features,
        )

    @classmethod
    @checked
    def load(cls, directory: str | Path) -> Preset:
        """Read the settings that :meth:`save` wrote.

        Raises:
            ConfigError: a file is missing, damaged or not of this version; or it is a model without settings.
            DataError: values that are none of settings.
        """
        return cls._of(_Directory(Path(directory)))

    @classmethod
    def _of(cls, found: _Directory) -> Preset:
        directory, about, schedule = found.directory, found.manifest.calibration, found.manifest.schedule
        if about is None or schedule is None:
            raise ConfigError(
                f"{str(directory)!r} holds a quantized model, but no settings for runs; give its pipeline too "
                "(--model PIPELINE --calibrated DIR), or make it with qandc calibrate"
            )
        layers = found.tensors("layers.")
        if found.model_prefix is not None:
            state = TENSOR_FILE.read_foreign_tensors(directory / found.model_prefix / WEIGHTS)[0]
            layers = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] in KEPT}
        model = about.hub if about.path is None else os.path.normpath(directory.absolute() / about.path)
        with reading(directory / MANIFEST, WHAT, AGAIN):
            of_runs = about.scheduler, about.guidance_scale, about.structure
            return cls(about.quantization, layers, schedule, found.compensation(), *of_runs, model, found.features())


def _structure(model: Any) -> dict[str, int | None]:
    config = getattr(model, "config", None)
    missing = [name for name in STRUCTURE if not hasattr(config, name)]
    if missing:
        raise ModelError(
            f"settings without a model are for those whose config has {', '.join(STRUCTURE)}; {type(model).__name__} "
            f"has no {missing[0]} (qandc.save writes any model)"
        )
    return {name: getattr(config, name) for name in (*STRUCTURE, SINGLE) if hasattr(config, name)}


@dataclass(frozen=True)
class CalibratedModel:
    """Hold a calibrated model as :func:`load` returns it.

    Attributes:
        model: the quantized transformer, in eval mode.
        schedule: for ``apply_cache(model, config=schedule.config())``, or None.
        compensation: of samples, for ``sample_latents`` and ``compensated_scheduler``, or None.
        step_ranges: for ``fuse_dit(model, step_ranges=...)``, or None.
        features: for ``apply_cache(model, compensation=features)``, which takes the schedule from there, or None.
    """

    model: nn.Module
    schedule: CalibratedSchedule | None = None
    compensation: Compensation | None = None
    step_ranges: StepRanges | None = None
    features: FeatureCompensation | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def save(
    model: nn.Module,
    directory: str | Path,
    *,
    overwrite: bool = False,
    schedule: CalibratedSchedule | None = None,
    compensation: Compensation | None = None,
    step_ranges: StepRanges | None = None,
    features: FeatureCompensation | None = None,
) -> None:
    """Write a quantized transformer, and what it is to be run with, into one directory.

    The model is saved as ``quantize_model`` and ``calibrate`` left it: hooks, an attached cache and fusion stay in
    place and are not saved; give the schedule and the step ranges to keep them. Files appear under their names once all
    are written.

    Args:
        model: a model of diffusers that :func:`qandc.quantize_model` has converted.
        directory: made anew, with its parents.
        overwrite: replace the calibrated model that is there.
        schedule, compensation, step_ranges, features: stored beside the model, returned by :func:`load`.

    Raises:
        ModelError: no model of diffusers, not quantized, without values, or not what its config builds (LoRA,
            parametrizations).
        ConfigError: the step ranges are not of this model, or the features of another cache than the schedule's.
        OutputError: the directory holds a calibrated model, or other files of these names, or cannot be written.
    """
    directory = Path(directory)
    check_target(directory, MODEL_FILES, overwrite)
    _check_savable(model)
    if step_ranges is not None:
        check_step_ranges(step_ranges, quant_layers(model))
    if features is not None and schedule is not None:
        features.check(config_for(schedule, features))
    _write(
        directory,
        functools.partial(_write_model, model),
        {} if step_ranges is None else _flat(step_ranges),
        dtype=str(model.dtype).removeprefix("torch."),
        schedule=schedule,
        compensation=compensation,
        features=features,
    )


@checked
def load(
    directory: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    base: Annotated[Any, nn.Module | None] = None,
) -> CalibratedModel:
    """Read a calibrated model: what :func:`save` or ``qandc calibrate`` wrote.

    Settings without a model (as those that come with fashion-dit) quantize the full-precision model that they name.

    Args:
        directory: to read from.
        device: where the model goes.
        dtype: float16, bfloat16 or float32 for all that is not quantized, by default as saved. Scales stay float32.
        base: the full-precision model that settings without a model quantize in place; by default that of the pipeline
            that they name, which is loaded. A model that is saved whole only has to be of the same class.

    Returns:
        The model, which computes bit for bit what the saved one does, with schedule, compensations and step ranges.

    Raises:
        ConfigError: no calibrated model, of another version, a file missing, truncated or changed, or another dtype.
        ModelError: the diffusers that is installed builds another model from its config, accelerate is missing, or
            ``base`` is another model.
        DeviceError: the device is not here.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(known) for known in FLOAT_DTYPES)
        raise ConfigError(f"dtype is {dtype}; allowed are {allowed} (leave it out to keep the one that was saved)")
    target, directory = resolve_device(str(device)), Path(directory)
    found = _Directory(directory)
    if found.model_prefix is None:
        preset = Preset._of(found)
        if base is None:
            base = load_pipeline(preset.base_model(), target, dtype or torch.float32).transformer
        model = preset.quantize(base)
    else:
        model = _load_model(directory / found.model_prefix, dtype, DTYPES[str(found.manifest.dtype)])
        if base is not None and original_class(model) is not original_class(base):
            raise ModelError(
                f"{str(directory)!r} holds a {original_class(model).__name__}, and the model that it is for is a "
                f"{original_class(base).__name__}; give what was calibrated for that"
            )
        nn.Module.to(model, device=target)  # that of diffusers warns of layers it does not name
    steps = found.tensors("steps.")
    scales, zero_points = (
        {name.removesuffix(end): t for name, t in steps.items() if name.endswith(end)}
        for end in (".scale", ".zero_point")
    )
    with reading(directory / TENSORS, WHAT, AGAIN):
        step_ranges = StepRanges(steps["timesteps"], scales, zero_points) if steps else None
    of_runs = found.manifest.schedule, found.compensation(), step_ranges, found.features()
    return CalibratedModel(model.eval(), *of_runs)


def _load_model(folder: Path, dtype: torch.dtype | None, saved: torch.dtype) -> Any:
    import diffusers

    config = read_json(folder / CONFIG, WHAT, AGAIN, names=("_class_name", "quantization_config"))
    state = TENSOR_FILE.read_foreign_tensors(folder / WEIGHTS)[0]
    with reading(folder / CONFIG, WHAT, AGAIN):
        model_class = getattr(diffusers, str(config["_class_name"]), None)
        if not isinstance(model_class, type) or not issubclass(model_class, diffusers.ModelMixin):
            raise ValueError(f"its class {str(config['_class_name'])[:40]!r} is no model of diffusers")
        _check_names(model_class, config, state)
        model = model_class.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype or saved)
    if not getattr(model, "_keep_in_fp32_modules", None):
        nn.Module.to(model, dtype=dtype or saved)  # buffers that no file holds
    if dtype is None:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if state[name].dtype != tensor.dtype:  # of a module that had a precision of its own
                tensor.data = state[name].clone()  # which the file may be mapped to
    return model


class _Directory:
    """Read a directory whose files are as its manifest says: names of a fixed set, sizes, checksums."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, _manifest(directory)
        files = self.manifest.files.keys()
        with reading(directory / MANIFEST, WHAT, AGAIN):
            kinds = {None: {TENSORS}, TRANSFORMER: {TENSORS, *PIPELINE_FILES}, "": {TENSORS, *MODEL_FILES}}
            prefix = next((prefix for prefix, names in kinds.items() if files == names), False)
            if prefix is False or (prefix is not None and self.manifest.dtype is None):
                raise ValueError(f"it names the files {', '.join(map(repr, sorted(files)))[:200]}, which make no model")
        self.model_prefix: str | None = prefix  # type: ignore[assignment]
        for name, entry in self.manifest.files.items():
            with reading(directory / name, f"part of a {WHAT}", "copy it again"):
                if regular_size(directory / name) != entry.bytes or FileEntry.of(directory / name) != entry:
                    raise ValueError("it is not as it was written (checksum)")
        for name in READ_INSTEAD if self.model_prefix is not None else ():
            if (directory / f"{self.model_prefix}{name}").exists():
                raise ConfigError(f"{str(directory)!r} holds {name!r}, which is no part of it; remove that file")
        self._tensors = TENSOR_FILE.read_tensors(directory / TENSORS)[0]

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors of ``qandc.safetensors`` whose names begin so, without the prefix."""
        return {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}

    def compensation(self) -> Compensation | None:
        header = self.manifest.compensation
        with reading(self.directory / TENSORS, WHAT, AGAIN):
            return None if header is None else Compensation.of_parts(self._tensors, header)

    def features(self) -> FeatureCompensation | None:
        header, schedule = self.manifest.features, self.manifest.schedule
        with reading(self.directory / TENSORS, WHAT, AGAIN):
            found = None if header is None else FeatureCompensation.of_parts(self._tensors, header)
            if found is not None and schedule is not None:
                found.check(config_for(schedule, found))
        return found


def _what_is_there(directory: Path) -> str:
    if any((directory / name).exists() for name in OLDER):
        return f"an older qandc wrote it; {AGAIN}, into another directory"
    if any((directory / name).is_file() for name in (CONFIG, "model_index.json")):
        return f"there is no {MANIFEST}; load what save_pretrained wrote by from_pretrained of its class"
    if directory.is_dir():
        return f"there is no {MANIFEST}; make one with qandc calibrate --out {directory}, or qandc.save"
    return "there is no such directory; give one that qandc calibrate or qandc.save wrote"


def check_target(directory: Path, names: tuple[str, ...] = PIPELINE_FILES, overwrite: bool = False) -> tuple[str, ...]:
    """Refuse a directory that a calibrated model cannot be written to; returns its files that will be replaced.

    Raises:
        OutputError: it holds one that is not to be overwritten, or a file of these names that is no part of one.
    """
    if is_finished(directory) and not overwrite:
        raise OutputError(
            f"{str(directory)!r} holds a calibrated model; give another directory, or overwrite it (--overwrite, "
            "overwrite=True)"
        )
    try:
        ours = tuple(FILE.read(directory / MANIFEST).files)
    except ConfigError:  # none there, or damaged: what it was of is unknown
        ours = ()
    strangers = [name for name in names if name not in ours and (directory / name).exists()]
    if strangers or (directory.exists() and not directory.is_dir()):
        found = f"holds {strangers[0]!r}, which is no part of a calibrated model" if strangers else "is a file"
        raise OutputError(f"{str(directory)!r} {found}; give another directory")
    return tuple(name for name in ours if name in (*PIPELINE_FILES, *MODEL_FILES))


def _write(
    directory: Path,
    write_model: Callable[[Path], None] | None,
    tensors: Mapping[str, torch.Tensor],
    compensation: Compensation | None = None,
    features: FeatureCompensation | None = None,
    **manifest: Any,
) -> None:
    """Write all files beside their places, take the manifest away, move them, and write the new manifest."""
    from safetensors import SafetensorError

    names = (TENSORS, *(() if write_model is None else PIPELINE_FILES if "calibration" in manifest else MODEL_FILES))
    before = check_target(directory, names[1:], overwrite=True)
    partial = directory / f".{uuid.uuid4().hex[:16]}.partial"
    of_compensations, headers = _stored(compensation, features)
    try:
        partial.mkdir(parents=True)
        if write_model is not None:
            write_model(partial)
            _forget_origin(partial)
        TENSOR_FILE.write_tensors(partial / TENSORS, {**tensors, **of_compensations}, {})
        mode = usual_mode(partial)
        for name in names:
            settle(partial / name, mode)
        content = Manifest({name: FileEntry.of(partial / name) for name in names}, **manifest, **headers)
        (directory / MANIFEST).unlink(missing_ok=True)
        for name in before:
            (directory / name).unlink(missing_ok=True)
        for name in names:
            (directory / name).parent.mkdir(exist_ok=True)
            os.replace(partial / name, directory / name)
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the file system
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {str(directory)!r}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    FILE.write(directory / MANIFEST, content)


def _stored(
    compensation: Compensation | None, features: FeatureCompensation | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of compensations, and the manifest's fields for them."""
    kinds = {"compensation": compensation, "features": features}
    tensors = [kind.tensors for kind in kinds.values() if kind is not None]
    headers = {name: None if kind is None else kind.header for name, kind in kinds.items()}
    return {name: tensor for part in tensors for name, tensor in part.items()}, headers


def _write_pipeline(pipe: Any, folder: Path) -> None:
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if part is pipe.transformer:
            _write_model(part, folder / name)
        else:
            part.save_pretrained(folder / name)


def _write_model(model: Any, folder: Path) -> None:
    """Write what the model's own ``save_pretrained`` would, which refuses tensors that share memory."""
    from safetensors.torch import save_file

    model.save_config(folder)
    tensors = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _forget_origin(folder: Path) -> None:
    """Take out of diffusers' files where models came from: a path of this machine."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_savable(model: Any) -> None:
    """Refuse a model that could not be loaded again.

    Raises:
        ModelError: no model of diffusers, not quantized, without values, or not what its config builds.
    """
    from diffusers import ModelMixin

    mixin: Any = ModelMixin
    kind, layers = original_class(model), quant_layers(model)
    if not issubclass(kind, mixin):
        advice = "of a pipeline, pass pipe.transformer; of a compiled model, the model before torch.compile"
        raise ModelError(f"qandc.save writes models of diffusers; got {kind.__name__}: {advice}")
    if not layers:
        raise ModelError(f"this {kind.__name__} is not quantized; quantize_model it, or use its own save_pretrained")
    state = model.state_dict()
    empty = [key for key, tensor in state.items() if tensor.is_meta]
    if empty:
        raise ModelError(f"{empty[0]} is on the meta device and has no values; load it, or undo the offloading")
    _check_names(kind, json.loads(model.to_json_string()), state)
    for name, layer in layers.items():
        layer.check_state(name)


def _check_names(model_class: Any, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that do not fill the model of a config exactly; those of quantized layers are looked at later."""
    for name, number in config.items():
        if name.startswith("num_") and name.endswith("layers") and (type(number) is not int or number > len(tensors)):
            raise ConfigError(f"{name} is {str(number)[:40]}; there are {len(tensors)} tensors (save the model again)")
    with torch.device("meta"):
        twin = model_class.from_config(dict(config))
    linears = {name for name, module in twin.named_modules() if type(module) is nn.Linear}
    expected = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    advice = f"it must be what diffusers makes of its config, {model_class.__name__} (remove LoRA, parametrizations)"
    layers = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    for name in layers:
        if name not in linears:
            raise ModelError(f"{name} is no linear layer; {advice}")
        del expected[f"{name}.weight"]
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf in QUANTIZED_BUFFERS:
            continue
        shape = expected.pop(name, None)
        if shape is None:
            raise ModelError(f"{name} is a tensor too many; {advice}")
        if shape != tensor.shape:
            raise ModelError(f"{name} is {list(tensor.shape)} instead of {list(shape)}; {advice}")
    if expected:
        raise ModelError(f"{min(expected)} is missing; {advice}")


def _flat(ranges: StepRanges) -> dict[str, torch.Tensor]:
    scales = {f"steps.{name}.scale": scale for name, scale in ranges.scales.items()}
    zero_points = {f"steps.{name}.zero_point": zero_point for name, zero_point in ranges.zero_points.items()}
    return {"steps.timesteps": ranges.timesteps, **scales, **zero_points}
