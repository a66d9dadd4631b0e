"""Run the forward of a quantized DiT on fused kernels: what is prepared once, and what runs each step.

A block with static ranges is seven launches: LayerNorm + modulate + quantize, one product for q, k and v, attention
that stores int8, a product that adds gate · y to the residual stream; LayerNorm + modulate + quantize, a product that
applies GELU and stores int8, a product that adds. Between two of them stand int8 activations, or q, k and v in 16 bits;
never int32, never a 16-bit copy of something int8.

Nothing here waits for the GPU once a step is built, so a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from qandc.caching.features import FeatureStore, Target, corrected
from qandc.caching.plan import Action, Plan
from qandc.errors import DataError
from qandc.models.attention import attend_quantized
from qandc.models.dit.conditioning import Conditioning
from qandc.models.dit.fusable import (
    BLOCK_LAYERS,
    OUTPUT,
    is_batchable,
    is_graphable,
    is_plain_embedding,
    why_not_block,
    why_not_output,
)
from qandc.models.family import Call, Launch
from qandc.models.products import SETTINGS, Mlp, Product, Ranges, modulated, product_of
from qandc.quantization.linear import QuantLinear
from qandc.quantization.ranges import StepRanges
from qandc.support.watch import Watch

__all__ = ["FusedStep"]

logger = logging.getLogger(__name__)

LARGEST_RUN = 2 << 30  # bytes of conditioning computed ahead
ARGUMENTS = ("hidden_states", "timestep", "class_labels")
WITH_RANGES = ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")  # whose ranges a fused block uses


class StepRangeTable:
    """Hold the ranges of all layers for all steps, ``[S, layers]``, and those of the current step, ``[layers]``."""

    def __init__(self, ranges: StepRanges, device: torch.device) -> None:
        names = list(ranges.scales)
        no_shift = torch.zeros(ranges.timesteps.shape, dtype=torch.int32)
        self.index = {name: i for i, name in enumerate(names)}
        self.symmetric = set(names) - set(ranges.zero_points)
        self.timesteps = ranges.timesteps.to(device, torch.float32)
        self.scales = torch.stack([ranges.scales[name].to(device, torch.float32) for name in names], 1)
        zero_points = [ranges.zero_points.get(name, no_shift).to(device, torch.int32) for name in names]
        self.zero_points = torch.stack(zero_points, 1)
        self.scale, self.zero_point = self.scales[0].clone(), self.zero_points[0].clone()

    def select_(self, timestep: torch.Tensor) -> None:
        row = (self.timesteps - timestep[0]).abs().argmin().reshape(1)
        self.scale.copy_(self.scales.index_select(0, row)[0])
        self.zero_point.copy_(self.zero_points.index_select(0, row)[0])

    def of(self, name: str) -> Ranges:
        i = self.index[name]
        return Ranges(self.scale[i], None if name in self.symmetric else self.zero_point[i])


def _qkv(attention: Any, ranges: Ranges, out_smoothing: torch.Tensor | None) -> Product:
    """Make q, k and v one product; v is divided by what the output layer would divide its input by."""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    weight = torch.cat([layer.qweight for layer in layers])
    for layer, part in zip(layers, weight.chunk(3), strict=True):
        layer.qweight = part
    w_scale, w_sum = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight_scale", "weight_sum"))
    bias = None if layers[0].bias is None else torch.cat([layer.bias.float() for layer in layers])
    return Product(weight, ranges.scale, w_scale, bias, ranges.zero_point, w_sum).last_divided(out_smoothing)


class FusedBlock:
    """Run a transformer block whose layers are all quantized."""

    def __init__(self, block: Any, ranges: dict[str, Ranges], nan_flag: torch.Tensor) -> None:
        attention = block.attn1
        self.nan_flag = nan_flag  # of attention, whose NaN int8 would hide; that of the residual stream stays there
        self.heads: int = attention.heads
        self.eps: float = block.norm1.norm.eps
        self.out = product_of(attention.to_out[0], ranges["attn1.to_out.0"])
        self.qkv = _qkv(attention, ranges["attn1.to_q"], attention.to_out[0].smoothing)
        self.mlp = Mlp(block.norm3, block.ff, ranges["ff.net.0.proj"], ranges["ff.net.2"])
        self.smoothing = (attention.to_q.smoothing, self.mlp.smoothing)  # which the modulation has been divided by
        self.mlp.smoothing = None

    def __call__(
        self, x: torch.Tensor, modulation: torch.Tensor, targets: tuple[Target, Target] | None = None
    ) -> torch.Tensor:
        """Run the block on ``x [B, tokens, D]``, in place, with ``modulation [B, 6 D]``; targets take its branches."""
        of_attn, of_mlp = targets or (None, None)
        parts = modulation.chunk(6, 1)  # shift, scale and gate of attention, and of the MLP
        xq, qkv = modulated(x, parts, self.qkv, None, self.eps)
        q, k, v = qkv(xq, x.dtype).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        xq, out = attend_quantized(q, k, v, self.out, self.nan_flag)
        out.gate_residual_(x, xq, parts[2], of_attn)
        self.mlp.add_(x, parts[3:], of_mlp)
        return x


class PatchEmbedding:
    """Compute ``Conv2d(latents) + position`` as a product over patches and one addition in place."""

    def __init__(self, module: Any) -> None:
        self.patch = module.patch_size
        self.tokens = (module.height, module.width)
        self.sizes = (module.height * self.patch, module.width * self.patch)  # others need other positions
        self.weight = module.proj.weight.flatten(1)
        self.bias, self.position = module.proj.bias, module.pos_embed

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        batch, channels = latents.shape[:2]
        (rows, columns), p = self.tokens, self.patch
        patches = latents.view(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(patches.reshape(batch, rows * columns, channels * p * p), self.weight, self.bias)
        return x.add_(self.position)  # in float32, rounded once


class FusedStep:
    """Compute what ``DiTTransformer2DModel.forward`` does, block by block fused where it can be.

    Args:
        transformer: the model; its weights are used where they are, those of q, k, v and of the conditioning become
            parts of larger tensors.
        ranges: of each step, instead of those in the layers.
    """

    def __init__(self, transformer: Any, ranges: StepRanges | None = None) -> None:
        self.reasons: Mapping[str, str | None] = self.why_not(transformer, ranges)
        blocks = list(transformer.transformer_blocks)
        fused = [self.reasons[f"transformer_blocks.{i}.{BLOCK_LAYERS[0]}"] is None for i in range(len(blocks))]
        batched = is_batchable(blocks)
        self.graphable = _why_not_whole(transformer, self.reasons, batched) is None
        self.transformer = transformer
        self.device = transformer.proj_out_1.bias.device
        self.table = None if ranges is None else StepRangeTable(ranges, self.device)
        self.blocks: list[Any] = []
        self.flags = torch.zeros(len(blocks), dtype=torch.int32, device=self.device)  # one a block, of NaN
        for i, block in enumerate(blocks):
            if not fused[i]:
                self.blocks.append(block)
                continue
            prefix = f"transformer_blocks.{i}."
            found = {name: self._ranges(prefix + name, block.get_submodule(name)) for name in WITH_RANGES}
            self.blocks.append(FusedBlock(block, found, self.flags[i]))
        smoothing = [block.smoothing if isinstance(block, FusedBlock) else (None, None) for block in self.blocks]
        self.conditioning = Conditioning(transformer, fused, batched, smoothing)
        self.embedding: PatchEmbedding | None = None
        if is_plain_embedding(transformer.pos_embed):
            self.embedding = PatchEmbedding(transformer.pos_embed)
        self.fast = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None
        self.projection: Product | None = None
        if self.reasons[OUTPUT] is None:
            self.projection = product_of(transformer.proj_out_2, self._ranges(OUTPUT, transformer.proj_out_2))
        self._watch = Watch(transformer, SETTINGS)  # only now: building has moved some weights together

    @staticmethod
    def why_not(transformer: Any, ranges: StepRanges | None) -> dict[str, str | None]:
        reasons: dict[str, str | None] = {}
        for i, block in enumerate(transformer.transformer_blocks):
            prefix = f"transformer_blocks.{i}."
            reasons |= dict.fromkeys((prefix + name for name in BLOCK_LAYERS), why_not_block(block, prefix, ranges))
        no_block = None if None in reasons.values() else "no block runs fused"
        return {**reasons, OUTPUT: no_block or why_not_output(transformer)}

    @classmethod
    def why_not_whole(cls, transformer: Any) -> str | None:
        batched = is_batchable(list(transformer.transformer_blocks))
        return _why_not_whole(transformer, cls.why_not(transformer, None), batched)

    @staticmethod
    def why_not_call(call: Call) -> str | None:
        latents, timestep, labels = (call.get(name) for name in ("hidden_states", "timestep", "class_labels"))
        others = {name for name, value in call.items() if value is not None} - {*ARGUMENTS, "return_dict"}
        if latents is None or timestep is None or labels is None or others:
            return f"it was called without {', '.join(ARGUMENTS)}, or with {', '.join(sorted(others)) or 'others'}"
        batch = len(latents)
        if labels.dtype not in (torch.int32, torch.int64) or labels.shape not in ((batch,), (1,)):
            return f"class_labels are {labels.dtype} {tuple(labels.shape)}, not one integer per row"
        if not isinstance(timestep, torch.Tensor) or timestep.shape not in ((batch,), (1,)):
            return "timestep is no tensor with one value, or one per row"
        return None

    @staticmethod
    def check_conditions(conditions: torch.Tensor) -> None:
        if conditions.ndim != 1 or conditions.is_floating_point():
            found = f"{list(conditions.shape)} of {conditions.dtype}"
            raise DataError(f"class labels of a run are [B] integers; got {found}")

    def unchanged(self) -> bool:
        return self._watch.unchanged()

    def inputs(self, call: Call) -> tuple[torch.Tensor, ...]:
        latents, timestep, labels = (call[name] for name in ARGUMENTS)
        batch = len(latents)
        # float32 as the embedder makes of it; expanded as broadcasting would
        timestep = timestep.to(latents.device, torch.float32).expand(batch)
        return latents, timestep, labels.to(torch.int64).expand(batch)

    def compute(self, ahead: tuple[torch.Tensor, ...], plan: Plan) -> Launch:
        if plan.action is Action.COMPUTE:
            return Launch(Action.COMPUTE, self, ahead)
        assert plan.store is not None
        return Launch((plan.store.serial, plan.at), functools.partial(self, plan=plan), ahead)

    def reuse(self, ahead: tuple[torch.Tensor, ...], plan: Plan) -> Launch:
        store, (modulations, final) = plan.store, ahead or (None, None)
        assert store is not None
        gains, offsets = plan.correction or (None, None)
        named = {"weights": plan.weights, "modulations": modulations if store.per_branch else None, "final": final}
        named |= {"gains": gains, "offsets": offsets}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}

        def function(
            latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, *extra: torch.Tensor
        ) -> torch.Tensor:
            return self.reused(latents, timestep, labels, store, **dict(zip(given, extra, strict=True)))

        return Launch((Action.REUSE, store.serial, *given), function, tuple(given.values()))

    def prepare(self, timesteps: torch.Tensor, conditions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype = self.transformer.dtype
        needed = self.conditioning.bytes_of_run(len(timesteps), len(conditions), dtype)
        if needed > LARGEST_RUN:
            logger.info("conditioning of this run would take %.1f GiB: computed step by step", needed / 2**30)
            return ()
        return self.conditioning.of_run(timesteps, conditions, dtype)

    def output(self, prediction: torch.Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=prediction)

    def nan_flags(self) -> dict[str, torch.Tensor]:
        return {
            f"transformer_blocks.{i}.attn1.to_out.0": block.nan_flag
            for i, block in enumerate(self.blocks)
            if isinstance(block, FusedBlock)
        }

    def _ranges(self, name: str, layer: QuantLinear) -> Ranges:
        if self.table is not None and name in self.table.index:
            return self.table.of(name)
        return Ranges(layer.act_scale, layer.act_zero_point)

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        modulations: torch.Tensor | None = None,
        final: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Predict the noise ``[B, out_channels, H, W]`` for latents ``[B, C, H, W]``, timesteps and labels ``[B]``.

        ``modulations [L, B, 6 D]`` and ``final [B, 2 D]`` of this step (:meth:`Conditioning.of_run`) are computed here
        if they are not given; on a GPU then the blocks run on a stream of higher priority, beside the conditioning of
        the blocks behind them.
        """
        if modulations is not None and final is not None:
            return self._run(latents, timestep, class_labels, iter((*modulations.unbind(0), final)), plan)
        if self.fast is None:
            portions = self.conditioning.of_step(timestep, class_labels, latents.dtype)
            return self._run(latents, timestep, class_labels, (m for part, _ in portions for m in part), plan)
        here, fast = torch.cuda.current_stream(self.device), self.fast
        fast.wait_stream(here)
        portions = self.conditioning.of_step(timestep, class_labels, latents.dtype)

        def as_they_come() -> Iterator[torch.Tensor]:
            for part, event in portions:
                if event is not None:
                    fast.wait_event(event)
                yield from part

        with torch.cuda.stream(fast):
            output = self._run(latents, timestep, class_labels, as_they_come(), plan)
        here.wait_stream(fast)
        output.record_stream(here)
        return output

    def _run(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        modulations: Iterator[torch.Tensor],
        plan: Plan | None,
    ) -> torch.Tensor:
        if self.table is not None:
            self.table.select_(timestep)
        x, ours = self._embed(latents)
        store = plan.store if plan is not None and plan.action is Action.STORE else None
        if store is not None and not store.per_branch:
            store.enter(x.clone())
        for i, block in enumerate(self.blocks):
            modulation = next(modulations)
            if isinstance(block, FusedBlock):
                # somebody may hold what a module has returned, and fused blocks write in place
                x = x if ours else x.clone(memory_format=torch.contiguous_format)
                targets = None
                if plan is not None and store is not None and store.per_branch:
                    targets = store.target(plan.at, i, 0), store.target(plan.at, i, 1)
                x, ours = block(x, modulation, targets), True
            else:
                x, ours = block(x, timestep=timestep, class_labels=class_labels), False
        if plan is not None and store is not None and not store.per_branch:
            store.leave(plan.at, x)
        return self._unpatchify(self._project(x, next(modulations)))

    def reused(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        store: FeatureStore,
        weights: torch.Tensor | None = None,
        modulations: torch.Tensor | None = None,
        final: torch.Tensor | None = None,
        gains: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take a step that computes no block: ``store`` has what they would add.

        ``weights [S]`` of a forecast; ``gains`` and ``offsets [L, K, D]`` of a compensation; ``modulations
        [L, B, 6 D]`` and ``final [B, 2 D]`` of this step are computed here if they are not given.
        """
        correction = None if gains is None or offsets is None else (gains, offsets)
        beside = None if final is not None and correction is None else self.fast  # the embedding of the patches
        if beside is not None:
            here = torch.cuda.current_stream(self.device)
            beside.wait_stream(here)
        with torch.cuda.stream(beside):
            gates = None
            if final is None:
                gates, final = self.conditioning.of_reuse(timestep, class_labels, latents.dtype, store.per_branch)
            elif store.per_branch:
                assert modulations is not None
                layers, batch, width = modulations.shape
                gates = modulations.view(layers, batch, 6, width // 6)[:, :, 2::3].transpose(1, 2)
            gates, offset = corrected(gates, correction, len(latents))
        if self.table is not None:
            self.table.select_(timestep)
        x, _ = self._embed(latents)
        if beside is not None:
            here.wait_stream(beside)
            for made in (gates, offset, final):
                if made is not None:
                    made.record_stream(here)
        return self._unpatchify(self._project(store.add_to(x, gates, weights, offset), final))

    def _embed(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Return the embedded patches ``[B, tokens, D]``, and whether nobody else can hold them."""
        if self.embedding is not None and self.embedding.sizes == latents.shape[2:]:
            return self.embedding(latents), True
        return self.transformer.pos_embed(latents), False

    def features_shape(self, latents: torch.Tensor) -> tuple[int, ...]:
        patch = self.transformer.patch_size
        tokens = (latents.shape[2] // patch) * (latents.shape[3] // patch)
        return len(self.blocks), 2, len(latents), tokens, self.transformer.inner_dim

    def _project(self, x: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        """Normalize, modulate and project to patches ``[B, tokens, p · p · out_channels]``."""
        transformer = self.transformer
        shift, scale = final.chunk(2, dim=1)
        if self.projection is None:
            return transformer.proj_out_2(transformer.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        eps, smoothing = transformer.norm_out.eps, transformer.proj_out_2.smoothing
        xq, projection = modulated(x, (shift, scale), self.projection, smoothing, eps)
        return projection(xq, x.dtype)

    def _unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        side = int(patches.shape[1] ** 0.5)
        p, channels = self.transformer.patch_size, self.transformer.out_channels
        grid = patches.view(-1, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(-1, channels, side * p, side * p)


def _why_not_whole(transformer: Any, reasons: Mapping[str, str | None], batched: bool) -> str | None:
    """Say why a step of a DiT can't be a graph, or None; ``reasons`` of its layers, ``batched``: its conditioning."""
    for name, reason in reasons.items():
        if reason is not None and name != OUTPUT:
            return reason
    if not batched:
        return "modulation or its embedders are not as diffusers made them (conditioning=None leaves them so)"
    return None if is_graphable(transformer) else "what is around its blocks is not as diffusers made it"
