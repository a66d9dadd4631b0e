"""Keep calibrated settings of a model in a directory: ranges, smoothing, cache schedule, variance compensation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qandc.caching.schedule import CalibratedSchedule
from qandc.errors import ConfigError, DataError, ModelError, OutputError
from qandc.quantization.conversion import layers_to_quantize, quant_layers, quantize_model
from qandc.quantization.linear import skeleton_layer
from qandc.quantization.plan import resolved
from qandc.quantizer import QuantConfig, check_bits
from qandc.sampling.loop import SCHEDULERS, Guidance, set_timesteps
from qandc.support.arguments import Scheduler, Steps, check_fields, checked
from qandc.support.files import read_json, read_tensors, reading, write_json, write_whole
from qandc.variance_compensation import Compensation

__all__ = ["Preset", "fashion_dit_preset", "is_finished"]

FORMAT_VERSION = 3
SETTINGS, RANGES, WEIGHTS = "preset.json", "ranges.safetensors", "weights.safetensors"
SCHEDULE, COMPENSATION = "schedule.json", "compensation.safetensors"
STRUCTURE = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size")
WEIGHT_BUFFERS = ("qweight", "weight_scale", "weight_sum")


@checked
def fashion_dit_preset(w_bits: int = 8) -> Preset:
    """The settings that come with the embedded model: 50 DDPM steps, guidance 1.5, W8A8 or W4A8."""
    check_bits(w_bits, 8)
    return Preset.load(Path(__file__).parents[1] / "assets" / "fashion-dit-presets" / f"w{w_bits}a8")


def is_finished(directory: str | Path) -> bool:
    """Whether a directory holds a preset; ``preset.json`` is written last."""
    return (Path(directory) / SETTINGS).exists()


@dataclass(frozen=True)
class Preset:
    """What a quantized, cached model needs beside its full-precision weights.

    Attributes:
        config: bits, layers left out, how weights are clipped.
        scales: layer name to 0-d float32.
        zero_points: layer name to 0-d int32; a layer that is missing here is symmetric.
        smoothing: layer name to ``[in_features]`` factors; a layer that is missing here has none.
        schedule: of the feature cache.
        compensation: fitted for the model with these ranges and this cache, or None.
        scheduler, guidance_scale: of the runs they are for; the steps are those of the schedule.
        structure: numbers of the model's config that say what its layers are.
        weights: ``<layer>.<buffer>`` of every quantized layer; empty if rounding to nearest makes them again.
        model: where the pipeline came from: a directory or hub id, None for fashion-dit.
    """

    config: QuantConfig
    scales: dict[str, torch.Tensor]
    zero_points: dict[str, torch.Tensor]
    schedule: CalibratedSchedule
    compensation: Compensation | None
    scheduler: str
    guidance_scale: Guidance
    structure: dict[str, int | None]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    model: str | None = None
    smoothing: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.structure.keys() != set(STRUCTURE):
            raise ConfigError(f"structure has {sorted(self.structure)}; it must have {', '.join(STRUCTURE)}")
        for name, value in (*self.scales.items(), *self.zero_points.items()):
            if value.ndim:
                raise DataError(f"the range of {name} must be 0-d tensors; got shape {list(value.shape)}")

    @classmethod
    @checked
    def of(
        cls,
        model: nn.Module,
        config: QuantConfig,
        schedule: CalibratedSchedule,
        compensation: Compensation | None,
        *,
        scheduler: str | None = None,
        guidance_scale: Guidance | None = None,
        keep_weights: bool = False,
        source: str | None = None,
    ) -> Preset:
        """The ranges of a calibrated model, and the rest as given.

        Args:
            scheduler, guidance_scale: of the runs, the scheduler by its class name; by default those that the
                compensation was fitted for.
            keep_weights: keep the quantized weights too. Those rounded with Hessians need it: they cannot be made again
                without the samples.
            source: directory or hub id of the pipeline, None for fashion-dit.

        Raises:
            ConfigError: neither a compensation nor scheduler and guidance are given.
        """
        if compensation is not None:
            scheduler = compensation.fitted_for.scheduler if scheduler is None else scheduler
            guidance_scale = compensation.fitted_for.guidance_scale if guidance_scale is None else guidance_scale
        if scheduler is None or guidance_scale is None:
            raise ConfigError("settings without compensation need the scheduler and guidance_scale they are for")
        layers = quant_layers(model)
        weights = {
            f"{name}.{buffer}": tensor
            for name, layer in layers.items()
            for buffer in WEIGHT_BUFFERS
            if keep_weights and (tensor := getattr(layer, buffer)) is not None
        }
        return cls(
            resolved(model, config),
            {name: layer.act_scale for name, layer in layers.items() if layer.act_scale is not None},
            {name: layer.act_zero_point for name, layer in layers.items() if layer.act_zero_point is not None},
            schedule,
            compensation,
            scheduler,
            float(guidance_scale),
            _structure(model),
            weights,
            source,
            {name: layer.smoothing for name, layer in layers.items() if layer.smoothing is not None},
        )

    @property
    def num_inference_steps(self) -> int:
        """Of the runs they are for."""
        return len(self.schedule.schedule)

    @property
    def scheduler_name(self) -> str:
        """As :func:`qandc.make_scheduler` takes it; the class name if it knows none."""
        return {known: name for name, known in SCHEDULERS.items()}.get(self.scheduler, self.scheduler)

    def digest(self) -> str:
        """Tells settings apart: of all tensors, the schedule and what runs they are for, hashed."""
        digest = hashlib.sha256(repr((self.config, self.schedule, self.scheduler, self.guidance_scale)).encode())
        tensors = {**self.scales, **{f"{name}.zero_point": t for name, t in self.zero_points.items()}, **self.weights}
        tensors |= {f"{name}.smoothing": factors for name, factors in self.smoothing.items()}
        if self.compensation is not None:
            tensors |= {"gain": self.compensation.gain, "mean": self.compensation.mean}
            digest.update(f"{self.compensation.target} {self.compensation.fitted_for}".encode())
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

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
                    f"these settings were made for {name} {_short(ours)}; this run has {_short(theirs)} (calibrate for "
                    "this run)"
                )

    def _check_structure(self, model: Any) -> None:
        for name, number in _structure(model).items():
            if number != self.structure[name]:
                raise ModelError(
                    f"these settings are of another model: they were made for {name} {self.structure[name]}, this one "
                    f"has {number} (give the model they were made for, or calibrate this one)"
                )

    @checked
    def quantize(self, model: nn.Module) -> Any:
        """``quantize_model`` with these settings, and static ranges; kept weights are installed bit for bit.

        Raises:
            ModelError: the model has another structure than the one these settings were made for. It is unchanged then.
        """
        self._check_structure(model)
        config = self.config
        self._check_layers(model)
        clip = "max" if self.weights else config.weight_clip  # kept weights take the place of what is rounded here
        strangers = self.smoothing.keys() - dict(model.named_modules()).keys()
        if strangers:
            raise ModelError(f"these settings are of another model: it has no layer {min(strangers)!r} to smooth")
        quantize_model(
            model, config.w_bits, config.a_bits, config.skip_patterns, weight_clip=clip, smoothing=self.smoothing
        )
        layers = quant_layers(model)
        if self.weights:
            for name, layer in layers.items():
                self._install(name, layer)
        for name, scale in self.scales.items():
            layers[name].set_static_range(scale, self.zero_points.get(name))
        return model

    def _check_layers(self, model: nn.Module) -> None:
        """Refuse ranges and weights that the layers to be quantized do not take."""
        linears, bits = layers_to_quantize(model, self.config), (self.config.w_bits, self.config.a_bits)
        strangers = self.scales.keys() - linears.keys()
        if strangers:
            raise ModelError(f"these settings are of another model: it has no quantized layer {min(strangers)!r}")
        for name, linear in linears.items() if self.weights else ():
            sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
            layer = skeleton_layer(*sizes, bias=False, bits=bits, dtype=dtype)
            for buffer in WEIGHT_BUFFERS:
                kept, own = self.weights.get(f"{name}.{buffer}"), getattr(layer, buffer)
                if kept is None or (kept.shape, kept.dtype) != (own.shape, own.dtype):
                    found = "nothing" if kept is None else f"{list(kept.shape)} {kept.dtype}"
                    raise ModelError(
                        f"these settings are of another model: {name}.{buffer} must be {list(own.shape)} {own.dtype}; "
                        f"{WEIGHTS} holds {found}"
                    )

    def _install(self, name: str, layer: Any) -> None:
        state = {buffer: self.weights[f"{name}.{buffer}"] for buffer in WEIGHT_BUFFERS}
        if layer.smoothing is not None:  # a state dict without it would take it away
            state["smoothing"] = layer.smoothing
        layer.load_state_dict(state, strict=False)

    @checked
    def save(self, directory: str | Path) -> None:
        """Write ``preset.json``, ``ranges.safetensors``, ``schedule.json``, and where there are any
        ``weights.safetensors``, ``compensation.safetensors`` and ``compensation.json``.

        Each file is whole or not there. ``preset.json`` goes first and comes back last: with it the others belong
        together.

        Raises:
            OutputError: a file cannot be written.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        settings = {
            "version": FORMAT_VERSION,
            "w_bits": self.config.w_bits,
            "a_bits": self.config.a_bits,
            "skip_patterns": None if self.config.skip_patterns is None else list(self.config.skip_patterns),
            "weight_clip": self.config.weight_clip,
            "smoothing": bool(self.smoothing),
            "weights": bool(self.weights),
            "compensation": self.compensation is not None,
            "scheduler": self.scheduler,
            "guidance_scale": self.guidance_scale,
            "model": self.model,
            "structure": self.structure,
        }
        tensors = {f"{name}.scale": scale.cpu() for name, scale in self.scales.items()}
        tensors |= {f"{name}.zero_point": zero_point.cpu() for name, zero_point in self.zero_points.items()}
        tensors |= {f"{name}.smoothing": factors.cpu() for name, factors in self.smoothing.items()}
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.weights.items()}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in (SETTINGS, WEIGHTS, COMPENSATION, "compensation.json"):
                (directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {str(directory)!r}: {error.strerror or error}") from error
        write_whole(directory / RANGES, lambda path: save_file(tensors, path))
        if weights:
            write_whole(directory / WEIGHTS, lambda path: save_file(weights, path))
        self.schedule.save(directory / SCHEDULE)
        if self.compensation is not None:
            self.compensation.save(directory / COMPENSATION)
        write_json(directory / SETTINGS, settings)

    @classmethod
    @checked
    def load(cls, directory: str | Path) -> Preset:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: a file is missing, damaged or not of this version.
        """
        directory = Path(directory)
        what, advice = "part of calibrated settings", "make them anew with qandc calibrate"
        if not is_finished(directory):
            raise ConfigError(
                f"{str(directory)!r} holds no calibrated settings: there is no {SETTINGS}; make them with "
                f"qandc calibrate --out {directory}"
            )
        settings = read_json(directory / SETTINGS, what, advice, version=FORMAT_VERSION)
        with reading(directory / SETTINGS, what, advice):
            names = ("w_bits", "a_bits", "skip_patterns", "weight_clip")
            config = QuantConfig(**{name: settings[name] for name in names})
            scheduler, guidance_scale = str(settings["scheduler"]), float(settings["guidance_scale"])
            structure = {name: settings["structure"][name] for name in STRUCTURE}
            model, compensated, smoothed = settings["model"], settings["compensation"], settings["smoothing"]
            weighted = settings["weights"]
        tensors = read_tensors(directory / RANGES, what, advice)
        weights = read_tensors(directory / WEIGHTS, what, advice) if weighted else {}
        ends = {end: len(end) for end in (".scale", ".zero_point", ".smoothing")}
        scales, zero_points, smoothing = (
            {name[:-length]: tensor for name, tensor in tensors.items() if name.endswith(end)}
            for end, length in ends.items()
        )
        if bool(smoothing) is not smoothed:
            raise ConfigError(
                f"{str(directory)!r} is damaged: smoothing is {smoothed} in {SETTINGS}, but not in {RANGES}; make the "
                "settings anew with qandc calibrate"
            )
        schedule = CalibratedSchedule.load(directory / SCHEDULE)
        compensation = Compensation.load(directory / COMPENSATION) if compensated else None
        return cls(
            config,
            scales,
            zero_points,
            schedule,
            compensation,
            scheduler,
            guidance_scale,
            structure,
            weights,
            model,
            smoothing,
        )


def _structure(model: Any) -> dict[str, int | None]:
    config = getattr(model, "config", None)
    if not all(hasattr(config, name) for name in STRUCTURE):
        raise ModelError(f"settings are for diffusers' DiTTransformer2DModel; got {type(model).__name__}")
    return {name: getattr(config, name) for name in STRUCTURE}


def _short(value: Any) -> Any:
    return f"{value[0]}, {value[1]} .. {value[-1]}" if isinstance(value, tuple) and len(value) > 3 else value
