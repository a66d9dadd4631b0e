"""wardrobe by its name: size, scenes and settings that come with it; a small pipeline stands in its place."""

from __future__ import annotations

import copy
import importlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import qandc.method.saved
import qandc.sampling.pipelines
from qandc import ConfigError, ModelError, Preset, QuantConfig, load, load_pipeline, optimize, restore, wardrobe_path
from qandc.cli.main import main
from qandc.evaluation.judge import Judge, score_scenes
from qandc.evaluation.scenes import VOCABULARY, Garment, draw_scenes
from qandc.experiments.prompts import EXAMPLES, PromptsConfig
from qandc.quantization.conversion import quant_layers
from qandc.sampling.prompts import call_arguments, draw_prompt

pytest.importorskip("transformers")
import diffusers

from tests.test_readme import run as run_snippet
from tests.test_readme import snippet
from tests.tiny_models import make_tiny
from tests.tiny_pipelines import make_pipeline

SHIPPED = qandc.sampling.pipelines.ASSETS
RUN = ("--steps", 6, "--device", "cpu")
RESOLVED = {"height": 64, "width": 64, "max_sequence_length": 64}  # what commands give the pipeline


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Assets with the small FLUX.1 as wardrobe."""
    path = tmp_path_factory.mktemp("assets")
    for name in ("fashion-dit", "fashion-dit-presets"):
        (path / name).symlink_to(qandc.sampling.pipelines.ASSETS / name)
    pipe = make_pipeline("FluxPipeline")
    pipe.vae.register_to_config(sample_size=64)
    pipe.tokenizer_2.model_max_length = 64
    pipe.save_pretrained(path / "wardrobe")
    return path


@pytest.fixture(scope="module")
def presets(assets):
    """Settings for 6 steps, as training/calibrate_wardrobe.py makes them."""
    lengths, encode = set(), diffusers.FluxPipeline.encode_prompt

    def note(*arguments, **named):
        lengths.add(named["max_sequence_length"])
        return encode(*arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(Path(__file__).parents[1] / "training")
        script = importlib.import_module("calibrate_wardrobe")
        patched.setattr(diffusers.FluxPipeline, "encode_prompt", note)
        few = {"images": 3, "pool_images": 2, "samples": 8, "steps": 6, "device": "cpu"}
        script.main(assets / "wardrobe-presets", str(assets / "wardrobe"), **few)
    assert lengths == {64}
    return assets / "wardrobe-presets"


@pytest.fixture(autouse=True)
def wardrobe(assets, monkeypatch):
    for module in (qandc.sampling.pipelines, qandc.method.saved):
        monkeypatch.setattr(module, "ASSETS", assets)
    return assets / "wardrobe"


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_package_without_its_weights_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(qandc.sampling.pipelines, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match=r"^model directory .*wardrobe' does not exist; give a pipeline directory"):
        load_pipeline(wardrobe_path())
    status, _, err = run(capsys, "generate", "--model", "wardrobe", *RUN, "-o", tmp_path / "x.png")
    assert status == 2
    assert err.startswith("qandc: error: model directory ")
    assert len(err.splitlines()) == 1


def test_records_name_shipped_settings_without_the_place_of_the_package(tmp_path):
    places = {None: None, tmp_path: str(tmp_path), SHIPPED / "wardrobe-presets" / "w8a8": "wardrobe-presets/w8a8"}
    for place, name in places.items():
        described = PromptsConfig((), {}, QuantConfig(), None, calibrated=place).described()
        assert (described["calibrated"], described["cache"]) == (name, None)


def test_it_is_loaded_by_its_name(wardrobe, tmp_path, monkeypatch):
    assert wardrobe_path() == wardrobe
    (tmp_path / "wardrobe").mkdir()
    monkeypatch.chdir(tmp_path)  # a directory of that name is ./wardrobe
    for model in ("wardrobe", wardrobe, str(wardrobe)):
        pipe = load_pipeline(model)
        assert call_arguments(pipe, {}) == RESOLVED
    assert qandc.sampling.pipelines.source_of("wardrobe") == "wardrobe"
    for side in ("height", "width"):
        assert call_arguments(pipe, {side: 64}) == RESOLVED
        with pytest.raises(ConfigError, match=rf"^{side} is 32; wardrobe draws 64 x 64 pixels: leave it out$"):
            call_arguments(pipe, {side: 32})
    guided = {**RESOLVED, "true_cfg_scale": 2.0, "negative_prompt": ""}
    assert call_arguments(pipe, {"guidance_scale": 2.0}) == guided
    assert call_arguments(pipe, {"guidance_scale": 2.0, "negative_prompt": "a"}) == {**guided, "negative_prompt": "a"}
    for scale in ({}, {"guidance_scale": 1.0}):
        with pytest.raises(ConfigError, match="negative_prompt is not read without guidance; give a guidance_scale"):
            call_arguments(pipe, {"negative_prompt": "a", **scale})
    assert call_arguments(make_pipeline("FluxPipeline"), {"height": 32}) == {"height": 32}


class Perfect(Judge):
    """A judge that finds what was asked for in the first pictures, and in later ones another dress."""

    calls = 0

    def find_garments(self, images):
        assert images.shape == (4, 3, 64, 64)
        Perfect.calls += 1
        found = [list(scene.asked) for scene in EXAMPLES]
        if Perfect.calls > 1:
            found[0][0] = Garment("dress", "pink", "left")
        return found


def test_generate_without_a_prompt_draws_scenes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "load", Perfect)
    assert all(set(scene.caption.replace(",", " ,").split()) <= set(VOCABULARY) for scene in EXAMPLES)
    target, record = tmp_path / "x.png", tmp_path / "x.json"
    command = ("generate", "--model", "wardrobe", *RUN, "-o", target, "--json", record)
    status, out, err = run(capsys, *command)
    assert status == 0
    assert "W8A8 + taylor cache 3 " in out  # settings of other runs are not used
    right = "says the judge: objects 100%, colours {0}, places 100%, everything {0}, recall {1}\n"
    assert f"right in FP, {right.format('100%', '100%')}" in out
    assert f"right in W8A8 + taylor cache 3, {right.format('75%', '89%')}" in out
    result = json.loads(record.read_text())
    settings = result["settings"]
    assert [row["right"]["everything"] for row in result["rows"]] == [1, 0.75]
    assert settings["prompts"] == [scene.caption for scene in EXAMPLES]
    assert settings["arguments"] == {**RESOLVED, "num_inference_steps": 6}
    with Image.open(target) as picture:
        assert picture.width >= 4 * 112
    status, _, err = run(capsys, *command, "--height", 32)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "height is 32; wardrobe draws 64 x 64 pixels: leave it out" in err
    status, _, err = run(capsys, *command, "--prompts", "/dev/null")
    assert "FluxPipeline draws from prompts; give --prompt" in err
    status, _, err = run(capsys, "sample", "--model", "wardrobe", "-n", 2, "-o", tmp_path / "x.npz")
    assert "FluxPipeline draws from prompts; give --prompt" in err


def test_without_transformers_one_line_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, "generate", "--model", "wardrobe", "-o", tmp_path / "x.png")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "pip install 'qandc-kernels[text]'" in err


def test_fashion_dit_has_a_name_too(capsys, tmp_path):
    command = ("sample", "--model", "fashion-dit", "-n", 2, "--steps", 3, "-o", tmp_path / "x.npz")
    assert "--steps is 3, but the settings that come with fashion-dit are for 50" in run(capsys, *command)[2]
    command = ("generate", "--model", "fashion-dit", "--prompt", "a coat", "-o", tmp_path / "x.png")
    assert "--prompt is for models that draw from prompts, and DiTPipeline draws classes" in run(capsys, *command)[2]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [None, "w8a8", "w4a8"])
def test_the_shipped_pipeline_draws_what_it_is_told(settings):
    """Draw six scenes with the shipped pipeline, as it is or with its settings: a judge finds five or more as asked."""
    assert sum(path.stat().st_size for path in (SHIPPED / "wardrobe").rglob("*") if path.is_file()) <= 18e6
    pipe = diffusers.FluxPipeline.from_pretrained(SHIPPED / "wardrobe")
    pipe.set_progress_bar_config(disable=True)
    if settings:
        directory = SHIPPED / "wardrobe-presets" / settings
        assert sum(path.stat().st_size for path in directory.iterdir()) < 1e6
        assert "steps to compute" in " ".join(str(optimize(pipe, calibrated=directory)).split())
    judge = Judge.load()
    for held_out in (False, True):
        scenes = draw_scenes(6, 0, held_out)
        noise = torch.Generator().manual_seed(0)
        captions = [scene.caption for scene in scenes]
        pictures = pipe(captions, height=64, width=64, max_sequence_length=64, generator=noise, output_type="pt").images
        scores = score_scenes(judge, pictures * 2 - 1, scenes)
        assert sum(scores.everything) >= 5


@pytest.mark.slow
def test_the_snippet_of_its_page(presets):
    names = run_snippet(
        snippet(": wardrobe", "docs/wardrobe.md"), {"64}  # the": '64, "num_inference_steps": 6}  # the'}
    )
    image, faster = (np.asarray(names[name], float) for name in ("image", "faster"))
    assert image.shape == (64, 64, 3)
    assert 0 < np.abs(image - faster).mean() < 20


def test_what_training_exports_is_loaded_by_every_transformers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    train, model = (importlib.import_module(name) for name in ("train_wardrobe", "wardrobe_model"))
    train.export(model.make_pipeline(), tmp_path / "wardrobe")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 18e6
    assert not [p for p in tmp_path.rglob("*.json") if "TokenizersBackend" in p.read_text()]  # of version 5 alone
    pipe = load_pipeline(tmp_path / "wardrobe")
    assert pipe.tokenizer_2("a velvet dress").input_ids[1] == pipe.tokenizer_2.unk_token_id
    assert call_arguments(pipe, {}) == {"max_sequence_length": 64}


def test_training_from_captions_to_a_pipeline(tmp_path, monkeypatch):
    """T5 learns what is where and is fixed then; a step of the transformer is what the pipeline computes.

    Guidance is learned last.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "training")
    train, model = (importlib.import_module(name) for name in ("train_wardrobe", "wardrobe_model"))
    settings = train.Settings(scenes=16, reader_steps=2, steps=2, guidance_steps=2, batch=2, long_text=0.0)
    *garments, words = train.draw_all_scenes(settings, tmp_path / "scenes.pt")
    black = SimpleNamespace(draw=lambda kinds, *rest: torch.zeros(len(kinds), 3, 64, 64))
    source = train.Source((*garments, words), black, torch.device("cpu"))
    drawn, stage = [], train.Stage

    def noted(name, module, draw, *rest, **named):
        return stage(name, module, lambda generator: drawn.append(draw(generator)) or drawn[-1], *rest, **named)

    monkeypatch.setattr(train, "Stage", noted)
    monkeypatch.setattr(train, "autocast", lambda device: nullcontext())
    t5 = train.train_reader(source, settings, tmp_path, compile_model=False, batch=4)
    for word, target in zip(*drawn[0], strict=True):
        scene = next(i for i in range(16) if torch.equal(words[i].long(), word))
        kinds, colours, places = (part[scene].long() for part in garments)
        expected = {int(p): int(8 * k + c) for k, c, p in zip(kinds, colours, places, strict=True) if p >= 0}
        assert {place: int(found) for place, found in enumerate(target) if found != 64} == expected

    before = copy.deepcopy(t5.state_dict())
    vae = model.make_vae()
    pipe = train.train_transformer(vae, t5, source, settings, tmp_path, compile_model=False)
    *given, target = drawn[-1]
    unguided = replace(settings, guidance_steps=0)  # goes on where the transformer was trained
    (tmp_path / "guidance.pt").unlink()
    teacher = train.TextToImage(train.train_transformer(vae, t5, source, unguided, tmp_path, compile_model=False))
    noised, sigma, words, text = given
    empty = torch.tensor([[pipe.tokenizer_2.eos_token_id] + 63 * [pipe.tokenizer_2.pad_token_id]] * 2)
    free, told = teacher(noised, sigma, empty, train.read(t5, empty)), teacher(*given)
    torch.testing.assert_close(target, free + settings.guidance_scale * (told - free))
    assert not torch.equal(pipe.transformer.proj_out.weight, teacher.transformer.proj_out.weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.text_encoder_2.state_dict().items())
    assert not torch.equal(pipe.transformer.proj_out.weight, model.make_transformer().proj_out.weight)
    pipe.transformer.requires_grad_(False).apply(lambda m: getattr(m, "reset_parameters", int)())  # no zeros
    prompt, sigma, latents = "a red dress on the left", torch.tensor([0.5]), torch.randn(1, 4, 16, 16)
    text, pooled, places = pipe.encode_prompt(prompt, prompt, max_sequence_length=64)
    taught = train.TextToImage(pipe).eval()
    expected = pipe.transformer(train.pack(latents), text, pooled, sigma, taught.img_ids, places, return_dict=False)[0]
    word = pipe.tokenizer_2(prompt, padding="max_length", max_length=64, return_tensors="pt").input_ids
    torch.testing.assert_close(taught(latents, sigma, word, train.read(t5, word)), expected)


