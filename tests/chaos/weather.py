"""Blows that fall on a training, each with what came of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.chaos.blows import (
    AGAIN,
    LEAVE,
    SILENT,
    Blow,
    Plan,
    agent_of,
    idle_agents,
    kind_for,
    strike,
    victim_of,
)
from tests.chaos.crew import Crew, Crews
from tests.chaos.nodes import CPUS, Nodes, raylet_of
from tests.processes import is_alive, kill_next, titled, wait_until
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.run import Run

SETTLED_S = 90.0
"""Time for a disturbed training to run again. Only a hang takes longer."""

_NEW_NODE_S = 3.0
"""Time from the death of a raylet to the node that replaces it."""


@dataclass(frozen=True)
class Shape:
    """Options that say on how many hosts the training runs."""

    hostnames: int | tuple[int, int]
    spares: int = 0

    def hosts_on(self, nodes: int) -> int:
        return self.hostnames if isinstance(self.hostnames, int) else min(self.hostnames[1], nodes)


class Hang(Exception):
    """The training did not run again."""


@dataclass(frozen=True)
class Leaving:
    """A node that is dead or drained, and still in the cluster."""

    raylet: int
    attempt: int
    since: float
    is_replaced: bool

    def is_due(self, attempt: int) -> bool:
        """Return True if it is time to remove the node, given the attempt that runs.

        Without host_timeout, a run ends if a host vanishes in the moment in which its workers return.
        """
        if self.is_replaced:
            return time.monotonic() > self.since + _NEW_NODE_S
        return attempt > self.attempt


class Weather:
    """Lets the blows fall, and waits until the training runs again."""

    def __init__(
        self,
        run: "Run[tuple[int, str]]",
        shape: Shape,
        crews: Crews,
        nodes: Nodes,
        say: Callable[[str], None],
    ) -> None:
        self.run = run
        self.blows: list[Blow] = []
        self._shape = shape
        self._crews = crews
        self._nodes = nodes
        self._say = say
        self._begun = time.time()
        self._leaving: list[Leaving] = []

    def rage(self, coming: Iterator[Plan], until: float) -> None:
        self._settle()
        while time.monotonic() < until:
            plan = next(coming)
            if not plan.is_early:
                self._settle()
            time.sleep(plan.pause_s / (10 if plan.is_early else 1))
            self._strike(plan)
        self._settle()

    def _strike(self, plan: Plan) -> None:
        kind = kind_for(plan.kind, len(self._nodes.living) - len(self._leaving))
        blow: Blow | None = None
        known = titled(AGAIN[kind]) if kind in AGAIN else set[int]()

        def has_struck() -> bool:
            nonlocal blow
            crew = self._crews.newest()
            if crew is None or not crew.lives:
                return False
            if kind in SILENT and not self._has_any(kind, crew):
                return True
            victim = victim_of(kind, plan.where, crew, self._crews)
            raylet = raylet_of(agent_of(kind, victim, crew, self._crews))
            if kind in LEAVE and raylet in {each.raylet for each in self._leaving}:
                return False
            blow = strike(kind, plan.where, crew, self._crews, self._nodes)
            if blow is not None and kind in LEAVE:
                leaving = Leaving(raylet, crew.attempt, time.monotonic(), kind != "drain")
                self._leaving.append(leaving)
            return blow is not None

        if not self._until(has_struck):
            raise Hang(f"no victim for {kind}")
        if blow is not None:
            self.blows.append(blow)
            self._strike_again(blow, known)

    def _strike_again(self, blow: Blow, known: set[int]) -> None:
        if blow.kind in AGAIN and kill_next(AGAIN[blow.kind], known):
            self.blows.append(Blow(blow.kind, blow.rank, blow.attempt, time.time()))

    def _has_any(self, kind: str, crew: Crew) -> bool:
        if kind.startswith("idle"):
            return bool(idle_agents(crew, self._crews))
        return any(is_alive(self._crews.above(seen)[kind]) for seen in crew.ranks)

    def _settle(self) -> None:
        """Wait until the training runs on all nodes, and tell of the blows since it did so last."""
        if not self._until(self._runs):
            raise Hang(f"the training does not run again after {self._open}")
        for blow in self._open:
            self._tell(blow)
        crew = self._crews.newest()
        assert crew is not None
        for blow in self._open:
            blow.ran_again_at = max(blow.at, crew.complete_at)

    @property
    def _open(self) -> list[Blow]:
        return [blow for blow in self.blows if blow.ran_again_at is None]

    def _runs(self) -> bool:
        crew = self._crews.newest()
        if crew is None or not crew.lives:
            return False
        ended = [blow.attempt for blow in self._open if blow.kind not in SILENT | {"join"}]
        is_new = all(crew.attempt > attempt for attempt in ended)
        hosts = self._shape.hosts_on(len(self._nodes.living))
        return is_new and not self._leaving and crew.world_size == CPUS * hosts

    def _let_nodes_go(self) -> None:
        """Remove nodes that the training has left, and add those that follow them."""
        crew = self._crews.newest()
        if crew is None:
            return
        used = {
            raylet_of(self._crews.above(seen)["agent"]) for seen in crew.ranks if is_alive(seen.pid)
        }
        for leaving in list(self._leaving):
            if leaving.is_due(crew.attempt) and leaving.raylet not in used:
                self._leaving.remove(leaving)
                self._nodes.forget(leaving.raylet)
                if leaving.is_replaced:
                    self._nodes.add()
                    self.blows.append(Blow("join", -1, crew.attempt, time.time()))

    def _until(self, condition: Callable[[], bool]) -> bool:
        def holds() -> bool:
            try:
                self._let_nodes_go()
                return self.run.done() or condition()
            except OSError:  # a process ended while it was looked at
                return False

        holds_in_time = wait_until(holds, SETTLED_S)
        if self.run.done():
            self.run.result(timeout=0)  # raises
            raise Hang("the training has returned")
        return holds_in_time

    def _tell(self, blow: Blow) -> None:
        crew = self._crews.newest()
        assert crew is not None
        who = f"{blow.kind}" + (f" (rank {blow.rank})" if blow.rank >= 0 else "")
        head = f"{blow.at - self._begun:6.1f} s  attempt {blow.attempt:3}  {who:22} -> "
        if crew.attempt == blow.attempt:
            self._say(f"{head}goes on undisturbed")
            return
        whys = [each.why for each in records(self.run)[blow.attempt : crew.attempt]]
        took_s = crew.complete_at - blow.at
        then = f"attempt {crew.attempt:3}, {crew.world_size} workers, {took_s:5.2f} s"
        self._say(f"{head}{then}  ({', '.join(whys)})")


def records(run: "Run[tuple[int, str]]") -> Sequence[AttemptRecord]:
    """Return the attempts that have ended, while the run goes on."""
    return [attempt for attempt in run.attempts if attempt.why is not None]
