"""The record: which portions there are, what a run leaves, and how it goes on."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from benchmarks import goals, record
from benchmarks.goals import SUITES
from qandc.support import results
from tests.test_benchmarks import environment

ROOT = Path(__file__).parents[1]


def tiny_portions(check, middle):
    return [
        record.Portion("check-all", "", 1, check, gpus=0),
        record.Portion("first", "", 1, write("first"), "check-all", 0),
        record.Portion("second", "-k a", 1, f"{middle} && {write('second')}", "check-all", 0),
        record.Portion("third", "", 1, write("third"), "check-all", 0),
        record.Portion("fourth", "", 1, "true", None if check == "false" else "check-all", 0),
        record.Portion("large", "", 1, "false", "check-all", 1),
    ]


def write(name: str) -> str:
    """Return a command that writes a file, which must not be there, and notes that it ran."""
    content = """printf '{{"commit": "%s", "command": "%s"}}' "$QANDC_COMMIT" "$QANDC_COMMAND" """
    return f"echo {name} >> {{card}}/ran && test ! -e {{out}} && {content} > {{out}}"


class Tiny:
    """Run the command line with portions of a second: in this process, or in one of its own, to be killed."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def start(self, check="true", middle="true"):
        kept = {name: value for name, value in os.environ.items() if name != "QANDC_COMMAND"}
        environment = {**kept, "PYTHONPATH": str(ROOT), "QANDC_COMMIT": "a", "CUDA_VISIBLE_DEVICES": ""}
        code = (
            f"from tests.test_record import record, tiny_portions\nrecord.record(tiny_portions({check!r}, {middle!r}))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, "--out", self.out],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *options, commit="a", check="true", middle="true"):
        output = io.StringIO()
        handler = logging.StreamHandler(output)
        with pytest.MonkeyPatch.context() as patched, redirect_stdout(output), redirect_stderr(output):
            patched.delenv("QANDC_COMMAND", raising=False)
            patched.setenv("QANDC_COMMIT", commit)
            patched.setattr(record, "card_name", lambda: "cpu")
            patched.setattr(record, "_gpus", lambda: [""])
            patched.setattr(sys, "argv", ["record", "--out", str(self.out), *options])
            record.logger.addHandler(handler)
            try:
                record.record(tiny_portions(check, middle))
            except SystemExit as end:
                return end.code or 0, output.getvalue()
            finally:
                record.logger.removeHandler(handler)
        raise AssertionError("the command line ends its process")

    @property
    def ran(self):
        return (self.out / "cpu" / "ran").read_text().split()

    def states(self, *options):
        _, output = self.run("--list", *options)
        return {line[24:].split()[0]: line[:12].strip() for line in output.splitlines()}


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path / "out")


def test_every_file_of_results_is_written_by_a_portion_or_historical():
    written = {(min(p.gpus, 1), p.file) for p in record.PORTIONS}
    found = {(int(path.parent.name != "cpu"), path.stem) for path in (ROOT / "results").glob("*/*.json")}
    found -= {(0, "record"), (1, "record")}
    old = {(1, name) for name in record.HISTORICAL}
    assert found - written - old == set()
    assert old <= found  # else its line can go
    assert not old & written


def test_portions_can_run():
    names = [portion.name + str(portion.gpus) for portion in record.PORTIONS]
    assert len(set(names)) == len(names)
    for portion in record.PORTIONS:
        assert portion.is_check or portion.check in {
            p.name for p in record.PORTIONS if p.is_check and min(p.gpus, 1) == min(portion.gpus, 1)
        }
        command = portion.command.format(python="python", out="/r/x.json", card="/r", scratch="/s")
        assert portion.minutes < 10
        if "--save" in command:
            layer = re.sub(r".*--layers=([^ ,]*).*|.*", r"\1", command)
            rows = [{"op": op, "layer": layer} for ops, _ in SUITES.values() for op in ops]
            assert portion.file in map(goals.file_of, rows)
        for word in shlex.split(command):
            if re.match(r"(tests|benchmarks|training)/", word):
                assert (ROOT / word).exists(), word


