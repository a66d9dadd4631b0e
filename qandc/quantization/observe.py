"""Find static ranges, smoothing factors and Hessians from the inputs of layers while a model runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from qandc.errors import ConfigError, DataError, ModelError
from qandc.quantization.conversion import layers_to_quantize, quant_layers
from qandc.quantization.layer_inputs import SharedInputs, TokenLayers, run_batches, watch_inputs
from qandc.quantization.linear import QuantLinear
from qandc.quantization.ranges import Histogram, RangeConfig, StepRanges, estimate_range
from qandc.quantization.shared_products import settle
from qandc.quantizer import QuantConfig, are_divisors, scale_and_zero_point
from qandc.support.arguments import Batches, Share, checked
from qandc.support.attach import original_class

__all__ = [
    "TIMESTEP_NAMES",
    "calibrate",
    "calibrate_steps",
    "calibration",
    "hessians_of",
    "input_hessians",
    "smoothing_factors",
    "unquantized",
]

logger = logging.getLogger(__name__)

TIMESTEP_NAMES = ("timestep", "timesteps", "t")  # of a forward's argument, in diffusers' models


class _Observer:
    """Keep histograms of what each quantized layer is given, apart for each value of ``key``.

    Attributes:
        key: the timestep of the forward that runs; None where timesteps are not told apart.
        found: key to layer name to histogram.
        tokens: which layers see tokens.
    """

    def __init__(self, model: nn.Module, config: RangeConfig) -> None:
        self.model, self.config = model, config
        layers = quant_layers(model)
        self.layers = {name: layer for name, layer in layers.items() if not layer.weight_only}
        self.key: float | None = None
        self.found: dict[float | None, dict[str, Histogram]] = {}
        self.tokens = TokenLayers()
        if layers and not self.layers:
            raise ModelError(
                f"the quantized layers of {type(model).__name__} are weight-only (a_bits 16), inputs of which have no "
                "range; there is nothing to calibrate"
            )
        if not self.layers:
            raise ModelError(
                f"{type(model).__name__} has no quantized layer; call quantize_model first (what smoothing needs comes "
                "before it: quantize_model(model, smoothing=smoothing_factors(model, batches)))"
            )

    def _see(self, name: str, x: torch.Tensor) -> None:
        self.tokens.see(name, x)
        smoothing = self.layers[name].smoothing
        histograms = self.found.setdefault(self.key, {})
        histogram = histograms.setdefault(name, Histogram())
        histogram.add(x if smoothing is None else x.float() / smoothing, count=self.config.estimator != "minmax")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Collect histograms inside the block, with dynamic ranges; afterwards layers have their former ranges."""
        before = {name: (layer.act_scale, layer.act_zero_point) for name, layer in self.layers.items()}
        try:
            for layer in self.layers.values():
                layer.set_static_range(None)
            with watch_inputs(self.model, self.layers, self._see):
                yield
        finally:
            for name, layer in self.layers.items():
                layer.set_static_range(*before[name])

    def left_dynamic(self) -> list[str]:
        """Return, and log, names of layers that get no static range because they see one row per sample."""
        names = self.tokens.others()
        if names:
            logger.info(
                "%d layers keep dynamic ranges, which cost them nothing: they see one row per sample where others see "
                "tokens, and their inputs change from step to step: %s",
                len(names),
                ", ".join(names),
            )
        return names

    def report_missing(self, found: Collection[str], dynamic: Collection[str]) -> None:
        """Log which layers get no range, as they saw no value; refuse if none gets one."""
        missing = [name for name in self.layers if name not in {*found, *dynamic}]
        if not found:
            raise DataError(
                f"no quantized layer of {type(self.model).__name__} was given a value other than zero; give inputs of "
                "this model, or run it inside the block"
            )
        if missing:
            logger.warning(
                "no range for %d layers, which saw no input or only zeros: %s", len(missing), ", ".join(missing)
            )


