"""The condition of an agent and of its host's share of an attempt, for the health checks."""

import time
from dataclasses import dataclass
from typing import Any

from torchrunx_ray.errors import describe_exit
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.worker_states import NOT_FINAL, WorkerState, news

_VERSION = 1
"""Version of the description's form."""

_BLOCKED_S = 5.0
"""Time after which an event loop that has not run counts as blocked."""


@dataclass
class _Worker:
    rank: int
    state: WorkerState
    pid: int | None
    heard_at: float
    """Time of the last output, or else of the start of the attempt."""


class Condition:
    """The state of an attempt's workers, as their events tell it. Written in the agent's event loop, read by any thread."""

    def __init__(self) -> None:
        self._attempt: messages.AttemptId | None = None
        self._workers: dict[int, _Worker] = {}
        self._is_stopping = False
        self._failure = ""
        """First failure of a worker, until the attempt has ended here."""
        self.template_is_gone = ""
        """Description of the template's unexpected end, until there is a new one."""
        self.beat_at = time.monotonic()
        """Time at which the event loop ran last, while somebody lets it beat."""
        self.watchdog_at: float | None = None
        """Time at which the watchdog looked at its scopes last; None if there is no watchdog."""

    def begins(self, wanted: messages.ShareWanted) -> None:
        now = time.monotonic()
        self._attempt = wanted.worker.attempt
        self._is_stopping = False
        self._failure = ""
        self._workers = {
            place.local_rank: _Worker(place.rank, "INIT", None, now) for place in wanted.places
        }

    def stops(self) -> None:
        """Note that the agent stops the workers, whose ends are no failures from now on."""
        self._is_stopping = True

    def ends(self) -> None:
        """Note that no attempt is here any more."""
        self._attempt = None
        self._workers = {}
        self._is_stopping = False
        self._failure = ""

    def hear(self, event: messages.Event) -> None:
        for local_rank, state, pid in news(event):
            self._become(local_rank, state, pid)
        match event:
            case messages.Printed(local_rank=int(local_rank)) if local_rank in self._workers:
                self._workers[local_rank].heard_at = time.monotonic()
            case messages.Failed():
                self._fails(f"rank {self._rank(event.local_rank)} raised {event.kind}")
            case messages.Died(exited=exited):
                how = describe_exit(exited.exit_code, exited.signal)
                self._fails(f"rank {self._rank(exited.local_rank)} {how}")
            case messages.ScopeExpired() if event.signal > 0:
                rank = self._rank(event.local_rank)
                self._fails(f"rank {rank} stayed too long in the scope {event.scope}")
            case messages.AgentFailed():
                self._failure = self._failure or event.what
            case messages.TemplateRefused():
                self._failure = self._failure or event.problem
            case messages.HostEnded():
                self.ends()
            case _:
                pass

    def why_unhealthy(self) -> str:
        """Return the reason why the agent or its attempt is not well; empty if all is well."""
        silent_s = time.monotonic() - self.beat_at
        if silent_s > _BLOCKED_S:
            return f"the agent's event loop has been blocked for {silent_s:.1f} s"
        return self.template_is_gone or self._failure

    def describe(self) -> dict[str, Any]:
        """Return the condition as data for JSON. New versions only add fields."""
        attempt, workers = self._attempt, dict(self._workers)
        watchdog_at, reason = self.watchdog_at, self.why_unhealthy()
        now = time.monotonic()
        return {
            "version": _VERSION,
            "healthy": not reason,
            "reason": reason,
            "run": None if attempt is None else attempt.run_id,
            "attempt": None if attempt is None else attempt.number,
            "workers": [
                {
                    "rank": worker.rank,
                    "local_rank": local_rank,
                    "pid": worker.pid,
                    "state": worker.state,
                    "silent_s": _since(worker.heard_at, now),
                }
                for local_rank, worker in workers.items()
            ],
            "loop_silent_s": _since(self.beat_at, now),
            "watchdog_silent_s": None if watchdog_at is None else _since(watchdog_at, now),
        }

    def _fails(self, reason: str) -> None:
        """Note the failure of a worker, unless the agent stops the workers."""
        if not self._is_stopping:
            self._failure = self._failure or reason

    def _rank(self, local_rank: int | None) -> int | None:
        worker = None if local_rank is None else self._workers.get(local_rank)
        return None if worker is None else worker.rank

    def _become(self, local_rank: int, state: WorkerState, pid: int | None) -> None:
        worker = self._workers.get(local_rank)
        if worker is None:
            return
        worker.pid = pid or worker.pid
        if worker.state in NOT_FINAL:
            worker.state = "STOPPED" if state == "FAILED" and self._is_stopping else state


def _since(at: float, now: float) -> float:
    return max(0.0, round(now - at, 1))
