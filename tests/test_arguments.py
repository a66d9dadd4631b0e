"""Every public function, class and method refuses bad values of every parameter, with an error of ours and in time."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import qandc
from qandc import DataError, ModelError, QandCError
from qandc.support.arguments import Between, Seeds, checked
from qandc.variance_compensation import FittedFor
from tests.conftest import in_time, make_dit

Between5 = Annotated[int, Between(1, 5)]
SECONDS = 20  # a call that takes longer hangs
NAN, INF = float("nan"), float("inf")
STEPS = 3
TEMPORARY = tempfile.TemporaryDirectory(prefix="qandc-arguments-")  # removed with the process
FOLDER = Path(TEMPORARY.name)


@functools.cache
def pipeline() -> Any:
    from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(3, 3, **blocks, block_out_channels=(8,), norm_num_groups=4, sample_size=4)
    return DiTPipeline(dit(), vae, DDPMScheduler(clip_sample=False))


@functools.cache
def unet() -> nn.Module:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(4, 4, 4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)


def dit() -> Any:
    return make_dit(1, 2, 8, 4)


def quantized(calibrated: bool = False) -> Any:
    model = qandc.quantize_model(dit())
    return qandc.calibrate(model, [batch()]) if calibrated else model


def fused() -> Any:
    return qandc.fuse_dit(quantized(calibrated=True))


def cached() -> Any:
    model = dit()
    qandc.apply_cache_to_dit(model)
    return model


def optimized() -> Any:
    pipe = copy.deepcopy(pipeline())
    qandc.optimize(pipe)
    return pipe


def batch() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.ones(1, 4, 4, 4), "timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=100, clip_sample=False)


def compensation() -> qandc.Compensation:
    return qandc.Compensation(torch.ones(STEPS, 4), torch.zeros(STEPS, 4), "sample", "paper", fitted_for())


def fitted_for() -> FittedFor:
    return FittedFor("DDIMScheduler", (66, 33, 0), 1.5, "a model")


@functools.cache
def trajectory() -> qandc.Trajectory:
    return qandc.record_trajectory(dit(), ddim(), [1, 2], num_inference_steps=STEPS)


@functools.cache
def pool() -> qandc.CandidatePool:
    return qandc.record_pool(dit(), ddim(), [1, 2], num_inference_steps=STEPS)


class Prompted:
    """A pipeline of a kind that nobody knows."""

    def __init__(self) -> None:
        self.transformer, self.scheduler = dit(), ddim()
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, prompt: str, generator: Any = None, output_type: str = "pil") -> Any:
        run = {"num_inference_steps": STEPS, "seeds": [generator.initial_seed()]}
        return qandc.sample_latents(self.transformer, self.scheduler, [len(prompt)], **run)


def prompted() -> dict[str, P]:
    pipe = Prompted()
    return {"pipe": P(pipe), "run": P(functools.partial(pipe, "a", torch.Generator()))}


@functools.cache
def run_pool() -> qandc.RunPool:
    good = {name: value.good for name, value in running().items()}
    return qandc.pool_from_run(**good)


def schedule() -> qandc.CalibratedSchedule:
    return qandc.CalibratedSchedule((True, True, False), (66, 33, 0), "branch", 0)


def preset(model: Any = None) -> qandc.Preset:
    model = quantized(calibrated=True) if model is None else model
    return qandc.Preset.of(model, qandc.QuantConfig(), schedule(), compensation())


def report() -> qandc.QuantizationReport:
    return qandc.quantization_report(quantized())


def saved(name: str) -> Path:
    """A file or directory that holds what is saved under this name."""
    path = FOLDER / name
    if not path.exists():
        {
            "schedule.json": schedule().save,
            "gains.safetensors": compensation().save,
            "features.safetensors": feature_compensation().save,
            "preset": preset().save,
            "checkpoint": functools.partial(qandc.save, quantized()),
            "pipeline": pipeline().save_pretrained,
        }[name](path)
    return path


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "np.True": lambda: np.True_,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1/2": lambda: 0.5,
    "nan": lambda: NAN,
    "np.nan": lambda: np.float64("nan"),
    "inf": lambda: INF,
    "-inf": lambda: -INF,
    "10**12": lambda: 10**12,
    "10**30": lambda: 10**30,
    "10**400": lambda: 10**400,
    "-10**5000": lambda: -(10**5000),
    "1e308": lambda: 1e308,
    "1j": lambda: 1j,
    "''": lambda: "",
    "'x'": lambda: "x",
    "NUL": lambda: "a\0b",
    "long": lambda: "x" * 5000,
    "surrogate": lambda: "\ud800",
    "b'x'": lambda: b"x",
    "bytearray": lambda: bytearray(b"x"),
    "path": lambda: Path("/dev/null/x"),
    "[]": list,
    "()": tuple,
    "{}": dict,
    "set()": set,
    "{1}": lambda: {1},
    "[None]": lambda: [None],
    "['x']": lambda: ["x"],
    "['']": lambda: [""],
    "[True]": lambda: [True],
    "[-1]": lambda: [-1],
    "[nan]": lambda: [NAN],
    "[10**30]": lambda: [10**30],
    "[[1]]": lambda: [[1]],
    "[object]": lambda: [object()],
    "(object,)": lambda: (object(),),
    "{1: 1}": lambda: {1: 1},
    "{'x': 1}": lambda: {"x": 1},
    "{'x': object}": lambda: {"x": object()},
    "{'x': tensor}": lambda: {"x": torch.ones(3)},
    "object": object,
    "class": lambda: int,
    "function": lambda: lambda: None,
    "generator": lambda: (i for i in (1,)),
    "endless": itertools.count,
    "endless texts": lambda: itertools.repeat("x"),
    "range": lambda: range(10**30),
    "array": lambda: np.array([0.5]),
    "array []": lambda: np.zeros(0),
    "array nan": lambda: np.array([NAN]),
    "array 0-d": lambda: np.array(1),
    "array 3-d": lambda: np.zeros((2, 2, 2)),
    "array object": lambda: np.array([object()]),
    "array text": lambda: np.array(["x"]),
    "array bool": lambda: np.array([True]),
    "array complex": lambda: np.array([1j]),
    "tensor": lambda: torch.tensor([0.5]),
    "tensor 0-d": lambda: torch.tensor(1),
    "tensor []": lambda: torch.zeros(0),
    "tensor nan": lambda: torch.tensor([NAN]),
    "tensor 5-d": lambda: torch.zeros(1, 1, 1, 1, 1),
    "tensor bool": lambda: torch.tensor([True]),
    "tensor complex": lambda: torch.tensor([1j]),
    "tensor meta": lambda: torch.ones(1, device="meta"),
    "tensor sparse": lambda: torch.ones(1, 4, 4, 4).to_sparse(),
    "tensor csr": lambda: torch.eye(3).to_sparse_csr(),
    "tensor nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "tensor jagged": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
    "tensor huge": lambda: torch.zeros(1, dtype=torch.int64).expand(2**41),
    "tensor lazy": lambda: nn.UninitializedParameter(requires_grad=False),
    "tensor quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    "linear": lambda: nn.Linear(4, 4),
    "unet": unet,
    "pipeline": pipeline,
    "model class": lambda: nn.Linear,
    "scheduler class": lambda: type(ddim()),
    "int8": lambda: torch.int8,
    "float64": lambda: torch.float64,
    "cuda:99": lambda: "cuda:99",
    "mps": lambda: torch.device("mps"),
    "meta": lambda: torch.device("meta"),
}
CALLABLES = "class function linear unet pipeline model_class scheduler_class"
MODULES = "linear unet"
TEXTS = "'' 'x' NUL long surrogate cuda:99"
LATER = (  # looked at when they are used
    f"{CALLABLES} [] () set() {{1}} [None] ['x'] [''] [True] [-1] [nan] [10**30] [[1]] [object] (object,) range array "
    "array_[] array_nan array_3-d array_object array_text array_bool array_complex"
)
NEW_PATHS = "'x' path cuda:99"  # that can be written, or are refused when they are


class P(NamedTuple):
    """A good value of a parameter, and the labels of the bad values that are good for it."""

    good: Any
    legal: str = ""


FLAG = "True False np.True"
RUN = {"num_inference_steps": P(STEPS), "guidance_scale": P(1.5, "0 1/2")}
SEEDS, CALLBACK = P([7, 8], "None"), P(None, f"None {CALLABLES}")
BITS = {"w_bits": P(8), "a_bits": P(8)}
PATTERNS = P(["norm"], "[] () ['x'] array_[] array_text tensor_[]")
SKIPPED = P(["norm"], "None [] () array_[] tensor_[]")
TENSORS = "tensor tensor_0-d tensor_5-d tensor_[] tensor_huge tensor_nan"


def sampling(**changes: P) -> dict[str, P]:
    return {"transformer": P(dit()), "scheduler": P(ddim()), "conditions": P([1, 2]), **RUN, **changes}


def running(**changes: P) -> dict[str, P]:
    model, run = dit(), {"num_inference_steps": STEPS, "seeds": [0]}
    return {"transformer": P(model), "run": P(lambda: qandc.sample_latents(model, ddim(), [1], **run)), **changes}


def feature_compensation() -> qandc.FeatureCompensation:
    config = qandc.CacheConfig(schedule=(True, False), timesteps=(2.0, 1.0))
    return qandc.FeatureCompensation(config, torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


def batches() -> P:
    return P([batch()])


def ranges() -> P:
    return P(qandc.RangeConfig(), "None")


def choosing() -> dict[str, P]:
    return {"config": P(qandc.TapConfig(1, subsamples=1), "None"), "method": P("random"), "seed": P(1, "0")}


def features() -> dict[str, P]:
    return {"features": P(np.random.default_rng(0).random((6, 3))), "times": P(np.arange(6.0))}


TABLE: dict[str, Callable[[], dict[str, P]]] = {
    "CacheConfig": lambda: {
        "mode": P("delta"),
        "interval": P(2, "None"),
        "schedule": P(None, "None"),
        "order": P(1),
        "warm_up_steps": P(1, "None"),
        "num_inference_steps": P(STEPS, "None"),
        "last_step_computed": P(False, FLAG),
        "storage_dtype": P("int8", "None"),
        "threshold": P(None, "None"),
        "timesteps": P((9, 5, 1), "None"),
    },
    "CacheConfig.of_steps": lambda: {"self": P(qandc.CacheConfig(interval=2)), "num_inference_steps": P(STEPS)},
    "CacheConfig.check_run": lambda: {
        "self": P(qandc.CacheConfig(schedule=(True, False), timesteps=(9, 1))),
        "timesteps": P((9, 1)),
    },
    "CalibratedSchedule": lambda: {
        "schedule": P((True, True)),
        "timesteps": P((9, 1)),
        "mode": P("taylor"),
        "order": P(1, "0"),
        "error": P(1.0, "None 0 1/2 10**12 10**30 1e308"),
        "uniform_error": P(1.0, "None 0 1/2 10**12 10**30 1e308"),
    },
    "CalibratedSchedule.config": lambda: {"self": P(schedule()), "storage_dtype": P("int8", "None")},
    "CalibratedSchedule.save": lambda: {"self": P(schedule()), "path": P(FOLDER / "x.json", "'x' cuda:99")},
    "CalibratedSchedule.load": lambda: {"path": P(saved("schedule.json"))},
    "CalibrationReport": lambda: {
        "preset": P(preset()),
        "quantization": P(report()),
        "psnr_uncompensated": P(torch.ones(10), TENSORS),
        "psnr_compensated": P(torch.ones(10), f"None {TENSORS}"),
    },
    "CalibrationReport.record": lambda: {
        "self": P(qandc.CalibrationReport(preset(), report(), torch.ones(10), None)),
        "settings": P(qandc.CalibrationConfig()),
        "source": P("x", f"None {TEXTS}"),
    },
    "CalibrationConfig": lambda: {
        **RUN,
        "scheduler": P("ddim"),
        **BITS,
        "rounding": P("gptq", "None"),
        "smoothing": P(True, FLAG),
        "ranges": P(qandc.RangeConfig()),
        "cache_mode": P("delta"),
        "cache_interval": P(2),
        "uniform": P(False, FLAG),
        "pool_images": P(20),
        "pool_with_cache": P(False, FLAG),
        "select": P("tap"),
        "samples": P(20),
        "clusters": P(5),
        "seed": P(0, "0"),
        "compensation": P("samples", "None"),
        "feature_images": P(5),
        "vc": P("paper", "None"),
        "vc_target": P("noise"),
        "vc_start": P(0, "0"),
        "vc_samples": P(5),
    },
    "CandidatePool": lambda: {
        "hidden_states": P(torch.ones(2, 4, 4, 4)),
        "timesteps": P(torch.tensor([5, 5])),
        "steps": P(torch.tensor([0, 0])),
        "conditions": P(torch.tensor([1, 1])),
        "null_label": P(10, "None 0"),
    },
    "CandidatePool.select": lambda: {"self": P(pool()), "count": P(2), **choosing()},
    "CandidatePool.batches": lambda: {
        "self": P(pool()),
        "indices": P([0, 1], "None [] () array_[] tensor_[]"),
        "batch_size": P(2),
        "by_timestep": P(True, FLAG),
        "device": P("cpu", "meta"),
        "dtype": P(torch.float32, "float64"),
    },
    "Compensation": lambda: {
        "gain": P(torch.ones(STEPS, 4)),
        "mean": P(torch.ones(STEPS, 4)),
        "target": P("noise"),
        "form": P("paper", f"{TEXTS}"),
        "fitted_for": P(fitted_for()),
    },
    "Compensation.to": lambda: {"self": P(compensation()), "device": P("cpu")},
    "Compensation.check": lambda: {"self": P(compensation()), "run": P({"guidance_scale": 1.5}, "{}")},
    "Compensation.save": lambda: {"self": P(compensation()), "path": P(FOLDER / "x.safetensors")},
    "Compensation.load": lambda: {"path": P(saved("gains.safetensors"))},
    "FeatureCache": lambda: {"config": P(qandc.CacheConfig()), "compensation": P(None, "None")},
    "FeatureCompensation": lambda: {
        "config": P(feature_compensation().config),
        "gains": P(torch.ones(1, 1, 1, 2)),
        "offsets": P(torch.zeros(1, 1, 1, 2)),
    },
    "FeatureCompensation.load": lambda: {"path": P(saved("features.safetensors"))},
    "FeatureCompensation.save": lambda: {"self": P(feature_compensation()), "path": P(FOLDER / "new", "'x' cuda:99")},
    "FeatureCompensation.check": lambda: {
        "self": P(feature_compensation()),
        "config": P(feature_compensation().config),
    },
    "Preset": lambda: {
        "config": P(qandc.QuantConfig()),
        "layers": P({"a.act_scale": torch.tensor(1.0)}, "{}"),
        "schedule": P(schedule()),
        "compensation": P(compensation(), "None"),
        "scheduler": P("DDIMScheduler", TEXTS),
        "guidance_scale": P(1.5, "0 1/2"),
        "structure": P(preset().structure),
        "model": P("x", f"None {TEXTS}"),
        "features": P(None, "None"),
    },
    "Preset.of": lambda: {
        "model": P(quantized(calibrated=True)),
        "config": P(qandc.QuantConfig()),
        "schedule": P(schedule()),
        "compensation": P(compensation(), "None"),
        "features": P(None, "None"),
        "scheduler": P("DDIMScheduler", f"None {TEXTS}"),
        "guidance_scale": P(1.5, "None 0 1/2"),
        "keep_weights": P(True, FLAG),
        "source": P("x", f"None {TEXTS}"),
    },
    "Preset.check": lambda: {"self": P(preset()), "transformer": P(dit()), "scheduler": P(ddim()), **RUN},
    "Preset.buffers": lambda: {"self": P(preset()), "name": P("act_scale", TEXTS)},
    "Preset.base_model": lambda: {"self": P(preset()), "given": P("x", f"None {TEXTS}")},
    "Preset.quantize": lambda: {"self": P(preset()), "model": P(dit())},
    "Preset.save": lambda: {"self": P(preset()), "directory": P(FOLDER / "x", NEW_PATHS), "pipe": P(None, "None")},
    "Preset.load": lambda: {"directory": P(saved("preset"))},
    "QandCConfig": lambda: {
        **BITS,
        "skip_patterns": P(["norm"], f"None {PATTERNS.legal}"),
        "weight_clip": P("mse"),
        "conditioning": P("W8A8", "None"),
        "layers": P({"x": "W8A8"}, "None"),
        "quant_method": P("qandc"),
    },
    "QuantConfig": lambda: {
        **BITS,
        "skip_patterns": P(["norm"], f"None {PATTERNS.legal}"),
        "weight_clip": P("mse"),
        "conditioning": P("W8A8", "None"),
    },
    "QuantLinear": lambda: {
        "in_features": P(4, "0"),
        "out_features": P(4, "0"),
        "bias": P(True, FLAG),
        **BITS,
        "device": P("cpu", "None meta"),
        "dtype": P(torch.float16, "None"),
    },
    "QuantLinear.from_linear": lambda: {
        "linear": P(nn.Linear(3, 2), "linear"),
        **BITS,
        "smoothing": P(torch.ones(3), "None"),
        "weight_clip": P("mse"),
        "hessian": P(torch.eye(3), "None"),
        "weight": P(torch.ones(2, 3), "None"),
    },
    "QuantLinear.set_static_range": lambda: {
        "self": P(qandc.QuantLinear(4, 4)),
        "scale": P(torch.tensor(1.0)),
        "zero_point": P(torch.tensor(1, dtype=torch.int32), "None tensor_0-d"),
    },
    "OptimizationPlan": lambda: {"pipeline": P("x", TEXTS), "transformers": P([], "[] () array_[] tensor_[]")},
    "QuantizationReport": lambda: {
        "layers": P(report().layers, "[] () array_[] tensor_[]"),
        "other_bytes": P(1, "0 10**12 10**30 10**400"),
    },
    "CalibratedModel": lambda: {
        "model": P(quantized(), MODULES),
        "schedule": P(schedule(), "None"),
        "compensation": P(compensation(), "None"),
        "step_ranges": P(None, "None"),
        "features": P(feature_compensation(), "None"),
    },
    "RunPool": lambda: {"directory": P(run_pool().directory)},
    "RunPool.select": lambda: {"self": P(run_pool()), "count": P(2), **choosing()},
    "RunPool.batches": lambda: {
        "self": P(run_pool()),
        "indices": P([0, 1], "None [] () array_[] tensor_[]"),
        "device": P("cpu", "meta"),
    },
    "RangeConfig": lambda: {"estimator": P("mse"), "percentile": P(99.0), "symmetric": P(True, FLAG)},
    "StepRanges": lambda: {
        "timesteps": P(torch.tensor([5.0]), "tensor"),
        "scales": P({"a": torch.tensor([1.0])}),
        "zero_points": P({"a": torch.tensor([1], dtype=torch.int32)}, "{}"),
    },
    "TapConfig": lambda: {
        "clusters": P(2),
        "alpha": P(0.5, "0 1/2"),
        "kernel": P("laplace"),
        "bandwidth": P(1.0, "1/2 10**12 10**30 1e308"),
        "subsamples": P(1),
        "rate": P(0.5, "1/2"),
    },
    "Trajectory": lambda: {
        "samples": P(trajectory().samples),
        "noises": P(trajectory().noises),
        "conditions": P((1, 2)),
        "seeds": P((1, 2)),
        **RUN,
    },
    "apply_cache": lambda: {
        "transformer": P(dit()),
        "cache_interval": P(2, "None"),
        "config": P(None, "None"),
        "compensation": P(None, "None"),
    },
    "block_hessians": lambda: {
        "model": P(dit()),
        "batches": P([batch()], LATER),
        "skip_patterns": P(["norm"], f"{SKIPPED.legal} set()"),
    },
    "calibrate": lambda: {
        "model": P(quantized()),
        "batches": batches(),
        "symmetric": P(True, FLAG),
        "ranges": ranges(),
    },
    "calibrate_on_prompts": lambda: {
        "pipe": P(Prompted()),
        "prompts": P(["a coat"], "['x'] array_text"),
        **BITS,
        "conditioning": P("W8A8", "None"),
        "cache": P(None, "None"),
        "pool_images": P(1),
        "samples": P(2),
        "select": P("random"),
        "uniform": P(True, FLAG),
        "smoothing": P(True, FLAG),
        "gptq": P(False, f"None {FLAG}"),
        "compensation": P("none", "None"),
        "transformer": P("transformer"),
        "pool_directory": P(None, "None 'x' cuda:99"),
        "progress": P(None, f"None {CALLABLES}"),
    },
    "calibrate_pipeline": lambda: {
        "pipe": P(copy.deepcopy(pipeline()), "pipeline"),
        "settings": P(qandc.CalibrationConfig(2, pool_images=2, samples=2, clusters=1, vc="none", uniform=True)),
        "directory": P(FOLDER / "calibrated", "'x' cuda:99"),
        "overwrite": P(False, FLAG),
        "source": P("x", f"None {TEXTS}"),
        "pool_directory": P(None, "None 'x' cuda:99"),
        "checkpoint": P(True, FLAG),
        "progress": P(lambda stage, done, total: None, CALLABLES),
    },
    "calibrate_schedule": lambda: sampling(
        mode=P("branch"),
        order=P(1),
        computed_steps=P(2),
        compensated=P(False, FLAG),
        seeds=SEEDS,
        callback=CALLBACK,
    ),
    "calibrate_steps": lambda: {
        "model": P(quantized()),
        "batches": batches(),
        "groups": P(1, "None"),
        "ranges": ranges(),
    },
    "calibration": lambda: {"model": P(quantized()), "symmetric": P(True, FLAG), "ranges": ranges()},
    "cluster_pool": lambda: {**features(), **choosing(), "method": P("kmeans")},
    "compensated_scheduler": lambda: {
        "scheduler": P(ddim()),
        "compensation": P(compensation()),
        "force": P(True, FLAG),
    },
    "compensation_from_run": lambda: {
        **prompted(),
        "reference": P(qandc.trajectory_from_run(**{name: value.good for name, value in prompted().items()})),
        "form": P("paper"),
        "target": P("noise"),
        "start_step": P(1, "0"),
        "shrinkage": P(0.5, "0 1/2"),
    },
    "trajectory_from_run": prompted,
    "decode_latents": lambda: {"vae": P(pipeline().vae), "latents": P(torch.ones(1, 4, 4, 4))},
    **dict.fromkeys(("fashion_dit_path", "wardrobe_path"), dict),
    "fashion_dit_preset": lambda: {"w_bits": P(8)},
    "fit_compensation": lambda: {
        "reference": P(trajectory()),
        "transformer": P(dit()),
        "scheduler": P(ddim()),
        "form": P("paper"),
        "target": P("noise"),
        "start_step": P(1, "0"),
        "shrinkage": P(0.5, "0 1/2"),
        "callback": CALLBACK,
    },
    "format_schedule": lambda: {
        "schedule": P([True], "[True] array_bool tensor_bool"),
        "timesteps": P([5], "None [-1] [10**30] tensor array"),
    },
    "fit_feature_compensation": lambda: running(
        config=P(qandc.CacheConfig()),
        target=P(None, "None"),
        along=P("corrected"),
        form=P("least_squares", "None"),
        pull=P(0.5, "None 0 1/2"),
        held_out=P(None, "None"),
    ),
    "fuse": lambda: {
        "transformer": P(quantized(calibrated=True)),
        "cuda_graphs": P(True, FLAG),
        "step_ranges": P(None, "None"),
    },
    "get_cache": lambda: {"transformer": P(dit(), MODULES)},
    "graph": lambda: {
        "model": P(dit(), MODULES),
        "limit": P(2),
        "pipe": P(pipeline(), "None pipeline"),
        "offload_modulation": P(False, FLAG),
    },
    "input_hessians": lambda: {
        "model": P(dit()),
        "batches": batches(),
        "skip_patterns": P(["norm"], f"{SKIPPED.legal} set()"),
    },
    **dict.fromkeys(
        ("load", "load_quantized"),
        lambda: {
            "directory": P(saved("checkpoint")),
            "device": P("cpu"),
            "dtype": P(torch.float16, "None"),
            "base": P(None, "None"),
        },
    ),
    "load_pipeline": lambda: {"model": P(saved("pipeline"), "None"), "device": P("cpu"), "dtype": P(torch.float32)},
    "make_scheduler": lambda: {
        "name": P("ddim"),
        "config": P({"num_train_timesteps": 100}, "{} {'x':_1} {'x':_object} {'x':_tensor}"),
    },
    "optimize": lambda: {
        "pipe": P(copy.deepcopy(pipeline()), "pipeline"),
        **BITS,
        "cache": P("branch", "None"),
        "cache_interval": P(2, "None"),
        "transformer": P("transformer", "None"),
        "conditioning": P("W8A8", "None"),
        "calibrate_on": P(None, "None"),
        "calibrated": P(None, "None"),
        "compile": P(False, f"None {FLAG}"),
        "offload_modulation": P(False, FLAG),
        "restorable": P(True, FLAG),
    },
    "pool_from_run": lambda: running(directory=P(None, "None 'x' cuda:99"), about=P("x", TEXTS)),
    "prepare_run": lambda: {
        "transformer": P(fused()),
        "timesteps": P(torch.tensor([9.0, 1.0]), "tensor tensor_[]"),
        "conditions": P(torch.tensor([1, 2])),
    },
    "quantization_plan": lambda: {
        "model": P(dit(), "unet"),
        **BITS,
        "skip_patterns": SKIPPED,
        "conditioning": P("W8A8", "None"),
    },
    "quantization_report": lambda: {"model": P(dit(), MODULES)},
    "quantize_model": lambda: {
        "model": P(dit(), "unet"),
        **BITS,
        "skip_patterns": SKIPPED,
        "conditioning": P("W8A8", "None"),
        "weight_clip": P("mse"),
        "smoothing": P({}, "None {}"),
        "hessians": P({}, "None {}"),
    },
    "record_pool": lambda: sampling(
        seeds=SEEDS, batch_size=P(1), directory=P(None, "None 'x' cuda:99"), callback=CALLBACK
    ),
    "record_trajectory": lambda: sampling(seeds=SEEDS, callback=CALLBACK),
    "remove_cache": lambda: {"transformer": P(cached())},
    "reset_all_caches": lambda: {"transformer": P(dit(), MODULES)},
    "restore": lambda: {"pipe": P(optimized())},
    "sample_latents": lambda: sampling(
        seeds=P([7, 8]),
        callback=CALLBACK,
        compensation=P(None, "None"),
        force_compensation=P(False, FLAG),
        corrector=P(None, "None"),
        cuda_graph=P(False, FLAG),
    ),
    "schedule_from_run": lambda: running(mode=P("branch"), order=P(1), computed_steps=P(2), compensated=P(False, FLAG)),
    **dict.fromkeys(
        ("save", "save_quantized"),
        lambda: {
            "model": P(quantized()),
            "directory": P(FOLDER / "model", "'x' cuda:99"),
            "overwrite": P(True, FLAG),
            "schedule": P(schedule(), "None"),
            "compensation": P(compensation(), "None"),
            "step_ranges": P(None, "None"),
            "features": P(None, "None"),
        },
    ),
    "select_samples": lambda: {**features(), "count": P(2), **choosing()},
    "smoothing_factors": lambda: {
        "model": P(dit()),
        "batches": batches(),
        "names": P(None, "None [] () set() array_[]"),
        "alpha": P(0.5, "0 1/2"),
        "skip_patterns": P(["norm"], f"{SKIPPED.legal} set()"),
    },
    "unfuse": lambda: {"transformer": P(fused())},
    "ungraph": lambda: {"model": P(qandc.graph(dit()))},
    "uniform_schedule": lambda: {
        "num_inference_steps": P(STEPS),
        "interval": P(2),
        "warm_up_steps": P(1),
        "last_step_computed": P(True, FLAG),
    },
}

# called in each step, by each layer, or by other parts of the package alone
INTERNAL = {
    "CacheConfig.computes", "CacheConfig.stores", "Compensation.noise", "Compensation.sample", "QuantLinear.forward",
    "QuantLinear.extra_repr", "QuantLinear.fault_of", "QuantLinear.make_optional", "QuantConfig.skips",
    "QuantLinear.check_state", "QuantLinear.faults_of", "Compensation.of_parts", "FeatureCompensation.of_parts",
    "QuantLinear.multiply", "QuantLinear.product_to_compile", "CacheConfig.check_planned",
    *(f"FeatureCache.{method}" for method in vars(qandc.FeatureCache)),
}  # fmt: skip
EXCEPTIONS = {
    name for name in qandc.__all__ if inspect.isclass(found := getattr(qandc, name)) and issubclass(found, Exception)
}


def named(name: str) -> Callable[..., Any]:
    return functools.reduce(getattr, name.split("."), qandc)


def methods(name: str) -> Iterator[str]:
    """Public methods, with parameters, that a class itself defines."""
    for method, value in vars(getattr(qandc, name)).items():
        takes = inspect.isfunction(value) and len(inspect.signature(value).parameters) > 1
        if not method.startswith("_") and (takes or isinstance(value, classmethod)):
            yield f"{name}.{method}"


def test_the_table_is_complete():
    aliases = {"apply_cache_to_dit": "apply_cache", "fuse_dit": "fuse", "unfuse_dit": "unfuse"}
    aliases["CalibrationSettings"] = "CalibrationConfig"
    assert all(named(alias) is named(name) for alias, name in aliases.items())
    public = set(qandc.__all__) - EXCEPTIONS - aliases.keys()
    classes = {name for name in public if inspect.isclass(getattr(qandc, name))}
    assert set(TABLE) == public | {method for name in classes for method in methods(name)} - INTERNAL
    for name, parameters in TABLE.items():
        of_call = inspect.signature(named(name)).parameters.values()
        assert set(parameters()) == {p.name for p in of_call if p.kind is not p.VAR_KEYWORD}, name
        for parameter in parameters().values():
            assert set(parameter.legal.replace("_", " ").split()) <= set(" ".join(VALUES).split())


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: nested and compressed tensors are beta
def test_bad_values_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, parameters = named(name), TABLE[name]()
    good = {parameter: value.good for parameter, value in parameters.items()}
    wrong = []
    for parameter in good.keys() - {"self"}:
        for label, make in VALUES.items():
            if label.replace(" ", "_") in parameters[parameter].legal.split():
                continue
            try:
                with in_time(SECONDS):
                    call(**{**good, parameter: make()})
                wrong.append(f"{parameter} took {label}")
            except QandCError:
                pass
            except Exception as error:
                wrong.append(f"{parameter} = {label}: {type(error).__name__}: {str(error)[:60]}")
    assert not wrong, "\n".join(sorted(wrong))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TABLE)
def test_good_values_are_taken(name):
    named(name)(**{parameter: value.good for parameter, value in TABLE[name]().items()})


@checked
def takes(
    self: Any = None, count: Between5 = 1, seeds: Seeds = (), flags: Sequence[bool] = (), names: Iterable[str] = ()
) -> tuple[Any, ...]:
    return count, seeds, flags, names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"count": np.int64(5)}, (5, (), (), ())),
        ({"seeds": torch.tensor([3, 4])}, (1, [3, 4], (), ())),
        ({"seeds": [torch.tensor(3), np.array(4), np.uint8(5)]}, (1, [3, 4, 5], (), ())),
        ({"flags": np.array([True, False])}, (1, (), [True, False], ())),
        ({"names": (name for name in "ab")}, (1, (), (), ["a", "b"])),
    ],
)
def test_what_is_meant_is_converted(given, expected):
    found = takes(**given)
    assert found == expected
    assert all(type(value) in (int, list, tuple) for value in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 6}, r"count is 6; give an integer >= 1 \(at most 5\) \(takes\)"),
        ({"seeds": [1, 2.5]}, r"whose every element is an integer >= 0 \(2.5 is not\)"),
        ({"seeds": range(10**9)}, "at most 1048576 elements"),
        ({"names": itertools.repeat("x")}, "at most 1048576 elements"),
        ({"count": 10**5000}, "count is a int too long to print"),
    ],
)
def test_messages_name_value_and_bounds(given, message):
    with in_time(SECONDS), pytest.raises(qandc.ConfigError, match=message):
        takes(**given)


def test_a_batch_that_is_no_input_names_the_model():
    model = quantized()
    for bad in (object(), {"hidden_state": 1}, (torch.ones(3),), {**batch(), "class_labels": None}):
        with pytest.raises(DataError, match="a batch is no input of DiTTransformer2DModel") as caught:
            qandc.calibrate(model, [bad])
        assert caught.value.__cause__ is not None


def test_sampling_names_what_it_knows():
    with pytest.raises(ModelError, match="sampling knows diffusers' DiTTransformer2DModel; got Linear"):
        qandc.sample_latents(nn.Linear(4, 4), ddim(), [1], seeds=[0])
    with pytest.raises(ModelError, match=r"pass pipe\.transformer"):
        qandc.sample_latents(pipeline(), ddim(), [1], seeds=[0])
