"""Quantize a whole model, and tell what became of it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import torch
from torch import nn

from qandc.errors import ConfigError, DataError, ModelError
from qandc.quantization.fused_projections import FusedProjection, keep_fused_quantized
from qandc.quantization.linear import (
    QuantLinear,
    check_finite,
    check_layer,
    check_parameters,
    skeleton_layer,
    smoothed_weight,
)
from qandc.quantization.plan import assign, resolved
from qandc.quantization.readers import kept_layers, tuner_layers
from qandc.quantizer import COMPILED, QuantConfig
from qandc.support.arguments import Between, check_fields, checked
from qandc.support.attach import attachments, original_class
from qandc_kernels import select_backend

__all__ = [
    "LayerReport",
    "QuantizationReport",
    "layers_to_quantize",
    "quant_layers",
    "quantization_plan",
    "quantization_report",
    "quantize_model",
]

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)

EXACT_WEIGHTS = "_qandc_exact_weights"  # attribute of a model that was cast: a function that gives its tensors before
ORIGINALS = "_qandc_originals"  # attribute of a model: a dictionary that gets each layer that is replaced, by name


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Map qualified names to quantized layers, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def layers_to_quantize(model: nn.Module, config: QuantConfig) -> dict[str, nn.Linear]:
    """Choose the linear layers that become :class:`QuantLinear`, by qualified name, as :func:`assign` decides."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {name: modules[name] for name in assign(model, config).bits}


