"""A training, and the blows that fall on it."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torchrunx_ray as trx
from tests import hung
from tests.chaos.blows import FEWEST, MOST, plans
from tests.chaos.crew import Crews
from tests.chaos.journal import Journal
from tests.chaos.nodes import CPUS, Nodes, some_nodes
from tests.chaos.training import train
from tests.chaos.verdict import unexplained, wrong_with_journal, wrong_with_result
from tests.chaos.weather import SETTLED_S, Effect, Hang, Shape, Weather, records
from tests.leases import until_renewed
from tests.processes import wait_until
from tests.traces import Traces
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.run import Run

_STEP_S = 0.05

SHAPES = {"elastic": Shape((1, MOST)), "spares": Shape(FEWEST, spares=1)}


@dataclass
class Outcome:
    """What came of a storm."""

    effects: list[Effect]
    attempts: tuple[AttemptRecord, ...]
    steps: int
    wrong: list[str] = field(default_factory=list[str])


def storm(
    seed: int, minutes: float, folder: Path, say: Callable[[str], None], shape: Shape
) -> Outcome:
    """Disturb a training for so many minutes, and check what came of it."""
    (folder / "ranks").mkdir()
    launcher = trx.Launcher(
        hostnames=shape.hostnames,
        spares=shape.spares,
        workers_per_host=CPUS,
        cpus_per_worker=1,
        max_restarts=100_000,
        resize_interval=2,
        shutdown_timeout=2,
        linger=0,
        name="chaos",
    )
    with some_nodes(3) as nodes:
        # The first touches of Ray's store. The first lease of a driver is too long for a storm.
        launcher.run(renew, launcher.host_timeout)
        assert wait_until(lambda: nodes.free_cpus() == 3 * CPUS)
        before = Traces.now()
        run = launcher.submit(train, folder, _STEP_S)
        journal = Journal(folder / "journal")
        weather = Weather(run, shape, Crews(folder / "ranks"), journal, nodes, say)
        with _killed_at_error(run):
            weather.rage(plans(seed), time.monotonic() + 60 * minutes)
            (folder / "enough").touch()
            result = run.result(timeout=SETTLED_S)
        outcome = Outcome(weather.effects(), result.attempts, result.rank(0)[0])
        outcome.wrong += wrong_with_result(list(result))
        outcome.wrong += wrong_with_journal(journal)
        outcome.wrong += unexplained(result.attempts, weather.blows)
        del result, run, weather.run
        # A node that goes takes agents and keepers with it. The next agent removes their folder.
        launcher.run(int)
        outcome.wrong += left_of(before, nodes)
    return outcome


def renew(lease_s: float) -> None:
    until_renewed(os.getpid(), lease_s)


def left_of(before: Traces, nodes: Nodes) -> list[str]:
    def left() -> list[str]:
        cpus = CPUS * len(nodes.living)
        return before.missing_from(Traces.now(), cpus, raylet_was_renewed=True)

    return [] if wait_until(lambda: not left(), 30) else left()


@contextmanager
def _killed_at_error(run: "Run[tuple[int, str]]") -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, Hang):
            error.add_note(hung.seen())
            error.add_note(json.dumps([str(each) for each in records(run)], indent=1))
        run.kill()
        raise
