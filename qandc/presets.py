"""Calibrated settings of a model in one directory: activation ranges, cache schedule, variance compensation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qandc.conversion import quant_layers, quantize_model
from qandc.errors import ConfigError, ModelError, OutputError
from qandc.quantizer import QuantConfig
from qandc.schedule import CalibratedSchedule
from qandc.variance_compensation import Compensation

__all__ = ["Preset", "fashion_dit_preset"]

FORMAT_VERSION = 1


def fashion_dit_preset(w_bits: int = 8) -> Preset:
    """The settings that come with the embedded model: 50 DDPM steps, guidance 1.5, W8A8 or W4A8."""
    return Preset.load(Path(__file__).parent / "assets" / "fashion-dit-presets" / f"w{w_bits}a8")


@dataclass(frozen=True)
class Preset:
    """What a quantized, cached model needs beside its weights.

    Attributes:
        config: bits, layers left out, how weights are clipped.
        scales: layer name to 0-d float32.
        zero_points: layer name to 0-d int32; a layer that is missing here is symmetric.
        schedule: of the feature cache.
        compensation: fitted for the model with these ranges and this cache.
    """

    config: QuantConfig
    scales: dict[str, torch.Tensor]
    zero_points: dict[str, torch.Tensor]
    schedule: CalibratedSchedule
    compensation: Compensation

    @classmethod
    def of(cls, model: Any, config: QuantConfig, schedule: CalibratedSchedule, compensation: Compensation) -> Preset:
        """The ranges of a calibrated model, and the rest as given."""
        layers = {name: layer for name, layer in quant_layers(model).items() if layer.act_scale is not None}
        return cls(
            config,
            {name: layer.act_scale for name, layer in layers.items() if layer.act_scale is not None},
            {name: layer.act_zero_point for name, layer in layers.items() if layer.act_zero_point is not None},
            schedule,
            compensation,
        )

    def quantize(self, model: Any) -> Any:
        """``quantize_model`` with these settings, and static ranges.

        Raises:
            ModelError: the model has not the layers that the ranges are of.
        """
        quantize_model(
            model,
            self.config.w_bits,
            self.config.a_bits,
            self.config.skip_patterns,
            weight_clip=self.config.weight_clip,
        )
        layers = quant_layers(model)
        strangers = self.scales.keys() - layers.keys()
        if strangers:
            raise ModelError(f"these settings are of another model: it has no quantized layer {min(strangers)!r}")
        for name, scale in self.scales.items():
            layers[name].set_static_range(scale, self.zero_points.get(name))
        return model

    def save(self, directory: str | Path) -> None:
        """Write ``preset.json``, ``ranges.safetensors``, ``schedule.json``, ``compensation.safetensors`` and ``.json``.

        Raises:
            OutputError: a file cannot be written.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        settings = {
            "version": FORMAT_VERSION,
            "w_bits": self.config.w_bits,
            "a_bits": self.config.a_bits,
            "skip_patterns": list(self.config.skip_patterns),
            "weight_clip": self.config.weight_clip,
        }
        tensors = {f"{name}.scale": scale.cpu() for name, scale in self.scales.items()}
        tensors |= {f"{name}.zero_point": zero_point.cpu() for name, zero_point in self.zero_points.items()}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, directory / "ranges.safetensors")
            (directory / "preset.json").write_text(json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write to {str(directory)!r}: {error.strerror or error}") from error
        self.schedule.save(directory / "schedule.json")
        self.compensation.save(directory / "compensation.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> Preset:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: a file is missing or not of this version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        try:
            settings = json.loads((directory / "preset.json").read_text())
            version = settings.pop("version")
            if version != FORMAT_VERSION:
                raise ConfigError(f"{str(directory)!r} has version {version}, known is {FORMAT_VERSION}; update qandc")
            config = QuantConfig(**settings)
            tensors = load_file(directory / "ranges.safetensors")
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"{str(directory)!r} holds no calibrated settings: {error}") from error
        ends = {end: len(end) for end in (".scale", ".zero_point")}
        scales, zero_points = (
            {name[:-length]: tensor for name, tensor in tensors.items() if name.endswith(end)}
            for end, length in ends.items()
        )
        return cls(
            config,
            scales,
            zero_points,
            CalibratedSchedule.load(directory / "schedule.json"),
            Compensation.load(directory / "compensation.safetensors"),
        )
