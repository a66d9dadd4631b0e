"""Compare images in full precision with those of the quantized, cached model: ``qandc generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qandc.cli.options import (
    OF_PROMPTS,
    Calibrated,
    Device,
    Dtype,
    Given,
    ModelOrSettings,
    Seed,
    Text,
    calibrated_options,
    draws_from_prompts,
    flags_of,
    read_prompts,
    refuse,
    resolve,
    settle_model,
    shipped,
    takes,
)
from qandc.cli.terminal import (
    check_output,
    err,
    open_pipeline,
    out,
    print_comparison,
    progress_bars,
)
from qandc.errors import ConfigError
from qandc.support import arguments
from qandc.support.files import write_json, write_whole

__all__ = ["generate", "parse_classes"]

DEFAULTS = {"cache_mode": "branch"}  # of classes, beside those of the fields
CONTRADICT = "and --calibrated {!r} contradict each other; give one of them"


def parse_classes(text: str | None, names: dict[int, str]) -> tuple[int, ...]:
    """Read ids and names separated by commas; without a text, the first ten classes."""
    if text is None:
        return tuple(names)[:10]
    by_name = {name.lower(): label for label, name in names.items()}
    first, last = min(names), max(names)
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if not part:
            raise ConfigError(f"there is an empty class in {text!r}; give ids or names, comma-separated")
        if part.lower() in by_name:
            label = by_name[part.lower()]
        else:
            try:
                label = int(part)
            except ValueError:
                known = f"{names[first]} .. {names[last]}"
                raise ConfigError(f"class {part!r} is unknown; give ids {first} to {last} or names {known}") from None
        if label not in names:
            known = f"{len(names)} classes, {first} ({names[first]}) to {last} ({names[last]})"
            raise ConfigError(f"class id {label} is out of range; this model knows {known}")
        labels.append(label)
    return tuple(labels)


@takes("num_inference_steps guidance_scale scheduler w_bits a_bits smoothing cache_mode cache_interval", **DEFAULTS)
def generate(
    *,
    model: ModelOrSettings = None,
    text: Text,
    calibrated: Calibrated = None,
    classes: Annotated[str | None, typer.Option(help="Class ids or names, comma-separated. Default: ten.")] = None,
    given: Given,
    schedule: Annotated[
        Path | None, typer.Option(help="File of a calibrated schedule, in place of mode and interval.")
    ] = None,
    no_calibrated: Annotated[
        bool,
        typer.Option(
            "--no-calibrated",
            help="Do not use what comes with fashion-dit and wardrobe (static ranges, schedule, compensation) where "
            "no option above asks for anything else.",
        ),
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, typer.Option("--out", "-o", help="PNG file to write.")] = Path("qandc.png"),
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the table to this JSON file.")] = None,
) -> None:
    """Draw each class or prompt in full precision and quantized + cached, from the same noise, into one PNG."""
    from qandc.caching.compensation import config_for
    from qandc.caching.schedule import CalibratedSchedule, cache_of
    from qandc.experiments.generate import Comparison, GenerateConfig, quantized_name
    from qandc.experiments.generate import generate as run
    from qandc.experiments.prompts import EXAMPLES
    from qandc.method.saved import Preset, shipped_likeness
    from qandc.quantizer import QuantConfig
    from qandc.sampling.pipelines import check_full_precision, class_names, embedded_name

    arguments.check_value("--seed", arguments.Seed, seed)
    model, calibrated = settle_model(model, calibrated)
    if no_calibrated and calibrated is not None:
        raise ConfigError("--calibrated and --no-calibrated contradict each other; give one of them")
    kind = draws_from_prompts(model, text)
    if kind is not None:
        of_classes: dict[str, Any] = {"--classes": classes}
        of_classes |= flags_of(given, leave_out=("num_inference_steps", "guidance_scale", *OF_PROMPTS))
        if embedded_name(model) is not None and (text["prompt"], text["prompts"]) == (None, None):
            text["prompt"] = [scene.caption for scene in EXAMPLES]
        texts = read_prompts(text, kind, of_classes)
        if calibrated is not None:
            has = {"--schedule": schedule, **flags_of(given, leave_out=("num_inference_steps", "guidance_scale"))}
            refuse(has, CONTRADICT.format(str(calibrated)))
        elif not no_calibrated:
            calibrated = shipped(model, {**given, "schedule": schedule})
        everything = {**text, **given}
        _from_prompts(str(model), texts, everything, schedule, calibrated, seed, device, dtype, output, json_output)
        return
    preset, held, many = None, {}, None
    if calibrated is not None:
        preset = Preset.load(calibrated)
        held = calibrated_options(preset)
        held["cache_interval"] = f"a schedule of {sum(preset.schedule.schedule)} computed steps"
        refuse({"--schedule": schedule}, CONTRADICT.format(str(calibrated)))
        model = preset.base_model(model)
    elif not no_calibrated and (directory := shipped(model, {**given, "schedule": schedule})) is not None:
        preset, many = Preset.load(directory), shipped_likeness(directory)
    chosen = resolve(given, held, DEFAULTS, f"in {str(calibrated)!r}")
    if preset is not None:
        chosen |= calibrated_options(preset)
        config, cache = preset.config, config_for(preset.schedule, preset.features)
    else:
        config = QuantConfig(chosen["w_bits"], chosen["a_bits"])
        if schedule is not None:
            cache = CalibratedSchedule.load(schedule).config()
            cache.of_steps(chosen["num_inference_steps"])
        else:
            cache = cache_of(chosen["cache_mode"], given["cache_interval"], chosen["cache_interval"])
    steps, guidance_scale, scheduler = (chosen[name] for name in ("num_inference_steps", "guidance_scale", "scheduler"))
    check_output(output, ".png")
    if json_output is not None:
        check_output(json_output, ".json")
    pipe, where, torch_dtype = open_pipeline(model, device, dtype)
    check_full_precision(pipe, model)
    names = class_names(pipe)
    labels = parse_classes(classes, names)
    drawn = GenerateConfig(labels, steps, guidance_scale, scheduler, config, cache, seed, preset, chosen["smoothing"])
    drawn.check(pipe)

    result = Comparison()
    caption = f"{scheduler.upper()} {steps} steps, guidance {guidance_scale:g}, seed {seed}"
    with _saved(result, output, [names[label] for label in labels], caption) as save, progress_bars() as progress:
        total = steps * len(labels)
        tasks = {name: progress.add_task(name, total=total) for name in ("FP", quantized_name(drawn))}
        run(pipe, drawn, result, lambda name, done: progress.advance(tasks[name], done))
    _report(save(), result, drawn.described(), where, torch_dtype, json_output, many=many)


@contextmanager
def _saved(result: Any, output: Path, columns: Sequence[str], caption: str) -> Iterator[Callable[[], str]]:
    """Give a function that writes the picture of what is finished, which an exception in the block calls."""
    from qandc.experiments.generate import draw_grid

    def save() -> str:
        rows = [row for row in result.rows if row.batches]
        if not rows:
            return "nothing was finished"
        picture = draw_grid(rows, columns, caption)
        write_whole(output, lambda path: picture.save(path, format="PNG"))
        return f"wrote {output}"

    try:
        yield save
    except BaseException:  # Ctrl-C, out of memory, a broken model: what is finished is kept
        err.print(f"stopped early; {save()}", soft_wrap=True)
        raise


def _report(
    saved: str,
    result: Any,
    described: dict[str, Any],
    where: Any,
    torch_dtype: Any,
    json_output: Path | None,
    **shown: Any,
) -> None:
    """Print the table of a finished comparison, and write it to a file if one is wanted."""
    from qandc.experiments.generate import comparison_record

    print_comparison(result, str(torch_dtype).removeprefix("torch."), **shown)
    if json_output is not None:
        write_json(json_output, comparison_record(result, described, str(where), str(torch_dtype)))
    out.print(saved, soft_wrap=True)


def _from_prompts(
    model: str,
    prompts: Sequence[str],
    given: Given,
    schedule: Path | None,
    calibrated: Path | None,
    seed: int,
    device: str,
    dtype: str,
    output: Path,
    json_output: Path | None,
) -> None:
    """Compare what a pipeline draws from prompts before and after :func:`qandc.optimize`."""
    from qandc.caching.schedule import CacheConfig, CalibratedSchedule, cache_of
    from qandc.experiments.generate import Comparison
    from qandc.experiments.prompts import PromptsConfig, compare_prompts
    from qandc.method.saved import schedule_of, shipped_likeness
    from qandc.quantizer import QuantConfig
    from qandc.sampling.pipelines import check_full_precision
    from qandc.sampling.prompts import RUN, call_arguments, steps_of_run, warn_of_unread

    chosen = {name: default if given[name] is None else given[name] for name, default in OF_PROMPTS.items()}
    config = QuantConfig(chosen["w_bits"], chosen["a_bits"])
    cache: CacheConfig | None = cache_of(chosen["cache_mode"], given["cache_interval"], chosen["cache_interval"])
    if schedule is not None or calibrated is not None:
        found = schedule_of(calibrated) if calibrated is not None else CalibratedSchedule.load(str(schedule))
        cache = None if found is None else found.config()
    elif chosen["cache_interval"] == 1:
        cache = None
    check_output(output, ".png")
    if json_output is not None:
        check_output(json_output, ".json")
    pipe, where, torch_dtype = open_pipeline(model, device, dtype, text=True)
    check_full_precision(pipe, model)
    of_call = call_arguments(pipe, {name: given[name] for name in RUN})
    steps = steps_of_run(pipe, of_call, cache)
    warn_of_unread(pipe, prompts)
    drawn = PromptsConfig(tuple(prompts), of_call, config, cache, seed, calibrated)

    def show(name: str, number: int) -> None:
        pipe.set_progress_bar_config(desc=f"{name}: {number + 1} of {len(prompts)}", leave=False)

    result = Comparison()
    with _saved(result, output, prompts, f"{type(pipe).__name__}, {steps} steps, seed {seed}") as save:
        plan = compare_prompts(pipe, drawn, result, show)
    many = None if calibrated is None else shipped_likeness(calibrated)
    _report(save(), result, drawn.described(), where, torch_dtype, json_output, plan=plan, many=many)
