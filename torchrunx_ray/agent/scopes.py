"""Scopes of torch's `expires` that processes are in, by their deadlines."""

import heapq
from dataclasses import dataclass

from torchrunx_ray.agent.timer_file import Request

_SPARE = 1000
"""Entries of left scopes that may stay in the heap before it is made anew."""


@dataclass(frozen=True)
class Scope:
    """A scope that a process has entered."""

    pid: int
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

    def take(self, request: Request, wall: float, now: float) -> None:
        """Note a request that arrives at this time, on the wall clock and on ours."""
        key = request.pid, request.scope
        if request.expires_at < 0:
            self._by_key.pop(key, None)
            return
        seconds = request.expires_at - wall
        self._by_key[key] = Scope(*key, seconds, now + seconds, request.signal)
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
        """Return one expired scope of each process that has any, and forget all scopes of these processes.

        The scope is the first that asks for a signal, or else the first.
        """
        found: list[Scope] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            found.append(self._pop_all(self._deadlines[0][1], now))
        return found

    def clear(self) -> None:
        self._by_key.clear()
        self._deadlines.clear()

    def _pop_all(self, pid: int, now: float) -> Scope:
        keys = [key for key in self._by_key if key[0] == pid]
        scopes = sorted((self._by_key.pop(key) for key in keys), key=lambda scope: scope.deadline)
        expired = [scope for scope in scopes if scope.deadline <= now]
        return next((scope for scope in expired if scope.signal > 0), expired[0])
