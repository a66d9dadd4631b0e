"""Correct the features that reuse steps take, where they arise: ``a · f + b`` in the place of a feature f.

What a cache reuses differs from what the blocks would have computed, and mostly in the same way for all images: by a
gain and an offset of each channel. Corrected before it is added to the residual stream, the error does not mix. The
nearest relative is the decoupled error correction of CacheQuant (arXiv 2503.01323), per block, on U-Nets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from qandc.caching.schedule import FORECASTS, MODES, CacheConfig, CalibratedSchedule
from qandc.errors import ConfigError, DataError
from qandc.support.arguments import check_fields, checked
from qandc.support.files import FileKind, reading

__all__ = ["FORMS", "FeatureCompensation", "FeatureHeader", "FeatureMoments", "config_for", "gain_and_offset"]

FORMS = ("least_squares", "variance_ratio")
SMALLEST_SHARE = 1e-6  # of a feature's mean square; below it a channel does not vary, and its gain is 1
# found on fashion-dit (results/h200/feature-compensation.json): a forecast errs less, and fits of it overshoot
DEFAULT_FORM = {mode: "least_squares" if mode == "branch" else "variance_ratio" for mode in MODES}
DEFAULT_PULL = {mode: 0.5 if mode in FORECASTS else 0.0 for mode in MODES}


class FeatureHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say in a file which cache a feature compensation is for."""

    mode: str
    order: int
    storage_dtype: str | None
    schedule: tuple[bool, ...]
    timesteps: tuple[float, ...]


FILE = FileKind("feature compensation", 1, FeatureHeader, "make one with fit_feature_compensation")


