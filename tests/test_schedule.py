"""Schedules: uniform, checked, forecast by definition, and optimal by trying all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from qandc import (
    CacheConfig,
    CalibratedSchedule,
    CalibrationConfig,
    ConfigError,
    OutputError,
    format_schedule,
    uniform_schedule,
)
from qandc.caching.schedule import (
    FILE,
    even_schedule,
    forecast_weights,
    optimal_schedule,
    schedule_error,
)
from qandc.method.schedule_calibration import StepMoments


def stars(schedule) -> str:
    return "".join("C" if computed else "." for computed in schedule)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"interval": 1}, "CCCCCCCC"),
        ({"interval": 3}, "C..C..C."),
        ({"interval": 3, "last_step_computed": True}, "C..C..CC"),
        ({"interval": 3, "warm_up_steps": 2}, "CC..C..C"),
        ({"interval": 5, "warm_up_steps": 3}, "CCC....C"),
        ({"interval": 99}, "C......."),
    ],
)
def test_uniform_schedule(arguments, expected):
    assert stars(uniform_schedule(8, **arguments)) == expected
    # what a run of unknown length does is what the schedule of its length says
    if "last_step_computed" not in arguments:
        config = CacheConfig("delta", **arguments)
        assert stars(config.computes(step) for step in range(8)) == expected
        assert stars(config.of_steps(8)) == expected
    config = CacheConfig("branch", num_inference_steps=8, **arguments)
    assert stars(config.of_steps(8)) == expected
    assert config.length == 8


def test_defaults():
    assert (CacheConfig().mode, CacheConfig().interval, CacheConfig().warm_up_steps) == ("delta", 5, 1)
    assert CacheConfig("taylor", order=2).warm_up_steps == 3
    modes = {"delta": 1, "branch": 1, "taylor": 2, "hicache": 2, "crf": 2}
    assert {mode: CacheConfig(mode).history for mode in modes} == modes


def test_the_older_name_of_a_mode():
    assert CacheConfig("block", interval=3) == CacheConfig("delta", interval=3)
    assert CalibratedSchedule((True, False), (900, 100), "block", 0).mode == "delta"
    assert CalibrationConfig(cache_mode="block") == CalibrationConfig(cache_mode="delta")


def test_configs_are_values():
    config = CacheConfig("taylor", interval=3, order=2, storage_dtype="int8")
    assert config == CacheConfig("taylor", interval=3, order=2, storage_dtype="int8")
    assert len({config, CacheConfig("taylor", interval=3, order=2, storage_dtype="int8")}) == 1
    assert dataclasses.replace(config, interval=4).interval == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.interval = 2


def test_timesteps_say_which_runs_it_is_for_and_not_what_it_does():
    plain = CacheConfig("branch", schedule=(True, False, True))
    config = CacheConfig("branch", schedule=(True, False, True), timesteps=np.array([981, 661, 321]))
    assert config.timesteps == (981, 661, 321)
    assert (str(config), hash(config), config) == (str(plain), hash(plain), plain)
    assert dataclasses.replace(plain, timesteps=[3, 2, 2]).timesteps == (3, 2, 2)
    assert CacheConfig(interval=2, num_inference_steps=2, timesteps=(9, 8)).timesteps == (9, 8)


def test_runs_at_other_timesteps_are_refused():
    config = CacheConfig(schedule=(True, False, True), timesteps=(981, 661, 321))
    config.check_run((981, 661, 321))
    with pytest.raises(ConfigError, match=r"step 2 at timestep 661; this one has it at 661\.9"):
        config.check_run((981, 661.9, 321))
    CacheConfig(schedule=(True, False, True)).check_run((5, 4, 3))
    CacheConfig(interval=2).check_run((5, 4, 3, 2))
    with pytest.raises(ConfigError, match="step 2 at timestep 661; this one has it at 660"):
        config.check_run((981, 660, 321))
    with pytest.raises(ConfigError, match="schedule has 3 steps and the run 2"):
        config.check_run((981, 661))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 3, "timesteps": (9, 8)}, "timesteps need a schedule or num_inference_steps"),
        ({"schedule": (True, True), "timesteps": (9,)}, "a schedule of 2 steps needs as many timesteps; got 1"),
        ({"schedule": (True, True), "timesteps": (8, 9)}, "timesteps rise from 8 to 9"),
        ({"mode": "blocks"}, "mode 'blocks' is unknown; choose one of delta, branch, taylor, hicache, crf"),
        ({"order": 0}, "order is 0"),
        ({"mode": "taylor", "order": 3}, "order is 3; give 1 or 2"),
        ({"mode": "taylor", "warm_up_steps": 1}, "order 1 needs 2 computed steps before the first reuse; this.* has 1"),
        ({"mode": "taylor", "order": 2, "schedule": (True, True, False)}, "needs 3 computed steps"),
        ({"storage_dtype": "int4"}, "storage_dtype 'int4' is unknown; choose one of float32, bfloat16, int8"),
        ({"last_step_computed": True}, "last_step_computed needs num_inference_steps"),
        ({"schedule": ()}, "schedule is empty"),
        ({"schedule": (False, True)}, "the first step of the schedule is not computed"),
        ({"schedule": (True,), "interval": 3}, "give a schedule or interval, not both"),
        ({"schedule": (True,), "last_step_computed": True}, "not both"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**arguments)


def test_a_run_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="schedule has 3 steps and the run 4"):
        CacheConfig(schedule=(True, False, True)).of_steps(4)


def test_timesteps_that_differ_in_their_fraction_are_told_apart():
    """Compare timesteps of flow matching by value: they may all lie between 0 and 1."""
    config = CacheConfig(schedule=(True, False, True), timesteps=(0.75, 0.5, 0.25))
    config.check_run((0.75, 0.5 + 1e-8, 0.25))
    with pytest.raises(ConfigError, match=r"step 2 at timestep 0\.5; this one has it at 0\.3"):
        config.check_run((0.75, 0.3, 0.25))


def test_a_schedule_next_to_its_timesteps():
    assert format_schedule((True, False, True), (981, 961, 941)) == "981* 961 941*"
    assert format_schedule((True, False, True), (981.0, 0.5, 0.9642857)) == "981* 0.5 0.964*"
    assert format_schedule((True, False)) == "0* 1"
    with pytest.raises(ConfigError, match="2 steps of a schedule"):
        format_schedule((True, False), (1,))


@pytest.mark.parametrize("history", [1, 2, 3])
def test_what_is_stored_is_what_a_later_step_uses(history):
    mode, order = ("taylor", history - 1) if history > 1 else ("branch", 1)
    generator = np.random.default_rng(0)
    for _ in range(50):
        schedule = [True] * history + [bool(b) for b in generator.random(9) < 0.5]
        config = CacheConfig(mode, schedule=schedule, order=order)
        used = set()
        for step, computed in enumerate(schedule):
            if not computed:
                used |= set([s for s in range(step) if schedule[s]][-history:])
        assert {step for step in range(len(schedule)) if schedule[step] and config.stores(step)} == used
    assert not any(CacheConfig(mode, interval=1, order=order).stores(step) for step in range(5))
    assert CacheConfig(mode, interval=2, order=order).stores(history - 1)


def series(features, computed, step, order, basis):
    """Forecast as TaylorSeer's paper does: differences of differences, kept from one computed step to the next."""
    factors: list[float] = []
    previous = None
    for at in sorted(computed):
        new = [features[at]]
        if previous is not None:
            for i in range(min(order, len(factors))):
                new.append((new[i] - factors[i]) / (at - previous))
        factors, previous = new, at
    return sum(f * basis(step - previous, i) / math.factorial(i) for i, f in enumerate(factors))