@checked
def quantize_model(
    model: ModelT,
    w_bits: int = 8,
    a_bits: int = 8,
    skip_patterns: Sequence[str] | None = None,
    *,
    conditioning: str | None = None,
    weight_clip: str = "max",
    smoothing: Mapping[str, torch.Tensor] | None = None,
    hessians: Mapping[str, torch.Tensor] | None = None,
) -> ModelT:
    """Replace the ``nn.Linear`` layers of ``model`` by :class:`QuantLinear`, in place, layer by layer.

    Each full-precision weight is freed as soon as its layer is converted (with hessians, when all are). Which layers
    are replaced by default depends on the class of the model: attention and MLPs of the repeated blocks, no embedders,
    timestep and text projections, final layers (of DiT both output projections too). ``print`` what
    :func:`quantization_plan` returns to see it. A model without repeated blocks is quantized whole.

    Weights that :func:`qandc.load_pipeline` has cast are quantized from the precision of their file.

    Args:
        model: any module; it must not be an ``nn.Linear`` itself (use ``QuantLinear.from_linear``).
        w_bits: 4 or 8.
        a_bits: 4 to 8; or 16, for activations that stay as they are (weight-only).
        skip_patterns: layers whose qualified name contains one of these substrings stay as they are; ``.norm_out`` is
            at the root only, ``re:...`` a regular expression. None: what fits the class of the model.
        conditioning: scheme of the modulation layers of the blocks, which see one row per sample: "W8A16" or "W4A16"
            (weights alone are quantized), or as "W8A8". None leaves them in full precision. They are 15 to 33 % of
            the weights of FLUX.1, SD3.5 and Qwen-Image.
        weight_clip: ``max``, or ``mse``, the scale of least squared error, which pays with 4 bits and hessians.
        smoothing: layer name to ``[in_features]`` factors (:func:`qandc.smoothing_factors`).
        hessians: layer name to ``[in_features, in_features]`` (:func:`qandc.input_hessians`, or of large models
            :func:`qandc.block_hessians`): these weights are rounded with GPTQ instead of to nearest. Worth much with 4
            bits, nothing with 8.

    Returns:
        ``model``.

    Raises:
        ConfigError: unknown bits, scheme or clip, a pattern that matches no module, factors for a layer that is not
            quantized here, or a layer that no kernel can run (:meth:`QuantLinear.from_linear`).
        ModelError: nothing is left to quantize, or a layer has hooks or a replaced ``forward``, which would be lost.
        DataError: a weight or bias holds NaN or inf or is not of its layer's size, or factors or a Hessian are not what
            ``from_linear`` takes.

    After any of them the model is unchanged. Subclasses of ``nn.Linear`` stay as they are, and so do, with a warning,
    layers whose weight other code reads past their forward, and adapters of PEFT: these stay beside their quantized
    base layer, or in it if they were merged; to merge or unmerge them afterwards is refused.
    """
    config = QuantConfig(w_bits, a_bits, skip_patterns, weight_clip, conditioning)
    smoothing, hessians = smoothing or {}, hessians or {}
    if isinstance(model, nn.Linear):
        raise ModelError("the model is a single nn.Linear; use QuantLinear.from_linear(linear)")
    bits = assign(model, config).bits
    config = resolved(model, config)
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen, linears = list(bits), {name: modules[name] for name in bits}
    for what, given in (("smoothing", smoothing), ("hessians", hessians)):
        strangers = [name for name in given if name not in chosen]
        if strangers:
            raise ConfigError(f"{what} names {strangers[0]!r}, which is no layer that is quantized here")
    for name in chosen:  # before the first change: a refused model stays whole
        linear = linears[name]
        check_parameters(name, linear)
        check_layer(name, linear.in_features, linear.weight.dtype, bits[name][0])
        if linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__:
            raise ModelError(f"{name} has hooks or a replaced forward, which would be lost; remove them first")
        check_finite(linear.weight, f"{name}.weight")
        check_finite(linear.bias, f"{name}.bias")
    factors = {id(linears[name]): value for name, value in smoothing.items()}
    exact = model.__dict__.get(EXACT_WEIGHTS, dict)()
    inputs = {id(linears[name]): name for name in hessians}
    originals: dict[str, nn.Linear] | None = model.__dict__.get(ORIGINALS)
    converted: dict[int, QuantLinear] = {}  # a layer registered under two names stays one layer

    def stored(name: str, linear: nn.Linear) -> torch.Tensor | None:
        return _unrounded(linear.weight, exact.get(f"{name}.weight"))

    def convert(name: str, linear: nn.Linear) -> None:
        key = id(linear)
        if key not in converted:
            hessian = hessians[inputs[key]] if key in inputs else None  # not before: it may be computed now
            converted[key] = QuantLinear.from_linear(
                linear, *bits[name], factors.get(key), weight_clip, hessian, stored(name, linear)
            )

    for name in dict.fromkeys((*hessians, *smoothing)):
        try:
            if name in hessians:  # whether it can be used is known when it has been: these are converted first
                convert(name, linears[name])
            else:
                exact_weight = stored(name, linears[name])
                smoothed_weight(linears[name].weight if exact_weight is None else exact_weight, smoothing[name])
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    for name in chosen:
        linear = linears.pop(name)
        convert(name, linear)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], converted[id(linear)])
        if originals is not None:
            originals[name] = _in_host_memory(linear)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # else its fast path, when compiled, passes by linear1 and linear2
    for _, tuner in tuner_layers(model):
        if isinstance(tuner.base_layer, QuantLinear):
            tuner.merge = refuse_merge
            if getattr(tuner, "merged", True):
                tuner.unmerge = refuse_merge
    keep_fused_quantized(model)
    for attachment in attachments(model):  # what a cache holds are features of the full-precision model
        attachment.reset()
    _note_for_diffusers(model, config)
    return model


def _in_host_memory(linear: nn.Linear) -> nn.Linear:
    """Move the parameters of a layer to the CPU, but for others that hold them too."""
    for name, parameter in linear._parameters.items():
        if parameter is not None and not parameter.is_cpu and not parameter.is_meta:
            linear._parameters[name] = nn.Parameter(parameter.detach().cpu(), parameter.requires_grad)
    return linear


