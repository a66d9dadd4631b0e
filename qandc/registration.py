"""``quantization_config=QandCConfig(...)`` in diffusers, without importing diffusers for those who do not use it.

diffusers looks methods up in two dictionaries of one module. Ours are added when that module has been imported,
whoever imports it: before ``import qandc``, or later, through a finder on ``sys.meta_path``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from qandc.errors import ModelError

__all__ = ["config_class", "register_when_imported"]

logger = logging.getLogger(__name__)

METHOD = "qandc"
REGISTRY = "diffusers.quantizers.auto"
TESTED = "0.35 to 0.42"


def config_class() -> Any:
    """``QandCConfig``; imports diffusers.

    Raises:
        ModelError: diffusers is missing, or does not look methods up where we know it to.
    """
    try:
        registry = importlib.import_module(REGISTRY)
    except ImportError as error:
        raise ModelError(_what_is_missing(error)) from error
    _register(registry)
    from qandc.diffusers_quantizer import QandCConfig

    return QandCConfig


def register_when_imported() -> None:
    """Register now if diffusers has its registry loaded, else when it loads it. Warns where it cannot."""
    if REGISTRY in sys.modules:
        _register_or_warn(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(registry: ModuleType) -> None:
    try:
        configs, quantizers = registry.AUTO_QUANTIZATION_CONFIG_MAPPING, registry.AUTO_QUANTIZER_MAPPING
        from qandc.diffusers_quantizer import QandCConfig, QandCQuantizer

        configs[METHOD], quantizers[METHOD] = QandCConfig, QandCQuantizer
    except (ImportError, AttributeError, TypeError) as error:
        raise ModelError(_what_is_missing(error)) from error


def _register_or_warn(registry: ModuleType) -> None:
    try:
        _register(registry)
    except ModelError as error:  # diffusers itself works without us
        logger.warning("%s", error)


def _what_is_missing(error: Exception) -> str:
    version = getattr(sys.modules.get("diffusers"), "__version__", "that is not installed")
    return (
        f"QandCConfig cannot be registered with diffusers {version} ({error}); install a version from {TESTED}, or "
        "call qandc.quantize_model on the loaded model instead"
    )


class _Finder(MetaPathFinder):
    """Finds the registry as Python does, with a loader that tells us."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            logger.warning("%s", _what_is_missing(ImportError(f"{REGISTRY} is no source file")))
            return None
        spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register_or_warn(module)
