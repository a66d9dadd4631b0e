"""sample_latents(cuda_graph=True): the images of the loop, from one CUDA graph of all its steps."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch

from qandc import (
    CacheConfig,
    Compensation,
    ConfigError,
    FeatureCompensation,
    apply_cache_to_dit,
    compensated_scheduler,
    fuse_dit,
    make_scheduler,
    remove_cache,
    reset_all_caches,
    sample_latents,
)
from qandc.fusion.fuse import Fused
from qandc.fusion.run_graph import why_no_run_graph
from qandc.sampling.loop import describe_run
from qandc.support.attach import paused
from qandc.variance_compensation import FittedFor
from qandc_kernels import Backend
from tests.test_fused_dit import make_quantized

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
STEPS, GUIDANCE = 7, 2.0
CONFIGS = {
    "no cache": None,
    "delta": CacheConfig("delta", interval=3),
    "branch": CacheConfig("branch", interval=3),
    "taylor int8": CacheConfig("taylor", interval=3, storage_dtype="int8"),
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def scheduler(name="ddim", alphas=1.0, last=1.0, **config):
    made = make_scheduler(name, {"num_train_timesteps": 1000, "clip_sample": False, **config})
    made.alphas_cumprod *= alphas
    made.final_alpha_cumprod = torch.tensor(last)
    return made


def draw(model, labels=(3, 4), seeds=(0, 1), steps=STEPS, guidance_scale=GUIDANCE, of=None, **more):
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "seeds": seeds, **more}
    return sample_latents(model, of or scheduler(), labels, **call)


def compensation(model, gain):
    prepared = scheduler()
    prepared.set_timesteps(STEPS)
    gains = torch.full((STEPS, 4), gain)
    fitted_for = FittedFor(**describe_run(model, prepared, GUIDANCE))
    return Compensation(gains, 0 * gains, "sample", "least_squares", fitted_for)


def feature_compensation(name, seed=0, width=32, layers=3):
    config, prepared = CONFIGS[name], scheduler()
    prepared.set_timesteps(STEPS)
    schedule = config.of_steps(STEPS)
    shape = (2, STEPS - sum(schedule), layers, 2, width)
    gains, offsets = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).unbind(0)
    exact = CacheConfig(
        config.mode, schedule=schedule, storage_dtype=config.storage_dtype, timesteps=tuple(prepared.timesteps.tolist())
    )
    return FeatureCompensation(exact, 1 + gains / 10, offsets / 10)


class AsIfReplayed:
    """A graph cache without graphs: a replay gives what was captured, or, on new inputs, does that over again."""

    def __init__(self):
        self.captured = {}

    def run(self, function, inputs, kind, otherwise):
        key, how = (kind, *(t.shape for t in inputs)), "replayed"
        if key not in self.captured:
            static = tuple(t.clone() for t in inputs)
            for _ in range(2):
                function(*static)
            self.captured[key], how = (function, static, {}), "captured"
        function, static, outputs = self.captured[key]
        values = tuple(t.numpy().tobytes() for t in inputs)
        if values not in outputs:
            for t, given in zip(static, inputs, strict=True):
                t.copy_(given)
            outputs[values] = function(*static)
        return outputs[values].clone(), how

    def clear(self):
        self.captured.clear()


@pytest.fixture
def as_if_replayed(fused_anywhere, monkeypatch):
    """A fused model on the CPU whose runs go through :class:`AsIfReplayed`."""
    monkeypatch.setattr("qandc.sampling.loop.select_backend", lambda device: Backend("triton", "as if"))
    monkeypatch.setattr("qandc.sampling.loop.why_no_run_graph", lambda transformer, device: None)
    model = fuse_dit(make_quantized())
    Fused.of(model).run_graphs = AsIfReplayed()
    return model


@pytest.mark.slow
@all_configs
def test_a_replay_depends_on_nothing_but_its_inputs(as_if_replayed, config):
    model, graphs = as_if_replayed, Fused.of(as_if_replayed).run_graphs
    if config is not None:
        apply_cache_to_dit(model, config=config)
    for labels, seeds in (((3, 4), (0, 1)), ((5, 3), (7, 8)), ((3, 4), (0, 1)), ((9,), (2,))):
        assert torch.equal(draw(model, labels, seeds, cuda_graph=True), draw(model, labels, seeds))
    assert len(graphs.captured) == 2


def test_gains_that_were_written_to_are_others(as_if_replayed):
    given = compensation(as_if_replayed, 0.9)
    draw(as_if_replayed, cuda_graph=True, compensation=given)
    draw(as_if_replayed, cuda_graph=True, compensation=copy.deepcopy(given))
    graphs = Fused.of(as_if_replayed).run_graphs
    assert len(graphs.captured) == 1
    given.gain.mul_(0.9)
    call = {"compensation": given}
    assert torch.equal(draw(as_if_replayed, cuda_graph=True, **call), draw(as_if_replayed, **call))
    assert len(graphs.captured) == 2


def test_what_would_run_once_and_never_again_is_no_graph(fused_anywhere):
    model, device = fuse_dit(make_quantized()), torch.device("cpu")
    assert "CUDA graphs are off" in why_no_run_graph(model, device)  # the last of the reasons, on a CPU
    for register in (
        model.register_forward_hook,
        model.register_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *args: None)
        assert "hooks" in why_no_run_graph(model, device)
        handle.remove()
    model.forward = lambda *args, **kwargs: None
    assert "forward of its own" in why_no_run_graph(model, device)
    del model.forward
    apply_cache_to_dit(model, config=CONFIGS["branch"])
    with paused(model):
        assert "paused" in why_no_run_graph(model, device)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_no_run_graph(model, device)
    assert "training" in why_no_run_graph(model.train(), device)


@pytest.mark.slow
def test_whatever_changes_the_steps_is_captured_anew(as_if_replayed):
    model, graphs = as_if_replayed, Fused.of(as_if_replayed).run_graphs
    for count, change in enumerate(
        (
            {},
            {"steps": 5},
            {"guidance_scale": 3.0},
            {"guidance_scale": 1.0},
            {"compensation": compensation(model, 0.9)},
            {"compensation": compensation(model, 1.1)},
            {"of": scheduler(clip_sample=True)},
            {"of": scheduler(alphas=0.9)},
            {"of": scheduler(alphas=0.9, last=0.95)},
        ),
        1,
    ):
        assert torch.equal(draw(model, cuda_graph=True, **change), draw(model, **change))
        assert len(graphs.captured) == count
    forced = {"compensation": compensation(model, 0.9), "guidance_scale": 3.0, "force_compensation": True}
    assert torch.equal(draw(model, cuda_graph=True, **forced), draw(model, **forced))
    with pytest.raises(ConfigError, match="fitted for guidance_scale"):
        draw(model, cuda_graph=True, **{**forced, "force_compensation": False})
    apply_cache_to_dit(model, config=CONFIGS["branch"])
    plain = draw(model)
    assert torch.equal(draw(model, cuda_graph=True), plain)
    remove_cache(model)
    for seed in range(2):
        apply_cache_to_dit(model, compensation=feature_compensation("branch", seed))
        assert torch.equal(draw(model, cuda_graph=True), draw(model))
        assert not torch.allclose(draw(model), plain, atol=1e-2)
        remove_cache(model)
    assert torch.equal(draw(model, cuda_graph=True), draw(model))
    model.transformer_blocks[0].ff.net[2].bias.data = torch.ones(32)
    draw(model)  # notices it
    assert not graphs.captured


def refused(caplog):
    return [record.message for record in caplog.records if "the run is no CUDA graph" in record.message]


def test_what_cannot_be_a_graph_runs_as_usual_and_says_so(caplog):
    model = make_quantized()

    class Corrector:
        noise = sample = staticmethod(lambda step, x: x)

    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw(model, cuda_graph=True), draw(model))
        fuse_dit(model)
        assert torch.equal(draw(model, cuda_graph=True), draw(model))
        draw(model, callback=lambda *a: None, cuda_graph=True)
        draw(model, corrector=Corrector(), cuda_graph=True)
        call = {"num_inference_steps": 2, "seeds": [0]}
        expected = sample_latents(model, scheduler("ddpm"), [1], **call)
        assert torch.equal(sample_latents(model, scheduler("ddpm"), [1], cuda_graph=True, **call), expected)
        compensated = compensated_scheduler(scheduler(), compensation(model, 0.9))  # is called DDIMScheduler too
        call["num_inference_steps"] = STEPS
        expected = sample_latents(model, compensated, [1], **call)
        assert torch.equal(sample_latents(model, compensated, [1], cuda_graph=True, **call), expected)
        noisy = scheduler()
        noisy.step = functools.partial(noisy.step, eta=0.5)
        draw(model, of=noisy, cuda_graph=True)
    messages = refused(caplog)
    for part in ("is not fused", "no fused kernels", *["callback or a corrector"] * 2, *["DDIM"] * 2, "replaced"):
        assert part in messages.pop(0)
    assert not messages


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["branch", "taylor int8"])
def test_compensated_features_on_a_gpu(name):
    """Graphs of steps, a graph of the run, and the unfused model: one result, to the rounding of bfloat16."""
    unfused = make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32)
    fused = fuse_dit(copy.deepcopy(unfused))
    found = []
    for seed in range(2):
        compensation = feature_compensation(name, seed, width=192)
        for model in (unfused, fused):
            apply_cache_to_dit(model, compensation=compensation)
        found.append(draw(fused))
        assert torch.equal(draw(fused), found[-1])
        assert torch.equal(draw(fused, cuda_graph=True), found[-1])
        expected = draw(unfused)
        assert (found[-1] - expected).norm() <= 0.05 * expected.norm()
        for model in (unfused, fused):
            remove_cache(model)
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("w_bits", [8, 4])
def test_equals_the_loop_on_a_gpu(caplog, config, w_bits):
    model = fuse_dit(make_quantized(torch.bfloat16, "cuda", w_bits, heads=6, head_dim=32))
    if config is not None:
        apply_cache_to_dit(model, config=config)
    fitted = compensation(model, 0.9)
    graphs = Fused.of(model).run_graphs
    with caplog.at_level(logging.WARNING):
        for labels, seeds in (((3, 4), (0, 1)), ((5, 3), (7, 8)), ((3, 4), (0, 1))):
            for more in ({}, {"compensation": fitted}):
                actual = draw(model, labels, seeds, cuda_graph=True, **more)
                assert torch.equal(actual, draw(model, labels, seeds, **more))
    assert not refused(caplog)
    assert (graphs.captures, graphs.replays, len(graphs)) == (2, 6, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS["branch"], CONFIGS["taylor int8"]], ids=["branch", "taylor int8"])
def test_graphs_outlive_no_cache_and_no_layer(config):
    model = fuse_dit(make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32))
    graphs = Fused.of(model).run_graphs
    apply_cache_to_dit(model, config=config)
    expected = draw(model, cuda_graph=True)
    remove_cache(model)
    plain = draw(model, cuda_graph=True)
    assert not torch.equal(plain, expected)
    filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]  # where features may have been
    apply_cache_to_dit(model, config=config)
    assert torch.equal(draw(model, cuda_graph=True), expected)
    assert graphs.captures == 3
    reset_all_caches(model)
    filler += [torch.full((1 << 10,), float("nan"), device="cuda") for _ in range(1 << 10)]
    assert torch.equal(draw(model, cuda_graph=True), expected)
    assert graphs.captures == 3
    del filler
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].bias = torch.nn.Parameter(torch.ones(192, device="cuda").bfloat16())
    changed = draw(model, cuda_graph=True)
    assert not torch.equal(changed, expected)
    assert torch.equal(changed, draw(model))
    assert graphs.captures == 4


@pytest.mark.gpu
def test_a_graph_shares_no_features_with_other_runs():
    """A replay in the middle of a run leaves what that run has kept alone."""
    model = fuse_dit(make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32))
    apply_cache_to_dit(model, config=CONFIGS["branch"])
    expected = draw(model)
    draw(model, (1, 2), cuda_graph=True)

    def between(step, timestep, latents):
        if step == 1:
            draw(model, (1, 2), (5, 6), cuda_graph=True)

    assert torch.equal(draw(model, callback=between), expected)
    assert Fused.of(model).run_graphs.replays == 2


@pytest.mark.gpu
def test_without_guidance_a_run_has_labels_of_its_own():
    """Else a capture would go on with the steps that warmed up; on a CPU the cache sees that timesteps rise."""
    model = fuse_dit(make_quantized(torch.bfloat16, "cuda", heads=6, head_dim=32))
    apply_cache_to_dit(model, config=CONFIGS["branch"])
    for labels in ((3, 4), (5, 6), (3, 4)):
        call = {"labels": labels, "guidance_scale": 1.0}
        assert torch.equal(draw(model, cuda_graph=True, **call), draw(model, **call))
