"""The time of one launch: many launches in a CUDA graph, whose replays are timed with CUDA events."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qandc_kernels import capturing

__all__ = ["CLOCK", "DEVICE", "Candidate", "Timed", "capture", "checked", "launches_for", "prepare", "relative_error"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPH_SECONDS = 1.5e-3  # a replay lasts about this long or longer: events resolve half a microsecond
MEASURED_SECONDS = 0.075  # of each candidate
SHORTEST_LAUNCH = 4e-6
LEAST_ROUNDS = ((1.0, 6), (8.0, 4), (math.inf, 2))  # of calls that take less than so many seconds
EAGER_LAUNCHES = 64
# cycles that the GPU spins before a measurement, while the processor queues what is to be measured
GRAPH_HEAD_START, EAGER_HEAD_START = 1_000_000, 20_000_000


@dataclass(frozen=True)
class Candidate:
    """Something to time: ``launch(i)`` does the work with the ``i``-th copy of what should come cold from memory."""

    launch: Callable[[int], Any]
    error: Callable[[Any, int], float]
    """Of ``launch(i)`` and ``i``: how far the result is from the truth."""
    bound: float
    launches: int
    keep: int = 1
    """Results alive at a time within a graph; more than one, and they are written to different memory."""
    in_place: bool = False
    """Launches change the result of the one before, so that only the first can be checked."""
    wall_clock: bool = False
    """Timed as it is called from Python, launch by launch, the processor's work included."""


@dataclass(frozen=True)
class Timed:
    """``launches`` launches behind one call."""

    call: Callable[[], object]
    launches: int
    method: str
    result: Any = None
    """Where a graph leaves the result of its last launch."""
    why_no_graph: str | None = None

    def seconds(self) -> float:
        """Return the seconds of one launch in this call."""
        if self.method == "wall clock":
            start = time.perf_counter()
            self.call()
            return (time.perf_counter() - start) / self.launches
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # without it the GPU would wait for the processor after the first event
        torch.cuda._sleep(GRAPH_HEAD_START if self.method == "graph" else EAGER_HEAD_START)
        begin.record()
        self.call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.launches

    def rounds(self) -> int:
        """Return an even number of rounds, 6 to 50 in ``MEASURED_SECONDS``; fewer of what takes seconds."""
        seconds = self.seconds() * self.launches
        if seconds < LEAST_ROUNDS[0][0]:
            seconds = self.seconds() * self.launches  # the first replay uploads the graph
        least = next(rounds for limit, rounds in LEAST_ROUNDS if seconds < limit)
        return min(max(2 * round(MEASURED_SECONDS / seconds / 2), least), 50)


class LaunchClock:
    """pytest-benchmark's clock. It stands still but for :meth:`run`, and moves on by the time of one launch there."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def run(self, timed: Timed) -> None:
        self._seconds += timed.seconds()


CLOCK = LaunchClock()


def launches_for(copies: int, seconds: float) -> int:
    """Launches of about ``seconds`` that fill a graph: a multiple of ``copies``, all of which take their turn."""
    return copies * math.ceil(GRAPH_SECONDS / max(seconds, SHORTEST_LAUNCH) / copies)


def capture(launch: Callable[[int], Any], launches: int, keep: int) -> Timed:
    """A CUDA graph of ``launches`` launches; all compiling and tuning must be over."""
    results: deque[Any] = deque(maxlen=keep)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        for i in range(launches):
            results.append(launch(i))
    return Timed(graph.replay, launches, "graph", results[-1])


def prepare(candidate: Candidate) -> Timed:
    """A graph of the candidate; launches one by one where it can't be captured; a plain call on a CPU."""
    launch = candidate.launch
    if DEVICE == "cpu":
        return Timed(lambda: launch(0), 1, "wall clock")
    if candidate.wall_clock:

        def called() -> None:
            for i in range(candidate.launches):
                launch(i)
            torch.cuda.synchronize()

        return Timed(called, candidate.launches, "wall clock")
    try:
        return capture(launch, candidate.launches, candidate.keep)
    except RuntimeError as error:  # the op waits for the GPU, say
        reason = str(error).partition("\n")[0]
        torch.cuda.synchronize()
    launches = min(candidate.launches, EAGER_LAUNCHES)

    def call() -> None:
        for i in range(launches):
            launch(i)

    return Timed(call, launches, "events", why_no_graph=reason)


def checked(candidate: Candidate) -> tuple[float, Timed]:
    """Return the error of a candidate, and how it is timed; one that is wrong fails."""
    error = candidate.error(candidate.launch(0), 0)
    assert error <= candidate.bound, f"relative error {error:.3g}; allowed {candidate.bound}"
    if not candidate.wall_clock:
        candidate.launch(0)  # what the first launch compiled or tuned is launched as it will be
    timed = prepare(candidate)
    if timed.method == "graph" and not candidate.in_place:
        timed.seconds()
        replayed = candidate.error(timed.result, candidate.launches - 1)
        assert replayed <= candidate.bound, f"relative error {replayed:.3g} in a graph; allowed {candidate.bound}"
    return error, timed


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖result - expected‖ / ‖expected‖``."""
    expected = expected.double()
    return ((result.double() - expected).norm() / expected.norm()).item()
