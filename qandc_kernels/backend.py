"""Choose the implementation that ops use on a device, and say why."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import NamedTuple

import torch

from qandc_kernels.errors import ArgumentError, DeviceError
from qandc_kernels.tiles.tables import gpu_of, tuned_tiles

__all__ = ["Backend", "backend_of", "select_backend"]

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)  # int8 mma with 16-byte asynchronous copies


class Backend(NamedTuple):
    """``name`` is "triton" or "reference"; ``reason`` says why in a few words."""

    name: str
    reason: str


@functools.cache
def backend_of(device: torch.device) -> Backend:
    """Return what :func:`select_backend` does, for the device of a tensor."""
    if device.type != "cuda":
        chosen = Backend("reference", f"plain torch: the kernels need a CUDA device, this is {device.type}")
        logger.debug("qandc_kernels on %s: %s", device, chosen.reason)
        return chosen
    if not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise DeviceError(f"{device} is not here: torch sees {torch.cuda.device_count()} CUDA devices; try 'cpu'")
    if torch.version.hip is not None:
        chosen = Backend("reference", "the kernels are written for NVIDIA GPUs, this is ROCm")
    elif importlib.util.find_spec("triton") is None:
        chosen = Backend("reference", "Triton is not installed (pip install triton)")
    else:
        capability = torch.cuda.get_device_capability(device)
        arch = f"sm_{capability[0]}{capability[1]}"
        if capability < OLDEST_CAPABILITY:
            chosen = Backend("reference", f"the kernels need sm_80 or newer, this GPU is {arch}")
        else:
            return Backend("triton", arch if tuned_tiles(gpu_of(device).name) else f"{arch}, tiles by formula")
    # said once, aloud: on a CUDA device people expect the kernels
    logger.warning("qandc_kernels uses plain torch on %s: %s", device, chosen.reason)
    return chosen


def select_backend(device: torch.device | str) -> Backend:
    """Return the implementation that ops use on ``device``; a GPU it cannot use is logged once as a warning.

    Raises:
        ArgumentError: ``device`` names no device.
        DeviceError: ``device`` is a GPU that is not here.
    """
    if not isinstance(device, torch.device):
        try:
            device = torch.device(device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"device must be a torch.device or a name such as 'cuda'; got {device!r}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return backend_of(device)
