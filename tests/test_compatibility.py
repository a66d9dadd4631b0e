"""Living with the rest: compilers, offloading and dispatch by accelerate, copies, other processes."""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import diffusers.models.modeling_utils
import pytest
import torch
import torch._dynamo.testing

from qandc import (
    ModelError,
    QandCConfig,
    apply_cache_to_dit,
    fuse_dit,
    load_pipeline,
    quantization_report,
    quantize_model,
    save_quantized,
)
from qandc.quantization.conversion import quant_layers
from tests.conftest import make_dit
from tests.test_saved_models import all_tensors, make_quantized, output

KINDS = pytest.mark.parametrize(
    ("w_bits", "how"), [(8, []), (4, ["static", "smoothing"])], ids=["W8A8 dynamic", "W4A8 static smoothing"]
)
PARTS = ("pos_embed", "transformer_blocks.0", "transformer_blocks.1", "norm_out", "proj_out_1", "proj_out_2")


@pytest.fixture(autouse=True)
def _nothing_compiled_stays():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True], ids=["quantized", "loaded by diffusers"])
def test_a_static_model_compiles_without_graph_break(tmp_path, dit_inputs, loaded):
    """The drop-in path; that of dynamic ranges is in test_conversion."""
    model = make_quantized(4, how=["static", "smoothing"])
    if loaded:
        model.save_pretrained(tmp_path / "saved")
        model = type(model).from_pretrained(tmp_path / "saved")
    expected = output(model, dit_inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, dit_inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_blocks_compiled_in_place_share_their_graphs(dit_inputs):
    """As ``compile_repeated_blocks`` of diffusers does it."""
    model = make_quantized(8, how=["static"], num_layers=4)
    expected = output(model, dit_inputs)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(output(model, dit_inputs), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2  # for the strides of the first block and of the others, as unquantized


def run_pipeline(pipe):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    return pipe([3, 7], num_inference_steps=3, guidance_scale=1.5, output_type="np").images


@pytest.fixture(params=[[], ["static"]], ids=["dynamic", "static"])
def gpu_pipeline(request):
    """On the CPU; quantized, with or without static ranges."""
    pipe = load_pipeline(dtype=torch.float32)
    quantize_model(pipe.transformer)
    for layer in quant_layers(pipe.transformer).values() if request.param else ():
        layer.set_static_range(torch.tensor(0.05), torch.tensor(3))
    return pipe


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_by_diffusers(gpu_pipeline, method):
    expected = run_pipeline(copy.deepcopy(gpu_pipeline).to("cuda"))
    getattr(gpu_pipeline, method)()
    assert abs(run_pipeline(gpu_pipeline) - expected).max() < 1e-4
    if method == "enable_model_cpu_offload":
        gpu_pipeline.maybe_free_model_hooks()
        assert {t.device.type for t in all_tensors(gpu_pipeline.transformer).values()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, {**dict.fromkeys(PARTS, 0), "transformer_blocks.1": "cpu"}])
def test_device_maps_of_a_gpu(tmp_path, dit_inputs, device_map):
    model = make_quantized(4, how=["static"])
    model.save_pretrained(tmp_path / "saved")
    found = type(model).from_pretrained(tmp_path / "saved", device_map=device_map)
    inputs = {name: tensor.cuda() for name, tensor in dit_inputs.items()}
    torch.testing.assert_close(output(found, inputs), output(model.cuda(), inputs), atol=1e-5, rtol=1e-5)
    model = make_dit(num_layers=2)
    model.save_pretrained(tmp_path / "full")
    found = type(model).from_pretrained(tmp_path / "full", device_map=device_map, quantization_config=QandCConfig())
    expected = output(quantize_model(model.cuda()), inputs)
    torch.testing.assert_close(output(found, inputs), expected, atol=1e-5, rtol=1e-5)


@KINDS
def test_what_diffusers_adds_up_before_it_loads_to_a_gpu(tmp_path, dit_inputs, monkeypatch, w_bits, how):
    """It asks each tensor that it expects for its size, those too that a checkpoint may lack."""
    model = make_quantized(w_bits, how=how)
    model.save_pretrained(tmp_path)
    asked = []

    def warm_up(model, device_map, *args):
        tensors = all_tensors(model)
        asked.extend(tensors[name].numel() for name in device_map)

    monkeypatch.setattr(diffusers.models.modeling_utils, "_caching_allocator_warmup", warm_up)
    found = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert asked
    assert torch.equal(output(found, dit_inputs), output(model, dit_inputs))
    assert all_tensors(found).keys() == all_tensors(model).keys()


@KINDS
def test_what_accelerate_dispatched_it_takes_back(tmp_path, dit_inputs, monkeypatch, w_bits, how):
    """It notes the device of every buffer that it finds, and wants them all there when it is done."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = make_quantized(w_bits, how=how)
    model.save_pretrained(tmp_path)
    # as for a GPU, which diffusers dispatches to before it is done with the quantizer
    monkeypatch.setattr(
        diffusers.models.modeling_utils, "dispatch_model", lambda m, **_: cpu_offload(m, torch.device("cpu"))
    )
    found = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(output(found, dit_inputs), output(model, dit_inputs))
    remove_hook_from_submodules(found)
    assert torch.equal(output(found, dit_inputs), output(model, dit_inputs))


@KINDS
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_sequential_offload(dit_inputs, w_bits, how, offload_buffers):
    """accelerate's cpu_offload, which diffusers calls: each layer comes when it is called, and goes."""
    from accelerate import cpu_offload

    model = make_quantized(w_bits, how=how)
    expected = output(model, dit_inputs)
    cpu_offload(model, torch.device("cpu"), offload_buffers=offload_buffers)
    assert model.transformer_blocks[0].attn1.to_q.bias.is_meta
    assert model.transformer_blocks[0].attn1.to_q.qweight.is_meta is offload_buffers  # diffusers leaves buffers there
    with torch.no_grad():
        assert torch.equal(model(**dit_inputs).sample, expected)


@KINDS
def test_dispatch_with_layers_on_the_disk(tmp_path, dit_inputs, w_bits, how):
    from accelerate import dispatch_model

    model = make_quantized(w_bits, how=how)
    expected = output(model, dit_inputs)
    device_map = {**dict.fromkeys(PARTS, "cpu"), "transformer_blocks.1": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, offload_buffers=True)
    assert model.transformer_blocks[1].ff.net[2].qweight.is_meta
    assert any("transformer_blocks.1.ff.net.2.qweight" in path.name for path in tmp_path.iterdir())
    with torch.no_grad():
        assert torch.equal(model(**dit_inputs).sample, expected)


def test_an_offloaded_model_is_reported_not_saved(tmp_path):
    from accelerate import cpu_offload

    model = make_quantized()
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert "on the meta device" in str(quantization_report(model))
    with pytest.raises(ModelError, match=r"on the meta device and has no values; .*undo the offloading"):
        save_quantized(model, tmp_path / "saved")


def test_an_offloaded_model_is_not_quantized():
    """Hooks would be lost with the layers that have them."""
    from accelerate import cpu_offload

    model = make_dit()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ModelError, match="has hooks or a replaced forward, which would be lost; remove them first"):
        quantize_model(model)


