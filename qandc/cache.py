"""Attach feature caches: what the blocks of a transformer compute is stored and reused on later denoising steps.

A run is a sequence of *compute steps* and *reuse steps*, fixed before it begins (:class:`qandc.CacheConfig`). With
``delta`` a compute step keeps ``r = Σ_l (block_l(x_l) - x_l)``, one tensor for the whole stack, since residuals of
successive blocks add up; a reuse step computes ``x + r`` (Q&C, arXiv 2503.02508, Sec. 2.1). With ``branch`` it keeps
the output f of every attention and MLP before its gate, and a reuse step computes ``x + Σ gate(t) · f`` with the gates
of its own timestep (FORA, arXiv 2407.01425); with ``taylor`` and ``hicache`` f is a forecast (arXiv 2503.06923,
2508.16984), with ``crf`` r is one (2510.08669). ``first_block`` alone decides while it runs: the first block is
computed on every step, and r is that of all others.

The model is not forked: while a cache is attached, the transformer, its blocks and their branches are instances of
subclasses of their own classes (:mod:`qandc.support.attach`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from qandc.caching.compensation import FeatureCompensation
from qandc.caching.feature_cache import FeatureCache
from qandc.caching.features import FeatureStore, Target, corrected
from qandc.caching.plan import Action, Plan
from qandc.caching.schedule import CacheConfig
from qandc.errors import CacheError, ConfigError, ModelError
from qandc.models import FAMILIES, Family, family_of
from qandc.models.family import (
    Blocks,
    Call,
    arguments_of,
    check_added_once,
    image_of,
    image_part,
    stream_of,
    with_image,
)
from qandc.support.arguments import Steps, checked
from qandc.support.attach import attach, attachments, detach, has_other_forward, original_class

__all__ = [
    "FeatureCache",
    "apply_cache",
    "apply_cache_to_dit",
    "get_cache",
    "remove_cache",
    "reset_all_caches",
    "unread",
]

CACHE = "_qandc_cache"
PLACE = "_qandc_place"
TARGET = "_qandc_target"  # where a branch writes its output


class _Place(NamedTuple):
    """Tell a block which one of all blocks it is."""

    cache: FeatureCache
    blocks: Blocks
    layer: int

    def store(self, plan: Plan, x: torch.Tensor) -> FeatureStore:
        """Return the buffers of this step; the first block makes them, for features like its stream ``x``."""
        if self.layer == 0:
            plan.make((*self.blocks.shape, *x.shape), x.dtype, x.device)
        assert plan.store is not None
        return plan.store

    @torch.no_grad()
    def reuse(self, plan: Plan, call: Call) -> torch.Tensor:
        """Return the stream that a block passes on and does not run: the last adds what all blocks together do."""
        block = self.blocks.blocks[self.layer]
        x = block.stream(call)
        store = self.store(plan, x)
        if store.per_branch:
            if has_other_forward(block.module):
                raise CacheError(
                    "forward of blocks was replaced since (by hooks that offload them one by one, for example), so "
                    "weights of their gates may not be here on a reuse step: use mode 'delta', or offload the whole "
                    "model"
                )
            if self.layer == 0:  # a step that is captured runs more than once
                plan.gates.clear()
            plan.gates.append(block.stack.gates(block.module, call))
        if self.layer < len(self.blocks.blocks) - 1:
            return x
        gates, offset = corrected(self.blocks.join(plan.gates), plan.correction, len(x))
        return with_image(x, store.add_to(image_of(x, store.tokens), gates, plan.weights, offset))


class _CachedTransformer(nn.Module):
    gradient_checkpointing: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            raise CacheError(
                "a cached model cannot recompute its blocks: disable gradient checkpointing, or use no_grad"
            )
        cache: FeatureCache = getattr(self, CACHE)
        family = _known(self)
        call = family.call_of(self, args, kwargs)
        if not family.is_step(call):
            return super().forward(*args, **kwargs)
        if not cache.paused:
            check_added_once(call, cache.config.per_branch)
        with cache.step(call["hidden_states"], call.get("timestep"), *family.run_of(call)):
            return super().forward(*args, **kwargs)


class _CachedBlock(nn.Module):
    # not forward: what is decided here stays outside of a compiled block, and a reuse step does not enter it
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place: _Place = getattr(self, PLACE)
        plan = place.cache.plan
        if plan.action is Action.COMPUTE:
            return super().__call__(*args, **kwargs)
        call, block = arguments_of(self, args, kwargs), place.blocks.blocks[place.layer]
        if plan.action is Action.REUSE:
            return block.stack.returned(call, place.reuse(plan, call))
        x = block.stream(call)
        store = place.store(plan, x)
        if plan.action is Action.DECIDE:
            output = super().__call__(*args, **kwargs)
            passed_on = stream_of(output, store.tokens)
            if place.cache.decide(passed_on - x):
                store.enter(passed_on)
            return output
        if not store.per_branch:
            if place.layer == 0:
                store.enter(x)
            output = super().__call__(*args, **kwargs)
            if place.layer == len(place.blocks.blocks) - 1:
                store.leave(plan.at, stream_of(output, store.tokens))
            return output
        branches = [getattr(self, name) for name in block.places]
        for branch, at in zip(branches, block.places.values(), strict=True):
            if TARGET not in branch.__dict__:  # it came later: a layer that was quantized, or has an adapter, since
                attach(branch, _CachedBranch)
            branch.__dict__[TARGET] = store.target(plan.at, *at)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            for branch in branches:
                branch.__dict__[TARGET] = None


class _CachedBranch(nn.Module):
    # no hook: torch.compile guards on the classes of modules inside compiled code, and not on their having no hooks
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        target: Target | None = getattr(self, TARGET)  # of each branch, so that one compiled block serves all
        if target is not None:
            target.store_(image_part(output, target.values.shape[1]))
        return output


def get_cache(transformer: nn.Module) -> FeatureCache | None:
    """Return the cache attached to ``transformer``, or to the model inside ``torch.compile(transformer)``, or None.

    Raises:
        ModelError: no ``nn.Module``.
    """
    model = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(model, nn.Module):  # by hand: fused forwards ask
        raise ModelError(f"a cache is attached to a model; got {type(model).__name__} (pass pipe.transformer)")
    return model.__dict__.get(CACHE)


@checked
def apply_cache(
    transformer: nn.Module,
    cache_interval: Steps | None = None,
    *,
    config: CacheConfig | None = None,
    compensation: FeatureCompensation | None = None,
) -> FeatureCache:
    """Attach a feature cache to a transformer of diffusers; the unmodified pipeline then uses it.

    It knows DiT, PixArt, FLUX.1, Chroma, Qwen-Image, SD3, SD3.5, Wan and Z-Image. Conditional and unconditional passes
    may be one batch, or take turns.

    Blocks that ``block.compile()`` has compiled stay so. A fused DiT (:func:`qandc.fuse`) runs compute and
    reuse steps as CUDA graphs of their own.

    Args:
        transformer: plain, quantized or fused.
        cache_interval: every ``cache_interval``-th step is computed (by default the fifth), the others reuse what all
            blocks together added (``delta``); short for ``config=CacheConfig("delta", cache_interval)``.
        config: any other cache.
        compensation: corrects what reuse steps take (:func:`qandc.fit_feature_compensation`); without a ``config`` the
            cache is the one that it was fitted for.

    Returns:
        The cache, for its counters and ``nbytes``. Features are dropped by themselves when a new run begins
        (:class:`FeatureCache`).

    Raises:
        ConfigError: the interval is not an integer >= 1, or it is given and a ``config`` too, or the compensation was
            fitted for another cache or model.
        CacheError: no such transformer, a cache is attached already, or another tool has replaced ``forward``.
    """
    if config is not None and cache_interval is not None:
        raise ConfigError("give cache_interval or config, not both: the config has an interval of its own")
    if config is None and cache_interval is None and compensation is not None:
        config = compensation.config
    cache = FeatureCache(config or CacheConfig(interval=cache_interval), compensation)
    _attach_cache(transformer, cache)
    return cache


apply_cache_to_dit = apply_cache  # its name before other models could have one


def _known(transformer: Any) -> Family:
    family = family_of(transformer)
    if family is None:
        raise CacheError(
            f"the cache knows diffusers' {', '.join(FAMILIES)}; got {type(transformer).__name__} "
            "(of a pipeline, pass pipe.transformer; of a compiled model, the model before torch.compile)"
        )
    return family


def _attach_cache(transformer: Any, cache: FeatureCache) -> None:
    family = _known(transformer)
    if get_cache(transformer) is not None:
        raise CacheError("a cache is attached already; call remove_cache(transformer) first")
    blocks = family.blocks(transformer)
    modules = [block.module for block in blocks.blocks]
    branches = [getattr(block.module, name) for block in blocks.blocks for name in block.places]
    for module in (transformer, *modules, *branches):
        if hasattr(module, "_orig_mod"):
            raise CacheError(
                f"a {type(module._orig_mod).__name__} was replaced by torch.compile(...); compile it in place instead, "
                "block.compile(), or attach the cache before"
            )
        if has_other_forward(module):
            raise CacheError(
                f"forward of {type(module).__name__} was replaced on the instance (by accelerate's offload hooks, for "
                "example); attach the cache before them"
            )
    if transformer._compiled_call_impl is not None:
        raise CacheError("the whole transformer was compiled; compile its blocks instead, each with block.compile()")
    if cache.config.per_branch:
        for block, stack, _ in blocks.blocks:
            reason = stack.why_not(block)
            if reason is not None:
                raise CacheError(
                    f"cache mode {cache.config.mode!r} {reason}; got a {original_class(block).__name__} that is "
                    "different; use mode 'delta'"
                )
    if attachments(transformer):
        cache.config.check_planned("it cannot run on fused kernels or from CUDA graphs (unfuse or ungraph first)")
    compensation = cache.compensation
    if compensation is not None:
        of_model = (*(blocks.shape if cache.config.per_branch else (1, 1)), family.width(transformer))
        if compensation.gains.shape[1:] != of_model:
            blocks_, branches_, channels = compensation.gains.shape[1:]
            raise ConfigError(
                f"the feature compensation is for {blocks_} blocks with {branches_} branches of {channels} channels; "
                "this model has {} with {} of {}".format(*of_model)
            )
    for layer, module in enumerate(modules):
        attach(module, _CachedBlock, **{PLACE: _Place(cache, blocks, layer)})
        arguments_of(module, (), {})  # looks their names up, which a compiler around the transformer cannot trace
    for branch in branches if cache.config.per_branch else ():
        attach(branch, _CachedBranch, **{TARGET: None})
    attach(transformer, _CachedTransformer, **{CACHE: cache})


def reset_all_caches(transformer: nn.Module) -> None:
    """Forget all cached features and counters; does nothing where no cache is attached."""
    cache = get_cache(transformer)
    if cache is not None:
        cache.reset()


def unread(transformer: nn.Module) -> list[nn.Module]:
    """List the modules that no reuse step reads: all in blocks but what makes gates, which DiT's output reads too."""
    blocks = _known(transformer).blocks(transformer).blocks
    return [
        part for block in blocks for name, part in block.module.named_children() if name not in block.stack.gated_by
    ]


