"""Define the layer that PEFT puts around a quantized one.

Imports peft, so :mod:`qandc.quantization.lora` imports this where it is needed. A
module of its own, and no class made inside of a function, so that models with adapters can be pickled.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.lora.layer import Linear

from qandc.quantization.conversion import refuse_merge

__all__ = ["LoraQuantLinear"]

PeftLinear: Any = Linear


class LoraQuantLinear(PeftLinear):
    """Add LoRA to a quantized layer, ``y = QuantLinear(x) + scaling · B A x``: PEFT's layer, which never merges."""

    lora_variants = {(): None}  # noqa: RUF012 (DoRA and others read or change the weight)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # it is, from here on
            super().__init__(*args, **kwargs)

    merge = refuse_merge
