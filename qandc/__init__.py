"""Quantize and cache diffusion transformers, after *Q&C: When Quantization Meets Cache* (arXiv 2503.02508).

Importing this package loads torch and nothing heavier; diffusers is imported by the functions that need it.
"""

from typing import TYPE_CHECKING, Any

from qandc.cache import apply_cache, apply_cache_to_dit, get_cache, remove_cache, reset_all_caches
from qandc.caching.compensation import FeatureCompensation
from qandc.caching.feature_cache import FeatureCache
from qandc.caching.schedule import CacheConfig, CalibratedSchedule, format_schedule, uniform_schedule
from qandc.errors import (
    CacheError,
    ConfigError,
    DataError,
    DeviceError,
    ModelError,
    OutputError,
    ProcessError,
    QandCError,
)
from qandc.fusion.fuse import fuse, fuse_dit, prepare_run, unfuse, unfuse_dit
from qandc.fusion.model_graph import graph, ungraph
from qandc.method.block_hessians import block_hessians
from qandc.method.feature_compensation import fit_feature_compensation
from qandc.method.pipeline_calibration import CalibrationReport, calibrate_pipeline
from qandc.method.pool import CandidatePool, record_pool
from qandc.method.prompt_calibration import calibrate_on_prompts
from qandc.method.run_pool import RunPool, pool_from_run
from qandc.method.saved import CalibratedModel, Preset, fashion_dit_preset, load, save
from qandc.method.schedule_calibration import calibrate_schedule, schedule_from_run
from qandc.method.settings import CalibrationConfig, CalibrationSettings
from qandc.optimize import OptimizationPlan, optimize, restore
from qandc.quantization.conversion import QuantizationReport, quantization_plan, quantization_report, quantize_model
from qandc.quantization.linear import QuantLinear
from qandc.quantization.observe import calibrate, calibrate_steps, calibration, input_hessians, smoothing_factors
from qandc.quantization.ranges import RangeConfig, StepRanges
from qandc.quantization.registration import config_class, register_when_imported
from qandc.quantizer import QuantConfig
from qandc.sampling.corrected_scheduler import compensated_scheduler
from qandc.sampling.loop import decode_latents, make_scheduler, sample_latents
from qandc.sampling.pipelines import fashion_dit_path, load_pipeline, wardrobe_path
from qandc.sampling.trajectories import (
    Trajectory,
    compensation_from_run,
    fit_compensation,
    record_trajectory,
    trajectory_from_run,
)
from qandc.tap import TapConfig, cluster_pool, select_samples
from qandc.variance_compensation import Compensation

if TYPE_CHECKING:
    from qandc.quantization.diffusers_quantizer import QandCConfig

__all__ = [
    "CacheConfig",
    "CacheError",
    "CalibratedModel",
    "CalibratedSchedule",
    "CalibrationConfig",
    "CalibrationReport",
    "CalibrationSettings",
    "CandidatePool",
    "Compensation",
    "ConfigError",
    "DataError",
    "DeviceError",
    "FeatureCache",
    "FeatureCompensation",
    "ModelError",
    "OptimizationPlan",
    "OutputError",
    "Preset",
    "ProcessError",
    "QandCConfig",
    "QandCError",
    "QuantConfig",
    "QuantLinear",
    "QuantizationReport",
    "RangeConfig",
    "RunPool",
    "StepRanges",
    "TapConfig",
    "Trajectory",
    "apply_cache",
    "apply_cache_to_dit",
    "block_hessians",
    "calibrate",
    "calibrate_on_prompts",
    "calibrate_pipeline",
    "calibrate_schedule",
    "calibrate_steps",
    "calibration",
    "cluster_pool",
    "compensated_scheduler",
    "compensation_from_run",
    "decode_latents",
    "fashion_dit_path",
    "fashion_dit_preset",
    "fit_compensation",
    "fit_feature_compensation",
    "format_schedule",
    "fuse",
    "fuse_dit",
    "get_cache",
    "graph",
    "input_hessians",
    "load",
    "load_pipeline",
    "load_quantized",
    "make_scheduler",
    "optimize",
    "pool_from_run",
    "prepare_run",
    "quantization_plan",
    "quantization_report",
    "quantize_model",
    "record_pool",
    "record_trajectory",
    "remove_cache",
    "reset_all_caches",
    "restore",
    "sample_latents",
    "save",
    "save_quantized",
    "schedule_from_run",
    "select_samples",
    "smoothing_factors",
    "trajectory_from_run",
    "unfuse",
    "unfuse_dit",
    "ungraph",
    "uniform_schedule",
    "wardrobe_path",
]

save_quantized, load_quantized = save, load  # their names before there was one format

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "QandCConfig":  # its base class is diffusers'
        return config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