@checked
def calibration(
    model: nn.Module, *, symmetric: bool = False, ranges: RangeConfig | None = None
) -> AbstractContextManager[None]:
    """Observe a quantized model while any code runs it, and give its layers static ranges at the end of the block.

    ``with qandc.calibration(pipe.transformer): pipe(prompt)``. Inside the block layers run with dynamic ranges, also
    those that had static ones; compiled models run uncompiled, and a feature cache computes every step.

    Layers that see one row per sample, as those of timestep and modulation do, where others see tokens, keep dynamic
    ranges: their inputs change from step to step, and a range per row costs them nothing. So do, with a warning, layers
    that saw no value: they stay as they were.

    Args:
        model: a model converted by :func:`qandc.quantize_model`.
        symmetric: short for ``ranges=RangeConfig(symmetric=True)``.
        ranges: how a range is found; by default min-max.

    Raises:
        ModelError: the model has no QuantLinear that quantizes its inputs.
        DataError: no layer saw a value, or one saw NaN or inf.

    After these, and after an exception inside the block, the model is as it was before.
    """
    config = RangeConfig(symmetric=symmetric) if ranges is None else ranges
    return _calibration(_Observer(model, config), config)


@contextmanager
def _calibration(observer: _Observer, config: RangeConfig) -> Iterator[None]:
    with observer.watch():
        yield
    histograms = observer.found.get(None, {})
    dynamic = observer.left_dynamic()
    found = {
        name: _parameters(name, observer.layers[name], seen, config)
        for name, seen in histograms.items()
        if name not in dynamic and seen.saw_values()
    }
    observer.report_missing(found, dynamic)
    for name in dynamic:
        observer.layers[name].set_static_range(None)
    for name, (scale, zero_point) in found.items():
        observer.layers[name].set_static_range(scale, zero_point)
    settle(list(observer.layers.values()))


@checked
def calibrate(
    model: nn.Module, batches: Batches, *, symmetric: bool = False, ranges: RangeConfig | None = None
) -> nn.Module:
    """Run batches inside of :func:`qandc.calibration`: static ranges for every QuantLinear (Q&C Eq. 2 and 3).

    Weight-only layers have none.

    Args:
        model: a model converted by :func:`qandc.quantize_model`.
        batches: inputs of ``model``: a mapping is passed as keywords, a tuple or list as positions, else one argument.
            Seen once and not kept. Or a function without arguments that runs the model: ``lambda: pipe(prompt)``.
        symmetric, ranges: as :func:`qandc.calibration`.

    Returns:
        ``model``. A layer that no batch reached, or that saw zeros only, stays as it was and is logged; layers that see
        one row per sample, where others see tokens, keep dynamic ranges.

    Raises:
        ModelError: the model has no QuantLinear that quantizes its inputs.
        DataError: there is no batch, no batch reaches a layer, or a layer saw NaN or inf. Ranges are unchanged then.
    """
    with calibration(model, symmetric=symmetric, ranges=ranges):
        run_batches(model, batches)
    return model


