"""Scopes of torch's `expires` that processes are in, by their deadlines."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from torchrunx_ray.agent.timer_file import Request
from torchrunx_ray.wire.proc import Process

_SPARE = 1000
"""Entries of left scopes that may stay in the heap before it is built again."""


@dataclass(frozen=True)
class Scope:
    """A scope that a process has entered."""

    process: Process
    name: str
    seconds: float
    """Time from the arrival of the request to the deadline."""
    deadline: float
    """On a clock that does not jump when somebody sets the host's time."""
    signal: int


class Scopes:
    """Scopes with torch's meaning: a process is in a scope of one name once.

    If the process enters the scope again, the new deadline counts. It is out of the scope when it first leaves it.
    """

    def __init__(self) -> None:
        self._by_key: dict[tuple[int, str], Scope] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        """A heap, with entries also for scopes that were left."""

    def leave(self, request: Request) -> None:
        self._by_key.pop((request.pid, request.scope), None)

    def enter(self, process: Process, request: Request, seconds: float, now: float) -> None:
        """Note a scope whose request arrives now, on our clock, and that ends in `seconds`."""
        key = request.pid, request.scope
        self._by_key[key] = Scope(process, request.scope, seconds, now + seconds, request.signal)
        heapq.heappush(self._deadlines, (now + seconds, *key))
        if len(self._deadlines) > 2 * len(self._by_key) + _SPARE:
            self._deadlines = [(each.deadline, *key) for key, each in self._by_key.items()]
            heapq.heapify(self._deadlines)

    def next_deadline(self) -> float | None:
        while self._deadlines:
            deadline, pid, name = self._deadlines[0]
            scope = self._by_key.get((pid, name))
            if scope is not None and scope.deadline == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def pop_expired(self, now: float) -> list[Scope]:
        """Return one expired scope of each process that has any.

        If some of its expired scopes ask for a signal, return the first of these, and forget all scopes of the process.
        Otherwise return the first, and forget the expired ones: a scope that is still open may ask for a signal.
        """
        found: list[Scope] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            found.append(self._pop(self._deadlines[0][1], now))
        return found

    def forget_unless(self, is_alive: Callable[[Process], bool]) -> None:
        """Forget the scopes of processes that have ended."""
        alive = {
            process: is_alive(process) for process in {s.process for s in self._by_key.values()}
        }
        self._by_key = {key: scope for key, scope in self._by_key.items() if alive[scope.process]}

    def clear(self) -> None:
        self._by_key.clear()
        self._deadlines.clear()

    def _pop(self, pid: int, now: float) -> Scope:
        of_process = {key: scope for key, scope in self._by_key.items() if key[0] == pid}
        expired = {key: scope for key, scope in of_process.items() if scope.deadline <= now}
        in_order = sorted(expired.values(), key=lambda scope: scope.deadline)
        first = next((scope for scope in in_order if scope.signal > 0), in_order[0])
        for key in of_process if first.signal > 0 else expired:
            del self._by_key[key]
        return first
