"""Store the features that a cache reuses, in buffers made once, in the precision asked for."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from qandc.caching.schedule import CacheConfig
from qandc_kernels import corrected_gates, gated_sum, quantize_per_token

__all__ = ["FeatureStore", "Target", "corrected"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_serials = itertools.count()


class Target(NamedTuple):
    """Hold memory for one feature ``[B, tokens, D]``."""

    values: torch.Tensor
    scales: torch.Tensor | None  # [B, tokens] of int8 values

    def store_(self, feature: torch.Tensor) -> None:
        """Write a feature here, rounded as the memory asks for."""
        if self.scales is None:
            self.values.copy_(feature.detach())
        else:
            values, scales = quantize_per_token(feature.detach())
            self.values.copy_(values)
            self.scales.copy_(scales)


class FeatureStore:
    """Hold features ``[S, L, K, B, tokens, D]`` of S compute steps, L blocks and K branches a block.

    Where features are those of all blocks together, L and K are 1.

    Attributes:
        per_branch: whether they are of each branch, before its gate.
        values, scales: the buffers, from the first :meth:`make` on.
        first: what the first block added at the last compute step, with ``first_block``.
        serial: unique id of the buffers; part of CUDA graph keys, so graphs captured on other buffers are not replayed.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    serial: int

    def __init__(self, config: CacheConfig) -> None:
        self.per_branch = config.per_branch
        self.first: torch.Tensor | None = None
        self._config = config
        self._made_for: tuple[Any, ...] | None = None
        self._input: torch.Tensor | None = None

    def make(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
        """Make the buffers, unless there are such for features ``[L, K, B, tokens, D]``; return whether it did."""
        if not self.per_branch:
            shape = (1, 1, *shape[2:])
        made_for = (shape, dtype, device)
        if made_for == self._made_for:
            return False
        self.__dict__.pop("values", None)  # its memory first
        stored = dtype if self._config.storage_dtype is None else DTYPES[self._config.storage_dtype]
        with torch.inference_mode(False):  # else only inference mode could write to them
            self.values = torch.zeros(self._config.history, *shape, dtype=stored, device=device)
            self.scales = None
            if stored == torch.int8:
                self.scales = torch.zeros(self.values.shape[:-1], dtype=torch.float32, device=device)
        self.serial, self._made_for = next(_serials), made_for
        return True

    @property
    def tokens(self) -> int:
        """Return the number of tokens of a feature."""
        return self.values.shape[-2]

    @property
    def nbytes(self) -> int:
        """Return the memory taken, for as long as the store lives."""
        return sum(held.nbytes for held in vars(self).values() if isinstance(held, torch.Tensor))

    def is_near(self, added: torch.Tensor, threshold: float) -> bool:
        """Tell whether what the first block adds differs from ``first`` by no more than that share; NaN does.

        Waits for the GPU. ``mean|added - first| / mean|first|`` in the dtype of the model, as in diffusers.
        """
        assert self.first is not None
        return ((added - self.first).abs().mean() / self.first.abs().mean()).item() <= threshold

    def enter(self, x: torch.Tensor) -> None:
        """Note what the first block is given."""
        self._input = x

    def leave(self, at: int, x: torch.Tensor) -> None:
        """Keep in set ``at`` what all blocks together have added, ``x`` being what the last one returns."""
        assert self._input is not None
        self.target(at, 0, 0).store_(x - self._input)
        self._input = None

    def target(self, at: int, layer: int, branch: int) -> Target:
        """Return the place of one feature in set ``at``."""
        return Target(self.values[at, layer, branch], None if self.scales is None else self.scales[at, layer, branch])

    def forecast(self, layer: int, branch: int, weights: tuple[float, ...] = ()) -> torch.Tensor:
        """Compute ``Σ weight · feature`` in float32, as a reuse step takes one feature; without weights of set 0."""
        parts = []
        for at, weight in enumerate(weights or (1.0,)):
            if weight != 0:  # what a weight of 0 stands at was never written
                values, scales = self.target(at, layer, branch)
                parts.append(weight * (values.float() if scales is None else values.float() * scales[..., None]))
        return torch.stack(parts).sum(0)

    def add_to(
        self,
        x: torch.Tensor,
        gates: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute ``x + offset + Σ gate · Σ weight · feature``: what the blocks make of ``x`` when reused."""
        return gated_sum(x, self.values, gates, weights, self.scales, offset)


def corrected(
    gates: torch.Tensor | None, correction: tuple[torch.Tensor, torch.Tensor] | None, samples: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gates and the offset with which :meth:`FeatureStore.add_to` takes ``gain · feature + offset``."""
    if correction is None:
        return gates, None
    gains, offsets = correction
    if gates is None:  # of all blocks together: L and K are 1
        return gains[:, :, None].expand(-1, -1, samples, -1), offsets[0].expand(samples, -1)
    return corrected_gates(gates, gains, offsets)
