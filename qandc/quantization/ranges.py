"""Gather what a layer's inputs look like as they pass, and find the range that serves them best.

A static range is a pair of bounds; :func:`qandc.quantizer.scale_and_zero_point` makes scale and zero point of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from qandc.errors import ConfigError, DataError
from qandc.quantizer import fault_of_divisors
from qandc.support.arguments import check_fields

__all__ = [
    "ESTIMATORS",
    "Histogram",
    "RangeConfig",
    "StepRanges",
    "check_range_values",
    "check_step_ranges",
    "estimate_range",
]

ESTIMATORS = ("minmax", "percentile", "mse")
MOST_STEPS = 10_000
OCTAVES = 40  # below the reach that a histogram tells apart; smaller values count as zeros
BINS_OF_OCTAVES = (*[32] * (OCTAVES - 5), 64, 128, 256, 512, 1024)  # equal bins in each, the smallest values first
FINE_BITS = 10  # of a float32's significand that choose a bin: 1024 in an octave, as many as the highest has
SIGNIFICAND_BITS, EXPONENT_BIAS = 23, 127  # of float32
SMALLEST_EXPONENT = -64  # of a reach: all octaves below it are normal numbers
CHUNK = 1 << 22  # values that are counted at once
CANDIDATES = 40  # bounds that the search for the least error tries on each side first
REFINEMENTS, REFINED = 2, 9  # rounds of the search between the neighbours of the best one, bounds in each


def check_range_values(
    scales: Mapping[str, torch.Tensor], zero_points: Mapping[str, torch.Tensor], shape: Sequence[int], what: str
) -> None:
    """Refuse ranges of layers that no kernel can use; ``what`` they are begins the messages.

    Raises:
        DataError: scales are not float32 of this shape, finite, > 0 and with such reciprocals; zero points not int32
            of it, from -128 to 127; or a layer has a zero point and no scale.
    """
    for name, scale in scales.items():
        whole = scale.dtype == torch.float32 and scale.shape == torch.Size(shape)
        if not whole or fault_of_divisors(scale) is not None:
            numbers = f"{list(shape)} finite float32 numbers > 0 whose reciprocals are such"
            raise DataError(f"{what} of {name}: its scale must be {numbers}")
    for name, zero_point in zero_points.items():
        whole = zero_point.dtype == torch.int32 and zero_point.shape == torch.Size(shape)
        if not whole or not ((zero_point >= -128) & (zero_point <= 127)).all():
            raise DataError(f"{what} of {name}: its zero point must be {list(shape)} int32 from -128 to 127")
        if name not in scales:
            raise DataError(f"{what} of {name}: it has a zero point and no scale; give both, or neither")


@dataclass(frozen=True)
class StepRanges:
    """Hold static activation ranges that change from step to step, a row per step.

    A forward takes the row whose timestep is nearest to that of its first sample; the choice is made on the device.

    Attributes:
        timesteps: ``[S]``.
        scales: layer name to ``[S] float32``.
        zero_points: layer name to ``[S] int32``; a layer that is missing here is symmetric.
    """

    timesteps: torch.Tensor
    scales: dict[str, torch.Tensor]
    zero_points: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        check_fields(self)
        steps = self.timesteps.shape
        if len(steps) != 1 or not 1 <= steps[0] <= MOST_STEPS or not torch.isfinite(self.timesteps).all():
            raise ConfigError(f"timesteps must be [S] finite numbers, S from 1 to {MOST_STEPS}; got {tuple(steps)}")
        check_range_values(self.scales, self.zero_points, steps, "step_ranges")


def check_step_ranges(ranges: StepRanges, layers: Collection[str]) -> None:
    """Refuse ranges of no layer, or of layers that are not among ``layers``."""
    if not ranges.scales:
        raise ConfigError("step_ranges has no scales; give those of at least one layer")
    unknown = [name for name in {**ranges.scales, **ranges.zero_points} if name not in layers]
    if unknown:
        raise ConfigError(f"step_ranges names {unknown[0]!r}, which is no quantized layer of this model")


@dataclass(frozen=True)
class RangeConfig:
    """Say how a range is found.

    Attributes:
        estimator: ``minmax``: all that was seen; ``percentile``: all but the same share at either end; ``mse``: the
            bounds with the smallest squared error of quantization that a search finds.
        percentile: 50 to 100, of the values within the range; only for ``percentile``.
        symmetric: around zero, without a zero point.

    Raises:
        ConfigError: a value is not one of these.
    """

    estimator: str = "minmax"
    percentile: float = 99.99
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator {self.estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile!r}; give a number above 50 and at most 100")


def _edges(bins_of_octaves: Sequence[int]) -> torch.Tensor:
    """Return ascending edges of bins over [-1, 1], float64: so many equal bins in each octave above and below zero."""
    lowest = 2.0 ** -len(bins_of_octaves)
    parts = [torch.tensor([lowest], dtype=torch.float64, device="cpu")]
    for octave, bins in enumerate(bins_of_octaves):
        parts.append((torch.arange(1, bins + 1, dtype=torch.float64, device="cpu") / bins + 1) * lowest * 2.0**octave)
    above = torch.cat(parts)
    return torch.cat([-above.flip(0), above])


def _middles(edges: torch.Tensor) -> torch.Tensor:
    return (edges[1:] + edges[:-1]) / 2


@functools.cache
def _bins(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the edges of bins for a reach of 1, and for each of the finer bins of float bits the bin that holds it."""
    edges = _edges(BINS_OF_OCTAVES)
    fine = _edges([1 << FINE_BITS] * OCTAVES)
    return edges.to(device), torch.bucketize(_middles(fine), edges[1:-1]).to(device)


