"""Serve a page that compares full precision with quantized and cached, picture beside picture: ``qandc demo``."""

from __future__ import annotations

import contextlib
import copy
import html
import importlib.util
import inspect
import logging
import math
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from qandc.caching.schedule import MODES, CacheConfig, cache_of
from qandc.cli.generate import DEFAULTS, parse_classes
from qandc.cli.options import OF_PROMPTS, Device, Dtype, Model, draws_from_prompts
from qandc.cli.terminal import COMPARED, comparison_rows, open_pipeline, out, said_of_error, said_of_layers
from qandc.errors import ConfigError, ModelError
from qandc.quantizer import QuantConfig
from qandc.support.arguments import Between, Seed, Steps, check_value

__all__ = ["Studio", "demo"]

BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W8A16": (8, 16), "W4A16": (4, 16)}
CALIBRATED, NO_CACHE = "calibrated", "none"
INTERVAL = 3
WITH_INTERVAL = [mode for mode in MODES if CacheConfig(mode).planned]
Size = Annotated[int | None, typer.Option(help="Of images from prompts, in pixels. Default: the model's.")]
SIDE = 512  # pixels, of small pictures on the page
CSS = """
.steps, .names { display: flex; gap: 2px; height: 24px; justify-content: space-between; font-weight: 600; }
.steps i { flex: 1; border-radius: 2px; background: var(--neutral-300); }
.steps i.computed { background: var(--primary-600); }
#report table { width: 100%; margin: 12px 0; } #report :is(td, th):not(:first-child) { text-align: right; }
#report td, #report th { padding: 2px 8px; border: 1px solid var(--border-color-primary); } #report p { margin: 2px 0; }
#told p { padding: 8px 12px; border-radius: 6px; background: #fef3c7; color: #78350f; }
#told p[role=alert] { background: #fee2e2; color: #991b1b; }
"""


