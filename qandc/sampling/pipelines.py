"""Find and load pipelines: the embedded fashion-dit, a local directory, a hub id."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any

import torch

from qandc.errors import ConfigError, DataError, DeviceError, ModelError, QandCError
from qandc.models import class_conditional
from qandc.quantization.conversion import EXACT_WEIGHTS, quant_layers
from qandc.support.arguments import checked
from qandc.support.files import bytes_of

__all__ = [
    "DTYPES",
    "check_full_precision",
    "class_names",
    "fashion_dit_path",
    "fingerprint",
    "load_pipeline",
    "resolve_device",
    "resolve_dtype",
    "source_of",
]

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fashion_dit_path() -> Path:
    """Return the directory of the embedded pipeline, for ``DiTPipeline.from_pretrained``."""
    return Path(__file__).parents[1] / "assets" / "fashion-dit"


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA where there is a GPU, else the CPU.

    Raises:
        ConfigError: torch does not know the name.
        DeviceError: the device is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ConfigError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "" if torch.version.cuda else "; this torch is built without CUDA"
            raise DeviceError(f"device {name!r} was asked for, but torch sees no CUDA GPU{built}; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(
                f"device {name!r} is not here; torch sees {torch.cuda.device_count()} GPU(s), from cuda:0"
            )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; "auto" is bfloat16 on CUDA, float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@checked
def load_pipeline(
    model: Annotated[str | Path | None, str | os.PathLike | None] = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a ``DiTPipeline``; the autoencoder stays in float32.

    Args:
        model: a pipeline directory, a hub id such as "facebook/DiT-XL-2-256", or None for the embedded fashion-dit.

    Raises:
        ConfigError: a dtype that no kernel computes in, or the meta device.
        DeviceError: the device is not here.
        ModelError: the directory is missing or not a DiT pipeline, or the hub did not deliver.
        DataError: a weight is NaN or infinite.
    """
    from diffusers import DiTPipeline, DiTTransformer2DModel

    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES.values()))}")
    if torch.device(device).type == "meta":
        raise ConfigError("a pipeline on the meta device would have no weights; give a device such as 'cpu'")
    source = str(fashion_dit_path() if model is None else model)
    try:
        path = Path(source).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a null byte
        raise ModelError(f"model {textwrap.shorten(repr(source), 80)} is no usable path: {error}") from None
    if not source:
        raise ModelError("the model name is empty; give a pipeline directory or a hub id (owner/name)")
    if is_directory:
        if not (path / "model_index.json").is_file():
            raise ModelError(f"{source} is not a diffusers pipeline: it has no model_index.json")
        source = str(path)
    elif exists:
        raise ModelError(f"{source} is a file; give the directory of a diffusers pipeline")
    elif not HUB_ID.fullmatch(source):
        raise ModelError(
            f"model directory {source!r} does not exist; give a pipeline directory or a hub id (owner/name)"
        )
    try:
        pipe: Any = DiTPipeline.from_pretrained(source)
        transformer = pipe.transformer
        if not isinstance(transformer, DiTTransformer2DModel):
            raise ModelError(f"model {source!r} is not a DiT pipeline: its transformer is {type(transformer).__name__}")
        _check_pipeline(source, pipe)
        if dtype != pipe.transformer.dtype:  # quantize_model is to round the weights once
            files = sorted(Path(pipe.transformer.config["_name_or_path"]).glob("*.safetensors"))
            pipe.transformer.__dict__[EXACT_WEIGHTS] = functools.partial(_tensors_of, files)
        torch.nn.Module.to(pipe.transformer, dtype)  # diffusers' own .to() warns of layers that DiT does not have
        return pipe.to(device)
    except QandCError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub client each raise their own kinds
        logger.debug("loading %s failed", source, exc_info=True)
        if is_directory:
            where, what_to_do = "is damaged or not a DiT pipeline", "compare it with a fresh copy"
        else:
            where, what_to_do = (
                "is no local directory and the hub did not deliver it",
                "check the name and the network, or give a pipeline directory",
            )
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise ModelError(f"model {source!r} {where}; {what_to_do} ({cause})") from error


def _tensors_of(files: list[Path]) -> dict[str, torch.Tensor]:
    """Map the tensors of safetensors files into memory; pages are read when they are used."""
    from safetensors.torch import load_file

    return {name: tensor for file in files if file.is_file() for name, tensor in load_file(file).items()}


def _check_pipeline(source: str, pipe: Any) -> None:
    """Refuse a pipeline whose parts do not fit together, miss weights, or hold NaN or inf."""
    latents, channels = pipe.vae.config.latent_channels, pipe.vae.config.out_channels
    if latents != pipe.transformer.config.in_channels:
        raise ModelError(
            f"model {source!r} does not fit together: the autoencoder has {latents} latent channels, the transformer "
            f"{pipe.transformer.config.in_channels}"
        )
    if channels not in (1, 3):
        raise ModelError(f"model {source!r} decodes to {channels} channels; pictures need 1 or 3")
    for part in ("transformer", "vae"):
        for name, tensor in getattr(pipe, part).named_parameters():
            if tensor.is_meta:
                raise ModelError(f"model {source!r} has no weight for {part}.{name}; compare it with a fresh copy")
            if not torch.isfinite(tensor).all():
                raise DataError(f"model {source!r}: {part}.{name} holds NaN or inf; compare it with a fresh copy")


def source_of(model: str | None) -> str | None:
    """Name a model as results note it: a directory by its absolute path, a hub id or None as it is."""
    return str(Path(model).absolute()) if model is not None and Path(model).is_dir() else model


def check_full_precision(pipe: Any, model: str | None) -> None:
    """Refuse a pipeline that was saved quantized where one in full precision is needed.

    Raises:
        ModelError: it has quantized layers.
    """
    if quant_layers(pipe.transformer):
        raise ModelError(f"model {model!r} is quantized already; give the full-precision pipeline it was made from")


def fingerprint(module: torch.nn.Module) -> str:
    """Hash names, shapes, dtypes and bytes of all parameters and buffers: 16 hexadecimal digits of SHA-256.

    It is the same on every device. Files hold it as ``weights_sha256``: another rule needs another name there.
    """
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def class_names(pipe: Any) -> dict[int, str]:
    """Map class ids to names; names are the ids where the pipeline has none."""
    if pipe.labels:
        names: dict[int, str] = {}
        for name, label in pipe.labels.items():
            names.setdefault(label, name)
        return dict(sorted(names.items()))
    return {label: str(label) for label in range(class_conditional(pipe.transformer)[1])}
