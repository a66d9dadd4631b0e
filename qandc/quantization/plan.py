"""Choose which linear layers of a model are quantized: those of its repeated blocks that see tokens, by class.

What sees one row per sample instead (modulation) is a role of its own, ``conditioning``. Embedders, projections of
timestep and text, and final layers, which all lie outside the blocks, stay in full precision: they hold 1 % of the
weights and make half of the error.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qandc.errors import ConfigError, ModelError
from qandc.quantization.linear import QuantLinear
from qandc.quantization.readers import kept_layers
from qandc.quantizer import COMPILED, QuantConfig, matches, parse_scheme
from qandc.support.attach import original_class

__all__ = ["Assignment", "Roles", "assign", "conditioning_of", "resolved", "roles_of"]

logger = logging.getLogger(__name__)

MODULATION = r"(\w*norm\w*|\w*mod|\w*modulation\w*|ada_?ln\w*|time_emb_proj)"  # a component of a name in a block
SMALL = r"re:(?i)(^|\.)(\w*embed\w*|router|gate)(\.|$)"
NO_BLOCKS = re.compile("embed|proj|guidance")  # lists of layers that are no blocks, and those inside of an embedder

OUTSIDE = "outside the repeated blocks"
CONDITIONING = "modulation, which sees one row per sample; give conditioning='W8A16' or 'W4A16'"
EMBEDDER = "an embedder or a router"
SENSITIVE = "modulation of the first block, which images depend on most"

_STREAMS = "(single_)?transformer_blocks"
_HOLDING = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)"
BLOCKS = {
    "AuraFlowTransformer2DModel": "(joint|single)_transformer_blocks",
    "ChromaTransformer2DModel": _STREAMS,
    "CogVideoXTransformer3DModel": "transformer_blocks",
    "CogView4Transformer2DModel": "transformer_blocks",
    "Flux2Transformer2DModel": _STREAMS,
    "FluxTransformer2DModel": _STREAMS,
    "HiDreamImageTransformer2DModel": "(double|single)_stream_blocks",
    "HunyuanDiT2DModel": "blocks",
    "HunyuanVideo15Transformer3DModel": "transformer_blocks",
    "HunyuanVideoTransformer3DModel": _STREAMS,
    "LTXVideoTransformer3DModel": "transformer_blocks",
    "Lumina2Transformer2DModel": "(noise_refiner|context_refiner|layers)",
    "PixArtTransformer2DModel": "transformer_blocks",
    "QwenImageTransformer2DModel": "transformer_blocks",
    "SD3Transformer2DModel": "transformer_blocks",
    "SanaTransformer2DModel": "transformer_blocks",
    "StableAudioDiTModel": "transformer_blocks",
    "UNet2DConditionModel": rf"{_HOLDING}\.(attentions\.\d+\.transformer_blocks|resnets)",
    "WanTransformer3DModel": "blocks",
    "ZImageTransformer2DModel": "(noise_refiner|context_refiner|layers)",
}
"""Class to the names of its lists of repeated blocks, a regular expression from the root of the model."""

SENSITIVE_LAYERS = {
    "FluxTransformer2DModel": ("single_transformer_blocks.0.norm.linear",),
    "Lumina2Transformer2DModel": ("layers.0.norm1.linear",),
    "QwenImageTransformer2DModel": ("transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1"),
    "ZImageTransformer2DModel": ("layers.0.adaLN_modulation.0",),
}
"""Class to modulation layers that peers keep in full precision: with them quantized, samples collapse to noise."""


@dataclass(frozen=True)
class Roles:
    """Hold patterns, as in :class:`qandc.QuantConfig`, of the layers that are no plain layers of blocks.

    Attributes:
        stays: pattern of layers that stay in full precision to the reason.
        conditioning: patterns of layers that see one row per sample; ``stays`` goes before them.
    """

    stays: Mapping[str, str]
    conditioning: tuple[str, ...] = ()


DIT = Roles({"pos_embed": OUTSIDE, r"re:\.norm1\.emb\.": EMBEDDER}, ("norm",))
PLAIN = Roles({"pos_embed": "a position embedding", "norm": "a norm"})


def _roles_of_blocks(blocks: str, sensitive: tuple[str, ...] = ()) -> Roles:
    inside = rf"{blocks}\.\d+\."
    return Roles(
        {f"re:^(?!{inside})": OUTSIDE, SMALL: EMBEDDER, **{f".{name}": SENSITIVE for name in sensitive}},
        (rf"re:(?i)^{inside}(.+\.)?{MODULATION}(\.|$)",),
    )


def roles_of(model: nn.Module) -> Roles:
    """Find the roles of a model's layers: by its class, else by its repeated blocks; a model without any is plain."""
    model = getattr(model, COMPILED, model)
    for name in (base.__name__ for base in type(model).__mro__):  # caches and fusion make it one of a subclass
        if name == "DiTTransformer2DModel":
            return DIT
        if name in BLOCKS:
            return _roles_of_blocks(BLOCKS[name], SENSITIVE_LAYERS.get(name, ()))
    blocks = list(_repeated_blocks(model))
    return _roles_of_blocks(f"({'|'.join(map(re.escape, blocks))})") if blocks else PLAIN


