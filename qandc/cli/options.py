"""Make options of commands from the fields of config dataclasses, and settle which value an option has."""

from __future__ import annotations

import functools
import inspect
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qandc.caching.schedule import OLDER_MODES
from qandc.cli.terminal import err
from qandc.errors import ConfigError
from qandc.method.settings import CalibrationConfig
from qandc.sampling.pipelines import CLASS_CONDITIONAL, EMBEDDED, embedded_name, pipeline_class
from qandc.sampling.prompts import check_prompts
from qandc.support.arguments import Count, check_value

__all__ = [
    "OF_PROMPTS",
    "BatchSize",
    "Calibrated",
    "Device",
    "Dtype",
    "Given",
    "Model",
    "ModelOrSettings",
    "Seed",
    "Text",
    "calibrated_options",
    "draws_from_prompts",
    "flags_of",
    "read_prompts",
    "refuse",
    "resolve",
    "settle_model",
    "shipped",
    "takes",
]

logger = logging.getLogger(__name__)

MODEL = "wardrobe, a pipeline directory or a hub id, e.g. black-forest-labs/FLUX.1-dev. Default: fashion-dit."
Given = dict[str, Any]
"""Type of what :func:`takes` passes to a command: the value given for each field, None for an option left out."""
Text = dict[str, Any]
"""Type of what :func:`takes` passes to a command that has a parameter ``text``: the value of each option of TEXT."""


def _named(model: str | None) -> str | None:
    return None if model == EMBEDDED[0] else model


Model = Annotated[str | None, typer.Option(help=MODEL, callback=_named)]
ModelOrSettings = Annotated[
    str | None,
    typer.Option(help=f"{MODEL} Or what qandc calibrate wrote, which names its pipeline.", callback=_named),
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

TEXT: dict[str, Any] = {
    "prompt": Annotated[
        list[str] | None, typer.Option(help="What to draw, for models that draw from text; may be repeated.")
    ],
    "prompts": Annotated[Path | None, typer.Option(help="File of prompts, one a line.")],
    "height": Annotated[int | None, typer.Option(help="Of images from prompts, in pixels. Default: the model's.")],
    "width": Annotated[int | None, typer.Option(help="As --height.")],
    "negative_prompt": Annotated[str | None, typer.Option(help="What not to draw, if the model takes it.")],
}
# what a model that draws from prompts becomes if nobody says
OF_PROMPTS: dict[str, Any] = {"w_bits": 8, "a_bits": 8, "cache_mode": "taylor", "cache_interval": 3}
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
    """Give a command options in the place of ``given``, of fields of :class:`CalibrationConfig`, and of ``text``.

    Args:
        names: of the fields; by default all.
        defaults: for the help, where they are not those of the fields.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        of_fields = {name: _option(name, defaults.get(name, FIELDS[name].default)) for name in names.split()}
        options = {"given": of_fields, "text": TEXT}
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            own = options.get(parameter.name, {parameter.name: parameter.annotation})
            default = None if parameter.name in options else parameter.default
            parameters += [parameter.replace(name=name, annotation=own[name], default=default) for name in own]

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
            if "text" in signature.parameters:
                arguments["text"] = {name: arguments.pop(name) for name in TEXT}
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


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Refuse options that were given, by their flags, to a model that they are not for.

    Raises:
        ConfigError: one of them was.
    """
    for flag, value in options.items():
        if value is not None and value is not False:
            raise ConfigError(f"{flag} {why}")


def flags_of(given: Given, leave_out: Sequence[str]) -> dict[str, bool]:
    """Tell by flag whether options were given, but for some."""
    return {_flags(name)[0]: value is not None for name, value in given.items() if name not in leave_out}


def settle_model(model: str | None, calibrated: Path | None) -> tuple[str | None, Path | None]:
    """Tell pipeline and settings apart: ``--model`` may be what qandc calibrate wrote, settings may be for wardrobe."""
    from qandc.method.saved import is_finished, pipeline_of

    if calibrated is None and model is not None and embedded_name(model) is None and is_finished(model):
        calibrated, model = Path(model), None
    if calibrated is not None and model is None and pipeline_of(calibrated) in EMBEDDED:
        model = pipeline_of(calibrated)
    return model, calibrated


def shipped(model: str | None, given: Given) -> Path | None:
    """Return the directory of the settings that come with an embedded pipeline, for the runs they are for.

    Args:
        model: as given; other pipelines have none.
        given: options of the run and what the model becomes; one that asks for anything else leaves them out.
    """
    from qandc.method.saved import Preset, is_finished, shipped_settings

    name = embedded_name(model)
    if name is None:
        return None
    directory = shipped_settings(name, given["w_bits"] or 8)
    if is_finished(directory):
        held = {**calibrated_options(Preset.load(directory)), "cache_mode": None}
        if all(value is None or held.get(option) == value for option, value in given.items()):
            return directory
    logger.info("not calibrated: the settings that come with %s are for it as it runs without other options", name)
    return None


def draws_from_prompts(model: str | None, text: Text) -> str | None:
    """Return the class of a pipeline if it draws from prompts; of one that draws classes refuse options for prompts.

    Args:
        model: of which the index is read.
        text: options for prompts.

    Raises:
        ConfigError: an option is for prompts, and the model draws classes, or a size is none.
        ModelError: as :func:`qandc.load_pipeline`.
    """
    for name in ("height", "width"):
        check_value(f"--{name}", Count | None, text[name])
    with err.status(f"looking for {model}"):
        kind = CLASS_CONDITIONAL if model is None else pipeline_class(model)
    if kind != CLASS_CONDITIONAL:
        return kind
    given = {f"--{name.replace('_', '-')}": value for name, value in text.items()}
    refuse(given, f"is for models that draw from prompts, and {kind} draws classes: give --classes, or --model")
    return None


def read_prompts(text: Text, kind: str, of_classes: Mapping[str, Any]) -> list[str]:
    """Return the prompts that were given, then those of a file, one a line; empty lines are left out.

    Args:
        text: options for prompts.
        kind: class of the pipeline.
        of_classes: options, by their flags, that are refused, as they are for models that draw classes.

    Raises:
        ConfigError: one of these was given; there is no prompt, one is empty, or the file cannot be read.
    """
    refuse(of_classes, f"is for models that draw classes, and {kind} draws from prompts: leave it out")
    prompts, file = list(text["prompt"] or ()), text["prompts"]
    if file is not None:
        try:
            prompts += [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise ConfigError(f"--prompts {str(file)!r} cannot be read ({reason}); give a text file") from None
    if not prompts:
        raise ConfigError(f'{kind} draws from prompts; give --prompt "...", or --prompts FILE')
    check_prompts(prompts)
    return prompts
