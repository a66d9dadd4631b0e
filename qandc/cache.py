"""Feature caching for diffusers' DiT: what the blocks add to the residual stream is reused between steps.

Step i of a run is a *compute step* if ``i mod cache_interval == 0``, else a *reuse step* (FORA's uniform schedule;
Q&C, arXiv 2503.02508, Sec. 2.1). A compute step stores ``r = Σ_l (block_l(x_l) - x_l)``, one tensor for the
whole stack, since residuals of successive blocks add up to the difference of output and input. A reuse step computes
``x + r`` and nothing else between patch embedding and output projection.

The model is not forked: while a cache is attached, the transformer and its blocks are instances of subclasses of their
own classes that override ``forward`` alone. Attributes, parameters and state-dict keys stay as they are.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from qandc.errors import CacheError, ConfigError

__all__ = ["FeatureCache", "apply_cache_to_dit", "get_cache", "remove_cache", "reset_all_caches"]

logger = logging.getLogger(__name__)

ATTRIBUTE = "_qandc_cache"
POSITION = "_qandc_position"


class FeatureCache:
    """State of one attached cache.

    A run is recognised by its ``class_labels`` tensor, which a pipeline makes once per call, by the shape, dtype and
    device of its latents, and by timesteps that fall from step to step. Anything else starts a new run with a compute
    step. Reading the timestep waits for the GPU once per step.

    Attributes:
        interval: every ``interval``-th step is computed.
        compute_steps, reuse_steps: how many steps of each kind were taken since the cache was attached or reset.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.reset()

    def reset(self) -> None:
        """Forget all features, the current run and the counters."""
        self.compute_steps = 0
        self.reuse_steps = 0
        self._forget()

    def _forget(self) -> None:
        self.residual: torch.Tensor | None = None
        self.reusing = False
        self._step = -1
        self._signature: tuple[Any, ...] | None = None
        self._class_labels: torch.Tensor | None = None
        self._timestep = float("-inf")
        self._block_input: torch.Tensor | None = None

    def begin_step(self, hidden_states: torch.Tensor, timestep: Any, class_labels: torch.Tensor | None) -> None:
        """Decide whether this step computes or reuses; called by the transformer's forward."""
        if timestep is None:
            raise CacheError("a cached DiT needs timestep: pass the timestep of this denoising step")
        signature = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        value = float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        same_inputs = signature == self._signature and value < self._timestep
        if same_inputs and class_labels is not self._class_labels:
            _warn_labels()
        if not same_inputs or class_labels is not self._class_labels:
            self._forget()
        # holding the labels keeps their memory from being given to another run's
        self._signature, self._class_labels, self._timestep = signature, class_labels, value
        self._step += 1
        self.reusing = self._step % self.interval != 0
        if self.reusing:
            self.reuse_steps += 1
        else:
            self.compute_steps += 1
            self.residual = None

    def reuse(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``x + r``: what all blocks together make of ``x`` on a reuse step."""
        assert self.residual is not None
        return hidden_states + self.residual

    def first_block_input(self, hidden_states: torch.Tensor) -> None:
        """Note what goes into the first block of a compute step."""
        if self.interval > 1:
            self._block_input = hidden_states

    def last_block_output(self, hidden_states: torch.Tensor) -> None:
        """Store the residual of all blocks together."""
        if self._block_input is not None:
            self.residual = (hidden_states - self._block_input).detach()
            self._block_input = None


@functools.cache
def _warn_labels() -> None:
    logger.warning(
        "the feature cache starts anew because class_labels is another tensor than in the step before; in a denoising "
        "loop of your own, make it once and pass the same tensor to every step (conditional and unconditional rows in "
        "one batch), or nothing is ever reused"
    )


class _CachedTransformer(nn.Module):
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        cache: FeatureCache = getattr(self, ATTRIBUTE)
        cache.begin_step(hidden_states, timestep, class_labels)
        try:
            return super().forward(hidden_states, timestep, class_labels, *args, **kwargs)
        except BaseException:  # Ctrl-C too: a step that did not finish must leave nothing behind
            cache._forget()
            raise


class _CachedBlock(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache: FeatureCache = getattr(self, ATTRIBUTE)
        position: str = self.__dict__[POSITION]
        if cache.reusing:
            return cache.reuse(hidden_states) if "first" in position else hidden_states
        if "first" in position:
            cache.first_block_input(hidden_states)
        output = super().forward(hidden_states, *args, **kwargs)
        if "last" in position:
            cache.last_block_output(output)
        return output


@functools.cache
def _cached_class(mixin: Any, base: Any) -> Any:
    # the name of the base, because diffusers writes it into saved configurations
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)


def get_cache(transformer: nn.Module) -> FeatureCache | None:
    """The cache attached to ``transformer``, or None."""
    return transformer.__dict__.get(ATTRIBUTE)


def apply_cache_to_dit(transformer: nn.Module, cache_interval: int = 5) -> FeatureCache:
    """Attach a block-residual cache to a ``DiTTransformer2DModel``; the unmodified ``DiTPipeline`` then uses it.

    Args:
        transformer: a diffusers DiT, plain or quantized.
        cache_interval: every ``cache_interval``-th step is computed, the others reuse; 1 computes all.

    Returns:
        The cache, for its counters. Features are dropped by themselves when a new run begins.

    Raises:
        ConfigError: the interval is not an integer >= 1.
        CacheError: not a DiT, a cache is attached already, or another tool has replaced ``forward``.
    """
    if not isinstance(cache_interval, int) or isinstance(cache_interval, bool) or cache_interval < 1:
        raise ConfigError(f"cache_interval is {cache_interval!r}; give an integer >= 1 (1 computes every step)")
    from diffusers import DiTTransformer2DModel

    if not isinstance(transformer, DiTTransformer2DModel):
        raise CacheError(
            f"the cache knows diffusers' DiTTransformer2DModel; got {type(transformer).__name__} "
            "(of a pipeline, pass pipe.transformer; attach before torch.compile)"
        )
    if get_cache(transformer) is not None:
        raise CacheError("a cache is attached already; call remove_cache(transformer) first")
    blocks = _blocks(transformer)
    for module in (transformer, *blocks):
        if "forward" in module.__dict__:
            raise CacheError(
                f"forward of {type(module).__name__} was replaced on the instance (by accelerate's offload hooks, for "
                "example); attach the cache before them"
            )
    cache = FeatureCache(cache_interval)
    for index, block in enumerate(blocks):
        ends = [name for name, at in (("first", 0), ("last", len(blocks) - 1)) if index == at]
        setattr(block, POSITION, " and ".join(ends))
        _attach(block, _CachedBlock, cache)
    _attach(transformer, _CachedTransformer, cache)
    return cache


def _blocks(transformer: nn.Module) -> list[nn.Module]:
    return list(transformer.get_submodule("transformer_blocks").children())


def _attach(module: Any, mixin: Any, cache: FeatureCache) -> None:
    setattr(module, ATTRIBUTE, cache)
    base: Any = type(module)
    module.__class__ = _cached_class(mixin, base)


def _detach(module: Any) -> None:
    delattr(module, ATTRIBUTE)
    module.__class__ = type(module).__mro__[2]  # cached class, mixin, base


def reset_all_caches(transformer: nn.Module) -> None:
    """Forget all cached features and counters; does nothing where no cache is attached."""
    cache = get_cache(transformer)
    if cache is not None:
        cache.reset()


def remove_cache(transformer: nn.Module) -> None:
    """Detach the cache: the model is exactly what it was before.

    Raises:
        CacheError: none is attached, or another tool has wrapped the cached ``forward`` since.
    """
    if get_cache(transformer) is None:
        raise CacheError(f"no cache is attached to this {type(transformer).__name__}")
    blocks = _blocks(transformer)
    for module in (transformer, *blocks):
        if "forward" in module.__dict__:
            raise CacheError(
                f"forward of {type(module).__name__} was wrapped after the cache was attached (by accelerate's offload "
                "hooks, for example); remove those first"
            )
    for block in blocks:
        _detach(block)
        delattr(block, POSITION)
    _detach(transformer)
