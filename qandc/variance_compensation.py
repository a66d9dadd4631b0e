"""Give samples of a quantized, cached model the variance they should have: compensation, VC (Q&C, Sec. 3.2).

Quantization and caching change the variance of the samples ``x̂_t`` of a trajectory more than their mean (arXiv
2503.02508, Fig. 3 and 4). Each is corrected by a gain per step and channel, ``x̃_t = μ_t + K_t (x̂_t - μ_t)``. Here are
the gains as plain functions over tensors, and the dataclass that holds, applies, saves and checks them; how they are
fitted over whole trajectories is in :mod:`qandc.sampling.trajectories`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch

from qandc.errors import ConfigError, DataError
from qandc.historical import paper_gain
from qandc.support.arguments import check_fields, checked
from qandc.support.files import FileKind, reading

__all__ = [
    "Compensation",
    "CompensationHeader",
    "FittedFor",
    "channels_first",
    "compensate",
    "epsilon_scaling",
    "least_squares",
    "paper_gain",
    "shown",
    "variance_ratio",
]


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """View packed tokens ``[B, tokens, C]`` as ``[B, C, tokens]``, or those as they were; pictures and video stay."""
    return x.transpose(1, 2) if x.ndim == 3 else x


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Sum over all but the channels: ``[B, C, ...]`` to ``[C]``."""
    return x.double().transpose(0, 1).flatten(1).sum(1)