def check_planned(transformer: nn.Module, what: str) -> None:
    """Refuse, with a ConfigError, a transformer whose cache decides while it runs, and say what it therefore cannot."""
    cache = get_cache(transformer)
    if cache is not None:
        cache.config.check_planned(what)


@contextlib.contextmanager
def attached_cache(
    transformer: nn.Module, config: CacheConfig | None = None, compensation: FeatureCompensation | None = None
) -> Iterator[FeatureCache | None]:
    """Attach a cache inside the block, of the compensation's own config if that alone is given; with neither, none."""
    if config is None and compensation is None:
        yield None
        return
    cache = apply_cache(transformer, config=config, compensation=compensation)
    try:
        yield cache
    finally:
        remove_cache(transformer)


@contextlib.contextmanager
def detached_cache(transformer: nn.Module) -> Iterator[None]:
    """Detach a cache inside the block, and attach the same one, emptied, afterwards."""
    cache = get_cache(transformer)
    if cache is None:
        yield
        return
    remove_cache(transformer)
    cache.reset()
    try:
        yield
    finally:
        _attach_cache(transformer, cache)


def remove_cache(transformer: nn.Module) -> None:
    """Detach the cache, so that the model is exactly what it was before.

    Raises:
        CacheError: none is attached, or another tool has wrapped the cached model since.
    """
    if get_cache(transformer) is None:
        raise CacheError(f"no cache is attached to this {type(transformer).__name__}")
    transformer = getattr(transformer, "_orig_mod", transformer)
    modules: list[tuple[Any, Any]] = [(transformer, _CachedTransformer)]
    for block in _known(transformer).blocks(transformer).blocks:
        modules.append((block.module, _CachedBlock))
        modules += [(branch, _CachedBranch) for branch in block.module.modules() if TARGET in branch.__dict__]
    detach(modules, CACHE, PLACE, TARGET, error=CacheError)
