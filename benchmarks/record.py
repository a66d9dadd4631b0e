"""Measure all that results/ holds, in portions of minutes: at one commit, on one card, correctness first.

python -m benchmarks.record --list                   # portions: what is done, failed, older or missing here
python -m benchmarks.record --out build/record       # measure them; the same command goes on
python -m benchmarks.record --only '^images' --seconds 540   # what is not done then goes on next time
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qandc.errors import ConfigError, QandCError
from qandc.support.arguments import regular_expression
from qandc.support.files import read_json, write_json
from qandc.support.results import ROOT, source_commit

logger = logging.getLogger("record")
POLL = 0.2  # seconds
ENDS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Portion:
    """Name a command that writes a file of results, or rows of one; of a check, which writes none, its status counts.

    In the command ``{out}`` is the file, ``{card}`` its directory, ``{scratch}`` one that is removed afterwards.
    One that resumes goes on with the next row wherever it was cut, and may take ``minutes`` for each; others on the
    whole. Where time is no result, several portions share a GPU.
    """

    file: str
    options: str
    minutes: float
    command: str
    check: str | None = None
    gpus: int = 1
    timed: bool = True
    resumes: bool = False

    @property
    def name(self) -> str:
        return f"{self.file} {self.options}".strip()

    @property
    def is_check(self) -> bool:
        return self.check is None

    @property
    def width(self) -> int:
        """Count the GPUs that it takes, or the processor as one."""
        return max(1, self.gpus)


def checks(name: str, minutes: float, tests: str, gpus: int = 1) -> Portion:
    """Name the tests that must pass before what they guard is measured."""
    files, _, options = tests.partition(" -")
    marker, files = "gpu" if gpus else "not gpu and not slow", " ".join(f"tests/{test}" for test in files.split())
    side_by_side = "-n auto --maxprocesses 8 " if find_spec("xdist") else ""  # most of their time compiles kernels
    run = f"{{python}} -m pytest -q -p no:cacheprovider {side_by_side}-m '{marker}' {files}"
    run += f" -{options}" if options else ""
    return Portion(f"check-{name}", "", minutes, run, gpus=gpus)


def script(
    file: str, check: str, minutes: float, run: str, *options: str, gpus: int = 1, timed: bool = True
) -> Iterator[Portion]:
    """Name a script that continues its file, once for each of the options."""
    for option in options or ("",):
        command = f"{{python}} {run} {option} --out {{out}}"
        yield Portion(file, option, minutes, command, f"check-{check}", gpus, timed, resumes=True)


def bench(file: str, check: str, minutes: float, tests: str, *options: str) -> Iterator[Portion]:
    """Name benchmarks that add the rows that a file lacks, once for each of the options."""
    run = "-m pytest --benchmark-only --benchmark-quiet -q -p no:cacheprovider --save {card} --resume"
    run += "".join(f" benchmarks/{test}" if test.endswith(".py") else f" {test}" for test in tests.split())
    for option in options or ("",):
        yield Portion(file, option, minutes, f"{{python}} {run} {option}", f"check-{check}", resumes=True)


def sampling(file: str, check: str, gpus: int) -> Portion:
    """Name a run that draws as many images on each GPU."""
    run = f"torchrun --standalone --nproc-per-node={gpus} -m qandc sample -n {12000 * gpus} --batch-size 500"
    return Portion(file, "", 2, f"{run} -o {{scratch}}/a.npz --json {{out}}", f"check-{check}", gpus)


LARGE = ("FLUX.1-dev", "Qwen-Image", "SD3.5-large", "PixArt-Sigma")
OTHERS = ("Z-Image", "Wan-2.1-1.3B")  # without fused blocks
SMALL = ("PixArt-Sigma-512", "SD3.5-medium-512")
SHARED = 4  # portions that share a GPU
SECOND_OPINION = "--efficientnet {scratch}/statistics.npz"
PORTIONS: tuple[Portion, ...] = (
    checks("kernels", 4, "kernels"),
    checks("layers", 1.5, "test_linear.py test_rounding.py test_shared_products.py test_block_hessians.py"),
    checks("steps", 2, "test_fused_dit.py test_run_graph.py test_cache_modes.py test_generate.py test_nan_flags.py"),
    checks("models", 3, "test_fused_blocks.py test_modulations.py test_model_graph.py test_families.py test_models.py"),
    *bench("host", "layers", 1, "test_host.py"),
    *bench("kernels", "kernels", 1.5, "test_linear.py test_epilogues.py test_adaln.py", "--rivals fast"),
    *bench("products", "kernels", 1.5, "test_products.py"),
    *bench("model", "steps", 1.5, "test_attention.py test_model.py", "-k 'not int8dq'"),
    *bench("cache-cost", "steps", 1.5, "test_cache.py"),
    *bench("pipeline", "steps", 1.5, "test_pipeline.py"),
    *(
        portion for layer in (*LARGE, *OTHERS)
        for portion in bench(f"models-{layer}", "models", 1.5, f"test_models.py --layers={layer}")
    ),
    *(
        portion for layer in (*LARGE, *SMALL, *OTHERS)
        for portion in bench(f"images-{layer}", "models", 2.5, f"test_images.py --layers={layer}")
    ),
    *script(
        "parts", "models", 1, "-m training.measure_parts",
        *(f"--layer {layer} --w-bits {bits}" for layer in LARGE for bits in (8, 4)),
        f"--layer {LARGE[0]} --w-bits 8 --per-token",
    ),
    *script("fashion-dit", "steps", 2, "training/evaluate_fashion_dit.py --seeds 2"),
    *script("presets", "steps", 2, "training/evaluate_presets.py"),
    *script("cache", "steps", 2, "training/evaluate_cache.py"),
    *script("ablation", "steps", 2, f"training/ablate_fashion_dit.py {SECOND_OPINION}", timed=False),
    *script("feature-compensation", "steps", 2, f"training/evaluate_feature_compensation.py {SECOND_OPINION}"),
    *script(  # tables tell the speed of these alone
        "wardrobe", "steps", 2, "training/evaluate_wardrobe.py", "--only '^(model|precision|fewer)'"
    ),
    *script("wardrobe", "steps", 2, "training/evaluate_wardrobe.py", "--no-timed", timed=False),
    *script("outliers", "steps", 2, "training/evaluate_outliers.py", "", "--fused", timed=False),
    *script(
        "outliers-wardrobe", "models", 2, "training/evaluate_outliers.py --model wardrobe", "", "--fused", timed=False
    ),
    *script("gptq", "layers", 6, "-m training.measure_gptq", "--samples 16", "--samples 16 --offload"),
    *script("large-model", "steps", 3, "training/measure_large_model.py", "--w-bits 8", "--w-bits 4"),
    sampling("sample", "steps", 1),
    *bench("model", "steps", 8, "test_model.py", "-k int8dq"),  # minutes of tuning
    checks("gpus", 2, "kernels/test_launch.py test_fused_dit.py -k 'another_gpu or second_gpu'", 2),
    sampling("sample-2", "gpus", 2),
    checks("processor", 3, "test_linear.py test_quantizer.py test_sampling.py test_cache_modes.py", 0),
    Portion(
        "generate", "", 1, "{python} -m qandc generate --json {out} -o {card}/generate.png", "check-processor", 0
    ),
    Portion(
        "generate-wardrobe", "", 1,
        "{python} -m qandc generate --model wardrobe --json {out} -o {card}/generate-wardrobe.png",
        "check-processor", 0,
    ),
    *script(
        "wardrobe", "processor", 9, "training/evaluate_wardrobe.py --only ^model --prompts 200 --device cpu", gpus=0,
    ),
    Portion(
        "experiment", "", 5,
        "{python} -m qandc ablate --out {scratch}/all && cp {scratch}/all/experiment_summary.json {out} && "
        "cp {scratch}/all/experiment_summary.png {card}/experiment.png", "check-processor", 0,
    ),
    *script("model-bytes", "processor", 1, "-m training.model_bytes", gpus=0),
    *script(
        "outliers", "processor", 9, "training/evaluate_outliers.py --images 10 --steps 10 --fit 4 --device cpu", gpus=0
    ),
    *script(
        "ablation", "processor", 8, "training/ablate_fashion_dit.py --images 40 --batch 40 --pool-images 20 "
        "--samples 200 --fit-images 50 --repeats 0 --parts 'compensation block' --intervals 5 --device cpu", gpus=0,
    ),
    *script(
        "feature-compensation", "processor", 8, "training/feature_compensation.py --device cpu --fit 20 --images 20 "
        "--steps 20 --intervals 3,4,5", gpus=0,
    ),
    *script("feature-residuals", "processor", 1, "training/feature_residuals.py", gpus=0),
    *script(
        "large-model", "processor", 5, "training/measure_large_model.py --device cpu --steps 2 --uniform "
        "--pool-images 2 --samples 4 --w-bits 8", gpus=0,
    ),
)  # fmt: skip
HISTORICAL = {  # files that no portion writes any more, and why they are kept: until their figures are measured anew
    **dict.fromkeys(("model-torchao", "model-torchao-fp8"), "rows that model.json holds from now on"),
    "parts-per-token": "a row that parts.json holds from now on",
    "wardrobe-shift": "rows that wardrobe.json holds from now on",
}


@dataclass(frozen=True)
class Running:
    """Hold a portion that is being measured, and the GPUs that it runs on."""

    portion: Portion
    process: subprocess.Popen[bytes]
    scratch: tempfile.TemporaryDirectory[str]
    gpus: list[str]
    begun: float


def _gpus() -> list[str]:
    """Name the GPUs like the first one, as CUDA_VISIBLE_DEVICES does; one that is none where there are none."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    cards = [torch.cuda.get_device_name(i) for i in range(count)]
    return [name for name, card in zip(names, cards, strict=True) if card == cards[0]] or [""]