def _unrounded(weight: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor | None:
    """Return the weight before rounding, float32, if rounded it is the one in use: if nobody has changed that since."""
    if stored is None or stored.shape != weight.shape or not torch.equal(stored.to(weight), weight):
        return None
    return stored.to(weight.device, torch.float32)


def refuse_merge(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``merge`` and ``unmerge`` of an adapter beside a quantized layer.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        "quantized weights take no adapter in and give none back: leave it beside them (set_adapters scales it, "
        "delete_adapters removes it), or merge it in full precision (fuse_lora) before quantize_model"
    )


def settings_to_save(config: QuantConfig) -> dict[str, Any]:
    """Describe settings for ``config.json``; ``conditioning`` is left out where it is None, as older versions know."""
    settings = asdict(config)
    if config.skip_patterns is not None:
        settings["skip_patterns"] = list(config.skip_patterns)
    if config.conditioning is None:
        del settings["conditioning"]
    return settings


def _note_for_diffusers(model: Any, config: QuantConfig) -> None:
    """Have ``save_pretrained`` of a diffusers model write what its ``from_pretrained`` has to know."""
    model = getattr(model, COMPILED, model)
    register = getattr(model, "register_to_config", None)
    if register is None:
        return
    schemes = {name: f"W{layer.w_bits}A{layer.a_bits}" for name, layer in quant_layers(model).items()}
    register(quantization_config=note_to_save(model, config, schemes))


def note_to_save(model: nn.Module, config: QuantConfig, schemes: Mapping[str, str]) -> dict[str, Any]:
    """Describe for ``config.json`` what is quantized: settings, and all layers where these do not tell them.

    Adapters of PEFT are left out, and layers beside them called as they are without.
    """
    bases = {f"{name}.base_layer": name for name, _ in tuner_layers(model)}
    inside = tuple(f"{name}." for name in bases.values())
    linears = [name for name, module in model.named_modules() if original_class(module) in (nn.Linear, QuantLinear)]
    linears = [bases.get(name, name) for name in linears if name in bases or not name.startswith(inside)]
    schemes = {bases.get(name, name): scheme for name, scheme in schemes.items()}
    note = {"quant_method": "qandc", **settings_to_save(config)}
    implied = {name: config.scheme for name in linears if not config.skips(name)}
    return note if schemes == implied else {**note, "layers": schemes}


@dataclass(frozen=True)
class LayerReport:
    """Describe one linear layer: ``kernel`` is what runs where the layer is now, ``reason`` says why."""

    name: str
    quantized: bool
    scheme: str
    bytes_before: int
    bytes_after: int
    kernel: str
    reason: str


@dataclass(frozen=True)
class QuantizationReport:
    """List all linear layers of a model, quantized or not, and what the rest of it takes.

    ``print`` it for a table with a row for each group of layers whose names differ in numbers only.

    Attributes:
        layers: in the order of the model.
        other_bytes: of all other parameters and buffers, biases included.
    """

    layers: tuple[LayerReport, ...]
    other_bytes: Annotated[int, Between(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """Return the layers that are QuantLinear."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def usual(self) -> LayerReport:
        """Return one of the quantized layers: the first of those that have the scheme of the most."""
        schemes = Counter(layer.scheme for layer in self.quantized)
        return next(layer for layer in self.quantized if layer.scheme == schemes.most_common(1)[0][0])

    @property
    def quantized_bytes(self) -> tuple[int, int]:
        """Return weight bytes of the quantized layers alone, before and after."""
        return sum(layer.bytes_before for layer in self.quantized), sum(layer.bytes_after for layer in self.quantized)

    @property
    def bytes_before(self) -> int:
        """Return weight bytes of all linear layers as they were."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Return weight bytes of all linear layers as they are."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def total_bytes(self) -> tuple[int, int]:
        """Return bytes of all parameters and buffers of the model, before and after."""
        return self.bytes_before + self.other_bytes, self.bytes_after + self.other_bytes

    @property
    def groups(self) -> dict[str, tuple[LayerReport, ...]]:
        """Group layers of one scheme, kernel and reason by their names, with ``*`` for the numbers that differ."""
        found: dict[tuple[str, ...], list[LayerReport]] = {}
        for layer in self.layers:
            key = (NUMBER.sub("*", layer.name), layer.scheme, layer.kernel, layer.reason)
            found.setdefault(key, []).append(layer)
        return {_group_name([layer.name for layer in group]): tuple(group) for group in found.values()}

    def __str__(self) -> str:
        groups = self.groups
        width = max(map(len, groups), default=6)
        lines = [f"{'layers':{width}} {'':>5}  {'scheme':24} {'bytes before':>14} {'after':>14}  kernel"]
        for name, group in groups.items():
            before, after = sum(row.bytes_before for row in group), sum(row.bytes_after for row in group)
            lines.append(
                f"{name:{width}} {f'x{len(group)}' if len(group) > 1 else '':>5}  {group[0].scheme:24} {before:14,} "
                f"{after:14,}  {group[0].kernel} ({group[0].reason})"
            )
        before, after = self.total_bytes
        lines.append(
            f"{len(self.quantized)} of {len(self.layers)} linear layers quantized; weights "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes; whole model {before:,} -> {after:,} bytes"
        )
        return "\n".join(lines)


NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a qualified name


def _group_name(names: list[str]) -> str:
    """Join names that differ in numbers only: where they differ is a ``*``."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(first if len({first, *others}) == 1 else "*" for first, *others in columns)


@checked
def quantization_plan(
    model: nn.Module,
    w_bits: int = 8,
    a_bits: int = 8,
    skip_patterns: Sequence[str] | None = None,
    *,
    conditioning: str | None = None,
) -> QuantizationReport:
    """Tell what :func:`quantize_model` would make of each linear layer; nothing is changed or computed.

    ``print`` it for a table of layers, schemes, bytes and kernels, and why the others stay. A model on the meta device
    (``with torch.device("meta"): ...``) will do, which takes no memory.

    Args:
        model, w_bits, a_bits, skip_patterns, conditioning: as for :func:`quantize_model`.

    Returns:
        What :func:`quantization_report` would return of the quantized model, with reasons for the layers that stay. The
        kernels of a model on the meta device are those of the GPU that is here, or of the CPU.

    Raises:
        ConfigError, ModelError: as :func:`quantize_model`.
    """
    config = QuantConfig(w_bits, a_bits, skip_patterns, conditioning=conditioning)
    assignment, rows = assign(model, config), []
    for name, module in model.named_modules():
        if name in assignment.bits:
            bits, dtype = assignment.bits[name], module.weight.dtype
            check_layer(name, module.in_features, dtype, bits[0])
            layer = skeleton_layer(module.in_features, module.out_features, bias=False, bits=bits, dtype=dtype)
            device = module.weight.device
            if device.type == "meta":
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            size = module.weight.numel() * module.weight.element_size()
            rows.append(_quantized_row(name, layer, size, *_kernel_of(layer, device)))
        elif isinstance(module, nn.Linear | QuantLinear):
            rows.append(_row(name, module, assignment.reasons))
    return QuantizationReport(tuple(rows), _other_bytes(model))


@checked
def quantization_report(model: nn.Module) -> QuantizationReport:
    """Report for each linear layer scheme, weight bytes before and after, which kernel will run here, and why."""
    kept = kept_layers(model)
    instead: dict[str, tuple[str, str]] = {}
    for attachment in attachments(model):
        instead |= attachment.kernels_of(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantLinear)}
    rows = tuple(_row(name, m, kept, instead.get(name)) for name, m in linears.items())
    return QuantizationReport(rows, _other_bytes(model))


def _row(name: str, module: nn.Module, reasons: Mapping[str, str], how: tuple[str, str] | None = None) -> LayerReport:
    """Describe a layer as it is; ``reasons`` says why some are not quantized, ``how`` what runs it in its place."""
    if not isinstance(module, QuantLinear):
        weight: Any = module.weight
        size, dtype = weight.numel() * weight.element_size(), str(weight.dtype).removeprefix("torch.")
        return LayerReport(name, False, dtype, size, size, "torch linear", reasons.get(name, "not quantized"))
    offloaded = module.qweight.is_pinned()  # such weights are copied to where the input is
    device = torch.device("cuda") if offloaded else module.qweight.device
    kernel, reason = ("none", "on the meta device") if device.type == "meta" else _kernel_of(module, device)
    if how is not None and kernel.startswith("triton"):
        kernel, reason = f"{kernel}, {how[0]}", f"{reason}; {how[1]}"
    itemsize = module.weight_dtype_holder.element_size()
    before = module.original_bytes or module.in_features * module.out_features * itemsize
    return _quantized_row(name, module, before, kernel, reason)


def _quantized_row(name: str, layer: QuantLinear, bytes_before: int, kernel: str, reason: str) -> LayerReport:
    return LayerReport(name, True, layer.scheme, bytes_before, layer.weight_bytes, kernel, reason)


def _kernel_of(layer: QuantLinear, device: torch.device) -> tuple[str, str]:
    """Name the kernel that runs a layer on a device, and say why."""
    backend, reason = select_backend(device)
    return f"{backend} {'weight_only' if layer.weight_only else f'int{layer.w_bits}'}_linear", reason


def _other_bytes(model: nn.Module) -> int:
    """Add up parameters and buffers but for the weights of linear layers with their scales."""
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | QuantLinear):
            own: list[torch.Tensor | None] = [module.bias]
        elif isinstance(module, FusedProjection):  # holds the bytes of other layers
            own = []
        else:
            own = [*module._parameters.values(), *module._buffers.values()]
        tensors |= {id(tensor): tensor for tensor in own if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
