"""Options, the fixture that measures, the tables at the end and the file they are saved to."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Generator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from benchmarks import report, timing
from benchmarks.goals import SUITES, file_of, suite_of
from benchmarks.rivals import NotInstalled
from qandc.support.files import write_json
from qandc.support.results import measured_rows, result_header

NO_GPU = "needs an NVIDIA GPU"
WITHOUT_GPU = NO_GPU if timing.DEVICE == "cpu" else None  # why a candidate is skipped


class Run:
    """The rows of this session, and pytest-benchmark's ``extra_info`` of each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.infos: list[dict[str, Any]] = []
        self.before: dict[Path, list[dict[str, Any]]] = {}  # rows of the files that are continued

    def add(self, row: dict[str, Any], info: dict[str, Any]) -> None:
        self.rows.append(row)
        self.infos.append(info)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Save the rows so far: a run that is cut keeps them."""
    rows = item.config.stash[RUN].rows
    if rows and "median_us" in rows[-1]:
        _write(item.config)


RUN = pytest.StashKey[Run]()


class Measure(Protocol):
    def __call__(
        self,
        row: dict[str, Any],
        build: Callable[[], timing.Candidate],
        skip: str | None = WITHOUT_GPU,
        *,
        rival: tuple[str, Callable[[], timing.Candidate | timing.Timed]] | None = None,
        operations: float | None = None,
        nbytes: float | None = None,
    ) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--save", type=Path, metavar="DIR", help="write kernels.json, model.json, ... or add rows to them")
    group.addoption("--resume", action="store_true", help="leave out the rows that files of --save have")
    group.addoption(
        "--rivals", choices=("none", "fast", "all"), default="all", help="gemlite and torchao: fast is M = 4096 alone"
    )
    group.addoption("--layers", metavar="A,B", help="only these layers, as tables name them: qkv,out,fc1,fc2,8192^3,LN")
    group.addoption("--rows", metavar="M,M", help="only these numbers of rows")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUN] = Run()
    # else Ctrl-C, which leaves one fixture unused, would take the tables at the end with it
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in (item for item in items if Path(__file__).parent in item.path.parents):
        item.add_marker(pytest.mark.benchmark(timer=timing.CLOCK))
        item.add_marker(pytest.mark.filterwarnings("default"))
    for option, parameter in (("--layers", "layer"), ("--rows", "m")):
        wanted = config.getoption(option)
        if wanted is None:
            continue
        kept: list[pytest.Item] = []
        others: list[pytest.Item] = []
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            matches = parameter not in parameters or str(parameters[parameter]) in wanted.split(",")
            (kept if matches else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = kept


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Measure:
    """Check, capture and time a candidate, and note its row; a candidate that can't run is a row with the reason."""
    run = request.config.stash[RUN]

    def measured(
        row: dict[str, Any],
        build: Callable[[], timing.Candidate],
        skip: str | None = WITHOUT_GPU,
        *,
        rival: tuple[str, Callable[[], timing.Candidate | timing.Timed]] | None = None,
        operations: float | None = None,
        nbytes: float | None = None,
    ) -> None:
        if request.config.getoption("--save") is not None:
            _, before = _continued(request.config, row)
            if request.config.getoption("--resume") and any("median_us" in r for r in before if _key(r) == _key(row)):
                pytest.skip("measured before")
        row |= {"n": row.get("n"), "k": row.get("k")}
        benchmark.group = f"{row['op']} {row['layer']}" + (f" M={row['m']}" if row["m"] else "")
        if skip is None:
            try:
                with torch.no_grad():
                    row |= time_candidate(benchmark, build(), rival and rival[1])
                    row |= {"rival": rival[0]} if rival else {}
            except NotInstalled as error:
                skip = f"not installed: {error}"
            except Exception as error:
                message = " ".join(f"failed: {type(error).__name__}: {error}".split())
                run.add(row | {"skipped": message[:300]}, {})
                raise
        if skip is not None:
            run.add(row | {"skipped": skip}, {})
            pytest.skip(skip)
        if "median_us" not in row:  # --benchmark-disable
            return
        seconds = row["median_us"] / 1e6
        if operations is not None:
            row["tops"] = operations / seconds / 1e12
        if nbytes is not None:
            row["gbytes_per_s"] = nbytes / seconds / 1e9
        run.add(row, benchmark.extra_info)

    return measured


