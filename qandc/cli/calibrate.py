"""Calibrate a pipeline, from class ids or prompts: ``qandc calibrate``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from qandc.cli.options import (
    Device,
    Dtype,
    Given,
    Model,
    Text,
    draws_from_prompts,
    flags_of,
    read_prompts,
    resolve,
    takes,
)
from qandc.cli.terminal import err, open_pipeline, print_calibration, print_settings, stage_bars
from qandc.errors import ConfigError, QandCError

__all__ = ["calibrate"]

PASSED = (
    "w_bits",
    "a_bits",
    "smoothing",
    "pool_images",
    "samples",
    "select",
    "uniform",
    "compensation",
)  # to calibrate_on_prompts, if given
OF_PROMPTS = (*PASSED, "num_inference_steps", "guidance_scale", "rounding", "cache_mode", "cache_interval")


@takes()
def calibrate(
    *,
    directory: Annotated[Path, typer.Option("--out", "-o", help="Directory to write the settings to.")],
    model: Model = None,
    text: Text,
    given: Given,
    ranges: Annotated[str, typer.Option(help="How static ranges are found: minmax, percentile or mse.")] = "minmax",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Ranges around zero, without zero points.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace finished settings; their candidate pool is used again.")
    ] = False,
) -> None:
    """Calibrate a pipeline: smoothing, quantized weights, static ranges, cache schedule, compensation.

    The same command after an interruption goes on with what was finished.
    """
    from qandc.method.pipeline_calibration import POOL, calibrate_pipeline, check_directory
    from qandc.method.settings import CalibrationConfig
    from qandc.quantization.ranges import RangeConfig
    from qandc.sampling.pipelines import source_of

    check_directory(directory, overwrite)
    kind = draws_from_prompts(model, text)
    if kind is not None:
        others = {"--ranges": ranges != "minmax", "--symmetric": symmetric, **flags_of(given, leave_out=OF_PROMPTS)}
        texts = read_prompts(text, kind, others)
        _on_prompts(str(model), texts, {**text, **given}, directory, device, dtype, overwrite)
        return
    settings = CalibrationConfig(ranges=RangeConfig(ranges, symmetric=symmetric), **resolve(given, {}, {}))
    pipe, _, _ = open_pipeline(model, device, dtype)
    with _resumable(directory / POOL), stage_bars() as show:
        report = calibrate_pipeline(
            pipe, settings, directory, overwrite=overwrite, source=source_of(model), progress=show
        )
    print_calibration(report, directory)


@contextmanager
def _resumable(pool: Path) -> Iterator[None]:
    """Say after Ctrl-C or a lack of memory that what is finished is kept."""
    try:
        yield
    except QandCError:
        raise
    except BaseException:
        if pool.is_dir():
            err.print("stopped early; what was finished is kept, the same command goes on with it", soft_wrap=True)
        raise


def _on_prompts(
    model: str, prompts: Sequence[str], given: Given, directory: Path, device: str, dtype: str, overwrite: bool
) -> None:
    """Calibrate the transformer of a pipeline that draws from prompts, and save it."""
    from qandc.caching.schedule import cache_of
    from qandc.method.pipeline_calibration import POOL, check_directory
    from qandc.method.prompt_calibration import calibrate_on_prompts
    from qandc.method.saved import MODEL_FILES, save
    from qandc.method.settings import CalibrationConfig
    from qandc.optimize import parts_of
    from qandc.quantization.conversion import quantization_report
    from qandc.sampling.prompts import RUN, call_arguments, warn_of_unread

    gptq = CalibrationConfig(w_bits=given["w_bits"] or 8, rounding=given["rounding"]).gptq
    cache = cache_of(given["cache_mode"] or "taylor", given["cache_interval"], 3)
    check_directory(directory, overwrite, MODEL_FILES)
    pipe, _, _ = open_pipeline(model, device, dtype, text=True)
    if len(parts_of(pipe)) > 1:
        raise ConfigError(
            f"{type(pipe).__name__} has {', '.join(parts_of(pipe))}; calibrate them one by one, from Python: "
            "qandc.calibrate_on_prompts(pipe, prompts, transformer=...)"
        )
    pipe.set_progress_bar_config(disable=True)
    of_call = call_arguments(pipe, {name: given[name] for name in RUN})
    warn_of_unread(pipe, prompts)
    wanted = {name: given[name] for name in PASSED if given[name] is not None}
    wanted |= {"cache": None if cache.interval == 1 else cache, "gptq": gptq}
    with _resumable(directory / POOL), stage_bars() as show:
        pool = directory / POOL
        found = calibrate_on_prompts(pipe, prompts, pool_directory=pool, progress=show, **wanted, **of_call)
        save(
            found.model,
            directory,
            overwrite=overwrite,
            schedule=found.schedule,
            compensation=found.compensation,
            features=found.features,
        )
    command = f"qandc generate --model {shlex.quote(model)} --prompt ... --calibrated"
    print_settings(quantization_report(found.model), found.schedule, directory, command)
