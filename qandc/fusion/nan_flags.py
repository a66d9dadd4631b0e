"""Notice NaN that static ranges hide: a flag per layer, raised on the device, read once after a run.

A static range makes some integer of NaN, and what follows is finite. The kernels that quantize raise a flag then, which
costs nothing and waits for nothing. Compiled blocks quantize in plain torch and raise none: there a flag would take a
reduction over all activations, which made a FLUX.1 forward a tenth slower.
"""

from __future__ import annotations

from typing import Any

import torch

from qandc.fusion.fuse import Fused
from qandc.quantization.conversion import quant_layers

__all__ = ["lower_nan_flags", "raised_nan_flag"]


def _flags(transformer: Any) -> dict[str, torch.Tensor]:
    """Map names of layers to their flags, of layers whose static range could hide NaN; made where there is none."""
    fused = Fused.of(transformer)
    program = None if fused is None else fused.built
    found: dict[str, torch.Tensor] = {} if program is None else program.nan_flags()
    if program is not None and program.graphable and not any(program.reasons.values()):
        return found  # of every quantized layer, without a walk through the modules
    for name, layer in quant_layers(transformer).items():
        runs_fused = program is not None and program.reasons.get(name, "") is None
        if layer.act_scale is None or layer.qweight.is_meta or runs_fused:
            continue
        if layer.nan_flag is None or layer.nan_flag.device != layer.qweight.device:
            with torch.inference_mode(False):
                layer.nan_flag = torch.zeros((), dtype=torch.int32, device=layer.qweight.device)
        found[name] = layer.nan_flag
    return found


def lower_nan_flags(transformer: Any) -> None:
    """Lower all flags of a transformer."""
    flags = list(_flags(transformer).values())
    if flags:
        torch._foreach_zero_(flags)


def raised_nan_flag(transformer: Any) -> str | None:
    """Name the first layer that was given NaN since :func:`lower_nan_flags`; waits for the device."""
    flags = _flags(transformer)
    if not flags:
        return None
    device = next(iter(flags.values())).device
    raised = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return next((name for name, value in zip(flags, raised, strict=True) if value), None)
