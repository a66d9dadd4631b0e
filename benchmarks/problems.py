"""Shapes of DiT-XL/2 and the tensors of one of its linear layers."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from benchmarks.timing import DEVICE, launches_for
from qandc_kernels import pack_int4, quantize_per_tensor
from qandc_kernels.reference import quantize_per_token

__all__ = ["DIT_XL_2", "DTYPE", "GROUP", "HIDDEN", "ROWS", "SQUARE", "TOKENS", "Problem", "copies_beyond_l2", "problem"]

HIDDEN = 1152
TOKENS = 256  # per image of 256 x 256 pixels
DIT_XL_2 = {"qkv": (3456, HIDDEN), "out": (HIDDEN, HIDDEN), "fc1": (4608, HIDDEN), "fc2": (HIDDEN, 4608)}  # (N, K)
ROWS = (512, 4096, 16384) if DEVICE == "cuda" else (64,)
SQUARE = 8192  # M = N = K of the ceilings
GROUP = 128  # weights that share a scale
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FASTEST = 1e15  # operations per second, to guess the time of a launch
FEWEST_COPIES = 16


def copies_beyond_l2(nbytes: float) -> int:
    """So many tensors of this size that together they take twice the L2 cache: each comes from memory in its turn."""
    if DEVICE == "cpu":
        return 1
    return max(FEWEST_COPIES, math.ceil(2 * torch.cuda.get_device_properties().L2_cache_size / nbytes))


class Problem:
    """``y = x wᵀ + bias`` with ``copies`` different weights; what is quantized is made when first asked for.

    Product and bias both have unit variance, so that neither can be wrong unnoticed.
    """

    def __init__(self, n: int, k: int, m: int, copies: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.n, self.k, self.m, self.copies = n, k, m, copies

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)

        self.x, self.bias, self.w = normal(m, k), normal(n), normal(copies, n, k).mul_(k**-0.5)
        self.x_scale = self.x.abs().amax().float() / 127
        self._expected: dict[int, torch.Tensor] = {}

    @property
    def launches(self) -> int:
        return launches_for(self.copies, 2 * self.m * self.n * self.k / FASTEST)

    def expected(self, i: int) -> torch.Tensor:
        """The ``i``-th product in float64; kept for the first and the last copy, the ones that are compared."""
        if i not in self._expected:
            self._expected[i] = F.linear(self.x.double(), self.w[i].double(), self.bias.double())
        return self._expected[i]

    @cached_property
    def xq(self) -> torch.Tensor:
        return quantize_per_tensor(self.x, self.x_scale)

    @cached_property
    def int8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[copies, N, K]`` int8 and ``[copies, N]`` scales."""
        return quantize_per_token(self.w)

    @cached_property
    def int4(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[copies, N, K/2]`` packed and ``[copies, N]`` scales."""
        q, scale = quantize_per_token(self.w, bits=4)
        return pack_int4(q), scale

    @cached_property
    def int4_grouped(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[copies, N, K/2]`` packed and ``[copies, N, K/GROUP]`` scales."""
        q, scale = quantize_per_token(self.w.unflatten(-1, (-1, GROUP)), bits=4)
        return pack_int4(q.flatten(-2)), scale

    @cached_property
    def w_hat(self) -> torch.Tensor:
        """The weights as a simulation of int8 has them: rounded, and floating point again."""
        q, scale = self.int8
        return q.to(DTYPE).mul_(scale[..., None])


@lru_cache(maxsize=1)
def problem(layer: str, m: int) -> Problem:
    """The problem of a layer; with another layer's or another ``m``, this one's memory is free."""
    if layer not in DIT_XL_2:
        return Problem(SQUARE, SQUARE, m, 2)
    n, k = DIT_XL_2[layer]
    return Problem(n, k, m, copies_beyond_l2(n * k / 2))