class Histogram:
    """Count the values that pass, in bins of [-reach, reach]; the reach, a power of two, grows as it must.

    Bins are equal near the reach, where steps of quantization are, and narrower and narrower towards zero, so that
    values far below an outlier are still told apart. Those of a larger reach are unions of those of a smaller one: no
    count is lost or guessed. Memory does not grow with what passes.
    """

    def __init__(self) -> None:
        self.minimum: torch.Tensor | None = None
        self.maximum: torch.Tensor | None = None
        self.reach = 0.0
        self.counts: torch.Tensor | None = None

    def add(self, x: torch.Tensor, count: bool = True) -> None:
        """Add a tensor: minimum and maximum, and with ``count`` its histogram; one with NaN or inf is not counted."""
        x = x.detach().to(torch.float32)
        low, high = torch.aminmax(x)
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)
        if not count:
            return
        largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            return
        exponent = max(math.frexp(largest)[1], SMALLEST_EXPONENT)
        self._extend(2.0**exponent, x.device)
        assert self.counts is not None
        # the upper bits of a float count through octaves and fine bins; the smallest value that is no zero is at 1
        zero = ((int(math.log2(self.reach)) + EXPONENT_BIAS - OCTAVES) << FINE_BITS) - 1
        last = OCTAVES << FINE_BITS
        for part in x.flatten().split(CHUNK):
            bits = part.view(torch.int32)
            size = ((bits & 0x7FFFFFFF) >> (SIGNIFICAND_BITS - FINE_BITS)).sub_(zero).clamp_(min=0)
            fine = torch.where(bits < 0, -size, size).add_(last)
            self.counts.index_add_(0, _bins(x.device)[1], torch.bincount(fine, minlength=2 * last + 1))

    def saw_values(self) -> bool:
        """Tell whether there was any value other than zero."""
        if self.minimum is None or self.maximum is None:
            return False
        return not (self.minimum == 0 and self.maximum == 0)

    def merge(self, other: Histogram) -> None:
        """Add the counts and extremes of another histogram."""
        if other.minimum is None or other.maximum is None:
            return
        self.minimum = other.minimum if self.minimum is None else torch.minimum(self.minimum, other.minimum)
        self.maximum = other.maximum if self.maximum is None else torch.maximum(self.maximum, other.maximum)
        if other.counts is None:
            return
        self._extend(other.reach, other.counts.device)
        assert self.counts is not None
        self.counts.index_add_(0, self._places(other.reach), other.counts)

    def _extend(self, reach: float, device: torch.device) -> None:
        """Grow the histogram to at least this reach."""
        if self.counts is None:
            self.counts = torch.zeros(len(_bins(device)[0]) - 1, dtype=torch.int64, device=device)
            self.reach = reach
        elif self.reach < reach:
            before, counts = self.reach, self.counts
            self.reach = reach
            self.counts = torch.zeros_like(counts).index_add_(0, self._places(before), counts)

    def _places(self, reach: float) -> torch.Tensor:
        """Map each bin of a smaller reach to the bin it lies in."""
        assert self.counts is not None
        edges = _bins(self.counts.device)[0]
        return torch.bucketize(_middles(edges) * (reach / self.reach), edges[1:-1])

    def edges(self) -> torch.Tensor:
        """Return the bounds of the bins, ``[bins + 1] float64``, ascending."""
        assert self.counts is not None
        return _bins(self.counts.device)[0] * self.reach

    def values(self) -> torch.Tensor:
        """Return the middle of each bin, ``[bins] float64``."""
        return _middles(self.edges())

    def quantile(self, share: float) -> torch.Tensor:
        """Return the quantile of the counts at ``share``, 0-d float64, interpolated within its bin."""
        assert self.counts is not None
        below = self.counts.cumsum(0).double()
        wanted = share * below[-1]
        i = int(torch.searchsorted(below, wanted).clamp(max=len(below) - 1))
        left, right = self.edges()[i : i + 2]
        return right - (right - left) * ((below[i] - wanted) / self.counts[i].clamp(min=1))


