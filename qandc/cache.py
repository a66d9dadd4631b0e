"""Feature caching for diffusers' DiT: what the blocks add to the residual stream is reused between steps.

Step i of a run is a *compute step* if ``i mod cache_interval == 0``, else a *reuse step* (FORA's uniform schedule;
Q&C, arXiv 2503.02508, Sec. 2.1). A compute step stores ``r = Σ_l (block_l(x_l) - x_l)``, one tensor for the
whole stack, since residuals of successive blocks add up to the difference of output and input. A reuse step computes
``x + r`` and nothing else between patch embedding and output projection.

The model is not forked: while a cache is attached, the transformer and its blocks are instances of subclasses of their
own classes that override ``forward`` alone. Attributes, parameters and state-dict keys stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qandc.errors import CacheError, ConfigError

__all__ = ["FeatureCache", "apply_cache_to_dit", "get_cache", "remove_cache", "reset_all_caches"]

logger = logging.getLogger(__name__)

CACHE = "_qandc_cache"
FUSED = "_qandc_fused"  # the attribute that holds what fuse_dit knows of a model
POSITION = "_qandc_position"
BASE_CLASS = "_qandc_base_class"


class FeatureCache:
    """State of one attached cache.

    Two calls of the transformer are successive steps of one run if

    - ``class_labels`` is the same tensor, as in a pipeline, which makes it once per run, with the same values;
    - latents have the same shape, dtype and device;
    - every row's timestep falls, by no more than twice the last fall (plus one, for rounding).

    Anything else begins a new run with a compute step. A scheduler that repeats a timestep (Heun, PNDM) therefore
    computes more often than the interval says. A loop of your own that keeps one labels tensor for several runs should
    call :func:`reset_all_caches` between them. Comparing waits for the GPU twice per step.

    Attributes:
        interval: every ``interval``-th step is computed.
        compute_steps, reuse_steps: how many steps of each kind were taken since the cache was attached or reset.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.paused = False
        self.active = False  # inside a forward of the transformer
        self.reset()

    def reset(self) -> None:
        """Forget all features, the current run and the counters."""
        self.compute_steps = 0
        self.reuse_steps = 0
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self.residual: torch.Tensor | None = None
        self.reusing = False
        self._step = -1
        self._signature: tuple[Any, ...] | None = None
        self._class_labels: torch.Tensor | None = None
        self._label_values: torch.Tensor | None = None
        self._timesteps: list[float] = []
        self._largest_fall = float("inf")
        self._block_input: torch.Tensor | None = None

    @contextlib.contextmanager
    def step(self, hidden_states: torch.Tensor, timestep: Any, class_labels: torch.Tensor | None) -> Iterator[None]:
        """One forward of the transformer; an exception inside, Ctrl-C included, leaves nothing behind."""
        if self.active:
            raise CacheError(
                "two threads are inside this cached transformer at once, and its features would mix; give each thread "
                "a copy of the model (copy.deepcopy), or a lock"
            )
        self.active = True
        try:
            if not self.paused:
                self._begin(hidden_states, timestep, class_labels)
            yield
        except BaseException:
            self._forget()
            raise
        finally:
            self.active = self.reusing = False
            self._block_input = None

    def _begin(self, hidden_states: torch.Tensor, timestep: Any, class_labels: torch.Tensor | None) -> None:
        """Decide whether this step computes or reuses."""
        if timestep is None:
            raise CacheError("a cached DiT needs timestep: pass the timestep of this denoising step")
        timesteps = torch.as_tensor(timestep).reshape(-1).tolist()
        signature = (hidden_states.shape, hidden_states.dtype, hidden_states.device, len(timesteps))
        falls = [before - now for before, now in zip(self._timesteps, timesteps, strict=False)]
        continues = signature == self._signature and min(falls) > 0 and max(falls) <= 2 * self._largest_fall + 1
        if continues and class_labels is not self._class_labels:
            self._warn_labels()
            continues = False
        if continues and class_labels is not None and self._label_values is not None:
            continues = torch.equal(class_labels, self._label_values)  # the tensor may have been written to
        if continues:
            self._largest_fall = max(falls)
        else:
            self._forget()
            self._signature = signature
            # holding the tensor keeps its identity from being given to another run's
            self._class_labels = class_labels
            self._label_values = None if class_labels is None else class_labels.clone()
        self._timesteps = timesteps
        self._step += 1
        self.reusing = self._step % self.interval != 0
        if self.reusing:
            self.reuse_steps += 1
        else:
            self.compute_steps += 1

    def _warn_labels(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "the feature cache starts anew because class_labels is another tensor than in the step before; if this "
                "is a denoising loop of your own, make it once and pass the same tensor to every step (conditional and "
                "unconditional rows in one batch), or nothing is ever reused"
            )

    def reuse(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``x + r``: what all blocks together make of ``x`` on a reuse step."""
        if self.residual is None:
            raise CacheError("the cache holds no features to reuse; call reset_all_caches(transformer) and start again")
        return hidden_states + self.residual

    def first_block_input(self, hidden_states: torch.Tensor) -> None:
        """Note what goes into the first block of a compute step."""
        if self.active and not self.paused and self.interval > 1:
            self._block_input = hidden_states

    def last_block_output(self, hidden_states: torch.Tensor) -> None:
        """Store the residual of all blocks together."""
        if self._block_input is not None:
            self.residual = (hidden_states - self._block_input).detach()


class _CachedTransformer(nn.Module):
    gradient_checkpointing: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            raise CacheError("a cached DiT cannot recompute its blocks: disable gradient checkpointing, or use no_grad")
        cache: FeatureCache = getattr(self, CACHE)
        with cache.step(hidden_states, timestep, class_labels):
            return super().forward(hidden_states, timestep, class_labels, *args, **kwargs)


class _CachedBlock(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache: FeatureCache = getattr(self, CACHE)
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
def derived_class(mixin: Any, base: Any) -> Any:
    """``base`` with the methods of ``mixin`` first; one class for each pair, so that it can be recognised."""
    # the name of the base, because diffusers writes it into saved configurations
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)


def get_cache(transformer: nn.Module) -> FeatureCache | None:
    """The cache attached to ``transformer`` (or to the model inside ``torch.compile(transformer)``), or None."""
    return getattr(transformer, "_orig_mod", transformer).__dict__.get(CACHE)


def apply_cache_to_dit(transformer: nn.Module, cache_interval: int = 5) -> FeatureCache:
    """Attach a block-residual cache to a ``DiTTransformer2DModel``; the unmodified ``DiTPipeline`` then uses it.

    Args:
        transformer: a diffusers DiT, plain or quantized.
        cache_interval: every ``cache_interval``-th step is computed, the others reuse; 1 computes all.

    Returns:
        The cache, for its counters. Features are dropped by themselves when a new run begins (:class:`FeatureCache`).

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
    if FUSED in transformer.__dict__:
        raise CacheError("the cache works on unfused blocks; call unfuse_dit(transformer) first")
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
    base: Any = type(module)
    setattr(module, CACHE, cache)
    setattr(module, BASE_CLASS, base)
    module.__class__ = derived_class(mixin, base)


def _detach(module: Any) -> None:
    module.__class__ = getattr(module, BASE_CLASS)
    for name in (CACHE, BASE_CLASS, POSITION):
        module.__dict__.pop(name, None)


def reset_all_caches(transformer: nn.Module) -> None:
    """Forget all cached features and counters; does nothing where no cache is attached."""
    cache = get_cache(transformer)
    if cache is not None:
        cache.reset()


@contextlib.contextmanager
def paused_cache(model: nn.Module) -> Iterator[None]:
    """Compute every step inside, whatever is attached, and forget all features afterwards."""
    cache = get_cache(model)
    if cache is None:
        yield
        return
    cache.paused = True
    try:
        yield
    finally:
        cache.paused = False
        cache.reset()


def remove_cache(transformer: nn.Module) -> None:
    """Detach the cache: the model is exactly what it was before.

    Raises:
        CacheError: none is attached, or another tool has wrapped the cached model since.
    """
    if get_cache(transformer) is None:
        raise CacheError(f"no cache is attached to this {type(transformer).__name__}")
    transformer = getattr(transformer, "_orig_mod", transformer)
    modules = [*_blocks(transformer), transformer]
    for module in modules:
        mixin = _CachedTransformer if module is transformer else _CachedBlock
        base: Any = getattr(module, BASE_CLASS)
        if "forward" in module.__dict__ or type(module) is not derived_class(mixin, base):
            raise CacheError(
                f"{type(module).__name__} was wrapped after the cache was attached (by accelerate's offload hooks, for "
                "example); undo that first"
            )
    for module in modules:
        _detach(module)
