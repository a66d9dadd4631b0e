"""Fit gains and offsets for the features that a cache reuses, from runs of the model it will serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated, Any

import torch

from qandc.cache import attached_cache, detached_cache
from qandc.caching.compensation import DEFAULT_FORM, DEFAULT_PULL, FORMS, FeatureCompensation, FeatureMoments
from qandc.caching.features import FeatureStore, corrected
from qandc.caching.plan import Action, Position
from qandc.caching.schedule import CacheConfig
from qandc.errors import ConfigError, DataError, ModelError
from qandc.fusion.fuse import is_fused
from qandc.method.observation import Branches, Observer, Run, observe
from qandc.models import Family, family_of
from qandc.models.family import Call, adds_between
from qandc.support.arguments import Between, Model, checked
from qandc.support.attach import paused

__all__ = ["fit_feature_compensation"]

logger = logging.getLogger(__name__)

ALONG = ("uncached", "corrected")
INSTEAD = "fit their compensation"  # of seeing what a fused model computes
_How = tuple[str, float]  # form and pull
PULLS = (0.0, 0.25, 0.5, 0.75, 1.0)


class _Run(Run):
    """Hold one run while it is observed: where it stands, and what a cache would have stored."""

    def __init__(self, config: CacheConfig, *known_by: Any) -> None:
        super().__init__(*known_by)
        self.position = Position(config)
        self.store = FeatureStore(config)
        self.action = Action.COMPUTE


class _Fitter(Observer[_Run]):
    """Sum moments of reused and true features at every reuse step while a model runs without a cache."""

    def __init__(self, family: Family, model: Any, config: CacheConfig, target: Any, how: _How | None) -> None:
        super().__init__(family, model, config.per_branch)
        self.config, self.target, self.how = config, target, how
        self.moments: dict[int, FeatureMoments] = {}
        self._true: dict[tuple[int, int], torch.Tensor] = {}  # features of the target at this step
        if target is not None:
            self.handles += Branches(family, target, config.per_branch, self._note).handles

    def make_run(self, *known_by: Any) -> _Run:
        return _Run(self.config, *known_by)

    def begin(self, call: Call, args: Any, kwargs: Any) -> None:
        run = self.run
        if self.how is not None and adds_between(call):
            raise ConfigError("what a ControlNet adds between blocks is lost along='corrected'; use along='uncached'")
        if self.config.length is not None and run.position.step + 1 >= self.config.length:
            raise ConfigError(
                f"the cache schedule has {self.config.length} steps, and the run more; give one for the run"
            )
        run.action = run.position.advance()
        if run.action is Action.REUSE and self.target is not None:
            with paused(self.target):
                self.target(*args, **kwargs)

    def _note(self, layer: int, branch: int, feature: torch.Tensor) -> None:
        self._true[layer, branch] = feature

    def see(self, layer: int, branch: int, feature: torch.Tensor) -> None:
        run, (layers, branches) = self.run, self.branches.shape
        if run.action is Action.STORE:
            run.store.make((layers, branches, *feature.shape), feature.dtype, feature.device)
            run.store.target(run.position.newest, layer, branch).store_(feature)
        if run.action is Action.REUSE:
            step = run.position.step
            if step not in self.moments:
                self.moments[step] = FeatureMoments(layers, branches, feature.shape[-1], feature.device)
            reused = run.store.forecast(layer, branch, run.position.forecast())
            self.moments[step].add(layer, branch, reused, feature if self.target is None else self._true[layer, branch])

    def end(self, stream: torch.Tensor) -> torch.Tensor | None:
        """Go on from where the corrected cache would be, not from what the blocks have computed."""
        run = self.run
        if self.how is None or run.action is not Action.REUSE:
            return None
        weights = run.position.forecast()
        of_sets = torch.tensor(weights, device=stream.device) if weights else None
        correction = self.moments[run.position.step].solve(*self.how)
        gates, offset = corrected(self.branches.gates(), correction, len(stream))
        return run.store.add_to(self.branches.stream, gates, of_sets, offset)


def _observe(
    model: Any, run: Callable[[], Any], config: CacheConfig, target: Any, how: _How | None
) -> tuple[dict[int, FeatureMoments], tuple[float, ...]]:
    """Run a model without cache; return the moments of each reuse step, and the timesteps of the run."""

    def attach(family: Family) -> _Fitter:
        if target is not None:
            if is_fused(target):
                raise ModelError(f"the features of a fused transformer cannot be seen; {INSTEAD} before fuse")
            ours = [block.places for block in family.blocks(model).blocks]
            if family_of(target) is not family or [block.places for block in family.blocks(target).blocks] != ours:
                needed = f"{family.transformer} of {len(ours)} blocks with the same branches"
                raise ModelError(f"target must be a {needed}; got a different {type(target).__name__}")
        return _Fitter(family, model, config, target, how)

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
    form: str | None = None,
    pull: Annotated[float, Between(0, 1)] | None = None,
    held_out: Callable[[], torch.Tensor] | None = None,
) -> FeatureCompensation:
    """Fit a gain and an offset for each reuse step, branch and channel of a feature cache.

    ``fit_feature_compensation(pipe.transformer, lambda: pipe(prompts), config=CacheConfig("branch", interval=5))``.

    Runs without the cache and notes, at each step that would reuse a feature f, what the branch computes there, g. Then
    ``a = 1 + (1 - pull) (ρ - 1)`` and ``b = mean(g) - a mean(f)`` over samples and tokens, and the cache takes
    ``a · f + b`` in the place of f: ``apply_cache(transformer, compensation=found)``.

    Memory does not grow with images: sums of 40 bytes per reuse step, branch and channel (100 MB for 40 reuse steps of
    DiT-XL/2), and what the cache would store of one run, or of two that take turns.

    Args:
        transformer: quantized as it will be used; not fused yet (fuse it afterwards). An attached cache is paused,
            compiled modules run uncompiled.
        run: draws some dozens of images as they will be drawn later, with as many steps, in one run or several.
        config: of the cache: any mode and order, an interval or a schedule for that many steps.
        target: a model whose features are the true ones, the one in full precision, which corrects quantization too;
            ``transformer`` by default. An attached cache is paused.
        along: ``uncached`` notes features on the run without a cache; ``corrected`` goes on from what the corrected
            cache makes of each step, so that later steps are fitted on what they will see; draw all images in one run.
        form: ``least_squares``, ρ = Cov(f, g) / Var(f), the least error, by default for ``branch``; or
            ``variance_ratio``, ρ = √(Var(g) / Var(f)), with which features vary as much as the true ones do.
        pull: 0 for that gain, 1 for the offset alone; by default 0.5 for modes that forecast, else 0.
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
    config.check_planned("its features cannot be compensated")
    form = DEFAULT_FORM[config.mode] if form is None else form
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    if pull is not None and held_out is not None:
        raise ConfigError("give pull or held_out, not both: held-out images choose the pull")
    model = getattr(transformer, "_orig_mod", transformer)
    target = None if target in (transformer, model) else target
    pulls = PULLS if held_out is not None else (DEFAULT_PULL[config.mode] if pull is None else pull,)
    fitted = []
    moments, timesteps = _observe(model, run, config, target, (form, pulls[0]) if along == "corrected" else None)
    schedule = config.of_steps(len(timesteps))
    if all(schedule):
        raise ConfigError("this cache computes every step: there is nothing to compensate")
    exact = CacheConfig(
        config.mode, schedule=schedule, order=config.order, storage_dtype=config.storage_dtype, timesteps=timesteps
    )
    for chosen in pulls:
        if along == "corrected" and chosen != pulls[0]:
            moments, _ = _observe(model, run, config, target, (form, chosen))
        solved = [moments[step].solve(form, chosen) for step in sorted(moments)]
        gains, offsets = (torch.stack(parts).cpu() for parts in zip(*solved, strict=True))
        fitted.append(FeatureCompensation(exact, gains, offsets))
    pairs = int(next(iter(moments.values())).count.max())
    logger.info("feature compensation of %d reuse steps: %d tokens of all samples seen at each", len(gains), pairs)
    return fitted[0] if held_out is None else _best(model, fitted, pulls, held_out)


def _best(
    model: Any, fitted: list[FeatureCompensation], pulls: tuple[float, ...], held_out: Callable[[], torch.Tensor]
) -> FeatureCompensation:
    """Return the compensation whose held-out images are closest to those without a cache."""

    def draw() -> torch.Tensor:
        found: Any = held_out()
        if not isinstance(found, torch.Tensor) or not torch.isfinite(found).all():
            what = "NaN or infinite values" if isinstance(found, torch.Tensor) else type(found).__name__
            raise DataError(f"held_out must return latents or pixels as one finite tensor; got {what}")
        return found.double()

    with detached_cache(model):
        true, errors = draw(), []
        for compensation in fitted:
            with attached_cache(model, compensation=compensation):
                errors.append(float((draw() - true).square().mean()))
    for pull, error in zip(pulls, errors, strict=True):
        logger.info("feature compensation pulled by %g: mean squared error %.4g of held-out images", pull, error)
    return fitted[errors.index(min(errors))]
