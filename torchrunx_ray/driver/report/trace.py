"""Trace of a run's phases, for ui.perfetto.dev or chrome://tracing."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torchrunx_ray.driver.report.attempt_times import AttemptTimes, RankTimes
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.report.timeline import Timeline

TraceEvent = Mapping[str, Any]

_DRIVER = 0
"""Process of the driver in the trace. A host has a process of its own, and a rank has a thread on its host."""

_PHASES = 0
_ATTEMPTS = 1
"""Threads of the driver in the trace."""

_TEMPLATE = 0
"""Thread of a host's template in the trace."""


def write_trace(
    path: str | os.PathLike[str], timeline: Timeline, attempts: Sequence[AttemptRecord]
) -> None:
    """Write a trace of a run that has ended, with the phases of every rank in every attempt."""
    events = [*_of_driver(timeline, attempts), *_of_hosts(timeline, attempts)]
    with open(path, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def _of_driver(timeline: Timeline, attempts: Sequence[AttemptRecord]) -> Iterator[TraceEvent]:
    yield _name_of("process_name", _DRIVER, 0, "driver")
    yield _name_of("thread_name", _DRIVER, _PHASES, "phases")
    for phase, begin, end in timeline.phases():
        yield _span(phase, _DRIVER, _PHASES, begin, end)
    yield _name_of("thread_name", _DRIVER, _ATTEMPTS, "attempts")
    for record in attempts:
        begin, end = int(record.begun * 1e9), _end_of(record)
        about = {"why": record.why, "failure": record.failure, "hosts": list(record.hostnames)}
        yield _span(f"attempt {record.number}", _DRIVER, _ATTEMPTS, begin, end, **about)


def _of_hosts(timeline: Timeline, attempts: Sequence[AttemptRecord]) -> Iterator[TraceEvent]:
    """Yield the steps of all ranks. A host or rank that is in several attempts has one row."""
    hostnames = dict.fromkeys(name for times in timeline.attempts for name in times.hostnames)
    processes = {hostname: _DRIVER + 1 + i for i, hostname in enumerate(hostnames)}
    for hostname, process in processes.items():
        yield _name_of("process_name", process, 0, hostname)
        yield _name_of("thread_name", process, _TEMPLATE, "template")
    yield from _imports(timeline, attempts, processes)
    named: set[tuple[int, int]] = set()
    for times in timeline.attempts:
        end_ns = _end_of(attempts[times.number])
        for rank in times:
            process, thread = processes[times.hostnames[rank.host_index]], rank.rank + 1
            if (process, thread) not in named:
                named.add((process, thread))
                yield _name_of("thread_name", process, thread, f"rank {rank.rank}")
            for name, begin, end in _steps(times, rank, end_ns):
                yield _span(name, process, thread, begin, end, attempt=times.number)


def _imports(
    timeline: Timeline, attempts: Sequence[AttemptRecord], processes: Mapping[str, int]
) -> Iterator[TraceEvent]:
    """Yield the imports of the templates. A warm template reports an import that is older than the attempt."""
    for times in timeline.attempts:
        after_ns = _end_of(attempts[times.number - 1]) if times.number else timeline.begun_ns
        for host_index, begin, end in times.loaded:
            if end > after_ns:
                process = processes[times.hostnames[host_index]]
                yield _span("import", process, _TEMPLATE, max(begin, after_ns), end)


def _steps(times: AttemptTimes, rank: RankTimes, end_ns: int) -> Iterator[tuple[str, int, int]]:
    """Return the steps of a rank, with their begins and ends.

    The last step ends with the worker, or with the attempt if the exit of the worker is not known.
    """
    loaded = max(
        (end for host_index, _, end in times.loaded if host_index == rank.host_index), default=0
    )
    steps = (
        ("process group", max(loaded, times.begun_ns)),
        ("unpack", rank.joined),
        ("run", rank.started),
        ("result", rank.finished),
        ("failure", rank.failed),
        ("", rank.exited or end_ns),
    )
    for (name, begin), (_, end) in pairwise(step for step in steps if step[1]):
        yield name, begin, end


def _end_of(record: AttemptRecord) -> int:
    """Return the time in ns at which an attempt ended."""
    assert record.ended is not None
    return int(record.ended * 1e9)


def _span(
    name: str, process: int, thread: int, begin: int, end: int, **about: object
) -> TraceEvent:
    micros = {"ts": begin / 1000, "dur": max(0, end - begin) / 1000}
    return {"name": name, "ph": "X", "pid": process, "tid": thread, **micros, "args": about}


def _name_of(what: str, process: int, thread: int, name: str) -> TraceEvent:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
