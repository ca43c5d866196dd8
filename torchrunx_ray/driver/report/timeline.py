"""Times of a run's phases, on the driver's clock."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchrunx_ray.driver.report.attempt_times import AttemptTimes
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.ranks import Place

PHASES = ("place", "agents", "template import", "process group", "run", "results")


_MOST_KEPT = 100_000
"""Limit of the ranks, summed over the earlier attempts, whose times are kept. Each takes less than 100 bytes."""


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
    """Times by rank, as in the next four fields."""
    started: dict[int, int] = field(default_factory=dict[int, int])
    finished: dict[int, int] = field(default_factory=dict[int, int])
    failed: dict[int, int] = field(default_factory=dict[int, int])
    exited: dict[int, int] = field(default_factory=dict[int, int])
    _number: int = -1
    """Number of the last attempt."""
    _earlier: deque[AttemptTimes] = field(default_factory=deque[AttemptTimes])

    def begin_attempt(self, hostnames: Sequence[str], places: Sequence[Place]) -> None:
        """Begin the phases of an attempt. Those of an earlier attempt are one phase of the run."""
        if self.places:
            self._keep_last()
            self.placed_ns = self.met_ns = now_ns()
            self.attempt_begun_ns = self.placed_ns
        self._number += 1
        self.hostnames, self.places = hostnames, places
        self.is_stopping = False
        self.loaded = {}
        self.joined, self.started, self.finished = {}, {}, {}
        self.failed, self.exited = {}, {}

    def hear(self, host_index: int, rank: int | None, event: messages.Event, ahead_ns: int) -> None:
        """Note an event of a host whose clock is `ahead_ns` ahead of the driver's."""
        if isinstance(event, messages.TemplateLoaded):
            self.loaded[host_index] = (event.begun_ns - ahead_ns, event.loaded_ns - ahead_ns)
        for kind, times in (
            (messages.Joined, self.joined),
            (messages.Started, self.started),
            (messages.Finished, self.finished),
            (messages.Failed, self.failed),
            (messages.Exited, self.exited),
        ):
            if isinstance(event, kind) and rank is not None:
                times[rank] = event.time_ns - ahead_ns
        if isinstance(event, messages.Died) and rank is not None:
            self.exited[rank] = event.exited.time_ns - ahead_ns

    def _keep_last(self) -> None:
        """Keep the times of an attempt that has ended, and forget the oldest of very many."""
        self._earlier.append(self._last)
        while sum(len(each) for each in self._earlier) > _MOST_KEPT:
            self._earlier.popleft()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase in order, and "total".

        A phase ends when all hosts and ranks have completed it. A phase that was not needed, such as the import
        of a warm template, takes 0 s. A failed launch failed in the last phase with a time above 0 s. If the workers
        were started again, "earlier attempts" is the first phase.
        """
        spans = self.phases()
        seconds = {phase: (end - begin) / 1e9 for phase, begin, end in spans}
        return {**seconds, "total": (spans[-1][2] - self.begun_ns) / 1e9}

    @property
    def attempts(self) -> list[AttemptTimes]:
        """Times of the attempts whose times are kept, the last one included."""
        return [*self._earlier, self._last]

    @property
    def _last(self) -> AttemptTimes:
        steps = (self.joined, self.started, self.finished, self.failed, self.exited)
        begun_ns = self.begun_ns if self.met_ns is None else self.met_ns
        return AttemptTimes.of(
            self._number, begun_ns, self.hostnames, self.places, self.loaded, steps
        )

    def phases(self) -> list[tuple[str, int, int]]:
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


def _last_of(times: Mapping[int, int], count: int) -> int | None:
    """Return the last of `count` times; None if some are missing."""
    return max(times.values()) if len(times) == count > 0 else None
