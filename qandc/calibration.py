"""Static activation ranges: run samples through a quantized model, note what every layer sees, freeze it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qandc.arguments import Share, checked
from qandc.conversion import layers_to_quantize, quant_layers
from qandc.errors import ConfigError, DataError, ModelError
from qandc.layer_inputs import SharedInputs, watch_inputs
from qandc.linear import QuantLinear
from qandc.quantizer import QuantConfig, activation_parameters
from qandc.ranges import Histogram, RangeConfig, StepRanges, estimate_range

__all__ = ["calibrate", "calibrate_steps", "input_hessians", "smoothing_factors"]

logger = logging.getLogger(__name__)


def _quantizing_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Name to layer of those that quantize their inputs: weight-only layers have no range."""
    return {name: layer for name, layer in quant_layers(model).items() if not layer.weight_only}


def _observe(
    model: nn.Module, batches: Iterable[Any], config: RangeConfig, when: Callable[[Any], Any]
) -> dict[Any, dict[str, Histogram]]:
    """Run the batches with dynamic ranges and no cache; what each layer saw, for each value of ``when(batch)``."""
    layers = _quantizing_layers(model)
    if not layers:
        if quant_layers(model):
            raise ModelError(
                f"the quantized layers of {type(model).__name__} are weight-only (a_bits 16), inputs of which have no "
                "range; there is nothing to calibrate"
            )
        raise ModelError(f"{type(model).__name__} has no quantized layer; call quantize_model first")
    before = {name: (layer.act_scale, layer.act_zero_point) for name, layer in layers.items()}
    found: dict[Any, dict[str, Histogram]] = {}
    current: dict[str, Histogram] = {}

    def see(name: str, x: torch.Tensor) -> None:
        smoothing = layers[name].smoothing
        current[name].add(x if smoothing is None else x.float() / smoothing, count=config.estimator != "minmax")

    def sorted_by_time() -> Iterator[Any]:
        nonlocal current
        for batch in batches:
            current = found.setdefault(when(batch), {name: Histogram() for name in layers})
            yield batch

    try:
        for layer in layers.values():
            layer.set_static_range(None)
        watch_inputs(model, sorted_by_time(), layers, see)
    finally:
        for name, layer in layers.items():
            layer.set_static_range(*before[name])
    if not found:
        raise DataError("the calibration set is empty; give at least one batch of model inputs")
    return found


@checked
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, symmetric: bool = False, ranges: RangeConfig | None = None
) -> nn.Module:
    """Give every QuantLinear that the batches reach one static range (Q&C Eq. 2 and 3), weight-only ones excepted.

    The layers run with dynamic ranges meanwhile, also those that had static ones, and every step is computed, also if a
    feature cache is attached.

    Args:
        model: a model converted by :func:`qandc.quantize_model`.
        batches: inputs of ``model``: a mapping is passed as keywords, a tuple or list as positions, else one argument.
            Seen once and not kept.
        symmetric: short for ``ranges=RangeConfig(symmetric=True)``.
        ranges: how a range is found; by default min-max.

    Returns:
        ``model``. A layer that no batch reached, or that saw zeros only, stays as it was and is logged.

    Raises:
        ModelError: the model has no QuantLinear that quantizes its inputs.
        DataError: there is no batch, no batch reaches a layer, or a layer saw NaN or inf. Ranges are unchanged then.
    """
    config = RangeConfig(symmetric=symmetric) if ranges is None else ranges
    (histograms,) = _observe(model, batches, config, lambda batch: None).values()
    layers = _quantizing_layers(model)
    found = {
        name: _parameters(name, layers[name], seen, config) for name, seen in histograms.items() if seen.saw_values()
    }
    _report_missing(layers, found)
    for name, (scale, zero_point) in found.items():
        layers[name].set_static_range(scale, zero_point)
    return model


