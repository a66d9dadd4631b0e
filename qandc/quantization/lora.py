"""Let PEFT's LoRA adapters sit on quantized layers: ``y = QuantLinear(x) + scaling · B A x``.

Nobody has to call anything here: :mod:`qandc.quantization.registration` extends PEFT and diffusers when they are
imported, so that ``pipe.load_lora_weights``, ``model.add_adapter`` and ``peft.get_peft_model`` take quantized models.
Each extension looks for a :class:`qandc.QuantLinear` first, and leaves models without one to the function it extends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from qandc.errors import ConfigError, ModelError
from qandc.quantization.conversion import quant_layers, refuse_merge
from qandc.quantization.linear import QuantLinear
from qandc.quantization.readers import tuner_layers
from qandc.support.attach import attachments

__all__ = ["extend_flux_loader", "extend_fuse_lora", "extend_peft", "extend_saving", "lora_for_quantized"]

INITS = (True, False, "gaussian")


def lora_for_quantized(config: Any) -> Any:
    """Have a ``peft.LoraConfig`` take :class:`qandc.QuantLinear` layers too, and check that it can.

    PEFT and diffusers do this by themselves for models that hold such layers, once qandc is imported.

    Args:
        config: changed in place; ``target_modules`` names the layers, as always.

    Returns:
        ``config``.

    Raises:
        ModelError: peft is not installed.
        ConfigError: an initialisation or a variant, as DoRA, that reads or changes the weights below the adapters.
    """
    try:
        from qandc.quantization.lora_layer import LoraQuantLinear
    except ImportError as error:
        raise ModelError(f"LoRA adapters come from peft, which does not import ({error}); pip install peft") from error
    if config.init_lora_weights not in INITS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} may change the weights below the adapters, and those are "
            f"quantized; choose one of {', '.join(map(repr, INITS))}"
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    for name in dict.fromkeys(["use_dora", *variants]):
        value = getattr(config, name, None)
        if value:
            raise ConfigError(
                f"{name}={value!r} reads or changes the weights below the adapters, and those are quantized; take "
                "plain LoRA, or merge this adapter into the full-precision model before quantize_model"
            )
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def extend_peft(module: ModuleType) -> None:
    """Extend ``peft.tuners.lora.model``: its ``LoraModel`` adapts quantized layers, and refuses to merge into them."""

    def prepare(self: Any, peft_config: Any, model: nn.Module) -> None:
        if quant_layers(model):
            _check_not_fused(model)
            lora_for_quantized(peft_config)  # both refuse before the first layer is replaced
            for attachment in attachments(model):
                attachment.take_back(model)  # PEFT puts adapters where a layer's weight is
            targets = getattr(peft_config, "target_modules", None)
            if isinstance(targets, str) and targets.lower() == "all-linear":  # PEFT's own list has nn.Linear only
                peft_config.target_modules = _all_linear(model)

    _do_first(module.LoraModel, "_prepare_model", prepare)
    _do_first(module.LoraModel, "_check_merge_allowed", lambda self: _check_merge(self.model))


def extend_fuse_lora(module: ModuleType) -> None:
    """Extend ``diffusers.loaders.peft``: ``model.fuse_lora`` refuses before it has scaled or merged any layer."""
    _do_first(module.PeftAdapterMixin, "fuse_lora", lambda self, *args, **kwargs: _check_merge(self))


def extend_saving(module: ModuleType) -> None:
    """Extend ``diffusers.models.modeling_utils``: ``save_pretrained`` refuses what could not be loaded again."""
    _do_first(module.ModelMixin, "save_pretrained", lambda self, *args, **kwargs: _check_no_adapters(self))


def extend_flux_loader(module: ModuleType) -> None:
    """Extend ``diffusers.loaders.lora_pipeline``: FLUX's loader finds the shapes of quantized weights too."""
    loader = module.FluxLoraLoaderMixin
    expand = loader.__dict__["_maybe_expand_lora_state_dict"].__func__

    @functools.wraps(expand)
    def extended(cls: Any, transformer: Any, lora_state_dict: Any) -> Any:
        return expand(cls, _ShowsWeights(transformer) if quant_layers(transformer) else transformer, lora_state_dict)

    loader._maybe_expand_lora_state_dict = classmethod(extended)


class _ShowsWeights:
    """Stand in for a model in code that looks weights up in its state dict, where quantized layers have none."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Any]:
        weights = {f"{name}.weight": layer.weight for name, layer in quant_layers(self._model).items()}
        return {**self._model.state_dict(), **weights}


def _do_first(owner: Any, name: str, action: Callable[..., None]) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def extended(*args: Any, **kwargs: Any) -> Any:
        action(*args, **kwargs)
        return method(*args, **kwargs)

    setattr(owner, name, extended)


def _check_merge(model: nn.Module) -> None:
    if any(isinstance(tuner.base_layer, QuantLinear) for _, tuner in tuner_layers(model)):
        refuse_merge()


def _check_no_adapters(model: nn.Module) -> None:
    names = [name for name, _ in tuner_layers(model)]
    if names and quant_layers(model):
        raise ModelError(
            f"a quantized model is saved without adapters, which {names[0]} and {len(names) - 1} other layers have; "
            "save them by themselves (save_lora_adapter), call unload_lora(), save, and load them again"
        )


def _check_not_fused(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False) and quant_layers(module):
            raise ModelError(
                f"{name} runs q, k and v as one fused product, which would leave their adapters out; call "
                "unfuse_qkv_projections() first"
            )


def _all_linear(model: nn.Module) -> set[str]:
    """Name all linear layers, quantized or not, with adapters or without."""
    tuners = [name for name, _ in tuner_layers(model)]
    inside = tuple(f"{name}." for name in tuners)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)}
    return {name for name in linears if not name.startswith(inside)} | set(tuners)
