"""fuse_dit: the same numbers as the QuantLinear model, from fused kernels."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.utils import parametrize

from qandc import (
    CacheConfig,
    ConfigError,
    DataError,
    ModelError,
    QuantLinear,
    StepRanges,
    apply_cache_to_dit,
    calibrate,
    calibrate_steps,
    fuse_dit,
    make_scheduler,
    prepare_run,
    quantization_report,
    quantize_model,
    sample_latents,
    smoothing_factors,
    unfuse_dit,
)
from qandc.fusion.fuse import Fused
from qandc.fusion.graphs import GraphCache
from qandc.models.dit.conditioning import Conditioning
from qandc.models.dit.fused import FusedBlock, FusedStep
from qandc.quantization.conversion import quant_layers
from qandc_kernels import Backend
from tests.conftest import make_dit

MODULATED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj", "proj_out_2")  # which may have scales per token
BLOCK_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
# Relative error of a block, and of a whole forward, to the unfused model. In float32 both round alike but for the last
# bits, in which a value next to the middle of two codes may take the other code. One such code, in any quantizer of a
# block, moves its output by up to 1.5e-3, that of a model of three blocks by up to 5e-3, of six by 1e-2 (the largest of
# 400 codes changed one at a time). Five of them are allowed. In 16 bits values between the layers are rounded.
CHANGED_CODE = 5e-3
BLOCK_BOUND = {torch.float32: 5 * 1.5e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}
MODEL_BOUND = {torch.float32: 5 * CHANGED_CODE, torch.float16: 3e-2, torch.bfloat16: 5e-2}
ROUNDING = 1e-4  # of a block in float32 where no code has changed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make_inputs(batch=4, size=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 2, 1000, 1000]).repeat(batch // 4 + 1)[:batch]
    return {
        "hidden_states": torch.randn(batch, 4, size, size, generator=generator).to(device, dtype),
        "timestep": torch.tensor([500], device=device).expand(batch),
        "class_labels": labels.to(device),
    }


def make_quantized(dtype=torch.float32, device="cpu", w_bits=8, smoothing=False, ranges="static", **changes):
    """Calibrated; with ``smoothing``, each block layer with random factors of its own."""
    model = make_dit(**changes)
    if smoothing:
        generator = torch.Generator().manual_seed(1)
        shared = {}
        for i, block in enumerate(model.transformer_blocks):
            for name in BLOCK_LAYERS:
                linear = block.get_submodule(name)
                key = (i, "qkv" if name[6:] in ("to_q", "to_k", "to_v") else name)
                shared.setdefault(key, torch.rand(linear.in_features, generator=generator) * 1.5 + 0.5)
                parent, _, child = name.rpartition(".")
                quantized = QuantLinear.from_linear(linear, w_bits, 8, shared[key])
                setattr(block.get_submodule(parent), child, quantized)
        linear = model.proj_out_2
        factors = torch.rand(linear.in_features, generator=generator) * 1.5 + 0.5
        model.proj_out_2 = QuantLinear.from_linear(linear, w_bits, 8, factors)
    quantize_model(model, w_bits=w_bits)
    size = changes.get("sample_size", 8)
    inputs = make_inputs(size=size)
    batches = [{**inputs, "timestep": inputs["timestep"] * 0 + t} for t in (999, 500, 10)]
    calibrate(model, batches, symmetric=ranges == "symmetric")
    for name, layer in quant_layers(model).items():
        if ranges == "per token everywhere" or (ranges == "per token" and name.endswith(MODULATED)):
            layer.set_static_range(None)
    return torch.nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own .to() warns


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def smallest_error(actual, expected):
    """Relative error of the sample that differs least: a changed code moves one sample, a wrong factor moves all."""
    return min(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def fused_calls(monkeypatch):
    calls = []
    original = FusedBlock.__call__
    monkeypatch.setattr(FusedBlock, "__call__", lambda self, *a: calls.append(self) or original(self, *a))
    return calls


def assert_blocks_equal(model, inputs, bound):
    """Each block on the input that the unfused model gives it, and the whole."""
    seen = []
    with torch.no_grad():
        handles = [
            block.register_forward_hook(lambda block, args, output: seen.append((args[0].clone(), output)))
            for block in model.transformer_blocks
        ]
        expected = model(**inputs).sample
        for handle in handles:
            handle.remove()
        fused = copy.deepcopy(model)
        fuse_dit(fused, cuda_graphs=False)
        step = Fused.of(fused).step(fused)
        assert not any(step.reasons.values())
        for block, plain, (x, y) in zip(step.blocks, model.transformer_blocks, seen, strict=True):
            index = step.blocks.index(block)
            portions = step.conditioning.of_step(inputs["timestep"].float(), inputs["class_labels"], x.dtype)
            modulations = [modulation for portion, _ in portions for modulation in portion]
            actual = block(x.clone(memory_format=torch.contiguous_format), modulations[index])
            assert relative_error(actual, y) <= bound, f"block {index} of {plain.norm_type}"
            if y.dtype == torch.float32:
                assert smallest_error(actual, y) <= ROUNDING, f"block {index}: all samples differ"
        return expected, fused(**inputs).sample


@pytest.mark.parametrize("w_bits", [8, 4])
def test_weight_only_modulation_stays_quantized(fused_anywhere, w_bits):
    model = make_quantized(num_layers=2)
    quantize_model(model, w_bits, a_bits=16, skip_patterns=["pos_embed", "emb"])
    assert model.transformer_blocks[0].norm1.linear.scheme == f"W{w_bits}A16 weight-only"
    weight = model.transformer_blocks[0].norm1.linear.qweight
    with torch.no_grad():
        expected = model(**make_inputs()).sample
        fuse_dit(model, cuda_graphs=False)
        assert relative_error(model(**make_inputs()).sample, expected) <= MODEL_BOUND[torch.float32]
    assert not any(Fused.of(model).step(model).reasons.values())
    assert model.transformer_blocks[0].norm1.linear.qweight is weight


@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("ranges", ["static", "symmetric", "per token", "per token everywhere"])
def test_equals_the_unfused_model(fused_anywhere, w_bits, smoothing, ranges):
    model = make_quantized(w_bits=w_bits, smoothing=smoothing, ranges=ranges, num_layers=6)
    expected, actual = assert_blocks_equal(model, make_inputs(), BLOCK_BOUND[torch.float32])
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= 2 * MODEL_BOUND[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("ranges", ["static", "per token", "per token everywhere"])
def test_equals_the_unfused_model_on_kernels(fused_anywhere, kernel_device, monkeypatch, w_bits, ranges):
    """In Triton's interpreter with one small block, on the GPU with blocks of the embedded model's size."""
    on_gpu = kernel_device.type == "cuda"
    size = {"heads": 6, "head_dim": 32, "sample_size": 16, "num_layers": 4} if on_gpu else {"num_layers": 1}
    if not on_gpu:
        for module in ("tiles.tables", "triton._launch", "triton.adaln", "triton.attention", "triton.batched"):
            from qandc_kernels.tiles.tables import Gpu

            monkeypatch.setattr(f"qandc_kernels.{module}.gpu_of", lambda device: Gpu("", (9, 0), 132))
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if on_gpu else [])):
        model = make_quantized(dtype, kernel_device, w_bits, True, ranges, **size)
        inputs = make_inputs(size=size.get("sample_size", 8), dtype=dtype, device=kernel_device)
        expected, actual = assert_blocks_equal(model, inputs, BLOCK_BOUND[dtype])
        assert relative_error(actual, expected) <= 2 * MODEL_BOUND[dtype]


@pytest.mark.slow
def test_smoothing_matters(fused_anywhere):
    """Left out of any of their five places, the factors would change the result by more than rounding."""
    model = make_quantized(smoothing=True)
    expected = model(**make_inputs()).sample
    for name, layer in quant_layers(model).items():
        if layer.smoothing is None:
            continue
        changed = copy.deepcopy(model)
        quant_layers(changed)[name].smoothing.fill_(1)
        assert relative_error(changed(**make_inputs()).sample, expected) > 2 * CHANGED_CODE, name


def test_rows_have_their_own_timestep_and_label(fused_anywhere):
    model = make_quantized()
    inputs = make_inputs()
    inputs["timestep"] = torch.tensor([999, 400, 3, 77.5])
    expected = model(**inputs).sample
    assert relative_error(fuse_dit(model)(**inputs).sample, expected) <= MODEL_BOUND[torch.float32]


def test_one_timestep_for_all_rows(fused_anywhere):
    model = make_quantized()
    inputs = make_inputs()
    inputs["timestep"] = torch.tensor([500])
    expected = model(**inputs).sample
    output = fuse_dit(model)(**inputs, return_dict=False)
    assert isinstance(output, tuple)
    assert relative_error(output[0], expected) <= MODEL_BOUND[torch.float32]


def test_a_gradient_is_passed_on_unfused(fused_anywhere, caplog):
    model, inputs = make_quantized(), make_inputs()
    gradients = []
    for _ in range(2):
        x = inputs["hidden_states"].clone().requires_grad_()
        model(**inputs | {"hidden_states": x}).sample.square().sum().backward()
        gradients.append(x.grad)
        if len(gradients) == 1:
            fuse_dit(model)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)
    assert "carries a gradient" in caplog.text


@pytest.mark.parametrize("rows_at_once", [4096, 24, 1])  # of 12 rows: all three blocks, two and one, one by one
@pytest.mark.parametrize("smoothing", [False, True])
@torch.no_grad()
def test_conditioning_computed_ahead(fused_anywhere, monkeypatch, smoothing, rows_at_once):
    """The same modulations to rounding, those of its own step for each, and with the same ones the same output."""
    monkeypatch.setattr("qandc.models.dit.conditioning.ROWS_AT_ONCE", rows_at_once)
    fused = fuse_dit(make_quantized(smoothing=smoothing))
    inputs = make_inputs()
    labels, timesteps = inputs["class_labels"], torch.tensor([999, 500, 20])
    steps = [t.expand(4) for t in timesteps]
    expected = [fused(**inputs | {"timestep": t}).sample for t in steps]
    step = Fused.of(fused).step(fused)
    of_run = [step.conditioning.of_run(timesteps.float(), labels, torch.float32)[part].unbind(0) for part in (0, 1)]
    ahead = []
    for timestep, of_blocks, final in zip(steps, *of_run, strict=True):
        portions = step.conditioning.of_step(timestep.float(), labels, torch.float32)
        one_by_one = [modulation for portion, _ in portions for modulation in portion]
        for computed, wanted in zip((*of_blocks, final), one_by_one, strict=True):
            assert relative_error(computed, wanted) <= ROUNDING
        ahead.append(step(inputs["hidden_states"], timestep, labels, of_blocks, final))
    prepared = prepare_run(fused, timesteps, labels)
    computed = []
    original = Conditioning.of_step
    monkeypatch.setattr(Conditioning, "of_step", lambda self, *a: computed.append(0) or original(self, *a))
    for order in (0, 2, 1, 1):
        actual = fused(**inputs | {"timestep": prepared[order]}).sample
        assert torch.equal(actual, ahead[order])
        assert relative_error(actual, expected[order]) <= MODEL_BOUND[torch.float32]
    assert not computed
    for other in ({"timestep": steps[1]}, {"timestep": prepared[1], "class_labels": labels.clone()}):
        assert torch.equal(fused(**inputs | other).sample, expected[1])
    monkeypatch.setattr("qandc.models.dit.fused.LARGEST_RUN", 1000)
    prepared = prepare_run(fused, timesteps, labels)
    assert torch.equal(fused(**inputs | {"timestep": prepared[1]}).sample, expected[1])
    assert len(computed) == 3
    assert [t.shape for t in prepare_run(fused, timesteps, labels[:0])] == [(0,)] * 3
    with pytest.raises(ModelError, match="call fuse first"):
        prepare_run(make_dit(), timesteps, labels)


def test_memory_of_conditioning_is_as_stated(fused_anywhere):
    for smoothing in (False, True):
        fused = fuse_dit(make_quantized(smoothing=smoothing))
        conditioning = Fused.of(fused).step(fused).conditioning
        tables = conditioning.of_run(torch.tensor([1.0, 2.0, 3.0]), make_inputs()["class_labels"], torch.float32)
        assert conditioning.bytes_of_run(3, 4, torch.float32) == sum(t.nbytes for t in tables)


def test_sampling_prepares_its_runs(fused_anywhere, monkeypatch):
    model = make_quantized()
    scheduler = make_scheduler("ddim", DDIMScheduler().config)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "seeds": [0, 1]}
    expected = sample_latents(model, scheduler, [3, 4], **settings)
    monkeypatch.setattr(Conditioning, "of_step", lambda *_: pytest.fail("conditioning was computed in a step"))
    actual = sample_latents(fuse_dit(model), scheduler, [3, 4], **settings)
    assert relative_error(actual, expected) <= 10 * MODEL_BOUND[torch.float32]


def test_ranges_of_each_step(fused_anywhere):
    model = make_quantized()
    layers = quant_layers(model)
    generator = torch.Generator().manual_seed(5)
    timesteps = torch.tensor([900.0, 500.0, 100.0])
    names = [name for name in layers if name != "proj_out_1"]
    factors = torch.rand(3, generator=generator) + 0.7
    scales = {name: layers[name].act_scale * factors for name in names}
    zero_points = {name: torch.tensor([-5, 0, 9], dtype=torch.int32) for name in names}
    fused = fuse_dit(copy.deepcopy(model), step_ranges=StepRanges(timesteps, scales, zero_points))
    results = []
    for step, timestep in ((0, 999), (0, 710), (1, 520), (2, 0)):
        for name in names:
            layers[name].set_static_range(scales[name][step], zero_points[name][step])
        inputs = make_inputs() | {"timestep": torch.tensor([timestep]).expand(4)}
        expected = model(**inputs).sample
        results.append(fused(**inputs).sample)
        assert relative_error(results[-1], expected) <= MODEL_BOUND[torch.float32], timestep


@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("per_step", [BLOCK_LAYERS, ("attn1.to_out.0", "ff.net.2"), ("attn1.to_out.0",)])
def test_smoothing_that_is_found_fits_every_block(fused_anywhere, w_bits, per_step):
    """Layers of one input have common factors, so all blocks run fused, with a cache, ranges of each step or token."""
    model = make_dit()
    batches = [make_inputs() | {"timestep": torch.tensor([timestep]).expand(4)} for timestep in (900, 100)]
    factors = smoothing_factors(model, batches)
    assert factors.keys() == {name for name, _ in model.named_modules() if name.endswith(BLOCK_LAYERS)} | {"proj_out_2"}
    calibrate(quantize_model(model, w_bits, smoothing=factors), batches)
    expected, actual = assert_blocks_equal(model, batches[0], BLOCK_BOUND[torch.float32])
    assert relative_error(actual, expected) <= 2 * MODEL_BOUND[torch.float32]
    of_steps = calibrate_steps(model, batches)
    for name, layer in quant_layers(model).items():
        if not name.endswith(per_step):
            of_steps.scales.pop(name, None), of_steps.zero_points.pop(name, None)
            layer.set_static_range(None)
    fused = fuse_dit(copy.deepcopy(model), step_ranges=of_steps)
    for cached in (fused, model):
        apply_cache_to_dit(cached, config=CacheConfig("taylor", interval=2))
    for batch in batches:
        for name, layer in quant_layers(model).items():
            if name in of_steps.scales:
                step = of_steps.timesteps.tolist().index(batch["timestep"][0])
                layer.set_static_range(of_steps.scales[name][step], of_steps.zero_points[name][step])
        assert relative_error(fused(**batch).sample, model(**batch).sample) <= 2 * MODEL_BOUND[torch.float32]
    assert all(isinstance(block, FusedBlock) for block in Fused.of(fused).step(fused).blocks)


FINE = {"proj_out_2": torch.ones(3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": torch.ones(2, 2)}, r"timesteps must be \[S\]"),
        ({"scales": {"nobody": torch.ones(3)}}, "'nobody'"),
        ({"scales": {"proj_out_2": torch.ones(2)}}, r"its scale must be \[3\] finite float32 numbers > 0"),
        ({"scales": {"proj_out_2": torch.zeros(3)}}, "finite float32 numbers > 0"),
        ({}, "no scales"),
        (
            {"scales": FINE, "zero_points": {"proj_out_1": torch.zeros(3, dtype=torch.int32)}},
            "a zero point and no scale",
        ),
        ({"scales": FINE, "zero_points": {"proj_out_2": torch.full((3,), 128, dtype=torch.int32)}}, "from -128 to 127"),
        ({"scales": {**FINE, "proj_out_1": torch.ones(3)}}, "proj_out_1, which does not run fused"),
        ({"scales": FINE, "timesteps": torch.tensor([1.0, 2.0, float("nan")])}, "finite numbers"),
    ],
)
def test_refused_ranges(changes, message):
    given = {"timesteps": torch.ones(3), "scales": {}, "zero_points": {}} | changes
    with pytest.raises((ConfigError, DataError), match=message):
        fuse_dit(make_quantized(), step_ranges=StepRanges(**given))


def test_on_a_cpu_the_model_runs_as_before_and_says_so(caplog):
    model = make_quantized()
    expected = model(**make_inputs()).sample
    with caplog.at_level(logging.WARNING):
        fused = fuse_dit(model)
        for _ in range(2):
            assert torch.equal(fused(**make_inputs()).sample, expected)
    assert [r.message for r in caplog.records if "unfused" in r.message] == [
        "fuse: the model runs unfused: on cpu there are no fused kernels "
        "(plain torch: the kernels need a CUDA device, this is cpu)"
    ]


@pytest.mark.parametrize("how", ["training", "autocast", "global hooks", "kwargs"])
def test_what_the_fused_path_does_not_know_runs_unfused(fused_anywhere, monkeypatch, caplog, request, how):
    fused = fuse_dit(make_quantized())
    calls = fused_calls(monkeypatch)
    inputs = make_inputs()
    if how == "kwargs":
        inputs["cross_attention_kwargs"] = {}
    if how == "global hooks":
        request.addfinalizer(torch.nn.modules.module.register_module_forward_hook(lambda *args: None).remove)
    with torch.autocast("cpu", enabled=how == "autocast"), caplog.at_level(logging.WARNING):
        fused.train(how == "training")(**inputs)
    assert not calls
    said = {"training": "training mode", "autocast": "autocast is on", "kwargs": "cross_attention_kwargs"}
    assert said.get(how, how) in caplog.text


@pytest.mark.parametrize("layer", ["transformer_blocks.1.norm1.linear", "proj_out_1", "proj_out_2"])
def test_layers_around_the_blocks_may_be_plain_or_quantized(fused_anywhere, layer):
    model = make_dit()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "norm" not in n]
    skip = ["norm"] if layer in names else []
    quantize_model(model, skip_patterns=[*skip, layer] if layer in names else ["pos_embed"])
    calibrate(model, [make_inputs()])
    expected = model(**make_inputs()).sample
    assert relative_error(fuse_dit(model)(**make_inputs()).sample, expected) <= MODEL_BOUND[torch.float32]


def test_changes_are_noticed(fused_anywhere, monkeypatch):
    model = make_quantized()
    fused = fuse_dit(model)
    calls = fused_calls(monkeypatch)
    first = fused(**make_inputs()).sample
    assert len(calls) == 3

    # calibration watches the layers, which needs them to run; then the new ranges count
    far = make_inputs() | {"hidden_states": make_inputs()["hidden_states"] * 3}
    calls.clear()
    calibrate(fused, [far])
    assert not calls
    second = fused(**make_inputs()).sample
    assert len(calls) == 3
    assert not torch.equal(first, second)

    calls.clear()
    other = make_quantized(smoothing=True)
    fused.load_state_dict(other.state_dict())
    third = fused(**make_inputs()).sample
    assert len(calls) == 3
    assert relative_error(third, other(**make_inputs()).sample) <= MODEL_BOUND[torch.float32]

    fused.half().float()  # other weights, by rounding
    fourth = fused(**make_inputs()).sample
    assert len(calls) == 6
    assert relative_error(fourth, unfuse_dit(fused)(**make_inputs()).sample) <= MODEL_BOUND[torch.float32]


def other_processor(model):
    class Doubling(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    model.transformer_blocks[1].attn1.set_processor(Doubling())


def other_bits(model):
    model.transformer_blocks[1].ff.net[2].a_bits = 4


def a_hook_that_doubles(model):
    model.transformer_blocks[1].register_forward_hook(lambda module, args, output: 2 * output)


def a_hook_on_the_patches(model):
    model.pos_embed.register_forward_hook(lambda module, args, output: 2 * output)


def another_block(model):
    model.transformer_blocks[1] = model.transformer_blocks[0]


def one_block_less(model):
    del model.transformer_blocks[2]


def another_forward(model):
    block = model.transformer_blocks[1]
    block.forward = lambda x, *args, **kwargs: 2 * x


def another_bias(model):
    layer = model.transformer_blocks[1].attn1.to_q
    layer.bias = torch.nn.Parameter(layer.bias.detach() + 1)


def lora_on_adaln(model):
    norm = model.transformer_blocks[1].norm1
    norm.linear = torch.nn.Sequential(norm.linear, torch.nn.Hardtanh(-0.1, 0.1))


def parametrized_adaln(model):
    parametrize.register_parametrization(
        model.transformer_blocks[1].norm1.linear, "weight", torch.nn.Hardtanh(-0.01, 0.1)
    )


def loaded_through_a_parent(model):
    state = {f"model.{name}": t * 1.5 if "weight_scale" in name else t for name, t in model.state_dict().items()}
    torch.nn.ModuleDict({"model": model}).load_state_dict(state)


def norm_with_weights(model):
    model.norm_out = torch.nn.LayerNorm(model.inner_dim)
    torch.nn.init.constant_(model.norm_out.weight, 0.3)


def a_hook_on_the_last_norm(model):
    model.norm_out.register_forward_hook(lambda module, args, output: 2 * output)


def another_eps(model):
    model.transformer_blocks[1].norm3.eps = 0.5


def another_range(model):
    layer = model.transformer_blocks[1].ff.net[2]
    layer.set_static_range(layer.act_scale * 40, layer.act_zero_point)


def rounded_adaln(model):
    with torch.no_grad():
        model.transformer_blocks[1].norm1.linear.to(torch.float8_e4m3fn).float().weight.mul_(2)


def block_0_by_itself_and_adaln_too(model):
    model.transformer_blocks[0].register_forward_hook(lambda module, args, output: 2 * output)
    parametrized_adaln(model)


def norm_of_another_kind(model):
    model.transformer_blocks[1].norm3 = torch.nn.RMSNorm(model.inner_dim, 1e-6, elementwise_affine=False)


def a_layer_around_q(model):
    attention = model.transformer_blocks[1].attn1
    attention.to_q = torch.nn.Sequential(attention.to_q, torch.nn.Hardtanh(-0.1, 0.1))


def range_of_k(model):
    model.transformer_blocks[1].attn1.to_k.act_scale *= 2


def a_weight_only_layer(model):
    linear = make_dit().transformer_blocks[1].ff.net[2]
    model.transformer_blocks[1].ff.net[2] = QuantLinear.from_linear(linear, a_bits=16)


def another_gelu(model):
    model.transformer_blocks[1].ff.net[0].approximate = "none"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_hook_that_doubles, "forward hooks"),
        (parametrized_adaln, "parametrizations"),
        (a_layer_around_q, "is Sequential, not a QuantLinear"),
        (other_processor, "attention is not the plain one"),
        (range_of_k, "q, k and v"),
        (other_bits, "4 bits"),
        (a_weight_only_layer, "weight-only"),
        (another_gelu, "tanh-GELU"),
    ],
)
def test_a_block_that_cannot_be_fused_runs_as_before(fused_anywhere, monkeypatch, change, reason):
    model = make_quantized()
    change(model)
    expected = model(**make_inputs()).sample
    fused = fuse_dit(model)
    calls = fused_calls(monkeypatch)
    assert relative_error(fused(**make_inputs()).sample, expected) <= MODEL_BOUND[torch.float32]
    assert len(calls) == 2
    monkeypatch.setattr("qandc.quantization.conversion.select_backend", lambda device: Backend("triton", "as if"))
    report = {layer.name: layer for layer in quantization_report(fused).layers}
    assert report["transformer_blocks.0.ff.net.2"].kernel == "triton int8_linear, fused"
    layer = report["transformer_blocks.1.attn1.to_v"]
    assert layer.kernel == "triton int8_linear, unfused"
    assert reason in layer.reason


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        other_processor,
        other_bits,
        a_hook_that_doubles,
        a_hook_on_the_patches,
        another_block,
        one_block_less,
        another_forward,
        another_bias,
        lora_on_adaln,
        parametrized_adaln,
        loaded_through_a_parent,
        norm_with_weights,
        norm_of_another_kind,
        a_hook_on_the_last_norm,
        another_eps,
        another_range,
        rounded_adaln,
        block_0_by_itself_and_adaln_too,
    ],
)
def test_whatever_is_changed_counts(fused_anywhere, change, when):
    model, twin = make_quantized(), make_quantized()
    unchanged = twin(**make_inputs()).sample
    change(twin)
    expected = twin(**make_inputs()).sample
    distance = relative_error(unchanged, expected)
    assert distance > 5 * CHANGED_CODE
    if when == "after":
        fuse_dit(model)(**make_inputs())
        change(model)
    else:
        change(model)
        fuse_dit(model)
    for _ in range(2):  # nearer to the changed model than to the unchanged one
        assert relative_error(model(**make_inputs()).sample, expected) <= min(MODEL_BOUND[torch.float32], distance / 2)


def test_a_weight_replaced_twice_is_noticed(fused_anywhere):
    """The second one may be given the address of the first, which is gone."""
    for _ in range(5):
        model = make_quantized()
        fused = fuse_dit(copy.deepcopy(model))
        fused(**make_inputs())
        for m in (model, fused):
            linear = m.transformer_blocks[1].norm1.linear
            for factor in (1.5, 2):
                linear.weight = torch.nn.Parameter(linear.weight.detach() * factor)
        assert (
            relative_error(fused(**make_inputs()).sample, model(**make_inputs()).sample) <= MODEL_BOUND[torch.float32]
        )


@pytest.mark.parametrize("end", ["pos_embed", "norm_out", "proj_out_1", "proj_out_2"])
def test_no_graph_of_what_has_hooks(fused_anywhere, end):
    model = make_quantized()
    fused = fuse_dit(model)
    fused(**make_inputs())
    assert Fused.of(fused).step(fused).graphable
    kept = []
    model.get_submodule(end).register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    inputs = make_inputs()
    inputs["hidden_states"] = inputs["hidden_states"].to(memory_format=torch.channels_last)
    fused(**inputs)
    assert not Fused.of(fused).step(fused).graphable
    assert torch.equal(*kept[0])


def test_embedders_of_another_kind(fused_anywhere):
    class Embedder(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, *args, **kwargs):
            return 2 * self.base(*args, **kwargs)

    model = make_quantized()
    for block in model.transformer_blocks:
        block.norm1.emb = Embedder(block.norm1.emb)
    expected = model(**make_inputs()).sample
    assert relative_error(fuse_dit(model)(**make_inputs()).sample, expected) <= MODEL_BOUND[torch.float32]


def test_a_step_is_built_once(fused_anywhere, monkeypatch):
    built = []
    original = FusedStep.__init__
    monkeypatch.setattr(FusedStep, "__init__", lambda self, *a: built.append(0) or original(self, *a))
    model = make_quantized()
    model.transformer_blocks[1].ff.net[2].register_forward_hook(lambda *a: None)
    fused = fuse_dit(model)
    for _ in range(3):
        fused(**make_inputs())
    assert len(built) == 1


def test_what_a_hook_has_kept_stays_as_it_was(fused_anywhere):
    model = make_quantized()
    kept = []
    model.transformer_blocks[0].register_forward_hook(
        lambda module, args, output: kept.append((output, output.clone()))
    )
    fuse_dit(model)(**make_inputs())
    assert torch.equal(*kept[0])


def test_a_block_of_another_kind(fused_anywhere):
    class Block(torch.nn.Module):
        def forward(self, x, **kwargs):
            return x.transpose(1, 2).contiguous().transpose(1, 2) * 1.5

    model = make_quantized()
    model.transformer_blocks[1] = Block()
    expected = model(**make_inputs()).sample
    assert relative_error(fuse_dit(model)(**make_inputs()).sample, expected) <= MODEL_BOUND[torch.float32]


def test_pickle(fused_anywhere):
    fused = fuse_dit(make_quantized())
    expected = fused(**make_inputs()).sample
    again = pickle.loads(pickle.dumps(fused))
    assert torch.equal(again(**make_inputs()).sample, expected)
    unfuse_dit(again)


def test_a_forward_of_ones_own_is_refused():
    model = make_quantized()

    class Own(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Own
    with pytest.raises(ModelError, match="forward of its own"):
        fuse_dit(model)


def test_unfused_again_it_is_what_it_was(fused_anywhere):
    model = make_quantized()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    expected = model(**make_inputs()).sample
    base = type(model)
    fused = fuse_dit(model)
    assert fused is model
    assert isinstance(fused, base)
    fused(**make_inputs())
    assert list(fused.state_dict()) == names
    unfuse_dit(fused)
    assert type(model) is base
    assert Fused.of(model) is None
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**make_inputs()).sample, expected)
    with pytest.raises(ModelError, match="not fused"):
        unfuse_dit(model)


def test_weights_are_not_stored_twice(fused_anywhere):
    def stored(model):
        tensors = [*model.parameters(), *model.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    model = make_quantized()
    before = stored(model)
    fused = fuse_dit(model)
    fused(**make_inputs())
    step = Fused.of(fused).step(fused)
    assert stored(fused) == before
    parts = {t.untyped_storage().data_ptr() for t in [*fused.parameters(), *fused.buffers()]}
    large = [
        *step.conditioning.batched.weights,
        step.conditioning.batched.labels,
        *(block.qkv.weight for block in step.blocks),
    ]
    assert all(t.untyped_storage().data_ptr() in parts for t in large)


def test_a_copy_builds_its_own(fused_anywhere):
    fused = fuse_dit(make_quantized())
    expected = fused(**make_inputs()).sample
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        fused.transformer_blocks[0].attn1.to_out[0].weight_scale.zero_()
    assert torch.equal(twin(**make_inputs()).sample, expected)


def test_saved_by_diffusers(fused_anywhere, tmp_path):
    fused = fuse_dit(make_quantized())
    fused(**make_inputs())
    fused.save_pretrained(tmp_path)
    assert '"_class_name": "DiTTransformer2DModel"' in (tmp_path / "config.json").read_text()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == fused.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in fused.state_dict().items())


def test_inference_mode(fused_anywhere):
    fused = fuse_dit(make_quantized())
    with torch.inference_mode():
        expected = fused(**make_inputs()).sample
    with torch.no_grad():
        assert torch.equal(fused(**make_inputs()).sample, expected)


def test_refused_models():
    with pytest.raises(ModelError, match="got Linear"):
        fuse_dit(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="not quantized"):
        fuse_dit(make_dit())
    with pytest.raises(ModelError, match=r"call transformer\.eval"):
        fuse_dit(make_quantized().train())
    with pytest.raises(ModelError, match="fused already"):
        fuse_dit(fuse_dit(make_quantized()))
    replaced = make_quantized()
    replaced.forward = lambda: None
    with pytest.raises(ModelError, match="was replaced"):
        fuse_dit(replaced)


@pytest.mark.gpu
@pytest.mark.parametrize("w_bits", [8, 4])
@pytest.mark.parametrize("ranges", ["static", "per token", "per token everywhere"])
def test_graphs_follow_their_inputs(w_bits, ranges):
    model = make_quantized(torch.bfloat16, "cuda", w_bits, ranges=ranges, heads=6, head_dim=32, sample_size=16)
    fused = fuse_dit(model)
    graphs = Fused.of(fused).graphs
    for batch, size in ((4, 16), (8, 16), (4, 32), (4, 16)):
        for seed in range(3):
            inputs = make_inputs(batch, size, torch.bfloat16, "cuda")
            inputs["hidden_states"] += seed
            inputs["timestep"] = torch.tensor([100 * seed + 7], device="cuda").expand(batch)
            inputs["class_labels"] = inputs["class_labels"].roll(seed)
            with torch.inference_mode(seed == 1):
                actual = fused(**inputs).sample
            Fused.of(fused).cuda_graphs = False
            with torch.no_grad():
                eager = fused(**inputs).sample
                unfused = super(type(fused), fused).forward(**inputs).sample
            Fused.of(fused).cuda_graphs = True
            assert torch.equal(actual, eager)
            assert relative_error(actual, unfused) <= MODEL_BOUND[torch.bfloat16]
    assert graphs.captures == 3
    assert graphs.replays == 12


@pytest.mark.gpu
def test_results_of_two_steps_do_not_share_memory():
    fused = fuse_dit(make_quantized(torch.bfloat16, "cuda"))
    inputs = make_inputs(dtype=torch.bfloat16, device="cuda")
    first = fused(**inputs).sample
    kept = first.clone()
    fused(**{**inputs, "hidden_states": inputs["hidden_states"] * 2})
    assert torch.equal(first, kept)


@pytest.mark.gpu
def test_graphs_are_bounded_and_a_failed_capture_is_survived(caplog):
    graphs = GraphCache(limit=2)
    for n in (1, 2, 3, 1):
        x = torch.full((n,), 2.0, device="cuda")
        for expected in ("captured", "replayed"):
            result, how = graphs.run(lambda t: t * 3, (x,))
            assert torch.equal(result, x * 3)
            assert how == expected
        assert len(graphs) <= 2
    assert graphs.captures == 4
    with caplog.at_level(logging.WARNING):
        x = torch.full((5,), 2.0, device="cuda")
        for _ in range(2):
            result, how = graphs.run(lambda t: t * t.sum().item(), (x,))
            assert (result[0], how) == (20, "eager")
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert len([r for r in caplog.records if "no CUDA graph for inputs of (5,)" in r.message]) == 1
    assert torch.equal(graphs.run(lambda t: t * 3, (x[:4],))[0], x[:4] * 3)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu():
    fused = fuse_dit(make_quantized(torch.bfloat16, "cuda"))
    inputs = make_inputs(dtype=torch.bfloat16, device="cuda")
    steps = prepare_run(fused, torch.tensor([900, 30]), inputs["class_labels"])
    fused(**inputs)
    fused(**inputs | {"timestep": steps[0]})
    try:
        torch.cuda.set_sync_debug_mode("error")
        fused(**inputs)
        fused(**inputs | {"timestep": steps[1]})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_in_the_vanilla_pipeline(pipeline_dir):
    from diffusers import DiTPipeline

    images = {}
    for fuse in (False, True):
        pipe = DiTPipeline.from_pretrained(pipeline_dir).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        quantize_model(pipe.transformer)
        calibrate(pipe.transformer, [make_inputs(device="cuda")])
        if fuse:
            pipe.transformer = fuse_dit(pipe.transformer)
        torch.manual_seed(0)
        for labels in ([1, 2], [3]):
            images[fuse, len(labels)] = pipe(
                labels, num_inference_steps=4, generator=torch.Generator("cuda").manual_seed(0), output_type="pt"
            )[0]
    assert Fused.of(pipe.transformer).graphs.captures == 2
    for count in (1, 2):
        assert F.mse_loss(images[True, count], images[False, count]) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_on_the_second_gpu(cuda_graphs):
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        fused = fuse_dit(make_quantized(torch.bfloat16, device), cuda_graphs=cuda_graphs)
        for _ in range(2):
            outputs.append(fused(**make_inputs(dtype=torch.bfloat16, device=device)).sample.cpu())
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.gpu
def test_calls_on_two_streams_do_not_mix():
    fused = fuse_dit(make_quantized(torch.bfloat16, "cuda", num_layers=8))
    inputs = [make_inputs(dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    inputs[1]["hidden_states"] *= 2
    expected = [fused(**i).sample for i in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        actual = []
        for stream, i in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                actual.append(fused(**i).sample)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.gpu
def test_moved_between_devices():
    fused = fuse_dit(make_quantized(torch.bfloat16, "cuda"))
    inputs = make_inputs(dtype=torch.bfloat16, device="cuda")
    expected = fused(**inputs).sample
    fused.to("cpu")
    fused(**make_inputs(dtype=torch.bfloat16))
    assert torch.equal(fused.to("cuda")(**inputs).sample, expected)