def _centred(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return x.double() - mean.double().view(1, -1, *[1] * (x.ndim - 2))


def variance_ratio(reference: torch.Tensor, sample: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute the gain ``K = σ' / σ̂`` ``[C]`` that gives samples the reference's standard deviation (Eq. 9).

    Needs no pairs: ``reference`` and ``sample`` ``[B, C, ...]`` may be of different noise. What the quantized model
    adds as noise of its own counts as signal, so the gain is a little too small for it to reach the reference.
    """
    of_reference = _centred(reference, reference.double().transpose(0, 1).flatten(1).mean(1))
    return (_sums(of_reference**2) / reference[:, 0].numel()).sqrt() / (
        _sums(_centred(sample, mean) ** 2) / sample[:, 0].numel()
    ).sqrt()


def least_squares(reference: torch.Tensor, sample: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute the gain ``[C]`` nearest to the reference in least squares: ``K = Σ (x' - μ)(x̂ - μ) / Σ (x̂ - μ)²``.

    Needs pairs: both ``[B, C, ...]`` from the same initial noise, step noise and labels, else it tends to 0.
    """
    off = _centred(sample, mean)
    return _sums(_centred(reference, mean) * off) / _sums(off**2)


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
    """Describe the runs that a compensation was fitted for: it is right for no others.

    Attributes:
        scheduler: by its class name.
        timesteps: of the run, one for each call of the model; they never rise.
        guidance_scale: of the run.
        model: number and width of its blocks.
        schemes: of its quantized layers ("W8A8 static per-tensor"), sorted.
        cache_mode, cache_order, cache_storage: of the cache, as :class:`qandc.CacheConfig`; order 0 but of forecasts,
            mode None without a cache.
        cache_schedule: whether each step is computed; None without a cache.
        cache_compensated: whether what the cache reuses is compensated.
    """

    scheduler: str
    timesteps: tuple[float, ...]
    guidance_scale: float
    model: str
    schemes: tuple[str, ...] = ()
    cache_mode: str | None = None
    cache_schedule: tuple[bool, ...] | None = None
    cache_order: int = 0
    cache_storage: str | None = None
    cache_compensated: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        if any(later > earlier for earlier, later in pairwise(self.timesteps)):
            raise ConfigError("the timesteps of a compensation rise; give those of a run, whose never do")


class CompensationHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold what a file says of a compensation beside its gains."""

    target: str
    form: str
    fitted_for: FittedFor


@dataclass(frozen=True)
class Compensation:
    """Hold and apply the gains of a run.

    Attributes:
        gain: K, ``[steps, channels] float32``; 1 where nothing is changed.
        mean: μ, ``[steps, channels] float32``; what a gain leaves where it is.
        target: ``sample``, the latents after each step; or ``noise``, the guided prediction before it, of noise or, of
            flow matching, velocity.
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
        """Return the same compensation with its gains on a device."""
        return replace(self, gain=self.gain.to(device), mean=self.mean.to(device))

    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal for compensations that do the same."""
        return (*(values.cpu().numpy().tobytes() for values in (self.gain, self.mean)), self.target, self.fitted_for)

    def _apply(self, step: int, x: torch.Tensor) -> torch.Tensor:
        x = channels_first(x)
        if x.shape[1] != self.gain.shape[1]:  # one channel would be spread over all
            raise ConfigError(
                f"the variance compensation has gains for {self.gain.shape[1]} channels; these samples have "
                f"{x.shape[1]} (fit it for this run)"
            )
        return channels_first(compensate(x, self.gain[step].to(x.device), self.mean[step].to(x.device)))

    def noise(self, step: int, noise_pred: torch.Tensor) -> torch.Tensor:
        """Correct the guided prediction, of noise or velocity, of a step: ``[B, C, ...]`` or ``[B, tokens, C]``."""
        return self._apply(step, noise_pred) if self.target == "noise" else noise_pred

    def sample(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Correct the latents that a step ends with: ``[B, C, ...]`` or packed tokens ``[B, tokens, C]``."""
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
                raise ConfigError(
                    f"the variance compensation was fitted for {name} {shown(ours)}; this run has {shown(value)} "
                    "(fit it for this run, or force it)"
                )

    @property
    def header(self) -> CompensationHeader:
        """Return what is stored beside the gains."""
        return CompensationHeader(self.target, self.form, self.fitted_for)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return gain and mean under the names that files have for them."""
        return {"gain": self.gain, "mean": self.mean}

    @classmethod
    def of_parts(cls, tensors: Mapping[str, torch.Tensor], header: CompensationHeader) -> Compensation:
        """Put together what was stored: ``gain`` and ``mean`` among tensors, and the header."""
        return cls(tensors["gain"], tensors["mean"], header.target, header.form, header.fitted_for)

    @checked
    def save(self, path: str | Path) -> None:
        """Write ``path`` (safetensors): gain and mean, in the metadata what they were fitted for.

        Raises:
            ConfigError: the path does not end in .safetensors.
            OutputError: the file cannot be written.
        """
        FILE.write_tensors(_tensor_path(path), self.tensors, self.header)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Compensation:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing, damaged, or no compensation of this version.
            DataError: its values are none of a compensation.
        """
        path = _tensor_path(path)
        tensors, header = FILE.read_tensors(path)
        with reading(path, FILE.what, FILE.advice):
            return cls.of_parts(tensors, header)


FILE = FileKind("compensation", 2, CompensationHeader, "make one with fit_compensation")


def shown(value: Any) -> str:
    """Shorten timesteps to the first and the last, a schedule to letters: C computes, a dot reuses."""
    if not isinstance(value, tuple) or not value or isinstance(value[0], str):
        return repr(value)
    if isinstance(value[0], bool):
        return "".join("C" if computed else "." for computed in value)
    return f"{len(value)} steps, {value[0]:g} .. {value[-1]:g}"


def _tensor_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{str(path)!r} is no name of a compensation; give one that ends in .safetensors")
    return path


def epsilon_scaling(scale: float, channels: int, fitted_for: FittedFor) -> Compensation:
    """Divide every noise prediction by one number, e.g. 1.004 to 1.017 (Ning et al. 2024, arXiv 2308.15321)."""
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale is {scale!r}; give a finite number > 0, usually a little more than 1")
    gain = torch.full((len(fitted_for.timesteps), channels), 1 / scale)
    return Compensation(gain, torch.zeros_like(gain), "noise", "epsilon_scaling", fitted_for)
