"""Which implementation an op uses on a device, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import NamedTuple

import torch

__all__ = ["Backend", "select_backend"]

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)  # int8 mma with 16-byte asynchronous copies


class Backend(NamedTuple):
    """``name`` is "triton" or "reference"; ``reason`` says why in a few words."""

    name: str
    reason: str


@functools.cache
def _select(device: torch.device) -> Backend:
    if device.type != "cuda":
        chosen = Backend("reference", f"plain torch: the kernels need a CUDA device, this is {device.type}")
        logger.debug("qandc_kernels on %s: %s", device, chosen.reason)
        return chosen
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
            return Backend("triton", arch)
    # said once, aloud: on a CUDA device people expect the kernels
    logger.warning("qandc_kernels uses plain torch on %s: %s", device, chosen.reason)
    return chosen


def select_backend(device: torch.device | str) -> Backend:
    """The implementation that ops use on ``device``; a GPU it cannot use is logged once as a warning."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _select(device)