@checked
def calibrate_steps(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    groups: int | None = None,
    ranges: RangeConfig | None = None,
    skip_patterns: Sequence[str] = ("proj_out_1",),
) -> StepRanges:
    """Ranges that change along a run, for :func:`qandc.fuse_dit`: they cost nothing there. Layers stay as they are.

    Args:
        model: a quantized DiT.
        batches: inputs of it as keywords, all rows of one at one ``timestep``.
        groups: so many spans of successive timesteps share a range each; by default each timestep has its own.
        ranges: how a range is found; by default min-max.
        skip_patterns: layers whose name contains one of these are left out; by default the one that no fused kernel
            runs.

    Returns:
        A row for each timestep seen, highest first, of every layer that saw values at all of them.

    Raises:
        ModelError, DataError: as :func:`calibrate`; or a batch has no timestep, or rows at several.
        ConfigError: ``groups`` is not an integer from 1 to the number of timesteps.
    """
    config = RangeConfig() if ranges is None else ranges
    histograms = _observe(model, batches, config, _timestep_of)
    timesteps = sorted(histograms, reverse=True)
    count = len(timesteps) if groups is None else groups
    if not 1 <= count <= len(timesteps):
        raise ConfigError(f"groups is {groups!r}; {len(timesteps)} timesteps can form 1 to {len(timesteps)}")
    group_of = [i * count // len(timesteps) for i in range(len(timesteps))]
    layers = {
        name: layer
        for name, layer in _quantizing_layers(model).items()
        if not any(part in name for part in skip_patterns)
    }
    scales: dict[str, torch.Tensor] = {}
    zero_points: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        merged = [Histogram() for _ in range(count)]
        for timestep, group in zip(timesteps, group_of, strict=True):
            merged[group].merge(histograms[timestep][name])
        if not all(seen.saw_values() for seen in merged):
            continue
        found = [_parameters(name, layer, seen, config) for seen in merged]
        scales[name] = torch.stack([found[group][0] for group in group_of])
        if not config.symmetric:
            zero_points[name] = torch.stack([z for group in group_of if (z := found[group][1]) is not None])
    _report_missing(layers, scales)
    return StepRanges(torch.tensor(timesteps, dtype=torch.float32), scales, zero_points)


@checked
@torch.no_grad()
def smoothing_factors(
    model: nn.Module, batches: Iterable[Any], names: Iterable[str], *, alpha: Share = 0.5
) -> dict[str, torch.Tensor]:
    """``s_k = max|x_k|^α / max_n |w_nk|^(1-α)``: factors that move outliers from activations to weights.

    ``(x / s)(s w) = x w`` exactly; what changes is how both round. SmoothQuant (arXiv 2211.10438, Eq. 4); with α = 0.5
    both sides get the geometric mean of the two, the salience balancing of PTQ4DiT (arXiv 2405.16005) without its
    weights of steps. Layers that share their inputs, as q, k and v of self-attention do, share their factors.

    Args:
        model: not quantized yet.
        batches: as :func:`calibrate`.
        names: linear layers to smooth.
        alpha: 0 (all to the activations) to 1 (all to the weights).

    Returns:
        Layer name to ``[in_features] float32``, for :func:`qandc.quantize_model`; 1 where a channel or weight is 0.

    Raises:
        ConfigError: alpha is out of range, or a name is no ``nn.Linear`` of the model.
        DataError: a layer saw no input, or NaN or inf.
    """
    layers: dict[str, nn.Linear] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        layer = modules.get(name)
        if type(layer) is not nn.Linear:
            raise ConfigError(f"{name!r} is no nn.Linear of this {type(model).__name__}; smooth before quantizing")
        layers[name] = layer
    seen = SharedInputs(lambda x: x.abs().amax(0), lambda total, new: torch.maximum(total, new, out=total))
    largest = _totals(seen, model, batches, layers)
    weights: dict[int, torch.Tensor] = {}  # by the tensor that layers of the same inputs share
    for name, layer in layers.items():
        column, key = layer.weight.detach().float().abs().amax(0), id(largest[name])
        weights[key] = torch.maximum(weights[key], column) if key in weights else column
    factors = {}
    for name, x in largest.items():
        w = weights[id(x)]
        factor = x**alpha / w.clamp(min=1e-30) ** (1 - alpha)
        factors[name] = torch.where((x > 0) & (w > 0), factor, torch.ones_like(factor))
    return factors


@checked
@torch.no_grad()
def input_hessians(
    model: nn.Module, batches: Iterable[Any], skip_patterns: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """``H = Σ x xᵀ`` over the inputs x of every linear layer that ``quantize_model`` would replace.

    Args:
        model: not quantized yet.
        batches: inputs of it, as for :func:`qandc.calibrate`; seen once and not kept.
        skip_patterns: as for :func:`qandc.quantize_model`.

    Returns:
        Layer name to ``[K, K] float32``; layers that share their inputs, as q, k and v of self-attention do, share one
        tensor.

    Raises:
        ModelError: there is no linear layer to quantize.
        DataError: a layer saw no input, or NaN or inf.
    """
    try:
        layers = layers_to_quantize(
            model, QuantConfig(skip_patterns=None if skip_patterns is None else list(skip_patterns))
        )
    except ModelError as error:
        raise ModelError(f"{error}; gather Hessians before quantizing") from None
    # in place: autocast, inside of a model, would make it one of half precision
    seen = SharedInputs(lambda x: x.new_zeros(x.shape[1], x.shape[1]).addmm_(x.T, x), torch.Tensor.add_)
    return _totals(seen, model, batches, layers)


def _totals(
    seen: SharedInputs, model: nn.Module, batches: Iterable[Any], layers: Mapping[str, nn.Linear]
) -> dict[str, torch.Tensor]:
    """Layer name to what all its inputs add up to, in the order of ``layers``."""
    watch_inputs(model, seen.each_forward(batches), layers, seen.see)
    found = seen.totals()
    for name in layers:
        if name not in found or not torch.isfinite(found[name]).all():
            raise DataError(f"{name} saw no input, or NaN or inf; check the batches")
    return {name: found[name] for name in layers}


def _timestep_of(batch: Any) -> float:
    timestep = batch.get("timestep") if isinstance(batch, Mapping) else None
    if timestep is None:
        raise DataError("ranges per step need batches that are mappings with a timestep")
    values = torch.as_tensor(timestep).reshape(-1)
    if len(values) == 0 or (values != values[0]).any():
        raise DataError("all rows of a batch must be at one timestep; split the batch")
    return float(values[0])


def _report_missing(layers: Mapping[str, QuantLinear], found: Mapping[str, Any]) -> None:
    missing = [name for name in layers if name not in found]
    if missing:
        logger.warning("no range for %d layers, which saw no input or only zeros: %s", len(missing), ", ".join(missing))
    if not found:
        raise DataError("no calibration batch reached a quantized layer; check that they are inputs of this model")


def _parameters(
    name: str, layer: QuantLinear, seen: Histogram, config: RangeConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        low, high = estimate_range(seen, config, layer.a_bits)
        return activation_parameters(low, high, layer.a_bits, symmetric=config.symmetric)
    except DataError as error:
        raise DataError(f"layer {name}: {error}") from None