def hermite(x, i):
    """Return ``σ^i H_i(σ x)``, with numpy's physicists' Hermite polynomials."""
    return 0.5**i * np.polynomial.hermite.hermval(0.5 * x, [0] * i + [1])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("mode", "basis"), [("taylor", pow), ("crf", pow), ("hicache", hermite)])
def test_forecast_weights_are_those_of_the_series(order, mode, basis):
    generator = np.random.default_rng(1)
    for _ in range(100):
        computed = sorted(generator.choice(30, order + 1, replace=False).tolist(), reverse=True)
        features = {step: float(generator.normal()) for step in computed}
        step = computed[0] + int(generator.integers(1, 9))
        weights = forecast_weights(computed, step, order, mode)
        assert sum(weights) == pytest.approx(1)
        forecast = sum(w * features[s] for w, s in zip(weights, computed, strict=True))
        assert forecast == pytest.approx(series(features, computed, step, order, basis))


def test_with_fewer_steps_the_order_is_lower():
    assert forecast_weights([4], 6, 2) == [1.0]
    assert forecast_weights([4, 2], 6, 2) == forecast_weights([4, 2], 6, 1)


def walk(steps, seed):
    """Random walks of features, ``[S, samples, M]``, and gates that change from step to step, ``[S, M]``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(steps, 20, 7, generator=generator, dtype=torch.float64).cumsum(0)
    scales, gates = (torch.rand(steps, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return features * scales[:, None], gates


def moments_of(features, gates):
    return StepMoments(features.mean(1), torch.einsum("anm,bnm->abm", features, features) / 20, gates.square())


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("pull", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["taylor", "hicache"])
def test_errors_of_steps_by_definition(order, pull, mode):
    features, gates = walk(9, 3)
    computed = [5, 3, 0][: order + 1]
    errors = moments_of(features, gates).errors(computed, pull, mode=mode)
    assert len(errors) == 3
    for j in range(6, 9):
        weights = forecast_weights(computed, j, order, mode)
        f, g = sum(w * features[s] for w, s in zip(weights, computed, strict=True)), features[j]
        if pull is not None:
            fitted = [torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y).solution[0] for x, y in zip(
                f.T, g.T, strict=True)]  # fmt: skip
            f = f * (1 + (1 - pull) * (torch.stack(fitted) - 1))
            f = f + (g - f).mean(0)
        expected = (gates[j] * (f - g)).norm() / (gates[j] * g).norm()
        assert errors[j - 6] == pytest.approx(expected.item())
    assert len(moments_of(features, gates).errors([8, 3, 0], pull)) == 0


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_that_of_trying_all(order, seed):
    steps, computed = 9, 5
    errors = moments_of(*walk(steps, seed)).errors
    found = optimal_schedule(errors, steps, computed, order=order, warm_up_steps=order + 1)
    assert sum(found) == computed
    assert all(found[: order + 1])
    tried = []
    for chosen in itertools.combinations(range(order + 1, steps), computed - order - 1):
        tried.append(schedule_error(errors, tuple(s <= order or s in chosen for s in range(steps)), order))
    assert schedule_error(errors, found, order) == pytest.approx(min(tried))


@pytest.mark.parametrize("order", [0, 1])
def test_gaps_may_be_as_long_as_they_like(order):
    """Features that change in the last steps alone: all that lies between is reused at no cost."""
    features = torch.eye(5, dtype=torch.float64)[[0] * 17 + [1, 2, 3]][:, None].repeat(1, 20, 1)
    errors = moments_of(features, torch.ones(20, 5)).errors
    found = optimal_schedule(errors, 20, 5, order=order, warm_up_steps=order + 1)
    assert schedule_error(errors, found, order) == 0
    assert found[17:] == (True,) * 3
    expected = (True, True, *(False,) * 15, True, True, True)
    assert optimal_schedule(errors, 20, 5, order=1, warm_up_steps=2) == expected


@pytest.mark.parametrize("warm_up", [1, 2, 3])
@pytest.mark.parametrize("computed", range(3, 9))
def test_an_even_schedule_computes_as_many_steps_as_asked_for(computed, warm_up):
    schedule = even_schedule(8, computed, warm_up)
    assert sum(schedule) == computed
    assert all(schedule[:warm_up])
    steps = [step for step in range(warm_up - 1, 8) if schedule[step]]
    gaps = [later - step for step, later in itertools.pairwise(steps)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_all_steps_or_too_few():
    errors = moments_of(*walk(6, 0)).errors
    assert optimal_schedule(errors, 6, 6) == (True,) * 6
    for computed, order in ((7, 0), (0, 0), (1, 1)):
        with pytest.raises(ConfigError, match="of 6 steps"):
            optimal_schedule(errors, 6, computed, order=order, warm_up_steps=order + 1)


FOUND = CalibratedSchedule((True, True, False), (981, 661, 321), "taylor", 1, 0.25, 0.5)


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "schedule.json"
    FOUND.save(path)
    assert CalibratedSchedule.load(path) == FOUND
    assert FOUND.config("int8") == CacheConfig("taylor", schedule=(True, True, False), storage_dtype="int8")
    assert FOUND.config().timesteps == FOUND.timesteps
    dataclasses.replace(FOUND, timesteps=(999.5, 999.25, 1)).save(path)
    assert CalibratedSchedule.load(path).timesteps == (999.5, 999.25, 1)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": [False, True, True]}, "first step of the schedule is not computed"),
        ({"timesteps": [1]}, "as many timesteps as steps"),
        ({"mode": "none"}, "mode 'none' is unknown"),
        ({"timesteps": [1, 2, 3]}, "timesteps rise from 1 to 2"),
        ({"order": 2, "mode": "taylor"}, "needs 3 computed steps before the first reuse"),
        ({"error": "0.1"}, "Expected `float | null`, got `str`"),
    ],
)
def test_broken_files_are_refused(tmp_path, change, message):
    path = tmp_path / "schedule.json"
    FILE.write(path, {**dataclasses.asdict(FOUND), **change})
    with pytest.raises(ConfigError, match=message):
        CalibratedSchedule.load(path)
    FOUND.save(path)
    path.write_text(path.read_text().replace("true", "false", 1))
    with pytest.raises(ConfigError, match=r"is not as it was written \(checksum\)"):
        CalibratedSchedule.load(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ConfigError, match="is no schedule"):
        CalibratedSchedule.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no schedule"):
        CalibratedSchedule.load(tmp_path / "text.json")
    with pytest.raises(OutputError, match="cannot write"):
        FOUND.save(tmp_path / "no" / "schedule.json")