def images(pipe, prompts):
    arguments = {**RESOLVED, "num_inference_steps": 6}
    return torch.cat([draw_prompt(pipe, prompt, i, arguments) for i, prompt in enumerate(prompts)])


@pytest.mark.slow
def test_settings_quantize_the_pipeline_s_own_weights(presets, wardrobe):
    prompts = ["a red dress", "two bags"]
    for bits in (8, 4):
        directory = presets / f"w{bits}a8"
        assert sum(path.stat().st_size for path in directory.iterdir()) < 1e6
        pipe = load_pipeline("wardrobe")
        before, transformer = images(pipe, prompts), pipe.transformer
        linears = {name for name, module in transformer.named_modules() if type(module) is torch.nn.Linear}
        plan = optimize(pipe, calibrated=directory, cache=None)
        assert pipe.transformer is transformer
        layers = quant_layers(transformer)
        assert {layer.scheme for layer in layers.values()} == {f"W{bits}A8 static per-tensor", "W8A16 weight-only"}
        assert "steps to compute, compensation of features" in " ".join(str(plan).split())
        found = images(pipe, prompts)
        other = load_pipeline(wardrobe)
        other.transformer = load(directory).model  # of the pipeline that they name
        for name, layer in quant_layers(other.transformer).items():
            assert torch.equal(layer.qweight, layers[name].qweight)
            for held in ("act_scale", "smoothing"):
                mine, theirs = getattr(layer, held), getattr(layers[name], held)
                assert (mine is theirs is None) if layer.weight_only else torch.equal(mine, theirs)
        preset = Preset.load(directory)
        assert preset.model == "wardrobe"
        with pytest.raises(ModelError, match="were made for num_single_layers 2, this one has 1 "):
            preset.quantize(make_tiny("FluxTransformer2DModel", num_single_layers=1))
        with pytest.raises(ModelError, match="ZImageTransformer2DModel has no num_layers"):
            preset.quantize(make_tiny("ZImageTransformer2DModel"))
        qandc.apply_cache(other.transformer, config=preset.schedule.config(), compensation=preset.features)
        torch.testing.assert_close(images(other, prompts), found, atol=1e-3, rtol=0)
        restore(pipe)
        assert {name for name, m in transformer.named_modules() if type(m) is torch.nn.Linear} == linears
        assert torch.equal(images(pipe, prompts), before)


