"""Run the command line: read options, call the library, print and save."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer
from rich.table import Table
from typer.exceptions import TyperException

from qandc.cli.calibrate import calibrate
from qandc.cli.demo import demo
from qandc.cli.evaluate import evaluate
from qandc.cli.generate import generate
from qandc.cli.scale import ablate, sample
from qandc.cli.terminal import err, out, said_of_error

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Quantized and cached diffusion transformers.")
for command in (generate, calibrate, sample, ablate, evaluate, demo):
    app.command()(command)


@app.command()
def info() -> None:
    """Print versions, GPUs, and which kernels can run here and why the others cannot."""
    import torch

    from qandc.sampling.pipelines import ASSETS, EMBEDDED
    from qandc.support.results import versions
    from qandc_kernels import reference, select_backend

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    table.add_row("CUDA (torch build)", torch.version.cuda or "none")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = torch.cuda.get_device_name(device)
        table.add_row(str(device), f"{name}, sm_{major}{minor}, {memory:.0f} GiB")
    for path in (ASSETS / name for name in EMBEDDED):
        if path.is_dir():  # trained
            table.add_row("embedded model", str(path))
    out.print(table)
    out.print()
    kernels = Table("op", "device", "runs on", "why", box=None, pad_edge=False)
    ops = sorted(reference.__all__)
    for device in [torch.device("cpu"), *devices]:
        backend, reason = select_backend(device)
        for op in ops:
            kernels.add_row(op, str(device), backend, reason)
    if not devices:
        built = "torch sees no CUDA GPU" if torch.version.cuda else "this torch is built without CUDA"
        for op in ops:
            kernels.add_row(op, "cuda", "not available", built)
    out.print(kernels)


def _print_version(wanted: bool) -> None:
    if wanted:
        from qandc.support.results import versions

        out.print(f"qandc {versions()['qandc-kernels'] or '(not installed)'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what is decided, on stderr.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if not verbose:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub client, imported later, tells of each retry
    for package in ("qandc", "qandc_kernels"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.NOTSET)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every error is one line on stderr and status 2, Ctrl-C is status 130."""
    try:
        status = app(args=arguments, prog_name="qandc", standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
    except Exception as error:
        message = said_of_error(error)
    else:
        if status == 130:
            err.print("interrupted")
        return status if isinstance(status, int) else 0
    if message:
        err.print(f"qandc: error: {' '.join(message.split())}", style="red", soft_wrap=True)
    return 2


def entry_point() -> None:
    """Run the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    sys.exit(main())
