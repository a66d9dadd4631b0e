"""graph(model, pipe=pipe): modulations of a run are computed at its first step, and are never those of another."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from qandc import (
    CacheConfig,
    ConfigError,
    ModelError,
    QuantLinear,
    apply_cache,
    calibrate,
    fuse,
    get_cache,
    graph,
    quantization_report,
    quantize_model,
    remove_cache,
    ungraph,
)
from qandc.fusion import modulations
from qandc.fusion.model_graph import Graphed
from qandc.models import family_of
from tests.tiny_models import each_class, inputs_of, make_tiny, output_of

FLUX, QWEN, STABLE = "FluxTransformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel"
PIPELINES = {FLUX: "FluxPipeline", QWEN: "QwenImagePipeline", STABLE: "StableDiffusion3Pipeline"}
NAMES = ("norm.linear", "norm1.linear", "norm1_context.linear", "_mod.1")  # of modulation layers
TIMES = (900.0, 600.0, 300.0, 100.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # RMSNorm under autocast
]


def modulation_layers(model):
    return [module for name, module in model.named_modules() if name.endswith(NAMES)]


@pytest.fixture
def computed(monkeypatch):
    """Products of all layers."""
    calls = Counter()

    def counted(original):
        return lambda self, x: calls.update([self]) or original(self, x)

    for kind in (nn.Linear, QuantLinear):
        monkeypatch.setattr(kind, "forward", counted(kind.forward))
    return calls


class Pipe:
    """Hold the scheduler of a run, as pipelines do."""

    def __init__(self, times=TIMES, device="cpu"):
        self.scheduler = type("Scheduler", (), {"timesteps": torch.tensor(times, device=device)})()

    def call(self, i, name=FLUX, **others):
        """Give the arguments of step i as the pipeline of that class does."""
        given = {**inputs_of(name), **others}
        x, time = given["hidden_states"], self.scheduler.timesteps[i]
        timestep = time.expand(len(x)) if name == STABLE else time.expand(len(x)).to(x.dtype) / 1000
        return {**given, "timestep": timestep}


def assert_near(actual, expected):
    """Compare but for a code of int8 that rounding, other for many rows than for few, has moved to the next."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conditioning", [None, "W8A16", "W4A16"])
@each_class(PIPELINES)
def test_pipelines_compute_them_once_in_a_run(name, conditioning, computed):
    pytest.importorskip("transformers")
    from tests.tiny_pipelines import draw, make_pipeline

    pipe = make_pipeline(PIPELINES[name])
    quantize_model(pipe.transformer, conditioning=conditioning)
    more = {"negative_prompt": " ", "true_cfg_scale": 4.0} if name == QWEN else {}
    prompts = "a red coat", "a blue sneaker and a hat"
    expected = [draw(pipe, prompt, 4, **more) for prompt in prompts]
    graph(pipe.transformer, pipe=pipe)
    for runs, prompt in enumerate(prompts, 1):
        computed.clear() if runs == 1 else None
        assert_near(draw(pipe, prompt, 4, **more), expected[runs - 1])
        assert {computed[layer] for layer in modulation_layers(pipe.transformer)} == {runs}


def test_two_passes_with_prompts_of_their_own(computed):
    pytest.importorskip("transformers")
    from tests.tiny_pipelines import draw, make_pipeline

    pipe = make_pipeline("FluxPipeline")
    more = {"negative_prompt": "a bag", "true_cfg_scale": 3.0, "num_images_per_prompt": 2}
    expected = draw(pipe, "a red coat", 4, **more)
    graph(pipe.transformer, pipe=pipe)
    computed.clear()
    assert_near(draw(pipe, "a red coat", 4, **more), expected)
    assert {computed[layer] for layer in modulation_layers(pipe.transformer)} == {2}


@pytest.fixture
def model():
    return quantize_model(make_tiny(FLUX), conditioning="W8A16")


def write_to_the_prompt(call):
    call["pooled_projections"].mul_(2)
    return call


