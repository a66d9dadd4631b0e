"""What ``qandc calibrate`` does, as one validated value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from qandc.caching.schedule import CacheConfig
from qandc.errors import ConfigError
from qandc.quantization.ranges import RangeConfig
from qandc.quantizer import QuantConfig
from qandc.sampling.loop import SCHEDULERS, Guidance
from qandc.support.arguments import Between, Count, Steps, check_fields
from qandc.tap import CLUSTERERS, METHODS
from qandc.variance_compensation import FORMS

__all__ = ["NO_COMPENSATION", "CalibrationSettings"]

ROUNDINGS = ("nearest", "gptq")
TARGETS = ("sample", "noise")
NO_COMPENSATION = "none"
Images = Annotated[int, Between(1, 1_000_000)]


@dataclass(frozen=True)
class CalibrationSettings:
    """What ``qandc calibrate`` does.

    Attributes:
        num_inference_steps, guidance_scale, scheduler: of the runs to come.
        w_bits, a_bits: as :class:`qandc.QuantConfig`; a_bits from 4 to 8, whose ranges are found.
        rounding: of weights, ``nearest``, or ``gptq``, by default that with 4 bits. Weights are
            clipped with ``gptq`` (``mse`` of :class:`qandc.QuantConfig`), else not.
        smoothing: move outliers from activations to weights (:func:`qandc.smoothing_factors`).
        ranges: how static ranges are found.
        cache_mode, cache_interval: of the cache the pool is recorded with; the schedule found later has as many compute
            steps.
        uniform: keep the uniform schedule.
        pool_images: images whose steps are the candidates.
        pool_with_cache: record them with the uniform cache attached (the paper), or without one.
        select: how samples are chosen (:data:`qandc.tap.METHODS`).
        samples: how many.
        clusters: of the methods that cluster.
        seed: of the choice.
        vc: of the variance compensation (:data:`qandc.variance_compensation.FORMS`), or ``none``.
        vc_target, vc_start: what is corrected, ``sample`` or ``noise``, and from which step on.
        vc_samples: images it is fitted on, all at once.
        cache, quant_config: what follows for the uniform cache, and for the layers.

    Raises:
        ConfigError: a value is not one of these, or the pool is too small.
    """

    num_inference_steps: Steps = 50
    guidance_scale: Guidance = 1.5
    scheduler: str = "ddpm"
    w_bits: int = 8
    a_bits: int = 8
    rounding: str | None = None
    smoothing: bool = True
    ranges: RangeConfig = field(default_factory=RangeConfig)
    cache_mode: str = "taylor"
    cache_interval: Steps = 3
    uniform: bool = False
    pool_images: Images = 40
    pool_with_cache: bool = True
    select: str = "tap"
    samples: Count = 400
    clusters: Count = 50
    seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    vc: str = "least_squares"
    vc_target: str = "sample"
    vc_start: int = 0
    vc_samples: Images = 100
    cache: CacheConfig = field(init=False, repr=False)
    quant_config: QuantConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        for name, chosen, known in (
            ("scheduler", self.scheduler, tuple(SCHEDULERS)),
            ("rounding", self.rounding, (None, *ROUNDINGS)),
            ("select", self.select, METHODS),
            ("vc", self.vc, (*FORMS, NO_COMPENSATION)),
            ("vc_target", self.vc_target, TARGETS),
        ):
            if chosen not in known:
                allowed = ", ".join(option for option in known if option is not None)
                raise ConfigError(f"{name} {chosen!r} is unknown; choose one of {allowed}")
        if self.a_bits == 16:
            raise ConfigError(
                "a_bits is 16: activations that stay as they are have no ranges to calibrate; give 4 to 8"
            )
        if not 0 <= self.vc_start < self.num_inference_steps:
            last = self.num_inference_steps - 1
            raise ConfigError(f"vc_start is {self.vc_start!r}; the run has steps 0 to {last}")
        candidates = self.pool_images * self.num_inference_steps
        pool = f"a pool of {self.pool_images} images of {self.num_inference_steps} steps has {candidates} candidates"
        for name in ("samples", "clusters") if self.select in CLUSTERERS else ("samples",):
            if getattr(self, name) > candidates:
                raise ConfigError(f"{name} is {getattr(self, name)}; {pool} (lower it, or take more pool images)")
        object.__setattr__(self, "cache", CacheConfig(self.cache_mode, interval=self.cache_interval))
        clip = "mse" if self.gptq else "max"
        object.__setattr__(self, "quant_config", QuantConfig(self.w_bits, self.a_bits, weight_clip=clip))

    @property
    def gptq(self) -> bool:
        """Whether weights are rounded with Hessians (GPTQ)."""
        return (self.rounding or ("gptq" if self.w_bits == 4 else "nearest")) == "gptq"