@checked
def calibrate_steps(
    model: nn.Module, batches: Batches, *, groups: int | None = None, ranges: RangeConfig | None = None
) -> StepRanges:
    """Find ranges that change along a run, for :func:`qandc.fuse_dit`, where they cost nothing; layers do not change.

    Args:
        model: a quantized model whose forward has an argument ``timestep``, ``timesteps`` or ``t``.
        batches: as :func:`qandc.calibrate`; all rows of one forward at one timestep.
        groups: so many spans of successive timesteps share a range each; by default each timestep has its own.
        ranges: how a range is found; by default min-max.

    Returns:
        A row for each timestep seen, highest first, of every layer that saw values at all of them; none of layers that
        see one row per sample where others see tokens.

    Raises:
        ModelError, DataError: as :func:`calibrate`; or a forward was given no timestep, or rows at several.
        ConfigError: ``groups`` is not an integer from 1 to the number of timesteps.
    """
    config = RangeConfig() if ranges is None else ranges
    observer = _Observer(model, config)

    def note_timestep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer.key = _timestep_of(module, args, kwargs)

    handle = model.register_forward_pre_hook(note_timestep, with_kwargs=True)
    try:
        with observer.watch():
            run_batches(model, batches)
    finally:
        handle.remove()
    histograms = {key: seen for key, seen in observer.found.items() if key is not None}
    timesteps = sorted(histograms, reverse=True)
    dynamic = observer.left_dynamic()
    if not timesteps:
        observer.report_missing((), dynamic)
    count = len(timesteps) if groups is None else groups
    if not 1 <= count <= len(timesteps):
        raise ConfigError(f"groups is {groups!r}; {len(timesteps)} timesteps can form 1 to {len(timesteps)}")
    group_of = [i * count // len(timesteps) for i in range(len(timesteps))]
    scales: dict[str, torch.Tensor] = {}
    zero_points: dict[str, torch.Tensor] = {}
    for name, layer in observer.layers.items():
        if name in dynamic:
            continue
        merged = [Histogram() for _ in range(count)]
        for timestep, group in zip(timesteps, group_of, strict=True):
            merged[group].merge(histograms[timestep].get(name, Histogram()))
        if not all(seen.saw_values() for seen in merged):
            continue
        found = [_parameters(name, layer, seen, config) for seen in merged]
        scales[name] = torch.stack([found[group][0] for group in group_of])
        if not config.symmetric:
            zero_points[name] = torch.stack([z for group in group_of if (z := found[group][1]) is not None])
    observer.report_missing(scales, dynamic)
    return StepRanges(torch.tensor(timesteps, dtype=torch.float32), scales, zero_points)


@checked
@torch.no_grad()
def smoothing_factors(
    model: nn.Module,
    batches: Batches,
    names: Iterable[str] | None = None,
    *,
    alpha: Share = 0.5,
    skip_patterns: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Find ``s_k = max|x_k|^α / max_n |w_nk|^(1-α)``: factors that move outliers from activations to weights.

    ``(x / s)(s w) = x w`` exactly; what changes is how both round. SmoothQuant (arXiv 2211.10438, Eq. 4); with α = 0.5
    both sides get the geometric mean of the two, the salience balancing of PTQ4DiT (arXiv 2405.16005) without its
    weights of steps. Layers that share their inputs, as q, k and v of self-attention do, share their factors.

    Args:
        model: not quantized yet.
        batches: as :func:`qandc.calibrate`.
        names: linear layers to smooth; by default all that ``quantize_model`` would replace and that see tokens.
        alpha: 0 (all to the activations) to 1 (all to the weights).
        skip_patterns: as for :func:`qandc.quantize_model`, where no names are given.

    Returns:
        Layer name to ``[in_features] float32``, for :func:`qandc.quantize_model`; 1 where a channel or weight is 0.

    Raises:
        ConfigError: alpha is out of range, or a name is no ``nn.Linear`` of the model.
        ModelError: no names are given, and there is no linear layer to quantize.
        DataError: a named layer saw no input, no layer saw any, or one saw NaN or inf.
    """
    layers: dict[str, nn.Linear] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    if names is None:
        layers = unquantized(model, skip_patterns, "find smoothing factors")
    for name in names or ():
        layer: Any = modules.get(name)
        if original_class(layer) is not nn.Linear:
            raise ConfigError(f"{name!r} is no nn.Linear of this {type(model).__name__}; smooth before quantizing")
        layers[name] = layer
    seen = SharedInputs(lambda x: x.abs().amax(0).float(), lambda total, new: torch.maximum(total, new, out=total))
    largest = _totals(seen, model, batches, layers, TokenLayers() if names is None else None)
    weights: dict[int, torch.Tensor] = {}  # by the tensor that layers of the same inputs share
    for name in largest:
        layer = layers[name]
        column, key = layer.weight.detach().float().abs().amax(0), id(largest[name])
        weights[key] = torch.maximum(weights[key], column) if key in weights else column
    factors = {}
    for name, x in largest.items():
        w = weights[id(x)]
        factor = x**alpha / w.clamp(min=1e-30) ** (1 - alpha)
        usable = (x > 0) & (w > 0) & are_divisors(factor)
        factors[name] = torch.where(usable, factor, torch.ones_like(factor))
    return factors


@checked
@torch.no_grad()
def input_hessians(
    model: nn.Module, batches: Batches, skip_patterns: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """Add up ``H = Σ x xᵀ`` over the inputs x of every linear layer that ``quantize_model`` would replace.

    Args:
        model: not quantized yet.
        batches: as :func:`qandc.calibrate`.
        skip_patterns: as for :func:`qandc.quantize_model`.

    Returns:
        Layer name to ``[K, K] float32``; layers that share their inputs, as q, k and v of self-attention do, share one
        tensor.

    Raises:
        ModelError: there is no linear layer to quantize.
        DataError: a layer saw no input, or NaN or inf.
    """
    return hessians_of(model, batches, unquantized(model, skip_patterns, "gather Hessians"))


@torch.no_grad()
def hessians_of(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """Add up ``H = Σ x xᵀ`` over the inputs of these layers."""
    return _totals(SharedInputs(_products, torch.Tensor.add_), model, batches, layers)


def _products(x: torch.Tensor) -> torch.Tensor:
    """Multiply ``xᵀ x`` in float32; of half-precision numbers tensor cores multiply exactly and add up in float32."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, x, out_dtype=torch.float32)
    x = x.float()
    # in place: autocast, inside of a model, would make it one of half precision
    return x.new_zeros(x.shape[1], x.shape[1]).addmm_(x.T, x)


def unquantized(model: nn.Module, skip_patterns: Iterable[str] | None, what: str) -> dict[str, nn.Linear]:
    """Choose the layers that ``quantize_model`` would replace, of a model that is not quantized yet.

    Raises:
        ModelError: there are none; ``what`` comes before quantizing.
    """
    config = QuantConfig(skip_patterns=None if skip_patterns is None else list(skip_patterns))
    try:
        return layers_to_quantize(model, config)
    except ModelError as error:
        raise ModelError(f"{error}; {what} before quantizing") from None


def _totals(
    shared: SharedInputs,
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, nn.Linear],
    tokens: TokenLayers | None = None,
) -> dict[str, torch.Tensor]:
    """Run the batches; return layer name to what all its inputs add up to, in the order of ``layers``.

    Args:
        tokens: leave out, and log, layers that see no tokens or nothing. None: every layer must see something.
    """

    def see(name: str, x: torch.Tensor) -> None:
        shared.see(name, x)
        if tokens is not None:
            tokens.see(name, x)

    with watch_inputs(model, layers, see):
        run_batches(model, batches, after_each=shared.end_forward)
    found = shared.totals()
    if tokens is not None and found:
        left_out = [name for name in layers if name not in found or name in tokens.others()]
        if left_out:
            logger.info(
                "%d layers are not smoothed: they saw no input, or one row per sample where others see tokens: %s",
                len(left_out),
                ", ".join(left_out),
            )
        layers = {name: layer for name, layer in layers.items() if name not in left_out}
    for name in layers:
        if name not in found or not torch.isfinite(found[name]).all():
            raise DataError(f"{name} saw no input, or NaN or inf; check the batches")
    return {name: found[name] for name in layers}


def _timestep_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Find the one timestep that a forward is given, by the names of its arguments."""
    called: Any = original_class(getattr(module, "_orig_mod", module))
    try:
        given = inspect.signature(called.forward).bind_partial(module, *args, **kwargs).arguments
    except TypeError:  # the forward itself will say so
        given = dict(kwargs)
    timestep = next((given[name] for name in TIMESTEP_NAMES if given.get(name) is not None), None)
    if timestep is None:
        raise DataError(
            f"ranges per step need a timestep with each batch: no argument of {called.__name__} that is named "
            f"{', '.join(TIMESTEP_NAMES[:-1])} or {TIMESTEP_NAMES[-1]} was given"
        )
    values = torch.as_tensor(timestep).reshape(-1)
    if len(values) == 0 or (values != values[0]).any():
        raise DataError("all rows of a batch must be at one timestep; split the batch")
    return float(values[0])


def _parameters(
    name: str, layer: QuantLinear, seen: Histogram, config: RangeConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        low, high = estimate_range(seen, config, layer.a_bits)
        return scale_and_zero_point(low, high, layer.a_bits, symmetric=config.symmetric)
    except DataError as error:
        raise DataError(f"layer {name}: {error}") from None
