"""Where a feature cache keeps what it reuses: buffers made once, in the precision asked for."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from qandc_kernels import gated_sum, quantize_per_token

__all__ = ["FeatureStore", "Target"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_serials = itertools.count()


class Target(NamedTuple):
    """Memory for one feature ``[B, tokens, D]``."""

    values: torch.Tensor
    scales: torch.Tensor | None  # [B, tokens] of int8 values

    def store_(self, feature: torch.Tensor) -> None:
        if self.scales is None:
            self.values.copy_(feature.detach())
        else:
            values, scales = quantize_per_token(feature.detach())
            self.values.copy_(values)
            self.scales.copy_(scales)


class FeatureStore:
    """Buffers ``[S, L, K, B, tokens, D]``: of S compute steps, L blocks and K branches a block.

    Attributes:
        serial: of this process, never given again: what was captured with other buffers is recognised by it.
        nbytes: memory taken, for as long as the store lives.
    """

    def __init__(
        self,
        sets: int,
        layers: int,
        branches: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        storage_dtype: str | None,
    ) -> None:
        self.serial = next(_serials)
        self.made_for = (shape, dtype, device)
        stored = DTYPES[storage_dtype] if storage_dtype is not None else dtype
        with torch.inference_mode(False):  # else only inference mode could write to them
            self.values = torch.zeros(sets, layers, branches, *shape, dtype=stored, device=device)
            self.scales: torch.Tensor | None = None
            if stored == torch.int8:
                self.scales = torch.zeros(self.values.shape[:-1], dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.scales) if t is not None)

    def target(self, at: int, layer: int, branch: int) -> Target:
        return Target(self.values[at, layer, branch], None if self.scales is None else self.scales[at, layer, branch])

    def add_to(
        self, x: torch.Tensor, gates: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x + Σ weight · gate · feature``: what the blocks make of ``x`` on a reuse step."""
        return gated_sum(x, self.values, gates, weights, self.scales)
