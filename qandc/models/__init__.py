"""Know models of diffusers by what methods need of them; one file a family, nothing else names their parts."""

from __future__ import annotations

from typing import Any

from qandc.errors import ModelError
from qandc.models.chroma import CHROMA
from qandc.models.dit import DIT, older_names
from qandc.models.family import Family
from qandc.models.flux import FLUX
from qandc.models.pixart import PIXART
from qandc.models.qwen_image import QWEN_IMAGE
from qandc.models.sd3 import SD3
from qandc.models.wan import WAN
from qandc.models.z_image import Z_IMAGE

__all__ = ["DIT", "FAMILIES", "Family", "class_conditional", "family_of", "older_names"]

FAMILIES = {family.transformer: family for family in (DIT, PIXART, FLUX, CHROMA, QWEN_IMAGE, SD3, WAN, Z_IMAGE)}


def family_of(model: Any) -> Family | None:
    """Return the family of a transformer, an instance of its class or of one derived from it; None for others."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def class_conditional(transformer: Any) -> tuple[Family, int]:
    """Return the family of a transformer that draws images of classes, and their number; it may be compiled.

    Raises:
        ModelError: it draws none, or has no weights.
    """
    for part in transformer.modules():
        family = family_of(part)
        if family is not None and family.classes is not None and hasattr(transformer, "config"):
            if next(part.parameters()).is_meta:
                raise ModelError(f"this {family.transformer} is on the meta device and has no weights; load them first")
            return family, family.classes(part)
    known = " and ".join(name for name, family in FAMILIES.items() if family.classes is not None)
    raise ModelError(
        f"sampling knows diffusers' {known}; got {type(transformer).__name__} (of a pipeline, pass pipe.transformer; "
        "what draws from prompts runs in its own pipeline)"
    )
