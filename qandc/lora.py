"""LoRA adapters of PEFT on quantized layers: ``y = QuantLinear(x) + scaling · B A x``."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from qandc.conversion import refuse_merge
from qandc.errors import ConfigError, ModelError
from qandc.linear import QuantLinear

__all__ = ["lora_for_quantized"]

INITS = (True, False, "gaussian")


def lora_for_quantized(config: Any) -> Any:
    """Have a ``peft.LoraConfig`` take :class:`qandc.QuantLinear` layers too, e.g. for ``peft.inject_adapter_in_model``.

    Adapters stay beside the layers: blocks that have any run as diffusers wrote them, not fused.

    Args:
        config: changed in place; ``target_modules`` names the layers, as always.

    Returns:
        ``config``.

    Raises:
        ModelError: peft is not installed.
        ConfigError: an initialisation that would change the weights below the adapters.
    """
    try:
        layer_class = _layer_class()
    except ImportError as error:
        raise ModelError(f"LoRA adapters come from peft, which does not import ({error}); pip install peft") from error
    if config.init_lora_weights not in INITS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} may change the weights below the adapters, and those are "
            f"quantized; choose one of {', '.join(map(repr, INITS))}"
        )
    config._register_custom_module({QuantLinear: layer_class})
    return config


@functools.cache
def _layer_class() -> Any:
    from peft.tuners.lora.layer import Linear

    base: Any = Linear

    class LoraQuantLinear(base):
        """PEFT's own layer, but for what would need the weight below it."""

        lora_variants = {(): None}  # noqa: RUF012 (DoRA and others read or change the weight)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")  # it is, from here on
                super().__init__(*args, **kwargs)

        merge = unmerge = refuse_merge

    return LoraQuantLinear
