"""Run ``sample`` and ``ablate``, which draw many images, alone or as one of the processes of ``torchrun``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qandc.cli.options import (
    OF_PROMPTS,
    BatchSize,
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
from qandc.cli.terminal import check_output, err, out, quiet_diffusers, stage_bars
from qandc.errors import ConfigError
from qandc.support.arguments import Count, check_value
from qandc.support.files import keep_settings, locked, write_json

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "model": None, "steps": "20", "images": 160,
        "pool_images": 20, "samples": 100, "clusters": 20, "vc_samples": 40, "cache_mode": "delta",
        "feature_images": 20,
    },
    "paper": {
        "model": "facebook/DiT-XL-2-256", "steps": "50,100,250", "images": 10_000,
        "pool_images": 200, "samples": 800, "clusters": 100, "vc_samples": 256, "cache_mode": "delta",
        "feature_images": 40,
    },
}  # fmt: skip
ABLATED: dict[str, Any] = {**OF_PROMPTS, "pool_images": 16, "samples": 128}  # of prompts


def _of_sizes(name: str) -> str:
    """Tell the default of an option that depends on the size of an ablation."""
    small, paper = (size[name] for size in SIZES.values())
    return small if small == paper else f"{small}; paper: {paper}"


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped early; the same command goes on where it was")
        raise


def _load(model: str | None, device: str, dtype: str, processes: Any, text: bool = False) -> tuple[Any, str | None]:
    """Load the pipeline on the device of this process; return it and where it came from."""
    from qandc.sampling.pipelines import check_full_precision, load_pipeline, resolve_device, resolve_dtype, source_of

    quiet_diffusers(text)
    where = processes.device(resolve_device(device))
    pipe = load_pipeline(model, where, resolve_dtype(dtype, where))
    check_full_precision(pipe, model)
    return pipe, source_of(model)


def _call_arguments(pipe: Any, prompts: list[str], given: Given) -> dict[str, Any]:
    """Return the arguments of each call of a pipeline that draws from prompts; warn of what it does not read."""
    from qandc.sampling.prompts import RUN, call_arguments, warn_of_unread

    pipe.set_progress_bar_config(disable=True)
    warn_of_unread(pipe, prompts)
    return call_arguments(pipe, {name: given.get(name) for name in RUN})


@contextmanager
def _one_set_of_settings(directory: Path, settings: Any, source: str | None, processes: Any) -> Iterator[None]:
    """Lock a directory of experiments, which differ in the number of steps alone; refuse other settings."""
    if not processes.is_main:
        yield
        return
    described = {name: value for name, value in settings.described().items() if name != "num_inference_steps"}
    with locked(directory / ".lock"):
        keep_settings(directory / "settings.json", {"model": source, **described}, "an ablation")
        yield


@takes("num_inference_steps guidance_scale scheduler w_bits")
def sample(
    *,
    images: Annotated[int, typer.Option("--images", "-n", help="How many; the classes, or the prompts, in turn.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="NPZ file to write: arr_0 [N, H, W, C] uint8.")],
    calibrated: Calibrated = None,
    full_precision: Annotated[bool, typer.Option("--full-precision", help="Neither quantize nor cache.")] = False,
    model: ModelOrSettings = None,
    text: Text,
    given: Given,
    batch_size: BatchSize = 50,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_output: Annotated[Path | None, typer.Option("--json", help="Write the speed to this JSON file.")] = None,
) -> None:
    """Draw many images into one file, for qandc evaluate or ADM's suite; torchrun shares them out among GPUs.

    The same command after an interruption goes on with the images that were drawn.
    """
    from qandc.experiments.many_images import check_new, sample_file, sample_prompts_file
    from qandc.experiments.processes import Processes
    from qandc.experiments.shards import ImageSet
    from qandc.method.saved import Preset, fashion_dit_preset, schedule_of
    from qandc.sampling.pipelines import class_names
    from qandc.sampling.prompts import steps_of_run
    from qandc.support.results import result_header

    if full_precision and calibrated is not None:
        raise ConfigError("--full-precision and --calibrated contradict each other; give one of them")
    check_output(output, ".npz")
    check_value("--images", Count, images)
    check_new(output)
    if json_output is not None:
        check_output(json_output, ".json")
    model, calibrated = settle_model(model, calibrated)
    kind = draws_from_prompts(model, text)
    preset, origin, texts, optimization = None, f"in {str(calibrated)!r}", [], None
    if kind is not None:
        texts = read_prompts(text, kind, {"--scheduler": given["scheduler"]})
        if full_precision or calibrated is not None:
            refuse({"--w-bits": given["w_bits"]}, "is for a model that is quantized here: leave it out")
        else:
            calibrated = shipped(model, given)
        bits = {} if given["w_bits"] is None else {"w_bits": given["w_bits"]}
        optimization = None if full_precision else bits if calibrated is None else {"calibrated": calibrated}
    elif calibrated is not None:
        preset = Preset.load(calibrated)
        model = preset.base_model(model)
    elif full_precision:
        refuse({"--w-bits": given["w_bits"]}, "is for a model that is quantized here: leave it out")
    else:
        if model is not None:
            raise ConfigError(
                f"--model {model} needs --calibrated, which qandc calibrate writes for it, or --full-precision"
            )
        preset, origin = fashion_dit_preset(given["w_bits"] or 8), "that come with fashion-dit"
    chosen = resolve(given, {} if preset is None else calibrated_options(preset), {}, origin)
    run = {"steps": chosen["num_inference_steps"], **{name: chosen[name] for name in ("guidance_scale", "scheduler")}}
    with Processes.joined() as processes:
        pipe, source = _load(model, device, dtype, processes, text=kind is not None)
        if kind is not None:
            run = _call_arguments(pipe, texts, {**text, **given})
            schedule = None if calibrated is None else schedule_of(calibrated)
            steps_of_run(pipe, run, None if schedule is None else schedule.config())
        image_set = ImageSet(images, tuple(range(len(texts))) or tuple(class_names(pipe)), seed, batch_size)
        with stage_bars(processes.is_main) as progress, _resumable():
            shared: dict[str, Any] = {"source": source, "processes": processes, "progress": progress}
            if kind is None:
                rate = sample_file(pipe, output, image_set, preset=preset, **shared, **run)
            else:
                rate = sample_prompts_file(pipe, output, image_set, texts, run, optimization=optimization, **shared)
        if not processes.is_main:
            return
    if json_output is not None:
        name = "full precision" if preset is None else preset.config.scheme
        if optimization is not None:
            name = f"optimized {optimization}" if optimization else "optimized"
        row = {"name": name, "processes": processes.count, "images": images, "images_per_second": rate}
        header = result_header({**run, "batch_size": batch_size, "device": str(pipe.device), "model": source})
        write_json(json_output, {**header, "rows": [row], "goals": []})
    speed = "" if rate is None else f", {rate:.1f} images/s"
    out.print(f"wrote {output}: {images} images{speed}", soft_wrap=True)


@takes(
    "guidance_scale scheduler w_bits a_bits cache_mode cache_interval pool_images samples clusters feature_images vc "
    "vc_samples",
    **{name: _of_sizes(name) for name in SIZES["small"] if name not in ("model", "steps", "images")},
)
def ablate(
    *,
    directory: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to, and to go on in.")],
    size: Annotated[
        str,
        typer.Option(
            "--size", "--preset", help="Where defaults come from: small (minutes on a CPU) or paper (hours on GPUs)."
        ),
    ] = "small",
    model: ModelOrSettings = None,
    text: Text,
    images: Annotated[
        int | None, typer.Option(help=f"Of each row. Default: {_of_sizes('images')}; one of each prompt.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help=f"Denoising steps, several with commas. Default: {_of_sizes('steps')}; of prompts the pipeline's."
        ),
    ] = None,
    given: Given,
    batch_size: BatchSize = 20,
    seed: Seed = 0,
    features: Annotated[
        str,
        typer.Option(
            help="Network of the metrics, as in qandc evaluate; auto: the classifier of fashion-dit for its images, "
            "none for others."
        ),
    ] = "auto",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Real images, or their statistics. Default for the classifier of fashion-dit: fashion-mnist."
        ),
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="pt_inception-2015-12-05-6726825d.pth, with --features inception.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Compare FP, quantization, caching, and both with TAP, VC and FC; torchrun shares the images out among GPUs.

    Interrupt it anywhere: the same command goes on where it was. Other settings in the same directory are refused.
    """
    from qandc.evaluation.compare import USUAL_COUNT
    from qandc.experiments.ablation import ROWS, ExperimentConfig, check_experiment, run_experiment
    from qandc.experiments.processes import Processes
    from qandc.experiments.report import markdown_table, write_report
    from qandc.experiments.scores import scorer_for
    from qandc.method.saved import Preset
    from qandc.method.settings import CalibrationConfig
    from qandc.sampling.prompts import usual_steps

    if size not in SIZES:
        raise ConfigError(f"--size {size!r} is unknown; choose one of {', '.join(SIZES)}")
    held: dict[str, Any] = {}
    model, calibrated = settle_model(model, None)
    if calibrated is not None:
        preset = Preset.load(calibrated)
        held, model = calibrated_options(preset), preset.base_model(model)
        held["steps"] = str(held["num_inference_steps"])
    kind = draws_from_prompts(model, text)
    if kind is None:
        defaults, texts = SIZES[size], []
    else:
        others = {"--size": size != "small", **flags_of(given, leave_out=(*ABLATED, "guidance_scale"))}
        texts = read_prompts(text, kind, others)
        defaults = {**ABLATED, "images": len(texts)}
    chosen = resolve({"model": model, "steps": steps, "images": images, **given}, held, defaults)
    model, steps, images = (chosen.pop(name) for name in ("model", "steps", "images"))
    if kind is not None:
        chosen = {name: chosen[name] for name in ABLATED} | {"clusters": 1}  # there follow from the samples
    try:
        counts = [int(part) for part in steps.split(",")] if steps is not None else []
    except ValueError:
        raise ConfigError(f"--steps is {steps!r}; give numbers, separated by commas") from None

    def experiment(number: int, **of_prompts: Any) -> ExperimentConfig:
        if kind is not None and given["samples"] is None:  # as many as there are, of short runs
            chosen["samples"] = min(ABLATED["samples"], chosen["pool_images"] * number)
        base = CalibrationConfig(num_inference_steps=number, uniform=True, **chosen)
        return ExperimentConfig(images, base, seed, batch_size, tuple(texts), **of_prompts)

    experiments = {number: experiment(number) for number in counts}
    with Processes.joined() as processes, ExitStack() as stack:
        pipe, source = _load(model, device, dtype, processes, text=kind is not None)
        if kind is not None:
            run = _call_arguments(pipe, texts, {**text, **given})
            counts = counts or [usual_steps(pipe)]
            experiments = {number: experiment(number, arguments=run) for number in counts}
        scorer = scorer_for(pipe, features, reference, inception_weights)
        for settings in experiments.values():
            check_experiment(pipe, settings)
        stack.enter_context(_one_set_of_settings(directory, experiments[counts[0]], source, processes))
        rows = []
        for number, settings in experiments.items():
            if len(experiments) > 1 and processes.is_main:
                err.print(f"{number} steps")
            with stage_bars(processes.is_main) as progress, _resumable():
                rows += run_experiment(
                    pipe,
                    settings,
                    directory / f"steps-{number}",
                    scorer=scorer,
                    source=source,
                    processes=processes,
                    progress=progress,
                )
        if not processes.is_main:
            return
        described = {**experiments[counts[0]].described(), "model": source, "scorer": scorer.name, "size": size}
        described |= {"num_inference_steps": counts, "device": str(pipe.device)}
        shown = {kind.name: directory / f"steps-{counts[0]}" / f"{kind.slug}.npz" for kind in ROWS}
        for path in write_report(directory, rows, described, shown):
            err.print(f"wrote {path}", soft_wrap=True)
    if scorer.reference is not None and images < USUAL_COUNT:
        err.print(f"{images} images: Fréchet distances are too large, compare them only with equal numbers")
    out.print(markdown_table(rows), soft_wrap=True)
