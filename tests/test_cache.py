"""Check what begins a run of a feature cache anew, ends or resets the cache, and what a cache leaves alone."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from qandc import (
    CacheConfig,
    CacheError,
    FeatureCache,
    apply_cache_to_dit,
    get_cache,
    quantize_model,
    remove_cache,
    reset_all_caches,
)
from qandc.caching.features import FeatureStore
from qandc.caching.plan import Action
from qandc.caching.timestep_watch import TimestepWatch
from qandc.support.attach import class_before, derived_class
from tests.conftest import make_dit
from tests.definition import inputs_of_dit as inputs
from tests.definition import run_dit as run

LABELS = torch.tensor([1, 2, 1000, 1000])


def stores_of_steps(model) -> list[FeatureStore]:
    """A list that takes where each step to come keeps its features, or finds them."""
    stores: list[FeatureStore] = []
    model.proj_out_2.register_forward_hook(lambda *_: stores.append(get_cache(model).plan.store))
    return stores


def test_blocks_do_not_run_on_reuse_steps():
    model = make_dit()
    calls = []
    for block in model.transformer_blocks:
        block.attn1.register_forward_hook(lambda *_: calls.append(1))
    apply_cache_to_dit(model, 3)
    run(model, 7)
    assert len(calls) == 3 * len(model.transformer_blocks)


def test_the_attached_model_looks_the_same():
    model = make_dit()
    names, classes = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    apply_cache_to_dit(model, 2)
    assert list(model.state_dict()) == names
    assert [type(m).__name__ for m in model.modules()] == classes
    assert model.transformer_blocks[0].norm1.emb is not None
    assert model.dtype == torch.float32


def fresh_start(model, attach_interval: int, action) -> None:
    """After ``action`` a run must give what it gives with a cache that has seen nothing."""
    expected = run(apply(make_dit(), attach_interval), 5, seed=7)
    apply(model, attach_interval)
    action(model)
    for actual, wanted in zip(run(model, 5, seed=7), expected, strict=True):
        assert torch.equal(actual, wanted)


def apply(model, interval: int):
    apply_cache_to_dit(model, interval)
    return model


def aborted(model) -> None:
    """A block raises in the middle of the second compute step."""
    labels = LABELS.clone()
    run(model, 3, labels=labels)
    handle = model.transformer_blocks[1].ff.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs(3), class_labels=labels)
    handle.remove()


ACTIONS = {
    "a whole run": lambda model: run(model, 6),
    "a run that ended between compute steps": lambda model: run(model, 5),
    "a run of one step": lambda model: run(model, 1),
    "a run stopped outside the model": lambda model: run(model, 2),
    "another batch size": lambda model: run(model, 2, rows=2),
    "an exception inside": aborted,
    "reset": lambda model: (run(model, 2), reset_all_caches(model)),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_nothing_stale_after(action):
    fresh_start(make_dit(), 3, action)


def test_a_run_that_starts_at_a_lower_timestep_is_new():
    """A run aborted at timestep 900, then one that starts at 700: by their timesteps they would be one run."""
    model = apply(make_dit(), 3)
    with torch.no_grad():
        model(**inputs(0), class_labels=LABELS.clone())
        later = inputs(10, seed=3)
        actual = model(**later, class_labels=LABELS.clone()).sample
        assert torch.equal(actual, make_dit()(**later, class_labels=LABELS).sample)


@pytest.mark.parametrize("shapes", [(4, 4, 4, 4), (1, 4, 1, 4)], ids=["rows", "one for all rows, or each its own"])
def test_every_rising_timestep_begins_a_run(shapes):
    """Inversion, or losses step by step: the one that began a run counts for the next, too."""
    model = apply(make_dit(), 5)
    plain, labels = make_dit(), LABELS.clone()
    with torch.no_grad():
        for step, (timestep, rows) in enumerate(zip((100, 500, 900, 950), shapes, strict=True)):
            batch = {**inputs(step), "timestep": torch.full((rows,), timestep), "class_labels": labels}
            assert torch.equal(model(**batch).sample, plain(**batch).sample)
        model(**inputs(4), class_labels=labels)
    assert (get_cache(model).compute_steps, get_cache(model).reuse_steps) == (4, 1)


def test_a_first_timestep_twice_begins_a_run():
    """Pipelines that hand on ``prompt_embeds=`` give two calls one tensor, and the first may end after a step."""
    model, plain, labels = apply(make_dit(), 3), make_dit(), LABELS.clone()
    for seed in range(3):
        with torch.no_grad():
            given = {**inputs(0, seed=seed), "class_labels": labels}
            assert torch.equal(model(**given).sample, plain(**given).sample)
    run(model, 1, labels=labels)
    assert torch.equal(run(model, 5, labels=labels)[4], run(apply(make_dit(), 3), 5)[4])


def test_first_timesteps_that_half_precision_rounds_to_one_are_of_one_run():
    """FLUX.1 in bfloat16: 1000 and 998.3 of a run of 200 steps, and a scheduler that says itself that two are alike."""
    for expected, dtype in ((None, torch.bfloat16), (None, torch.float16), ((1000.0, 1000.0, 992.0), torch.float32)):
        watch = TimestepWatch(expected)
        steps = torch.tensor([1000, 1000, 992], dtype=dtype)
        assert not any(watch.rises(step, timestep[None]) for step, timestep in enumerate(steps))
    watch, first = TimestepWatch((1000.0, 992.0)), torch.tensor([1000.0])
    assert [watch.rises(0, first), watch.rises(1, first), watch.rises(1, first - 8)] == [False, True, False]


def test_labels_written_in_place_begin_a_new_run():
    model = apply(make_dit(), 3)
    labels = LABELS.clone()
    run(model, 1, labels=labels)
    labels[0] = 9
    with torch.no_grad():
        actual = model(**inputs(1), class_labels=labels).sample
        assert torch.equal(actual, make_dit()(**inputs(1), class_labels=labels).sample)


def test_a_row_whose_timestep_rises_begins_a_new_run():
    model = apply(make_dit(), 3)
    labels = LABELS.clone()
    run(model, 1, labels=labels)
    second = {**inputs(1), "timestep": torch.tensor([880, 999, 880, 880])}
    with torch.no_grad():
        actual = model(**second, class_labels=labels).sample
        assert torch.equal(actual, make_dit()(**second, class_labels=labels).sample)


@pytest.mark.parametrize(
    "change", [lambda x: x.double().float().half(), lambda x: x[..., :4, :4]], ids=["dtype", "size"]
)
def test_latents_of_another_kind_begin_a_new_run(change):
    model = make_dit()
    cache = apply_cache_to_dit(model, 3)
    latents = inputs(0)["hidden_states"]
    labels = LABELS.clone()
    for step, x in enumerate((latents, latents, change(latents))):
        with cache.step(x, torch.tensor([900 - 20 * step]), labels) as plan:
            assert (plan.action is Action.REUSE) == (step == 1)


def test_ctrl_c_inside_a_block_leaves_nothing_behind():
    model = apply(make_dit(), 3)
    labels = LABELS.clone()

    def interrupt(*_):
        raise KeyboardInterrupt

    run(model, 1, labels=labels)
    handle = model.proj_out_2.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs(1), class_labels=labels)
    handle.remove()
    with torch.no_grad():  # would have been a reuse step
        actual = model(**inputs(2), class_labels=labels).sample
        assert torch.equal(actual, make_dit()(**inputs(2), class_labels=labels).sample)


def test_two_threads_inside_at_once_are_refused():
    model = apply(make_dit(), 3)
    model.transformer_blocks[1].ff.register_forward_hook(lambda *_: run(model, 1))
    with pytest.raises(CacheError, match="two threads"):
        run(model, 1)


@pytest.mark.parametrize("mode", ["block", "branch"])
def test_a_block_called_alone_computes_and_stores_nothing(mode):
    model, labels, config = make_dit(), LABELS.clone(), CacheConfig(mode, 3)
    apply_cache_to_dit(model, config=config)
    run(model, 1, labels=labels)
    x = torch.randn(4, 16, 32)
    arguments = {"timestep": torch.tensor([5] * 4), "class_labels": LABELS}
    with torch.no_grad():
        expected = make_dit().transformer_blocks[0](x, **arguments)
        assert torch.equal(model.transformer_blocks[0](x, **arguments), expected)
        reused = model(**inputs(1), class_labels=labels).sample
    undisturbed = make_dit()
    apply_cache_to_dit(undisturbed, config=config)
    assert torch.equal(reused, run(undisturbed, 2)[1])


def test_of_three_runs_the_one_used_longest_ago_is_given_up():
    model = apply(make_dit(), 3)
    first, second, third = (LABELS.clone() for _ in range(3))
    actions = []
    model.proj_out_2.register_forward_hook(lambda *_: actions.append(get_cache(model).plan.action))
    with torch.no_grad():
        for step, labels in ((0, first), (0, second), (1, first), (0, third), (2, first), (1, second)):
            model(**inputs(step), class_labels=labels)
    store, reuse = Action.STORE, Action.REUSE
    assert actions == [store, store, reuse, store, reuse, store]


def test_features_of_another_shape_are_never_reused():
    cache, labels, x = FeatureCache(CacheConfig("branch", 3)), LABELS.clone(), torch.zeros(4, 4, 8, 8)
    made_for = ((3, 2, 4, 16, 32), torch.float32, x.device)
    with cache.step(x, torch.tensor([900]), labels) as plan:
        store = plan.make(*made_for)
        assert plan.make(*made_for) is store
        assert store.values.shape == (1, 3, 2, 4, 16, 32)
    with cache.step(x, torch.tensor([880]), labels) as plan:
        assert plan.make(*made_for) is store
        with pytest.raises(CacheError, match="no features of this shape"):
            plan.make((3, 2, 4, 16, 64), torch.float32, x.device)


@pytest.mark.parametrize("mode", ["block", "branch", "taylor"])
def test_memory_made_in_inference_mode_serves_outside_of_it(mode):
    model = make_dit()
    apply_cache_to_dit(model, config=CacheConfig(mode, 2))
    with torch.inference_mode():
        expected = [model(**inputs(step), class_labels=LABELS).sample for step in range(4)]
    found = run(model, 4, labels=LABELS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_checkpointing_is_refused():
    model = apply(make_dit(), 3)
    model.enable_gradient_checkpointing()
    with pytest.raises(CacheError, match="gradient checkpointing"):
        model(**inputs(0), class_labels=LABELS)
    run(model, 2)


def test_features_carry_no_gradient():
    model = apply(make_dit(), 3)
    stores = stores_of_steps(model)
    assert model(**inputs(0), class_labels=LABELS).sample.requires_grad
    assert not stores[0].values.requires_grad


def test_calibration_sees_every_block_and_quantizing_drops_the_features():
    from qandc import calibrate

    labels = LABELS.clone()
    batches = [{**inputs(step), "class_labels": labels} for step in range(4)]
    plain = calibrate(quantize_model(make_dit()), batches)
    cached = apply(make_dit(), 3)
    run(cached, 2)
    quantize_model(cached)
    assert get_cache(cached).nbytes == 0
    calibrate(cached, batches)
    assert torch.equal(
        cached.transformer_blocks[2].ff.net[2].act_scale, plain.transformer_blocks[2].ff.net[2].act_scale
    )
    assert get_cache(cached).compute_steps == 0
    run(cached, 3)
    assert (get_cache(cached).compute_steps, get_cache(cached).reuse_steps) == (1, 2)


def test_a_compiled_model_is_unwrapped():
    model = apply(make_dit(), 3)
    run(model, 2)
    compiled = torch.compile(model, backend="eager")
    reset_all_caches(compiled)
    assert get_cache(model).compute_steps == 0
    remove_cache(compiled)
    assert get_cache(model) is None


def test_labels_made_anew_every_step_are_never_mixed_and_warned_about(caplog):
    model = make_dit()
    expected = run(model, 3)
    cache = apply_cache_to_dit(model, 3)
    with caplog.at_level(logging.WARNING, "qandc.cache"), torch.no_grad():
        for step, wanted in enumerate(expected):
            assert torch.equal(model(**inputs(step), class_labels=LABELS.clone()).sample, wanted)
    assert cache.reuse_steps == 0
    assert len(caplog.records) == 1
    assert "another tensor of labels or of the prompt" in caplog.text


def test_two_models_do_not_share_state():
    first, second = apply(make_dit(), 2), apply(make_dit(), 2)
    expected_first, expected_second = run(apply(make_dit(), 2), 4, seed=1), run(apply(make_dit(), 2), 4, seed=2)
    labels = [LABELS.clone(), LABELS.clone()]
    with torch.no_grad():
        for step in range(4):
            a = first(**inputs(step, 1), class_labels=labels[0]).sample
            b = second(**inputs(step, 2), class_labels=labels[1]).sample
            assert torch.equal(a, expected_first[step])
            assert torch.equal(b, expected_second[step])


def test_cached_features_do_not_alias_the_output():
    model = apply(make_dit(), 2)
    labels = LABELS.clone()
    with torch.no_grad():
        stores = stores_of_steps(model)
        model(**inputs(0), class_labels=labels).sample.zero_()
        stored = stores[0].values.clone()
        assert stored.any()
        model(**inputs(1), class_labels=labels).sample.zero_()
    assert stores[1] is stores[0]
    assert torch.equal(stores[0].values, stored)


def test_attaching_twice_is_refused():
    model = apply(make_dit(), 2)
    with pytest.raises(CacheError, match="remove_cache"):
        apply_cache_to_dit(model, 2)


def test_other_models_are_refused():
    with pytest.raises(CacheError, match=r"PixArtTransformer2DModel, .*; got Linear"):
        apply_cache_to_dit(nn.Linear(2, 2))


def test_replaced_forward_is_refused_before_and_after():
    model = make_dit()
    model.forward = lambda *arguments: None
    with pytest.raises(CacheError, match="replaced on the instance"):
        apply_cache_to_dit(model)
    del model.forward
    apply_cache_to_dit(model)
    model.transformer_blocks[1].forward = lambda *arguments: None
    with pytest.raises(CacheError, match="wrapped since"):
        remove_cache(model)


def test_removing_without_a_cache_is_refused_and_resetting_is_not():
    model = make_dit()
    with pytest.raises(CacheError, match="no cache is attached"):
        remove_cache(model)
    reset_all_caches(model)


def test_a_step_without_timestep_is_refused():
    model = apply(make_dit(), 2)
    with pytest.raises(CacheError, match="needs timestep"):
        model(torch.zeros(1, 4, 8, 8), class_labels=LABELS[:1])


def test_class_before_answers_for_the_mixin_that_was_attached_last():
    class First(nn.Module): ...

    class Second(nn.Module): ...

    module = nn.Linear(2, 2)
    assert class_before(module, First) is None
    module.__class__ = derived_class(First, nn.Linear)
    assert class_before(module, First) is nn.Linear
    once = type(module)
    module.__class__ = derived_class(Second, once)
    assert class_before(module, Second) is once
    assert class_before(module, First) is None
