"""Make options of commands from the fields of config dataclasses, and settle which value an option has."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qandc.caching.schedule import OLDER_MODES
from qandc.errors import ConfigError
from qandc.method.settings import CalibrationConfig
from qandc.support.arguments import check_value

__all__ = [
    "BatchSize",
    "Calibrated",
    "Device",
    "Dtype",
    "Given",
    "Model",
    "ModelOrSettings",
    "Seed",
    "calibrated_options",
    "resolve",
    "takes",
]

MODEL = "Pipeline directory or hub id, e.g. facebook/DiT-XL-2-256. Default: fashion-dit."
Given = dict[str, Any]
"""Type of what :func:`takes` passes to a command: the value given for each field, None for an option left out."""
Model = Annotated[str | None, typer.Option(help=MODEL)]
ModelOrSettings = Annotated[
    str | None, typer.Option(help=f"{MODEL} Or what qandc calibrate wrote, which names its pipeline.")
]
Calibrated = Annotated[
    Path | None,
    typer.Option(
        "--calibrated", "--settings", help="Directory that qandc calibrate wrote; run, bits and cache come from there."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Image i is drawn with seed + i.")]
BatchSize = Annotated[int, typer.Option(help="Images drawn at once.")]

FIELDS = {field.name: field for field in fields(CalibrationConfig) if "help" in field.metadata}
HINTS = typing.get_type_hints(CalibrationConfig, include_extras=True)


def _flags(name: str) -> tuple[str, ...]:
    return FIELDS[name].metadata["flags"] or (f"--{name.replace('_', '-')}",)


def _option(name: str, default: object) -> Any:
    """Annotate the parameter of a command with a field's type, flags and help."""
    text = FIELDS[name].metadata["help"]
    if default is True:
        text = f"Do not {text[0].lower()}{text[1:]}"
    elif default is not None and not isinstance(default, bool):
        text += f" Default: {default}."
    kind = typing.get_type_hints(CalibrationConfig)[name]
    return Annotated[kind | None, typer.Option(*_flags(name), help=text, show_default=False)]


def takes(names: str = " ".join(FIELDS), **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these fields of :class:`CalibrationConfig`, in the place of ``given``.

    Args:
        names: of the fields; by default all.
        defaults: for the help, where they are not those of the fields.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name != "given":
                parameters.append(parameter)
                continue
            for name in names.split():
                option = _option(name, defaults.get(name, FIELDS[name].default))
                parameters.append(parameter.replace(name=name, annotation=option, default=None))

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in names.split()}
            for name, value in given.items():
                if value is True:  # a flag
                    given[name] = not FIELDS[name].default
                elif value is not None:
                    check_value(_flags(name)[0], HINTS[name], value)
            if "cache_mode" in given:
                given["cache_mode"] = OLDER_MODES.get(given["cache_mode"], given["cache_mode"])
            return command(given=given, **arguments)

        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def resolve(
    given: Given, calibrated: Mapping[str, Any], defaults: Mapping[str, Any], origin: str | None = None
) -> dict[str, Any]:
    """Settle the value of each option: as given, else as calibrated, else its default, else that of its field.

    Args:
        given: options, by name; None is not given.
        calibrated: what calibrated settings hold.
        defaults: of the command.
        origin: which calibrated settings these are, if options must not differ from them.

    Raises:
        ConfigError: one does.
    """
    chosen = {}
    for name, value in given.items():
        if value is not None and origin is not None and calibrated.get(name, value) != value:
            asked, what = ("given", f"{name} ") if isinstance(value, bool) else (value, "")
            raise ConfigError(
                f"{_flags(name)[0]} is {asked}, but the settings {origin} are for {what}{calibrated[name]}; leave it "
                "out, or give other settings"
            )
        by_rank = (value, calibrated.get(name), defaults.get(name))
        of_field = FIELDS[name].default if name in FIELDS else None
        chosen[name] = next((found for found in by_rank if found is not None), of_field)
    return chosen


def calibrated_options(preset: Any) -> dict[str, Any]:
    """Return what calibrated settings say about options."""
    return {
        "num_inference_steps": preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale,
        "scheduler": preset.scheduler_name,
        "w_bits": preset.config.w_bits,
        "a_bits": preset.config.a_bits,
        "smoothing": bool(preset.buffers("smoothing")),
        "cache_mode": preset.schedule.mode,
    }
