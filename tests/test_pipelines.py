"""Loading pipelines, and the embedded one: what it must be for anybody who loads it without us."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qandc import ConfigError, DeviceError, ModelError, fashion_dit_path, load_pipeline, quantize_model, wardrobe_path
from qandc.evaluation.metrics import class_accuracy, extract_features, fashion_classifier_path, load_fashion_classifier
from qandc.quantization.conversion import quant_layers
from qandc.sampling.pipelines import class_names, fingerprint, resolve_device, resolve_dtype

LABELS = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def test_embedded_files_are_small_and_plain():
    files = [path for path in fashion_dit_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert max(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    wardrobe = [path for path in wardrobe_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in wardrobe) <= 18e6
    assert {path.suffix for path in wardrobe} <= {".json", ".safetensors", ".md"}
    for settings in wardrobe_path().with_name("wardrobe-presets").glob("*/"):
        assert sum(path.stat().st_size for path in settings.iterdir()) <= 1e6
    classifier = [path for path in fashion_classifier_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in classifier) <= 2e6


@pytest.mark.slow
def test_unmodified_diffusers_runs_the_embedded_pipeline():
    """Ten images by DiTPipeline alone: our classifier recognises the classes that were asked for."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(fashion_dit_path())
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    images = pipe(class_labels=list(range(10)), num_inference_steps=20, guidance_scale=1.5, output_type="np").images
    assert images.shape == (10, 32, 32, 1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    _, logits = extract_features(load_fashion_classifier(), pixels)
    assert class_accuracy(logits, torch.arange(10)) >= 0.8


def test_embedded_labels():
    pipe = load_pipeline()
    assert list(class_names(pipe).values()) == LABELS
    assert pipe.get_label_ids(["Bag"]) == [8]


def test_embedded_weights_are_finite_half_precision():
    for path in fashion_dit_path().rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float16, name
            assert torch.isfinite(tensor).all(), name


def test_dtype_is_that_of_the_transformer_and_the_autoencoder_stays_float32(pipeline_dir):
    pipe = load_pipeline(pipeline_dir, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def test_labels_of_a_pipeline_without_names(pipeline_dir):
    names = class_names(load_pipeline(pipeline_dir))
    assert len(names) == 1000
    assert names[207] == "207"


@pytest.mark.parametrize("name", ["foo/", "/foo", "foo/bar/", "foo"])
def test_what_is_neither_directory_nor_hub_id(name):
    with pytest.raises(ModelError, match=r"does not exist; give a pipeline directory or a hub id \(owner/name\)"):
        load_pipeline(name)


def test_missing_directory():
    with pytest.raises(ModelError, match=r"model directory '\./nowhere' does not exist"):
        load_pipeline("./nowhere")


def test_directory_that_is_no_pipeline(tmp_path):
    with pytest.raises(ModelError, match=r"is not a diffusers pipeline: it has no model_index\.json"):
        load_pipeline(tmp_path)


def test_file_instead_of_directory(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ModelError, match="is a file; give the directory"):
        load_pipeline(tmp_path / "x")


def test_hub_unreachable():
    """The suite runs with HF_HUB_OFFLINE=1: the hub client refuses as it does without a network."""
    with pytest.raises(ModelError, match=r"'owner/model' is no local directory and the hub did not deliver it; check"):
        load_pipeline("owner/model")


def test_damaged_weights(pipeline_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_dir, broken)
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="is damaged or incomplete; compare it with a fresh copy"):
        load_pipeline(broken)


def test_another_kind_of_pipeline(pipeline_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pipeline_dir, other)
    index = json.loads((other / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "AutoencoderKL"]
    shutil.rmtree(other / "transformer")
    shutil.copytree(other / "vae", other / "transformer")
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a DiT pipeline"):
        load_pipeline(other)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta", "mps"):
        with pytest.raises(ConfigError, match="choose auto, cpu, cuda or cuda:N"):
            resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_cuda():
    with pytest.raises(DeviceError, match="'cuda' was asked for, but torch sees no CUDA GPU"):
        resolve_device("cuda")


@pytest.mark.gpu
def test_gpu_that_is_not_here():
    with pytest.raises(DeviceError, match="cuda:99"):
        resolve_device("cuda:99")


def test_dtypes():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        resolve_dtype("int8", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_a_cast_pipeline_are_rounded_once(dtype):
    """Copies too; a weight that has been changed since counts as it is."""
    exact = quantize_model(load_pipeline().transformer)
    pipe = load_pipeline(dtype=dtype)
    model = copy.deepcopy(pipe.transformer)
    changed = "transformer_blocks.0.ff.net.2"
    with torch.no_grad():
        model.get_submodule(changed).weight.neg_()
    quantize_model(model)
    for name, layer in quant_layers(model).items():
        assert layer.weight.dtype == dtype
        if name == changed:
            assert not torch.equal(layer.qweight, exact.get_submodule(name).qweight)
            assert (layer.weight + exact.get_submodule(name).weight).abs().max() < 0.02 * layer.weight.abs().max()
        else:
            assert torch.equal(layer.qweight, exact.get_submodule(name).qweight), name


def holding(tensor, name="weight"):
    module = torch.nn.Module()
    module.register_buffer(name, tensor)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_a_fingerprint_sees_the_order_of_rows_and_columns(dtype):
    weight = torch.arange(64).reshape(8, 8).to(dtype)
    orders = ([1, 0, *range(2, 8)], [2, 1, 0, *range(3, 8)], [3, 2, 1, 0, 7, 6, 5, 4], list(range(7, -1, -1)))
    variants = [weight, weight.t(), *(weight[order] for order in orders), *(weight[:, order] for order in orders)]
    assert len({fingerprint(holding(variant)) for variant in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool, torch.float32])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_fingerprint_is_that_of_the_values_wherever_they_lie(dtype, offset):
    values = torch.arange(20).remainder(3)
    flat = torch.zeros(offset + 8, dtype=dtype)
    flat[offset:] = values[:8]
    assert fingerprint(holding(flat[offset:].view(2, 4))) == fingerprint(holding(values[:8].to(dtype).view(2, 4)))
    every_other = torch.zeros(offset + 16, dtype=dtype)[offset::2]
    every_other[:] = values[:8]
    assert fingerprint(holding(every_other)) == fingerprint(holding(values[:8].to(dtype)))


def test_a_fingerprint_sees_names_shapes_and_dtypes():
    zeros = torch.zeros(4)
    variants = [zeros, zeros.view(2, 2), zeros.int(), zeros[:0], zeros[0]]
    found = [fingerprint(holding(variant)) for variant in variants] + [fingerprint(holding(zeros, "other"))]
    assert len(set(found)) == len(found)


def test_a_fingerprint_means_what_it_meant():
    """Pin the fingerprint of a small model: files store it, and another rule would refuse to go on with them."""
    model = torch.nn.Linear(2, 2).bfloat16()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.bias.zero_()
    assert fingerprint(model) == "6a7dad323a31d2bd"
