"""Times of a run's phases, on the driver's clock."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.ranks import Place

PHASES = ("place", "agents", "template import", "process group", "run", "results")


@dataclass
class Timeline:
    """Times of a run, in ns since the epoch. Written in the background loop during the run."""

    begun_ns: int = field(default_factory=now_ns)
    attempt_begun_ns: int | None = None
    """Time at which the last attempt began; None for the first attempt, which begins with the run."""
    placed_ns: int | None = None
    met_ns: int | None = None
    is_stopping: bool = False
    ended_ns: int | None = None
    hostnames: Sequence[str] = ()
    places: Sequence[Place] = ()
    loaded: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """Begin and end of the template's import, by host. The import may belong to an earlier run."""
    joined: dict[int, int] = field(default_factory=dict[int, int])
    """Times by rank, as in the next three fields."""
    started: dict[int, int] = field(default_factory=dict[int, int])
    finished: dict[int, int] = field(default_factory=dict[int, int])
    exited: dict[int, int] = field(default_factory=dict[int, int])

    def begin_attempt(self, hostnames: Sequence[str], places: Sequence[Place]) -> None:
        """Begin the phases of an attempt. Those of an earlier attempt are one phase of the run."""
        if self.places:
            self.placed_ns = self.met_ns = now_ns()
            self.attempt_begun_ns = self.placed_ns
        self.hostnames, self.places = hostnames, places
        self.is_stopping = False
        self.loaded = {}
        self.joined, self.started, self.finished, self.exited = {}, {}, {}, {}

    def hear(self, host_index: int, rank: int | None, event: messages.Event, ahead_ns: int) -> None:
        """Note an event of a host whose clock is `ahead_ns` ahead of the driver's."""
        if isinstance(event, messages.TemplateLoaded):
            self.loaded[host_index] = (event.begun_ns - ahead_ns, event.loaded_ns - ahead_ns)
        for kind, times in (
            (messages.Joined, self.joined),
            (messages.Started, self.started),
            (messages.Finished, self.finished),
            (messages.Exited, self.exited),
        ):
            if isinstance(event, kind) and rank is not None:
                times[rank] = event.time_ns - ahead_ns

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase in order, and "total".

        A phase ends when all hosts and ranks have completed it. A phase that was not needed, such as the import
        of a warm template, takes 0 s. A failed launch failed in the last phase with a time above 0 s. If the workers
        were started again, "earlier attempts" is the first phase.
        """
        spans = self._phases()
        seconds = {phase: (end - begin) / 1e9 for phase, begin, end in spans}
        return {**seconds, "total": (spans[-1][2] - self.begun_ns) / 1e9}

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""
        with open(path, "w") as file:
            json.dump({"traceEvents": list(self._trace_events()), "displayTimeUnit": "ms"}, file)

    def _phases(self) -> list[tuple[str, int, int]]:
        """Return the phases with their begins and ends."""
        begin = self.begun_ns
        spans: list[tuple[str, int, int]] = []
        if self.attempt_begun_ns is not None:
            spans.append(("earlier attempts", begin, self.attempt_begun_ns))
            begin = self.attempt_begun_ns
        for phase, end in zip(PHASES, self._ends(begin), strict=True):
            spans.append((phase, begin, end))
            begin = end
        return spans

    def _ends(self, begun_ns: int) -> list[int]:
        now = max(begun_ns, now_ns() if self.ended_ns is None else self.ended_ns)
        loaded = {host_index: loaded for host_index, (_, loaded) in self.loaded.items()}
        ends = [
            self.placed_ns,
            self.met_ns,
            _last_of(loaded, len(self.hostnames)),
            _last_of(self.started, len(self.places)),
            _last_of(self.finished, len(self.places)),
            now,
        ]
        in_order: list[int] = []
        last = begun_ns
        for end in ends:
            # A phase that never ended takes all the remaining time. A phase that was already over, such as an
            # import for an earlier run, ends together with the phase before it.
            last = now if end is None else min(now, max(last, end))
            in_order.append(last)
        return in_order

    def _trace_events(self) -> Iterator[Mapping[str, Any]]:
        yield _name_of("process_name", 0, 0, "driver")
        for phase, begin, end in self._phases():
            yield _span(phase, 0, 0, begin, end)
        for host_index, hostname in enumerate(self.hostnames):
            yield _name_of("process_name", host_index + 1, 0, hostname)
            yield _name_of("thread_name", host_index + 1, 0, "template")
            begun, loaded = self.loaded.get(host_index, (0, 0))
            if loaded > self.begun_ns:
                yield _span("import", host_index + 1, 0, max(begun, self.begun_ns), loaded)
        for place in self.places:
            yield from self._trace_of(place)

    def _trace_of(self, place: Place) -> Iterator[Mapping[str, Any]]:
        process, thread = place.host_index + 1, place.local_rank + 1
        yield _name_of("thread_name", process, thread, f"rank {place.rank}")
        _, loaded = self.loaded.get(place.host_index, (0, self.begun_ns))
        steps = (
            ("process group", max(loaded, self.met_ns or self.begun_ns)),
            ("unpack", self.joined.get(place.rank)),
            ("run", self.started.get(place.rank)),
            ("result", self.finished.get(place.rank)),
            ("", self.exited.get(place.rank)),
        )
        for (name, begin), (_, end) in pairwise(steps):
            if begin is not None and end is not None:
                yield _span(name, process, thread, begin, end)


def _last_of(times: Mapping[int, int], count: int) -> int | None:
    """Return the last of `count` times; None if some are missing."""
    return max(times.values()) if len(times) == count > 0 else None


def _span(name: str, process: int, thread: int, begin: int, end: int) -> Mapping[str, Any]:
    micros = {"ts": begin / 1000, "dur": max(0, end - begin) / 1000}
    return {"name": name, "ph": "X", "pid": process, "tid": thread, **micros}


def _name_of(what: str, process: int, thread: int, name: str) -> Mapping[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
