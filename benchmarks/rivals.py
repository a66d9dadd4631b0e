"""Other libraries' int8 layers, behind one signature: build once per weight, then call.

Every layer quantizes its bf16 activations to int8, one scale per row, inside the call. The first call with a shape
tunes or compiles for it and may wait for the GPU; later calls only launch kernels, so a CUDA graph can hold them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
import torch.nn.functional as F

__all__ = ["INDUCTOR_OPTIONS", "RIVALS", "NotInstalled", "library"]

# what ``mode="max-autotune-no-cudagraphs"`` and torchao's recommended inductor settings turn on
INDUCTOR_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
}

Layer = Callable[[torch.Tensor], torch.Tensor]
"""``[M, K]`` bf16 to ``[M, N]`` bf16."""


class NotInstalled(Exception):  # noqa: N818
    """The library is missing, or it refuses this torch or this GPU; the message says which, in a few words."""


@cache
def library(name: str) -> ModuleType:
    try:
        found = version(name)
    except PackageNotFoundError as error:
        raise NotInstalled(f"no {name}") from error
    try:
        with warnings.catch_warnings():  # pytest makes errors of them here
            warnings.simplefilter("ignore")
            return importlib.import_module(name.replace("-", "_"))
    except Exception as error:
        raise NotInstalled(f"{name} {found} with torch {torch.__version__}: {error}") from error


@cache
def _gemlite() -> ModuleType:
    """gemlite, set to choose its tiles for the M of each call rather than for the next of a list that ends at 4096."""
    if not torch.cuda.is_available():
        raise NotInstalled("gemlite needs a GPU")
    gemlite = library("gemlite")
    gemlite.set_autotune_setting(lambda rows: rows)
    gemlite.set_autotune("fast")  # also what makes the kernels read the setting before
    return gemlite


def gemlite_a8w8(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """gemlite's ``A8W8_INT8_dynamic``: int8 weights, one fp32 scale per output channel; int8 activations.

    Three kernels a call: quantize, multiply and scale, add the bias. Tuned in the mode "fast", gemlite's default: it
    compiles and times some 17 tiles for a new (N, K), and times them again for a new M. (The "max" mode has 2,000.)
    What gemlite ships for the H100 covers none of the shapes of DiT-XL/2. Layers of one shape share the outcome.
    """
    helper = _gemlite().helper
    return helper.A8W8_INT8_dynamic(device=weight.device, dtype=weight.dtype).from_weights(weight, bias)


def gemlite_a8w4(weight: torch.Tensor, bias: torch.Tensor, packing_bitwidth: int = 32) -> Layer:
    """gemlite's packed int4 weights, one fp32 scale per output channel and a zero point of 8; int8 activations.

    Not one of its named processors: ``A8W4_HQQ_INT_dynamic`` means groups of weights and fp8 activations. With int8
    activations gemlite can't group, so this is one scale per channel, put together as its 2-bit ``A8W158_INT_dynamic``
    is. The product's kernel unpacks the weights. Eight share an int32, gemlite's default; a ``packing_bitwidth`` of 8
    packs two per byte. Tuned as :func:`gemlite_a8w8` is.
    """
    gemlite = _gemlite()
    n, k = weight.shape
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 7
    codes = (weight.float() / scale).round().clamp(-7, 7).add(8).to(torch.uint8)
    layer = gemlite.GemLiteLinear(
        4,
        group_size=k,
        in_features=k,
        out_features=n,
        input_dtype=gemlite.DType.INT8,
        output_dtype=gemlite.DType.BF16,
        scaled_activations=True,
    )
    return layer.pack(codes, scale, zeros=8, bias=bias, packing_bitwidth=packing_bitwidth)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias)


@cache
def _compiled_linear() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """``F.linear``, compiled once per (M, N, K) whichever weight it is called with."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # 8 shapes, as torch has it
    return torch.compile(_linear, fullgraph=True, dynamic=False, options=INDUCTOR_OPTIONS)


def torchao_int8dq(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """torchao's ``Int8DynamicActivationInt8WeightConfig``, compiled: int8 weights, one fp32 scale per output channel.

    Compiled for each shape with what ``mode="max-autotune-no-cudagraphs"`` and torchao's recommended inductor settings
    turn on (the latter for this function only, not for the process). Layers of one shape share the compilation.
    """
    library("torchao")
    warnings.filterwarnings("ignore", message="Int8Tensor does not implement")  # said while compiling; harmless
    quantization = importlib.import_module("torchao.quantization")
    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    quantized, linear = layer.weight, _compiled_linear()
    return lambda x: linear(x, quantized, bias)


RIVALS: dict[str, Callable[[torch.Tensor, torch.Tensor], Layer]] = {
    "gemlite A8W8": gemlite_a8w8,
    "gemlite A8W4": gemlite_a8w4,
    "torchao int8dq, compiled": torchao_int8dq,
}