@KINDS
def test_a_copy_shares_nothing(dit_inputs, w_bits, how):
    model = make_quantized(w_bits, how=how)
    expected = output(model, dit_inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, dit_inputs), expected)
    theirs = all_tensors(copied)
    for name, tensor in all_tensors(model).items():
        assert tensor.numel() == 0 or tensor.data_ptr() != theirs[name].data_ptr(), name
    for layer in quant_layers(copied).values():
        layer.weight_scale.mul_(2)
        layer.set_static_range(None)
    assert torch.equal(output(model, dit_inputs), expected)
    assert not torch.allclose(output(copied, dit_inputs), expected)


def test_a_copy_of_a_model_that_diffusers_loaded(tmp_path, dit_inputs):
    make_quantized(4).save_pretrained(tmp_path / "saved")
    model = type(make_dit()).from_pretrained(tmp_path / "saved")
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, dit_inputs), output(model, dit_inputs))


def outputs_elsewhere(model, directory, inputs):
    """Of a model that was sent, and of one that was saved; runs in another process, which has imported nothing yet."""
    from diffusers import DiTTransformer2DModel

    sent = [output(model, inputs) for model in (model, DiTTransformer2DModel.from_pretrained(directory))]
    return [sample.numpy() for sample in sent]


@pytest.mark.slow
def test_a_spawned_process(tmp_path, dit_inputs):
    """Load a fused, cached model from a pickle in a process that has derived no class yet; and it by its path."""
    model = make_quantized(4, how=["static", "smoothing"])
    expected = output(model, dit_inputs).numpy()
    model.save_pretrained(tmp_path / "saved")
    apply_cache_to_dit(fuse_dit(model), 2)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(outputs_elsewhere, model, tmp_path / "saved", dit_inputs).result(timeout=60)
    assert all((sample == expected).all() for sample in found)
