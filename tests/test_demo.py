"""The page of ``qandc demo``: what it compares, and the page itself in a headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from qandc import CacheConfig, CalibratedSchedule, ConfigError, QuantConfig, load_pipeline, quantize_model, save
from qandc.cli.demo import Studio, report, sheet
from qandc.cli.main import main
from qandc.experiments.generate import Comparison, GenerateConfig, generate
from qandc.quantization.conversion import quant_layers
from tests.conftest import in_time

CLASSES = (["3", "1"], "W4A8", "delta", 2, 5, 7)
PROMPT = ("a red coat", "W8A8", "taylor", 3, 6, 7)


def studio(directory, **size) -> Studio:
    return Studio(str(directory), "cpu", "auto", **size)


def compared(studio, values):
    seen = []
    result, cache = studio.compare(lambda *progress: seen.append(progress), *values)
    return *(row.images for row in result.rows), cache, seen


def test_classes_are_compared_as_generate_does_and_the_pipeline_stays(pipeline_dir):
    page = studio(pipeline_dir)
    for _ in range(2):
        full, quantized, cache, seen = compared(page, CLASSES)
        assert cache == CacheConfig("delta", interval=2)
        assert seen == [(row, step) for row in ("FP", "W4A8 + delta cache 2") for step in range(1, 6) for _ in "1"]
        expected = Comparison()
        settings = GenerateConfig((3, 1), 5, config=QuantConfig(4, 8), cache=cache, seed=7)
        generate(load_pipeline(pipeline_dir), settings, expected)
        assert torch.equal(full, expected.rows[0].images)
        assert torch.equal(quantized, expected.rows[1].images)


def test_prompts_are_compared_and_the_pipeline_stays(flux_dir):
    page = studio(flux_dir, height=16, width=16)
    weights = {name: weight.clone() for name, weight in page.pipe.transformer.state_dict().items()}
    first, second = compared(page, PROMPT), compared(page, PROMPT)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    assert first[0].shape == (1, 3, 16, 16)
    assert first[3] == [(row, step) for row in ("FP", "W8A8 + taylor cache 3") for step in range(1, 7)]

    def stop(row, step):
        if row != "FP" and step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        page.compare(stop, *PROMPT)
    after = page.pipe.transformer.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_prompts_are_compared_with_calibrated_settings(flux_dir, tmp_path):
    page = studio(flux_dir, height=16, width=16)
    plain = compared(page, PROMPT)
    timesteps = tuple((page.pipe.scheduler.timesteps / 1000).tolist())
    schedule = CalibratedSchedule((True, True, False, False, True, False), timesteps, "taylor", 1)
    model = quantize_model(load_pipeline(flux_dir).transformer, 4, skip_patterns=["norm", "ff"])
    save(model, tmp_path / "w4a8", schedule=schedule)
    page.settings = {"W4A8": tmp_path / "w4a8"}
    values = ("a red coat", "W4A8", "calibrated", None, 6, 7)
    full, quantized, cache, seen = compared(page, values)
    assert cache.schedule == schedule.schedule
    assert seen[-1] == ("W4A8 + taylor, 3 steps", 6)
    assert torch.equal(full, plain[0])
    assert not torch.equal(quantized, full)
    layers = page.compare(lambda *progress: None, *values)[0].report.quantized
    assert [row.name for row in layers] == list(quant_layers(model))
    with pytest.raises(ConfigError, match="schedule has 6 steps and the run 5"):
        compared(page, (*values[:4], 5, 7))
    with pytest.raises(ConfigError, match="what comes with tiny-flux is for W4A8; for W8A8 choose another cache"):
        compared(page, ("a red coat", "W8A8", *values[2:]))
    assert torch.equal(compared(page, PROMPT)[1], plain[1])


@pytest.mark.slow
def test_what_ships_with_fashion_dit_comes_first():
    page = Studio(None, "cpu", "auto")
    assert (page.modes[0], page.steps) == ("calibrated", 50)
    _, _, cache, _ = compared(page, (["Bag"], "W4A8", "calibrated", None, 50, 0))
    assert cache.length == 50
    with pytest.raises(ConfigError, match="is for W8A8 and W4A8; for W4A16 choose another cache"):
        compared(page, (["Bag"], "W4A16", "calibrated", None, 50, 0))
    with pytest.raises(ConfigError, match="schedule has 50 steps and the run 20"):
        compared(page, (["Bag"], "W8A8", "calibrated", None, 20, 0))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, ["hat"], "class 'hat' is unknown"),
        (0, [], "there is an empty class in ''"),
        (3, 0, "interval is 0"),
        (4, None, "^steps is None; give an integer >= 1"),
        (4, 1001, "num_inference_steps is 1001; this scheduler allows 1 to 1000"),
        (5, 0.5, "seed is 0.5; give an integer >= 0"),
    ],
)
def test_bad_values(pipeline_dir, place, value, message):
    values = list(CLASSES)
    values[place] = value
    with pytest.raises(ConfigError, match=message):
        compared(studio(pipeline_dir), values)


def test_a_sheet_is_square_and_keeps_every_pixel():
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    picture = torch.tensor(list(sheet(images).convert("L").tobytes()), dtype=torch.uint8).view(512, 512)[16::32, 16::32]
    expected = ((images[:, 0] / 2 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(picture[:8], torch.cat([expected[0], expected[1]], 1))
    assert torch.equal(picture[8:], torch.cat([expected[2], torch.full((8, 8), 255, dtype=torch.uint8)], 1))


@pytest.mark.parametrize(
    ("mode", "strip"), [("delta", "101010"), ("none", "111111"), ("first_block", "")], ids=lambda value: value or "-"
)
def test_the_strip_shows_the_steps_of_the_run(pipeline_dir, mode, strip):
    result, cache = studio(pipeline_dir).compare(lambda *progress: None, ["1"], "W8A8", mode, 2, 6, 0)
    shown = report(result, cache, 6, "float32")
    kinds = re.findall(r'<i class="(\w+)"', shown)
    assert "".join(str(int(kind == "computed")) for kind in kinds) == strip
    assert f"{strip.count('1')} of 6 steps are computed" in shown or "decides at each step" in shown
    assert re.search(r"<td>FP \(float32\)</td><td>\d+\.\d{3}</td><td>1\.00x</td><td>[\d.]+ MB</td><td></td>", shown)
    assert "20 layers quantized (W8A8 dynamic per-token)" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "0"), "--port is 0; give an integer >= 1"),
        (("--host", "999.1.1.1"), "no page can be served there"),
        (("--height", "64"), "--height is for models that draw from prompts"),
    ],
)
def test_refusals(capsys, monkeypatch, options, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # gradio, which none of these comes to
    assert main(["demo", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install 'qandc-kernels[demo]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chromium():
    """A browser, which needs gradio and playwright to be of use, and Debian's package."""
    for needed in ("gradio", "playwright"):
        pytest.importorskip(needed)
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Served:
    """A page that a process of its own serves."""

    def __init__(self, browser, folder, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qandc", "demo", "--device", "cpu", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            # a shell's background jobs, of which this may be one, ignore Ctrl-C and so do their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        with in_time(60):
            self.url = self.process.stdout.readline().strip()
        self.browser, self.asked = browser, []

    def open(self):
        page = self.browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(self.url)
        return page

    def end(self):
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.communicate(timeout=60)[1], self.process.returncode
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def serve(chromium, tmp_path_factory):
    """Serve pages, and see that none asks for anything from elsewhere, nor leaves noise or files when it ends."""
    pages, folder = [], tmp_path_factory.mktemp("temporary")
    yield lambda *arguments: pages.append(Served(chromium, folder, *arguments)) or pages[-1]
    for served in pages:
        err, status = served.end()
        assert status == 0
        assert all(line.startswith("qandc.sampling.prompts: ") for line in err.splitlines())
        assert served.asked
        assert all(url.startswith((served.url, "data:", "blob:")) for url in served.asked)
    assert not list(folder.iterdir())


def press(page):
    page.get_by_role("button", name="Draw").click()


def sizes_of_pictures(page) -> list[int]:
    page.locator("#report table").wait_for(timeout=60_000)
    page.wait_for_function("[...document.images].filter(image => image.naturalWidth).length == 2")
    return page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")


def alert(page) -> str:
    page.get_by_role("alert").wait_for(timeout=60_000)
    return page.get_by_role("alert").inner_text()


@pytest.mark.slow
def test_classes_in_a_browser(serve, pipeline_dir):
    page = serve("--model", pipeline_dir).open()
    page.get_by_label("Interval").wait_for(timeout=60_000)
    page.get_by_label("Steps").fill("6")
    press(page)
    assert sizes_of_pictures(page) == [512, 512]
    assert page.locator(".steps i").count() == 6
    assert page.locator(".steps i.computed").count() == 2
    assert "W8A8 + branch cache 3" in page.locator("#report").inner_text()
    page.get_by_label("Classes").fill("hat")
    page.get_by_label("Classes").press("Enter")
    page.get_by_label("Classes").press("Tab")  # closes the list
    press(page)
    assert "class 'hat' is unknown" in alert(page)
    assert page.locator("#report").inner_text() == ""


@pytest.mark.slow
def test_prompts_in_a_browser(serve, flux_dir):
    served = serve("--model", flux_dir, "--height", 16, "--width", 16)
    first, second = served.open(), served.open()
    press(first)
    assert alert(first) == "prompt 1 is empty; give text in each"
    for page in (first, second):
        page.get_by_label("Prompt").fill("a red coat")
        page.get_by_label("Cache").click()
        page.get_by_role("option", name="first_block").click()
        page.get_by_label("Interval").wait_for(state="detached")
    second.get_by_label("Prompt").fill("a red coat " * 60)
    press(first)
    second.get_by_label("Prompt").press("Enter")  # waits for the first
    for page in (first, second):
        assert sizes_of_pictures(page) == [512, 512]
        assert page.get_by_role("alert").count() == 0
        assert "first_block decides at each step" in page.locator("#report").inner_text()
    assert first.locator("#told").inner_text() == ""
    assert re.search(r"a prompt has \d+ tokens, of which FluxPipeline reads", second.locator("#told").inner_text())
    first.get_by_label("Steps").fill("10000")
    press(first)
    first.get_by_text("10k steps").first.wait_for(timeout=60_000)  # and Ctrl-C comes
