"""Make the header every measured JSON file begins with: command, commit, date, machine, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "result_header", "size_text", "versions"]

PACKAGES = ("qandc-kernels", "torch", "triton", "diffusers", "numpy", "scipy", "scikit-learn")


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
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {"gpu": gpu, "processor": processor, "cores": os.cpu_count(), "system": platform.system()}


def _commit() -> str | None:
    """Return the commit of this source tree, ``-dirty`` behind it if files differ; the variable QANDC_COMMIT wins."""
    if "QANDC_COMMIT" in os.environ:
        return os.environ["QANDC_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository further up is somebody else's
        return None
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def result_header(settings: dict[str, Any]) -> dict[str, Any]:
    """Return ``command, commit, date, machine, versions, settings`` of the running program."""
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
    }
