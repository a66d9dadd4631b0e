"""Locks of directories, and what reads the JSON files of this package."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import save_file

from qandc import CalibratedSchedule, Compensation, ConfigError, DataError, OutputError, Preset, QuantConfig
from qandc.experiments.scores import load_images
from qandc.experiments.shards import ImageSet, merge_shards
from qandc.method import pool
from qandc.support.files import bytes_of, keep_settings, locked, read_json, write_json
from qandc.variance_compensation import FittedFor
from tests.conftest import in_time

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_lock_is_free_again_however_its_run_ends(tmp_path):
    path = tmp_path / "run" / ".lock"
    code = f"""
import pathlib, sys
from qandc.support.files import locked
with locked(pathlib.Path({str(path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputError, match=r"another run is writing to '.*run'; wait for its end, or give"),
            locked(path),
        ):
            pass
        other.kill()
        other.wait()
    for _ in range(2):
        with locked(path):
            pass
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path):
        pass


def test_bytes_are_those_of_the_elements_whatever_the_strides():
    """Also of one element that was expanded, whose stride is 0."""
    for x in (
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(3.0).expand(1),
        torch.ones(2, 0),
        torch.tensor(2).bfloat16(),
    ):
        plain = torch.tensor(x.tolist(), dtype=x.dtype)
        assert bytes(bytes_of(x)) == plain.view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.slow
def test_a_lock_without_fcntl(tmp_path):
    """Import the package and lock a directory where there is no fcntl, as on systems that are not POSIX."""
    code = f"""
import sys, warnings
sys.modules["fcntl"] = None
import pathlib, qandc
from qandc.support.files import locked
warnings.simplefilter("ignore")
path = pathlib.Path({str(tmp_path / ".lock")!r})
with locked(path):
    try:
        with locked(path):
            print("two at once")
    except qandc.OutputError as error:
        print(error)
with locked(path):
    print("free again")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("another run is writing to")
    assert second == "free again"


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"), locked(tmp_path / "file" / "below" / ".lock"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write to"), locked(tmp_path / "folder"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / ".lock"):
        pass
    assert "cannot be locked (No locks available): nothing keeps a second run out" in caplog.text


RUN = FittedFor("DDPMScheduler", (667, 334), 1.5, "a model")
GAINS = Compensation(torch.ones(2, 4), torch.zeros(2, 4), "sample", "least_squares", RUN)
FOUND = CalibratedSchedule((True, False), (667, 334), "branch", 0)
STRUCTURE = dict.fromkeys(
    ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size"), 1
)
SETTINGS = Preset(
    QuantConfig(),
    {"a.act_scale": torch.tensor(1.0), "a.act_zero_point": torch.tensor(-3, dtype=torch.int32)},
    FOUND,
    GAINS,
    "DDPMScheduler",
    1.5,
    STRUCTURE,
)


def load_preset(path: Path) -> Preset:
    return Preset.load(path.parent)


READERS = {  # of every kind of JSON file of this package: its name, what reads it
    "schedule.json": CalibratedSchedule.load,
    "qandc.json": load_preset,
    "pool.json": lambda path: keep_settings(path, {"version": 1}, "a pool"),
}
TENSORS = {
    "qandc.safetensors": load_preset,
    "compensation.safetensors": Compensation.load,
    "pool-000000.safetensors": pool.read_shard,
}


@pytest.fixture
def directory(tmp_path):
    """One with every kind of file."""
    SETTINGS.save(tmp_path)
    FOUND.save(tmp_path / "schedule.json")
    GAINS.save(tmp_path / "compensation.safetensors")
    write_json(tmp_path / "pool.json", {"version": 1})
    shutil.copy(tmp_path / "qandc.safetensors", tmp_path / "pool-000000.safetensors")
    return tmp_path


def nested(depth: int) -> bytes:
    return b'{"version": 1, "a": ' + b"[" * depth + b"]" * depth + b"}"


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room


BROKEN = {
    "missing": (lambda path: None, "No such file"),
    "directory": (Path.mkdir, "it is a directory, no regular file"),
    "FIFO": (os.mkfifo, "it is a FIFO, no regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, no regular file"),
}
BROKEN_JSON = {
    **BROKEN,
    "empty": (lambda path: path.write_bytes(b""), "Expecting value|truncated"),
    "list": (lambda path: path.write_bytes(b"[1]"), "it holds list, not an object|Expected `object`, got `array`"),
    "number": (lambda path: path.write_bytes(b"1"), "it holds int, not an object|Expected `object`, got `int`"),
    "too deep": (lambda path: path.write_bytes(nested(100_000)), "it is nested too deeply"),
    "UTF-16": (lambda path: path.write_bytes('{"version": 1}'.encode("utf-16")), "it is not UTF-8|malformed"),
    "too large": (huge, "it has more than 67,108,864 bytes"),
    "many digits": (lambda path: path.write_bytes(b'{"version": ' + b"1" * 5000 + b"}"), "limit|out of range"),
}


BEGUN_ANEW = {("pool.json", "missing"), ("qandc.json", "missing"), ("pool-000000.safetensors", "missing")}


@pytest.mark.parametrize(("name", "how"), sorted({*itertools.product(READERS, BROKEN_JSON)} - BEGUN_ANEW))
def test_json_files_that_are_none(directory, name, how):
    make, message = BROKEN_JSON[how]
    path = directory / name
    path.unlink()
    make(path)
    with in_time(), pytest.raises(ConfigError, match=rf"'.*' (is no|has) .*({message}).*; \w+"):
        READERS[name](path)


@pytest.mark.parametrize("version", ["1", True, 1.5, None, [1]])
@pytest.mark.parametrize("name", ["schedule.json", "qandc.json"])
def test_versions_that_are_none(directory, name, version):
    path = directory / name
    written = json.loads(path.read_text())
    write_json(path, {**written, "version": version})
    with pytest.raises(ConfigError, match=r"is no .*: Expected `int`, got `\w+` - at `\$.version`; \w+"):
        READERS[name](path)
    write_json(path, {key: value for key, value in written.items() if key != "version"})
    with pytest.raises(ConfigError, match="missing required field `version`"):
        READERS[name](path)
    write_json(path, {**written, "version": 99})
    with pytest.raises(ConfigError, match=r"has version 99, known is \d; update qandc"):
        READERS[name](path)
    write_json(path, {"version": 0, **{key: value for key, value in written.items() if key != "version"}})
    with pytest.raises(ConfigError, match=r"has version 0, known is \d; make "):
        READERS[name](path)


def test_a_file_of_another_kind(directory):
    shutil.copy(directory / "schedule.json", directory / "qandc.json")
    written = json.loads((directory / "qandc.json").read_text())
    write_json(directory / "qandc.json", {**written, "version": 1})
    with pytest.raises(ConfigError, match="is no calibrated model: it says that it is a 'schedule'"):
        Preset.load(directory)
    shutil.copy(directory / "compensation.safetensors", directory / "pool-000000.safetensors")
    with pytest.raises(DataError, match="known is 1"):
        pool.read_shard(directory / "pool-000000.safetensors")


def test_files_of_before_say_what_to_do(directory):
    """A schedule was the object itself, tensors had no checksum."""
    write_json(directory / "schedule.json", {"version": 1, "schedule": [True], "timesteps": [9]})
    with pytest.raises(ConfigError, match="has version 1, known is 2; make one with calibrate_schedule"):
        CalibratedSchedule.load(directory / "schedule.json")
    for name in ("compensation.safetensors", "pool-000000.safetensors"):
        save_file({"gain": torch.ones(2, 4)}, directory / name)
        with pytest.raises((ConfigError, DataError), match=r"has version 0, known is \d; (make one|delete it)"):
            TENSORS[name](directory / name)


def test_what_is_at_the_limits(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(nested(31))
    assert read_json(path, "file", "write it")["version"] == 1
    path.write_bytes(nested(32))
    with pytest.raises(ConfigError, match="it is nested too deeply"):
        read_json(path, "file", "write it")
    path.write_bytes(b'{"a": "' + b"x" * (2**26 - 9) + b'"}')
    assert len(read_json(path, "file", "write it")["a"]) == 2**26 - 9
    with pytest.raises(ConfigError, match=r"a.json' is no file: it has no 'b'; write it"):
        read_json(path, "file", "write it", names=("a", "b"))


@pytest.mark.parametrize(("name", "how"), sorted({*itertools.product(TENSORS, [*BROKEN, "garbage"])} - BEGUN_ANEW))
def test_tensor_files_that_are_none(directory, name, how):
    make, message = {**BROKEN, "garbage": (lambda path: path.write_bytes(b"?" * 99), "header|checksum")}[how]
    path = directory / name
    path.unlink()
    make(path)
    error = DataError if "pool" in name else ConfigError
    with in_time(), pytest.raises(error, match=rf"safetensors' is no .*({message}).*; \w+"):
        TENSORS[name](path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_shards_and_arrays_that_are_no_regular_files(tmp_path, make):
    make(tmp_path / "images-0000000.safetensors")
    make(tmp_path / "x.npz")
    with in_time(), pytest.raises(DataError, match=r"is no shard of images: .*no regular file"):
        merge_shards(tmp_path, ImageSet(2, (1,)), tmp_path / "out.npz")
    with in_time(), pytest.raises(DataError, match="no regular file"):
        load_images(tmp_path / "x.npz")
