"""Ways to disturb a training, and the ends of attempts that each of them explains."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.crew import Crew, Crews
from tests.chaos.nodes import Nodes, raylet_of
from tests.chaos.training import Seen
from tests.processes import is_alive, titled

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

SILENT = {"keeper", "outer keeper", "idle agent", "idle raylet"}
"""Kinds that need not end an attempt."""

FROZEN_S = 30.0
DRAINED_S = 8
FEWEST, MOST = 2, 4
"""Limits for the number of nodes. The training goes on with one."""


@dataclass
class Blow:
    """One disturbance. Times are in seconds since the epoch."""

    kind: str
    rank: int
    attempt: int
    at: float
    ran_again_at: float | None = None


@dataclass(frozen=True)
class Plan:
    """The next blow, as the seed says."""

    kind: str
    where: float
    """Rank of the victim, as a fraction of the number of ranks."""
    pause_s: float
    is_early: bool
    """True if the blow does not wait until the training runs again."""


def plans(seed: int) -> Iterator[Plan]:
    """Yield blows for ever: all kinds in random order, again and again."""
    chance = random.Random(seed)
    while True:
        kinds = list(EXPLAINS)
        chance.shuffle(kinds)
        for kind in kinds:
            yield Plan(kind, chance.random(), chance.uniform(0, 2), chance.random() < 0.25)


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
    return titled("ray::Agent") - {crews.above(seen)["agent"] for seen in crew.ranks}


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
                nodes.kill(raylet_of(agent))
            case "drain":
                nodes.drain(raylet_of(agent), DRAINED_S)
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
