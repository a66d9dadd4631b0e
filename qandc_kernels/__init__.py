"""Low-bit matrix kernels for diffusion transformers: int8 and int4 weights, int8 activations, fused dequantization.

Every op exists twice with one signature: as plain torch in :mod:`qandc_kernels.reference`, which is its definition, and
on Triton kernels, which run on NVIDIA GPUs from compute capability 8.0 (int4 weights are unpacked, then multiplied by
the int8 kernel). Importing this package needs neither a GPU
nor Triton.
"""

from qandc_kernels import reference
from qandc_kernels.backend import Backend, select_backend
from qandc_kernels.ops import int4_linear, int8_linear, int8_matmul, quantize_per_tensor, quantize_per_token
from qandc_kernels.packing import pack_int4, unpack_int4

__all__ = [
    "Backend",
    "int4_linear",
    "int8_linear",
    "int8_matmul",
    "pack_int4",
    "quantize_per_tensor",
    "quantize_per_token",
    "reference",
    "select_backend",
    "unpack_int4",
]