def _repeated_blocks(model: nn.Module) -> Iterator[str]:
    """Yield names of lists with two modules or more of one class that hold linear layers, outermost lists only."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not isinstance(module, nn.ModuleList) or inside or NO_BLOCKS.search(name):
            continue
        classes = Counter(type(block) for block in module if not _is_linear(block) and _holds_linear(block))
        if max(classes.values(), default=0) > 1:
            found.append(name)
            yield name


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantLinear)


def _holds_linear(module: nn.Module) -> bool:
    return any(map(_is_linear, module.modules()))


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def conditioning_of(model: nn.Module, scheme: str | None) -> str | None:
    """Return the scheme of modulation layers, or None and a line of the log for a model that has none.

    Raises:
        ConfigError: it is no scheme.
    """
    if scheme is None:
        return None
    parse_scheme(scheme)
    if CONDITIONING in assign(model, QuantConfig(), saved=True).reasons.values():
        return scheme
    logger.info("conditioning=%r: %s has no modulation layers of its own", scheme, original_class(model).__name__)
    return None


def resolved(model: nn.Module, config: QuantConfig) -> QuantConfig:
    """Replace ``skip_patterns=None`` by the patterns that it means for this model, which tables of later versions
    do not change."""
    if config.skip_patterns is not None:
        return config
    roles, names = roles_of(model), _module_names(model)
    patterns = [*roles.stays, *(roles.conditioning if config.conditioning is None else ())]
    for pattern in tuple(patterns):  # those that say nothing beside the others are left out
        others = [other for other in patterns if other != pattern]
        if all(any(matches(other, name) for other in others) for name in names if matches(pattern, name)):
            patterns = others
    return replace(config, skip_patterns=patterns)


@dataclass(frozen=True)
class Assignment:
    """Say what becomes of each ``nn.Linear`` of a model, by qualified name.

    Attributes:
        bits: (w_bits, a_bits) of those that are quantized.
        reasons: why the others stay.
    """

    bits: dict[str, tuple[int, int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def assign(model: nn.Module, config: QuantConfig, *, saved: bool = False) -> Assignment:
    """Decide for each linear layer whether it is quantized, in which scheme, or why it stays.

    Layers that :func:`kept_layers` names stay as they are; a warning says which and why. Settings that were saved are
    taken at their word: a pattern may match nothing, and no layer is kept back.

    Raises:
        ConfigError: a skip pattern matches no module of the model, if these are checked.
        ModelError: nothing is quantized.
    """
    roles, patterns = roles_of(model), config.skip_patterns
    if patterns is not None:
        if not saved:
            _check_patterns(model, patterns)
        # given by hand they mean what they say; conditioning is told apart only where it gets a scheme of its own
        stays = {pattern: f"skip pattern {pattern!r}" for pattern in patterns}
        roles = Roles(stays, roles.conditioning if config.conditioning is not None else ())
    main = (config.w_bits, config.a_bits)
    conditioning = None if config.conditioning is None else parse_scheme(config.conditioning)
    kept = {} if saved else kept_layers(model)
    linears = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if original_class(m) is nn.Linear]
    found, kept_here = Assignment(), {}
    # a subclass may compute something else, or be read past its forward, as in nn.MultiheadAttention
    for name, _ in linears:
        reason = next((why for pattern, why in roles.stays.items() if matches(pattern, name)), None)
        sees_rows = any(matches(pattern, name) for pattern in roles.conditioning)
        if reason is None and sees_rows and conditioning is None:
            reason = CONDITIONING
        if reason is None and name in kept:
            reason = kept_here[name] = kept[name]
        if reason is not None:
            found.reasons[name] = reason
        else:
            found.bits[name] = conditioning if sees_rows and conditioning is not None else main
    staying = {id(linear): found.reasons[name] for name, linear in linears if name in found.reasons}
    for name, linear in linears:  # one that is registered under two names stays if one of them does
        if id(linear) in staying and found.bits.pop(name, None) is not None:
            found.reasons[name] = staying[id(linear)]
    for why in dict.fromkeys(kept_here.values()):
        names = [name for name in kept_here if kept_here[name] == why]
        logger.warning("%d linear layers stay in full precision, %s among them: %s", len(names), names[0], why)
    if not found.bits:
        raise ModelError(
            f"nothing to quantize in {type(model).__name__}: {_why_nothing(model, config, found, kept_here)}"
        )
    if conditioning is not None and not any(matches(p, name) for p in roles.conditioning for name in found.bits):
        logger.warning("conditioning=%r changes nothing: no modulation layer is left for it", config.conditioning)
    return found


def _check_patterns(model: nn.Module, patterns: Any) -> None:
    names = _module_names(model)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(
                f"skip pattern {pattern!r} matches no module of {type(model).__name__}, whose modules are "
                f"{', '.join(name for name, _ in model.named_children()) or 'none'}; correct it or leave it out"
            )


def _why_nothing(model: nn.Module, config: QuantConfig, found: Assignment, kept: Mapping[str, str]) -> str:
    if kept:
        first = min(kept)
        return f"{first} and others stay as they are ({kept[first]}), and skip_patterns exclude the rest"
    if found.reasons and config.skip_patterns is None:
        name = next(iter(found.reasons))
        return (
            f"of its {len(found.reasons)} linear layers none is part of a repeated block and sees tokens ({name}: "
            f"{found.reasons[name]}); say what stays by skip_patterns"
        )
    if found.reasons:
        return f"skip_patterns {list(config.skip_patterns or ())} exclude all {len(found.reasons)} of its linear layers"
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        return "its linear layers are quantized already"
    return "it has no nn.Linear layer"
