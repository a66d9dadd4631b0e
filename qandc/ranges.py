"""What a layer's inputs look like, gathered as they pass, and the range that serves them best.

A static range is a pair of bounds; :func:`qandc.quantizer.activation_parameters` makes scale and zero point of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qandc.errors import ConfigError

__all__ = ["ESTIMATORS", "Histogram", "RangeConfig", "StepRanges", "estimate_range"]

ESTIMATORS = ("minmax", "percentile", "mse")
BINS = 4096
CANDIDATES = 40  # bounds tried on each side
LARGEST_REACH = 2.0**127


@dataclass(frozen=True)
class StepRanges:
    """Static activation ranges that change from step to step, a row per step.

    A forward takes the row whose timestep is nearest to that of its first sample; the choice is made on the device.

    Attributes:
        timesteps: ``[S]``.
        scales: layer name to ``[S] float32``.
        zero_points: layer name to ``[S] int32``; a layer that is missing here is symmetric.
    """

    timesteps: torch.Tensor
    scales: dict[str, torch.Tensor]
    zero_points: dict[str, torch.Tensor]


@dataclass(frozen=True)
class RangeConfig:
    """How a range is found.

    Attributes:
        estimator: ``minmax``: all that was seen; ``percentile``: all but the same share at either end; ``mse``: the
            bounds with the least squared error of quantization.
        percentile: 50 to 100, of the values within the range; only for ``percentile``.
        symmetric: around zero, without a zero point.

    Raises:
        ConfigError: a value is not one of these.
    """

    estimator: str = "minmax"
    percentile: float = 99.99
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator {self.estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile!r}; give a number above 50 and at most 100")


class Histogram:
    """Values that pass, counted in ``BINS`` bins of [-reach, reach]; the reach doubles when it is exceeded.

    Doubling merges pairs of bins, so no count is lost or guessed. Memory does not grow with what passes.
    """

    def __init__(self) -> None:
        self.minimum: torch.Tensor | None = None
        self.maximum: torch.Tensor | None = None
        self.reach = 0.0
        self.counts: torch.Tensor | None = None

    def add(self, x: torch.Tensor, count: bool = True) -> None:
        """Count the values of a tensor, or note its extremes alone; of NaN and infinite values only they tell."""
        x = x.detach().to(torch.float32)
        low, high = torch.aminmax(x)
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)
        if not count:
            return
        largest = float(torch.maximum(-low, high))
        if not largest <= LARGEST_REACH:
            return
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
        self._reach(largest)
        self.counts += torch.histc(x, BINS, -self.reach, self.reach).double()

    def saw_values(self) -> bool:
        """Whether there was any value other than zero."""
        if self.minimum is None or self.maximum is None:
            return False
        return not (self.minimum == 0 and self.maximum == 0)

    def merge(self, other: Histogram) -> None:
        """Add what another one has counted."""
        if other.minimum is None or other.maximum is None:
            return
        self.minimum = other.minimum if self.minimum is None else torch.minimum(self.minimum, other.minimum)
        self.maximum = other.maximum if self.maximum is None else torch.maximum(self.maximum, other.maximum)
        if other.counts is None:
            return
        if self.counts is None:
            self.counts, self.reach = other.counts.clone(), other.reach
            return
        self._reach(other.reach)
        wider = Histogram()
        wider.counts, wider.reach = other.counts, other.reach
        wider._reach(self.reach)
        assert wider.counts is not None
        self.counts += wider.counts

    def _reach(self, largest: float) -> None:
        assert self.counts is not None
        if self.reach == 0:
            self.reach = 2.0 ** math.ceil(math.log2(max(largest, 1e-30)))
        while self.reach < largest:
            self.reach *= 2
            merged = torch.zeros_like(self.counts)
            merged[BINS // 4 : 3 * BINS // 4] = self.counts.view(-1, 2).sum(1)
            self.counts = merged

    def values(self) -> torch.Tensor:
        """Middle of each bin, ``[BINS] float64``."""
        assert self.counts is not None
        width = 2 * self.reach / BINS
        return (torch.arange(BINS, device=self.counts.device, dtype=torch.float64) + 0.5) * width - self.reach


def estimate_range(seen: Histogram, config: RangeConfig, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound, 0-d; within what was seen, or what was seen where that is not finite."""
    assert seen.minimum is not None
    assert seen.maximum is not None
    finite = torch.isfinite(seen.minimum) and torch.isfinite(seen.maximum)
    if not finite or config.estimator == "minmax" or seen.counts is None or float(seen.counts.sum()) == 0:
        return seen.minimum, seen.maximum
    values = seen.values()
    if config.estimator == "percentile":
        share = seen.counts.cumsum(0) / seen.counts.sum()
        outside = (100 - config.percentile) / 200
        low = values[int(torch.searchsorted(share, outside))]
        high = values[min(int(torch.searchsorted(share, 1 - outside)), BINS - 1)]
    else:
        low, high = _least_error(values, seen.counts, seen.minimum, seen.maximum, bits, config.symmetric)
    low, high = (torch.clamp(bound.float(), seen.minimum, seen.maximum) for bound in (low, high))
    return low, high


def _least_error(
    values: torch.Tensor,
    counts: torch.Tensor,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    bits: int,
    symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds, of a grid from all to a fifth of what was seen on either side, with the least squared error."""
    present = counts > 0
    values, counts = values[present], counts[present]
    factors = torch.linspace(0.2, 1, CANDIDATES, device=values.device, dtype=torch.float64)
    low, high = minimum.double().clamp(max=0), maximum.double().clamp(min=0)
    if symmetric:
        highs = torch.maximum(-low, high) * factors
        lows, levels = -highs, (1 << bits) - 2
    else:
        lows = (low * factors).repeat_interleave(CANDIDATES)
        highs = (high * factors).repeat(CANDIDATES)
        levels = (1 << bits) - 1
    errors = torch.stack(
        [_squared_error(values, counts, a, b, levels) for a, b in zip(lows.unbind(), highs.unbind(), strict=True)]
    )
    best = int(errors.argmin())
    return lows[best], highs[best]


def _squared_error(
    values: torch.Tensor, counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int
) -> torch.Tensor:
    scale = ((high - low) / levels).clamp(min=1e-30)
    first = (low / scale).round()
    rounded = (values / scale).round().clamp(first, first + levels) * scale
    return (counts * (values - rounded) ** 2).sum()
