"""Compare what pipelines draw from prompts: the command, what it refuses, what it leaves behind."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from qandc import (
    CacheConfig,
    ConfigError,
    ModelError,
    apply_cache,
    load,
    load_pipeline,
    optimize,
    quantize_model,
    restore,
)
from qandc.cli.main import main
from qandc.evaluation.metrics import psnr
from qandc.evaluation.pixels import to_uint8
from qandc.experiments.ablation import ROWS
from qandc.quantization.conversion import quant_layers
from qandc.sampling.prompts import call_arguments, draw_prompt, of_prompts, text_length, warn_of_unread
from tests.tiny_models import make_tiny
from tests.tiny_pipelines import PIPELINES, make_pipeline

SMALL = ("--height", 16, "--width", 16, "--steps", 6, "--device", "cpu")


@pytest.fixture
def index_dir(tmp_path):
    """The index of a pipeline that draws from prompts, and nothing else of it."""
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_compares_what_a_pipeline_draws_from_prompts(capsys, tmp_path, flux_dir):
    file, target, record = tmp_path / "prompts.txt", tmp_path / "x.png", tmp_path / "x.json"
    file.write_text("a blue hat\n\n a bag \n", encoding="utf-8-sig")  # with a mark, as Windows writes it
    status, out, _ = run(
        capsys, "generate", "--model", flux_dir, "--prompt", "a red coat", "--prompts", file, *SMALL, "--seed", 3,
        "--guidance-scale", 2, "--w-bits", 4, "--cache-mode", "branch", "--cache-interval", 2, "-o", target,
        "--json", record,
    )  # fmt: skip
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1].startswith("FP (float32) ")
    assert lines[2].startswith("W4A8 + branch cache 2 ")
    assert lines[3:5] == ["FluxPipeline", "transformer (FluxTransformer2DModel)"]
    assert "cache branch, in a run of 6 steps 3 are computed (*): 0* 1 2* 3 4* 5" in lines
    assert lines[-1] == f"wrote {target}"
    with Image.open(target) as picture:
        assert picture.width >= 3 * 112
        assert picture.height >= 2 * 112
    result = json.loads(record.read_text())
    assert result["settings"]["prompts"] == ["a red coat", "a blue hat", "a bag"]
    full, quantized = result["rows"]
    assert (full["images"], quantized["name"]) == (3, "W4A8 + branch cache 2")

    pipe = load_pipeline(flux_dir)
    pipe.set_progress_bar_config(disable=True)
    given = {"height": 16, "width": 16, "num_inference_steps": 6, "guidance_scale": 2.0}

    def images():
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
        prompts = zip(result["settings"]["prompts"], generators, strict=True)
        made = [pipe(text, generator=noise, output_type="pt", **given).images for text, noise in prompts]
        return torch.cat(made).clamp(0, 1) * 2 - 1

    expected = images()
    apply_cache(quantize_model(pipe.transformer, 4, conditioning="W8A16"), config=CacheConfig("branch", interval=2))
    likeness = psnr(images(), expected)
    assert quantized["psnr_mean"] == pytest.approx(likeness.mean().item(), abs=0.1)
    assert quantized["psnr_min"] == pytest.approx(likeness.min().item(), abs=0.1)


def test_without_options_a_pipeline_has_its_own_steps_and_guidance(capsys, tmp_path, flux_dir, monkeypatch):
    import qandc.experiments.prompts

    seen = []

    def note(pipe, prompt, seed, arguments):
        seen.append((prompt, seed, arguments))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return torch.zeros(1, 3, 16, 16)

    monkeypatch.setattr(qandc.experiments.prompts, "draw_prompt", note)
    target = tmp_path / "x.png"
    status, _, err = run(
        capsys, "generate", "--model", flux_dir, "--prompt", "a", "--prompt", "b", "--device", "cpu", "-o", target
    )
    assert status == 130
    assert f"stopped early; wrote {target}" in err
    assert seen == [("a", 0, {}), ("b", 1, {}), ("a", 0, {})]
    assert target.exists()


REFUSED = {
    "no prompt": ((), "FluxPipeline draws from prompts; give --prompt"),
    "an empty prompt": (("--prompt", "a", "--prompt", " "), "prompt 2 is empty; give text in each"),
    "an empty file": (("--prompts", "/dev/null"), "FluxPipeline draws from prompts; give --prompt"),
    "no file": (("--prompts", "/no/such"), "--prompts '/no/such' cannot be read (No such file or directory)"),
    "no text": (("--prompts", sys.executable), "cannot be read (it is no UTF-8 text)"),
    "classes": (("--prompt", "a", "--classes", "1"), "--classes is for models that draw classes, and FluxPipeline"),
    "a scheduler": (("--prompt", "a", "--scheduler", "ddim"), "--scheduler is for models that draw classes"),
    "smoothing": (("--prompt", "a", "--no-smoothing"), "--no-smoothing is for models that draw classes"),
    "bits": (("--prompt", "a", "--w-bits", "3"), "w_bits is 3"),
    "a height": (("--prompt", "a", "--height", "0"), "--height is 0; give an integer >= 1"),
    "a mode": (("--prompt", "a", "--cache-mode", "all"), "cache mode 'all' is unknown"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_before_a_pipeline_is_loaded(capsys, index_dir, options, message):
    target = index_dir / "x.png"
    status, out, err = run(capsys, "generate", "--model", index_dir, "--device", "cpu", "-o", target, *options)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not target.exists()


@pytest.mark.parametrize("command", [("generate",), ("calibrate",), ("sample", "-n", "2"), ("ablate",)])
@pytest.mark.parametrize("flag", ["--prompt", "--prompts", "--height", "--width", "--negative-prompt"])
def test_models_that_draw_classes_take_no_prompt(capsys, tmp_path, pipeline_dir, command, flag):
    for model in ((), ("--model", pipeline_dir)):
        output = tmp_path / ("x.npz" if command[0] == "sample" else "x.png")
        status, _, err = run(capsys, *command, *model, flag, "7", "-o", output)
        assert status == 2
        assert len(err.splitlines()) == 1
        assert f"{flag} is for models that draw from prompts, and DiTPipeline draws classes" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "FluxPipeline draws from prompts; give --prompt"),
        (("--size", "paper"), "--size is for models that draw classes, and FluxPipeline draws from prompts: leave it"),
        (("--scheduler", "ddim"), "--scheduler is for models that draw classes"),
        (("--clusters", 2), "--clusters is for models that draw classes"),
        (("--vc-samples", 2), "--vc-samples is for models that draw classes"),
        (("--prompt", "a", "--steps", "6"), "images is 1; give an integer >= 2"),
        (("--prompt", "a", "--images", 2, "--steps", "x"), "--steps is 'x'; give numbers, separated by commas"),
    ],
)
def test_what_ablate_refuses_of_prompts(capsys, index_dir, options, message):
    command = ("ablate", "--model", index_dir, "--device", "cpu", "-o", index_dir / "x", *options)
    status, _, err = run(capsys, *command)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (index_dir / "x").exists()


@pytest.mark.slow
def test_ablate_on_prompts(capsys, tmp_path, flux_dir):
    """A file of prompts, two lengths of runs; what the rows are is tested in test_experiment.py."""
    (tmp_path / "prompts.txt").write_text("a coat\n\na hat\n")
    out = tmp_path / "out"
    given = ("--prompts", tmp_path / "prompts.txt", *SMALL, "--guidance-scale", 2, "--pool-images", 1, "--samples", 4)
    given += ("--model", flux_dir, "--cache-interval", 2, "--w-bits", 4, "-o", out)
    status, table, err = run(capsys, "ablate", *given, "--steps", "6,5")
    assert status == 0, err
    summary = json.loads((out / "experiment_summary.json").read_text())
    assert [(row["steps"], row["row"]) for row in summary["rows"]] == [(n, kind.name) for n in (6, 5) for kind in ROWS]
    expected = {
        "prompts": ["a coat", "a hat"], "images": 2, "num_inference_steps": [6, 5], "w_bits": 4, "cache_mode": "taylor",
        "arguments": {"height": 16, "width": 16, "guidance_scale": 2.0},
    }  # fmt: skip
    assert expected.items() <= summary["settings"].items()
    assert (out / "experiment_summary.md").read_text().strip() == table.strip()
    with Image.open(out / "experiment_summary.png") as figure:
        assert min(figure.size) > 300
    assert "holds an ablation of w_bits 4; this one would have 8" in run(capsys, "ablate", *given, "--w-bits", 8)[2]


@pytest.fixture(scope="module")
def calibrated_dir(tmp_path_factory, flux_dir):
    """Return the directory that ``qandc calibrate`` wrote for the small FLUX.1: W4A8, 3 of 6 steps computed."""
    path = tmp_path_factory.mktemp("calibrated") / "flux"
    few = ("--pool-images", 2, "--samples", 8, "--w-bits", 4, "--rounding", "nearest")
    cache = ("--cache-mode", "branch", "--cache-interval", 2)
    command = ("calibrate", "--model", flux_dir, "--prompt", "a coat", "--prompt", "a hat", *SMALL, *few, *cache)
    assert main([str(a) for a in (*command, "-o", path)]) == 0
    return path


@pytest.mark.slow
def test_calibrate_on_prompts_then_generate(capsys, tmp_path, flux_dir, calibrated_dir):
    found = load(calibrated_dir)
    assert sum(found.schedule.schedule) == 3
    assert found.features is not None
    schemes = {layer.scheme for layer in quant_layers(found.model).values()}
    assert schemes == {"W4A8 static per-tensor", "W8A16 weight-only"}
    options = ("--model", flux_dir, "--calibrated", calibrated_dir, "--prompt", "a bag", *SMALL[:4], "--device", "cpu")
    status, out, _ = run(capsys, "generate", *options, "-o", tmp_path / "x.png")  # as many steps as the schedule has
    assert status == 0
    assert "W4A8 + branch, 3 steps " in out
    assert "steps to compute, compensation of features" in " ".join(out.split())
    again = ("calibrate", "--model", flux_dir, "--prompt", "a", "--device", "cpu", "-o", calibrated_dir)
    assert "holds a calibrated model; give another directory" in run(capsys, *again)[2]
    status, _, err = run(capsys, "generate", "--model", calibrated_dir, "-o", tmp_path / "y.png")
    assert "holds a quantized model, but no settings for runs; give its pipeline too (--model PIPELINE" in err
    for more, message in (
        (("--steps", 5), "schedule has 6 steps and the run 5"),
        (("--w-bits", 8), f"--w-bits and --calibrated {str(calibrated_dir)!r} contradict each other"),
        (("--schedule", "x"), "--schedule and --calibrated"),
    ):
        status, _, err = run(capsys, "generate", *options, *more, "-o", tmp_path / "y.png")
        assert status == 2
        assert len(err.splitlines()) == 1
        assert message in err


@pytest.mark.slow
def test_many_images_of_prompts(capsys, tmp_path, flux_dir, calibrated_dir, monkeypatch):
    """They go on after Ctrl-C, and are those that the pipeline draws, whatever is drawn at once."""
    import qandc.experiments.prompts

    prompts, drawn = ["a coat", "a hat"], []

    def interrupted(pipe, prompt, *arguments):
        drawn.append(prompt)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw_prompt(pipe, prompt, *arguments)

    command = ("sample", "--model", flux_dir, "--prompt", "a coat", "--prompt", "a hat", *SMALL, "-n", 5, "--seed", 7)
    target = tmp_path / "x.npz"
    with monkeypatch.context() as patched:
        patched.setattr(qandc.experiments.prompts, "draw_prompt", interrupted)
        assert run(capsys, *command, "--batch-size", 2, "-o", target)[0] == 130
    assert drawn == ["a coat", "a hat", "a coat", "a hat"]
    assert "holds shards of" in run(capsys, *command, "--batch-size", 2, "--w-bits", 4, "-o", target)[2]
    status, out, _ = run(capsys, *command, "--batch-size", 2, "-o", target, "--json", tmp_path / "x.json")
    assert status == 0
    assert f"wrote {target}: 5 images" in out
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["name"] == "optimized"
    pipe = load_pipeline(flux_dir)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 16, "width": 16, "num_inference_steps": 6}

    def expected():
        made = [draw_prompt(pipe, prompts[i % 2], 7 + i, arguments) for i in range(5)]
        return to_uint8(torch.cat(made)).permute(0, 2, 3, 1).numpy()

    for options, optimization in (
        (("--full-precision",), None),
        ((), {}),
        (("--w-bits", 4), {"w_bits": 4}),
        (("--calibrated", calibrated_dir), {"calibrated": calibrated_dir}),
    ):
        other = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        assert run(capsys, *command, *options, "-o", other)[0] == 0
        if optimization is not None:
            optimize(pipe, **optimization)
        with np.load(other) as found:
            assert np.abs(found["arr_0"].astype(int) - expected().astype(int)).max() <= 1
            assert found["arr_1"].tolist() == [0, 1, 0, 1, 0]
        if optimization is not None:
            restore(pipe)
    status, _, err = run(capsys, *command, "--full-precision", "--w-bits", 4, "-o", tmp_path / "y.npz")
    assert status == 2
    assert "--w-bits is for a model that is quantized here: leave it out" in err
    status, _, err = run(capsys, *command, "--scheduler", "ddim", "-o", tmp_path / "y.npz")
    assert "--scheduler is for models that draw classes, and FluxPipeline draws from prompts: leave it out" in err


def test_what_calibrate_passes_on(capsys, tmp_path, flux_dir, monkeypatch):
    import qandc.method.prompt_calibration

    seen = []

    def note(pipe, prompts, **arguments):
        seen.append((prompts, arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(qandc.method.prompt_calibration, "calibrate_on_prompts", note)
    command = ("calibrate", "--model", flux_dir, "--prompt", "a", "--device", "cpu", "-o", tmp_path / "x")
    assert run(capsys, *command)[0] == 130
    more = ("--no-smoothing", "--a-bits", 6, "--w-bits", 4, "--compensation", "none", "--cache-interval", 1)
    assert run(capsys, *command, *more, "--steps", 7, "--guidance-scale", 2, "--height", 32)[0] == 130
    (prompts, plain), (_, chosen) = seen
    assert prompts == ["a"]
    for each in (plain, chosen):
        assert each.pop("pool_directory") == tmp_path / "x" / "pool"
        del each["progress"]
    assert plain == {"cache": CacheConfig("taylor", interval=3), "gptq": False}
    assert chosen == {
        "smoothing": False, "a_bits": 6, "w_bits": 4, "compensation": "none", "cache": None, "gptq": True,
        "num_inference_steps": 7, "guidance_scale": 2.0, "height": 32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--ranges", "mse"),
            "--ranges is for models that draw classes, and FluxPipeline draws from prompts: leave it",
        ),
        (("--scheduler", "ddim"), "--scheduler is for models that draw classes"),
        (("--vc", "paper"), "--vc is for models that draw classes"),
        (("--rounding", "up"), "rounding 'up' is unknown; choose one of nearest, gptq"),
        (("--cache-mode", "all"), "cache mode 'all' is unknown"),
    ],
)
def test_what_calibrate_refuses_of_prompts(capsys, index_dir, options, message):
    command = ("calibrate", "--model", index_dir, "--prompt", "a", "--device", "cpu", "-o", index_dir / "x")
    status, _, err = run(capsys, *command, *options)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert message in err


def test_files_of_another_model_are_not_replaced(capsys, index_dir):
    target = index_dir / "x"
    target.mkdir()
    (target / "config.json").write_text("{}")
    status, _, err = run(capsys, "calibrate", "--model", index_dir, "--prompt", "a", "-o", target)
    assert status == 2
    assert "holds 'config.json', which is no part of a calibrated model" in err


def test_two_transformers_are_calibrated_from_python(capsys, tmp_path):
    pytest.importorskip("transformers")
    pipe = make_pipeline("WanPipeline")
    pipe.register_modules(transformer_2=pipe.transformer)
    pipe.save_pretrained(tmp_path / "wan")
    command = ("calibrate", "--model", tmp_path / "wan", "--prompt", "a", "--device", "cpu", "-o", tmp_path / "x")
    status, _, err = run(capsys, *command)
    assert status == 2
    assert "WanPipeline has transformer, transformer_2; calibrate them one by one, from Python" in err


def test_a_negative_prompt_that_would_not_be_read(capsys, tmp_path, flux_dir):
    arguments = ("--prompt", "a", "--negative-prompt", "b", *SMALL, "-o", tmp_path / "x.png")
    status, _, err = run(capsys, "generate", "--model", flux_dir, *arguments)
    assert status == 2
    assert "FluxPipeline is distilled for guidance and reads no negative prompt; leave it out" in err


def test_a_damaged_pipeline_is_one_line(capsys, index_dir):
    pytest.importorskip("transformers")
    status, _, err = run(capsys, "generate", "--model", index_dir, "--prompt", "a", "-o", index_dir / "x.png")
    assert status == 2
    assert "is damaged or incomplete; compare it with a fresh copy" in err


def test_transformers_is_asked_for_by_its_extra(index_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"FluxPipeline has text encoders, .*: pip install 'qandc-kernels\[text\]'"):
        load_pipeline(index_dir)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("GatedRepoError", "accept its terms at https://huggingface.co/owner/model, then log in"),
        ("RepositoryNotFoundError", "check the name; if it is private, log in"),
        ("OfflineModeIsEnabled", "check the name, unset HF_HUB_OFFLINE, or give a pipeline directory"),
        (None, "check the name and the network"),
    ],
)
def test_what_the_hub_says(capsys, tmp_path, monkeypatch, error, advice):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        kind = OSError if error is None else getattr(errors, error)
        cause = kind.__new__(kind)
        cause.args = ("no\nentry",)
        raise OSError("there was an error") from cause

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    status, _, err = run(capsys, "generate", "--model", "owner/model", "--prompt", "a", "-o", tmp_path / "x.png")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert f"'owner/model' is no local directory and the hub did not deliver it; {advice}" in err


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_drawn_as_the_pipeline_draws_them(name):
    pytest.importorskip("transformers")
    pipe, small = make_pipeline(name), PIPELINES[name][3]
    given = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0, "negative_prompt": None}
    arguments = call_arguments(pipe, given)
    assert arguments.keys() >= {"height", "width", "num_inference_steps"}
    found = draw_prompt(pipe, "a red coat", 5, {**arguments, **small})
    made = pipe("a red coat", generator=torch.Generator().manual_seed(5), output_type="pt", **{**arguments, **small})[0]
    if made.ndim == 5:
        made = torch.cat([made[:, 0], made[:, 2], made[:, 4]], -1)
    assert torch.equal(found, made * 2 - 1)
    assert found.shape == (1, 3, 16, 48 if name == "WanPipeline" else 16)
    with pytest.raises(ConfigError, match="takes no strength; leave it out"):
        call_arguments(pipe, {"strength": 1})


def test_guidance_of_qwen_image_is_the_one_that_it_reads():
    pytest.importorskip("transformers")
    assert call_arguments(make_pipeline("QwenImagePipeline"), {"guidance_scale": 3.0}) == {"true_cfg_scale": 3.0}
    assert call_arguments(make_pipeline("FluxPipeline"), {"guidance_scale": 3.0}) == {"guidance_scale": 3.0}


@pytest.mark.parametrize(
    ("name", "read", "unread", "said"),
    [
        ("QwenImagePipeline", {"guidance_scale": 3.0, "negative_prompt": " "}, {"guidance_scale": 3.0},
         'QwenImagePipeline guides only with a negative prompt, if but " ", and draws without guidance'),
        ("FluxPipeline", {"height": 16}, {"guidance_scale": 3.0},
         "FluxPipeline reads no guidance scale: its transformer was trained without guidance"),
    ],
)  # fmt: skip
def test_guidance_that_is_left_out_is_told(name, read, unread, said, caplog):
    """FLUX.1-schnell reads no scale, Qwen-Image none without a negative prompt: images are those of another one."""
    pytest.importorskip("transformers")
    transformer = make_tiny(PIPELINES[name][0], guidance_embeds=False)
    pipe, short = make_pipeline(name, transformer=transformer), {"num_inference_steps": 2, "height": 16, "width": 16}
    first, other = (
        draw_prompt(pipe, "a coat", 0, {**short, **call_arguments(pipe, {**unread, "guidance_scale": scale})})
        for scale in (1.0, 3.0)
    )
    assert torch.equal(first, other)
    assert set(caplog.messages) == {said}
    caplog.clear()
    call_arguments(pipe, read)
    assert not caplog.messages


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_drawn_at_once_have_a_negative_prompt_each(name):
    pytest.importorskip("transformers")
    pipe = make_pipeline(name)
    known = inspect.signature(type(pipe).__call__).parameters
    given = {**PIPELINES[name][3], "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    given |= {"negative_prompt": "a bag", "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale": 3.0}
    if "prompt_2" in known:
        given["prompt_2"] = "a pink hat"

    def drawn(prompts, seeds, **changes):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack(list(pipe(**of_prompts(prompts, generators, {**given, **changes}), return_dict=False)[0]))

    prompts = ["a red coat", "two green hats"]
    together = drawn(prompts, [0, 1])
    alone = torch.cat([drawn([prompt], [seed]) for seed, prompt in enumerate(prompts)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, drawn(prompts, [0, 1], negative_prompt="a blue sneaker"), rtol=1e-2)


def test_prompts_that_are_cut_are_told(caplog):
    pytest.importorskip("transformers")
    pipe = make_pipeline("FluxPipeline")
    warn_of_unread(pipe, ["x" * 100])  # CLIP cuts it, T5 reads it all
    assert not caplog.messages
    warn_of_unread(pipe, ["x" * 100, "y" * 600])
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "a prompt has 601 tokens, of which FluxPipeline reads 512"
    ]


class Words:
    """A tokenizer of whole words: 0 is a word that it does not know."""

    unk_token_id = 0

    def __init__(self, words, longest=600):
        self.words, self.model_max_length = words.split(), longest

    def __call__(self, text, **options):
        ids = [1 + self.words.index(word) if word in self.words else 0 for word in text.split()]
        return SimpleNamespace(input_ids=ids)


def test_words_that_no_tokenizer_knows_are_told(caplog):
    pytest.importorskip("transformers")
    pipe = make_pipeline("FluxPipeline")
    pipe.tokenizer_2 = Words("a red coat")
    warn_of_unread(pipe, ["a red coat", "a coat, red."])
    assert not caplog.messages
    warn_of_unread(pipe, ["a velvet coat", "two hats, velvet"])
    message = "FluxPipeline does not know these words, and draws without them: 'velvet', 'two', 'hats'"
    assert caplog.messages == [message]
    caplog.clear()
    warn_of_unread(pipe, [" ".join(f"w{i}" for i in range(12))])
    assert caplog.messages[0].endswith("'w8', 'w9' and 2 more")
    caplog.clear()
    pipe.tokenizer_2.unk_token_id = None  # it reads bytes
    warn_of_unread(pipe, ["a velvet coat"])
    assert not caplog.messages


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_padded_to_what_tokenizers_keep(name):
    """CLIP's, which keeps fewer, is not asked: another argument is for it."""
    pytest.importorskip("transformers")
    pipe = make_pipeline(name)
    last = max(part for part in pipe.components if part.startswith("tokenizer"))
    assert "max_sequence_length" not in call_arguments(pipe, {"height": 16})
    getattr(pipe, last).model_max_length = 24
    takes = "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters
    assert call_arguments(pipe, {}) == ({"max_sequence_length": 24} if takes else {})
    assert text_length(pipe) == call_arguments(pipe, {})
    setattr(pipe, last.replace("tokenizer", "text_encoder"), None)  # embeddings are given instead
    assert text_length(pipe) == {}


@pytest.mark.slow
def test_without_a_network_it_is_one_line(tmp_path):
    command = ("-m", "qandc", "generate", "--model", "owner/model", "--prompt", "a", "-o", tmp_path / "x.png")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "unset HF_HUB_OFFLINE" in done.stderr


def test_the_hub_client_tells_of_retries_with_verbose_alone(index_dir, monkeypatch):
    """Check the environment variable of the hub client, which reads it when it is imported."""
    for options, expected in (((), "error"), (("--verbose",), None)):
        monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
        assert main([*options, "generate", "--model", str(index_dir)]) == 2
        assert os.environ.get("HF_HUB_VERBOSITY") == expected