def time_candidate(
    benchmark: Any, candidate: timing.Candidate, rival: Callable[[], timing.Candidate | timing.Timed] | None
) -> dict[str, Any]:
    """Check the result, then take times, by turns with the rival's if there is one: the entries of a row."""
    error, timed = timing.checked(candidate)
    rounds = timed.rounds()
    found = {"error": error, "method": timed.method, "launches": timed.launches}
    if rival is None:
        benchmark.pedantic(timing.CLOCK.run, args=(timed,), warmup_rounds=min(2, rounds - 2), rounds=rounds)
    else:
        theirs = rival()
        if isinstance(theirs, timing.Candidate):  # else it has been checked before
            _, theirs = timing.checked(theirs)
        found |= by_turns(benchmark, timed, theirs, rounds)
    if timed.why_no_graph is not None:
        found["why_no_graph"] = timed.why_no_graph
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        found |= {"rounds": rounds, "median_us": stats.median * 1e6, "min_us": stats.min * 1e6}
    return found


def by_turns(benchmark: Any, ours: timing.Timed, theirs: timing.Timed, rounds: int) -> dict[str, Any]:
    """Take times in the order theirs, ours, ours, theirs: what drifts falls on both alike. Ratios are of each four."""
    times: tuple[list[float], list[float]] = ([], [])
    if rounds >= timing.LEAST_ROUNDS[0][1]:  # what takes seconds is warm after its check
        theirs.seconds()

    def run_theirs() -> None:
        turn = len(times[0])
        times[1].extend(theirs.seconds() for _ in range(1 if turn == 0 else 2 * (1 - turn % 2)))

    def run_ours() -> None:
        before = timing.CLOCK()
        timing.CLOCK.run(ours)
        times[0].append(timing.CLOCK() - before)

    benchmark.pedantic(run_ours, setup=run_theirs, rounds=rounds)
    times[1].append(theirs.seconds())
    own, other = ([a + b for a, b in zip(taken[::2], taken[1::2], strict=False)] for taken in times)
    ratios = [b / a for a, b in zip(own, other, strict=False)]
    found = {"rival_median_us": statistics.median(times[1]) * 1e6, "rival_min_us": min(times[1]) * 1e6}
    return found | (
        {"rival_ratio": statistics.median(ratios), "rival_ratio_range": [min(ratios), max(ratios)]} if ratios else {}
    )


def _continued(config: pytest.Config, row: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    """Return the file that a row is saved to and what it held; refuse one of another commit or card."""
    before = config.stash[RUN].before
    path: Path = config.getoption("--save") / f"{file_of(row)}.json"
    if path not in before:
        before[path] = measured_rows(path, _header(config))
    return path, before[path]


def _header(config: pytest.Config) -> dict[str, Any]:
    settings = {
        "rivals": config.getoption("--rivals"),
        "versions": _versions(),
        "measured_seconds": timing.MEASURED_SECONDS,
    }
    header = result_header(settings)
    if "QANDC_COMMAND" not in os.environ:
        header["command"] = " ".join(["pytest", *map(str, config.invocation_params.args)])
    return header


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("gemlite", "torchao", "pytest-benchmark"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _write(config: pytest.Config) -> None:
    """Save all rows so far, each to its file, if something was measured for it; others stay but for those repeated.

    Ratios are of this run, or of all rows of a file that is resumed.
    """
    measured, before = config.stash[RUN].rows, config.stash[RUN].before
    resumed = [row for rows in before.values() for row in rows] if config.getoption("--resume") else []
    report.complete([*measured, *resumed])  # the first of two counts: one that failed before is measured now
    if config.getoption("--save") is None:
        return
    for name in dict.fromkeys(map(file_of, measured)):
        rows = [row for row in measured if file_of(row) == name]
        if not any("median_us" in row for row in rows):
            continue
        path, older = _continued(config, rows[0])
        _, goals = SUITES[suite_of(rows[0])]
        known = {_key(row) for row in rows}
        rows = [row for row in older if _key(row) not in known] + rows
        found = [goal for goal in goals(rows) if goal["value"] is not None]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_header(config), "rows": rows, "goals": found})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "layer", "m", "candidate"))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-benchmark writes the extra_info to its own files
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None]:
    run = session.config.stash[RUN]
    _write(session.config)
    for row, info in zip(run.rows, run.infos, strict=True):
        info |= row
    return (yield)


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if not run.rows:
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    sections = {
        f"median time of a launch on {where}, and speed relative to the baseline": report.table(run.rows),
        "losses": report.losses(run.rows),
        "where the time of a step goes": report.breakdowns(run.rows),
        "goals": report.goal_lines(run.rows),
    }
    for title, lines in sections.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    for path in run.before:
        terminalreporter.write_line(f"saved to {path}")