OTHERS = {
    "timestep": lambda call: {**call, "timestep": call["timestep"] * 0.99},
    "one row's timestep": lambda call: {**call, "timestep": call["timestep"] * torch.tensor([1, 0.99])},
    "NaN": lambda call: {**call, "timestep": call["timestep"] * float("nan")},
    "prompt, in place": write_to_the_prompt,
    "guidance, in place": lambda call: {**call, "guidance": call["guidance"].add_(1)},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_step_of_other_values_computes_its_own(model, computed, other, after):
    pipe, shared = Pipe(), inputs_of(FLUX)
    graph(model, pipe=pipe)
    for i in range(after):
        output_of(model, pipe.call(i, **shared))
    call = OTHERS[other](pipe.call(after, **shared))
    computed.clear()
    found = output_of(model, call)
    assert {computed[layer] for layer in modulation_layers(model)} == {1 if after or "place" in other else 2}
    torch.testing.assert_close(found, output_of(ungraph(model), call), rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
def test_runs_with_other_tensors_have_rows_of_their_own(model, computed):
    plain, pipe = copy.deepcopy(model), Pipe()
    layers = modulation_layers(graph(model, pipe=pipe))
    texts = [inputs_of(FLUX, seed=seed) for seed in range(3)]
    half = {key: value[:1] if "ids" not in key else value for key, value in texts[0].items()}
    for times, runs in ((TIMES, texts), (TIMES[::-1], texts[:1]), ((700.0, 50.0), [half, texts[1]])):
        pipe.scheduler.timesteps = torch.tensor(times)
        computed.clear()
        for i in range(len(times)):
            for run in runs:
                call = pipe.call(i, **run)
                assert_near(output_of(model, call), output_of(plain, call))
        assert {computed[layer] for layer in layers} == {len(runs)}


@pytest.mark.parametrize("one", ["timestep", "guidance", "pooled_projections"])
def test_one_value_serves_all_rows(model, computed, one):
    plain, pipe = copy.deepcopy(model), Pipe()
    graph(model, pipe=pipe)
    call = pipe.call(1)
    call[one] = call[one][:1]
    expected = output_of(plain, call)
    computed.clear()
    assert_near(output_of(model, call), expected)
    assert {computed[layer] for layer in modulation_layers(model)} == {1}  # for all steps


@torch.no_grad()
def test_batches_and_dtypes_of_one_run():
    """Qwen-Image's modulations depend on nothing else, so no other tensor tells such steps apart."""
    plain, pipe = make_tiny(QWEN), Pipe()
    model, first = graph(copy.deepcopy(plain), pipe=pipe), inputs_of(QWEN)
    one = {**first, "img_shapes": first["img_shapes"][:1]}
    one |= {key: value[:1] for key, value in first.items() if isinstance(value, torch.Tensor)}
    for given in (first, one, first):
        assert_near(output_of(model, pipe.call(1, QWEN, **given)), output_of(plain, pipe.call(1, QWEN, **given)))


CHANGES = {
    "bias, in place": lambda model: modulation_layers(model)[-1].bias.mul_(3),
    "loaded": lambda model: model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}),
    "embedder": lambda model: model.time_text_embed.text_embedder.linear_1.weight.mul_(2),
    "weight": lambda model: setattr(modulation_layers(model)[1], "weight", nn.Parameter(torch.ones(192, 32))),
    "layer": lambda model: setattr(model.transformer_blocks[0].norm1, "linear", nn.Linear(32, 192)),
    "other size": lambda model: setattr(model.transformer_blocks[1].norm1, "linear", nn.Linear(32, 192, bias=False)),
    "moved": lambda model: nn.Module.float(nn.Module.half(model)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_change_within_a_run(change, computed):
    model, pipe, shared = make_tiny(FLUX), Pipe(), inputs_of(FLUX)
    graph(model, pipe=pipe)
    output_of(model, pipe.call(0, **shared))
    CHANGES[change](model)
    computed.clear()
    call = pipe.call(1, **shared)
    found = [output_of(model, call) for _ in range(3)]
    # a step computes its own, the next one a new table; where a layer was replaced, that of the others is right
    assert computed[modulation_layers(model)[-1]] == (0 if change in ("layer", "other size") else 2)
    expected = output_of(ungraph(model), call)
    for output in found:
        assert_near(output, expected)


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("mode", ["delta", "branch"])
@each_class(PIPELINES)
def test_fused_and_cached(fused_anywhere, computed, name, mode, offloads):
    """No step that computes, after the first, reads weights of modulation; none that reuses where they are away."""
    model = quantize_model(make_tiny(name), conditioning="W8A16")
    calibrate(model, [inputs_of(name, time) for time in (0.9, 0.1)])
    pipe, shared = Pipe(), inputs_of(name)
    calls, config = [pipe.call(i, name, **shared) for i in range(4)], CacheConfig(mode, interval=2)
    apply_cache(fuse(model), config=config)
    expected = [output_of(model, call) for call in calls]
    remove_cache(model)
    apply_cache(graph(model, pipe=pipe), config=config)
    Graphed.of(model).offloads = offloads
    gated_by = tuple(name for stack in family_of(model).stacks for name in stack.gated_by)
    gates = [m for name, m in model.named_modules() if m in modulation_layers(model) and name.split(".")[2] in gated_by]
    for i, call in enumerate(calls):
        computed.clear()
        assert_near(output_of(model, call), expected[i])
        own = gates if i % 2 and mode == "branch" and not offloads else []
        expected_of = {layer: int(i == 0 or layer in own) for layer in modulation_layers(model)}
        assert {layer: computed[layer] for layer in modulation_layers(model)} == expected_of
    assert (get_cache(model).compute_steps, get_cache(model).reuse_steps) == (2, 2)


def test_tables_that_are_too_large_are_not_made(model, monkeypatch, caplog, computed):
    monkeypatch.setattr(modulations, "LARGEST", 4 * 1920 * 4 - 1)
    pipe, shared = Pipe(), inputs_of(FLUX)
    graph(model, pipe=pipe)
    for i in range(2):
        pipe.scheduler.timesteps = torch.tensor(TIMES)  # another run
        output_of(model, pipe.call(i, **shared))
    assert {computed[layer] for layer in modulation_layers(model)} == {2}
    assert caplog.text.count("modulations of a run of 4 steps and 2 rows would take") == 1


def test_models_and_calls_that_have_none(model, computed):
    call, pipe = inputs_of(FLUX), Pipe()
    graph(model, pipe=pipe)
    for change in ("autocast", "gradients", "no timesteps", "no pipe"):
        if change == "no timesteps":
            pipe.scheduler.timesteps = None
        if change == "no pipe":
            pipe = None
        computed.clear()
        with torch.autocast("cpu", enabled=change == "autocast"), torch.set_grad_enabled(change == "gradients"):
            model(**call)
        assert {computed[layer] for layer in modulation_layers(model)} == {1}
    other = graph(make_tiny("PixArtTransformer2DModel"), pipe=(pipe := Pipe()))
    output_of(other, inputs_of("PixArtTransformer2DModel"))
    with pytest.raises(ModelError, match="pipe is the pipeline that runs the model; this Linear has no scheduler"):
        graph(make_tiny(FLUX), pipe=nn.Linear(2, 2))


def test_they_come_off_and_copies_have_none(model, computed):
    classes, keys = [type(part) for part in model.modules()], [set(part.__dict__) for part in model.modules()]
    pipe, shared = Pipe(), inputs_of(FLUX)
    graph(model, pipe=pipe)
    output_of(model, pipe.call(0, **shared))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        computed.clear()
        output_of(other, pipe.call(1, **shared))
        assert {computed[layer] for layer in modulation_layers(other)} == {1}
        assert [type(part) for part in ungraph(other).modules()] == classes
    ungraph(model)
    assert [type(part) for part in model.modules()] == classes
    assert [set(part.__dict__) for part in model.modules()] == keys


def a_hook_of_a_layer(model):
    modulation_layers(model)[0].register_forward_hook(lambda module, args, output: 2 * output)


def a_hook_of_a_block(model):
    def change(module, args, kwargs):
        return args, {**kwargs, "temb": 2 * kwargs["temb"]}

    model.transformer_blocks[1].register_forward_pre_hook(change, with_kwargs=True)


def a_compiled_block(model):
    model.transformer_blocks[0].compile(backend="eager", fullgraph=True)


def another_activation(model):
    model.transformer_blocks[0].norm1.silu = nn.GELU()


def another_block(model):
    block = model.transformer_blocks[0]

    class Other(type(block)):
        def forward(self, *args, temb, **kwargs):
            return super().forward(*args, temb=2 * temb, **kwargs)

    block.__class__ = Other


def another_model(model):
    class Other(type(model)):
        def forward(self, *args, pooled_projections, **kwargs):
            return super().forward(*args, pooled_projections=2 * pooled_projections, **kwargs)

    model.__class__ = Other


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (another_activation, 5),
        (another_block, 4),
        (another_model, 0),
        pytest.param(a_compiled_block, 4, marks=pytest.mark.slow),
    ],
)
def test_what_makes_its_modulations_otherwise_is_left_alone(model, change, left):
    pipe, shared = Pipe(), inputs_of(FLUX)
    change(model)
    graph(model, pipe=pipe)
    assert len(modulations.attached(model)) == left
    found = [output_of(model, pipe.call(i, **shared)) for i in range(2)]
    assert_near(found[1], output_of(ungraph(model), pipe.call(1, **shared)))


