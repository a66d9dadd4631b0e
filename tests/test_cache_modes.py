"""All cache modes against a slow model that works by definition: schedules, forecasts, storage, fusion, two at once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing

from qandc import (
    CacheConfig,
    CacheError,
    ConfigError,
    ModelError,
    apply_cache_to_dit,
    calibrate_schedule,
    fuse_dit,
    get_cache,
    make_scheduler,
    quantize_model,
    remove_cache,
    reset_all_caches,
    sample_latents,
    unfuse_dit,
)
from qandc.caching.plan import Action
from qandc.fusion.fuse import Fused
from qandc.method.schedule_calibration import feature_moments
from qandc.models.dit.fused import FusedBlock
from qandc.support.attach import original_class
from tests import definition
from tests.conftest import make_dit
from tests.definition import CONFIGS, LENGTH, UNEVEN, assert_equal_runs, make_labels
from tests.definition import inputs_of_dit as inputs
from tests.definition import run_dit as run
from tests.test_cache import stores_of_steps
from tests.test_fused_dit import make_quantized, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
STEPS = LENGTH
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
all_modes = pytest.mark.parametrize("mode", ["delta", "branch", "taylor", "crf"])


@pytest.fixture(autouse=True)
def _nothing_compiled_stays():
    """Dynamo remembers frames that it gave up, for later tests too."""
    yield
    torch._dynamo.reset()


def by_definition(model, config, steps=STEPS, seed=0, rows=4):
    labels = make_labels(rows)
    inputs_of_run = [{**inputs(step, seed, rows), "class_labels": labels} for step in range(steps)]
    return definition.by_definition(model, config, inputs_of_run)


@all_modes
def test_interval_one_equals_no_cache_bit_for_bit(mode):
    model = make_dit()
    expected = run(model, 4)
    cache = apply_cache_to_dit(model, config=CacheConfig(mode, interval=1))
    for actual, wanted in zip(run(model, 4), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert cache.nbytes == 0


@all_modes
def test_detached_it_is_what_it_was(mode):
    model, config = make_dit(), CONFIGS[mode]
    expected = run(model, 3)
    classes, keys = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    apply_cache_to_dit(model, config=config)
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    run(model)
    remove_cache(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == keys
    for actual, wanted in zip(run(model, 3), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("mode", ["branch", "taylor"])
def test_an_exception_leaves_a_clean_cache(mode):
    config = CacheConfig(mode, interval=3)
    model = make_dit()
    expected = by_definition(model, config, seed=5)
    apply_cache_to_dit(model, config=config)
    labels = make_labels()
    broken = next(step for step in range(3, STEPS) if config.computes(step))
    run(model, broken, labels=labels)
    handle = model.transformer_blocks[1].ff.net[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs(broken), class_labels=labels)
    handle.remove()
    assert_equal_runs(run(model, seed=5, labels=labels), expected)


@all_modes
def test_interleaved_runs_do_not_share_state(mode):
    config = CacheConfig(mode, interval=3)
    model = make_dit()
    expected = [by_definition(model, config, seed=seed, rows=rows) for seed, rows in ((1, 4), (2, 4))]
    cache = apply_cache_to_dit(model, config=config)
    labels = [make_labels(), make_labels()]
    found = [[], []]
    with torch.no_grad():
        for step in range(STEPS):
            for which in (0, 1):
                y = model(**inputs(step, which + 1), class_labels=labels[which]).sample
                found[which].append(y)
    for actual, wanted in zip(found, expected, strict=True):
        assert_equal_runs(actual, wanted)
    one = 4 * 16 * 32 * 4 * {"delta": 1, "crf": 2, "branch": 6, "taylor": 12}[mode]
    assert cache.nbytes == 2 * one
    model(**inputs(STEPS, 2), class_labels=labels[1])
    model(**inputs(STEPS + 1, 2), class_labels=labels[1])  # the run used last goes on
    assert cache.reuse_steps + cache.compute_steps == 2 * STEPS + 2
    del labels
    run(
        model
    )  # both runs are over: the memory of one serves the new one, that of the other one that takes turns with it
    assert cache.nbytes == 2 * one
    run(model)  # none did
    assert cache.nbytes == one


def test_rows_never_mix():
    config = CacheConfig("taylor", interval=3)
    model = make_dit()
    apply_cache_to_dit(model, config=config)
    together = run(model)
    for row in range(4):
        alone = make_dit()
        apply_cache_to_dit(alone, config=config)
        labels = make_labels()[row : row + 1].clone()
        for step in range(STEPS):
            one = {name: value[row : row + 1] for name, value in inputs(step).items()}
            with torch.no_grad():
                y = alone(**one, class_labels=labels).sample
            torch.testing.assert_close(together[step][row : row + 1], y, atol=2e-5, rtol=1e-4)


@all_modes
@pytest.mark.parametrize(("storage_dtype", "bound"), [("float32", 1e-6), ("bfloat16", 8e-3), ("int8", 2e-2)])
def test_storage(mode, storage_dtype, bound):
    config = CacheConfig(mode, interval=3, storage_dtype=storage_dtype)
    model = make_dit()
    expected = by_definition(model, config)
    cache = apply_cache_to_dit(model, config=config)
    found = run(model)
    # a forecast magnifies the rounding of what it is made from
    assert max(relative_error(a, e) for a, e in zip(found, expected, strict=True)) <= bound * (
        4 if mode in ("taylor", "crf") else 1
    )
    per_token = {"float32": 128, "bfloat16": 64, "int8": 36}[storage_dtype]
    assert cache.nbytes == 4 * 16 * per_token * {"delta": 1, "crf": 2, "branch": 6, "taylor": 12}[mode]


def test_memory_is_made_once():
    model = make_dit()
    cache = apply_cache_to_dit(model, config=CacheConfig("branch", interval=2))
    labels, stores = make_labels(), stores_of_steps(model)
    run(model, 2, labels=labels)
    serial = stores[0].serial
    run(model, 6, labels=labels)
    del labels
    run(model, 3)  # the next run takes over its memory, and with it what was captured for it
    assert all(store is stores[0] for store in stores)
    assert stores[0].serial == serial
    assert cache.nbytes == 6 * 4 * 16 * 32 * 4
    reset_all_caches(model)
    assert cache.nbytes == 0


def test_a_step_too_many_is_refused():
    model = make_dit()
    apply_cache_to_dit(model, config=CacheConfig("branch", schedule=(True, False)))
    with pytest.raises(CacheError, match="schedule has 2 steps, and this is one more"):
        run(model, 3)
    run(model, 2)


def test_the_loop_refuses_a_schedule_of_another_length():
    model = make_dit()
    apply_cache_to_dit(model, config=CacheConfig(schedule=(True, False, False)))
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    with pytest.raises(ConfigError, match="schedule has 3 steps and the run 4"):
        sample_latents(model, scheduler, [1], num_inference_steps=4, seeds=[0])
    sample_latents(model, scheduler, [1], num_inference_steps=3, seeds=[0])


def vanilla_pipeline(pipeline_dir, **config):
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline.from_pretrained(pipeline_dir)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("mode", ["delta", "branch"])
def test_a_run_of_another_length_is_refused_in_the_vanilla_pipeline(pipeline_dir, mode, spacing):
    """The model sees timesteps alone: leading ones differ in the first step, trailing ones in the second."""
    pipe = vanilla_pipeline(pipeline_dir, timestep_spacing=spacing)
    found = calibrate_schedule(
        pipe.transformer, pipe.scheduler, [1], mode=mode, computed_steps=3, num_inference_steps=8
    )
    cache = apply_cache_to_dit(pipe.transformer, config=found.config())
    call = {"class_labels": [1], "output_type": "np"}
    step, ours = (1, 875) if spacing == "leading" else (2, 874)
    theirs = {5: {1: 800, 2: 799}, 9: {1: 888, 2: 888}}
    for steps in (5, 9):
        with pytest.raises(
            CacheError, match=rf"of 8 steps, with step {step} at timestep {ours}.*at {theirs[steps][step]}"
        ):
            pipe(**call, num_inference_steps=steps)
        with pytest.raises(ConfigError, match=f"schedule has 8 steps and the run {steps}"):
            sample_latents(pipe.transformer, pipe.scheduler, [1], num_inference_steps=steps, seeds=[0])
    reset_all_caches(pipe.transformer)
    for _ in range(2):  # its own length, again and again
        pipe(**call, num_inference_steps=8)
        sample_latents(pipe.transformer, pipe.scheduler, [1], num_inference_steps=8, seeds=[0])
    assert (cache.compute_steps, cache.reuse_steps) == (12, 20)


def test_a_run_of_another_scheduler_is_refused(pipeline_dir):
    pipe = vanilla_pipeline(pipeline_dir)
    found = calibrate_schedule(pipe.transformer, pipe.scheduler, [1], computed_steps=3, num_inference_steps=8)
    other = vanilla_pipeline(pipeline_dir, steps_offset=1)
    apply_cache_to_dit(other.transformer, config=found.config())
    with pytest.raises(CacheError, match="at timestep 875; this run has it at 876"):
        other(class_labels=[1], num_inference_steps=8)
    with pytest.raises(ConfigError, match="at timestep 875; this one has it at 876"):
        sample_latents(other.transformer, other.scheduler, [1], num_inference_steps=8, seeds=[0])


def test_runs_that_share_a_labels_tensor_each_begin_at_the_first_timestep():
    model = make_dit()
    timesteps = [900 - 20 * step for step in range(STEPS)]
    cache = apply_cache_to_dit(model, config=CacheConfig("branch", schedule=UNEVEN, timesteps=timesteps))
    labels = make_labels()
    first, second = run(model, labels=labels), run(model, labels=labels)
    assert_equal_runs(second, first, atol=0)
    assert cache.compute_steps == 2 * sum(UNEVEN)
    with pytest.raises(CacheError, match="step 1 at timestep 900; this run has it at 890"):
        model(**{**inputs(0), "timestep": torch.tensor([890])}, class_labels=labels)


def test_a_shorter_run_is_warned_about_where_no_timesteps_tell(pipeline_dir, caplog):
    pipe = vanilla_pipeline(pipeline_dir)
    config = CacheConfig(interval=2, num_inference_steps=8, last_step_computed=True)
    apply_cache_to_dit(pipe.transformer, config=config)
    for steps in (8, 8, 5, 5, 5):
        assert not caplog.records or steps == 5
        pipe(class_labels=[1], num_inference_steps=steps, output_type="np")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("qandc")] == [
        "the feature cache has a schedule of 8 steps, but a run ended after 5; unless it was interrupted, give a "
        "schedule for 5 steps, or an interval"
    ]


class OnTheWay(torch.Tensor):
    """A timestep that says that it is on a GPU; what is copied from it arrives when the test wants it."""

    is_cuda = True


@pytest.fixture
def arrivals(monkeypatch):
    """Copies from a GPU that does not exist; set ``here`` to have them arrive."""
    state = {"here": False, "capturing": False}

    class Event:
        def query(self):
            return state["here"]

    class Stream:
        def record_event(self):
            return Event()

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kwargs: empty(*shape, **kwargs))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return state


def steps_of_a_gpu(cache, model, timesteps, labels):
    x = torch.zeros(1, 4, 8, 8)
    for timestep in timesteps:
        with cache.step(x, torch.tensor([timestep]).as_subclass(OnTheWay), labels) as plan:
            yield plan.action


def test_timesteps_that_arrive_later_from_a_gpu_are_compared_then(arrivals):
    model = make_dit(num_layers=1)
    config = CacheConfig("branch", schedule=(True, False, True), timesteps=(600, 300, 0))
    cache = apply_cache_to_dit(model, config=config)
    kinds = list(steps_of_a_gpu(cache, model, (600, 300, 0), torch.tensor([1])))
    assert kinds == [Action.STORE, Action.REUSE, Action.COMPUTE]
    arrivals["here"] = True
    labels = torch.tensor([1])
    late = steps_of_a_gpu(cache, model, (600, 200, 0), labels)
    assert [next(late), next(late)] == [Action.STORE, Action.REUSE]
    with pytest.raises(CacheError, match="of 3 steps, with step 2 at timestep 300; this run has it at 200"):
        next(late)
    assert list(steps_of_a_gpu(cache, model, (600, 300, 0), labels)) == kinds  # nothing is left of it


@pytest.mark.parametrize(
    "timesteps", [(600.0, 600.0, 300.0), (600, 300, 600, 300)], ids=["after one step", "after two"]
)
def test_a_run_that_begins_anew_within_one_is_an_error_when_its_timesteps_arrive(arrivals, timesteps):
    model = make_dit(num_layers=1)
    cache = apply_cache_to_dit(model, config=CacheConfig("branch", interval=4))
    arrivals["here"] = True
    late = steps_of_a_gpu(cache, model, timesteps, torch.tensor([1]))
    for _ in timesteps[1:]:
        next(late)
    with pytest.raises(CacheError, match="timesteps began anew within one run"):
        next(late)
    assert len(list(steps_of_a_gpu(cache, model, (999, 999, 998), torch.tensor([1])))) == 3  # rounded by a scheduler


@pytest.mark.parametrize("expected", [(0.75, 0.5, 0.25), (999.5, 999.25, 999)])
def test_fractions_of_timesteps_are_compared(expected):
    model = make_dit(num_layers=1)
    cache = apply_cache_to_dit(model, config=CacheConfig(schedule=(True, False, True), timesteps=expected))
    x, labels = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    for timestep in expected:
        with cache.step(x, torch.tensor([timestep]), labels):
            pass
    off = torch.tensor([expected[1]])
    with pytest.raises(CacheError, match=rf"at timestep {expected[0]}; this run has it at {expected[1]}"):
        cache.step(x, off, torch.tensor([1])).__enter__()


def test_timesteps_in_the_precision_of_the_model_are_those_of_the_schedule():
    """981 is 980 in bfloat16, 0.7 is 0.69922."""
    model = make_dit(num_layers=1)
    cache = apply_cache_to_dit(model, config=CacheConfig(schedule=(True, False, True), timesteps=(981, 0.7, 0.25)))
    x, labels = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    for timestep in (981, 0.7, 0.25):
        with cache.step(x, torch.tensor([timestep], dtype=torch.bfloat16), labels):
            pass
    assert (cache.compute_steps, cache.reuse_steps) == (2, 1)


def test_the_next_run_tells_what_came_after_the_last_step(arrivals):
    model = make_dit(num_layers=1)
    cache = apply_cache_to_dit(model, config=CacheConfig(schedule=(True, False, True), timesteps=(600, 300, 0)))
    assert len(list(steps_of_a_gpu(cache, model, (500, 0), torch.tensor([1])))) == 2
    arrivals["here"] = True
    labels = torch.tensor([1])
    with pytest.raises(CacheError, match="step 1 at timestep 600; this run has it at 500"):
        next(steps_of_a_gpu(cache, model, (600,), labels))
    assert len(list(steps_of_a_gpu(cache, model, (600, 300, 0), labels))) == 3


def test_steps_of_a_captured_graph_are_counted_and_not_compared(arrivals):
    model = make_dit(num_layers=1)
    cache = apply_cache_to_dit(model, config=CacheConfig(schedule=(True, False, True), timesteps=(600, 300, 0)))
    arrivals.update(here=True, capturing=True)
    labels = torch.tensor([1])
    first = steps_of_a_gpu(cache, model, (9, 300, 0), labels)
    next(first)
    arrivals["capturing"] = False
    assert len(list(first)) == 2


def test_interval_and_config_together_are_refused():
    with pytest.raises(ConfigError, match="not both"):
        apply_cache_to_dit(make_dit(), 3, config=CacheConfig())


def test_blocks_of_another_kind_are_refused():
    model = make_dit()
    model.transformer_blocks[0].norm_type = "layer_norm"
    with pytest.raises(CacheError, match="mode 'branch' needs DiT's blocks"):
        apply_cache_to_dit(model, config=CacheConfig("branch"))
    assert get_cache(model) is None


@pytest.mark.slow
@all_configs
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_blocks(config, compiler):
    """Compiled in place before the cache is attached, or after; one graph for all blocks, without breaks."""
    model = make_dit()
    expected = by_definition(model, config)
    for attach_first in (True, False):
        compiled = make_dit()
        if attach_first:
            apply_cache_to_dit(compiled, config=config)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
        for block in compiled.transformer_blocks:
            block.compile(backend=counter, fullgraph=True, dynamic=False)
        if not attach_first:
            apply_cache_to_dit(compiled, config=config)
        assert_equal_runs(run(compiled), expected)
        # with and without features kept, for strides of the first block and of the others: not one for each block
        assert counter.frame_count <= 4


@pytest.mark.slow
def test_compiled_blocks_notice_another_cache():
    model = make_dit()
    expected = {mode: by_definition(model, CacheConfig(mode, interval=3)) for mode in ("delta", "branch", "taylor")}
    plain = run(model)
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    for mode in ("delta", "branch", "taylor", "delta"):
        apply_cache_to_dit(model, config=CacheConfig(mode, interval=3))
        assert_equal_runs(run(model), expected[mode])
        remove_cache(model)
        assert_equal_runs(run(model), plain)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["delta", "taylor"])
def test_a_compiled_transformer(mode):
    """torch.compile around a model that has a cache: right, whatever of it is compiled."""
    config = CacheConfig(mode, interval=3)
    model = make_dit()
    expected = by_definition(model, config)
    apply_cache_to_dit(model, config=config)
    torch._dynamo.reset()
    assert_equal_runs(run(torch.compile(model, backend="eager")), expected)


def test_what_is_compiled_elsewhere_is_refused():
    model = make_dit()
    model.transformer_blocks[1] = torch.compile(model.transformer_blocks[1], backend="eager")
    with pytest.raises(CacheError, match=r"block\.compile\(\)"):
        apply_cache_to_dit(model)
    model = make_dit()
    model.compile(backend="eager")
    with pytest.raises(CacheError, match="compile its blocks instead"):
        apply_cache_to_dit(model)


def test_a_reuse_step_that_runs_twice_gives_the_same():
    """A step that becomes a CUDA graph runs before it is captured."""
    model, labels = make_dit(), make_labels()
    cache = apply_cache_to_dit(model, config=CacheConfig("branch", interval=3))
    expected = run(model, labels=labels)[:2]
    reset_all_caches(model)
    for step in range(2):
        given = {**inputs(step), "class_labels": labels}
        with torch.no_grad(), cache.step(given["hidden_states"], given["timestep"], labels):
            for _ in range(2):
                assert torch.equal(original_class(model).forward(model, **given).sample, expected[step])


@all_modes
def test_copies_and_pickles_have_an_empty_cache_of_their_own(mode):
    model, config = make_dit(), CONFIGS[mode]
    apply_cache_to_dit(model, config=config)
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert get_cache(other) is not get_cache(model)
        assert get_cache(other).config == config
        assert get_cache(other).nbytes == 0
        assert_equal_runs(run(other), expected, atol=0)
        remove_cache(other)
        assert type(other) is type(make_dit())
    assert_equal_runs(run(model), expected, atol=0)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "mode", ["delta", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("branch", "taylor"))]
)
def test_in_the_vanilla_pipeline(pipeline_dir, scheduler, guidance_scale, mode):
    from diffusers import DiTPipeline

    def draw(pipe, steps):
        torch.manual_seed(5)
        pipe.set_progress_bar_config(disable=True)
        call = {"class_labels": [1, 7], "num_inference_steps": steps, "guidance_scale": guidance_scale}
        return pipe(**call, output_type="np").images

    def load():
        pipe = DiTPipeline.from_pretrained(pipeline_dir)
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
        return pipe

    pipe = load()
    plain = draw(pipe, 7)
    cache = apply_cache_to_dit(pipe.transformer, config=CacheConfig(mode, interval=3))
    seven, six = draw(pipe, 7), draw(pipe, 6)
    computed = sum(cache.config.of_steps(7)) + sum(cache.config.of_steps(6))
    assert (cache.compute_steps, cache.reuse_steps) == (computed, 13 - computed)
    assert not (seven == plain).all()
    fresh = load()
    apply_cache_to_dit(fresh.transformer, config=CacheConfig(mode, interval=3))
    assert (draw(fresh, 6) == six).all()
    assert (draw(pipe, 7) == seven).all()
    remove_cache(pipe.transformer)
    assert (draw(pipe, 7) == plain).all()


def test_offloaded_by_accelerate(pipeline_dir):
    """What enable_model_cpu_offload does, with a hook on the transformer that goes on after the cache."""
    from accelerate import hooks as accelerate_hooks

    config = CacheConfig("branch", interval=3)
    model = make_dit()
    expected = by_definition(model, config)
    apply_cache_to_dit(model, config=config)
    accelerate_hooks.add_hook_to_module(model, accelerate_hooks.CpuOffload(execution_device="cpu"))
    assert_equal_runs(run(model), expected)
    with pytest.raises(CacheError, match="undo that first"):
        remove_cache(model)
    accelerate_hooks.remove_hook_from_module(model)
    remove_cache(model)
    accelerate_hooks.add_hook_to_module(model, accelerate_hooks.CpuOffload(execution_device="cpu"))
    with pytest.raises(CacheError, match="attach the cache before"):
        apply_cache_to_dit(model)


# ---- calibrated schedules


@pytest.mark.parametrize(("mode", "order"), [("delta", 1), ("branch", 1), ("taylor", 1), ("taylor", 2)])
def test_calibrated_schedule(mode, order):
    model = quantize_model(make_dit(num_layers=2))
    before = [set(m._forward_hooks) | set(m._forward_pre_hooks) for m in model.modules()]
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    arguments = {"mode": mode, "order": order, "computed_steps": 5, "num_inference_steps": 10}
    found = calibrate_schedule(model, scheduler, [1, 2], **arguments)
    assert sum(found.schedule) == 5
    assert len(found.timesteps) == len(found.schedule) == 10
    assert found.error <= found.uniform_error + 1e-9
    assert (found.mode, found.order) == (mode, order if mode == "taylor" else 0)
    assert found == calibrate_schedule(model, scheduler, [1, 2], **arguments)
    assert before == [set(m._forward_hooks) | set(m._forward_pre_hooks) for m in model.modules()]
    apply_cache_to_dit(model, config=found.config())
    sample_latents(model, scheduler, [1, 2], num_inference_steps=10, seeds=[0, 1])
    assert (get_cache(model).compute_steps, get_cache(model).reuse_steps) == (5, 5)
    # with the cache attached every step is computed meanwhile
    assert found == calibrate_schedule(model, scheduler, [1, 2], **arguments)


def record_products(model, mode):
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    run = {"num_inference_steps": 4, "seeds": [0, 1]}
    return feature_moments(model, lambda: sample_latents(model, scheduler, [3, 4], **run), mode)[0].products


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["delta", "branch"])
def test_features_of_compiled_blocks_that_have_run(mode):
    expected = record_products(make_dit(num_layers=2), mode)
    model = make_dit(num_layers=2)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    for compiled in (model, torch.compile(make_dit(num_layers=2), backend="eager")):
        sample_latents(compiled, scheduler, [3, 4], num_inference_steps=4, seeds=[0, 1])
        assert record_products(compiled, mode) == pytest.approx(expected, rel=1e-3)


def heun():
    from diffusers import HeunDiscreteScheduler

    return HeunDiscreteScheduler(num_train_timesteps=1000)


@pytest.mark.parametrize(("mode", "order"), [("delta", 1), ("branch", 1), ("taylor", 1), ("taylor", 2)])
def test_a_scheduler_that_calls_the_model_twice_a_step(mode, order):
    """Steps of a schedule are calls of the model: 11 in 6 inference steps."""
    model = make_dit(num_layers=2)
    run = {"num_inference_steps": 6}
    found = calibrate_schedule(model, heun(), [1, 2], mode=mode, order=order, computed_steps=5, **run)
    assert len(found.schedule) == len(found.timesteps) == 11
    assert sum(found.schedule) == 5
    assert 0 < found.error <= found.uniform_error
    with pytest.raises(ConfigError, match=r"computed_steps is 12; .* can compute . to 11"):
        calibrate_schedule(model, heun(), [1, 2], mode=mode, order=order, computed_steps=12, **run)
    cache = apply_cache_to_dit(model, config=found.config())
    for _ in range(2):
        sample_latents(model, heun(), [1], seeds=[0], **run)
    assert (cache.compute_steps, cache.reuse_steps) == (10, 12)
    with pytest.raises(ConfigError, match="schedule has 11 steps and the run 13"):
        sample_latents(model, heun(), [1], seeds=[0], num_inference_steps=7)
    remove_cache(model)
    apply_cache_to_dit(model, config=CacheConfig(interval=2, num_inference_steps=6))
    with pytest.raises(ConfigError, match=r"schedule has 6 steps and the run 11; .*one entry for each call"):
        sample_latents(model, heun(), [1], seeds=[0], **run)


def test_a_calibrated_schedule_is_no_worse_than_an_even_one(monkeypatch):
    """Of order 2 not all schedules are tried; here none is but a bad one."""
    bad = (True, True, True, True, False, False, False, False)
    monkeypatch.setattr(
        "qandc.method.schedule_calibration.optimal_schedule", lambda errors, steps, computed, **order: bad
    )
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    arguments = {"mode": "taylor", "order": 2, "computed_steps": 4, "num_inference_steps": 8}
    found = calibrate_schedule(make_dit(num_layers=2), scheduler, [1], **arguments)
    assert found.schedule != bad
    assert sum(found.schedule) == 4
    assert found.error == found.uniform_error


def test_schedules_that_cannot_be_calibrated():
    model = make_dit()
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    with pytest.raises(ConfigError, match=r"computed_steps is 1; .* can compute 2 to 10"):
        calibrate_schedule(model, scheduler, [1], mode="taylor", computed_steps=1, num_inference_steps=10)
    from diffusers import DDIMInverseScheduler

    with pytest.raises(ConfigError, match="timesteps rise from 0 to 100"):
        calibrate_schedule(model, DDIMInverseScheduler(steps_offset=0), [1], computed_steps=1, num_inference_steps=10)
    with pytest.raises(ConfigError, match="mode 'x' is unknown"):
        calibrate_schedule(model, scheduler, [1], mode="x", computed_steps=1, num_inference_steps=10)
    with pytest.raises(ModelError, match="before fuse"):
        calibrate_schedule(fuse_dit(make_quantized()), scheduler, [1], computed_steps=5, num_inference_steps=10)


# ---- on fused kernels


BOUND = 3e-2  # of a whole forward in float32: roundings that differ, magnified by forecasts


@pytest.mark.parametrize("name", ["delta", "branch uneven", "taylor 2 uneven"])
def test_fused_and_smoothed_equals_the_definition(fused_anywhere, monkeypatch, name):
    model, config = make_quantized(smoothing=True), CONFIGS[name]
    expected = by_definition(model, config)
    calls = []
    original = FusedBlock.__call__
    monkeypatch.setattr(FusedBlock, "__call__", lambda self, *a: calls.append(0) or original(self, *a))
    fuse_dit(model)
    apply_cache_to_dit(model, config=config)
    for actual, wanted in zip(run(model), expected, strict=True):
        assert relative_error(actual, wanted) <= BOUND
    assert len(calls) == len(model.transformer_blocks) * sum(config.of_steps(STEPS))


@all_modes
def test_fused_with_conditioning_ahead(fused_anywhere, monkeypatch, mode):
    """sample_latents prepares the run of a fused model; reuse steps look their gates up there."""
    from qandc.models.dit.conditioning import Conditioning

    config = CacheConfig(mode, interval=3)
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000})
    arguments = {"num_inference_steps": 8, "guidance_scale": 2.0, "seeds": [0, 1]}
    model = make_quantized()
    apply_cache_to_dit(model, config=config)
    expected = sample_latents(model, scheduler, [1, 2], **arguments)
    fuse_dit(model)
    assert get_cache(model).config == config
    for name in ("of_step", "of_reuse"):
        monkeypatch.setattr(Conditioning, name, lambda *_: pytest.fail("conditioning was computed again"))
    assert relative_error(sample_latents(model, scheduler, [1, 2], **arguments), expected) <= BOUND
    assert get_cache(model).reuse_steps > 0


@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("mode", ["delta", "branch"])
def test_fused_storage(fused_anywhere, mode, storage_dtype):
    config = CacheConfig(mode, interval=3, storage_dtype=storage_dtype)
    model = make_quantized()
    expected = by_definition(model, config)
    apply_cache_to_dit(fuse_dit(model), config=config)
    for actual, wanted in zip(run(model), expected, strict=True):
        assert relative_error(actual, wanted) <= 2 * BOUND


@pytest.mark.parametrize("first", ["cache", "fusion"])
def test_cache_and_fusion_in_any_order(fused_anywhere, first):
    config = CacheConfig("branch", interval=3)
    model = make_quantized()
    classes = [type(m) for m in model.modules()]
    expected = run(model, 3)
    if first == "cache":
        apply_cache_to_dit(model, config=config)
        fuse_dit(model)
    else:
        fuse_dit(model)
        apply_cache_to_dit(model, config=config)
    cached = run(model)
    copied = copy.deepcopy(model)
    assert_equal_runs(run(copied), cached, atol=0)
    if first == "cache":
        unfuse_dit(model)
        assert get_cache(model).config == config
        assert all(relative_error(a, e) <= BOUND for a, e in zip(run(model), cached, strict=True))
        remove_cache(model)
    else:
        remove_cache(model)
        assert Fused.of(model) is not None
        unfuse_dit(model)
    assert [type(m) for m in model.modules()] == classes
    for actual, wanted in zip(run(model, 3), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_model_that_is_fused_in_part_runs_unfused_with_a_cache(fused_anywhere, caplog):
    model = make_quantized()
    model.transformer_blocks[1].ff.register_forward_hook(lambda *_: None)
    config = CacheConfig("branch", interval=3)
    expected = by_definition(model, config)
    apply_cache_to_dit(fuse_dit(model), config=config)
    assert_equal_runs(run(model), expected)
    assert "with a feature cache all of it must be fusable" in caplog.text


def test_on_a_cpu_the_fused_model_is_cached_as_well():
    config = CacheConfig("taylor", interval=3)
    model = make_quantized()
    expected = by_definition(model, config)
    apply_cache_to_dit(fuse_dit(model), config=config)
    assert_equal_runs(run(model), expected)


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("w_bits", [8, 4])
def test_graphs_of_compute_and_reuse_steps(config, w_bits):
    """Two runs of two batch sizes in a row, replayed from graphs, equal the same steps launched one by one."""
    model = make_quantized(torch.bfloat16, "cuda", w_bits, heads=6, head_dim=32)
    plain = copy.deepcopy(model)
    graphed, launched = fuse_dit(copy.deepcopy(model)), fuse_dit(model, cuda_graphs=False)
    unfused = plain
    for m in (graphed, launched, unfused):
        apply_cache_to_dit(m, config=config)
    for rows, seed in ((4, 1), (2, 2), (4, 3)):
        where = {"rows": rows, "seed": seed, "device": "cuda", "dtype": torch.bfloat16}
        expected, slow = run(launched, **where), run(unfused, **where)
        for actual, wanted, other in zip(run(graphed, **where), expected, slow, strict=True):
            assert relative_error(actual, wanted) <= 1e-2
            assert relative_error(actual, other) <= 1e-1
    graphs = Fused.of(graphed).graphs
    assert graphs.replays == 30
    assert len(graphs) <= 8
    assert get_cache(graphed).compute_steps == 3 * sum(config.of_steps(STEPS))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("fused", [False, True])
@all_modes
def test_no_step_waits_for_the_gpu(mode, fused):
    model = make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32)
    if fused:
        fuse_dit(model)
    apply_cache_to_dit(model, config=CacheConfig(mode, interval=3))
    where = {"device": "cuda", "dtype": torch.bfloat16}
    run(model, **where)  # captures
    labels = make_labels(device="cuda")
    steps = [inputs(step, **where) for step in range(STEPS)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for step in steps:
                model(**step, class_labels=labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_timesteps_that_rise_on_a_gpu_are_an_error():
    model = make_dit().cuda()
    apply_cache_to_dit(model, 3)
    labels = make_labels(device="cuda")

    def repeated():
        for _ in range(3):
            run(model, 2, device="cuda", labels=labels)
            torch.cuda.synchronize()

    with pytest.raises(CacheError, match="timesteps began anew within one run"):
        repeated()
    run(model, 4, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_of_another_length_is_an_error_on_a_gpu(fused):
    """A step or more later, or when the next run begins; never waited for."""
    model = make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32)
    if fused:
        fuse_dit(model)
    timesteps = [900 - 25 * step for step in range(STEPS)]
    apply_cache_to_dit(model, config=CacheConfig("branch", schedule=UNEVEN, timesteps=timesteps))

    def repeated():
        for _ in range(2):
            run(model, 5, device="cuda", dtype=torch.bfloat16)
            torch.cuda.synchronize()

    with pytest.raises(CacheError, match="of 10 steps, with step 2 at timestep 875; this run has it at 880"):
        repeated()


@pytest.mark.gpu
def test_compiled_blocks_on_a_gpu():
    config = CacheConfig("branch", interval=3)
    model = make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32)
    plain = copy.deepcopy(model)
    for m in (plain, model):
        apply_cache_to_dit(m, config=config)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)
    where = {"device": "cuda", "dtype": torch.bfloat16}
    for actual, wanted in zip(run(model, **where), run(plain, **where), strict=True):
        assert relative_error(actual, wanted) <= 1e-1