def card_name() -> str:
    """Return the directory of this machine's results: "h200", "h100", "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia "))
    return re.sub(r"-\d+gb.*", "", name)


def _fits(portion: Portion, others: list[Portion]) -> bool:
    """Say whether a GPU has room for a portion beside others."""
    return not others or (len(others) < SHARED and not any(each.timed for each in (portion, *others)))


class Record:
    """Say which portions of a card are done at a commit, and do the rest.

    ``record.json`` beside the results notes commit, status and seconds of each portion that has ended.
    """

    def __init__(self, portions: Sequence[Portion], directory: Path, commit: str | None) -> None:
        self.directory, self.commit, self.here = directory, commit, directory.name == card_name()
        self.portions = [portion for portion in portions if (portion.gpus > 0) == (directory.name != "cpu")]
        self.notes: dict[str, Any] = {}
        if (directory / "record.json").exists():
            self.notes = read_json(directory / "record.json", "record of portions", "remove it")

    def path(self, portion: Portion) -> Path:
        return self.directory / f"{portion.file}.json"

    def file_commit(self, portion: Portion) -> str | None:
        """Return the commit of the file that a portion writes; this one if there is no file."""
        path = self.path(portion)
        return read_json(path, "result", "remove it").get("commit") if path.exists() else self.commit

    def state(self, portion: Portion) -> str:
        """Say whether a portion is done, failed, cut, missing, older (of another commit), or needs more GPUs."""
        if self.here and portion.gpus > torch.cuda.device_count():
            return f"needs {portion.gpus} GPUs"
        if self.file_commit(portion) != self.commit:
            return "older"
        note = self.notes.get(portion.name, {"commit": ""})
        if note["commit"] != self.commit:
            return "missing"
        if note["status"] == 0:
            return "done" if portion.is_check or self.path(portion).exists() else "missing"
        return "cut" if note["status"] is None else "failed"

    def expected(self, portion: Portion) -> float:
        """Return the seconds that must be left for a portion: that it took when it last ended, or that it may take."""
        note = self.notes.get(portion.name, {"status": None})
        return note["seconds"] if note["status"] == 0 and not portion.resumes else 60 * portion.minutes

    def refuse_others(self) -> None:
        """Refuse to measure what nobody could check, or beside files of other commits."""
        if self.commit is None:
            raise ConfigError("no commit is known here: set QANDC_COMMIT, or give --any-commit")
        if self.commit.endswith("-dirty"):
            raise ConfigError(f"files differ from commit {self.commit[:-6]}: commit them, or give --any-commit")
        if others := {self.path(portion).name for portion in self.portions if self.state(portion) == "older"}:
            raise ConfigError(
                f"{str(self.directory)!r} holds {', '.join(sorted(others))} of other commits than {self.commit}; "
                "give --out another directory, or --any-commit to replace them one by one"
            )

    def run(self, portions: Sequence[Portion], seconds: float) -> bool:
        """Measure what is not done; tell whether all that was begun came through.

        Portions run side by side, those of which times are taken on GPUs of their own, but for those of one file, and
        none beside a check. What was cut before, and begins anew, comes last; what resumes is cut after ``seconds``.
        """
        end, passed, gpus, late = time.monotonic() + seconds, True, _gpus(), set[str]()
        running: list[Running] = []
        states = {portion: self.state(portion) for portion in portions}  # each reads the file of its results
        waiting = [portion for portion in portions if not states[portion].startswith(("done", "needs"))]
        waiting.sort(key=lambda p: not (p.is_check or p.resumes) and states[p] == "cut")
        asked: list[int] = []  # noted here, or what has just been started could be left behind
        handlers = {number: signal.signal(number, lambda *given: asked.append(given[0])) for number in ENDS}
        try:
            while waiting or running:
                if asked:
                    logger.warning("ended by %s", signal.Signals(asked[0]).name)
                    raise KeyboardInterrupt
                portion, free = self._next(waiting, running, gpus)
                if portion is None:
                    time.sleep(POLL)
                    for each in [each for each in running if each.process.poll() is not None]:
                        running.remove(each)
                        if status := self._ended(each):
                            logger.error("%s: failed with status %d; the rest goes on", each.portion.name, status)
                            passed = False
                    for each in [each for each in running if each.portion.resumes and time.monotonic() > end]:
                        running.remove(each)
                        self._cut(each)
                    continue
                waiting.remove(portion)
                if {portion.file, portion.check} & late:
                    continue
                if any(p.name == portion.check and self.state(p) != "done" for p in self.portions):
                    logger.error("%s: not measured, as %s failed", portion.name, portion.check)
                    passed = False
                elif time.monotonic() + self.expected(portion) > end:
                    logger.warning(
                        "%s: not begun, may take %.0f s; the same command goes on", portion.name, self.expected(portion)
                    )
                    late.add(portion.file)
                else:
                    running.append(self._start(portion, free[: portion.width]))
        finally:
            for each in running:
                self._cut(each)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return passed

    def _next(
        self, waiting: list[Portion], running: list[Running], gpus: list[str]
    ) -> tuple[Portion | None, list[str]]:
        """Return the first portion that waits for nothing, neither its file, its check nor GPUs, and those free."""
        held = {each.portion.file for each in running}
        kinds = {each.portion.is_check for each in running}
        unchecked = held | {portion.file for portion in waiting if portion.is_check}
        there = {gpu: [each.portion for each in running if gpu in each.gpus] for gpu in gpus}
        for portion in waiting:
            beside = kinds <= {portion.is_check}  # tests would take the host's time from what is timed
            free = [gpu for gpu, others in there.items() if _fits(portion, others)]
            if beside and portion.width <= len(free) and portion.file not in held and portion.check not in unchecked:
                return portion, sorted(free, key=lambda gpu: len(there[gpu]))
        return None, []

    def _start(self, portion: Portion, gpus: list[str]) -> Running:
        path, begun = self.path(portion).resolve(), time.monotonic()
        if self.file_commit(portion) != self.commit:
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "QANDC_COMMAND": f"python -m benchmarks.record --only '^{portion.file}( |$)'"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        if portion.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if self.commit is not None:
            environment["QANDC_COMMIT"] = self.commit
        self._note(portion, None, 0)  # so it stays, if this is killed
        scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        places = {"python": sys.executable, "out": str(path), "card": str(path.parent), "scratch": scratch.name}
        command = portion.command.format(**{name: shlex.quote(place) for name, place in places.items()})
        logger.info("%s: %s", portion.name, command)
        shell = command if "&&" in command else f"exec {command}"  # so that killing it kills what it runs
        return Running(portion, subprocess.Popen(shell, shell=True, cwd=ROOT, env=environment), scratch, gpus, begun)

    def _cut(self, running: Running) -> None:
        """End a portion, whose note still says that it is cut."""
        running.process.kill()
        running.process.wait()
        running.scratch.cleanup()
        logger.warning("%s: cut; the same command goes on", running.portion.name)

    def _ended(self, running: Running) -> int:
        portion, status = running.portion, running.process.returncode
        running.scratch.cleanup()
        if not status and not portion.is_check and not self.path(portion).exists():
            logger.error("%s: wrote no %s", portion.name, self.path(portion).resolve())
            status = 1
        self._note(portion, status, time.monotonic() - running.begun)
        return status

    def _note(self, portion: Portion, status: int | None, seconds: float) -> None:
        self.notes[portion.name] = {"commit": self.commit, "status": status, "seconds": round(seconds, 1)}
        write_json(self.directory / "record.json", self.notes)


def record(portions: Sequence[Portion]) -> None:
    """Run the command line with these portions."""

    def main(
        listed: Annotated[bool, typer.Option("--list", help="Show portions, and measure nothing.")] = False,
        only: Annotated[str, typer.Option(help="Portions whose name this regular expression finds.")] = "",
        seconds: Annotated[float, typer.Option(help="Begin nothing that may take longer; cut the rest.")] = 1e9,
        out: Annotated[Path, typer.Option(help="Directory of the cards' directories.")] = ROOT / "results",
        card: Annotated[str, typer.Option(help="A card's directory, for --list; this machine's by default.")] = "",
        any_commit: Annotated[bool, typer.Option("--any-commit", help="Replace files of other commits.")] = False,
    ) -> None:
        """Measure each portion that is not done at this commit; one that fails is told, and the rest go on."""
        book = Record(portions, out / (card or card_name()), source_commit())
        wanted = regular_expression(only, "--only")
        chosen = [portion for portion in book.portions if wanted.search(portion.name)]
        guards = {portion.check for portion in chosen}
        chosen = [portion for portion in book.portions if portion in chosen or portion.name in guards]
        if listed:
            for each in chosen:
                typer.echo(f"{book.state(each):12} {book.expected(each) / 60:5.1f} min  {each.name:44} {each.command}")
            return
        if not book.here:
            raise ConfigError(f"this machine is {card_name()!r}, not {card!r}: --card is for --list")
        if not any_commit:
            book.refuse_others()
        raise typer.Exit(0 if book.run(chosen, seconds) else 1)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        typer.run(main)
    except QandCError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)


if __name__ == "__main__":
    record(PORTIONS)
