"""Damaged files of every kind: what is read is what was written, or refused by an error of this package, in time."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qandc import (
    CalibratedSchedule,
    Compensation,
    FeatureCompensation,
    Preset,
    QandCError,
    QuantConfig,
    apply_cache,
    calibrate,
    calibrate_steps,
    load,
    make_scheduler,
    quantize_model,
    record_pool,
    save,
)
from qandc.experiments.ablation import FIGURES
from qandc.experiments.shards import ImageSet, draw_shards, merge_shards
from qandc.support.files import keep_settings
from qandc.variance_compensation import FittedFor
from qandc_kernels.tiles import tables, tune
from tests.conftest import in_time, make_dit
from tests.test_calibration import dit_batches

IMAGES = ImageSet(4, (1, 2), batch_size=4)
SCHEDULE = CalibratedSchedule((True, False, True), (900.5, 500, 100), "branch", 0, 0.125, 0.25)
RUN = FittedFor("DDIMScheduler", (900.5, 500, 100), 1.5, "a model")
GAINS = torch.arange(12.0).view(3, 4) / 8
COMPENSATION = Compensation(GAINS + 0.5, -GAINS, "sample", "least_squares", RUN)
TILES = [{"kernel": "int8", "m": m, "n": 64, "k": 128, "tile": [64, 64, 128, 8, 4, 4, 0, 1, 1, 0]} for m in (16, 256)]


def quantized() -> Any:
    model = make_dit(num_layers=1)
    quantize_model(model)
    calibrate(model, list(dit_batches([900, 400], rows=1)))
    return model


def save_model(directory: Path) -> None:
    model = quantized()
    ranges = calibrate_steps(model, dit_batches([900, 500, 100], rows=1))
    save(model, directory, schedule=SCHEDULE, compensation=COMPENSATION, step_ranges=ranges, features=FEATURES)


def write_pool(directory: Path) -> Any:
    model = make_dit(num_layers=1)
    apply_cache(model, 2)
    return record_pool(model, make_scheduler("ddim", {}), [1, 2], num_inference_steps=2, directory=directory)


def draw_images(directory: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    draw_shards(directory, IMAGES, lambda labels, seeds: torch.rand(4, 3, 8, 8, generator=generator))


def join_images(directory: Path) -> Any:
    figures = merge_shards(directory, IMAGES, directory / "joined.npz")
    with np.load(directory / "joined.npz") as arrays:
        return figures, {name: arrays[name] for name in arrays.files}


def read_tiles(directory: Path) -> Any:
    os.environ["QANDC_TILES"] = str(directory)
    tables.tuned_tiles.cache_clear()
    found = tables.tuned_tiles("fuzz")
    if not found:  # logged and passed over
        raise QandCError
    return found


FEATURES = FeatureCompensation(SCHEDULE.config(), GAINS.view(1, 2, 2, 3), -GAINS.view(1, 2, 2, 3))
ROW = {"seconds_per_image": 0.125, "cache_bytes": 7, "metrics": {"psnr_to_fp": {"value": 21.5, "ci95": 0.25}}}
SETTINGS = {"version": 1, "batch_size": 50, "scheduler": "ddim", "seeds": [0, 1, 2], "guidance_scale": 1.5}
KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {  # what writes a directory, what reads it
    "schedule": (
        lambda at: SCHEDULE.save(at / "schedule.json"),
        lambda at: CalibratedSchedule.load(at / "schedule.json"),
    ),
    "compensation": (
        lambda at: COMPENSATION.save(at / "vc.safetensors"),
        lambda at: Compensation.load(at / "vc.safetensors"),
    ),
    "features": (lambda at: FEATURES.save(at / "f"), lambda at: FeatureCompensation.load(at / "f")),
    "figures": (lambda at: FIGURES.write(at / "fp.json", ROW), lambda at: FIGURES.read(at / "fp.json")),
    "settings": (
        lambda at: Preset.of(
            quantized(), QuantConfig(), SCHEDULE, COMPENSATION, features=FEATURES, keep_weights=True
        ).save(at),
        Preset.load,
    ),
    "model": (save_model, load),
    "pool": (write_pool, write_pool),
    "images": (draw_images, join_images),
    "tiles": (
        lambda at: tune.write_table(at / "fuzz.json", {}, tables.msgspec.convert(TILES, list[tables.TunedTile])),
        read_tiles,
    ),
    "record": (
        lambda at: keep_settings(at / "x.json", SETTINGS, "x"),
        lambda at: keep_settings(at / "x.json", SETTINGS, "x"),
    ),
}
ODD = [
    None, True, -1, 0, 1, 0.5, 10**6, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", "/dev/zero", [], {},
]  # fmt: skip


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room


SPECIAL: list[Callable[[Path], Any]] = [
    huge,
    os.mkfifo,
    Path.mkdir,
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path),
    lambda path: path.write_text('{"version": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    lambda path: path.write_bytes((2**62).to_bytes(8, "little") + b"{}"),
]


def comparable(found: Any) -> Any:
    """Make of values what ``==`` compares bit for bit."""
    if isinstance(found, nn.Module):
        found = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    if isinstance(found, torch.Tensor):
        return str(found.dtype), comparable(found.detach().reshape(-1).view(torch.uint8).numpy()), tuple(found.shape)
    if isinstance(found, np.ndarray):
        return str(found.dtype), found.shape, found.tobytes()
    if hasattr(found, "__dataclass_fields__"):
        return [comparable(getattr(found, name)) for name in found.__dataclass_fields__]
    if isinstance(found, dict):
        return {name: comparable(value) for name, value in found.items()}
    return [comparable(value) for value in found] if isinstance(found, tuple | list) else repr(found)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every object or list within a value, with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damage(chance: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    how = chance.choice(["bit", "bit", "bit", "bytes", "cut", "inside", "inside", "special"])
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix != ".json" else len(data)
    if how == "bit":
        data[chance.randrange(chance.choice([len(data), header]))] ^= 1 << chance.randrange(8)
    elif how == "bytes":
        at = chance.randrange(len(data))
        data[at : at + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
    elif how == "cut":
        del data[chance.randrange(len(data)) :]
    elif how == "special":
        path.unlink()
        chance.choice(SPECIAL)(path)
        return
    else:
        start = 8 if path.suffix != ".json" else 0
        value = json.loads(data[start:header])
        where, key = chance.choice(list(places(value)))
        where[key] = chance.choice(ODD)
        text = json.dumps(value).encode()
        data[:header] = (len(text).to_bytes(8, "little") if start else b"") + text
    path.write_bytes(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A directory of a kind, written once, and what is read from it."""
    known: dict[str, tuple[Path, Any]] = {}

    def of(kind: str) -> tuple[Path, Any]:
        if kind not in known:
            directory = tmp_path_factory.mktemp(kind)
            KINDS[kind][0](directory)
            shutil.copytree(directory, directory / "copy")
            known[kind] = directory, comparable(KINDS[kind][1](directory / "copy"))
            shutil.rmtree(directory / "copy")
        return known[kind]

    return of


def outcome(read: Callable[[Path], Any], directory: Path, expected: Any) -> str:
    try:
        with in_time(10):
            found = read(directory)
    except QandCError:
        return "refused"
    except TimeoutError:
        return "hangs"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return "read" if comparable(found) == expected else "read with other values"


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 600), marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_as_it_was_or_refused(kind, seeds, written, tmp_path, monkeypatch):
    monkeypatch.setenv("QANDC_TILES", "")  # which the reader of tables sets
    directory, expected = written(kind)
    wrong = []
    for seed in seeds:
        chance, here = random.Random(f"{kind} {seed}"), tmp_path / "damaged"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(directory, here)
        path = chance.choice(sorted(path for path in here.iterdir() if path.is_file()))
        damage(chance, path)
        found = outcome(KINDS[kind][1], here, expected)
        if found not in ("read", "refused"):
            wrong.append(f"seed {seed}, {path.name}: {found}")
    tables.tuned_tiles.cache_clear()
    assert not wrong, "\n".join(wrong)