def test_options_of_scripts_are_known(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    for portion in record.PORTIONS:
        if found := re.search(r"training[/.](\w+)", portion.command):
            known = inspect.signature(importlib.import_module(found[1]).main).parameters
            given = {name.removeprefix("no-") for name in re.findall(r" --([\w-]+)", portion.command)}
            assert given <= {name.replace("_", "-") for name in known}


@pytest.mark.slow
def test_portions_select_all_benchmarks(tmp_path):
    """Have pytest look, in one process, for what each line measures, and at last for all that there is."""
    lines = [portion.command for portion in record.PORTIONS if "--save" in portion.command]
    words = [shlex.split(line.format(python="", card=tmp_path, out="", scratch=""))[3:] for line in lines]
    words.append(["benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"])
    code = "import json, pytest, sys\nfor words in json.loads(sys.argv[1]): pytest.main([*words, '--co']), print('=')"
    command = [sys.executable, "-c", code, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    *found, every, _ = (set(re.findall("^benchmarks/.*::.*$", part, re.MULTILINE)) for part in done.stdout.split("=\n"))
    assert [line for line, measured in zip(lines, found, strict=True) if not measured] == []
    left = every - set().union(*found)
    assert not left


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny):
    process = tiny.start(middle="sleep 100")
    deadline = time.monotonic() + 60
    notes = tiny.out / "cpu" / "record.json"
    while not notes.exists() or "second -k a" not in notes.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert tiny.states() == {
        "check-all": "done",
        "first": "done",
        "second": "cut",
        "third": "missing",
        "fourth": "missing",
    }
    status, output = tiny.run("--only", "first|second|third")
    assert (status, tiny.ran) == (0, ["first", "third", "second"]), output  # what was cut may be cut again: last
    result = json.loads((tiny.out / "cpu" / "second.json").read_text())
    assert (result["commit"], result["command"]) == ("a", "python -m benchmarks.record --only '^second( |$)'")
    status, output = tiny.run()  # the one that writes nothing has failed, all others are done
    assert (status, tiny.ran) == (1, ["first", "third", "second"])
    assert "fourth: wrote no" in output
    assert tiny.states("--only", "fourth") == {"check-all": "done", "fourth": "failed"}


@pytest.mark.slow
def test_other_commits_are_refused_and_replaced_if_told(tiny):
    assert tiny.run("--only", "first|third")[0] == 0
    status, output = tiny.run(commit="b")
    assert status == 2
    assert "holds first.json, third.json of other commits than b" in output
    assert tiny.run("--only", "first", "--any-commit", commit="b")[0] == 0
    commits = {
        name: json.loads((tiny.out / "cpu" / f"{name}.json").read_text())["commit"] for name in ("first", "third")
    }
    assert commits == {"first": "b", "third": "a"}
    assert tiny.states("--only", "first|third") == {"check-all": "missing", "first": "older", "third": "done"}
    assert "files differ from commit c: commit them" in tiny.run(commit="c-dirty")[1]
    status, output = tiny.run("--only", "[")
    assert (status, output) == (2, "--only is no regular expression: unterminated character set at position 0\n")


@pytest.mark.slow
def test_failures_are_told_and_the_rest_goes_on(tiny):
    status, output = tiny.run("--only", "first|second|third", middle="exit 7")
    assert (status, tiny.ran) == (1, ["first", "third"])
    assert "second -k a: failed with status 7; the rest goes on" in output
    status, output = tiny.run("--only", "first|second", "--any-commit", commit="b", check="false")
    assert (status, tiny.ran) == (1, ["first", "third"])  # what is not checked is not measured
    assert "first: not measured, as check-all failed" in output


@pytest.mark.slow
def test_portions_that_would_not_end_in_time_are_left(tiny):
    status, output = tiny.run("--seconds", "30")  # each may take a minute
    assert (status, (tiny.out / "cpu").exists()) == (0, False)
    assert "check-all: not begun, may take 60 s" in output
    (tiny.out / "cpu").mkdir(parents=True)
    notes = tiny.out / "cpu" / "record.json"
    notes.write_text(json.dumps({"check-all": {"commit": "before", "status": 0, "seconds": 1.5}}))
    status, output = tiny.run("--seconds", "30")  # what took less before is begun
    assert "first: not begun, may take 60 s" in output
    assert json.loads(notes.read_text())["check-all"]["commit"] == "a"


def test_portions_run_side_by_side_on_all_gpus(tmp_path, monkeypatch):
    """Two wait for each other; of one file the second waits for the first; what takes two GPUs has both."""
    monkeypatch.setattr(record, "_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(record, "card_name", lambda: "h200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ran = tmp_path / "ran"

    def portion(file, options="", waits="", gpus=1):
        say = f"echo {file}{options} $CUDA_VISIBLE_DEVICES >> {ran}; touch {tmp_path}/{file}; "
        there = f"test -e {tmp_path}/{waits}"
        wait = f"for i in $(seq 200); do {there} && break; sleep 0.1; done; {there} && "
        result = """printf '{{"commit": "a"}}' > {out}"""
        return record.Portion(file, options, 1, say + (wait if waits else "") + result, None, gpus)

    portions = [portion("a", waits="b"), portion("a", "2"), portion("b", waits="a"), portion("both", gpus=2)]
    book = record.Record(portions, tmp_path / "h200", "a")
    assert book.run(portions, 1e9)
    lines = ran.read_text().splitlines()
    assert sorted(lines[:2]) == ["a 0", "b 1"]
    assert lines[2].startswith("a2 ")
    assert lines[3] in ("both 0,1", "both 1,0")
    assert {book.state(each) for each in portions} == {"done"}


def test_what_takes_no_times_shares_a_gpu(tmp_path, monkeypatch):
    """Two wait for each other, a third for its turn; what is timed has the GPU for itself, before or afterwards."""
    monkeypatch.setattr(record, "_gpus", lambda: ["0"])
    monkeypatch.setattr(record, "card_name", lambda: "h200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(record, "SHARED", 2)
    ran = tmp_path / "ran"

    def portion(name, waits=None, timed=False):
        there = f"test -e {tmp_path}/{waits or name}"
        wait = f"for i in $(seq 200); do {there} && break; sleep 0.1; done; {there}"
        result = """printf '{{"commit": "a"}}' > {out}"""
        steps = (
            f"echo +{name} >> {ran}",
            f"touch {tmp_path}/{name}",
            wait,
            "sleep 0.3",
            f"echo -{name} >> {ran}",
            result,
        )
        return record.Portion(name, "", 1, " && ".join(steps), None, 1, timed)

    portions = [portion("a", "b"), portion("clock", timed=True), portion("b", "a"), portion("c")]
    assert record.Record(portions, tmp_path / "h200", "a").run(portions, 1e9)
    going, most = set(), 0
    for mark, name in ((line[0], line[1:]) for line in ran.read_text().split()):
        (going.add if mark == "+" else going.remove)(name)
        assert "clock" not in going or len(going) == 1
        most = max(most, len(going))
    assert most == 2


def test_what_would_not_end_in_time_holds_up_its_own_file_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(record, "card_name", lambda: "cpu")
    result = """printf '{{"commit": "a"}}' > {out}"""
    given = (("check-all", 1, "true"), ("long", 9, result), ("long", 1, result), ("short", 1, result))
    portions = [
        record.Portion(file, str(i), minutes, command, "check-all" if i else None, 0)
        for i, (file, minutes, command) in enumerate(given)
    ]
    portions[0] = record.Portion("check-all", "", 1, "true", gpus=0)
    book = record.Record(portions, tmp_path / "cpu", "a")
    assert book.run(portions, 300)
    assert [book.state(each) for each in portions] == ["done", "missing", "missing", "done"]
    assert [each.message for each in caplog.records if "not begun" in each.message] == [
        "long 1: not begun, may take 540 s; the same command goes on"
    ]


def test_what_resumes_is_cut_in_time_and_goes_on_first(tmp_path, monkeypatch):
    """Cut rows that would take too long; then go on with them, before what begins anew."""
    monkeypatch.setattr(record, "card_name", lambda: "cpu")
    content = """printf '{{"commit": "a"}}' > {out}"""
    wait, ran = f"&& {{{{ test -e {tmp_path}/fast || exec sleep 100; }}}}", tmp_path / "ran"

    def portion(name, wait="", **how):
        return record.Portion(name, "", 0, f"{content} && echo {name} >> {ran} {wait}", "check-all", 0, **how)

    anew, rows, fresh = portion("anew"), portion("rows", wait, resumes=True), portion("fresh")
    portions = [anew, rows, fresh]
    book = record.Record(portions, tmp_path / "cpu", "a")
    book.directory.mkdir()
    book._note(anew, None, 0)
    begun = time.monotonic()
    assert book.run([rows], 0.5)
    assert 0.5 <= time.monotonic() - begun < 50
    assert [book.state(each) for each in portions] == ["cut", "cut", "missing"]
    (tmp_path / "fast").touch()
    assert book.run(portions, 1000)
    assert [book.state(each) for each in portions] == ["done"] * 3
    assert ran.read_text().split() == ["rows", "rows", "fresh", "anew"]


@pytest.mark.slow
def test_what_runs_ends_with_the_record(tiny):
    process = tiny.start(check="sleep 100")
    deadline = time.monotonic() + 60
    while not (tiny.out / "cpu" / "record.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)  # which waits for all that could write there
    assert process.returncode == 130, output
    assert "ended by SIGTERM\ncheck-all: cut; the same command goes on" in output
    assert "Traceback" not in output
    assert tiny.states("--only", "first")["check-all"] == "cut"


def test_what_is_just_started_ends_with_the_record_too(tmp_path, monkeypatch):
    """Send a signal to the record between the start of a portion and its note."""
    started, start, handler = [], subprocess.Popen, signal.getsignal(signal.SIGTERM)

    def popen(*args, **kwargs):
        started.append(start(*args, **kwargs))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    book = record.Record([record.Portion("check-all", "", 1, "sleep 100", gpus=0)], tmp_path / "cpu", "a")
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        book.run(book.portions, 1000)
    assert started[0].poll() == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [("", 0, [""]), ("", 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("0,9", 1, ["0"]), ("GPU-a,GPU-b", 2, ["GPU-a"])],
)
def test_gpus_are_named_as_they_are_made_visible(monkeypatch, visible, count, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    cards = ["H200", "L4" if visible.startswith("GPU") else "H200"]  # another kind would spoil the card's files
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: cards[i])
    assert record._gpus() == names


def test_results_do_not_make_the_source_dirty(tmp_path, monkeypatch):
    monkeypatch.delenv("QANDC_COMMIT", raising=False)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.source_commit() is None
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    commit = results.source_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "results" / "a.json").write_text("2")
    assert results.source_commit() == commit
    (tmp_path / "code.py").write_text("2")
    assert results.source_commit() == f"{commit}-dirty"


def test_a_result_names_power_limit_clocks_and_driver(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "700.00, 1755, 1980, 570.86.15"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid="1-2"))
    results.card.cache_clear()
    try:
        found = results.machine()
        assert record.card_name() == "h200"
    finally:
        results.card.cache_clear()
    assert {name: found[name] for name in ("gpu", "power_limit_w", "sm_mhz", "max_sm_mhz", "driver")} == {
        "gpu": "NVIDIA H200", "power_limit_w": 700.0, "sm_mhz": 1755.0, "max_sm_mhz": 1980.0, "driver": "570.86.15"
    }  # fmt: skip
    asked = (tmp_path / "nvidia-smi.asked").read_text()
    assert "--query-gpu=power.limit,clocks.sm,clocks.max.sm,driver_version" in asked
    assert "--id=GPU-1-2" in asked


def write_result(path, date, rows, **goals):
    bounds = {"must": 1.5, "goal": 2.0, "better": "higher", "unit": "1"}
    content = {"date": date, "commit": f"commit-of-{date}", "command": "pytest", "rows": rows}
    content["goals"] = [{"name": name, "value": value, **bounds} for name, value in goals.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def row(candidate, m, **more):
    return {"op": "linear", "layer": "qkv", "m": m, "candidate": candidate, "median_us": 1.0, **more}


def test_tables_of_losses_and_goals(tmp_path, monkeypatch):
    """Fill tables with the last measurement of each row, over a rival that took turns if there is one."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tables = importlib.import_module("record_tables")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    old = [
        row("bf16 F.linear", 1, ratio_to_bf16=1.0),
        row("W8A8", 1, ratio_to_bf16=0.5),
        row("W8A8", 2, ratio_to_bf16=0.9),
    ]
    write_result(tmp_path / "results" / "h200" / "b.json", "1", old, some=1.0, other=1.7, unknown=None)
    write_result(tmp_path / "results" / "h200" / "a.json", "2", [row("W8A8", 1, ratio_to_bf16=1.2)], some=1.6)
    turns = {"rival": "bf16 F.linear", "rival_median_us": 9.0, "rival_ratio": 0.8, "ratio_to_bf16": 3.0}
    write_result(tmp_path / "results" / "h100" / "a.json", "3", [row("W8A8", 1, **turns)], some=1.0)
    found = tables.losses_table()[2:]
    assert [re.sub(r"\[.*", "", line) for line in found] == [
        "| H200 | linear: W8A8 | bf16 F.linear | 0.90x (qkv, 2) | 1 of 2 | ",
        "| H100 | linear: W8A8 | bf16 F.linear | 0.80x (qkv, 1) | 1 of 1 | ",
    ]
    assert "[b.json](/results/h200/b.json) at commit-of-" in found[0]
    (line,) = tables.benchmarks_table("h200")[2:]
    assert "| 0.90x to 1.20x | 2 | `pytest` | [a.json]" in line
    assert "[b.json]" in line
    assert [line.split(" | ")[:3] for line in tables.reached_table()[2:]] == [
        ["| H200", "some", "1.6"],
        ["| H200", "other", "1.7"],
    ]
    missed = tables.missed_table()
    assert [line.split(" | ")[:3] for line in missed[2:-2]] == [["| H100", "some", "1"]]
    assert "`w8a8_8192`" in missed[-1]


def test_every_goal_that_is_missed_has_a_reason(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tables = importlib.import_module("record_tables")
    missed = {goal["name"] for _, goal in tables.goals() if not tables.reached(goal, "must")}
    assert {name for name in missed if not all(tables.reason(name))} == set()
