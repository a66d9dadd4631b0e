"""Say what ``qandc calibrate`` does, as one validated value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from qandc import historical
from qandc.caching.schedule import CacheConfig
from qandc.errors import ConfigError
from qandc.quantization.ranges import RangeConfig
from qandc.quantizer import QuantConfig
from qandc.sampling.loop import SCHEDULERS, Guidance
from qandc.support.arguments import Between, Count, Steps, check_fields
from qandc.tap import CLUSTERERS, METHODS
from qandc.variance_compensation import FORMS

__all__ = ["COMPENSATIONS", "CalibrationConfig", "CalibrationSettings", "Images"]

ROUNDINGS = ("nearest", "gptq")
TARGETS = ("sample", "noise")
COMPENSATIONS = ("features", "samples", "none")
Images = Annotated[int, Between(1, 1_000_000)]


def option(default: Any, help: str, *flags: str) -> Any:
    """Make a field of a config with its help text; ``flags`` name it on the command line if its own name does not.

    The flag of a boolean field turns it into the opposite of its default.
    """
    return field(default=default, metadata={"help": help, "flags": flags})


@dataclass(frozen=True)
class CalibrationConfig:
    """Say what ``qandc calibrate`` does; its options are made of these fields.

    Raises:
        ConfigError: a value is not one of these, or the pool is too small.
    """

    num_inference_steps: Steps = option(50, "Denoising steps.", "--steps")
    guidance_scale: Guidance = option(1.5, "Classifier-free guidance; 1 turns it off.")
    scheduler: str = option("ddpm", "ddpm or ddim.")
    w_bits: int = option(8, "Bits of the weights: 4 or 8.")
    a_bits: int = option(8, "Bits of the activations: 4 to 8, or where nothing is calibrated 16, as they are.")
    rounding: str | None = option(None, "Of weights: nearest, or gptq, which clips too. Default: gptq with 4 bits.")
    smoothing: bool = option(True, "Move outliers from activations to weights.", "--no-smoothing")
    ranges: RangeConfig = field(default_factory=RangeConfig)
    cache_mode: str = option(
        "taylor",
        "What is kept: delta (the sum of all), branch; forecast: crf (the sum), taylor, hicache (branches). generate "
        "takes first_block too.",
    )
    cache_interval: Steps = option(
        3, "Compute every Nth step, or as many steps; 1 computes all.", "--cache-interval", "--interval"
    )
    uniform: bool = option(False, "Compute every Nth step, not those that serve the others best.", "--uniform")
    pool_images: Images = option(40, "Images whose steps are the candidates.")
    pool_with_cache: bool = option(
        True, "Record the candidates on runs with the cache, as the paper does.", "--pool-without-cache"
    )
    select: str = option("tap", f"Choice of samples: {', '.join(METHODS)}.")
    samples: Count = option(400, "Candidates to calibrate with.")
    clusters: Count = option(50, "Of the candidates.")
    seed: Annotated[int, Between(0, 2**31 - 1)] = option(0, "Of the choice of samples.")
    compensation: str | None = option(
        None,
        "Of features where the cache reuses them, of samples (the paper's VC), or none. Default: features with ddim or "
        "the mode delta, else none, as it does harm (docs/calibration.md); samples if --vc is given.",
    )
    feature_images: Images = option(40, "Images the compensation of features is fitted on.")
    vc: str | None = option(None, f"Form of the compensation of samples: {', '.join(FORMS)}. Default: least_squares.")
    vc_target: str = option("sample", "What VC compensates: sample or noise.")
    vc_start: int = option(0, "First step that VC compensates.")
    vc_samples: Images = option(100, "Images that VC is fitted on, all at once.")
    cache: CacheConfig = field(init=False, repr=False)
    quant_config: QuantConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        for name, chosen, known in (
            ("scheduler", self.scheduler, tuple(SCHEDULERS)),
            ("rounding", self.rounding, (None, *ROUNDINGS)),
            ("select", self.select, (*METHODS, *historical.CLUSTERERS)),
            ("compensation", self.compensation, (None, *COMPENSATIONS)),
            ("vc", self.vc, (None, *FORMS) if self.compensation == "samples" else (None, *FORMS, "none")),
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
        usual = "features" if self.scheduler == "ddim" or self.cache.mode == "delta" else "none"
        of_vc = {None: usual, "none": "none"}.get(self.vc, "samples")  # none: as it was told before
        object.__setattr__(self, "compensation", self.compensation or of_vc)
        for name, unsaid in (("vc", (None, "none")), ("vc_target", ("sample",)), ("vc_start", (0,))):
            if self.compensation != "samples" and (given := getattr(self, name)) not in unsaid:
                raise ConfigError(
                    f"{name} is {given!r}, which is for compensation samples, but compensation is "
                    f"{self.compensation}; leave one of them out"
                )
        object.__setattr__(self, "cache_mode", self.cache.mode)
        clip = "mse" if self.gptq else "max"
        object.__setattr__(self, "quant_config", QuantConfig(self.w_bits, self.a_bits, weight_clip=clip))

    @property
    def gptq(self) -> bool:
        """Tell whether weights are rounded with Hessians (GPTQ)."""
        return (self.rounding or ("gptq" if self.w_bits == 4 else "nearest")) == "gptq"


CalibrationSettings = CalibrationConfig  # its name before
