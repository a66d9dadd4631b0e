"""Compute what adaLN-Zero makes of timestep and label: modulations of all blocks, of one step or of a whole run.

In diffusers every block owns a timestep embedder, a label table and an adaLN layer, 537 MB of bf16 weights in DiT-XL/2
that a step reads for a few rows. Here they are batched products over a few blocks at a time, beside the blocks that
run already; or, where the timesteps of a run are known, a few large products before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qandc_kernels import batched_linear

__all__ = ["Conditioning", "Smoothing"]

# Blocks whose modulation is computed together: the first ones early and few, so that work can begin; the others while
# those run.
FIRST_CHUNKS = (1, 1, 2, 4, 8)

ROWS_AT_ONCE = 4096  # steps times samples times blocks in a product of a prepared run: enough for a GPU
SHARE = 0.5  # programs per multiprocessor that compute it
Smoothing = tuple[torch.Tensor | None, torch.Tensor | None]
"""What the layers behind the first and the second modulation of a block divide their input by."""


def _share(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join tensors into one, of which they become parts, so that the memory is not needed twice."""
    whole = torch.stack([t.detach() for t in tensors])
    for tensor, part in zip(tensors, whole.unbind(0), strict=True):
        tensor.data = part
    return whole


class BatchedEmbedders:
    """Hold embedders and adaLN layers of all blocks as ``[L, ...]`` tensors; the modules' own become parts of them."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        embedders = [block.norm1.emb for block in blocks]
        linears = [
            [emb.timestep_embedder.linear_1 for emb in embedders],
            [emb.timestep_embedder.linear_2 for emb in embedders],
            [block.norm1.linear for block in blocks],
        ]
        self.weights = [_share([linear.weight for linear in layers]) for layers in linears]
        self.biases = [_share([linear.bias for linear in layers]) for layers in linears]
        self.labels = _share([emb.class_embedder.embedding_table.weight for emb in embedders])
        proj = embedders[0].time_proj
        half = proj.num_channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=self.labels.device)
        self.frequencies = proj.scale * torch.exp(-math.log(10000) * (steps / (half - proj.downscale_freq_shift)))

    def waves(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return ``[B, 256]``: cosines and sines of the timestep, as ``Timesteps`` of diffusers orders them."""
        angles = timestep.to(torch.float32)[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1).to(dtype)

    def embedding(self, start: int, stop: int, waves: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``[n, B, D]`` of blocks start to stop."""
        share = self._share(start)
        x = batched_linear(
            waves.expand(stop - start, -1, -1), self.weights[0][start:stop], self.biases[0][start:stop], share
        )
        x = batched_linear(F.silu(x), self.weights[1][start:stop], self.biases[1][start:stop], share)
        return x + self.labels[start:stop].index_select(1, class_labels)

    def modulation(self, start: int, stop: int, embedding: torch.Tensor) -> torch.Tensor:
        """Return the modulations ``[n, B, 6 D]`` of blocks start to stop, from their embeddings."""
        weight, bias = self.weights[2][start:stop], self.biases[2][start:stop]
        return batched_linear(F.silu(embedding), weight, bias, self._share(start))

    def gates(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return the gates ``[L, 2, B, D]`` of attention and MLP in all blocks: parts three and six of modulations."""
        layers, batch, width = embedding.shape
        weight, bias = self.weights[2].view(6 * layers, width, -1)[2::3], self.biases[2].view(6 * layers, width)[2::3]
        x = F.silu(embedding).repeat_interleave(2, 0)
        return batched_linear(x, weight, bias, self._share(0)).view(layers, 2, batch, width)

    @staticmethod
    def _share(start: int) -> float:
        # the blocks that wait for the first portion leave the GPU idle; those behind run beside others
        return 2.0 if start == 0 else SHARE


class Conditioning:
    """Compute the modulations of a DiT.

    Args:
        transformer: a DiT.
        needed: for each block whether its modulation is needed; blocks that run as modules make their own.
        batched: whether its embedders and adaLN layers are plain linear layers of one shape; else they are called.
        smoothing: of each block. Modulation then also divides, ``(y · (1 + scale) + shift) / s``, by being
            ``y · (1 + scale') + shift'``, in float32.
    """

    def __init__(self, transformer: Any, needed: Sequence[bool], batched: bool, smoothing: Sequence[Smoothing]) -> None:
        self.transformer = transformer
        self.needed = list(needed)
        self.blocks = list(transformer.transformer_blocks)
        self.batched = BatchedEmbedders(self.blocks) if batched else None
        device = transformer.proj_out_1.bias.device
        self.factor = self.offset = None
        if any(s is not None for pair in smoothing for s in pair):
            one = torch.ones(transformer.inner_dim, device=device)
            factors, offsets = [], []
            for pair in smoothing:
                inverses = [one if s is None else 1 / s for s in pair]
                # shift, scale and gate, twice
                factors.append(torch.cat([t for inverse in inverses for t in (inverse, inverse, one)]))
                offsets.append(torch.cat([t for inverse in inverses for t in (0 * one, inverse - 1, 0 * one)]))
            self.factor, self.offset = torch.stack(factors)[:, None], torch.stack(offsets)[:, None]

    def __call__(
        self, start: int, stop: int, timestep: torch.Tensor, waves: torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings ``[n, B, D]`` and modulations ``[n, B, 6 D]`` of blocks start to stop."""
        if self.batched is None:
            embeddings, modulations = [], []
            width = self.transformer.inner_dim
            for block, needed in zip(self.blocks[start:stop], self.needed[start:stop], strict=True):
                embeddings.append(waves.new_zeros(len(waves), width))
                modulations.append(waves.new_zeros(len(waves), 6 * width))
                if needed or block is self.blocks[0]:  # the output needs the embedding of the first one
                    embeddings[-1] = block.norm1.emb(timestep, class_labels, hidden_dtype=waves.dtype)
                if needed:
                    modulations[-1] = block.norm1.linear(block.norm1.silu(embeddings[-1]))
            embedding, modulation = torch.stack(embeddings), torch.stack(modulations)
        else:
            embedding = self.batched.embedding(start, stop, waves, class_labels)
            modulation = self.batched.modulation(start, stop, embedding)
        if self.factor is not None and self.offset is not None:
            modulation = self.offset[start:stop] + modulation.float() * self.factor[start:stop]
        return embedding, modulation

    def _waves(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what the embedders of all blocks have in common; empty where they are called one by one."""
        if self.batched is None:
            return timestep.new_empty(len(timestep), 0, dtype=dtype)
        return self.batched.waves(timestep, dtype)

    def final(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return shift and scale of the output, ``[B, 2 D]``, from the embedding of the first block."""
        return self.transformer.proj_out_1(F.silu(embedding))

    def of_step(
        self, timestep: torch.Tensor, class_labels: torch.Tensor, dtype: torch.dtype
    ) -> list[tuple[Sequence[torch.Tensor], torch.cuda.Event | None]]:
        """Compute the modulations ``[B, 6 D]`` of the blocks in their order, then ``[B, 2 D]`` of the output.

        In portions, each with the event of this stream after which it is there: blocks on another one need not wait for
        all.
        """
        count = len(self.blocks)
        bounds = [min(bound, count) for bound in (*itertools.accumulate(FIRST_CHUNKS, initial=0), count)]
        waves = self._waves(timestep, dtype)
        portions: list[tuple[Sequence[torch.Tensor], torch.cuda.Event | None]] = []

        def add(modulations: Sequence[torch.Tensor]) -> None:
            on_gpu = modulations[0].is_cuda
            event = torch.cuda.current_stream(modulations[0].device).record_event() if on_gpu else None
            portions.append((modulations, event))

        first = None
        for start, stop in itertools.pairwise(bounds):
            if stop > start:
                embedding, modulation = self(start, stop, timestep, waves, class_labels)
                first = embedding[0] if first is None else first
                add(modulation.unbind(0))
        assert first is not None
        add([self.final(first)])
        return portions

    def of_reuse(
        self, timestep: torch.Tensor, class_labels: torch.Tensor, dtype: torch.dtype, gated: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Compute what a step without blocks needs: gates ``[L, 2, B, D]``, if any, and ``[B, 2 D]`` of the output."""
        assert self.batched is not None
        waves = self._waves(timestep, dtype)
        embedding = self.batched.embedding(0, len(self.blocks) if gated else 1, waves, class_labels)
        return self.batched.gates(embedding) if gated else None, self.final(embedding[0])

    def bytes_of_run(self, steps: int, batch: int, dtype: torch.dtype) -> int:
        """Count the bytes of what :meth:`of_run` returns."""
        of_blocks = len(self.blocks) * 6 * (dtype if self.factor is None else torch.float32).itemsize
        return steps * batch * self.transformer.inner_dim * (of_blocks + 2 * dtype.itemsize)

    def of_run(
        self, timesteps: torch.Tensor, class_labels: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute modulations ``[S, L, B, 6 D]`` for steps ``[S]`` and labels ``[B]``; ``[S, B, 2 D]`` for the end."""
        steps, batch = len(timesteps), len(class_labels)
        timestep, labels = timesteps.repeat_interleave(batch), class_labels.repeat(steps)
        waves = self._waves(timestep, dtype)
        final, modulations, count = None, [], len(self.blocks)
        at_once = max(1, ROWS_AT_ONCE // len(timestep))
        for start in range(0, count, at_once):
            embedding, modulation = self(start, min(start + at_once, count), timestep, waves, labels)
            modulations.append(modulation.view(len(modulation), steps, batch, -1))
            if final is None:
                final = self.final(embedding[0]).view(steps, batch, -1)
        assert final is not None
        whole = modulations[0] if len(modulations) == 1 else torch.cat(modulations)
        return whole.transpose(0, 1), final
