"""Fit gains and offsets for the features that a cache reuses, from runs of the model it will serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any

import torch

from qandc.cache import apply_cache, detached_cache, remove_cache
from qandc.caching.compensation import FeatureCompensation, FeatureMoments
from qandc.caching.features import FeatureStore, corrected
from qandc.caching.plan import Action, Position
from qandc.caching.schedule import CacheConfig
from qandc.errors import ConfigError, ModelError
from qandc.fusion.fuse import is_fused
from qandc.method.observation import observe
from qandc.models import Family, family_of
from qandc.models.family import arguments_of, image_part
from qandc.sampling.loop import plain_timestep
from qandc.support.arguments import Between, Model, checked

__all__ = ["fit_feature_compensation"]

logger = logging.getLogger(__name__)

ALONG = ("uncached", "corrected")
INSTEAD = "fit their compensation"  # of seeing what a fused model computes
PULLS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_PULL = {"delta": 0.0, "branch": 0.0, "taylor": 0.5}  # a forecast errs less, and fits of it overshoot


class _Run:
    """Hold one run while it is observed: where it stands, its timesteps, and what a cache would have stored."""

    def __init__(self, key: Any, config: CacheConfig) -> None:
        self.key = key  # kept, so that no other tensor gets its id
        self.position = Position(config)
        self.timesteps: list[float] = []
        self.store = FeatureStore(config)
        self.action = Action.COMPUTE


class _Branches:
    """Call ``see(layer, branch, feature)`` for what each branch of a model adds, or all blocks together (``delta``)."""

    def __init__(self, family: Family, model: Any, mode: str, see: Callable[[int, int, torch.Tensor], None]) -> None:
        self.blocks = family.blocks(model)
        self.shape = (1, 1) if mode == "delta" else self.blocks.shape
        self.call: dict[str, Any] = {}  # what the first block was given
        self.stream = torch.empty(0)  # of the image, in it
        self._see = see
        modules = [block.module for block in self.blocks.blocks]
        self.handles = [modules[0].register_forward_pre_hook(self._begin, with_kwargs=True)]
        if mode == "delta":
            self.handles.append(modules[-1].register_forward_hook(self._leave))
            return
        for block in self.blocks.blocks:
            for name, place in block.places.items():
                self.handles.append(getattr(block.module, name).register_forward_hook(self._hook(*place)))

    def _begin(self, block: Any, args: Any, kwargs: Any) -> None:
        self.call = arguments_of(block, args, kwargs)
        self.stream = self.blocks.blocks[0].stream(self.call)

    def _leave(self, block: Any, args: Any, output: Any) -> None:
        self._see(0, 0, (output[-1] if isinstance(output, tuple) else output) - self.stream)

    def _hook(self, layer: int, branch: int) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, output: self._see(layer, branch, image_part(output, self.stream.shape[1]))


class _Fitter:
    """Sum moments of reused and true features at every reuse step while a model runs without a cache."""

    def __init__(self, family: Family, model: Any, config: CacheConfig, target: Any, pull: float | None) -> None:
        self.family, self.config, self.target, self.pull = family, config, target, pull
        self.moments: dict[int, FeatureMoments] = {}
        self.runs: dict[int, _Run] = {}
        self._run: _Run | None = None
        self._true: dict[tuple[int, int], torch.Tensor] = {}  # features of the target at this step
        self.branches = _Branches(family, model, config.mode, self._see)
        self.handles = [*self.branches.handles, model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if target is not None:
            self.handles += _Branches(family, target, config.mode, self._note).handles
        if pull is not None:  # after the hooks of branches, whose features it replaces
            self.handles.append(self.branches.blocks.blocks[-1].module.register_forward_hook(self._replace))

    def _begin(self, model: Any, args: Any, kwargs: Any) -> None:
        """Take the next step of the run that a forward belongs to."""
        call = arguments_of(model, args, kwargs)
        key = call.get(self.family.run_key)
        if id(key) not in self.runs:
            for over in list(self.runs.values())[:-1]:  # two may take turns: conditional and unconditional rows apart
                over.store = FeatureStore(self.config)
            self.runs[id(key)] = _Run(key, self.config)
        run = self._run = self.runs[id(key)]
        if self.config.length is not None and run.position.step + 1 >= self.config.length:
            raise ConfigError(
                f"the cache schedule has {self.config.length} steps, and the run more; give one for the run"
            )
        run.action = run.position.advance()
        run.timesteps.append(plain_timestep(torch.as_tensor(call["timestep"]).reshape(-1)[0]))
        if run.action is Action.REUSE and self.target is not None:
            self.target(*args, **kwargs)

    def _note(self, layer: int, branch: int, feature: torch.Tensor) -> None:
        self._true[layer, branch] = feature

    def _see(self, layer: int, branch: int, feature: torch.Tensor) -> None:
        run, (layers, branches) = self._run, self.branches.shape
        assert run is not None
        if run.action is Action.STORE:
            run.store.make((layers, branches, *feature.shape), feature.dtype, feature.device)
            run.store.target(run.position.newest, layer, branch).store_(feature)
        if run.action is Action.REUSE:
            step = run.position.step
            if step not in self.moments:
                self.moments[step] = FeatureMoments(layers, branches, feature.shape[-1], feature.device)
            reused = run.store.forecast(layer, branch, run.position.forecast())
            self.moments[step].add(layer, branch, reused, self._true.get((layer, branch), feature))

    def _replace(self, block: Any, args: Any, output: Any) -> Any:
        """Go on from where the corrected cache would be, not from what the blocks have computed."""
        run, x = self._run, self.branches.stream
        assert run is not None
        if run.action is not Action.REUSE:
            return output
        assert self.pull is not None
        correction = self.moments[run.position.step].solve(self.pull)
        gates = self.branches.blocks.gates(self.branches.call) if run.store.per_branch else None
        weights = run.position.forecast()
        of_sets = torch.tensor(weights, device=x.device) if weights else None
        gates, offset = corrected(gates, correction, len(x))
        x = run.store.add_to(x, gates, of_sets, offset)
        return (*output[:-1], x) if isinstance(output, tuple) else x


def _observe(
    model: Any, run: Callable[[], Any], config: CacheConfig, target: Any, pull: float | None
) -> tuple[dict[int, FeatureMoments], tuple[float, ...]]:
    """Run a model without cache; return the moments of each reuse step, and the timesteps of the run."""

    def attach(family: Family) -> _Fitter:
        if target is not None:
            blocks = len(family.blocks(model).blocks)
            if is_fused(target):
                raise ModelError(f"the features of a fused transformer cannot be seen; {INSTEAD} before fuse")
            if family_of(target) is not family or len(family.blocks(target).blocks) != blocks:
                given = type(target).__name__
                raise ModelError(f"target must be a {family.transformer} of {blocks} blocks too; got {given}")
        return _Fitter(family, model, config, target, pull)

    fitter, timesteps = observe(model, run, attach, known="features are known of", instead=INSTEAD)
    return fitter.moments, timesteps


@checked
def fit_feature_compensation(
    transformer: Model,
    run: Callable[[], Any],
    *,
    config: CacheConfig,
    target: Model | None = None,
    along: str = "uncached",
    pull: Annotated[float, Between(0, 1)] | None = None,
    held_out: Callable[[], torch.Tensor] | None = None,
) -> FeatureCompensation:
    """Fit a gain and an offset for each reuse step, branch and channel of a feature cache, by least squares.

    ``fit_feature_compensation(pipe.transformer, lambda: pipe(prompts), config=CacheConfig("branch", interval=5))``.

    Runs without the cache and notes, at each step that would reuse a feature f, what the branch computes there, g. Then
    ``a = 1 + (1 - pull) (Cov(f, g) / Var(f) - 1)`` and ``b = mean(g) - a mean(f)`` over samples and tokens, and the
    cache takes ``a · f + b`` in the place of f: ``apply_cache(transformer, compensation=found)``.

    Args:
        transformer: DiT or PixArt, quantized as it will be used; not fused yet (fuse it afterwards). An attached cache
            is paused, compiled modules run uncompiled.
        run: draws some dozens of images as they will be drawn later, with as many steps, in one run or several.
        config: of the cache: any mode and order, an interval or a schedule for that many steps.
        target: a model whose features are the true ones, the one in full precision, which corrects quantization too;
            ``transformer`` by default.
        along: ``uncached`` notes features on the run without a cache; ``corrected`` goes on from what the corrected
            cache makes of each step, so that later steps are fitted on what they will see; draw all images in one run.
        pull: 0 for least squares, 1 for the offset alone; by default 0.5 for ``taylor``, else 0.
        held_out: draws other images, and returns latents or pixels. Then the pull is the one of 0, 0.25, 0.5, 0.75
            and 1 with the least squared distance to what the model draws without a cache.

    Raises:
        ConfigError: the config computes every step or is for other steps, ``pull`` and ``held_out`` are both given, or
            runs have different steps.
        ModelError: no such transformer, or it is fused.
        DataError: the transformer did not run, or its features are NaN or infinite.
    """
    if along not in ALONG:
        raise ConfigError(f"along is {along!r}; choose one of {', '.join(ALONG)}")
    if pull is not None and held_out is not None:
        raise ConfigError("give pull or held_out, not both: held-out images choose the pull")
    model = getattr(transformer, "_orig_mod", transformer)
    pulls = PULLS if held_out is not None else (DEFAULT_PULL[config.mode] if pull is None else pull,)
    fitted = []
    moments, timesteps = _observe(model, run, config, target, pulls[0] if along == "corrected" else None)
    schedule = config.of_steps(len(timesteps))
    if all(schedule):
        raise ConfigError("this cache computes every step: there is nothing to compensate")
    exact = CacheConfig(
        config.mode, schedule=schedule, order=config.order, storage_dtype=config.storage_dtype, timesteps=timesteps
    )
    for chosen in pulls:
        if along == "corrected" and chosen != pulls[0]:
            moments, _ = _observe(model, run, config, target, chosen)
        solved = [moments[step].solve(chosen) for step in sorted(moments)]
        gains, offsets = (torch.stack(parts).cpu() for parts in zip(*solved, strict=True))
        fitted.append(FeatureCompensation(exact, gains, offsets))
    return fitted[0] if held_out is None else _best(model, fitted, pulls, held_out)


def _best(
    model: Any, fitted: list[FeatureCompensation], pulls: tuple[float, ...], held_out: Callable[[], torch.Tensor]
) -> FeatureCompensation:
    """Return the compensation whose held-out images are closest to those without a cache."""
    with detached_cache(model):
        true, errors = held_out().double(), []
        for compensation in fitted:
            apply_cache(model, compensation=compensation)
            try:
                errors.append(float((held_out().double() - true).square().mean()))
            finally:
                remove_cache(model)
    for pull, error in zip(pulls, errors, strict=True):
        logger.info("feature compensation pulled by %g: mean squared error %.4g of held-out images", pull, error)
    return fitted[errors.index(min(errors))]
