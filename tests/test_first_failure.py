"""Of many failures on two hosts, the first is the one that is raised."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.shifted_clock import compiler, shifted_clock
from tests.clusters.two_hosts import TwoHosts, namespaces_are_possible, two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not namespaces_are_possible(), reason="needs root and a kernel that gives namespaces"
    ),
]

SCRIPT = """
import json, time, torch, torch.distributed as dist

def rank():
    return int(os.environ["RANK"])

def while_others_wait(who):
    dist.barrier()
    if rank() == who:
        raise ValueError(f"rank {who}", time.monotonic())
    dist.all_reduce(torch.ones(1))

def shortly_after_another(who, then):
    # All of these hosts are one machine: its monotonic clock is the same everywhere.
    meeting = [time.monotonic() + 0.05]
    dist.broadcast_object_list(meeting)
    if rank() in (who, then):
        time.sleep(max(0, meeting[0] + 0.02 * (rank() == then) - time.monotonic()))
        raise ValueError(f"rank {rank()}", time.monotonic())
    time.sleep(1000)

named, clocks = [], []
launcher = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=2)
with launcher.session() as session:
    clocks = list(session.run(time.time))
    for i in range(RUNS):
        for function, args in (
            (while_others_wait, (2,)), (shortly_after_another, (1, 2)), (shortly_after_another, (3, 0)),
        ):
            try:
                session.run(function, *args)
            except ValueError as error:
                raised = [f for f in error.__cause__.failures if isinstance(f, ValueError)]
                # A rank that the machine did not wake in time did not raise first.
                first = f"rank {args[0]}" if len(args) == 1 else min(raised, key=lambda e: e.args[1]).args[0]
                at = sorted(e.args[1] for e in raised)
                if len(at) == 2 and at[1] - at[0] < 0.005:
                    continue  # woken so late that both raised at once
                named.append([args[0], error.args[0] == first, error.__cause__.rank, len(raised)])
            except Exception as error:
                named.append([args[0], repr(error)])
print(json.dumps([named, clocks]))
"""


def named(hosts: TwoHosts, runs: int) -> tuple[list[list[object]], list[float]]:
    done = hosts.drive(SCRIPT.replace("RUNS", str(runs)), timeout_s=300)
    assert done.returncode == 0, done.stderr
    named, clocks = json.loads(done.stdout.splitlines()[-1])
    return named, clocks


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.mark.timeout(400)
@pytest.mark.exhaustive
def test_first_failure_is_always_named(hosts: TwoHosts) -> None:
    runs = 50
    all_named, _clocks = named(hosts, runs)

    assert len(all_named) > 2 * runs
    assert [one for one in all_named if one[1] is not True] == []
    assert sum(one[0] == one[2] for one in all_named) > 2 * runs, "they do raise in that order"
    assert sum(one[3] == 2 for one in all_named if one[0] != 2) > 1.2 * runs, "the other follows"


@pytest.mark.timeout(300)
@pytest.mark.skipif(compiler() is None, reason="needs a C compiler for a clock that is wrong")
@pytest.mark.parametrize("shift_s", [3, pytest.param(-3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("runs", [3, pytest.param(15, marks=pytest.mark.exhaustive)])
def test_clocks_that_differ_between_hosts_change_nothing(
    runs: int, shift_s: int, tmp_path: Path
) -> None:
    with two_hosts(shifted_clock(shift_s, tmp_path)) as hosts:
        all_named, clocks = named(hosts, runs)

    assert abs(clocks[2] - clocks[0] - shift_s) < abs(shift_s) / 2, "the clocks do differ"
    assert len(all_named) > 2 * runs
    assert [one for one in all_named if one[1] is not True] == []
    assert sum(one[0] == one[2] for one in all_named) > runs, "most raise in that order"
