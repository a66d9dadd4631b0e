"""Test the training of one model: against a plain loop, resumed, and in two processes."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

ROOT = Path(__file__).parents[1]
STEPS, RATE, DECAY, SEED = 200, 1e-2, 0.9, 3


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """Let scripts of training import each other by name, as they do."""
    monkeypatch.syspath_prepend(ROOT / "training")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))


def draw(generator):
    inputs = torch.randn(16, 4, generator=generator)
    return inputs, 3 * inputs.sum(1, keepdim=True)


def loss(model, inputs, targets):
    return (model(inputs) - targets).square().mean()


def make_stage(work):
    from stage import Stage

    settings = {"seed": SEED}
    return Stage("toy", make_model(), draw, loss, settings, work, steps=STEPS, ema_decay=DECAY, learning_rate=RATE)


def plain_loop(processes=1):
    """Average the weights of AdamW with warm-up, cosine decay and clipped gradients, by its definition."""
    model = make_model()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(STEPS):
        rate = RATE * min((step + 1) / min(500, STEPS // 10 + 1), 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 1e-3)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for rank in range(processes):
            seed = np.random.SeedSequence((SEED, sum(b"toy"), rank, step)).generate_state(1)[0]
            (loss(model, *draw(torch.Generator().manual_seed(int(seed)))) / processes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(DECAY, (2 + step) / (11 + step))
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
    return ema.state_dict()


def assert_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_stage_trains_as_a_plain_loop_does(tmp_path):
    assert_close(make_stage(tmp_path).run().state_dict(), plain_loop())


def test_a_stage_goes_on_where_it_stopped_bit_for_bit(tmp_path, monkeypatch):
    expected = make_stage(tmp_path).run().state_dict()
    (tmp_path / "toy.pt").unlink()
    monkeypatch.setattr("stage.CHECKPOINT_SECONDS", 0)
    stopped, drawn = make_stage(tmp_path), iter(range(STEPS))

    def stop_at_150(generator):
        if next(drawn) == 150:
            raise KeyboardInterrupt
        return draw(generator)

    stopped.draw = stop_at_150
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = make_stage(tmp_path)
    again.resume()
    assert again.step == 100
    found = again.run().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_finished_stage_is_loaded_and_other_settings_are_refused(tmp_path):
    expected = make_stage(tmp_path).run().state_dict()
    again = make_stage(tmp_path)
    again.draw = None  # nothing is drawn any more
    found = again.run().state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    other = make_stage(tmp_path)
    other.settings = {"seed": SEED + 1}
    with pytest.raises(SystemExit, match=r"other settings \{'seed': \(3, 4\)\}"):
        other.run()


def without(name):
    return lambda state: state.pop(name)


CHANGED = {
    "no settings": (without("settings"), "KeyError: 'settings'"),
    "no average": (without("ema"), "KeyError: 'ema'"),
    "another model": (lambda state: state["ema"].pop("3.bias"), 'Missing key.* "3.bias"'),
    "a setting more": (lambda state: state["settings"].update(batch=2), r"other settings \{'batch': \(2, None\)\}"),
    "fewer steps": (lambda state: state.update(step=100), r"other settings \{'steps': \(100, 200\)\}"),
    "more steps": (lambda state: state.update(step=300), r"other settings \{'steps': \(300, 200\)\}"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_checkpoints_of_other_trainings_are_refused_in_a_line(change, message, tmp_path):
    stage = make_stage(tmp_path)
    stage.step = STEPS
    stage.save()
    make_stage(tmp_path).resume()
    change(state := torch.load(stage.path, weights_only=True))
    torch.save(state, stage.path)
    with pytest.raises(SystemExit, match=rf"toy\.pt .*{message}.*; delete it or give another --work") as told:
        make_stage(tmp_path).resume()
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04"])
def test_damaged_checkpoints_are_refused_in_a_line(content, tmp_path):
    (tmp_path / "toy.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"toy\.pt is no checkpoint of this model .*; delete it"):
        make_stage(tmp_path).resume()


def train_in_process(rank, work):
    importlib.import_module("stage")  # before there is a group, as the scripts do
    dist.init_process_group("gloo", f"file://{work}/meeting", rank=rank, world_size=2)
    torch.save(make_stage(work).run().state_dict(), work / f"{rank}.pt")
    dist.destroy_process_group()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in names)  # it could abort the process when it exits


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    mp.spawn(train_in_process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert_close(first, plain_loop(processes=2))
