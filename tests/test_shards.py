"""Images by number: who draws which, what is kept, what is drawn again, what the joined file holds."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qandc import ConfigError, DataError, OutputError, ProcessError
from qandc.evaluation.pixels import to_uint8
from qandc.experiments.processes import Processes
from qandc.experiments.shards import SHARD, ImageSet, delete_shards, draw_shards, merge_shards, missing_shards
from tests.conftest import in_a_thread

IMAGES = ImageSet(10, classes=(3, 7, 8), first_seed=100, batch_size=4)


class Drawer:
    """Pixels that tell label and seed; remembers what it was asked for."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, labels, seeds):
        self.seeds += seeds
        values = torch.tensor([[label / 100, (seed - 100) / 100] for label, seed in zip(labels, seeds, strict=True)])
        return values.view(-1, 2, 1, 1).expand(-1, 2, 3, 5)


def expected() -> np.ndarray:
    values = np.array([[(3, 7, 8)[i % 3], i] for i in range(10)]) / 100
    pixels = to_uint8(torch.from_numpy(values)).numpy()
    return np.broadcast_to(pixels[:, None, None], (10, 3, 5, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_processes_draws_the_same_images(tmp_path, count):
    drawers, shards, path = [Drawer() for _ in range(count)], tmp_path / "shards", tmp_path / "images.npz"
    shards.mkdir()
    for rank in reversed(range(count)):
        draw_shards(shards, IMAGES, drawers[rank], Processes(rank, count))
    assert sorted(seed for drawer in drawers for seed in drawer.seeds) == list(range(100, 110))
    assert missing_shards(shards, IMAGES) == []
    assert merge_shards(shards, IMAGES, path)["seconds"] > 0
    with np.load(path, allow_pickle=False) as data:
        assert data["arr_0"].dtype == np.uint8
        assert np.array_equal(data["arr_0"], expected())
        assert data["arr_1"].tolist() == [3, 7, 8, 3, 7, 8, 3, 7, 8, 3]
    (shards / "stray").write_text("")
    delete_shards(shards)
    assert [found.name for found in tmp_path.iterdir()] == ["images.npz"]


def test_what_is_there_is_not_drawn_again(tmp_path):
    draw_shards(tmp_path, IMAGES, Drawer(), Processes(1, 2))  # the middle one of three shards
    assert len(missing_shards(tmp_path, IMAGES)) == 2
    drawer, seen = Drawer(), []
    draw_shards(tmp_path, IMAGES, drawer, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert drawer.seeds == [100, 101, 102, 103, 108, 109]
    assert seen == [("images", n, 10) for n in (0, 4, 8, 10)]


def test_an_exception_keeps_finished_shards(tmp_path):
    drawer = Drawer()

    def fails(labels, seeds):
        if 104 in seeds:
            raise KeyboardInterrupt
        return drawer(labels, seeds)

    with pytest.raises(KeyboardInterrupt):
        draw_shards(tmp_path, IMAGES, fails)
    assert len(missing_shards(tmp_path, IMAGES)) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_terminate_finishes_the_shard_that_was_begun(tmp_path):
    drawer = Drawer()

    def told(labels, seeds):
        os.kill(os.getpid(), signal.SIGTERM)
        return drawer(labels, seeds)

    with pytest.raises(ProcessError, match=r"SIGTERM.*up to image 4 are kept, run the same command again"):
        draw_shards(tmp_path, IMAGES, told)
    assert len(missing_shards(tmp_path, IMAGES)) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread_signals_stay_as_they_are(tmp_path):
    drawer, before, seen = Drawer(), signal.getsignal(signal.SIGTERM), []

    def draw(labels, seeds):
        seen.append(signal.getsignal(signal.SIGTERM))
        return drawer(labels, seeds)

    in_a_thread(draw_shards, tmp_path, IMAGES, draw)
    assert missing_shards(tmp_path, IMAGES) == []
    assert seen == [before] * 3

    def fails(labels, seeds):
        return torch.full((len(labels), 2, 3, 5), float("nan"))

    with pytest.raises(DataError, match="image 0 holds NaN"):
        in_a_thread(draw_shards, tmp_path / "none", IMAGES, fails)


def test_nan_is_refused_by_number(tmp_path):
    def bad(labels, seeds):
        images = Drawer()(labels, seeds).clone()
        images[[i for i, seed in enumerate(seeds) if seed == 106], 1, 2, 2] = float("nan")
        return images

    with pytest.raises(DataError, match="image 6 holds NaN"):
        draw_shards(tmp_path, IMAGES, bad)
    assert len(missing_shards(tmp_path, IMAGES)) == 2


def test_a_missing_damaged_or_strange_shard_is_named(tmp_path):
    path = tmp_path / "images.npz"
    draw_shards(tmp_path, IMAGES, Drawer())
    shard = tmp_path / "images-0000004.safetensors"
    whole = shard.read_bytes()
    for data in (None, whole[:-3], b"x"):
        shard.unlink(missing_ok=True)
        if data is not None:
            shard.write_bytes(data)
        with pytest.raises(DataError, match=r"images-0000004.*' is no shard of images: .*run the same command again"):
            merge_shards(tmp_path, IMAGES, path)
    SHARD.write_tensors(shard, {"images": torch.zeros(4, 3, 4, 2, dtype=torch.uint8)}, {"seconds": 1.0})
    with pytest.raises(DataError, match=r"holds images \[4, 3, 4, 2\] instead of \[4, 3, 5, 2\]"):
        merge_shards(tmp_path, IMAGES, path)
    SHARD.write_tensors(shard, {"images": torch.zeros(4, 3, 5, 2)}, {"seconds": 1.0})
    with pytest.raises(DataError, match=r"of type float32 \(uint8 are drawn\)"):
        merge_shards(tmp_path, IMAGES, path)
    SHARD.write_tensors(shard, {"images": torch.zeros(4, 3, 5, 2, dtype=torch.uint8)}, {"seconds": "many"})
    with pytest.raises(DataError, match=r"images-0000004.*Expected `float`, got `str`"):
        merge_shards(tmp_path, IMAGES, path)
    save_file({"images": torch.zeros(4, 3, 5, 2, dtype=torch.uint8)}, shard, metadata={"seconds": "1.0"})
    with pytest.raises(DataError, match="has version 0, known is 1; delete it and run the same command again"):
        merge_shards(tmp_path, IMAGES, path)
    assert not path.exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "drawn", [torch.zeros(3, 1, 4, 4), torch.zeros(4, 4, 4), torch.zeros(4, 1, 4, 4, dtype=torch.int64), None]
)
def test_what_is_drawn_must_be_images(tmp_path, drawn):
    with pytest.raises(DataError, match=r"4 images \[B, C, H, W\] were to be drawn|pixels are a torch tensor"):
        draw_shards(tmp_path, IMAGES, lambda labels, seeds: drawn)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*images-0000000.*No space left"):
        draw_shards(tmp_path, IMAGES, Drawer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count is 0; give an integer >= 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"count": 1.5}, "count is 1.5"),
        ({"count": True}, "count is True"),
        ({"count": 10**20}, "count is 100000000000000000000"),
        ({"classes": ()}, "at least one class"),
        ({"classes": 3}, "classes is 3; give"),
        ({"classes": (1, -1)}, r"classes is \(1, -1\); give"),
        ({"classes": ("1",)}, r"classes is \('1',\); give"),
        ({"first_seed": "0"}, "first_seed is '0'"),
        ({"first_seed": 2**62}, "first_seed is 4611686018427387904"),
        ({"first_seed": -1}, "first_seed is -1"),
    ],
)
def test_what_is_no_image_set(changes, message):
    with pytest.raises(ConfigError, match=message):
        ImageSet(**{"count": 1, "classes": (1,), **changes})


def test_figures_are_kept_with_the_shards(tmp_path):
    """Seconds are summed, of everything else the largest counts, whoever measured it."""
    memory = iter([5, 9, 7])
    draw_shards(tmp_path, IMAGES, Drawer(), Processes(0, 2), measure=lambda: {"bytes": next(memory)})
    draw_shards(tmp_path, IMAGES, Drawer(), Processes(1, 2), measure=lambda: {"bytes": next(memory)})
    assert merge_shards(tmp_path, IMAGES, tmp_path / "x.npz")["bytes"] == 9
