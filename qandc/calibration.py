"""Static activation ranges: run samples through a quantized model, note what every layer sees, freeze it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qandc.cache import paused_cache
from qandc.conversion import quant_layers
from qandc.errors import DataError, ModelError
from qandc.linear import QuantLinear
from qandc.quantizer import activation_parameters

__all__ = ["calibrate"]

logger = logging.getLogger(__name__)


class _RangeObserver:
    """Running minimum and maximum of a layer's input, kept on its device."""

    def __init__(self) -> None:
        self.minimum: torch.Tensor | None = None
        self.maximum: torch.Tensor | None = None

    def saw_values(self) -> bool:
        """Whether there was any input other than zeros."""
        if self.minimum is None or self.maximum is None:
            return False
        return not (self.minimum == 0 and self.maximum == 0)

    def __call__(self, module: QuantLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return
        if module.smoothing is not None:
            x = x.float() / module.smoothing
        low, high = (bound.to(torch.float32) for bound in torch.aminmax(x.detach()))
        self.minimum = low if self.minimum is None else torch.minimum(self.minimum, low)
        self.maximum = high if self.maximum is None else torch.maximum(self.maximum, high)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], *, symmetric: bool = False) -> nn.Module:
    """Give every QuantLinear that the batches reach a static min-max range (Q&C Eq. 2 and 3).

    The layers run with dynamic ranges meanwhile, also those that had static ones, and every step is computed, also if a
    feature cache is attached.

    Args:
        model: a model converted by :func:`qandc.quantize_model`.
        batches: inputs of ``model``: a mapping is passed as keywords, a tuple or list as positions, else one argument.
            Seen once and not kept.
        symmetric: ranges around zero without a zero point, instead of ``[min, max]``.

    Returns:
        ``model``. A layer that no batch reached, or that saw zeros only, stays as it was and is logged.

    Raises:
        ModelError: the model has no QuantLinear.
        DataError: there is no batch, no batch reaches a layer, or a layer saw NaN or inf. Ranges are unchanged then.
    """
    if isinstance(batches, torch.Tensor | Mapping):
        raise DataError(f"batches must be an iterable of batches; got one {type(batches).__name__} (put it in a list)")
    layers = quant_layers(model)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no quantized layer; call quantize_model first")
    before = {name: (layer.act_scale, layer.act_zero_point) for name, layer in layers.items()}
    observers: dict[str, _RangeObserver] = {name: _RangeObserver() for name in layers}
    handles = [layer.register_forward_pre_hook(observers[name], with_kwargs=True) for name, layer in layers.items()]
    count = 0
    try:
        for layer in layers.values():
            layer.set_static_range(None)
        with paused_cache(model):
            for batch in batches:
                _call(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.set_static_range(*before[name])
    if count == 0:
        raise DataError("the calibration set is empty; give at least one batch of model inputs")
    ranges = {
        name: _parameters(name, layers[name], observer, symmetric)
        for name, observer in observers.items()
        if observer.saw_values()
    }
    missing = [name for name in layers if name not in ranges]
    if missing:
        logger.warning("no range for %d layers, which saw no input or only zeros: %s", len(missing), ", ".join(missing))
    if not ranges:
        raise DataError("no calibration batch reached a quantized layer; check that they are inputs of this model")
    for name, (scale, zero_point) in ranges.items():
        layers[name].set_static_range(scale, zero_point)
    return model


def _parameters(
    name: str, layer: QuantLinear, observer: _RangeObserver, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert observer.minimum is not None
    assert observer.maximum is not None
    try:
        return activation_parameters(observer.minimum, observer.maximum, layer.a_bits, symmetric=symmetric)
    except DataError as error:
        raise DataError(f"layer {name}: {error}") from None
