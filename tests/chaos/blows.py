"""Ways to disturb a training, and the ends of attempts that each of them explains."""

import contextlib
import enum
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.crew import Crew, Crews
from tests.chaos.nodes import Nodes, host_of, on_hosts
from tests.chaos.training import Seen
from tests.processes import is_alive

EXPLAINS: dict[str, set[str]] = {
    "worker": {"failed"},
    "all workers": {"failed"},
    "template": {"failed"},
    "keeper": set(),
    "outer keeper": set(),
    "agent": {"failed"},
    "store": {"failed"},
    "raylet": {"failed", "host lost"},
    "drain": {"drained", "host lost"},
    "join": {"resized"},
    "idle agent": {"failed"},  # it may become a member's before the blow falls
    "idle raylet": {"failed", "host lost"},
    "worker twice": {"failed"},
    "template twice": {"failed"},
    "agent twice": {"failed"},
    "frozen agent": {"failed", "host lost"},
    "short cut": set(),
    "long cut": {"failed", "host lost"},
}
"""Kinds of blows, each with the reasons for which an attempt may end because of it."""

AGAIN = {
    "worker twice": "torchrunx_ray: worker rank",
    "template twice": "torchrunx_ray: template",
    "agent twice": "ray::Agent",
}
"""Kinds that also kill the process that takes the place of the first victim, by its title, as soon as it is there."""

LEAVE = {"raylet", "idle raylet", "drain"}
"""Kinds that take a node away."""

BLAMED = {"agent", "agent twice", "idle agent", "frozen agent", "long cut"}
"""Kinds for which the run blames the node."""

SILENT = {"keeper", "outer keeper", "idle agent", "idle raylet", "short cut", "join"}
"""Kinds that need not end the attempt that they fall on."""

NODE_LIVES = {"frozen agent", "long cut"}
"""Kinds that can cost the training a host whose node lives on."""

CUT_S = {"short cut": 4.0, "long cut": 14.0}
"""Kinds that cut a host's network, each with the time. A lease lasts for 10 s, and a host is given up a second later."""

FROZEN_S = 30.0
DRAINED_S = 8

_LASTS_S = {**CUT_S, "frozen agent": FROZEN_S, "join": math.inf}
"""Time after a blow of a kind in which it may end an attempt. A node may join long before the run may grow."""

FEWEST, MOST = 2, 4
"""Limits for the number of nodes. The training goes on with one."""


@dataclass
class Blow:
    """One disturbance. Times are in seconds since the epoch."""

    kind: str
    rank: int
    attempt: int
    at: float
    is_told: bool = False

    @property
    def over_at(self) -> float:
        """Time from which it ends no attempt any more."""
        return self.at + _LASTS_S.get(self.kind, 0)


class Calm(enum.Enum):
    """State of the training for which a blow waits."""

    NONE = "some workers may be dead"
    RUNS = "it takes steps again"
    FULL = "it takes steps on all nodes"


@dataclass(frozen=True)
class Plan:
    """The next blow, as the seed says."""

    kind: str
    where: float
    """Rank of the victim, as a fraction of the number of ranks."""
    after: Calm
    pause_s: float


_AFTER = [Calm.NONE] * 3 + [Calm.RUNS] * 5 + [Calm.FULL] * 2
_LONGEST_PAUSE_S = 0.5


def plans(seed: int) -> Iterator[Plan]:
    """Yield blows for ever: all kinds in random order, again and again."""
    chance = random.Random(seed)
    while True:
        kinds = list(EXPLAINS)
        chance.shuffle(kinds)
        for kind in kinds:
            pause_s = chance.uniform(0, _LONGEST_PAUSE_S)
            yield Plan(kind, chance.random(), chance.choice(_AFTER), pause_s)


def kind_for(kind: str, nodes: int) -> str:
    """Return the kind of the next blow, so that the number of nodes stays within its limits."""
    if kind == "join" and nodes >= MOST:
        return "drain"
    if kind in LEAVE and nodes <= FEWEST:
        return "join"
    return kind


def victim_of(kind: str, where: float, crew: Crew, crews: Crews) -> Seen:
    """Return the rank to strike: another one if its keeper, which a run does not replace, was killed before."""
    first = int(where * crew.world_size)
    ranks = [*crew.ranks[first:], *crew.ranks[:first]]
    whom = kind.removesuffix(" twice")
    living = [seen for seen in ranks if is_alive(crews.above(seen).get(whom, seen.pid))]
    return (living or ranks)[0]


def idle_agents(crew: Crew, crews: Crews) -> set[int]:
    """Return the agents of spares, and of hosts that are about to join."""
    return on_hosts("ray::Agent") - {crews.above(seen)["agent"] for seen in crew.ranks}


def freeze(pid: int) -> None:
    """Stop a process for a while, unless it is killed before."""
    os.kill(pid, signal.SIGSTOP)
    thawing = threading.Timer(FROZEN_S, thaw, [pid])
    thawing.daemon = True
    thawing.start()


def thaw(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def agent_of(kind: str, victim: Seen, crew: Crew, crews: Crews) -> int:
    if kind.startswith("idle"):
        return max(idle_agents(crew, crews))
    return crews.above(victim)["agent"]


def strike(kind: str, where: float, crew: Crew, crews: Crews, nodes: Nodes) -> Blow | None:
    """Disturb an attempt. Return None if the victim is gone already."""
    victim = victim_of(kind, where, crew, crews)
    above = crews.above(victim)
    agent = agent_of(kind, victim, crew, crews)
    now = time.time()
    try:
        match kind:
            case "all workers":
                for seen in crew.ranks:
                    if seen.mark == victim.mark:
                        os.kill(seen.pid, signal.SIGKILL)
            case "store":
                store = crews.store_of(crew)
                if store is None:
                    return None
                os.kill(store, signal.SIGKILL)
            case "raylet" | "idle raylet":
                nodes.kill(host_of(agent))
            case "drain":
                nodes.drain(host_of(agent), DRAINED_S)
            case "short cut" | "long cut":
                nodes.cut(host_of(agent), CUT_S[kind])
            case "join":
                nodes.add()
            case "frozen agent":
                freeze(agent)
            case "idle agent":
                os.kill(agent, signal.SIGKILL)
            case "worker" | "worker twice":
                os.kill(victim.pid, signal.SIGKILL)
            case _:
                os.kill(above[kind.removesuffix(" twice")], signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return None
    return Blow(kind, victim.rank, crew.attempt, now)
