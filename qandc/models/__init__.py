"""Know models of diffusers by what methods need of them; one file a family, nothing else names their parts."""

from __future__ import annotations

from typing import Any

from qandc.models.dit import DIT, takes_class_labels
from qandc.models.family import Family
from qandc.models.pixart import PIXART

__all__ = ["FAMILIES", "Family", "family_of", "takes_class_labels"]

FAMILIES = {family.transformer: family for family in (DIT, PIXART)}


def family_of(model: Any) -> Family | None:
    """Return the family of a transformer, an instance of its class or of one derived from it; None for others."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)
