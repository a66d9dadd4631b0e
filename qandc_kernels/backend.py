"""Choose the implementation that ops use on a device, and say why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch

from qandc_kernels.errors import ArgumentError, DeviceError
from qandc_kernels.tiles.tables import gpu_of, tuned_tiles

__all__ = ["ASKED_FOR", "Backend", "backend_of", "launching_on", "select_backend", "use_backend"]

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)  # int8 mma with 16-byte asynchronous copies
ASKED_FOR: ContextVar[str | None] = ContextVar("qandc_kernels backend", default=None)  # what use_backend was given


class Backend(NamedTuple):
    """Name what runs an op, ``name`` "triton" or "reference"; ``reason`` says why in a few words."""

    name: str
    reason: str


def backend_of(device: torch.device) -> Backend:
    """Return what :func:`select_backend` does, for the device of a tensor."""
    name = ASKED_FOR.get()
    if name is None:
        return _chosen(device)
    if name == "reference":
        return Backend("reference", "plain torch: inside use_backend('reference')")
    available = Backend("triton", "Triton's interpreter") if _interpreted() else _available(device)
    if available.name != "triton":
        raise DeviceError(
            f"use_backend('triton'): no Triton kernels run on {device} ({available.reason}); "
            "leave the block, move the tensors, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels"
        )
    return available


@functools.cache
def _available(device: torch.device) -> Backend:
    """Find out what can run on a device."""
    if device.type != "cuda":
        return Backend("reference", f"plain torch: the kernels need a CUDA device, this is {device.type}")
    if not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise DeviceError(f"{device} is not here: torch sees {torch.cuda.device_count()} CUDA devices; try 'cpu'")
    if torch.version.hip is not None:
        return Backend("reference", "the kernels are written for NVIDIA GPUs, this is ROCm")
    if importlib.util.find_spec("triton") is None:
        return Backend("reference", "Triton is not installed (pip install triton)")
    capability = torch.cuda.get_device_capability(device)
    arch = f"sm_{capability[0]}{capability[1]}"
    if capability < OLDEST_CAPABILITY:
        return Backend("reference", f"the kernels need sm_80 or newer, this GPU is {arch}")
    return Backend("triton", arch if tuned_tiles(gpu_of(device).name) else f"{arch}, tiles by formula")


@functools.cache
def _chosen(device: torch.device) -> Backend:
    """Return what can run on a device; log once, on a GPU as a warning, why that is not Triton."""
    chosen = _available(device)
    if chosen.name != "triton":
        # aloud on a CUDA device, where people expect the kernels
        level = logging.WARNING if device.type == "cuda" else logging.DEBUG
        logger.log(level, "qandc_kernels uses plain torch on %s: %s", device, chosen.reason)
    return chosen


def _interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def use_backend(name: Literal["reference", "triton"]) -> AbstractContextManager[None]:
    """Run the ops of a block on plain torch, or on Triton kernels or not at all.

    ::

        with use_backend("reference"):
            expected = model(x)  # on a GPU too; compare with what the kernels give

    It holds for calls of this thread. A CUDA graph keeps the kernels it was captured with; compiled code follows the
    block where it calls our ops. With "triton", an op raises where no kernels run on the device of its tensors. On a
    CPU they run in Triton's interpreter, if TRITON_INTERPRET=1 was set before they were imported.

    Args:
        name: "reference" or "triton".

    Raises:
        ArgumentError: ``name`` is something else.
        DeviceError: inside ``use_backend("triton")``, an op was called on a device without kernels.
    """
    if not isinstance(name, str) or name not in ("reference", "triton"):
        raise ArgumentError(f"use_backend: name must be 'reference' or 'triton'; got {name!r}")
    return _asking_for(name)


@contextlib.contextmanager
def _asking_for(name: str) -> Iterator[None]:
    token = ASKED_FOR.set(name)
    try:
        yield
    finally:
        ASKED_FOR.reset(token)


def launching_on(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of ``x`` the current one, as Triton expects; nothing for a tensor whose kernels are interpreted."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def select_backend(device: torch.device | str) -> Backend:
    """Return the implementation that ops use on ``device``; a GPU it cannot use is logged once as a warning.

    Raises:
        ArgumentError: ``device`` names no device.
        DeviceError: ``device`` is a GPU that is not here, or has no kernels inside of ``use_backend("triton")``.
    """
    if not isinstance(device, torch.device):
        try:
            device = torch.device(device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"device must be a torch.device or a name such as 'cuda'; got {device!r}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return backend_of(device)
