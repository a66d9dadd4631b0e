"""fuse of models in blocks: fused ones give what quantized ones give, and leave alone what they get."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

from qandc import (
    CacheConfig,
    ConfigError,
    ModelError,
    QuantLinear,
    StepRanges,
    apply_cache,
    calibrate,
    fuse,
    get_cache,
    graph,
    quantization_report,
    quantize_model,
    remove_cache,
    unfuse,
    ungraph,
)
from qandc.fusion.blocks import BLOCK
from qandc.models.chroma import CHROMA
from qandc.models.chroma_fused import FusedChromaSingleBlock
from qandc.models.family import arguments_of
from qandc.models.flux import FLUX
from qandc.models.flux_fused import FusedDoubleBlock, FusedSingleBlock
from qandc.models.pixart import PIXART
from qandc.models.pixart_fused import FusedPixArtBlock
from qandc.models.qwen_fused import FusedQwenBlock
from qandc.models.qwen_image import QWEN_IMAGE
from qandc.models.sd3 import SD3
from qandc.models.sd3_fused import FusedJointBlock
from qandc.support.watch import Watch
from qandc_kernels import Backend
from tests.tiny_models import inputs_of, make_tiny, output_of

NAME, LODESTONE, QWEN, STABLE, SIGMA = (family.transformer for family in (FLUX, CHROMA, QWEN_IMAGE, SD3, PIXART))
MEDIUM = f"{STABLE}, dual attention"  # as the medium size of SD3.5 has it
each_name = pytest.mark.parametrize("name", [NAME, LODESTONE, QWEN, STABLE, MEDIUM, SIGMA])
SECOND_QKV = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
ONE_INPUT = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *((name,) for name in ("attn.to_out.0", "attn.to_add_out", "proj_out", "ff.net.0.proj", "ff.net.2")),
    ("ff_context.net.0.proj",),
    ("ff_context.net.2",),
    *((f"{mlp}.net.{layer}",) for mlp in ("img_mlp", "txt_mlp") for layer in ("0.proj", "2")),
    *(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    *(("attn2.to_q",), ("attn1.to_out.0",), ("attn2.to_out.0",)),
)
MODULATED = {True: "behind modulation", False: "behind attention and GELU"}
# as in test_fused_dit.py: a value next to the middle of two codes may take the other one; few do in float32
BOUND = {torch.float32: 0.005, torch.float16: 0.02, torch.bfloat16: 0.05}

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # RMSNorm under autocast
]


def class_of(name):
    return name.partition(",")[0]


def one_input_of(name):
    others = [names for names in ONE_INPUT if not {*names} & {*SECOND_QKV}]
    return [*others, SECOND_QKV] if name == MEDIUM else ONE_INPUT


def blocks_of(model):
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]


def fused_of(model):
    """Count the blocks that can run fused: not the last one of SD3, where the text ends."""
    return sum(not getattr(block, "context_pre_only", False) for block in blocks_of(model))


def make_quantized(w_bits=8, smoothing=False, dtype=torch.float32, device="cpu", name=NAME, **changes):
    """Calibrated; with ``smoothing``, what sees one input with random factors of its own."""
    changes |= {"dual_attention_layers": (0,)} if name == MEDIUM else {}
    model, generator = make_tiny(class_of(name), **changes), torch.Generator().manual_seed(1)
    for norm in model.modules():
        if "RMSNorm" in type(norm).__name__:  # all ones else
            norm.weight.data.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
    for block in blocks_of(model) if name == SIGMA else ():  # or it would not matter which key a query is like
        block.attn2.to_q.weight.data *= 20
    for block in blocks_of(model)[:1] if name == MEDIUM else ():  # or what both attentions read would hardly differ
        block.attn.to_out[0].weight.data *= 20
    for block in blocks_of(model) if smoothing else ():
        for names in one_input_of(name):
            factors = None
            for layer_name in names:
                parent, _, child = layer_name.rpartition(".")
                linear = dict(block.named_modules()).get(layer_name)
                if linear is not None:
                    if factors is None:
                        factors = torch.rand(linear.in_features, generator=generator) * 1.5 + 0.5
                    layer = QuantLinear.from_linear(linear, w_bits, 8, factors)
                    setattr(block.get_submodule(parent), child, layer)
    model = model if smoothing else quantize_model(model, w_bits)
    calibrate(model, [inputs_of(class_of(name), time) for time in (0.9, 0.5, 0.1)])
    return torch.nn.Module.to(model, device=device, dtype=dtype)


def real_size(name, width):
    """Return what makes a model have three heads of a size that real ones have."""
    size = {"num_attention_heads": 3, "attention_head_dim": width}
    wide = {STABLE: "caption_projection_dim", SIGMA: "cross_attention_dim"}.get(class_of(name))
    axes = 16, (width - 16) // 2, (width - 16) // 2
    return size | ({"axes_dims_rope": axes} if wide is None else {wide: 3 * width})


def given(dtype=torch.float32, device="cpu", time=0.5, name=NAME, rows=2):
    """Inputs of one forward; of one row as pipelines have them."""
    found = dict(inputs_of(class_of(name), time))
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            value = value if "ids" in key else value[:rows].to(dtype)
            found[key] = value.to(device)
    if name == SIGMA:  # prompts of four tokens and of none, which is as good as all
        found["encoder_attention_mask"] = (torch.arange(6) < torch.tensor([[4], [0]]))[:rows].to(device, dtype)
    if name == LODESTONE:  # as its pipeline has it, zeros and ones that are added to products of queries and keys
        prompts = (torch.arange(6) < torch.tensor([[4], [2]]))[:rows]
        found["attention_mask"] = torch.cat([prompts, torch.ones(rows, 16)], 1).to(device, dtype)
    return found


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def ran(monkeypatch):
    """Programs of blocks, in the order in which they were run."""
    calls = []
    two_streams = (FusedDoubleBlock, FusedQwenBlock, FusedJointBlock)
    for kind in (*two_streams, FusedSingleBlock, FusedChromaSingleBlock, FusedPixArtBlock):
        original = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, *a, o=original: calls.append(self) or o(self, *a))
    return calls


def calls_of_blocks(model, inputs):
    """Collect what each block of a model is given and returns, with copies of both."""
    seen = []

    def see(block, args, kwargs, output):
        seen.append((block, arguments_of(block, args, kwargs), output))

    handles = [block.register_forward_hook(see, with_kwargs=True) for block in blocks_of(model)]
    output = output_of(model, inputs)
    for handle in handles:
        handle.remove()
    return seen, output


def assert_equals_unfused(model, inputs, ran):
    """Each block on the input that the unfused model gives it, and the whole."""
    dtype = inputs["hidden_states"].dtype
    seen, expected = calls_of_blocks(model, inputs)
    fuse(model)
    with torch.no_grad():
        for block, kwargs, outputs in seen:
            before = {name: value.clone() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            for mine, theirs in zip(block(**kwargs), outputs, strict=True):
                if theirs is not None:
                    assert mine.dtype == theirs.dtype
                    assert error(mine, theirs) <= BOUND[dtype]
            assert all(torch.equal(kwargs[name], value) for name, value in before.items())
    assert len(ran) == fused_of(model)
    assert error(output_of(model, inputs), expected) <= 2 * BOUND[dtype]
    assert len(ran) == 2 * fused_of(model)
    unfuse(model)
    assert torch.equal(output_of(model, inputs), expected)


@each_name
@pytest.mark.parametrize(("w_bits", "smoothing"), [(8, True), (4, False)])
def test_equals_the_unfused_model(fused_anywhere, ran, name, w_bits, smoothing):
    model = make_quantized(w_bits, smoothing, name=name)
    for rows in (2, 1):
        ran.clear()
        assert_equals_unfused(model, given(name=name, rows=rows), ran)


@each_name
@pytest.mark.parametrize(("w_bits", "smoothing"), [(8, True), (4, False)])
@pytest.mark.parametrize("where", ["behind modulation", "behind attention and GELU", "everywhere"])
def test_scales_per_token(fused_anywhere, ran, name, w_bits, smoothing, where):
    """Fuse blocks without static ranges of q, k, v and the first layer of each MLP, of the other layers, or of all."""
    model = make_quantized(w_bits, smoothing, name=name)
    for layer_name, layer in model.named_modules():
        modulated = layer_name.endswith(("_q", "_k", "_v", "_proj", ".proj", "_mlp"))
        if isinstance(layer, QuantLinear) and where in ("everywhere", MODULATED[modulated]):
            layer.set_static_range(None)
    found = sum(getattr(layer, "act_scale", 0) is None for layer in model.modules())
    assert found >= (1 if where == MODULATED[False] else 4) * len(blocks_of(model))
    assert_equals_unfused(model, given(name=name), ran)


@each_name
def test_no_calibration_is_needed(fused_anywhere, ran, name):
    model = quantize_model(make_tiny(class_of(name), **({"dual_attention_layers": (0,)} if name == MEDIUM else {})))
    assert_equals_unfused(model, given(name=name), ran)


@pytest.mark.parametrize("name", [NAME, QWEN, STABLE])
@pytest.mark.parametrize("alone", ["encoder_hidden_states", "hidden_states", "temb"])
def test_one_row_serves_all_samples(fused_anywhere, ran, name, alone):
    """Take one row of text, image or modulation for several samples, as diffusers does with one negative prompt."""
    model, inputs = make_quantized(8, True, name=name), given(name=name)
    seen, _ = calls_of_blocks(model, inputs)
    calls = [(block, call | {alone: call[alone][:1]}) for block, call, _ in seen[:1]]
    if name == NAME and alone == "temb":  # both streams of a block of one sequence have as many
        calls.append((seen[-1][0], seen[-1][1] | {alone: seen[-1][1][alone][:1]}))
    with torch.no_grad():
        expected = [block(**call) for block, call in calls]
        fuse(model)
        for (block, call), outputs in zip(calls, expected, strict=True):
            for mine, theirs in zip(block(**call), outputs, strict=True):
                assert error(mine, theirs) <= BOUND[torch.float32]
    assert len(ran) == len(calls)


ADDED = {  # by pipelines with ControlNets and adapters
    NAME: {"controlnet_block_samples": 1, "controlnet_single_block_samples": 2, "joint_attention_kwargs": {"scale": 1}},
    QWEN: {"controlnet_block_samples": 2, "attention_kwargs": {"scale": 1}},
    STABLE: {"block_controlnet_hidden_states": 1, "joint_attention_kwargs": {"scale": 1}},
}


@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("name", ADDED)
def test_residuals_of_controlnets_and_a_scale_of_adapters(fused_anywhere, ran, name, rows):
    model, inputs, generator = make_quantized(8, True, name=name), given(name=name, rows=rows), torch.Generator()
    if not ADDED[name].keys() <= inspect.signature(model.forward).parameters.keys():
        pytest.skip("this diffusers has no ControlNet for it")
    for key, value in ADDED[name].items():
        some = isinstance(value, int)
        inputs[key] = [torch.randn(rows, 16, 32, generator=generator) for _ in range(value)] if some else value
    expected = output_of(model, inputs)
    assert error(output_of(model, given(name=name, rows=rows)), expected) > 0.1
    assert error(output_of(fuse(model), inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == fused_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_name
def test_shapes_and_batches_take_turns(fused_anywhere, ran, name, dtype):
    """Run calls of other batches and lengths by turns; of FLUX.1 one has a second image appended, as Kontext does."""
    model, calls = make_quantized(8, True, dtype, name=name), [given(dtype, name=name, rows=rows) for rows in (2, 1)]
    if name == NAME:
        image, places = calls[1]["hidden_states"], calls[1]["img_ids"]
        others = {"hidden_states": torch.cat([image, -image], 1), "img_ids": torch.cat([places, places + 1])}
        calls += [calls[1] | others, calls[0] | {"txt_ids": calls[0]["txt_ids"][:3]}]
        calls[3]["encoder_hidden_states"] = calls[3]["encoder_hidden_states"][:, :3]
    expected = [output_of(model, call) for call in calls]
    fuse(model)
    for turn in (*range(len(calls)), *reversed(range(len(calls)))):
        assert error(output_of(model, calls[turn]), expected[turn]) <= BOUND[dtype]
    assert len(ran) == 2 * len(calls) * fused_of(model)


@pytest.mark.parametrize("name", ADDED)
def test_threads_share_nothing_but_the_model(fused_anywhere, name):
    model, calls = make_quantized(8, True, name=name), [given(name=name, time=time) for time in (0.9, 0.6, 0.3)]
    expected = [output_of(model, call) for call in calls]
    fuse(model)
    with ThreadPoolExecutor(3) as pool:
        for found in [list(pool.map(lambda call: output_of(model, call), calls)) for _ in range(4)]:
            for mine, theirs in zip(found, expected, strict=True):
                assert error(mine, theirs) <= BOUND[torch.float32]


def test_streams_of_one_row_lie_in_one_tensor(fused_anywhere, ran, monkeypatch):
    """Count no copy before a block of one sequence: the block before it has put text and image side by side."""
    model, joined, original = fuse(make_quantized()), [], torch.cat
    with torch.no_grad():
        model(**given(rows=1))
        monkeypatch.setattr(torch, "cat", lambda parts, dim=0: joined.append(parts) or original(parts, dim))
        model(**given(rows=1))
    assert len(ran) == 8
    assert not any(part.shape[1:] == (16, 32) for parts in joined for part in parts)


@pytest.mark.slow
@each_name
@pytest.mark.parametrize("w_bits", [8, 4])
def test_equals_the_unfused_model_on_kernels(fused_anywhere, kernel_device, monkeypatch, ran, name, w_bits):
    """Compare fused blocks with unfused ones: interpreted with a block of each kind, on a GPU with real head sizes."""
    counts = ("num_layers", "num_single_layers") if name in (NAME, LODESTONE) else ("num_layers",)
    size = {} if class_of(name) == STABLE else dict.fromkeys(counts, 1)  # whose last block runs unfused
    sizes, dtypes = [size], [torch.float32, torch.float16]
    if kernel_device.type == "cuda":
        sizes, dtypes = [], [*dtypes, torch.bfloat16]
        sizes += [real_size(name, width) for width in ((72,) if name == SIGMA else (64, 128))]
    else:
        from qandc_kernels.tiles.tables import Gpu

        for module in ("tiles.tables", "triton._launch", "triton.adaln", "triton.attention", "triton.batched"):
            monkeypatch.setattr(f"qandc_kernels.{module}.gpu_of", lambda device: Gpu("", (9, 0), 132))
    for size in sizes:
        for dtype in dtypes:
            model = make_quantized(w_bits, True, dtype, kernel_device, name, **size)
            ran.clear()
            rows = 2 if dtype == torch.float32 else 1
            assert_equals_unfused(model, given(dtype, kernel_device, name=name, rows=rows), ran)


@pytest.mark.parametrize("tokens", [128, 200])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_longer_sequences(fused_anywhere, ran, device, tokens):
    """On a GPU, attention by cuDNN and by others, which on Hopper the number of tokens decides."""
    dtype, width = (torch.bfloat16 if device == "cuda" else torch.float32), 2 * 64
    size = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    model, generator = make_quantized(dtype=dtype, device=device, **size), torch.Generator().manual_seed(0)
    angles = torch.randn(tokens, 32, generator=generator).repeat_interleave(2, -1).to(device)
    call = {"image_rotary_emb": (angles.cos(), angles.sin())}
    shapes = {"hidden_states": (1, tokens - 16, width), "encoder_hidden_states": (1, 16, width), "temb": (1, width)}
    call |= {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    with torch.no_grad():
        expected = [block(**call) for block in blocks_of(model)]
        for block, outputs in zip(blocks_of(fuse(model)), expected, strict=True):
            for mine, theirs in zip(block(**call), outputs, strict=True):
                assert error(mine, theirs) <= BOUND[dtype]
    assert len(ran) == 4


@each_name
@torch.no_grad()
@pytest.mark.parametrize("change", ["to", "block to", "load"])
def test_graphs_notice_what_is_built_anew(fused_anywhere, name, change):
    """Graphs read tensors that were made of weights: what holds them stays as long as the watch over the model."""
    model = fuse(make_quantized(name=name, smoothing=True))
    output_of(model, given(name=name))
    watch, block = Watch(model), blocks_of(model)[0]
    kept = weakref.ref(block.__dict__[BLOCK].program)
    if change == "load":
        model.load_state_dict(model.state_dict())
    else:
        (model if change == "to" else block).to("cpu")
    assert not watch.unchanged()
    output_of(model, given(name=name))
    assert kept() is not None
    assert block.__dict__[BLOCK].program is not kept()
    del watch
    gc.collect()
    assert kept() is None


@pytest.mark.gpu
@each_name
@pytest.mark.parametrize("config", [None, CacheConfig("taylor", interval=2), CacheConfig("delta", interval=2)])
def test_a_graph_of_fused_blocks(ran, caplog, name, config):
    """Captured after what builds them; with a cache, each kind of step."""
    model = make_quantized(8, True, torch.bfloat16, "cuda", name, **real_size(name, 128))
    steps = [given(torch.bfloat16, "cuda", time, name) for time in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
    of_run = {key: steps[0][key] for key in ("encoder_hidden_states", "txt_ids") if key in steps[0]}
    steps = [{**step, **of_run} for step in steps]

    def run():
        return [output_of(model, step).clone() for step in steps]

    if config is not None:
        apply_cache(model, config=config)
    unfused = run()
    assert config is None or get_cache(model).reuse_steps >= 2
    fuse(model)
    if config is not None:
        get_cache(model).reset()
    fused = run()
    graph(model)
    for _ in range(2):
        if config is not None:
            get_cache(model).reset()
        ran.clear()
        for mine, theirs, slow in zip(run(), fused, unfused, strict=True):
            assert torch.equal(mine, theirs)
            assert error(mine, slow) <= 2 * BOUND[torch.bfloat16]
    assert not ran or config is not None  # replays of a graph call no Python
    assert "no CUDA graph" not in caplog.text
    ungraph(model)
    unfuse(model)
    if config is not None:
        get_cache(model).reset()
    for mine, theirs in zip(run(), unfused, strict=True):
        assert torch.equal(mine, theirs)


@each_name
def test_smoothing_matters(name):
    """Left out of any of its places, a factor would change what a block returns by more than rounding."""
    model = make_quantized(smoothing=True, name=name)
    seen, _ = calls_of_blocks(model, given(name=name))
    for block, kwargs, outputs in seen[: fused_of(model)]:
        for names in one_input_of(name):
            changed = copy.deepcopy(block)
            layers = [layer for name, layer in changed.named_modules() if name in names]
            for layer in layers:
                layer.smoothing.fill_(1)
            with torch.no_grad():
                found = zip(changed(**kwargs), outputs, strict=True)
                assert not layers or max(error(mine, theirs) for mine, theirs in found) > BOUND[torch.float32]


@each_name
@pytest.mark.parametrize("first", ["cache", "fusion", "graph"])
def test_cache_graph_and_fusion_in_any_order(fused_anywhere, ran, name, first):
    model, config = make_quantized(name=name), CacheConfig("branch", interval=3)
    classes, inputs = [type(module) for module in model.modules()], given(name=name)
    keys = [set(module.__dict__) for module in model.modules()]
    expected = output_of(model, inputs)
    attached = {"cache": lambda: apply_cache(model, config=config), "fusion": lambda: fuse(model)}
    attached["graph"] = lambda: graph(model)
    for what in (first, *(other for other in attached if other != first)):
        attached[what]()
    assert error(output_of(model, inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == fused_of(model)
    with pytest.raises(ModelError, match="fused already"):
        fuse(model)
    unfuse(model)
    assert get_cache(model).config == config
    remove_cache(model)
    ungraph(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert torch.equal(output_of(model, inputs), expected)
    with pytest.raises(ModelError, match="not fused"):
        unfuse(model)


def test_copies_and_pickles_are_fused_too(fused_anywhere, ran):
    model = fuse(make_quantized())
    expected = output_of(model, given())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran.clear()
        assert torch.equal(output_of(again, given()), expected)
        assert len(ran) == 4
        with torch.no_grad():
            blocks_of(again)[0].ff.net[2].bias.fill_(3)  # of the copy alone
        assert not torch.equal(output_of(again, given()), expected)
        assert torch.equal(output_of(model, given()), expected)
        unfuse(again)


def test_streams_elsewhere_in_one_tensor_are_joined(fused_anywhere, ran):
    model = make_quantized()
    block, whole = blocks_of(model)[2], torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(22, 16)
    others = {"temb": torch.randn(1, 32), "image_rotary_emb": (angles.cos(), angles.sin())}
    for text, image in (
        (whole[:, 20:26], whole[:, :16]),
        (whole[:, :6], whole[:, 7:23]),
        (whole[:, :6], whole[:, :16]),
    ):
        with torch.no_grad():
            call = {"hidden_states": image, "encoder_hidden_states": text, **others}
            expected = block(**call)
            for mine, theirs in zip(blocks_of(fuse(model))[2](**call), expected, strict=True):
                assert error(mine, theirs) <= BOUND[torch.float32]
        unfuse(model)
    assert len(ran) == 3


def a_hook(model):
    blocks_of(model)[3].proj_mlp.register_forward_hook(lambda module, args, output: 2 * output)


def an_adapter(model):
    attention = blocks_of(model)[-1].attn
    attention.to_q = torch.nn.Sequential(attention.to_q, torch.nn.Hardtanh(-0.1, 0.1))


def range_of_the_mlp(model):
    blocks_of(model)[3].proj_mlp.act_scale = blocks_of(model)[3].proj_mlp.act_scale * 2


def range_of_added_k(model):
    layer = blocks_of(model)[1].attn.add_k_proj
    layer.act_scale = layer.act_scale * 2


def another_processor(model):
    kind = type(blocks_of(model)[1].attn.processor)

    class Doubling(kind):
        def __call__(self, *args, **kwargs):
            return tuple(2 * each for each in super().__call__(*args, **kwargs))

    blocks_of(model)[1].attn.set_processor(Doubling())


def other_bits(model):
    blocks_of(model)[3].attn.to_k.a_bits = 4


def another_gelu(model):
    blocks_of(model)[3].act_mlp = torch.nn.GELU()


def norms_of_heads_without_weights(model):
    width = model.config.attention_head_dim
    attention = blocks_of(model)[1].attn
    attention.norm_k = type(attention.norm_k)(width, 1e-6, elementwise_affine=False)


CHANGES = [
    (a_hook, "proj_mlp has forward hooks"),
    (an_adapter, "attn.to_q is Sequential, not a QuantLinear"),
    (range_of_the_mlp, "q, k, v and proj_mlp, which see one input, have different ranges for it"),
    (range_of_added_k, "add_q_proj, add_k_proj and add_v_proj, which see one input, have different ranges"),
    (another_processor, "attention is not the plain one of FLUX.1"),
    (other_bits, "attn.to_k quantizes activations to 4 bits"),
    (another_gelu, "not tanh-GELU"),
    (norms_of_heads_without_weights, "norms of its heads"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_block_that_cannot_be_fused_runs_as_before(fused_anywhere, monkeypatch, caplog, ran, change, reason, when):
    model, inputs = make_quantized(), given()
    plain = copy.deepcopy(model)
    change(plain)
    expected = output_of(plain, inputs)
    if when == "before":
        change(model)
        fuse(model)
    else:
        output_of(fuse(model), inputs)
        ran.clear()
        change(model)
    assert error(output_of(model, inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == 3
    assert caplog.text.count(reason) == 1
    monkeypatch.setattr("qandc.quantization.conversion.select_backend", lambda device: Backend("triton", "as if"))
    report = {layer.name: layer for layer in quantization_report(model).layers}
    assert report["transformer_blocks.0.ff.net.2"].kernel == "triton int8_linear, fused"
    unfused = [layer for layer in report.values() if layer.kernel.endswith(", unfused")]
    assert {layer.name.split(".")[1] for layer in unfused} == {"1"}
    assert all(reason in layer.reason for layer in unfused)


def another_modulation(model):
    blocks_of(model)[1].img_mod[0] = torch.nn.GELU()


def modulation_of_tokens(model):
    blocks_of(model)[1].zero_cond_t = True


def in_the_caption_attention(change):
    def changed(model):
        change(blocks_of(model)[1].attn2)

    changed.__name__ = change.__name__
    return changed


def adapted(attention):
    attention.to_q = torch.nn.Sequential(attention.to_q, torch.nn.Hardtanh(-0.1, 0.1))


def normed(attention):
    attention.norm_k = torch.nn.LayerNorm(16)


def hooked(attention):
    attention.to_out[1].register_forward_hook(lambda module, args, output: 2 * output)


def of_two_ranges(attention):
    attention.to_v.act_scale = 2 * attention.to_v.act_scale


def in_chunks(model):
    blocks_of(model)[1].set_chunk_feed_forward(4, 1)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (QWEN, an_adapter, "attn.to_q is Sequential, not a QuantLinear"),
        (QWEN, another_processor, "attention is not the plain one of Qwen-Image"),
        (QWEN, norms_of_heads_without_weights, "norms of its heads"),
        (QWEN, another_modulation, "its modulation is not that of Qwen-Image"),
        (QWEN, modulation_of_tokens, "tokens have modulations of their own"),
        (SIGMA, in_the_caption_attention(adapted), "attn2.to_q is Sequential, not a QuantLinear"),
        (SIGMA, in_the_caption_attention(normed), "attention is not the plain one of PixArt"),
        (SIGMA, in_the_caption_attention(hooked), "to_out.1 has forward hooks"),
        (SIGMA, in_the_caption_attention(of_two_ranges), "k and v, which see one input, have different ranges"),
        (SIGMA, in_chunks, "a chunked feed-forward"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_blocks_that_cannot_be_fused(fused_anywhere, caplog, ran, name, change, reason):
    model, inputs = make_quantized(name=name), given(name=name)
    change(model)
    if change is modulation_of_tokens:
        fuse(model)
    else:
        expected = output_of(model, inputs)
        assert error(output_of(fuse(model), inputs), expected) <= BOUND[torch.float32]
        assert len(ran) == 1
    assert f"{reason}" in caplog.text
    assert "(1 of 2)" in caplog.text


def test_the_last_block_of_sd3_runs_unfused(fused_anywhere, caplog, ran):
    model, inputs = make_quantized(name=STABLE, num_layers=3), given(name=STABLE)
    expected = output_of(model, inputs)
    assert error(output_of(fuse(model), inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == 2
    assert "it has no MLP of the text (the last block)" in caplog.text


def without_weights(attention):
    attention.norm_k = type(attention.norm_k)(attention.norm_k.weight.shape[0], 1e-6, elementwise_affine=False)


def processed_otherwise(attention):
    attention.processor = type("Other", (type(attention.processor),), {})()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapted, "attn2.to_q is Sequential, not a QuantLinear"),
        (without_weights, "norms of its heads are not those of its family"),
        (hooked, "to_out.1 has forward hooks"),
        (of_two_ranges, "q, k and v, which see one input, have different ranges"),
        (processed_otherwise, "its attention is not the plain one of SD3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_second_attention_that_cannot_be_fused(fused_anywhere, caplog, ran, change, reason):
    model, inputs = make_quantized(name=MEDIUM, num_layers=3), given(name=MEDIUM)
    change(blocks_of(model)[0].attn2)
    expected = output_of(model, inputs)
    assert error(output_of(fuse(model), inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == 1
    assert reason in caplog.text


@pytest.mark.parametrize("mode", ["delta", "branch", "taylor"])
def test_a_second_attention_is_cached(fused_anywhere, ran, mode):
    """Fused blocks store what each of their three branches adds, as unfused ones do."""
    model = make_quantized(8, True, name=MEDIUM)
    steps = [given(time=time, name=MEDIUM) for time in (0.9, 0.8, 0.7, 0.6)]
    steps = [step | {"encoder_hidden_states": steps[0]["encoder_hidden_states"]} for step in steps]
    apply_cache(model, config=CacheConfig(mode, interval=2))
    expected = [output_of(model, step).clone() for step in steps]
    fuse(model)
    get_cache(model).reset()
    for step, output in zip(steps, expected, strict=True):
        assert error(output_of(model, step), output) <= BOUND[torch.float32]
    assert len(ran) == get_cache(model).compute_steps < 4


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (STABLE, {"qk_norm": None}, "norms of its heads are not those of its family"),
        (SIGMA, {"norm_elementwise_affine": True}, "its norms have weights"),
        (SIGMA, {"activation_fn": "geglu"}, "its activation is not tanh-GELU"),
        (SIGMA, {"attention_type": "gated"}, "gated attention beside it"),
    ],
)
def test_models_that_cannot_be_fused(name, changes, reason):
    with pytest.raises(ModelError, match=reason):
        fuse(make_quantized(name=name, **changes))


def test_a_padded_prompt_runs_unfused(fused_anywhere, caplog, ran):
    """Before diffusers 0.37 attention did not read the mask, which pipelines always gave it."""
    model, inputs = make_quantized(name=QWEN), given(name=QWEN)
    plain = output_of(model, inputs)
    inputs["encoder_hidden_states_mask"] = torch.arange(6) < torch.tensor([[4], [6]])
    expected = output_of(model, inputs)
    unread = torch.equal(expected, plain)
    assert error(output_of(fuse(model), inputs), expected) <= BOUND[torch.float32] * unread
    assert len(ran) == 2 * unread
    assert ("attention takes a mask (draw them one by one, or of one length)" in caplog.text) is not unread


@pytest.mark.parametrize("name", [QWEN, SIGMA])
@pytest.mark.parametrize("tokens", [1, 9])
def test_prompts_of_any_length(fused_anywhere, ran, name, tokens):
    model, inputs = make_quantized(name=name), given(name=name, rows=1)
    inputs |= {key: None for key in inputs if key.endswith("mask")}
    inputs["encoder_hidden_states"] = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(0))
    if "txt_seq_lens" in inputs:
        inputs["txt_seq_lens"] = [tokens]
    expected = output_of(model, inputs)
    assert error(output_of(fuse(model), inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"encoder_attention_mask": -10000.0 * torch.ones(2, 16, 6).tril()}, "not a bias [B, 1, keys]"),
        ({"attention_mask": torch.ones(2, 16)}, "a block is called with attention_mask, which fused ones do not"),
        ({"cross_attention_kwargs": {"temb": None}}, "is called with cross_attention_kwargs"),
    ],
    ids=["a query's mask", "mask of the image", "kwargs"],
)
def test_attention_of_pixart_that_cannot_be_fused(fused_anywhere, caplog, ran, others, reason):
    """Run blocks of PixArt unfused, and say why, where a mask leaves out keys of the image or of single queries."""
    model, inputs = make_quantized(name=SIGMA), given(name=SIGMA)
    inputs |= others
    expected = output_of(model, inputs)
    assert torch.equal(output_of(fuse(model), inputs), expected)
    assert not ran
    assert reason in caplog.text


def test_what_was_changed_is_noticed(fused_anywhere, ran):
    fused, inputs = fuse(make_quantized()), given()
    first = output_of(fused, inputs)
    calibrate(fused, [inputs | {"hidden_states": 3 * inputs["hidden_states"]}])  # watches layers, which have to run
    ran.clear()
    second = output_of(fused, inputs)
    assert len(ran) == 4
    assert not torch.equal(first, second)
    other = make_quantized(smoothing=True)
    fused.load_state_dict(other.state_dict())
    assert error(output_of(fused, inputs), output_of(other, inputs)) <= BOUND[torch.float32]
    for block in blocks_of(other):
        layer = block.proj_out if hasattr(block, "proj_out") else block.ff.net[2]
        layer.smoothing *= 3
    fused.load_state_dict(other.state_dict())  # into the memory that is there
    assert error(output_of(fused, inputs), output_of(other, inputs)) <= BOUND[torch.float32]
    torch.nn.Module.float(torch.nn.Module.half(fused))  # other weights, by rounding
    third = output_of(fused, inputs)
    assert len(ran) == 16
    assert error(third, output_of(unfuse(fused), inputs)) <= BOUND[torch.float32]


def test_moving_a_model_frees_its_memory(fused_anywhere):
    model = fuse(make_quantized())
    output_of(model, given())
    weights = [weakref.ref(block.attn.to_q.qweight) for block in blocks_of(model)]
    weights += [weakref.ref(block.proj_out.qweight) for block in model.single_transformer_blocks]
    torch.nn.Module.to_empty(model, device="meta")
    assert not any(weight() is not None for weight in weights)


@pytest.mark.parametrize("how", ["gradients", "training", "autocast", "joint_attention_kwargs", "global hooks"])
def test_what_fused_blocks_do_not_know_runs_unfused(fused_anywhere, caplog, ran, request, how):
    model, inputs = make_quantized(), given()
    if how == "global hooks":  # of profilers, for example
        request.addfinalizer(register_module_forward_hook(lambda *args: None).remove)
    if how == "joint_attention_kwargs":
        inputs["joint_attention_kwargs"] = {"attention_mask": torch.zeros(2, 1, 1, 22)}

    def run():
        with torch.autocast("cpu", enabled=how == "autocast"), torch.set_grad_enabled(how == "gradients"):
            output = model.train(how == "training")(**inputs).sample
            model.eval()
            return output

    expected = run()
    fuse(model)
    assert torch.equal(run(), expected)
    assert not ran
    assert {"training": "training mode"}.get(how, how) in caplog.text


@each_name
def test_arguments_that_diffusers_may_add_are_not_left_out(fused_anywhere, monkeypatch, caplog, ran, name):
    model = make_quantized(name=name)
    block, call, _ = calls_of_blocks(model, given(name=name))[0][0]
    original = type(block).forward
    monkeypatch.setattr(type(block), "forward", lambda self, *args, new=None, **others: original(self, *args, **others))
    with torch.no_grad():
        expected = block(**call)
        found = fuse(model).transformer_blocks[0](**call, new=torch.ones(1))
    assert all(map(torch.equal, *([x] if isinstance(x, torch.Tensor) else x for x in (found, expected))))
    assert not ran
    assert "a block is called with new, which fused ones do not read" in caplog.text


def test_blocks_without_rotary_tables_run_unfused(fused_anywhere, caplog, ran):
    model = make_quantized()
    seen, _ = calls_of_blocks(model, given())
    calls = [{**kwargs, "image_rotary_emb": None} for _, kwargs, _ in seen]
    with torch.no_grad():
        expected = [block(**call) for block, call in zip(blocks_of(model), calls, strict=True)]
        for block, call, outputs in zip(blocks_of(fuse(model)), calls, expected, strict=True):
            assert all(map(torch.equal, block(**call), outputs))
    assert not ran
    assert "image_rotary_emb is no pair of float32 tables" in caplog.text


def test_attention_runs_by_the_backend_that_was_chosen(fused_anywhere, monkeypatch, caplog, ran):
    chosen, original, model = [], attention_dispatch.dispatch_attention_fn, fuse(make_quantized())
    monkeypatch.setattr(
        attention_dispatch,
        "dispatch_attention_fn",
        lambda *args, backend=None, **others: chosen.append(backend) or original(*args, backend=backend, **others),
    )
    output_of(model, given())
    model.set_attention_backend("native")
    output_of(model, given())
    assert chosen == [None] * 4 + ["native"] * 4
    blocks_of(model)[1].attn.processor._parallel_config = object()
    with pytest.raises(ModelError, match="enable_parallelism was called after fuse"):
        output_of(model, given())
    fuse(unfuse(model))
    assert "its attention is spread over several GPUs (1 of 4)" in caplog.text


@pytest.mark.gpu
def test_attention_that_torch_was_told_to_use_stays(monkeypatch):
    seen, original, flags = [], attention_dispatch.dispatch_attention_fn, torch.backends.cuda
    model = fuse(make_quantized(8, True, torch.bfloat16, "cuda", NAME, **real_size(NAME, 64)))
    monkeypatch.setattr(
        attention_dispatch,
        "dispatch_attention_fn",
        lambda *args, **others: (
            seen.append((flags.cudnn_sdp_enabled(), flags.math_sdp_enabled())) or original(*args, **others)
        ),
    )
    with sdpa_kernel(SDPBackend.MATH):
        output_of(model, given(torch.bfloat16, "cuda"))
    assert seen == [(False, True)] * 4


def test_on_a_cpu_the_model_runs_as_before_and_says_so_once(caplog):
    model, inputs = make_quantized(), given()
    expected = output_of(model, inputs)
    with caplog.at_level(logging.WARNING):
        fuse(model)
        for _ in range(2):
            assert torch.equal(output_of(model, inputs), expected)
    assert [record.message for record in caplog.records if "unfused" in record.message] == [
        "fuse: blocks run unfused: on cpu there are no fused kernels "
        "(plain torch: the kernels need a CUDA device, this is cpu)"
    ]


@pytest.mark.slow
def test_compiled_blocks_stay_compiled(fused_anywhere, caplog, ran):
    model, inputs = make_quantized(), given()
    expected = output_of(model, inputs)
    for block in model.single_transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    fuse(model)
    assert error(output_of(model, inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == 2
    assert "compiled" in caplog.text


@pytest.mark.parametrize("inference", [True, False])
def test_in_and_out_of_inference_mode(fused_anywhere, ran, inference):
    model, inputs = make_quantized(), given()
    expected = output_of(model, inputs)
    fuse(model)
    for mode in (inference, not inference):
        with torch.inference_mode(mode):
            assert error(output_of(model, inputs), expected) <= BOUND[torch.float32]
    assert len(ran) == 8


def test_sums_beyond_float16_are_clipped(fused_anywhere):
    model, inputs = make_quantized(dtype=torch.float16), given(torch.float16)
    for block in blocks_of(model):
        for norm in (getattr(block, name, None) for name in ("norm", "norm1_context")):
            if norm is not None:
                norm.linear.bias.data[-32:] = 60000  # gates
        last = block.proj_out if hasattr(block, "proj_out") else block.ff_context.net[2]
        last.bias.data.copy_(torch.linspace(-3, 3, 32))
    seen, _ = calls_of_blocks(model, inputs)
    fuse(model)
    for block, kwargs, outputs in (seen[0], seen[2]):
        with torch.no_grad():
            for mine, theirs in zip(block(**kwargs), outputs, strict=True):
                assert mine.isfinite().all()
                assert error(mine, theirs) <= BOUND[torch.float16]
    assert (seen[0][2][0].abs() == 65504).any()
    assert (seen[2][2][0].abs() == 65504).any()


def test_refusals():
    with pytest.raises(ModelError, match=r"no block of this transformer can run fused: .* not a QuantLinear"):
        fuse(quantize_model(make_tiny(NAME), skip_patterns=["blocks.0", "blocks.1"]))
    with pytest.raises(ModelError, match="is not quantized"):
        fuse(make_tiny(NAME))
    with pytest.raises(ConfigError, match="step_ranges are for a DiT"):
        fuse(make_quantized(), step_ranges=StepRanges(torch.ones(1), {"proj_out": torch.ones(1)}, {}))
