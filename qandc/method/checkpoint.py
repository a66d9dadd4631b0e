"""A quantized DiT in one directory, saved and loaded without its full-precision weights.

::

    model.safetensors          every parameter and buffer by its name in the model, as it is
    quantized.json             format version, config of the model, quantized layers, tensors, checksums
    schedule.json              CalibratedSchedule  ┐
    compensation.safetensors   Compensation        │ only if given
    compensation.json                              │
    step_ranges.safetensors    StepRanges          ┘

``quantized.json`` names every tensor with dtype and shape, every file with size and SHA-256, and ends with its own
SHA-256, so that nothing can change unnoticed. No file holds code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qandc.caching.schedule import CalibratedSchedule
from qandc.errors import ConfigError, ModelError, OutputError
from qandc.quantization.conversion import quant_layers, quantization_report
from qandc.quantization.fused_projections import keep_fused_quantized
from qandc.quantization.linear import OPTIONAL_BUFFERS, skeleton_layer
from qandc.quantization.ranges import StepRanges, check_step_ranges
from qandc.sampling.pipelines import resolve_device
from qandc.support.arguments import check_fields, checked
from qandc.support.attach import original_class
from qandc.support.files import read_json, read_tensors, reading, regular_size
from qandc.variance_compensation import Compensation
from qandc_kernels import FLOAT_DTYPES

__all__ = ["QuantizedCheckpoint", "load_quantized", "save_quantized"]

FORMAT_VERSION = 1
MANIFEST, WEIGHTS = "quantized.json", "model.safetensors"
SCHEDULE, COMPENSATION, STEP_RANGES = "schedule.json", "compensation.safetensors", "step_ranges.safetensors"
COMPENSATION_JSON = "compensation.json"
FILES = (MANIFEST, WEIGHTS, SCHEDULE, COMPENSATION, COMPENSATION_JSON, STEP_RANGES)
HOLDER = "weight_dtype_holder"  # empty; its dtype is in the manifest
UNSAVED = (HOLDER, "nan_flag")  # the latter there since the model was sampled with
DIT = "DiTTransformer2DModel"
PART, AGAIN = "part of a checkpoint", "save the model again"


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What :func:`load_quantized` found.

    Attributes:
        model: the quantized transformer, in eval mode.
        schedule: for ``apply_cache_to_dit(model, config=schedule.config())``, or None.
        compensation: for ``sample_latents`` and ``compensated_scheduler``, or None.
        step_ranges: for ``fuse(model, step_ranges=...)``, or None.
    """

    model: nn.Module
    schedule: CalibratedSchedule | None = None
    compensation: Compensation | None = None
    step_ranges: StepRanges | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def save_quantized(
    model: nn.Module,
    directory: str | Path,
    *,
    overwrite: bool = False,
    schedule: CalibratedSchedule | None = None,
    compensation: Compensation | None = None,
    step_ranges: StepRanges | None = None,
) -> None:
    """Write a quantized DiT, and what it is to be run with, into one directory.

    The model is saved as ``quantize_model`` and ``calibrate`` left it: hooks, an attached cache and fusion stay in
    place and are not saved; give the schedule and the step ranges to keep them. Nothing appears under the name of the
    directory before all of it is written.

    Args:
        model: a ``DiTTransformer2DModel`` that :func:`qandc.quantize_model` has converted.
        directory: made anew, with its parents.
        overwrite: replace the checkpoint that is there, all of it.
        schedule, compensation, step_ranges: stored beside the model, returned by :func:`load_quantized`.

    Raises:
        ModelError: no DiT, not quantized, without values, or not what its config builds (LoRA, parametrizations).
        ConfigError: the step ranges are not of this model, or no cache can follow the schedule.
        OutputError: the directory is not empty, holds other files than those of a checkpoint, or cannot be written.
    """
    from safetensors import SafetensorError

    directory = Path(directory).resolve()
    check_target(directory, overwrite)
    manifest, tensors = _describe(model)
    if schedule is not None:
        schedule.config()  # refuses what could not be loaded
    if step_ranges is not None:
        check_step_ranges(step_ranges, quant_layers(model))
    partial, replaced = (
        directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.{end}") for end in ("new", "old")
    )
    try:
        partial.mkdir(parents=True)
        _save_tensors(tensors, partial / WEIGHTS)
        if schedule is not None:
            schedule.save(partial / SCHEDULE)
        if compensation is not None:
            compensation.save(partial / COMPENSATION)
        if step_ranges is not None:
            _save_tensors(_flat(step_ranges), partial / STEP_RANGES)
        manifest["files"] = {path.name: _file_entry(path) for path in sorted(partial.iterdir())}
        manifest["sha256"] = _digest(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in partial.iterdir():  # a name must not survive a power failure without its contents
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _rename(partial, directory, replaced)
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the file system
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {str(directory)!r}: {reason}; nothing there has changed") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


@checked
def load_quantized(
    directory: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> QuantizedCheckpoint:
    """Read what :func:`save_quantized` wrote; no full-precision weight of a quantized layer is made on the way.

    Args:
        directory: the checkpoint.
        device: where the model goes.
        dtype: float16, bfloat16 or float32 for all that is not quantized, by default as saved. Scales stay float32.

    Returns:
        The model, which computes bit for bit what the saved one does, with schedule, compensation and step ranges.

    Raises:
        ConfigError: no checkpoint, of a newer version, a file missing, truncated or changed, or another dtype.
        ModelError: the diffusers that is installed builds another model from its config.
        DeviceError: the device is not here.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(known) for known in FLOAT_DTYPES)
        raise ConfigError(f"dtype is {dtype}; allowed are {allowed} (leave it out to keep the one that was saved)")
    target, directory = resolve_device(str(device)), Path(directory)
    manifest = _read_manifest(directory)
    for name, entry in manifest["files"].items():
        _check_file(directory / name, entry)
    tensors = read_tensors(directory / WEIGHTS, PART, AGAIN)
    _check_tensors(tensors, manifest["tensors"])
    with reading(directory / MANIFEST, PART, AGAIN):
        model = _skeleton(manifest["config"], manifest["layers"])
    _check_names(model, tensors)
    transient = _tensors(model).keys() - model.state_dict().keys()
    model.load_state_dict({name: t for name, t in tensors.items() if name not in transient}, assign=True)
    for name in transient:  # buffers that no state dict knows
        owner, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(owner), buffer, tensors[name])
    if dtype is not None or target.type != "cpu":
        nn.Module.to(model, device=target, dtype=dtype)  # that of diffusers warns of layers it does not name
    keep_fused_quantized(model)
    extras = manifest["files"].keys()
    return QuantizedCheckpoint(
        model.eval(),
        CalibratedSchedule.load(directory / SCHEDULE) if SCHEDULE in extras else None,
        Compensation.load(directory / COMPENSATION) if COMPENSATION in extras else None,
        _load_step_ranges(directory / STEP_RANGES) if STEP_RANGES in extras else None,
    )


def check_target(directory: Path, overwrite: bool) -> None:
    """Refuse a directory that :func:`save_quantized` would.

    Raises:
        OutputError: it is not empty, or holds other files than those of a checkpoint.
    """
    try:
        found = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    except OSError as error:
        raise OutputError(f"{str(directory)!r} cannot be a checkpoint: {error.strerror or error}") from error
    strangers = [name for name in found if name not in FILES]
    if strangers:
        raise OutputError(
            f"{str(directory)!r} holds {strangers[0]!r}, which is no part of a checkpoint; give another one"
        )
    if found and not overwrite:
        raise OutputError(f"{str(directory)!r} holds a checkpoint; give another directory, or overwrite=True")


def _rename(partial: Path, directory: Path, replaced: Path) -> None:
    """Put ``partial`` in the place of ``directory``; what was there goes to ``replaced``, and back if that fails."""
    if not directory.exists():
        os.rename(partial, directory)
        return
    os.rename(directory, replaced)
    try:
        os.rename(partial, directory)
    except BaseException:
        os.rename(replaced, directory)
        raise


def _describe(model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The manifest but for its files, and all tensors; models that it would not build again are refused."""
    from diffusers import DiTTransformer2DModel, ModelMixin

    dit_class: Any = DiTTransformer2DModel
    if original_class(model) is not dit_class:
        name = type(model).__name__
        advice = "of a pipeline, pass pipe.transformer; of a compiled model, the model before torch.compile"
        if isinstance(model, ModelMixin):
            advice = f"save it by model.save_pretrained(directory), and load it by {name}.from_pretrained(directory)"
        raise ModelError(f"save_quantized writes diffusers' {DIT} alone; got {name}: {advice}")
    layers = quant_layers(model)
    if not layers:
        raise ModelError(f"this {DIT} is not quantized; call quantize_model first, or model.save_pretrained instead")
    tensors = _tensors(model)
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{empty[0]} is on the meta device and has no values; load the weights, or undo the offloading"
        )
    config = json.loads(model.to_json_string())
    config.pop("_name_or_path", None)
    report = quantization_report(model)
    entries = {
        row.name: {
            "w_bits": layers[row.name].w_bits,
            "a_bits": layers[row.name].a_bits,
            "in_features": layers[row.name].in_features,
            "out_features": layers[row.name].out_features,
            "bias": layers[row.name].bias is not None,
            "dtype": _dtype_name(getattr(layers[row.name], HOLDER).dtype),
            "bytes_before": row.bytes_before,
            "bytes_after": row.bytes_after,
        }
        for row in report.quantized
    }
    _check_names(_skeleton(config, entries), tensors)
    before, after = report.quantized_bytes
    manifest = {
        "version": FORMAT_VERSION,
        "class": DIT,
        "config": config,
        "bytes_before": before,
        "bytes_after": after,
        "layers": entries,
        "tensors": {name: _outline(tensor) for name, tensor in tensors.items()},
    }
    return manifest, tensors


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, those too that no state dict knows (the position embedding)."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named if name.rpartition(".")[2] not in UNSAVED}


def _skeleton(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """The model of a config with the named layers quantized, all of it on the meta device."""
    from diffusers import DiTTransformer2DModel

    dit_class: Any = DiTTransformer2DModel
    with torch.device("meta"):
        model = dit_class.from_config(dict(config))
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, entry in layers.items():
        if name not in linears:
            raise ModelError(f"{name} is no linear layer of the {DIT} that diffusers builds from this config")
        layer = skeleton_layer(
            entry["in_features"],
            entry["out_features"],
            bias=entry["bias"],
            bits=(entry["w_bits"], entry["a_bits"]),
            dtype=getattr(torch, entry["dtype"]),
        )
        layer.original_bytes = entry["bytes_before"]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def _check_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that do not fill ``model`` exactly; ranges and smoothing may be there or not."""
    ours, layers = {name: tensor.shape for name, tensor in _tensors(model).items()}, quant_layers(model)
    optional = {f"{name}.{buffer}" for name in layers for buffer in OPTIONAL_BUFFERS}
    advice = f"a checkpoint holds the {DIT} that diffusers builds from its config (remove LoRA, parametrizations)"
    for name, tensor in tensors.items():
        if name not in ours and name not in optional:
            raise ModelError(f"{name} is a tensor too many; {advice}")
        owner, _, leaf = name.rpartition(".")
        fault = layers[owner].fault_of(leaf, tensor) if owner in layers else None
        if fault is not None:
            raise ModelError(f"{name} is {fault[0]}; in a {layers[owner].scheme} layer it must be {fault[1]}")
        if owner in layers and leaf == "act_zero_point" and f"{owner}.act_scale" not in tensors:
            raise ModelError(f"{name} has no act_scale beside it; save the model again")
    for name, shape in ours.items():
        if name not in tensors:
            raise ModelError(f"{name} is missing; {advice}")
        if shape != tensors[name].shape:
            raise ModelError(f"{name} is {list(tensors[name].shape)} instead of {list(shape)}; {advice}")


def _read_manifest(directory: Path) -> Any:
    path = directory / MANIFEST
    if not path.is_file():
        what = f"lacks {MANIFEST}" if directory.is_dir() else "is no directory"
        advice = "give one that save_quantized wrote"
        if any((directory / name).is_file() for name in ("config.json", "model_index.json")):
            advice = "load what save_pretrained wrote by from_pretrained of its class"
        raise ConfigError(f"{str(directory)!r} is no checkpoint: it {what}; {advice}")
    manifest = read_json(path, PART, AGAIN, version=FORMAT_VERSION)
    with reading(path, PART, AGAIN):
        whole = manifest.pop("sha256") == _digest(manifest)
        if whole:
            _check_manifest(manifest)
    if not whole:
        raise ConfigError(f"{str(path)!r} is not as it was written (checksum); copy it or save the model again")
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse what :func:`save_quantized` never writes, by the exceptions that :func:`reading` expects.

    Files have the names of a checkpoint: none outside of its directory is opened, none is believed unchecked.
    """
    config, layers, tensors, files = parts = [manifest[name] for name in ("config", "layers", "tensors", "files")]
    if not all(isinstance(part, dict) for part in parts):
        raise TypeError("config, layers, tensors and files must be objects")
    if not all(isinstance(entry, dict) for entry in (*layers.values(), *files.values())):
        raise TypeError("each entry of layers and files must be an object")
    strangers = files.keys() - set(FILES[1:])
    if strangers:
        raise ValueError(f"it names the file {min(strangers)!r}; those of a checkpoint are {', '.join(FILES[1:])}")
    pair = {COMPENSATION, COMPENSATION_JSON}
    missing = ({WEIGHTS} | (pair if pair & files.keys() else set())) - files.keys()
    if missing:
        raise KeyError(min(missing))
    for name, entry in files.items():
        if not isinstance(entry["sha256"], str) or type(entry["bytes"]) is not int:
            raise TypeError(f"the checksum of {name} must be a text and its size an integer")
    blocks = config.get("num_layers", 0)
    if type(blocks) is not int or blocks > len(tensors):  # diffusers would build them all
        raise ValueError(f"num_layers is {str(blocks)[:40]}; there are {len(tensors)} tensors")
    known = [_dtype_name(dtype) for dtype in FLOAT_DTYPES]
    for name, entry in layers.items():
        if entry["dtype"] not in known or type(entry["bytes_before"]) is not int:
            raise ValueError(
                f"the layer {name} has dtype {entry['dtype']!r} and {entry['bytes_before']!r} bytes_before"
            )


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = regular_size(path)
        found = _file_entry(path) if size == entry["bytes"] else {"bytes": size}
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{str(path)!r} cannot be read: {reason}; copy it again, it is part of the checkpoint"
        ) from error
    if found["bytes"] != entry["bytes"]:
        raise ConfigError(f"{str(path)!r} holds {found['bytes']:,} of {entry['bytes']:,} bytes; copy it again")
    if found["sha256"] != entry["sha256"]:
        raise ConfigError(f"{str(path)!r} is not as it was written (checksum); copy it again")


def _check_tensors(tensors: Mapping[str, torch.Tensor], outlines: Mapping[str, str]) -> None:
    for name, outline in outlines.items():
        found = _outline(tensors[name]) if name in tensors else "missing"
        if found != outline:
            raise ConfigError(f"{name} in {WEIGHTS} is {found}; {MANIFEST} has {outline}: save the model again")
    surplus = tensors.keys() - outlines.keys()
    if surplus:
        raise ConfigError(f"{WEIGHTS} holds {min(surplus)}, which {MANIFEST} does not name; save the model again")


def _save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # cloned: layers may share a tensor, which safetensors refuses
    whole = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(whole, path)


def _flat(ranges: StepRanges) -> dict[str, torch.Tensor]:
    scales = {f"{name}.scale": scale for name, scale in ranges.scales.items()}
    zero_points = {f"{name}.zero_point": zero_point for name, zero_point in ranges.zero_points.items()}
    return {"timesteps": ranges.timesteps, **scales, **zero_points}


def _load_step_ranges(path: Path) -> StepRanges:
    tensors = read_tensors(path, PART, AGAIN)

    def ending(end: str) -> dict[str, torch.Tensor]:
        return {name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)}

    with reading(path, PART, AGAIN):
        return StepRanges(tensors["timesteps"], ending(".scale"), ending(".zero_point"))


def _outline(tensor: torch.Tensor) -> str:
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file_entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
