"""Define the quantization method "qandc" of diffusers: its config and its quantizer.

:mod:`qandc.quantization.registration` adds both to diffusers.

Full-precision weights are quantized one by one as diffusers hands them over. A quantized checkpoint is loaded into
empty layers; which ones, ``quantization_config`` in its ``config.json`` says.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from qandc.errors import ConfigError, ModelError
from qandc.quantization.conversion import note_to_save, quant_layers, settings_to_save
from qandc.quantization.fused_projections import keep_fused_quantized
from qandc.quantization.linear import OPTIONAL_BUFFERS, QuantLinear, check_finite, check_layer, skeleton_layer
from qandc.quantization.plan import assign, resolved
from qandc.quantizer import QuantConfig, parse_scheme
from qandc.support.arguments import checked

__all__ = ["QandCConfig", "QandCQuantizer"]

# diffusers may read files in parallel, and the weight of a layer, which replaces it, and its bias be in two of them
LOADING = threading.Lock()


class Method(str, Enum):
    """Name the method to diffusers, which reads ``quant_method.value`` and has a closed enumeration of its own."""

    QANDC = "qandc"


class QandCConfig(QuantizationConfigMixin):
    """Configure the quantization of a diffusers model: ``from_pretrained(..., quantization_config=QandCConfig())``.

    Args:
        w_bits, a_bits, skip_patterns, weight_clip, conditioning: as :class:`qandc.QuantConfig`. What is saved holds the
            patterns that ``skip_patterns=None`` meant for the model.
        layers: qualified name to scheme ("W8A8") of every quantized layer. Saved only where w_bits, a_bits and
            skip_patterns do not tell them, as with ``conditioning``, after several calls of
            :func:`qandc.quantize_model`, or if other code reads the weight of a layer; they then count instead.
        quant_method: "qandc".

    Raises:
        ConfigError: a value is outside what is allowed, or a name unknown.
    """

    @checked
    def __init__(
        self,
        w_bits: int = 8,
        a_bits: int = 8,
        skip_patterns: Sequence[str] | None = None,
        weight_clip: str = "max",
        layers: Mapping[str, str] | None = None,
        quant_method: str = Method.QANDC.value,
        conditioning: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown or quant_method != Method.QANDC.value:
            what = f"{min(unknown)}={unknown[min(unknown)]!r}" if unknown else f"quant_method={quant_method!r}"
            raise ConfigError(
                f"QandCConfig got {what}; it knows w_bits, a_bits, skip_patterns, weight_clip, conditioning, layers "
                "and quant_method 'qandc' (a checkpoint of a newer qandc: update qandc)"
            )
        config = QuantConfig(w_bits, a_bits, skip_patterns, weight_clip, conditioning)
        method: Any = Method.QANDC
        self.quant_method = method
        self.w_bits, self.a_bits, self.weight_clip, self.conditioning = w_bits, a_bits, weight_clip, conditioning
        self.skip_patterns = None if config.skip_patterns is None else list(config.skip_patterns)
        if layers is not None and not layers:
            raise ConfigError(f"layers must map names of layers to schemes, as {{'proj': 'W8A8'}}; got {layers!r}")
        self.layers = None if layers is None else dict(layers)
        self.bits_of_layers()

    def __eq__(self, other: object) -> bool:  # the inherited one compares the method alone
        return isinstance(other, QandCConfig) and self.to_dict() == other.to_dict()

    @property
    def settings(self) -> QuantConfig:
        """Return the settings validated anew: diffusers' ``update`` may have changed them."""
        return QuantConfig(self.w_bits, self.a_bits, self.skip_patterns, self.weight_clip, self.conditioning)

    def bits_of_layers(self) -> dict[str, tuple[int, int]]:
        """Map the name of each layer in ``layers`` to its (w_bits, a_bits)."""
        found = {}
        for name, scheme in (self.layers or {}).items():
            try:
                found[name] = parse_scheme(str(scheme))
            except ConfigError as error:
                raise ConfigError(f"the scheme of {name}: {error}") from None
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds."""
        layers = {} if self.layers is None else {"layers": dict(self.layers)}
        return {"quant_method": self.quant_method.value, **settings_to_save(self.settings), **layers}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all settings, defaults included: another version may have other defaults."""
        return self.to_dict()


