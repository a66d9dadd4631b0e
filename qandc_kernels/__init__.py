"""Multiply in few bits for diffusion transformers: int8 and int4 weights, int8 activations, fused epilogues.

Every op exists twice with one signature: as plain torch in :mod:`qandc_kernels.reference`, which is its definition, and
on Triton kernels, which run on NVIDIA GPUs from compute capability 8.0. Importing this package needs neither a GPU nor
Triton.
"""

from qandc_kernels import packing, reference
from qandc_kernels.backend import Backend, select_backend, use_backend
from qandc_kernels.capture import capturing
from qandc_kernels.errors import ArgumentError, DeviceError, QandCError
from qandc_kernels.ops._operands import FLOAT_DTYPES, LARGEST_K
from qandc_kernels.ops.attention import attention_quantize_per_tensor
from qandc_kernels.ops.batched import batched_linear
from qandc_kernels.ops.denoise import guided_step
from qandc_kernels.ops.linear import (
    int4_linear,
    int8_linear,
    int8_matmul,
    linear_gelu_quantize,
    linear_into_,
    quantized_linear,
    weight_only_linear,
)
from qandc_kernels.ops.quantize import (
    adaln_quantize_per_tensor,
    adaln_quantize_per_token,
    gelu_quantize_per_token,
    quantize_per_tensor,
    quantize_per_token,
)
from qandc_kernels.ops.repeated import RepeatedLinear
from qandc_kernels.ops.residual import corrected_gates, gated_sum, linear_gate_residual_
from qandc_kernels.ops.rotary import qk_norm_rope_
from qandc_kernels.packing import pack_int4, unpack_int4
from qandc_kernels.tiles.warmup import warm_up

__all__ = [
    "FLOAT_DTYPES",
    "LARGEST_K",
    "ArgumentError",
    "Backend",
    "DeviceError",
    "QandCError",
    "RepeatedLinear",
    "adaln_quantize_per_tensor",
    "adaln_quantize_per_token",
    "attention_quantize_per_tensor",
    "batched_linear",
    "capturing",
    "corrected_gates",
    "gated_sum",
    "gelu_quantize_per_token",
    "guided_step",
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "linear_gate_residual_",
    "linear_gelu_quantize",
    "linear_into_",
    "pack_int4",
    "packing",
    "qk_norm_rope_",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantized_linear",
    "reference",
    "select_backend",
    "unpack_int4",
    "use_backend",
    "warm_up",
    "weight_only_linear",
]