class Studio:
    """Hold a pipeline in full precision, and compare what it draws with what it draws quantized and cached."""

    def __init__(self, model: str | None, device: str, dtype: str, **size: int | None) -> None:
        from qandc.experiments.prompts import EXAMPLES
        from qandc.method.saved import is_finished, shipped_settings
        from qandc.sampling.pipelines import check_full_precision, class_names, embedded_name
        from qandc.sampling.prompts import call_arguments, usual_steps

        name = embedded_name(model)
        shipped = {} if name is None else {f"W{w_bits}A8": shipped_settings(name, w_bits) for w_bits in (8, 4)}
        self.settings = {bits: directory for bits, directory in shipped.items() if is_finished(directory)}
        text = draws_from_prompts(model, {"height": None, "width": None, **size}) is not None
        self.pipe, _, torch_dtype = open_pipeline(model, device, dtype, text)
        check_full_precision(self.pipe, model)
        self.dtype, self.title = str(torch_dtype).removeprefix("torch."), name or Path(str(model)).name
        self.names = None if text else class_names(self.pipe)
        self.of_call = call_arguments(self.pipe, size) if text else {}
        self.steps, self.example = usual_steps(self.pipe), EXAMPLES[0].caption if name is not None else ""
        usual = (OF_PROMPTS if text else DEFAULTS)["cache_mode"]
        self.modes = [CALIBRATED] * bool(self.settings) + list(dict.fromkeys((usual, *MODES, NO_CACHE)))
        if text:
            self.pipe.set_progress_bar_config(disable=True)

    def compare(
        self, show: Callable[..., None], wanted: Any, bits: str, mode: str, interval: int, steps: int, seed: int
    ) -> tuple[Any, CacheConfig | None]:
        """Draw a list of classes, or a prompt, twice from the same noise; the pipeline stays in full precision.

        ``show(row name, steps done)`` is called after each step. Returns the comparison, and the cache that was used.
        """
        from qandc.experiments.generate import Comparison, GenerateConfig, generate
        from qandc.experiments.prompts import PromptsConfig, compare_prompts
        from qandc.method.saved import Preset, schedule_of
        from qandc.sampling.prompts import check_prompts, warn_of_unread

        check_value("steps", Steps, steps)
        check_value("seed", Seed, seed)
        if mode == CALIBRATED and bits not in self.settings:
            known = " and ".join(self.settings)
            raise ConfigError(f"what comes with {self.title} is for {known}; for {bits} choose another cache")
        result, config, calibrated, cache = Comparison(), QuantConfig(*BITS[bits]), None, None
        if mode == CALIBRATED:
            calibrated = self.settings[bits]
            schedule = schedule_of(calibrated)
            cache = None if schedule is None else schedule.config()
        elif mode != NO_CACHE:
            cache = cache_of(mode, interval if mode in WITH_INTERVAL else None, INTERVAL)
        if cache is not None and cache.length is not None:
            cache.of_steps(steps)
        if self.names is None:
            check_prompts([wanted])
            warn_of_unread(self.pipe, [wanted])

            def after_step(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
                show(result.rows[-1].name, step + 1)
                return tensors

            arguments = {**self.of_call, "num_inference_steps": steps}
            if "callback_on_step_end" in inspect.signature(type(self.pipe).__call__).parameters:
                arguments["callback_on_step_end"] = after_step
            prompts = PromptsConfig((wanted,), arguments, config, cache, seed, calibrated)
            plan = compare_prompts(self.pipe, prompts, result, restored=True)
            return result, plan.transformers[0].cache
        preset = None if calibrated is None else Preset.load(calibrated)
        cache = CacheConfig(interval=1) if cache is None else cache
        labels = parse_classes(",".join(wanted), self.names)
        classes = GenerateConfig(labels, steps, config=config, cache=cache, seed=seed, preset=preset)
        done: Counter[str] = Counter()

        def denoised(row: str, images: int) -> None:
            done[row] += images
            show(row, done[row] // len(labels))

        generate(copy.deepcopy(self.pipe), classes, result, denoised)
        return result, cache


def sheet(images: torch.Tensor) -> Image.Image:
    """Lay images ``[B, C, H, W]`` out in a square, small ones enlarged pixel by pixel."""
    from qandc.evaluation.pixels import to_uint8

    columns = math.isqrt(len(images) - 1) + 1
    blank = images.new_ones(-len(images) % columns, *images.shape[1:])
    tiles = to_uint8(torch.cat([images, blank])).unflatten(0, (-1, columns))
    pixels = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).expand(-1, -1, 3)
    height, width, _ = pixels.shape
    zoom = max(1, SIDE // width)
    return Image.fromarray(pixels.numpy()).resize((zoom * width, zoom * height), Image.Resampling.NEAREST)


def report(result: Any, cache: CacheConfig | None, steps: int, dtype: str) -> str:
    """Write HTML: which steps were computed, the table of the comparison, what became of the layers."""

    def line(kind: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    names = "".join(f"<span>{html.escape(row.name)}</span>" for row in result.rows)
    if cache is not None and not cache.planned:
        strip = f"<p>{cache.mode} decides at each step whether to compute it</p>"
    else:
        schedule = (True,) * steps if cache is None else cache.of_steps(steps)
        kinds = ["computed" if computed else "reused" for computed in schedule]
        cells = "".join(f'<i class="{kind}" title="step {i}: {kind}"></i>' for i, kind in enumerate(kinds, 1))
        strip = f'<div class="steps">{cells}</div><p>{sum(schedule)} of {steps} steps are computed</p>'
    table = line("th", COMPARED) + "".join(line("td", cells) for cells in comparison_rows(result, dtype))
    layers = "".join(f"<p>{html.escape(said)}</p>" for said in said_of_layers(result))
    return f'<div class="names">{names}</div>{strip}<table>{table}</table>{layers}'


def make_page(studio: Studio) -> Any:
    """Make the page: what is wanted at the left; both pictures, and what they took, at the right."""
    import gradio as gr

    warnings: list[str] = []  # one picture is drawn at a time
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("qandc").addHandler(handler)

    def press(*values: Any, progress: Any = gr.Progress()) -> tuple[str, Any, str]:  # noqa: B008
        steps = values[4]
        warnings.clear()
        try:
            result, cache = studio.compare(lambda row, done: progress((done, steps), desc=row, unit="steps"), *values)
            pictures = tuple(sheet(row.images) for row in result.rows)
            said = report(result, cache, steps, studio.dtype)
        except Exception as error:
            return f'<p role="alert">{html.escape(said_of_error(error))}</p>', None, ""
        return "".join(f"<p>{html.escape(line)}</p>" for line in warnings), pictures, said

    with gr.Blocks(title=f"qandc demo: {studio.title}", analytics_enabled=False) as page:
        gr.Markdown(f"## {studio.title}: full precision beside quantized and cached")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                if studio.names is None:
                    wanted: Any = gr.Textbox(studio.example, label="Prompt", autofocus=True)
                else:
                    names = list(dict.fromkeys(studio.names.values()))
                    wanted = gr.Dropdown(
                        names, value=names[-4:], label="Classes", multiselect=True, allow_custom_value=True
                    )
                bits = gr.Radio(list(BITS), value="W8A8", label="Bits of weights and activations")
                mode = gr.Dropdown(studio.modes, value=studio.modes[0], label="Cache")
                shown = studio.modes[0] in WITH_INTERVAL
                interval = gr.Number(INTERVAL, label="Interval", info="every n-th step is computed", visible=shown)
                steps, seed = gr.Number(studio.steps, label="Steps"), gr.Number(0, label="Seed")
                draw = gr.Button("Draw", variant="primary")
            with gr.Column(scale=2):
                told = gr.HTML(elem_id="told")
                pictures = gr.ImageSlider(show_label=False, format="png", interactive=False, max_height=SIDE)
                said = gr.HTML(elem_id="report")
        mode.change(lambda name: gr.update(visible=name in WITH_INTERVAL), mode, interval)
        presses = [draw.click] if studio.names else [draw.click, wanted.submit]
        inputs, outputs = [wanted, bits, mode, interval, steps, seed], [told, pictures, said]
        gr.on(presses, press, inputs, outputs, trigger_mode="multiple", show_progress_on=pictures)
    return page


def demo(
    *,
    model: Model = None,
    height: Size = None,
    width: Size = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860 on.")] = None,
) -> None:
    """Serve a page that draws a prompt or classes in full precision and quantized + cached, until Ctrl-C."""
    check_value("--port", Annotated[int, Between(1, 65535)] | None, port)
    if importlib.util.find_spec("gradio") is None:
        raise ModelError("the page is made with gradio, which is not installed: pip install 'qandc-kernels[demo]'")
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, UnicodeError) as error:  # before gradio tries every port
        raise ConfigError(f"no page can be served there ({error}); give another --host or --port") from None
    studio = Studio(model, device, dtype, height=height, width=width)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as pictures:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": pictures}  # read by its import
        own = {"share": False, "ssr_mode": False, "footer_links": [], "quiet": True, "prevent_thread_lock": True}
        _, url, _ = make_page(studio).launch(server_name=host, server_port=port, css=CSS, **own)
        out.print(f"{url}\nCtrl-C ends it", soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    os._exit(0)  # whatever is being drawn, and whoever has the page open