def gain_and_offset(
    f: torch.Tensor,
    g: torch.Tensor,
    ff: torch.Tensor,
    gg: torch.Tensor,
    fg: torch.Tensor,
    *,
    form: str = "least_squares",
    pull: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gain a and the offset b with which ``a f + b`` comes closest to g, pulled towards no gain.

    ``a = 1 + (1 - pull) (ρ - 1)``, ``b = mean(g) - a mean(f)``: at a pull of 1 the offset alone is left. With
    ``least_squares`` ρ is ``Cov(f, g) / Var(f)``, which errs least, but varies less than g where f tells little of it;
    with ``variance_ratio``, ``√(Var(g) / Var(f))``, what varies as g does. Where f does not vary, a is 1.

    Args:
        f, g, ff, gg, fg: means of reused features f, of true ones g, of f², g² and f · g, in float64.
    """
    variance = ff - f * f
    varies = variance > SMALLEST_SHARE * ff
    spread = torch.where(varies, variance, 1.0)
    ratio = (fg - f * g) / spread if form == "least_squares" else ((gg - g * g).clamp(min=0) / spread).sqrt()
    gain = torch.where(varies, 1 + (1 - pull) * (ratio - 1), 1.0)
    return gain, g - gain * f


class FeatureMoments:
    """Sum what reused features f and true features g have in common: n, Σf, Σg, Σf², Σg², Σfg.

    Sums are float64 ``[L, K, D]``, over samples and tokens, per branch and channel; no feature is kept.
    """

    def __init__(self, layers: int, branches: int, channels: int, device: torch.device) -> None:
        self.count = torch.zeros(layers, branches, dtype=torch.float64, device=device)
        self.sums = torch.zeros(5, layers, branches, channels, dtype=torch.float64, device=device)

    def add(self, layer: int, branch: int, reused: torch.Tensor, true: torch.Tensor) -> None:
        """Add pairs ``[B, tokens, D]``."""
        f, g = (t.detach().flatten(0, 1).double() for t in (reused, true))
        self.count[layer, branch] += len(f)
        for total, values in zip(self.sums, (f, g, f * f, g * g, f * g), strict=True):
            total[layer, branch] += values.sum(0)

    def solve(self, form: str, pull: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gains and offsets ``[L, K, D] float32``, those of :func:`gain_and_offset`.

        Raises:
            DataError: features are NaN or infinite.
        """
        if not torch.isfinite(self.sums).all():
            raise DataError("features of the blocks are NaN or infinite; check the weights and the dtype")
        gain, offset = gain_and_offset(*(self.sums / self.count[:, :, None]), form=form, pull=pull)
        return gain.float(), offset.float()


@dataclass(frozen=True, eq=False)  # one is itself alone: graphs that hold one are found by it
class FeatureCompensation:
    """Hold gains and offsets of the reuse steps of a cache, and which cache and runs they are for.

    Attributes:
        config: of the cache: its schedule and timesteps are those of the runs it was fitted on.
        gains, offsets: ``[R, L, K, D] float32`` for R reuse steps, L blocks, K branches a block and D channels; L and K
            are 1 where features are those of all blocks together.

    Raises:
        ConfigError: the config has no schedule.
        DataError: gains or offsets have another shape or dtype, or are NaN or infinite.
    """

    config: CacheConfig
    gains: torch.Tensor
    offsets: torch.Tensor

    def __post_init__(self) -> None:
        check_fields(self)
        if self.config.schedule is None or self.config.timesteps is None:
            raise ConfigError(
                "a feature compensation is for the steps of a run: give a config with schedule, timesteps"
            )
        reused = len(self.config.schedule) - sum(self.config.schedule)
        for name, values in (("gains", self.gains), ("offsets", self.offsets)):
            if values.dtype != torch.float32 or values.ndim != 4 or len(values) != reused:
                found = f"{list(values.shape)} of {values.dtype}"
                raise DataError(f"{name} must be [{reused}, L, K, D] float32, one for each reuse step; got {found}")
            if not torch.isfinite(values).all():
                raise DataError(f"{name} of a feature compensation are NaN or infinite")
        if self.gains.shape != self.offsets.shape:
            raise DataError(
                f"gains are {list(self.gains.shape)} and offsets {list(self.offsets.shape)}; give one shape"
            )

    @checked
    def save(self, path: str | Path) -> None:
        """Write a safetensors file: gains and offsets, in the metadata the cache that they are for.

        Raises:
            OutputError: the file cannot be written.
        """
        FILE.write_tensors(Path(path), self.tensors, self.header)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> FeatureCompensation:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing, damaged, or no feature compensation of this version.
            DataError: its values are none of a feature compensation.
        """
        tensors, header = FILE.read_tensors(Path(path))
        with reading(Path(path), FILE.what, FILE.advice):
            return cls.of_parts(tensors, header)

    @property
    def header(self) -> FeatureHeader:
        """Return what is stored beside gains and offsets."""
        config = self.config
        assert config.schedule is not None
        assert config.timesteps is not None
        return FeatureHeader(config.mode, config.order, config.storage_dtype, config.schedule, config.timesteps)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return gains and offsets under the names that files have for them."""
        return {"gains": self.gains, "offsets": self.offsets}

    @classmethod
    def of_parts(cls, tensors: Mapping[str, torch.Tensor], header: FeatureHeader) -> FeatureCompensation:
        """Put together what was stored: ``gains`` and ``offsets`` among tensors, and the header."""
        return cls(CacheConfig(**msgspec.structs.asdict(header)), tensors["gains"], tensors["offsets"])

    @property
    def nbytes(self) -> int:
        """Return the memory of gains and offsets."""
        return self.gains.nbytes + self.offsets.nbytes

    @checked
    def check(self, config: CacheConfig) -> None:
        """Refuse, by field, a cache that it was not fitted for.

        Raises:
            ConfigError: mode, order, schedule, timesteps or storage differ.
        """
        for name in ("mode", "order", "storage_dtype", "schedule", "timesteps"):
            fitted, given = getattr(self.config, name), getattr(config, name)
            if name == "schedule":
                given = config.of_steps(len(self.config.schedule or ()))
            if name == "timesteps" and given is None:
                continue
            if fitted != given:
                raise ConfigError(
                    f"the feature compensation was fitted for {name} {fitted!r}; this cache has {given!r}"
                )


def config_for(
    schedule: CalibratedSchedule, features: FeatureCompensation | None, storage_dtype: str | None = None
) -> CacheConfig:
    """Make the config of a cache that follows a schedule; it stores as the compensation was fitted, if not told how."""
    fitted = None if features is None else features.config.storage_dtype
    return schedule.config(storage_dtype or fitted)
