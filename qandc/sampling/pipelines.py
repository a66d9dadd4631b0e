"""Find and load pipelines: the embedded ones by name, a local directory, a hub id."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch

from qandc.errors import ConfigError, DataError, DeviceError, ModelError, QandCError
from qandc.models import class_conditional
from qandc.quantization.conversion import EXACT_WEIGHTS, quant_layers
from qandc.support.arguments import checked
from qandc.support.files import bytes_of

__all__ = [
    "ASSETS",
    "CLASS_CONDITIONAL",
    "DTYPES",
    "EMBEDDED",
    "check_full_precision",
    "class_names",
    "embedded_name",
    "fashion_dit_path",
    "fingerprint",
    "load_pipeline",
    "pipeline_class",
    "resolve_device",
    "resolve_dtype",
    "source_of",
    "wardrobe_path",
]

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = ("fashion-dit", "wardrobe")  # names of pipelines, which are directories of ASSETS
INDEX = "model_index.json"
CLASS_CONDITIONAL = "DiTPipeline"  # all others draw from prompts
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fashion_dit_path() -> Path:
    """Return the directory of the embedded pipeline, for ``DiTPipeline.from_pretrained``."""
    return ASSETS / "fashion-dit"


def wardrobe_path() -> Path:
    """Return the directory of the embedded text-to-image pipeline, for ``FluxPipeline.from_pretrained``."""
    return ASSETS / "wardrobe"


def embedded_name(model: str | Path | None) -> str | None:
    """Name the embedded pipeline that a name, its directory or None (fashion-dit) stands for; None if it is another."""
    if model is None or str(model) in EMBEDDED:
        return EMBEDDED[0] if model is None else str(model)
    return next((name for name in EMBEDDED if Path(model) == ASSETS / name), None)


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


def _located(model: Any) -> tuple[str, bool]:
    """Return the directory or hub id that is meant, and whether it is a directory; no file is read.

    Raises:
        ModelError: it can be neither.
    """
    embedded = embedded_name(model)
    source = str(model if embedded is None else ASSETS / embedded)
    try:
        path = Path(source).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a null byte
        raise ModelError(f"model {textwrap.shorten(repr(source), 80)} is no usable path: {error}") from None
    if not source:
        raise ModelError("the model name is empty; give a pipeline directory or a hub id (owner/name)")
    if is_directory:
        if not (path / INDEX).is_file():
            raise ModelError(f"{source} is not a diffusers pipeline: it has no {INDEX}")
        return str(path), True
    if exists:
        raise ModelError(f"{source} is a file; give the directory of a diffusers pipeline")
    if not HUB_ID.fullmatch(source):
        raise ModelError(
            f"model directory {source!r} does not exist; give a pipeline directory or a hub id (owner/name)"
        )
    return source, False


@contextlib.contextmanager
def _loading(source: str, is_directory: bool) -> Iterator[None]:
    """Say in one ModelError why a pipeline cannot be loaded, and what to do."""
    from huggingface_hub import errors

    try:
        yield
    except QandCError:
        raise
    except Exception as error:  # diffusers, safetensors and the hub client each raise their own kinds
        logger.debug("loading %s failed", source, exc_info=True)
        causes: list[BaseException | None] = [error]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        where, what_to_do = "is no local directory and the hub did not deliver it", "check the name and the network"
        if is_directory:
            where, what_to_do = "is damaged or incomplete", "compare it with a fresh copy"
        elif any(isinstance(cause, errors.GatedRepoError) for cause in causes):
            what_to_do = f"accept its terms at https://huggingface.co/{source}, then log in (hf auth login)"
        elif any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
            what_to_do = "check the name; if it is private, log in (hf auth login)"
        elif any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
            what_to_do = "check the name, unset HF_HUB_OFFLINE, or give a pipeline directory"
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise ModelError(f"model {source!r} {where}; {what_to_do} ({cause})") from error


def pipeline_class(model: str | Path | None) -> str:
    """Return the name of the class of a pipeline, of which nothing but the index is read or downloaded.

    Raises:
        ModelError: there is no such pipeline, or it is damaged.
    """
    from huggingface_hub import hf_hub_download

    source, is_directory = _located(model)
    with _loading(source, is_directory):
        path = Path(source, INDEX) if is_directory else Path(hf_hub_download(source, INDEX))
        return str(json.loads(path.read_text())["_class_name"])


@checked
def load_pipeline(
    model: Annotated[str | Path | None, str | os.PathLike | None] = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load any pipeline of diffusers; the autoencoder of a ``DiTPipeline`` stays in float32.

    Args:
        model: a pipeline directory, a hub id such as "facebook/DiT-XL-2-256", or the name of an embedded pipeline:
            "wardrobe", "fashion-dit", which None is, too. A directory of that name is "./wardrobe".

    Raises:
        ConfigError: a dtype that no kernel computes in, or the meta device.
        DeviceError: the device is not here.
        ModelError: the directory is missing, damaged or no pipeline, the hub did not deliver, or transformers is not
            installed.
        DataError: a weight of a ``DiTPipeline`` is NaN or infinite.
    """
    from diffusers import DiffusionPipeline

    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES.values()))}")
    if torch.device(device).type == "meta":
        raise ConfigError("a pipeline on the meta device would have no weights; give a device such as 'cpu'")
    kind = pipeline_class(model)
    source, is_directory = _located(model)
    if kind != CLASS_CONDITIONAL and importlib.util.find_spec("transformers") is None:
        raise ModelError(f"{kind} has text encoders, which need transformers: pip install 'qandc-kernels[text]'")
    with _loading(source, is_directory):
        if kind == CLASS_CONDITIONAL:
            return _load_dit(source, dtype).to(device)
        with warnings.catch_warnings():  # newer versions name it dtype, which older ones do not know
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
            pipe: Any = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
        return pipe.to(device)


def _load_dit(source: str, dtype: torch.dtype) -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    pipe: Any = DiTPipeline.from_pretrained(source)
    transformer: Any = pipe.transformer
    if not issubclass(type(transformer), DiTTransformer2DModel):
        raise ModelError(f"model {source!r} is not a DiT pipeline: its transformer is {type(transformer).__name__}")
    _check_pipeline(source, pipe)
    if dtype != transformer.dtype:  # quantize_model is to round the weights once
        files = sorted(Path(transformer.config["_name_or_path"]).glob("*.safetensors"))
        transformer.__dict__[EXACT_WEIGHTS] = functools.partial(_tensors_of, files)
    torch.nn.Module.to(transformer, dtype)  # diffusers' own .to() warns of layers that DiT does not have
    return pipe


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
    """Name a model as results note it: a directory by its absolute path, another name or None as it is."""
    if model is None or model in EMBEDDED or not Path(model).is_dir():
        return model
    return str(Path(model).absolute())


def check_full_precision(pipe: Any, model: str | None) -> None:
    """Refuse a pipeline that was saved quantized where one in full precision is needed.

    Raises:
        ModelError: it has quantized layers.
    """
    if any(isinstance(part, torch.nn.Module) and quant_layers(part) for part in pipe.components.values()):
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
