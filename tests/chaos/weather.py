"""Blows that fall on a training, each with what came of it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.chaos.blows import (
    AGAIN,
    BLAMED,
    CUT_S,
    LEAVE,
    SILENT,
    Blow,
    Calm,
    Plan,
    agent_of,
    idle_agents,
    kind_for,
    strike,
    victim_of,
)
from tests.chaos.crew import Crew, Crews
from tests.chaos.journal import Journal
from tests.chaos.nodes import CPUS, Nodes, host_of, is_left, on_hosts
from tests.chaos.verdict import causes
from tests.processes import is_alive, kill_next, wait_until
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.run import Run

SETTLED_S = 90.0
"""Time for a disturbed training to run again. Only a hang takes longer."""

_NEW_NODE_S = 1.0
"""Time from the death of a raylet to the node that replaces it."""

_AVOIDED_S = 20.0
"""Time after which an unused node on which agents have failed is replaced. The run may avoid it for ten minutes."""


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

    host: str
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


@dataclass(frozen=True)
class Effect:
    """Effect of a blow."""

    blow: Blow
    ended: AttemptRecord | None
    """The attempt that the blow ended. None if it ended none, or another blow was faster."""
    step_after_s: float | None
    """Time from the blow to the first step of the attempt that followed. None if the training was not disturbed."""

    def __str__(self) -> str:
        if self.step_after_s is None:
            return "no harm"
        why = "another blow ended its attempt" if self.ended is None else self.ended.why
        return f"{why}; next step after {self.step_after_s:.2f} s"


class Weather:
    """Lets the blows fall, and waits until the training runs again."""

    def __init__(
        self,
        run: "Run[tuple[int, str]]",
        shape: Shape,
        crews: Crews,
        journal: Journal,
        nodes: Nodes,
        say: Callable[[str], None],
    ) -> None:
        self.run = run
        self.blows: list[Blow] = []
        self._shape = shape
        self._crews = crews
        self._journal = journal
        self._nodes = nodes
        self._say = say
        self._begun = time.time()
        self._leaving: list[Leaving] = []
        self._blamed_since: dict[str, float] = {}
        """Hosts on which agents have failed, each with the time of the last failure, or of its last use since."""

    def rage(self, coming: Iterator[Plan], until: float) -> None:
        self._settle(Calm.FULL)
        while time.monotonic() < until:
            plan = next(coming)
            self._settle(plan.after)
            time.sleep(plan.pause_s)
            self._strike(plan)
        self._settle(Calm.FULL)

    def effects(self) -> list[Effect]:
        """Return what has come of each blow so far, in order."""
        ends = {id(blow): number for number, blow in causes(records(self.run), self.blows).items()}
        return [self._effect(blow, ends.get(id(blow))) for blow in self.blows]

    def _effect(self, blow: Blow, ended: int | None) -> Effect:
        number = blow.attempt if ended is None else ended
        if ended is None and blow.kind in SILENT:
            return Effect(blow, None, None)
        steps_at = (
            self._journal.first_step_at(after.number) for after in self.run.attempts[number + 1 :]
        )
        step_at = next((at for at in steps_at if at is not None), None)
        record = None if ended is None else self.run.attempts[ended]
        return Effect(blow, record, None if step_at is None else step_at - blow.at)

    def _strike(self, plan: Plan) -> None:
        kind = kind_for(plan.kind, len(self._nodes.living) - len(self._leaving))
        blow: Blow | None = None
        known = on_hosts(AGAIN[kind]) if kind in AGAIN else set[int]()

        def has_struck() -> bool:
            nonlocal blow
            crew = self._crews.newest()
            if crew is None or not crew.lives:
                return False
            if kind in SILENT and not self._has_any(kind, crew):
                return True
            victim = victim_of(kind, plan.where, crew, self._crews)
            host = host_of(agent_of(kind, victim, crew, self._crews))
            if kind in LEAVE and host in {each.host for each in self._leaving}:
                return False
            if kind in CUT_S and self._nodes.living[host].is_cut:
                return False
            blow = strike(kind, plan.where, crew, self._crews, self._nodes)
            if blow is not None and kind in BLAMED:
                self._blamed_since[host] = time.monotonic()
            if blow is not None and kind in LEAVE:
                leaving = Leaving(host, crew.attempt, time.monotonic(), kind != "drain")
                self._leaving.append(leaving)
            return blow is not None

        if not self._until(has_struck):
            raise Hang(f"no victim for {kind}")
        if blow is not None:
            self.blows.append(blow)
            self._strike_again(blow, known)

    def _strike_again(self, blow: Blow, known: set[int]) -> None:
        if blow.kind not in AGAIN:
            return
        hosts: dict[int, str] = {}

        def find() -> set[int]:
            for pid in on_hosts(AGAIN[blow.kind]) - hosts.keys():
                with contextlib.suppress(OSError):
                    hosts[pid] = host_of(pid)
            return set(hosts)

        victim = kill_next(find, known)
        if victim is None:
            return
        self.blows.append(Blow(blow.kind, blow.rank, blow.attempt, time.time()))
        if blow.kind in BLAMED:
            self._blamed_since[hosts[victim]] = time.monotonic()

    def _has_any(self, kind: str, crew: Crew) -> bool:
        if kind.startswith("idle"):
            return bool(idle_agents(crew, self._crews))
        if kind.endswith("keeper"):
            return any(is_alive(self._crews.above(seen)[kind]) for seen in crew.ranks)
        return True

    def _settle(self, calm: Calm) -> None:
        """Wait until the training runs so well. On all nodes: tell of the blows since it did so last."""
        if calm is Calm.NONE:
            return
        if not self._until(lambda: self._runs(calm)):
            open_blows = [blow for blow in self.blows if not blow.is_told]
            raise Hang(f"the training does not run again after {open_blows}")
        if calm is Calm.FULL:
            for effect in self.effects():
                if not effect.blow.is_told:
                    self._tell(effect)
                    effect.blow.is_told = True

    def _runs(self, calm: Calm) -> bool:
        crew = self._crews.newest()
        if crew is None or not crew.lives:
            return False
        struck = [blow.attempt for blow in self.blows if blow.kind not in SILENT]
        if crew.attempt <= max(struck, default=-1):
            return False
        nodes = self._nodes.living.values()
        disturbed_at = [blow.at for blow in self.blows] + [node.mended_at or 0 for node in nodes]
        if self._journal.last_step_at(crew.attempt) <= max(disturbed_at):
            return False
        hosts = self._shape.hosts_on(len(nodes))
        is_full = not self._leaving and crew.world_size == CPUS * hosts
        return is_full or calm is Calm.RUNS

    def _let_nodes_go(self) -> None:
        """Remove nodes that the training has left, and add those that follow them."""
        crew = self._crews.newest()
        if crew is None:
            return
        for leaving in list(self._leaving):
            if leaving.is_due(crew.attempt) and is_left(leaving.host):
                self._leaving.remove(leaving)
                self._remove(leaving.host, crew, is_replaced=leaving.is_replaced)
        for host in self._avoided():
            self._remove(host, crew, is_replaced=True)

    def _remove(self, host: str, crew: Crew, *, is_replaced: bool) -> None:
        self._nodes.forget(host)
        self._blamed_since.pop(host, None)
        if is_replaced:
            self.blows.append(Blow("join", -1, crew.attempt, time.time()))
            self._nodes.add()

    def _avoided(self) -> list[str]:
        """Return the nodes that have no agent any more, since agents have failed there."""
        now = time.monotonic()
        used = {host_of(pid) for pid in on_hosts("ray::Agent")}
        leaving = {each.host for each in self._leaving}
        self._blamed_since.update((host, now) for host in used & self._blamed_since.keys())
        return [
            host
            for host, since in self._blamed_since.items()
            if now > since + _AVOIDED_S and host not in leaving
        ]

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

    def _tell(self, effect: Effect) -> None:
        blow = effect.blow
        who = f"{blow.kind}" + (f" (rank {blow.rank})" if blow.rank >= 0 else "")
        at_s = blow.at - self._begun
        self._say(f"{at_s:6.1f} s  attempt {blow.attempt:3}  {who:24} -> {effect}")


def records(run: "Run[tuple[int, str]]") -> Sequence[AttemptRecord]:
    """Return the attempts that have ended, while the run goes on."""
    return [attempt for attempt in run.attempts if attempt.why is not None]
