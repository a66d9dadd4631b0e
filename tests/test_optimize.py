"""One call that quantizes and caches a pipeline: what it does equals doing it by hand, and it is undone bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import weakref

import pytest
import torch
from torch import nn

from qandc import (
    CacheConfig,
    CacheError,
    CalibratedSchedule,
    Compensation,
    ConfigError,
    ModelError,
    QuantLinear,
    apply_cache,
    calibrate,
    calibrate_on_prompts,
    fuse,
    get_cache,
    graph,
    load,
    load_pipeline,
    optimize,
    quantization_report,
    quantize_model,
    remove_cache,
    restore,
    save,
    unfuse,
)
from qandc.caching.schedule import MODES
from qandc.fusion.fuse import Fused, is_fused
from qandc.models import products
from qandc.quantization.conversion import quant_layers
from qandc.variance_compensation import FittedFor
from tests import tiny_pipelines
from tests.test_lora import WITHOUT_PEFT
from tests.tiny_models import inputs_of, make_tiny, output_of
from tests.tiny_pipelines import draw, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def dit_pipe(pipeline_dir):
    pipe = load_pipeline(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def prompted(request):
    """Make a pipeline that draws from prompts."""
    pytest.importorskip("transformers")
    return make_pipeline(getattr(request, "param", "FluxPipeline"))


def images(pipe):
    torch.manual_seed(0)  # DDPM's noise
    return torch.tensor(pipe([1, 2], num_inference_steps=5, output_type="np").images)


def contents(model):
    """Return what a model is: its modules with their classes and attributes, and its tensors."""
    modules = {name: (module, type(module), set(module.__dict__)) for name, module in model.named_modules()}
    return modules, list(model.named_parameters()), dict(model.config)


def assert_as_before(model, before):
    found = contents(model)
    assert found[0] == before[0]
    assert [name for name, _ in found[1]] == [name for name, _ in before[1]]
    assert all(mine is theirs for (_, mine), (_, theirs) in zip(found[1], before[1], strict=True))
    assert found[2] == before[2]


CELLS = {  # columns of the table in docs/text-to-image.md, to arguments of optimize
    "W8A8": {"cache": None},
    "W4A8": {"w_bits": 4, "conditioning": "W4A16", "cache": None},
    **{mode: {"cache": mode, "cache_interval": None if mode == "first_block" else 2} for mode in MODES},
}


@pytest.mark.slow
@pytest.mark.parametrize("prompted", tiny_pipelines.PIPELINES, indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_a_pipeline_is_optimized_as_by_hand_and_restored_bit_for_bit(prompted, cell):
    pipe, by_hand, given = prompted, make_pipeline(type(prompted).__name__), CELLS[cell]
    plain, before = draw(pipe), contents(pipe.transformer)
    (part,) = optimize(pipe, **given).transformers
    quantize_model(by_hand.transformer, given.get("w_bits", 8), conditioning=given.get("conditioning", "W8A16"))
    if part.cache is not None:
        assert part.cache.mode == cell
        apply_cache(by_hand.transformer, config=part.cache)
    optimized = draw(pipe)
    assert torch.allclose(optimized, draw(by_hand), atol=1e-5, rtol=0)
    assert not torch.allclose(optimized, plain, atol=1e-5, rtol=0)
    if part.cache is not None and part.cache.planned:
        assert get_cache(pipe.transformer).reuse_steps == get_cache(by_hand.transformer).reuse_steps > 0
    assert part.layers.quantized == quantization_report(pipe.transformer).quantized
    restore(pipe)
    assert_as_before(pipe.transformer, before)
    assert torch.equal(draw(pipe), plain)
    optimize(pipe, cache=None)  # once more
    assert quant_layers(pipe.transformer)


@pytest.mark.slow
@pytest.mark.parametrize("prompted", tiny_pipelines.PIPELINES, indirect=True)
def test_a_pipeline_is_offloaded_after_it_was_optimized(prompted):
    """The hook of ``enable_model_cpu_offload``, which moves the transformer as a whole; on a CPU nowhere else."""
    from accelerate import cpu_offload_with_hook

    plain = draw(prompted)
    optimize(prompted)
    expected = draw(prompted)
    _, hook = cpu_offload_with_hook(prompted.transformer, torch.device("cpu"))
    assert torch.equal(draw(prompted), expected)
    with pytest.raises(ModelError, match=r"was changed since \(by an adapter, .* offloading"):
        restore(prompted)
    hook.remove()
    restore(prompted)
    assert torch.equal(draw(prompted), plain)


@pytest.mark.slow
@pytest.mark.parametrize("prompted", tiny_pipelines.PIPELINES, indirect=True)
def test_a_pipeline_gets_an_adapter_after_it_was_optimized(prompted):
    peft = pytest.importorskip("peft")
    model, plain, before = prompted.transformer, draw(prompted), contents(prompted.transformer)
    if type(model).__name__ in WITHOUT_PEFT:
        pytest.skip("diffusers gives this class no adapters")
    optimize(prompted)
    without = draw(prompted)
    target = next(name.rpartition(".")[2] for name in quant_layers(model) if name.endswith(("to_q", "to_k")))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    assert not torch.allclose(draw(prompted), without, atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match=r"was changed since \(by an adapter"):
        restore(prompted)
    model.unload_lora()
    assert torch.equal(draw(prompted), without)
    restore(prompted)
    assert torch.equal(draw(prompted), plain)
    assert contents(model)[1:] == before[1:]


def test_the_plan_says_what_was_done_and_why_not_more(dit_pipe, caplog):
    with caplog.at_level(logging.INFO, "qandc"):
        plan = optimize(dit_pipe)
    assert str(plan) == repr(plan)
    assert str(plan) in caplog.text
    lines = " ".join(str(plan).split())
    for said in (
        "DiTPipeline transformer (DiTTransformer2DModel)",
        "quantized 20 of 29 linear layers, W8A8 dynamic per-token, by reference int8_linear (plain torch",
        "left 6 an embedder or a router; 3 modulation, which sees one row per sample; give conditioning='W8A16' or",
        "weights 0.7 MB -> ",
        "cache taylor of order 1, in a run of 50 steps 18 are computed (*): 0* 1* 2 3 4* 5 6 7*",
        "compile no: on cpu nothing is gained",
        "restore qandc.restore(pipe); what was replaced takes 0.2 MB of host memory",
    ):
        assert said in lines
    assert max(map(len, str(plan).splitlines())) <= 120
    restore(dit_pipe)
    lines = " ".join(str(optimize(dit_pipe, conditioning="W8A16")).split())
    assert "quantized 3 of 29 linear layers, W8A16 weight-only, by reference weight_only_linear (plain torch" in lines


def test_a_calibrated_schedule_is_printed_with_its_timesteps(dit_pipe):
    schedule = CalibratedSchedule((True, False, True, False, False), (801, 601, 401, 201, 1), "branch", 0)
    plan = optimize(dit_pipe, cache=schedule)
    assert "branch, 2 of 5 steps are computed (*): 801* 601 401* 201 1\n" in str(plan)
    assert get_cache(dit_pipe.transformer).config == schedule.config()
    restore(dit_pipe)
    assert "cache      first_block, which decides at each step (threshold 0.05)\n" in str(
        optimize(dit_pipe, cache="first_block")
    )


def wan_22(pipe):
    """Give a pipeline of Wan a second transformer, for the later steps."""
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.6)
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("prompted", ["WanPipeline"], indirect=True)
def test_two_transformers_are_calibrated_one_after_the_other(prompted):
    pipe = wan_22(prompted)
    plain = draw(pipe, steps=8, guidance_scale=1.0)
    given = {**BRIEF, "num_inference_steps": 8, "num_frames": 5, "guidance_scale": 1.0}
    plan = optimize(pipe, cache=CacheConfig("branch", interval=2), calibrate_on=PROMPTS, **given)
    lengths = [part.cache.length for part in plan.transformers]
    assert sum(lengths) == 8
    assert min(lengths) > 1
    assert torch.isfinite(draw(pipe, steps=8, guidance_scale=1.0)).all()
    for model, length in zip((pipe.transformer, pipe.transformer_2), lengths, strict=True):
        cache = get_cache(model)
        assert cache.compute_steps + cache.reuse_steps == length
    restore(pipe)
    assert torch.equal(draw(pipe, steps=8, guidance_scale=1.0), plain)


@pytest.mark.parametrize("prompted", ["WanPipeline"], indirect=True)
def test_two_transformers(prompted):
    pipe = wan_22(prompted)
    plain, before = draw(pipe), [contents(model) for model in (pipe.transformer, pipe.transformer_2)]
    with pytest.raises(
        ConfigError, match=r"schedule of 2 steps is for one transformer.* give transformer='transformer'"
    ):
        optimize(pipe, cache=CacheConfig(schedule=[True, False]))
    optimize(pipe, transformer="transformer_2")
    assert not quant_layers(pipe.transformer)
    optimize(pipe, 4, transformer="transformer")
    assert [quant_layers(model)["blocks.0.ffn.net.2"].w_bits for model in (pipe.transformer, pipe.transformer_2)] == [
        4,
        8,
    ]
    restore(pipe)
    for model, was in zip((pipe.transformer, pipe.transformer_2), before, strict=True):
        assert_as_before(model, was)
    plan = optimize(pipe)
    assert [part.name for part in plan.transformers] == ["transformer", "transformer_2"]
    draw(pipe, steps=9)
    assert all(get_cache(model).reuse_steps for model in (pipe.transformer, pipe.transformer_2))
    restore(pipe)
    for model, was in zip((pipe.transformer, pipe.transformer_2), before, strict=True):
        assert_as_before(model, was)
    assert torch.equal(draw(pipe), plain)


class Pipe:
    """Stand for a pipeline of a class that nobody knows."""

    def __init__(self, **components):
        self.components = components
        self.__dict__.update(components)


@pytest.mark.parametrize(
    ("part", "name"), [("transformer", "Lumina2Transformer2DModel"), ("unet", "UNet2DConditionModel")]
)
def test_models_that_no_cache_knows_are_quantized_alone(part, name):
    pipe = Pipe(**{part: make_tiny(name)})
    plan = optimize(pipe)
    assert f"not {name}; docs/models.md says how a family is added" in " ".join(str(plan).split())
    assert quant_layers(getattr(pipe, part))
    assert "no cache" not in str(optimize(Pipe(**{part: make_tiny(name)}), cache=None))
    assert quant_layers(getattr(restore(pipe), part)) == {}


def test_what_is_not_offloaded_is_said():
    said = "offload no: that takes CUDA graphs of fused blocks with modulation layers of their own"
    plan = optimize(Pipe(transformer=make_tiny("FluxTransformer2DModel")), offload_modulation=True)
    assert said in " ".join(str(plan).split())
    assert "offload" not in str(optimize(Pipe(transformer=make_tiny("FluxTransformer2DModel"))))


def test_modulation_gets_weights_of_8_bits_where_there_is_one(caplog):
    schemes = {
        name: {
            layer.scheme.split()[0]
            for layer in optimize(Pipe(transformer=make_tiny(name))).transformers[0].layers.quantized
        }
        for name in ("FluxTransformer2DModel", "WanTransformer3DModel")
    }
    assert schemes == {"FluxTransformer2DModel": {"W8A8", "W8A16"}, "WanTransformer3DModel": {"W8A8"}}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    plain = optimize(Pipe(transformer=make_tiny("FluxTransformer2DModel")), conditioning=None).transformers[0]
    assert {layer.scheme.split()[0] for layer in plain.layers.quantized} == {"W8A8"}


@pytest.mark.parametrize("restorable", [True, False])
def test_an_interrupt_leaves_the_pipeline_as_it_was(dit_pipe, monkeypatch, restorable):
    plain, before, made = images(dit_pipe), contents(dit_pipe.transformer), []
    original = QuantLinear.from_linear

    def interrupted(*args):
        made.append(args)
        if len(made) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(QuantLinear, "from_linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimize(dit_pipe, restorable=restorable)
    assert_as_before(dit_pipe.transformer, before)
    assert torch.equal(images(dit_pipe), plain)
    with pytest.raises(ModelError, match="this DiTPipeline is not optimized"):
        restore(dit_pipe)


def test_a_model_that_cannot_be_cached_so_is_left_as_it_was():
    pipe = Pipe(transformer=make_tiny("QwenImageTransformer2DModel", zero_cond_t=True))
    before = contents(pipe.transformer)
    with pytest.raises(CacheError, match="use mode 'delta'"):
        optimize(pipe)
    assert_as_before(pipe.transformer, before)
    optimize(pipe, cache="delta")


def test_what_is_optimized_already_is_refused(dit_pipe):
    optimize(dit_pipe)
    with pytest.raises(ModelError, match=r"pipe.transformer is quantized already; call qandc.restore\(pipe\) first"):
        optimize(dit_pipe)
    restore(dit_pipe)
    apply_cache(dit_pipe.transformer)
    with pytest.raises(ModelError, match=r"pipe.transformer is cached already"):
        optimize(dit_pipe)
    remove_cache(dit_pipe.transformer)
    graph(dit_pipe.transformer)
    with pytest.raises(ModelError, match=r"pipe.transformer is optimized already"):
        optimize(dit_pipe)


def test_a_transformer_that_was_compiled_as_a_whole_is_refused(dit_pipe):
    dit_pipe.transformer = torch.compile(dit_pipe.transformer, backend="eager")
    with pytest.raises(
        ModelError, match=r"pipe.transformer was replaced by torch.compile\(...\); put the model inside"
    ):
        optimize(dit_pipe)


def test_a_pipeline_without_weights():
    pipe = Pipe(transformer=make_tiny("FluxTransformer2DModel").to("meta"))
    optimize(pipe)
    assert {layer.qweight.device.type for layer in quant_layers(pipe.transformer).values()} == {"meta"}
    restore(pipe)


def test_what_was_changed_since_is_restored_or_refused(dit_pipe):
    model, plain = dit_pipe.transformer, images(dit_pipe)
    before = contents(model)
    optimize(dit_pipe, cache="branch")
    remove_cache(model)
    apply_cache(model, 2)  # another cache
    model.transformer_blocks[0].requires_grad_(False)
    restore(dit_pipe)
    assert_as_before(model, before)
    assert torch.equal(images(dit_pipe), plain)
    optimize(dit_pipe, cache=None)
    model.transformer_blocks[0].attn1.to_q = nn.Linear(32, 32)
    changed = contents(model)
    with pytest.raises(ModelError, match=r"this DiTTransformer2DModel was changed since .*; undo that first"):
        restore(dit_pipe)
    assert_as_before(model, changed)


def test_layers_go_where_the_model_is_now_once_the_others_are_gone(dit_pipe, monkeypatch):
    optimize(dit_pipe)
    layers = [weakref.ref(layer) for layer in quant_layers(dit_pipe.transformer).values()]
    moved = nn.Linear._apply
    there = []

    def note(linear, *args):
        there.append(sum(layer() is not None for layer in layers))
        return moved(linear, *args)

    monkeypatch.setattr(nn.Linear, "_apply", note)
    dit_pipe.transformer.to(torch.float64)
    there.clear()
    restore(dit_pipe)
    assert set(there) == {0}
    assert {parameter.dtype for parameter in dit_pipe.transformer.parameters()} == {torch.float64}


def test_layers_that_are_not_kept(dit_pipe):
    plan = optimize(dit_pipe, restorable=False)
    assert "restore    no: restorable=False" in str(plan)
    with pytest.raises(ModelError, match="kept no full-precision layers; load the pipeline again"):
        restore(dit_pipe)


def test_a_copy_of_the_pipeline_draws_the_same_and_cannot_be_restored(dit_pipe):
    optimize(dit_pipe)
    other = copy.deepcopy(dit_pipe)
    assert torch.equal(images(other), images(dit_pipe))
    with pytest.raises(ModelError, match="is not optimized; give the pipeline that optimize was given"):
        restore(other)
    restore(dit_pipe)
    assert quant_layers(other.transformer)


PROMPTS = ["a red coat", "a blue sneaker"]
CACHE = CacheConfig("branch", interval=3)
BRIEF = {"pool_images": 2, "samples": 8, "height": 16, "width": 16, "num_inference_steps": 6, "max_sequence_length": 32}


@pytest.mark.slow
def test_prompts_to_calibrate_on_and_what_was_saved_of_them(prompted, tmp_path):
    pipe, by_hand, third = prompted, make_pipeline("FluxPipeline"), make_pipeline("FluxPipeline")
    plain, before = draw(pipe), contents(pipe.transformer)
    plan = optimize(pipe, cache=CACHE, conditioning="W8A16", calibrate_on=PROMPTS, **BRIEF)
    found = calibrate_on_prompts(by_hand, PROMPTS, cache=CACHE, conditioning="W8A16", **BRIEF)
    apply_cache(found.model, config=found.schedule.config(), compensation=found.features)
    expected = draw(by_hand)
    assert torch.allclose(draw(pipe), expected, atol=1e-5, rtol=0)
    schemes = {row.scheme for row in plan.transformers[0].layers.quantized}
    assert schemes == {"W8A8 static per-tensor", "W8A16 weight-only"}
    assert "calibrated on 2 prompts, steps to compute, compensation of features" in " ".join(str(plan).split())
    assert plan.transformers[0].cache == found.schedule.config()
    restore(pipe)
    assert_as_before(pipe.transformer, before)
    assert torch.equal(draw(pipe), plain)

    remove_cache(found.model)
    save(found.model, tmp_path / "saved", schedule=found.schedule, features=found.features)
    plain, before, model = draw(third), contents(third.transformer), third.transformer
    plan = optimize(third, calibrated=tmp_path / "saved")
    assert torch.allclose(draw(third), expected, atol=1e-5, rtol=0)
    assert f"calibrated in {tmp_path / 'saved'}, steps to compute" in " ".join(str(plan).split())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert f"takes {size / 1e6:.1f} MB of host memory" in str(plan)
    left, third.transformer = third.transformer, model
    with pytest.raises(ModelError, match=r"pipe.transformer was replaced since; put back the one that optimize left"):
        restore(third)
    third.transformer = left
    restore(third)
    assert third.transformer is model
    assert_as_before(model, before)
    assert torch.equal(draw(third), plain)
    plan = optimize(third, calibrated=load(tmp_path / "saved"))
    assert torch.allclose(draw(third), expected, atol=1e-5, rtol=0)
    assert "calibrated before, steps to compute, compensation of features" in " ".join(str(plan).split())


def test_what_a_calibrated_dit_was_saved_with_is_used(dit_pipe, tmp_path, fused_anywhere):
    plain, scheduler, batch = images(dit_pipe), dit_pipe.scheduler, {"timestep": torch.tensor([5, 5])}
    batch |= {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}
    model = calibrate(quantize_model(copy.deepcopy(dit_pipe.transformer)), [batch])
    timesteps = (800.0, 600.0, 400.0, 200.0, 0.0)
    schedule = CalibratedSchedule((True, False, True, False, False), timesteps, "branch", 0)
    gains = Compensation(
        torch.full((5, 4), 1.5), torch.zeros(5, 4), "sample", "paper", FittedFor("DDPMScheduler", timesteps, 4.0, "x")
    )
    save(model, tmp_path / "saved", schedule=schedule, compensation=gains)
    plan = optimize(dit_pipe, calibrated=tmp_path / "saved", compile=True)
    assert "fused      whole steps, with CUDA graphs" in str(plan)
    assert is_fused(dit_pipe.transformer)
    assert "compile" not in str(plan)
    assert "steps to compute, compensation of samples" in " ".join(str(plan).split())
    corrected, left = images(dit_pipe), dit_pipe.scheduler
    dit_pipe.scheduler = scheduler
    assert not torch.equal(images(dit_pipe), corrected)
    dit_pipe.scheduler = left
    restore(dit_pipe)
    assert dit_pipe.scheduler is scheduler
    assert torch.equal(images(dit_pipe), plain)


@pytest.mark.slow
def test_a_calibrated_flux_runs_on_fused_blocks(tmp_path, fused_anywhere):
    name = "FluxTransformer2DModel"
    save(calibrate(quantize_model(make_tiny(name)), [inputs_of(name)]), tmp_path / "saved")
    pipe = Pipe(transformer=make_tiny(name))
    plain = output_of(pipe.transformer, inputs_of(name))
    plan = str(optimize(pipe, calibrated=tmp_path / "saved", compile=True))
    assert "fused      blocks, each by itself\n" in plan
    assert "graph      no: on cpu" in plan
    assert "compile" not in plan
    found = output_of(pipe.transformer, inputs_of(name))
    assert 0 < (found - plain).norm() < 0.2 * plain.norm()
    unfuse(pipe.transformer)  # refused if nothing is fused
    restore(pipe)
    assert torch.equal(output_of(pipe.transformer, inputs_of(name)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel"])
def test_without_calibration_blocks_are_fused_too(fused_anywhere, monkeypatch, name):
    quantize, ran = products.gelu_quantize_per_token, []
    monkeypatch.setattr(products, "gelu_quantize_per_token", lambda *given: ran.append(0) or quantize(*given))
    pipe = Pipe(transformer=make_tiny(name))
    plain = output_of(pipe.transformer, inputs_of(name))
    whole = name.startswith("DiT")
    optimize(pipe, cache=None, compile=False)
    expected = output_of(pipe.transformer, inputs_of(name))
    restore(pipe)
    plan = str(optimize(pipe, cache=None, compile=True))
    assert f"fused      {'whole steps, with CUDA graphs' if whole else 'blocks, each by itself'}\n" in plan
    assert "W8A8 dynamic per-token" in plan
    assert "compile" not in plan
    found = output_of(pipe.transformer, inputs_of(name))
    assert (found - expected).norm() < 0.01 * plain.norm()
    assert ran
    if whole:
        assert Fused.of(pipe.transformer).built.graphable
    unfuse(pipe.transformer)  # refused if nothing is fused
    restore(pipe)
    assert torch.equal(output_of(pipe.transformer, inputs_of(name)), plain)


@pytest.mark.slow
def test_blocks_that_cannot_run_fused_any_more_are_compiled(fused_anywhere, monkeypatch):
    """Compile a block once that was changed after ``optimize``; compile none in training mode, or after ``fuse``."""
    name, compiled = "FluxTransformer2DModel", []
    compile = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward.__self__) or compile(forward))
    pipe = Pipe(transformer=make_tiny(name))
    optimize(pipe, cache=None, compile=True)
    blocks, inputs = (
        [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks],
        inputs_of(name),
    )
    fused = output_of(pipe.transformer, inputs)
    assert not compiled
    out = blocks[1].ff.net[2]
    blocks[1].ff.net[2] = nn.Sequential(out)
    for _ in range(2):
        torch.testing.assert_close(output_of(pipe.transformer, inputs), fused, atol=1e-2, rtol=0)
    assert compiled == [blocks[1]]
    pipe.transformer.train()
    output_of(pipe.transformer, inputs)
    pipe.transformer.eval()
    assert compiled == [blocks[1]]
    blocks[1].ff.net[2] = out
    assert torch.equal(output_of(pipe.transformer, inputs), fused)
    restore(pipe)
    by_hand = fuse(quantize_model(make_tiny(name)))
    by_hand.transformer_blocks[1].ff.net[2] = nn.Sequential(by_hand.transformer_blocks[1].ff.net[2])
    output_of(by_hand, inputs)
    assert compiled == [blocks[1]]


@pytest.mark.parametrize("cache", ["taylor", None])
def test_steps_that_would_run_fused_in_part_are_compiled(dit_pipe, fused_anywhere, caplog, cache):
    """Compile a DiT whose modulation is quantized, or one layer hooked, in the place of fusing a part of each step."""
    plain = images(dit_pipe)
    plan = " ".join(str(optimize(dit_pipe, cache=cache, compile=True, conditioning="W8A16")).split())
    why = "modulation or its embedders are not as diffusers made them (conditioning=None leaves them so)"
    assert f"fused no: {why}" in plan
    assert "compile 3 blocks" in plan
    assert not is_fused(dit_pipe.transformer)
    assert not caplog.text
    restore(dit_pipe)
    assert torch.equal(images(dit_pipe), plain)
    dit_pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda module, args, output: output)
    plan = " ".join(str(optimize(dit_pipe, cache=cache, compile=True)).split())
    assert "fused no: ff has forward hooks" in plan


def test_a_calibrated_model_of_another_class_is_refused(dit_pipe, tmp_path):
    save(quantize_model(make_tiny("PixArtTransformer2DModel")), tmp_path / "saved")
    with pytest.raises(
        ModelError, match=r"'.*saved' holds a PixArtTransformer2DModel, and the model that it is for is a DiT"
    ):
        optimize(dit_pipe, calibrated=tmp_path / "saved")
    with pytest.raises(ModelError, match=r"calibrated holds a PixArtTransformer2DModel, and pipe.transformer is a DiT"):
        optimize(dit_pipe, calibrated=load(tmp_path / "saved"))
    assert not quant_layers(dit_pipe.transformer)
    two = Pipe(transformer=make_tiny("WanTransformer3DModel"), transformer_2=make_tiny("WanTransformer3DModel"))
    with pytest.raises(ConfigError, match=r"a calibrated model is for one transformer.* transformer='transformer'"):
        optimize(two, calibrated=tmp_path / "saved")


@pytest.mark.slow
def test_a_calibrated_model_is_given_back_as_it_was(tmp_path):
    pytest.importorskip("transformers")
    pipe, other = make_pipeline("FluxPipeline"), make_pipeline("FluxPipeline")
    plain, own = draw(pipe), pipe.transformer
    save(quantize_model(copy.deepcopy(own)), tmp_path / "saved")
    found = load(tmp_path / "saved")
    pipe.transformer = found.model
    draw(pipe)  # diffusers adds an attribute
    pipe.transformer, before = own, contents(found.model)
    for cache in ("taylor", None):
        optimize(pipe, cache=cache, calibrated=found)
        assert (get_cache(pipe.transformer) is None) == (cache is None)
        draw(pipe)
        if cache is not None:
            with pytest.raises(ModelError, match="is cached, fused or in another pipeline that is optimized; load it"):
                optimize(other, calibrated=found)
        restore(pipe)
        assert_as_before(found.model, before)
        assert pipe.transformer is own
    assert torch.equal(draw(pipe), plain)
    fitted_for = FittedFor("DDPMScheduler", (2.0, 1.0), 4.0, "x")
    gains = Compensation(torch.ones(2, 4), torch.zeros(2, 4), "sample", "paper", fitted_for)
    with pytest.raises(ConfigError, match="DDPMScheduler"):
        optimize(pipe, calibrated=dataclasses.replace(found, compensation=gains))
    assert_as_before(found.model, before)
    assert pipe.transformer is own


def test_a_calibrated_model_goes_where_the_pipeline_is(dit_pipe, tmp_path):
    save(quantize_model(copy.deepcopy(dit_pipe.transformer)), tmp_path / "saved")
    found = load(tmp_path / "saved")
    dit_pipe.transformer.to("meta")
    optimize(dit_pipe, cache=None, calibrated=found, restorable=False)
    assert {tensor.device.type for tensor in found.model.state_dict().values()} == {"meta"}


@pytest.mark.slow
def test_what_is_cast_after_optimize_stays_so(tmp_path):
    pytest.importorskip("transformers")
    pipe, mixed = make_pipeline("FluxPipeline"), make_pipeline("FluxPipeline")
    save(quantize_model(copy.deepcopy(pipe.transformer)), tmp_path / "saved")
    for given in ({}, {"calibrated": tmp_path / "saved"}):
        optimize(pipe, **given)
        pipe.to(torch.bfloat16)
        draw(pipe)
        restore(pipe)
        assert pipe.transformer.dtype == torch.bfloat16
        draw(pipe)
        pipe.to(torch.float32)
    mixed.transformer.norm_out.double()
    optimize(mixed, calibrated=tmp_path / "saved")
    restore(mixed)
    assert {p.dtype for p in mixed.transformer.norm_out.parameters()} == {torch.float64}
    assert mixed.transformer.dtype == torch.float32


def test_a_scheduler_set_after_optimize_stays(dit_pipe):
    before, mine = dit_pipe.scheduler, copy.deepcopy(dit_pipe.scheduler)
    optimize(dit_pipe)
    dit_pipe.scheduler = mine
    restore(dit_pipe)
    assert dit_pipe.scheduler is mine
    dit_pipe.scheduler = before


def test_samples_of_two_transformers_are_not_compensated_in_one_scheduler():
    two = Pipe(transformer=make_tiny("WanTransformer3DModel"), transformer_2=make_tiny("WanTransformer3DModel"))
    with pytest.raises(ConfigError, match=r"'samples' corrects in the scheduler, .* one for transformer, "):
        optimize(two, calibrate_on=PROMPTS, compensation="samples")
    assert not quant_layers(two.transformer)


REFUSED = {
    "a model": (lambda pipe: optimize(pipe.transformer), ModelError, "takes a pipeline of diffusers"),
    "no pipeline": (lambda pipe: optimize(3), ModelError, "denoises with transformer, transformer_2, unet; got int"),
    "a part": (lambda pipe: optimize(pipe, transformer="unet"), ConfigError, "DiTPipeline, which has transformer"),
    "a mode": (lambda pipe: optimize(pipe, cache="all"), ConfigError, "cache mode 'all' is unknown"),
    "two intervals": (lambda pipe: optimize(pipe, cache=CacheConfig(), cache_interval=2), ConfigError, "give cache_i"),
    "two calibrations": (lambda pipe: optimize(pipe, calibrated="x", calibrate_on=["x"]), ConfigError, "not both"),
    "no calibration": (lambda pipe: optimize(pipe, height=16), ConfigError, "height is no argument of optimize"),
    "a directory": (lambda pipe: optimize(pipe, calibrated="x"), ConfigError, "'x' holds no calibrated model"),
    "classes": (lambda pipe: optimize(pipe, calibrate_on=["x"]), ModelError, "DiTPipeline takes no prompt"),
    "bits": (lambda pipe: optimize(pipe, 3), ConfigError, "w_bits"),
    "restore": (lambda pipe: restore(pipe), ModelError, "is not optimized"),
    "restore none": (lambda pipe: restore(3), ModelError, "this int is not optimized"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(dit_pipe, call, error, message):
    before = contents(dit_pipe.transformer)
    with pytest.raises(error, match=message):
        call(dit_pipe)
    assert_as_before(dit_pipe.transformer, before)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["branch", "first_block", None])
def test_blocks_are_compiled_in_place(dit_pipe, monkeypatch, cache):
    graphs = []
    backend = functools.partialmethod(nn.Module.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(nn.Module, "compile", backend)
    plain, before = images(dit_pipe), contents(dit_pipe.transformer)
    optimize(dit_pipe, cache=cache, compile=False)
    eager = images(dit_pipe)
    restore(dit_pipe)
    plan = optimize(dit_pipe, cache=cache, compile=True)
    assert "compile    3 blocks" in str(plan)
    why = "the cache decides while a step runs" if cache == "first_block" else "on cpu there are none"
    assert f"graph      no: {why}" in str(plan)
    assert "fused      no: on cpu there are no fused kernels" in str(plan)
    torch.testing.assert_close(images(dit_pipe), eager, atol=1e-3, rtol=0)
    assert graphs
    restore(dit_pipe)
    graphs.clear()
    assert_as_before(dit_pipe.transformer, before)
    assert torch.equal(images(dit_pipe), plain)
    assert not graphs
