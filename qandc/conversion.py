"""Quantizing a whole model, and telling what became of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from qandc.arguments import check_fields, checked
from qandc.cache import FUSED, reset_all_caches
from qandc.errors import ConfigError, DataError, ModelError
from qandc.linear import QuantLinear, check_finite, check_layer, smoothed_weight
from qandc.quantizer import QuantConfig
from qandc.readers import kept_layers, tuner_layers
from qandc_kernels import select_backend

__all__ = [
    "LayerReport",
    "QuantizationReport",
    "layers_to_quantize",
    "quant_layers",
    "quantization_report",
    "quantize_model",
]

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)

EXACT_WEIGHTS = "_qandc_exact_weights"  # attribute of a model that was cast: a function that gives its tensors before


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Qualified name to layer, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        # a subclass may compute something else, or be read past its forward, as in nn.MultiheadAttention
        if type(module) is nn.Linear:
            yield name, module


def layers_to_quantize(model: nn.Module, config: QuantConfig) -> dict[str, nn.Linear]:
    """Choose the linear layers that become :class:`QuantLinear`, by qualified name.

    Layers that :func:`qandc.readers.kept_layers` names stay as they are; a warning says which and why.

    Raises:
        ModelError: there is none.
    """
    linears = dict(_linear_layers(model))
    kept = {name: why for name, why in kept_layers(model).items() if not config.skips(name)}
    for why in dict.fromkeys(kept.values()):
        names = [name for name in kept if kept[name] == why]
        logger.warning("%d linear layers stay in full precision, %s among them: %s", len(names), names[0], why)
    skipped = {id(linear) for name, linear in linears.items() if config.skips(name) or name in kept}
    chosen = [name for name, linear in linears.items() if id(linear) not in skipped]
    if not chosen:
        if kept:
            why = f"{min(kept)} and others stay as they are ({kept[min(kept)]}), and skip_patterns exclude the rest"
        elif linears:
            why = f"skip_patterns {list(config.skip_patterns)} exclude all {len(linears)} of its linear layers"
        elif quant_layers(model):
            why = "its linear layers are quantized already"
        else:
            why = "it has no nn.Linear layer"
        raise ModelError(f"nothing to quantize in {type(model).__name__}: {why}")
    return {name: linears[name] for name in chosen}


@checked
def quantize_model(
    model: ModelT,
    w_bits: int = 8,
    a_bits: int = 8,
    skip_patterns: Sequence[str] = QuantConfig.skip_patterns,
    *,
    weight_clip: str = "max",
    smoothing: Mapping[str, torch.Tensor] | None = None,
    hessians: Mapping[str, torch.Tensor] | None = None,
) -> ModelT:
    """Replace the ``nn.Linear`` layers of ``model`` by :class:`QuantLinear`, in place, layer by layer.

    Each full-precision weight is freed as soon as its layer is converted (with hessians, when all are). On DiT-XL/2 the
    default patterns leave the timestep, label and adaLN layers alone and convert 170: q, k, v, out and both MLP layers
    of 28 blocks, and the two output projections.

    Weights that :func:`qandc.load_pipeline` has cast are quantized from the precision of their file.

    Args:
        model: any module; it must not be an ``nn.Linear`` itself (use ``QuantLinear.from_linear``).
        w_bits: 4 or 8.
        a_bits: 4 to 8.
        skip_patterns: layers whose qualified name contains one of these substrings stay as they are.
        weight_clip: ``max``, or ``mse``, the scale of least squared error, which pays with 4 bits and hessians.
        smoothing: layer name to ``[in_features]`` factors (:func:`qandc.smoothing_factors`).
        hessians: layer name to ``[in_features, in_features]`` (:func:`qandc.input_hessians`): these weights are rounded
            with error feedback (GPTQ) instead of to nearest. Worth much with 4 bits, nothing with 8.

    Returns:
        ``model``.

    Raises:
        ConfigError: unknown bits, patterns or clip, factors for a layer that is not quantized here, or a layer that no
            kernel can run (:meth:`QuantLinear.from_linear`).
        ModelError: nothing is left to quantize, or a layer has hooks or a replaced ``forward``, which would be lost.
        DataError: a weight or bias holds NaN or inf, or factors or a Hessian are not what ``from_linear`` takes.

    After any of them the model is unchanged. Subclasses of ``nn.Linear`` stay as they are, and so do, with a warning,
    layers whose weight other code reads past their forward, and adapters of PEFT: these stay beside their quantized
    base layer, or in it if they were merged; to merge or unmerge them afterwards is refused.
    """
    config = QuantConfig(w_bits, a_bits, skip_patterns, weight_clip)
    smoothing, hessians = smoothing or {}, hessians or {}
    if isinstance(model, nn.Linear):
        raise ModelError("the model is a single nn.Linear; use QuantLinear.from_linear(linear)")
    linears = layers_to_quantize(model, config)
    chosen = list(linears)
    for what, given in (("smoothing", smoothing), ("hessians", hessians)):
        strangers = [name for name in given if name not in chosen]
        if strangers:
            raise ConfigError(f"{what} names {strangers[0]!r}, which is no layer that is quantized here")
    for name in chosen:  # before the first change: a refused model stays whole
        linear = linears[name]
        check_layer(name, linear.in_features, linear.weight.dtype, config.w_bits)
        if linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__:
            raise ModelError(f"{name} has hooks or a replaced forward, which would be lost; remove them first")
        check_finite(linear.weight, f"{name}.weight")
        check_finite(linear.bias, f"{name}.bias")
    factors = {id(linears[name]): value for name, value in smoothing.items()}
    exact = model.__dict__.get(EXACT_WEIGHTS, dict)()
    inputs = {id(linears[name]): value for name, value in hessians.items()}
    converted: dict[int, QuantLinear] = {}  # a layer registered under two names stays one layer

    def convert(name: str, linear: nn.Linear) -> None:
        key = id(linear)
        if key not in converted:
            args = (
                factors.get(key),
                weight_clip,
                inputs.get(key),
                _unrounded(linear.weight, exact.get(f"{name}.weight")),
            )
            converted[key] = QuantLinear.from_linear(linear, w_bits, a_bits, *args)

    for name in dict.fromkeys((*smoothing, *hessians)):
        try:
            if name in hessians:  # whether it can be used is known when it has been: these are converted first
                convert(name, linears[name])
            else:
                smoothed_weight(linears[name].weight, smoothing[name])
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    for name in chosen:
        linear = linears.pop(name)
        convert(name, linear)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], converted[id(linear)])
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # else its fast path, when compiled, passes by linear1 and linear2
    for _, tuner in tuner_layers(model):
        if isinstance(tuner.base_layer, QuantLinear):
            tuner.merge = tuner.unmerge = refuse_merge
    reset_all_caches(model)  # what it holds are features of the full-precision model
    _note_for_diffusers(model, config)
    return model


def _unrounded(weight: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor | None:
    """The stored weight in float32, if rounded it is the one that is there: if nobody has changed that since."""
    if stored is None or stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
        return None
    return stored.to(weight.device, torch.float32)


def refuse_merge(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``merge`` and ``unmerge`` of an adapter beside a quantized layer.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "quantized weights take no adapter in; keep it beside them, or merge it into the full-precision model before "
        "quantize_model (nor do they give one back: unmerge it there as well)"
    )


def _note_for_diffusers(model: Any, config: QuantConfig) -> None:
    """Have ``save_pretrained`` of a diffusers model write what its ``from_pretrained`` has to know."""
    register = getattr(model, "register_to_config", None)
    if register is None:
        return
    schemes = {name: f"W{layer.w_bits}A{layer.a_bits}" for name, layer in quant_layers(model).items()}
    linears = [name for name, module in model.named_modules() if type(module) in (nn.Linear, QuantLinear)]
    kept = kept_layers(model)
    implied = {name: config.scheme for name in linears if not config.skips(name) and name not in kept}
    note = {"quant_method": "qandc", **asdict(config), "skip_patterns": list(config.skip_patterns)}
    register(quantization_config=note if schemes == implied else {**note, "layers": schemes})


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: ``kernel`` is what runs where the layer is now, ``reason`` says why."""

    name: str
    quantized: bool
    scheme: str
    bytes_before: int
    bytes_after: int
    kernel: str
    reason: str


