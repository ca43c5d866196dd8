"""Whoever is killed, and whenever: the launch ends soon, and nothing of it is left.

Prints what the driver raised for each victim and moment. Pairs of victims are killed at once.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests import processes
from tests.clusters.raylets import raylets
from tests.conftest import SHOWN_AT_END
from tests.soon import SOON_S
from tests.traces import MARK, Traces
from tests.victims import MAY_RAISE, Driven, matrix, may_also

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MOMENTS = ("importing", "forming", "running", "reporting", "tearing down")
ABOVE = ("outer keeper", "keeper", "template", "agent", "driver", "raylet")
BELOW = ("worker", "all workers", "store", "children")
CASES = [
    *(((victim,), moment) for moment in MOMENTS for victim in ABOVE),
    *(((victim,), moment) for moment in MOMENTS[1:] for victim in BELOW[:3]),
    *((("children",), moment) for moment in MOMENTS[2:]),
    *(
        (pair, "running")
        for pair in (
            ("keeper", "template"),
            ("outer keeper", "keeper"),
            ("outer keeper", "template"),
            ("keeper", "agent"),
            ("keeper", "driver"),
            ("keeper", "raylet"),
            ("outer keeper", "driver"),
            ("template", "agent"),
            ("agent", "driver"),
            ("agent", "raylet"),
            ("driver", "raylet"),
            ("worker", "template"),
            ("worker", "driver"),
        )
    ),
]

# Each victim while it runs, each moment, and two pairs.
IN_CI = {
    *(((victim,), "running") for victim in ABOVE + BELOW),
    (("driver",), "importing"),
    (("template",), "forming"),
    *(((victim,), "reporting") for victim in ("all workers", "store")),
    (("worker",), "tearing down"),
    (("keeper", "template"), "running"),
    (("agent", "driver"), "running"),
}


@dataclass
class Machine:
    """Two nodes and a record of what came of each case. The launches go to the second node."""

    cluster: Cluster
    node: Any
    outcomes: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])

    def renew_node(self) -> None:
        self.cluster.remove_node(self.node, allow_graceful=False)
        self.node = self.cluster.add_node(num_cpus=2)

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver."""
        return {**os.environ, "CLUSTER": self.cluster.address}


@pytest.fixture(scope="module")
def machine(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, uuid.uuid4().hex)
        environment.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        with raylets({"num_cpus": 0}) as cluster:
            machine = Machine(cluster, cluster.add_node(num_cpus=2))
            launch_again()  # first touches of Ray's store
            yield machine
            machine.cluster.remove_node(machine.node)
    pytestconfig.stash.setdefault(SHOWN_AT_END, []).append(matrix(machine.outcomes, MOMENTS))


@pytest.mark.parametrize(
    ("victims", "moment"),
    [
        pytest.param(
            victims,
            moment,
            id=f"{'+'.join(victims)}-{moment}",
            marks=[] if (victims, moment) in IN_CI else pytest.mark.exhaustive,
        )
        for victims, moment in CASES
    ],
)
def test_nothing_is_left(
    machine: Machine, victims: Sequence[str], moment: str, tmp_path: Path
) -> None:
    before = Traces.now()
    driven = Driven(moment, tmp_path, machine.environment, hostnames=1)
    driven.kill(victims)

    outcome, took_s = driven.wait_for_outcome()
    driven.leave()
    machine.outcomes["+".join(victims), moment] = f"{outcome} {took_s:.1f}"
    if "raylet" in victims:
        machine.renew_node()
    assert outcome in {*(MAY_RAISE[victim] for victim in victims), *may_also(moment)}, driven.said
    assert took_s < SOON_S, driven.said
    assert_nothing_is_left(before, raylet_was_renewed="raylet" in victims)
    assert launch_again() == 2


def assert_nothing_is_left(before: Traces, *, raylet_was_renewed: bool = False) -> None:
    def left() -> list[str]:
        return before.missing_from(Traces.now(), 2, raylet_was_renewed=raylet_was_renewed)

    assert processes.wait_until(lambda: left() == []), left()


def launch_again() -> int:
    """Its agent stays from case to case, as part of what is there before."""
    return len(trx.Launcher(hostnames=1, workers_per_host=2, linger=1000).run(os.getpid))


@pytest.mark.parametrize("kind", ["named", "nameless"])
def test_shared_memory_that_stays_would_be_seen(machine: Machine, kind: str) -> None:
    """As large as what the workers report here."""
    before = Traces.now()
    path = Path("/dev/shm") / f"torchrunx_ray_{uuid.uuid4().hex}"
    fd = os.memfd_create("left") if kind == "nameless" else os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, 2**28)
        left = before.missing_from(Traces.now(), 2)
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)

    assert any("bytes of shared memory" in line for line in left)
    assert any(path.name in line for line in left) is (kind == "named")
    assert_nothing_is_left(before)
