"""As test_lease.py, for hosts that are cut off or frozen as a whole."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clusters.two_hosts import (
    TwoHosts,
    cut_off,
    namespaces_are_possible,
    pids_on,
    two_hosts,
)
from tests.freezer import freezer, root
from tests.leases import beating, gap_s, last_beat_ns, outlived_s, page_of, until_renewed
from tests.processes import is_alive, wait_until
from torchrunx_ray.wire import linux
from torchrunx_ray.wire.clock import boot_ns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not namespaces_are_possible(), reason="needs root and a kernel that gives namespaces"
    ),
]


_AWAKE_NS = 50e6
"""Time that workers may live on a host that wakes up after its lease ran out. Root's keepers run before all others."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


@contextmanager
def beating_driver(
    hosts: TwoHosts, folder: Path, lease_s: float
) -> "Iterator[subprocess.Popen[str]]":
    """A driver whose two workers beat until the second attempt."""
    script = f"""
from pathlib import Path
from tests.leases import beat
launcher = trx.Launcher(
    hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=1, backend=None, max_restarts=1,
    host_timeout={lease_s},
)
result = launcher.run(beat(Path({str(folder)!r})))
print(list(result), result.attempts[0].failure, flush=True)
"""
    with hosts.begin(script) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def running_first() -> Iterator[None]:
    """Let this thread see at once what happens, whatever else wants to run."""
    first = os.SCHED_RR | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(0, first, os.sched_param(2))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_short_cut_harms_nothing_and_workers_end_in_a_long_one(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    lease_s = 10.0
    with beating_driver(hosts, tmp_path, lease_s) as driver:
        worker = beating(tmp_path, rank=1)
        until_renewed(worker, lease_s)
        with cut_off("trxh2"):
            time.sleep(5)
        until_renewed(worker, lease_s)
        page = page_of(worker)
        with cut_off("trxh2"):
            assert wait_until(lambda: not is_alive(worker), 2 * lease_s)
            assert -1 < outlived_s(tmp_path, page, rank=1) < 1
            assert not (tmp_path / "pid 1 0").exists()
            # The driver takes the host for lost, and waits for another agent there.
            assert wait_until(lambda: not is_alive(beating(tmp_path, rank=0)), 20)
        said, errors = driver.communicate(timeout=90)
    assert said.startswith("[1, 1] 10.77.0.12: the host was silent for 10 s"), errors
    assert gap_s(tmp_path, rank=1) > 0


@pytest.mark.exhaustive
@pytest.mark.skipif(root() is None, reason="needs root and a cgroup of which processes freeze")
def test_workers_of_a_frozen_host_are_dead_as_soon_as_it_wakes(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    lease_s = 4.0
    with beating_driver(hosts, tmp_path, lease_s) as driver, freezer() as group:
        worker = beating(tmp_path, rank=1)
        until_renewed(worker, lease_s)
        group.take(pids_on("trxh2"))
        group.take(pids_on("trxh2"))  # those that were forked meanwhile
        group.freeze()
        # The driver has taken the host for lost.
        assert wait_until(lambda: not is_alive(beating(tmp_path, rank=0)), 30)
        time.sleep(2)
        worker_fd = linux.pidfd_open(worker)
        with running_first():
            thawed_ns = boot_ns()
            group.thaw()
            assert linux.ready([worker_fd], 20)
            dead_ns = boot_ns()
        os.close(worker_fd)
        said, errors = driver.communicate(timeout=90)
    assert said.startswith("[1, 1] 10.77.0.12: the host was silent for 4 s"), errors
    assert gap_s(tmp_path, rank=1) > 0
    assert last_beat_ns(tmp_path, rank=1) - thawed_ns < _AWAKE_NS
    assert dead_ns - thawed_ns < _AWAKE_NS


def test_run_of_a_session_begins_after_the_lease_on_a_host_that_was_cut_off(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    """The earlier run was killed, and nobody could tell its worker there."""
    lease_s = 5.0
    script = f"""
from pathlib import Path
from tests.leases import beat
from tests.processes import wait_until
from torchrunx_ray.wire.clock import boot_ns
folder = Path({str(tmp_path)!r})
launcher = trx.Launcher(hostnames=(1, 2), workers_per_host=1, backend=None, host_timeout={lease_s})
with launcher.session() as session:
    run = session.submit(beat(folder))
    assert wait_until((folder / "cut").exists, 60)
    run.kill()
    print(min(session.run(boot_ns)), flush=True)
"""
    with hosts.begin(script) as driver:
        try:
            workers = [beating(tmp_path, rank) for rank in (0, 1)]
            for worker in workers:
                until_renewed(worker, lease_s)
            (cut,) = (rank for rank in (0, 1) if workers[rank] in pids_on("trxh2"))
            with cut_off("trxh2"):
                (tmp_path / "cut").touch()
                assert wait_until(lambda: not is_alive(workers[cut]), 4 * lease_s)
                said, errors = driver.communicate(timeout=60)
        finally:
            driver.kill()
    assert int(said) > last_beat_ns(tmp_path, cut), errors
