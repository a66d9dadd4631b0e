"""Make diffusers and PEFT know quantized layers, without importing either for those who do not use it.

``quantization_config=QandCConfig(...)``: diffusers looks methods up in two dictionaries of one module. LoRA adapters on
quantized layers: :mod:`qandc.quantization.lora` extends a few methods. Both is done when the modules that hold them
have been imported, whoever imports them: before ``import qandc``, or later, through a finder on ``sys.meta_path``. The
finder stays because diffusers has neither a function nor an entry point to register a method: without it a quantized
pipeline that is loaded right after ``import qandc`` would need that import to take diffusers along, 1.6 s.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from qandc.errors import ModelError
from qandc.quantization.lora import extend_flux_loader, extend_fuse_lora, extend_peft, extend_saving

__all__ = ["config_class", "register_when_imported"]

logger = logging.getLogger(__name__)

METHOD = "qandc"
REGISTRY = "diffusers.quantizers.auto"
TESTED = "0.35 to 0.42"


def config_class() -> Any:
    """Return the class ``QandCConfig``; imports diffusers.

    Raises:
        ModelError: diffusers is missing, or does not look methods up where we know it to.
    """
    try:
        registry = importlib.import_module(REGISTRY)
    except ImportError as error:
        raise ModelError(_what_is_missing(error)) from error
    _register(registry)
    from qandc.quantization.diffusers_quantizer import QandCConfig

    return QandCConfig


def register_when_imported() -> None:
    """Extend the modules in ``EXTENSIONS``, now or when they are imported; a module that cannot be is a warning."""
    for name in EXTENSIONS:
        if name in sys.modules:
            _extend_or_warn(name, sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(registry: ModuleType) -> None:
    try:
        configs, quantizers = registry.AUTO_QUANTIZATION_CONFIG_MAPPING, registry.AUTO_QUANTIZER_MAPPING
        from qandc.quantization.diffusers_quantizer import QandCConfig, QandCQuantizer

        configs[METHOD], quantizers[METHOD] = QandCConfig, QandCQuantizer
    except (ImportError, AttributeError, TypeError) as error:
        raise ModelError(_what_is_missing(error)) from error


def _extend_or_warn(name: str, module: ModuleType) -> None:
    if getattr(module, EXTENDED, False):
        return
    try:
        EXTENSIONS[name](module)
        setattr(module, EXTENDED, True)
    except ModelError as error:  # diffusers itself works without us
        logger.warning("%s", error)
    except (AttributeError, KeyError) as error:
        logger.warning("%s", _no_lora(name, error))


def _what_is_missing(error: Exception) -> str:
    version = getattr(sys.modules.get("diffusers"), "__version__", "that is not installed")
    return (
        f"QandCConfig cannot be registered with diffusers {version} ({error}); install a version from {TESTED}, or "
        "call qandc.quantize_model on the loaded model instead"
    )


def _no_lora(name: str, error: Exception) -> str:
    package = name.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", "of an unknown version")
    return (
        f"LoRA adapters may not load on quantized models: {name} of {package} {version} is not as we know it "
        f"({error}); install peft 0.21 or later and diffusers from {TESTED}"
    )


EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    REGISTRY: _register,
    "diffusers.loaders.peft": extend_fuse_lora,
    "diffusers.models.modeling_utils": extend_saving,
    "diffusers.loaders.lora_pipeline": extend_flux_loader,
    "peft.tuners.lora.model": extend_peft,
}
EXTENDED = "_qandc_extended"  # attribute of a module that has been


class _Finder(MetaPathFinder):
    """Find the modules in ``EXTENSIONS`` as Python does, with a loader that extends each once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in EXTENSIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            error = ImportError(f"{fullname} is no source file")
            logger.warning("%s", _what_is_missing(error) if fullname == REGISTRY else _no_lora(fullname, error))
            return None
        spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _extend_or_warn(module.__name__, module)
