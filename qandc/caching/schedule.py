"""Decide when a feature cache computes and when it reuses, before the denoising loop, as a tuple of booleans.

True is a *compute step*, False a *reuse step*. This module knows no model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from qandc.errors import ConfigError
from qandc.support.arguments import Between, Steps, check_fields, checked
from qandc.support.files import FileKind

__all__ = [
    "CacheConfig",
    "CalibratedSchedule",
    "Errors",
    "Schedule",
    "cache_of",
    "even_schedule",
    "forecast_weights",
    "format_schedule",
    "optimal_schedule",
    "uniform_schedule",
]

SAME_TIMESTEP = 1e-6  # relative difference up to which machines may round one timestep differently

Schedule = tuple[bool, ...]
Errors = Callable[[tuple[int, ...]], np.ndarray]  # computed steps, newest first -> of all steps after the newest
MODES = ("delta", "branch", "taylor", "hicache", "crf", "first_block")
PER_BRANCH = ("branch", "taylor", "hicache")
FORECASTS = ("taylor", "hicache", "crf")
OLDER_MODES = {"block": "delta"}
STORAGE_DTYPES = ("float32", "bfloat16", "int8")
LARGEST_ORDER = 2
DEFAULT_INTERVAL = 5
DEFAULT_THRESHOLD = 0.05  # as in diffusers
SIGMA = 0.5  # of hicache, as in the code of its authors for FLUX.1


def _is_computed(step: int, interval: int, warm_up_steps: int) -> bool:
    return step < warm_up_steps or (step - warm_up_steps + 1) % interval == 0


@checked
def uniform_schedule(
    num_inference_steps: Steps, interval: Steps, *, warm_up_steps: Steps = 1, last_step_computed: bool = False
) -> Schedule:
    """Compute the first ``warm_up_steps``, then every ``interval``-th step (FORA, arXiv 2407.01425).

    >>> "".join("C" if computed else "." for computed in uniform_schedule(8, 3))
    'C..C..C.'
    """
    steps = [_is_computed(step, interval, warm_up_steps) for step in range(num_inference_steps)]
    steps[-1] |= last_step_computed
    return tuple(steps)


@checked
def format_schedule(schedule: Sequence[bool], timesteps: Sequence[float] | None = None) -> str:
    """Format the steps of a schedule, or their timesteps, compute steps with a star: ``981* 961 941 921* ...``"""
    names = range(len(schedule)) if timesteps is None else timesteps
    if len(names) != len(schedule):
        raise ConfigError(f"{len(schedule)} steps of a schedule cannot be printed next to {len(names)} timesteps")
    steps = zip(names, schedule, strict=True)
    return " ".join(f"{round(float(name), 3):g}{'*' * computed}" for name, computed in steps)


@dataclass(frozen=True)
class CacheConfig:
    """Say what a feature cache stores and when it uses it.

    Attributes:
        mode: ``delta`` keeps what all blocks together add to the residual stream, one tensor (``block`` is its older
            name). ``branch`` keeps the output of every attention and MLP before its gate, and applies the gate of the
            current step (FORA). ``taylor`` forecasts these from the last ``order + 1`` compute steps (TaylorSeer, arXiv
            2503.06923), ``hicache`` does with Hermite polynomials (HiCache, arXiv 2508.16984). ``crf`` forecasts what
            ``delta`` keeps, as ``taylor`` does (cumulative residual feature, FreqCa, arXiv 2510.08669). ``first_block``
            computes the first block on every step, and reuses what all others added while the first adds nearly the
            same (FBCache of ParaAttention); it waits for the GPU to say so, and has no schedule.
        interval: every ``interval``-th step is computed; 5 if neither it nor a schedule is given.
        schedule: instead of an interval, whether each step of a run is computed.
        order: of the forecast, 1 or 2; only for modes that forecast.
        warm_up_steps: how many first steps are computed; by default 1, for modes that forecast ``order + 1``.
        num_inference_steps: steps of a run, if the interval should be a schedule of that many.
        last_step_computed: needs ``num_inference_steps``.
        threshold: of ``first_block``, 0.05 if not given: a step is computed if what the first block adds differs from
            what it added on the last computed step by more than this share, both as means of absolute values.
        storage_dtype: ``float32``, ``bfloat16`` or ``int8`` (with a scale per token); None as the model computes.
        timesteps: of the run that a schedule is for, one for each of its steps, none above the one before. A cache
            refuses steps at others; None takes any. Configs that differ in nothing else are equal.

    A step is a call of the model: a scheduler of second order takes 2 n - 1 of them for n inference steps.

    Raises:
        ConfigError: a value is not one of these, or they contradict each other.
    """

    mode: str = "delta"
    interval: Steps | None = None
    schedule: Schedule | None = None
    order: int = 1
    warm_up_steps: Steps | None = None
    num_inference_steps: Steps | None = None
    last_step_computed: bool = False
    storage_dtype: str | None = None
    # which runs it is for, not what it does; str(config) is part of what compensations were fitted for
    timesteps: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    threshold: Annotated[float, Between(0)] | None = None
    _steps: Schedule | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "mode", OLDER_MODES.get(self.mode, self.mode))
        if self.mode not in MODES:
            raise ConfigError(f"cache mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.storage_dtype is not None and self.storage_dtype not in STORAGE_DTYPES:
            allowed = ", ".join(STORAGE_DTYPES)
            raise ConfigError(f"storage_dtype {self.storage_dtype!r} is unknown; choose one of {allowed}, or None")
        if not 1 <= self.order <= LARGEST_ORDER:
            raise ConfigError(f"order is {self.order}; give 1 or 2 (higher differences amplify quantization noise)")
        if not self.planned:
            self._check_unplanned()
            return
        if self.threshold is not None:
            raise ConfigError(f"threshold is for mode 'first_block'; mode {self.mode!r} has an interval or a schedule")
        if self.schedule is not None:
            self._check_schedule(self.schedule)
            self._check_timesteps()
            return
        object.__setattr__(self, "interval", DEFAULT_INTERVAL if self.interval is None else self.interval)
        if self.warm_up_steps is None:
            object.__setattr__(self, "warm_up_steps", self.history)
        if self.last_step_computed and self.num_inference_steps is None:
            raise ConfigError("last_step_computed needs num_inference_steps: which step is the last is not known else")
        if self.num_inference_steps is not None:
            assert self.interval is not None
            assert self.warm_up_steps is not None
            schedule = uniform_schedule(
                self.num_inference_steps,
                self.interval,
                warm_up_steps=self.warm_up_steps,
                last_step_computed=self.last_step_computed,
            )
            object.__setattr__(self, "_steps", schedule)
        self._check_order()
        self._check_timesteps()

    def _check_unplanned(self) -> None:
        for name in ("interval", "schedule", "warm_up_steps", "num_inference_steps", "last_step_computed", "timesteps"):
            if getattr(self, name) not in (None, False):
                self.check_planned(f"it has no {name}")
        object.__setattr__(self, "threshold", DEFAULT_THRESHOLD if self.threshold is None else self.threshold)

    def check_planned(self, what: str) -> None:
        """Refuse, with a ConfigError, a mode that decides while it runs, and say what it therefore cannot."""
        if not self.planned:
            planned = ", ".join(mode for mode in MODES if mode != self.mode)
            raise ConfigError(
                f"cache mode {self.mode!r} decides at each step whether to compute it, so {what}; "
                f"choose one of {planned}"
            )

    def _check_timesteps(self) -> None:
        if self.timesteps is None:
            return
        if self._steps is None:
            raise ConfigError("timesteps need a schedule or num_inference_steps: an interval is for runs of any length")
        timesteps = tuple(float(timestep) for timestep in self.timesteps)
        if len(timesteps) != len(self._steps):
            raise ConfigError(f"a schedule of {len(self._steps)} steps needs as many timesteps; got {len(timesteps)}")
        rise = next((pair for pair in itertools.pairwise(timesteps) if pair[1] > pair[0]), None)
        if rise is not None:  # a feature cache takes it for the begin of another run
            raise ConfigError("timesteps rise from {:g} to {:g}; give those of a run whose never do".format(*rise))
        object.__setattr__(self, "timesteps", timesteps)

    def _check_schedule(self, schedule: Schedule) -> None:
        for name in ("interval", "warm_up_steps", "num_inference_steps"):
            if getattr(self, name) is not None:
                raise ConfigError(f"give a schedule or {name}, not both: the schedule says which steps are computed")
        if self.last_step_computed:
            raise ConfigError("give a schedule or last_step_computed, not both: the schedule says it for the last step")
        if not schedule:
            raise ConfigError("schedule is empty; give whether each step is computed, one boolean per step")
        if not schedule[0]:
            raise ConfigError("the first step of the schedule is not computed, but there is nothing to reuse yet")
        object.__setattr__(self, "_steps", self.schedule)
        self._check_order()

    def _check_order(self) -> None:
        computed = next((step for step in range(self._horizon) if not self.computes(step)), self.history)
        if computed < self.history:
            raise ConfigError(
                f"a forecast of order {self.order} needs {self.history} computed steps before the first reuse; this "
                f"schedule has {computed} (compute more first steps, or lower the order)"
            )

    @property
    def _horizon(self) -> int:
        """Return how many steps show all that a schedule does."""
        if self._steps is not None:
            return len(self._steps)
        assert self.interval is not None
        assert self.warm_up_steps is not None
        return self.warm_up_steps + self.interval

    @property
    def history(self) -> int:
        """Return of how many compute steps features are stored."""
        return self.order + 1 if self.mode in FORECASTS else 1

    @property
    def planned(self) -> bool:
        """Tell whether it is known before a run which steps are computed."""
        return self.mode != "first_block"

    @property
    def per_branch(self) -> bool:
        """Tell whether features are those of each branch, before its gate; else of all blocks together."""
        return self.mode in PER_BRANCH

    @property
    def length(self) -> int | None:
        """Return the steps of a run; None if any number will do."""
        return None if self._steps is None else len(self._steps)

    def computes(self, step: int) -> bool:
        """Tell whether a step is computed."""
        if self._steps is not None:
            return self._steps[step]
        assert self.interval is not None
        assert self.warm_up_steps is not None
        return _is_computed(step, self.interval, self.warm_up_steps)

    def stores(self, step: int) -> bool:
        """Tell whether a later step will use the features of this compute step."""
        if not self.planned:
            return True
        if self._steps is None and self.interval == 1:
            return False
        computed = 1
        for later in range(step + 1, len(self._steps) if self._steps is not None else step + 1 + self._horizon):
            if not self.computes(later):
                return True
            computed += 1
            if computed > self.history:
                return False
        return False

    @checked
    def of_steps(self, num_inference_steps: Steps) -> Schedule:
        """Return the schedule of a run of so many steps.

        Raises:
            ConfigError: the schedule has another length.
        """
        self.check_planned("it has no schedule")
        if self._steps is not None and len(self._steps) != num_inference_steps:
            raise ConfigError(
                f"the cache schedule has {len(self._steps)} steps and the run {num_inference_steps}; give a schedule "
                "of that length (one entry for each call of the model), or an interval"
            )
        return tuple(self.computes(step) for step in range(num_inference_steps))

    @checked
    def check_run(self, timesteps: Sequence[float]) -> None:
        """Raise ConfigError for a run, given by its timesteps, that the schedule is not for; it names both."""
        if self.planned:
            self.of_steps(len(timesteps))
        for step, (expected, timestep) in enumerate(zip(self.timesteps or (), timesteps, strict=False)):
            if not math.isclose(timestep, expected, rel_tol=SAME_TIMESTEP):
                raise ConfigError(
                    f"the cache schedule is for runs with step {step + 1} at timestep {expected:g}; this one has it at "
                    f"{timestep:g}: calibrate a schedule for this scheduler, or give an interval"
                )


def cache_of(mode: str, interval: int | None, usual: int) -> CacheConfig:
    """Make the config of a mode with an interval, the usual one if none is given; ``first_block`` has none."""
    return CacheConfig(mode, interval=usual if interval is None and mode != "first_block" else interval)


def forecast_weights(computed: Sequence[int], step: int, order: int, mode: str = "taylor") -> list[float]:
    """Write the forecast at ``step`` as a weighted sum of the features at ``computed`` steps, newest first.

    TaylorSeer (arXiv 2503.06923): ``F(s) = Σ_i Δ^i F · x^i / i!`` with x the steps since the newest, and
    ``Δ^i = (Δ^(i-1) now - Δ^(i-1) at the computed step before) / d``, d the steps between these two.
    HiCache (arXiv 2508.16984) has ``σ^i H_i(σ x)`` in the place of ``x^i``, H_i the physicists' Hermite polynomials:
    ``σ · 2 σ x`` and ``σ² (4 σ² x² - 2)``, σ = 0.5. So order 1 goes half as far as TaylorSeer's.

    >>> forecast_weights([6, 3], 8, 1)  # 2 of 3 steps further along the line
    [1.6666666666666665, -0.6666666666666666]
    """
    order = min(order, len(computed) - 1)
    since = step - computed[0]
    linear, square = float(since), float(since**2)
    if mode == "hicache":
        linear, square = 2 * SIGMA**2 * since, SIGMA**2 * (4 * SIGMA**2 * since**2 - 2)
    weights = [1.0] + [0.0] * (len(computed) - 1)
    if order >= 1:
        last = computed[0] - computed[1]
        weights[0] += linear / last
        weights[1] -= linear / last
    if order >= 2:
        before = computed[1] - computed[2]
        half = square / 2 / last
        weights[0] += half / last
        weights[1] -= half * (1 / last + 1 / before)
        weights[2] += half / before
    return weights


def optimal_schedule(
    errors: Errors, steps: int, computed_steps: int, *, order: int = 0, warm_up_steps: int = 1
) -> Schedule:
    """Find the schedule of ``computed_steps`` compute steps with the least summed error.

    Dynamic programming, exact for order 0 and 1.

    The state is the last ``order + 1`` computed steps, on which the forecasts until the next one depend.

    Args:
        errors: gives for such a state, newest first, the errors of all steps after the newest.
        steps: of the run.
        computed_steps: how many of them are computed, ``warm_up_steps`` to all.
        order: of the forecast; 0 repeats the newest features.
        warm_up_steps: first steps that are computed in any case, at least ``order + 1``.
    """
    if not order < warm_up_steps <= computed_steps <= steps:
        raise ConfigError(
            f"of {steps} steps {computed_steps} cannot be computed with {warm_up_steps} first ones and order {order}; "
            f"allowed are {warm_up_steps} to {steps}, and at least order + 1 first ones"
        )
    # of order 2 there are too many histories; far longer gaps than the mean are never good there
    longest = steps if order < 2 else 2 * -(-steps // computed_steps) + 2
    sums: dict[tuple[int, ...], np.ndarray] = {}

    def until(history: tuple[int, ...], stop: int) -> float:
        """Sum the errors of all reuse steps before ``stop``."""
        if history not in sums:
            sums[history] = np.concatenate([[0.0], errors(history).cumsum()])
        return float(sums[history][stop - history[0] - 1])

    start = tuple(range(warm_up_steps - 1, warm_up_steps - 2 - order, -1))
    costs = {start: 0.0}
    before: list[dict[tuple[int, ...], tuple[int, ...]]] = []
    for _ in range(computed_steps - warm_up_steps):
        best: dict[tuple[int, ...], float] = {}
        origin: dict[tuple[int, ...], tuple[int, ...]] = {}
        for history, cost in costs.items():
            for step in range(history[0] + 1, min(steps, history[0] + 1 + longest)):
                total, following = cost + until(history, step), (step, *history[:-1])
                if total < best.get(following, np.inf):
                    best[following], origin[following] = total, history
        costs = best
        before.append(origin)
    history = min(costs, key=lambda known: costs[known] + until(known, steps))
    computed = set(range(warm_up_steps)) | {history[0]}
    for origin in reversed(before):
        history = origin[history]
        computed.add(history[0])
    return tuple(step in computed for step in range(steps))


def even_schedule(steps: int, computed_steps: int, warm_up_steps: int) -> Schedule:
    """Space ``computed_steps`` compute steps as evenly as can be, behind the first ``warm_up_steps`` of them."""
    later = computed_steps - warm_up_steps
    chosen = {warm_up_steps - 1 + round(i * (steps - warm_up_steps) / (later + 1)) for i in range(1, later + 1)}
    return tuple(computed_steps == steps or step < warm_up_steps or step in chosen for step in range(steps))


def schedule_error(errors: Errors, schedule: Schedule, order: int) -> float:
    """Sum the errors of the reuse steps of a schedule; ``errors`` as :func:`optimal_schedule` takes it."""
    computed = [step for step, chosen in enumerate(schedule) if chosen]
    total = 0.0
    for i, (step, following) in enumerate(itertools.pairwise([*computed, len(schedule)])):
        history = tuple(reversed(computed[max(0, i - order) : i + 1]))
        total += float(errors(history)[: following - step - 1].sum())
    return total


@dataclass(frozen=True)
class CalibratedSchedule:
    """Hold a schedule found by :func:`qandc.calibrate_schedule`, with what it was found for; or a uniform one.

    Attributes:
        schedule: whether each step is computed, one entry for each call of the model.
        timesteps: of these calls.
        mode, order: as in :class:`CacheConfig`; order 0 of modes that do not forecast.
        error, uniform_error: an estimate of the summed relative feature error of its reuse steps, and of those of an
            evenly spaced schedule with as many compute steps (:func:`qandc.calibrate_schedule` says what of); None of a
            uniform one, for which no features were compared.

    Raises:
        ConfigError: a value is not one of these, timesteps rise, or no cache can follow the schedule.
    """

    schedule: Schedule
    timesteps: tuple[float, ...]
    mode: str
    order: Annotated[int, Between(0, LARGEST_ORDER)]
    error: Annotated[float, Between(0)] | None = None
    uniform_error: Annotated[float, Between(0)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        object.__setattr__(self, "mode", OLDER_MODES.get(self.mode, self.mode))
        if self.mode not in MODES:
            raise ConfigError(f"cache mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if not self.schedule or len(self.schedule) != len(self.timesteps):
            raise ConfigError(
                f"a schedule needs steps, and as many timesteps as steps; got {len(self.timesteps)} and "
                f"{len(self.schedule)}"
            )
        self.config()

    @checked
    def config(self, storage_dtype: str | None = None) -> CacheConfig:
        """Make the config of a cache that follows this schedule, in runs at its timesteps."""
        config = CacheConfig(self.mode, schedule=self.schedule, order=max(1, self.order), storage_dtype=storage_dtype)
        return replace(config, timesteps=self.timesteps)

    @checked
    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON; a file under this name is always whole."""
        FILE.write(Path(path), self)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> CalibratedSchedule:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is not there, damaged, or no schedule of this version.
        """
        return FILE.read(Path(path))


FILE = FileKind("schedule", 2, CalibratedSchedule, "make one with calibrate_schedule")