class QandCQuantizer(DiffusersQuantizer):
    """Replace and fill quantized layers while diffusers loads a model (hooks of ``diffusers/quantizers/base.py``)."""

    is_serializable = True
    is_trainable = False
    is_compileable = True
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QandCConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.bits: dict[str, tuple[int, int]] = {}
        self.absent: list[tuple[QuantLinear, str]] = []  # optional buffers that the checkpoint lacks

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to load without accelerate, or with layers sent to the disk."""
        if importlib.util.find_spec("accelerate") is None:
            raise ModelError("diffusers loads quantized models through accelerate, which is not here; install it")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError(
                "device_map sends layers to the disk, where accelerate leaves no buffers, and quantized weights are "
                "buffers; allow more memory on the GPU or the CPU (max_memory), or give device_map='cpu'"
            )

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        self.bits = self.config.bits_of_layers() or self._assigned(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, bits in self.bits.items():
            linear = modules.get(name)
            if type(linear) is not nn.Linear:
                raise ModelError(f"quantization_config names {name}, no linear layer of {type(model).__name__}")
            size = (linear.in_features, linear.out_features)
            exempt = not set(name.split(".")).isdisjoint(keep_in_fp32_modules)
            dtype = torch.float32 if exempt else linear.weight.dtype
            check_layer(name, linear.in_features, dtype, bits[0])
            if self.pre_quantized:
                layer = skeleton_layer(*size, bias=linear.bias is not None, bits=bits, dtype=dtype)
                for buffer in OPTIONAL_BUFFERS:  # what the checkpoint lacks is taken away again when that is known
                    layer.make_optional(buffer)
                _replace(model, name, layer)
        return model

    def _assigned(self, model: Any) -> dict[str, tuple[int, int]]:
        """Choose the layers, and note what was chosen where ``save_pretrained`` finds it: not in the user's config."""
        settings = self.config.settings
        bits = assign(model, settings, saved=self.pre_quantized).bits
        if not self.pre_quantized:
            schemes = {name: "W{}A{}".format(*found) for name, found in bits.items()}
            self.config = QandCConfig(**note_to_save(model, resolved(model, settings), schemes))
            self.quantization_config = self.config
            model.register_to_config(quantization_config=self.config)
        return bits

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Leave out of the missing keys ranges and smoothing: they are there or not, anything else has to be."""
        absent = []
        for key in missing_keys:
            owner, _, leaf = key.rpartition(".")
            layer = model.get_submodule(owner)
            if isinstance(layer, QuantLinear) and leaf in OPTIONAL_BUFFERS:
                # no None before the first tensor comes: until then diffusers adds up the sizes of all that it expected
                setattr(layer, leaf, torch.empty(0))
                self.absent.append((layer, leaf))
            else:
                absent.append(key)
        if absent:
            raise ModelError(
                f"the checkpoint of this {type(model).__name__} lacks {len(absent)} tensors, {min(absent)} among them; "
                "its quantization_config is not that of its weights, or it is damaged: save it again"
            )
        return []

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Tell whether :meth:`create_quantized_param` takes this tensor."""
        owner, _, leaf = param_name.rpartition(".")
        return owner in self.bits and not (self.pre_quantized and leaf == "bias")

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize a weight that has arrived, or put a tensor of a quantized layer in its place.

        Args:
            args: model, tensor, its name, its device, the state dict that it comes from.

        Raises:
            DataError: the weight holds NaN or inf.
            ModelError: a tensor is not what ``quantization_config`` says.
        """
        model, param_value, param_name, target_device, state_dict, *_ = args
        with LOADING:
            while self.absent:
                setattr(*self.absent.pop(), None)
        name, _, leaf = param_name.rpartition(".")
        stored = state_dict[param_name]  # param_value has been rounded to torch_dtype
        if self.pre_quantized:
            layer = model.get_submodule(name)
            fault = layer.fault_of(leaf, stored)
            if fault is not None:
                raise ModelError(
                    f"{param_name} is {fault[0]}; its quantization_config says W{layer.w_bits}A{layer.a_bits}, "
                    f"{fault[1]}: save the model again"
                )
            setattr(layer, leaf, stored.to(target_device))
            return
        w_bits, a_bits = self.bits[name]
        check_finite(param_value, param_name)
        with LOADING:
            layer = model.get_submodule(name)
            setattr(layer, leaf, nn.Parameter(param_value.to(target_device), requires_grad=False))
            if leaf == "weight":
                exact, clip = stored.to(target_device, torch.float32), self.config.weight_clip
                layer = QuantLinear.from_linear(layer, w_bits, a_bits, weight_clip=clip, weight=exact)
                _replace(model, name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layers = quant_layers(model)
        for name in self.bits:
            if name not in layers or layers[name].qweight.is_meta:
                raise ModelError(f"no weight came for {name}; load the model by from_pretrained of its directory")
            if self.pre_quantized:
                layers[name].check_state(name)
        keep_fused_quantized(model)
        model.is_quantized = False  # for diffusers, which else refuses to cast it: quantized layers follow
        return model

    def _dequantize(self, model: Any) -> Any:
        raise ModelError("quantized weights do not turn back; load the model without quantization_config instead")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