@dataclass(frozen=True)
class QuantizationReport:
    """All linear layers of a model, quantized or not; ``print`` it for a table."""

    layers: tuple[LayerReport, ...]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that are QuantLinear."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def quantized_bytes(self) -> tuple[int, int]:
        """Weight bytes of the quantized layers alone, before and after."""
        return sum(layer.bytes_before for layer in self.quantized), sum(layer.bytes_after for layer in self.quantized)

    @property
    def bytes_before(self) -> int:
        """Weight bytes of all linear layers as they were."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Weight bytes of all linear layers as they are."""
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=4)
        lines = [f"{'layer':{width}}  {'scheme':24} {'bytes before':>12} {'after':>12}  kernel"]
        for layer in self.layers:
            lines.append(
                f"{layer.name:{width}}  {layer.scheme:24} {layer.bytes_before:12,} {layer.bytes_after:12,}  "
                f"{layer.kernel} ({layer.reason})"
            )
        lines.append(
            f"{len(self.quantized)} of {len(self.layers)} linear layers quantized; weights "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        return "\n".join(lines)


@checked
def quantization_report(model: nn.Module) -> QuantizationReport:
    """Per linear layer: scheme, weight bytes before and after, which kernel will run here, and why."""
    rows, kept = [], kept_layers(model)
    fused = model.__dict__.get(FUSED)
    if fused is not None:
        fused.inspect(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            device = module.qweight.device
            if device.type == "meta":
                kernel, reason = "none", "on the meta device"
            else:
                backend, reason = select_backend(device)
                kernel = f"{backend} {'int8' if module.w_bits == 8 else 'int4'}_linear"
                how = fused.kernel_of(name) if fused is not None and backend == "triton" else None
                if how is not None:
                    kernel, reason = f"{kernel}, {how[0]}", f"{reason}; {how[1]}"
            itemsize = module.weight_dtype_holder.element_size()
            before = module.original_bytes or module.in_features * module.out_features * itemsize
            rows.append(LayerReport(name, True, module.scheme, before, module.weight_bytes, kernel, reason))
        elif isinstance(module, nn.Linear):
            size = module.weight.numel() * module.weight.element_size()
            dtype = str(module.weight.dtype).removeprefix("torch.")
            rows.append(LayerReport(name, False, dtype, size, size, "torch linear", kept.get(name, "not quantized")))
    return QuantizationReport(tuple(rows))