@pytest.mark.parametrize(
    "change", [a_hook_of_a_layer, a_hook_of_a_block, pytest.param(a_compiled_block, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("when", [0, 1])
def test_hooks_and_compiled_blocks(model, change, when):
    pipe, shared = Pipe(), inputs_of(FLUX)
    graph(model, pipe=pipe)
    for i in range(3):
        if i == when:
            change(model)
        found = output_of(model, pipe.call(i, **shared))
    assert_near(found, output_of(ungraph(model), pipe.call(2, **shared)))


def test_threads_have_rows_of_their_own(model):
    plain, pipe, texts = copy.deepcopy(model), Pipe(), [inputs_of(FLUX, seed=seed) for seed in range(2)]
    graph(model, pipe=pipe)

    def draw(text):
        return [output_of(model, pipe.call(i, **text)) for i in range(4)]

    with ThreadPoolExecutor(2) as threads:
        for outputs, text in zip(threads.map(draw, texts), texts, strict=True):
            for i, output in enumerate(outputs):
                assert_near(output, output_of(plain, pipe.call(i, **text)))


@pytest.mark.parametrize("kind", [nn.Linear, QuantLinear])
def test_a_layer_whose_tensors_are_elsewhere_computes_where_its_input_is(kind):
    model = make_tiny(FLUX) if kind is nn.Linear else quantize_model(make_tiny(FLUX), conditioning="W8A16")
    graph(model, pipe=Pipe())
    layer = modulation_layers(model)[1]
    assert isinstance(layer, kind)
    held = dict(layer.state_dict())
    there = modulations._on(layer, torch.device("meta"))
    assert {tensor.device.type for tensor in there.state_dict().values()} == {"meta"}
    with torch.no_grad():
        assert layer(torch.ones(2, 32, device="meta")).device.type == "meta"
        assert modulations._on(layer, torch.device("cpu")) is layer
        assert all(torch.equal(tensor, held[name]) for name, tensor in layer.state_dict().items())


def test_what_cannot_be_offloaded(model, caplog):
    with pytest.raises(ConfigError, match="offload_modulation needs pipe="):
        graph(model, offload_modulation=True)
    graph(model, pipe=Pipe(), offload_modulation=True)  # on a CPU
    assert "nothing is offloaded: no modulation layers on a GPU" in caplog.text
    ungraph(model)


def _on_gpu(name):
    """Make a model that is large enough for fused blocks, fused, and calls of two runs."""
    size = {"num_attention_heads": 3, "attention_head_dim": 64}
    size |= {"caption_projection_dim": 192} if name == STABLE else {"axes_dims_rope": (16, 24, 24)}
    model = quantize_model(make_tiny(name, **size), conditioning="W8A16")
    calibrate(model, [inputs_of(name, time) for time in (0.9, 0.1)])
    pipe, shared = Pipe(device="cuda"), [inputs_of(name, seed=seed) for seed in range(2)]
    for run in shared:
        run |= {key: value.cuda().bfloat16() for key, value in run.items() if isinstance(value, torch.Tensor)}
    calls = [pipe.call(i, name, **run) for i in range(4) for run in shared]
    return fuse(model.cuda().bfloat16()), pipe, calls


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_weights_in_host_memory(name):
    """Offload the weights of modulation: outputs stay the same, and ``ungraph`` moves the weights back."""
    model, pipe, calls = _on_gpu(name)
    calls.append({**calls[0], "timestep": calls[0]["timestep"] * 0.5})  # in no table

    def draw(**options):
        graph(model, pipe=pipe, **options)
        return [output_of(model, call) for call in calls]

    expected = draw()
    ungraph(model)
    found = draw(offload_modulation=True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    tensors = [tensor for layer in modulations.offloaded(model) for tensor in layer.state_dict().values()]
    assert tensors
    assert all(tensor.is_pinned() for tensor in tensors)
    assert sum(tensor.is_cpu for tensor in model.state_dict().values()) == len(tensors)
    assert Graphed.of(model).graphs.captures == 1
    assert all(row.kernel.startswith("triton") for row in quantization_report(model).quantized)
    for each in (copy.deepcopy(model), model):
        assert all(tensor.is_cuda for tensor in ungraph(each).state_dict().values())
        assert torch.equal(output_of(each, calls[-1]), expected[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_graphs_of_fused_models(name):
    model, pipe, calls = _on_gpu(name)
    graph(model)
    calls.append({**calls[0], "timestep": calls[0]["timestep"] * 0.5})  # in no table
    expected = [output_of(model, call) for call in calls]
    graph(ungraph(model), pipe=pipe)
    for call, output in zip(calls, expected, strict=True):
        found = output_of(model, call)
        assert (found - output).float().norm() <= 0.05 * output.float().norm()
    assert Graphed.of(model).graphs.captures == 2  # with rows, and without
    assert torch.equal(found, output)
