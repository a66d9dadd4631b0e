"""Variance compensation (VC): samples of a quantized, cached model get the variance they should have (Q&C, Sec. 3.2).

Quantization and caching change the variance of the samples ``x̂_t`` of a trajectory more than their mean (arXiv
2503.02508, Fig. 3 and 4). Each is corrected by a gain per step and channel, ``x̃_t = μ_t + K_t (x̂_t - μ_t)``. Here are
the gains as plain functions over tensors, and the dataclass that holds, applies, saves and checks them; how they are
fitted over whole trajectories is in :mod:`qandc.sampling.trajectories`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qandc.errors import ConfigError, DataError
from qandc.support.arguments import check_fields, checked
from qandc.support.files import read_json, read_tensors, reading, write_json, write_whole

__all__ = [
    "Compensation",
    "FittedFor",
    "compensate",
    "epsilon_scaling",
    "least_squares",
    "paper_gain",
    "variance_ratio",
]

FORMAT_VERSION = 1


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Over all but the channels: ``[B, C, ...]`` to ``[C]``."""
    return x.double().transpose(0, 1).flatten(1).sum(1)


def _centred(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return x.double() - mean.double().view(1, -1, *[1] * (x.ndim - 2))


def variance_ratio(reference: torch.Tensor, sample: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """``K = σ' / σ̂`` (Eq. 9): the gain ``[C]`` that gives samples the reference's standard deviation about its mean.

    Needs no pairs: ``reference`` and ``sample`` ``[B, C, ...]`` may be of different noise. What the quantized model
    adds as noise of its own counts as signal, so the gain is a little too small for it to reach the reference.
    """
    of_reference = _centred(reference, reference.double().transpose(0, 1).flatten(1).mean(1))
    return (_sums(of_reference**2) / reference[:, 0].numel()).sqrt() / (
        _sums(_centred(sample, mean) ** 2) / sample[:, 0].numel()
    ).sqrt()


def least_squares(reference: torch.Tensor, sample: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """``K = Σ (x' - μ)(x̂ - μ) / Σ (x̂ - μ)²``: the gain ``[C]`` with the least squared distance to the reference.

    Needs pairs: both ``[B, C, ...]`` from the same initial noise, step noise and labels, else it tends to 0.
    """
    off = _centred(sample, mean)
    return _sums(_centred(reference, mean) * off) / _sums(off**2)


def paper_gain(
    reference: torch.Tensor, sample: torch.Tensor, mean: torch.Tensor, smallest: float = 0.05
) -> torch.Tensor:
    """Eq. 12 as printed: ``[Σ (x'-μ)(x̂-μ) + Σ (x̂-μ)/x'] / [Σ (x̂-μ)² + Σ (x̂-μ)²/x'²]``, ``[C]``.

    It is not the minimiser of the objective it is derived from, and the few ``x'`` near 0 decide it: on data with a
    known gain it gives about 0. Elements with ``|x'| <= smallest`` are left out of the sums, which makes it finite, not
    right. Kept to compare with; pairs are needed.
    """
    keep = (reference.abs() > smallest).double()
    target, off = _centred(reference, mean) * keep, _centred(sample, mean) * keep
    relative = off / torch.where(keep > 0, reference.double(), 1.0)
    return (_sums(target * off) + _sums(relative)) / (_sums(off**2) + _sums(relative**2))


FORMS = {"variance_ratio": variance_ratio, "least_squares": least_squares, "paper": paper_gain}


def compensate(x: torch.Tensor, gain: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Apply ``μ + K (x - μ)`` to ``x [B, C, ...]`` with ``gain`` and ``mean`` ``[C] float32``; as ``x``.

    It is computed in float32. A channel whose gain is 1 stays as it is, bit for bit: the formula would round it.
    """
    shape = (1, -1, *[1] * (x.ndim - 2))
    gain, mean = gain.view(shape), mean.view(shape)
    return torch.where(gain == 1, x, (mean + gain * (x.float() - mean)).to(x.dtype))


@dataclass(frozen=True)
class FittedFor:
    """The runs that a compensation was fitted for: it is right for no others."""

    scheduler: str
    timesteps: tuple[float, ...]
    guidance_scale: float
    model: str

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Compensation:
    """Gains of a run.

    Attributes:
        gain: K, ``[steps, channels] float32``; 1 where nothing is changed.
        mean: μ, ``[steps, channels] float32``; what a gain leaves where it is.
        target: ``sample``, the latents after each step; or ``noise``, the guided noise prediction before it.
        form: how it was fitted.
        fitted_for: the runs it is for.

    Raises:
        ConfigError: an unknown target.
        DataError: gain or mean is of another shape or dtype, NaN or infinite, or a gain is negative.
    """

    gain: torch.Tensor
    mean: torch.Tensor
    target: str
    form: str
    fitted_for: FittedFor

    def __post_init__(self) -> None:
        check_fields(self)
        if self.target not in ("sample", "noise"):
            raise ConfigError(f"target {self.target!r} is unknown; choose sample or noise")
        steps = len(self.fitted_for.timesteps)
        for name in ("gain", "mean"):
            values = getattr(self, name)
            if values.ndim != 2 or len(values) != steps or values.dtype != torch.float32:
                got = f"{list(values.shape)} {str(values.dtype).removeprefix('torch.')}"
                raise DataError(f"{name} must be [{steps} steps, channels] float32; got {got}")
            if not torch.isfinite(values).all():
                raise DataError(f"{name} holds NaN or infinite values; fit it anew with more samples")
        if self.gain.shape != self.mean.shape:
            raise DataError(f"gain {tuple(self.gain.shape)} and mean {tuple(self.mean.shape)} must have one shape")
        if (self.gain < 0).any():
            raise DataError(
                f"gain holds {float(self.gain.min())}, which would mirror samples; gains are >= 0, and 1 is none "
                "(fit it anew with more samples, paired with the reference)"
            )

    @checked
    def to(self, device: torch.device | str) -> Compensation:
        """The same with its gains on a device."""
        return replace(self, gain=self.gain.to(device), mean=self.mean.to(device))

    def key(self) -> tuple[Any, ...]:
        """Equal for compensations that do the same."""
        return (*(values.cpu().numpy().tobytes() for values in (self.gain, self.mean)), self.target, self.fitted_for)

    def _apply(self, step: int, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self.gain.shape[1]:  # one channel would be spread over all
            raise ConfigError(
                f"the variance compensation has gains for {self.gain.shape[1]} channels; these samples have "
                f"{x.shape[1]} (fit it for this run)"
            )
        return compensate(x, self.gain[step].to(x.device), self.mean[step].to(x.device))

    def noise(self, step: int, noise_pred: torch.Tensor) -> torch.Tensor:
        """What becomes of the guided noise prediction ``[B, C, H, W]`` of a step."""
        return self._apply(step, noise_pred) if self.target == "noise" else noise_pred

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """What becomes of the latents ``[B, C, H, W]`` that a step ends with."""
        return self._apply(step, latents) if self.target == "sample" else latents

    @checked
    def check(self, run: Mapping[str, Any]) -> None:
        """Refuse a run it was not fitted for; ``run`` holds what is known of it, by the names of :class:`FittedFor`.

        Raises:
            ConfigError: a value differs, with both.
        """
        for name, value in run.items():
            if name not in {field.name for field in fields(FittedFor)}:
                raise ConfigError(f"a run has no {name!r}; allowed are the names of FittedFor")
            ours = getattr(self.fitted_for, name)
            if ours != value:
                theirs = f"{len(value)} steps, {_short(value)}" if name == "timesteps" else repr(value)
                fitted = f"{len(ours)} steps, {_short(ours)}" if name == "timesteps" else repr(ours)
                raise ConfigError(
                    f"the variance compensation was fitted for {name} {fitted}; this run has {theirs} (fit it for this "
                    "run, or force it)"
                )

    @checked
    def save(self, path: str | Path) -> None:
        """Write ``path`` (safetensors: gain and mean) and a readable JSON of the same name beside it.

        Raises:
            ConfigError: the path does not end in .safetensors.
            OutputError: a file cannot be written.
        """
        from safetensors.torch import save_file

        path = _tensor_path(path)
        tensors = {"gain": self.gain.contiguous(), "mean": self.mean.contiguous()}
        settings = {"version": FORMAT_VERSION, "target": self.target, "form": self.form, **asdict(self.fitted_for)}
        write_whole(path, lambda partial: save_file(tensors, partial))
        write_json(path.with_suffix(".json"), settings)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Compensation:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: a file is missing or no compensation of this version.
        """
        path, what, advice = _tensor_path(path), "compensation", "make one with fit_compensation"
        tensors = read_tensors(path, what, advice)
        values = read_json(path.with_suffix(".json"), what, advice, version=FORMAT_VERSION)
        with reading(path, what, advice):
            known = {field.name: values[field.name] for field in fields(FittedFor)}
            known["timesteps"] = tuple(known["timesteps"])
            return cls(tensors["gain"], tensors["mean"], values["target"], values["form"], FittedFor(**known))


def _short(timesteps: tuple[float, ...]) -> str:
    return f"{timesteps[0]:g} .. {timesteps[-1]:g}" if timesteps else "none"


def _tensor_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{str(path)!r} must end in .safetensors (a .json of the same name stands beside it)")
    return path


def epsilon_scaling(scale: float, channels: int, fitted_for: FittedFor) -> Compensation:
    """Every noise prediction divided by one number, e.g. 1.004 to 1.017 (Ning et al. 2024, arXiv 2308.15321)."""
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale is {scale!r}; give a finite number > 0, usually a little more than 1")
    gain = torch.full((len(fitted_for.timesteps), channels), 1 / scale)
    return Compensation(gain, torch.zeros_like(gain), "noise", "epsilon_scaling", fitted_for)
