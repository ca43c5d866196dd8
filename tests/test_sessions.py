"""A session goes on after failures, and says where it cannot."""

import os
import signal
import time
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests import processes


def tree() -> dict[str, int]:
    return processes.above(os.getpid())


def kill(victim: str) -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getpid() if victim == "worker" else tree()[victim], signal.SIGKILL)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("victim", "error", "survivors"),
    [
        ("worker", trx.WorkerFailedError, {"agent", "outer keeper", "keeper", "template"}),
        ("template", trx.AgentFailedError, {"agent"}),
        ("agent", trx.AgentFailedError, set[str]()),
    ],
)
def test_next_run_works_and_only_what_died_is_replaced(
    cluster: None, victim: str, error: type[Exception], survivors: set[str]
) -> None:
    with trx.Launcher(workers_per_host=2).session() as session:
        before = session.run(tree).rank(0)
        for _ in range(3):
            with pytest.raises(error):
                session.run(kill, victim)
            after = session.run(tree).rank(1)
            assert {name for name in before if before[name] == after[name]} == survivors
            before = after


def test_session_whose_room_was_taken_away_says_so(cluster: None) -> None:
    with trx.Launcher(workers_per_host=2, name="robbed").session() as session:
        session.run(os.getpid)
        (name,) = [
            group["name"]
            for group in ray.util.placement_group_table().values()
            if group["name"].startswith("robbed") and group["state"] == "CREATED"
        ]
        untyped: Any = ray
        untyped.util.remove_placement_group(untyped.util.get_placement_group(name))

        with pytest.raises(trx.PlacementError, match="was removed, by ray"):
            session.run(os.getpid)