def estimate_range(seen: Histogram, config: RangeConfig, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate lower and upper bound, 0-d: within what was seen, or what was seen where that is not finite."""
    assert seen.minimum is not None
    assert seen.maximum is not None
    finite = torch.isfinite(seen.minimum) and torch.isfinite(seen.maximum)
    if not finite or config.estimator == "minmax" or seen.counts is None:
        return seen.minimum, seen.maximum
    if config.estimator == "percentile":
        outside = (100 - config.percentile) / 200
        low, high = seen.quantile(outside), seen.quantile(1 - outside)
    else:
        low, high = _small_error(seen, bits, config.symmetric)
    low, high = (torch.clamp(bound.float(), seen.minimum, seen.maximum) for bound in (low, high))
    return low, high


def _small_error(seen: Histogram, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Find bounds with a small squared error: the best of a grid, then of finer ones around the best."""
    assert seen.counts is not None
    assert seen.minimum is not None
    assert seen.maximum is not None
    present = seen.counts > 0
    values, counts = seen.values()[present], seen.counts[present]
    smallest, largest = seen.minimum.double().clamp(max=0), seen.maximum.double().clamp(min=0)
    few = torch.logspace(-12, -2, CANDIDATES // 4, 2, dtype=torch.float64, device=values.device)
    many = torch.linspace(0.25, 1, CANDIDATES + 1 - len(few), dtype=torch.float64, device=values.device)
    factors = torch.cat([few[:-1], many])
    if symmetric:
        lows, highs = smallest[None], torch.maximum(-smallest, largest) * factors
    else:
        lows, highs = torch.unique(smallest * factors), torch.unique(largest * factors)

    def best() -> tuple[int, int]:
        errors = torch.stack([squared_errors(values, counts, low, highs, bits, symmetric) for low in lows.unbind()])
        return divmod(int(errors.argmin()), len(highs))

    i, j = best()
    for _ in range(REFINEMENTS):
        lows, highs = _around(lows, i), _around(highs, j)
        i, j = best()
    return -highs[j] if symmetric else lows[i], highs[j]


def _around(bounds: torch.Tensor, best: int) -> torch.Tensor:
    """Refine a grid: return ascending bounds between the neighbours of its best one, that one included."""
    first, last = bounds[max(best - 1, 0)], bounds[min(best + 1, len(bounds) - 1)]
    steps = torch.linspace(0, 1, REFINED, dtype=torch.float64, device=bounds.device)
    return torch.unique(torch.cat([first + (last - first) * steps, bounds[best : best + 1]]))


def squared_errors(
    values: torch.Tensor, counts: torch.Tensor, low: torch.Tensor, highs: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    """Compute squared errors ``[H]`` of ranges from ``low``, or symmetric ones, to ``highs``, as kernels round."""
    levels = (1 << bits) - 1
    # symmetric scales reach from -qmax to qmax; the level below that is used all the same
    scales = (2 * highs / (levels - 1) if symmetric else (highs - low) / levels).clamp(min=1e-30)[:, None]
    first = torch.full_like(scales, -(1 << bits - 1)) if symmetric else (low / scales).round()
    rounded = (values / scales).round().clamp(first, first + levels) * scales
    return (counts * (values - rounded) ** 2).sum(1)
