"""Compile kernels before they are needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qandc_kernels.backend import select_backend
from qandc_kernels.errors import ArgumentError
from qandc_kernels.ops._operands import LARGEST_ROWS, check_dtype, check_integer, check_layers, check_sizes
from qandc_kernels.ops.linear import int4_linear, int8_linear, linear_gelu_quantize
from qandc_kernels.ops.quantize import (
    adaln_quantize_per_tensor,
    adaln_quantize_per_token,
    gelu_quantize_per_token,
    quantize_per_tensor,
    quantize_per_token,
)
from qandc_kernels.ops.residual import linear_gate_residual_

__all__ = ["warm_up"]


def warm_up(
    layers: Iterable[tuple[int, int]],
    rows: Iterable[int],
    dtype: torch.dtype = torch.bfloat16,
    w_bits: int = 8,
    tokens: int = 256,
    device: torch.device | str = "cuda",
) -> None:
    """Run the kernels of quantized layers once, on zeros, so that a first real call finds them compiled.

    Static ranges with and without zero points, dynamic ranges, all epilogues; not weights in groups, weight-only
    layers or multipliers. A kernel takes about a second to compile; Triton keeps it on disk for later processes. On a
    device without Triton kernels there is nothing to do.

    Args:
        layers: (out_features, in_features) of the layers; in_features up to 65535, even for 4 bits.
        rows: batch times tokens, as they will be.
        dtype: float16, bfloat16 or float32, of the activations, residual, gate and bias.
        w_bits: 8 or 4.
        tokens: rows per sample, on which gates and modulation depend; rows that are no multiple count as one sample.
        device: where the kernels will run.

    Raises:
        ArgumentError: a size is not positive, an in_features is over 65535 or does not fit ``w_bits``, a dtype or a
            device is not one of the above.
        DeviceError: the device is a GPU that is not here.
    """
    if type(w_bits) is not int or w_bits not in (8, 4):
        raise ArgumentError(f"warm_up: w_bits must be 8 or 4; got {w_bits!r}")
    layers, rows = check_layers("warm_up", layers, 8 // w_bits), check_sizes("warm_up", "rows", rows)
    check_dtype("warm_up", "dtype", dtype)
    check_integer("warm_up", "tokens", tokens, 1, LARGEST_ROWS)
    if select_backend(device).name != "triton":
        return
    one = torch.ones((), device=device)
    zero_point = torch.zeros((), dtype=torch.int32, device=device)
    for m in rows:
        for n, k in layers:
            samples = m // tokens if m % tokens == 0 else 1
            x = torch.zeros(samples, m // samples, k, dtype=dtype, device=device)
            modulation = torch.zeros(samples, max(n, k), dtype=dtype, device=device)
            quantize_per_token(x)
            adaln_quantize_per_token(x, modulation[:, :k], modulation[:, :k])
            weight = torch.zeros(n, k // (8 // w_bits), dtype=torch.uint8 if w_bits == 4 else torch.int8, device=device)
            w_scale, w_sum = torch.ones(n, device=device), torch.zeros(n, dtype=torch.int32, device=device)
            linear = int4_linear if w_bits == 4 else int8_linear
            for s, z in ((one, None), (one, zero_point), (one.expand(x.shape[:2]), None)):
                xq = quantize_per_tensor(x, one, z)
                adaln_quantize_per_tensor(x, modulation[:, :k], modulation[:, :k], one, z)
                gelu_quantize_per_token(linear(xq, weight, s, w_scale, modulation[0, :n], z, w_sum, out_dtype=dtype))
                linear_gelu_quantize(xq, weight, s, w_scale, one, modulation[0, :n], z, None, z, w_sum)
                residual = torch.zeros(samples, m // samples, n, dtype=dtype, device=device)
                linear_gate_residual_(residual, xq, weight, s, w_scale, modulation[:, :n], modulation[0, :n], z, w_sum)