@pytest.mark.slow
def test_commands_use_the_settings_that_come_with_it(capsys, tmp_path, presets):
    measured = json.loads((presets / "likeness.json").read_text())
    assert measured.keys() == {"w8a8", "w4a8"}
    out = ("--device", "cpu", "-o", tmp_path / "x.png")
    command = ("generate", "--model", "wardrobe", "--prompt", "a red dress", *out)
    for options, name in (((), "w8a8"), (("--w-bits", 4, "--steps", 6, "--a-bits", 8), "w4a8")):
        status, text, _ = run(capsys, *command, *options)
        assert status == 0
        assert f"{name.upper()} + taylor, 3 steps " in text
        likeness = f"{measured[name]['psnr_mean']:.1f} dB (worst {measured[name]['psnr_min']:.1f})"
        assert f"PSNR of 3 other images, measured before: {likeness}" in text
        assert "judge" not in text
    for options, name in (
        (("--no-calibrated",), "W8A8 + taylor cache 3"), (("--steps", 5), "W8A8 + taylor cache 3"),
        (("--cache-mode", "taylor"), "W8A8 + taylor cache 3"), (("--cache-interval", 2), "W8A8 + taylor cache 2"),
        (("--a-bits", 7), "W8A7 + taylor cache 3"), (("--guidance-scale", 2), "W8A8 + taylor cache 3"),
    ):  # fmt: skip
        status, text, _ = run(capsys, *command, *options, *(() if "--steps" in options else ("--steps", 6)))
        assert status == 0
        assert f"\n{name} " in text
        assert "measured before" not in text
    copy = tmp_path / "copy"
    Preset.load(presets / "w8a8").save(copy)
    (tmp_path / "likeness.json").write_text("{}")  # of something else
    for command in (("generate", "--calibrated", copy), ("generate", "--model", copy)):  # they name their pipeline
        status, text, _ = run(capsys, *command, "--prompt", "a", *out)
        assert status == 0
        assert "W8A8 + taylor, 3 steps " in text
        assert "measured before" not in text
    sample = ("sample", "--prompt", "a coat", "-n", 1, "--device", "cpu", "--json", tmp_path / "x.json")
    for number, options in enumerate((("--model", "wardrobe"), ("--calibrated", copy))):
        assert run(capsys, *sample, *options, "-o", tmp_path / f"{number}.npz")[0] == 0
        record = json.loads((tmp_path / "x.json").read_text())
        assert "calibrated" in record["rows"][0]["name"]
        assert record["settings"]["num_inference_steps"] == 6
