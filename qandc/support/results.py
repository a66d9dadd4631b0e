"""Make the header every measured JSON file begins with; continue such a file at the same commit, on the same card."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from qandc.errors import ConfigError
from qandc.support.files import read_json

__all__ = ["card", "machine", "measured_rows", "result_header", "same_origin", "size_text", "source_commit", "versions"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qandc-kernels", "torch", "triton", "diffusers", "numpy", "scipy", "scikit-learn")
CARD = {
    "power_limit_w": "power.limit",
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "driver": "driver_version",
}
MEASURED = ("results", "*/likeness.json")  # what measuring writes changes nothing that is measured


def versions() -> dict[str, str | None]:
    """Return versions of Python and of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def size_text(count: int) -> str:
    """Write a number of bytes for people: "23.8 GB", "0.3 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def machine() -> dict[str, Any]:
    """Describe GPU, processor and cores."""
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {**card(), "processor": processor, "cores": os.cpu_count(), "system": platform.system()}


@functools.lru_cache(1)
def card() -> dict[str, Any]:
    """Describe the GPU; ``sm_mhz`` is its clock when this is first asked, behind the first row that is measured."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    found = _output("nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties().uuid}",
                    f"--query-gpu={','.join(CARD.values())}", "--format=csv,noheader,nounits")  # fmt: skip
    values = found.split(", ") if found else []
    told = dict(zip(CARD, values, strict=False))
    return {"gpu": torch.cuda.get_device_name(), **{name: _number(told.get(name)) for name in CARD}}


def _number(text: str | None) -> float | str | None:
    """Return what nvidia-smi says as a number, if it is one: a driver is none, nor is "[N/A]"."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_commit() -> str | None:
    """Return the commit of this source tree, ``-dirty`` behind it if files differ; the variable QANDC_COMMIT wins.

    None where neither is there. Files under ``results/`` may differ.
    """
    if "QANDC_COMMIT" in os.environ:
        return os.environ["QANDC_COMMIT"]
    if not (ROOT / ".git").exists():  # installed: a repository further up is somebody else's
        return None
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "-uno", "--", ".", *(f":(exclude){path}" for path in MEASURED))
    return f"{commit}-dirty" if commit and changed else commit


def result_header(settings: dict[str, Any]) -> dict[str, Any]:
    """Return ``command, commit, date, machine, versions, settings`` of the running program.

    The variable QANDC_COMMAND names the command, where this one was started by it.
    """
    return {
        "command": os.environ.get("QANDC_COMMAND") or " ".join(["python", *sys.orig_argv[1:]]),
        "commit": source_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }


def same_origin(path: Path, result: dict[str, Any], header: dict[str, Any]) -> None:
    """Refuse to go on with a result that was measured with other settings, at another commit or on another card.

    Raises:
        ConfigError: it says which.
    """
    for what in ("settings", "commit", "machine"):
        before, now = result.get(what), header[what]
        if what == "machine":
            before, now = (before or {}).get("gpu"), now["gpu"]
        if before != now:
            prefix = {"settings": "with", "commit": "at commit", "machine": "on"}[what]
            raise ConfigError(
                f"{str(path)!r} was measured {prefix} {before}, this is {now}; give another file, or remove it"
            )


def measured_rows(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a result that is to be continued; none where there is no file.

    Raises:
        ConfigError: it has another origin (:func:`same_origin`).
        OutputError: it is no result.
    """
    if not path.exists():
        return []
    before = read_json(path, "result", "give another file", names=("settings", "rows"))
    same_origin(path, before, header)
    rows: list[dict[str, Any]] = before["rows"]
    return rows
