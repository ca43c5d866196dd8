"""The workers of a silent host end by themselves, and only then are they started again."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests.leases import (
    beat,
    beating,
    gap_s,
    outlived_s,
    page_of,
    pulse_pids,
    until_renewed,
)
from tests.processes import above, frozen, is_alive, note, wait_until
from tests.soon import soon
from torchrunx_ray.agent.held_lease import HeldLease
from torchrunx_ray.agent.lease import HostLease, LeaseOfClaim
from torchrunx_ray.driver.agents import pulses
from torchrunx_ray.driver.running import leases, stopping
from torchrunx_ray.pulse.driver_process import DriverProcess
from torchrunx_ray.pulse.grants import Grants
from torchrunx_ray.wire.clock import boot_ns
from torchrunx_ray.wire.messages import AttemptId, LeasesWanted

LEASE_S = 3.0


@pytest.fixture
def patient(cluster: None) -> trx.Launcher:
    return trx.Launcher(
        workers_per_host=1, backend=None, max_restarts=2, host_timeout=LEASE_S, linger=0
    )


@pytest.mark.parametrize(
    "whom", [["agent"], pytest.param(["agent", "keeper"], marks=pytest.mark.exhaustive)]
)
def test_workers_of_a_frozen_agent_have_ended_before_others_begin(
    patient: trx.Launcher, whom: list[str], tmp_path: Path
) -> None:
    run = patient.submit(beat(tmp_path))
    worker = beating(tmp_path)
    until_renewed(worker, LEASE_S)
    over, page = above(worker), page_of(worker)
    with frozen(*(over[name] for name in whom)):
        result = run.result(timeout=60)
        assert list(result) == [1]
        assert -1 < outlived_s(tmp_path, page) < 1
        assert gap_s(tmp_path) > 0
        assert wait_until(lambda: not is_alive(over["agent"]))
    first, _ = result.attempts
    assert first.failure is not None
    assert "the host was silent for 3 s" in first.failure


def test_frozen_driver_finds_its_workers_ended_and_restarts_them(
    cluster: None, joined: None, tmp_path: Path
) -> None:
    script = f"""
import torchrunx_ray as trx
from pathlib import Path
from tests.leases import beat
launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1, host_timeout={LEASE_S})
result = launcher.run(beat(Path({str(tmp_path)!r})))
print(list(result), result.attempts[0].failure)
"""
    with driver(script) as process:
        worker = beating(tmp_path)
        until_renewed(worker, LEASE_S)
        page = page_of(worker)
        with frozen(process.pid):
            assert wait_until(lambda: not is_alive(worker))
            assert -1 < outlived_s(tmp_path, page) < 1
            assert not (tmp_path / "pid 1 0").exists()
        said, errors = process.communicate(timeout=60)
    assert said.startswith("[1] "), errors
    assert "the workers' lease ran out, and their keeper ended them" in said
    assert gap_s(tmp_path) > 0


@pytest.mark.exhaustive
def test_user_code_that_holds_the_gil_of_the_driver_harms_no_worker(
    cluster: None, joined: None, tmp_path: Path
) -> None:
    script = f"""
import ctypes, torchrunx_ray as trx
from pathlib import Path
from tests.leases import beat, beating, until_renewed
folder = Path({str(tmp_path)!r})
launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1, host_timeout={LEASE_S})
run = launcher.submit(beat(folder, last_attempt=1))
until_renewed(beating(folder), {LEASE_S})
ctypes.PyDLL(None).sleep({3 * int(LEASE_S)})
print((folder / "pid 1 0").exists(), run.done())
run.cancel()
"""
    with driver(script) as process:
        said, errors = process.communicate(timeout=60)
    assert said == "False False\n", errors


@contextmanager
def driver(script: str) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.exhaustive
def test_killed_pulse_is_replaced_before_a_lease_runs_out(cluster: None, tmp_path: Path) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1, linger=0)
    run = launcher.submit(beat(tmp_path))
    worker = beating(tmp_path)
    until_renewed(worker, launcher.host_timeout)
    (pulse,) = pulse_pids()
    os.kill(pulse, signal.SIGKILL)
    until_renewed(worker, launcher.host_timeout)
    page = page_of(worker)
    with frozen(above(worker)["agent"]):
        result = run.result(timeout=60)
    assert len(result.attempts) == 2
    assert -1 < outlived_s(tmp_path, page) < 1


@pytest.mark.exhaustive
def test_pulse_that_does_not_answer_is_replaced(cluster: None, tmp_path: Path) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1, linger=0)
    run = launcher.submit(beat(tmp_path))
    worker = beating(tmp_path)
    until_renewed(worker, launcher.host_timeout)
    (pulse,) = pulse_pids()
    with frozen(pulse):
        until_renewed(worker, launcher.host_timeout)
        assert wait_until(lambda: pulse_pids() not in ([pulse], []))
        until_renewed(worker, launcher.host_timeout)
        assert wait_until(lambda: not is_alive(pulse))
    assert not run.done()
    run.cancel()


@pytest.mark.exhaustive
def test_host_that_was_given_up_is_fenced_before_another_attempt(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent froze while the driver stopped its workers, so that nobody knows whether they have ended."""
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 1.0)
    run = _fail_beside_a_frozen_agent(tmp_path, lease_s=10)
    worker = beating(tmp_path, rank=1)
    until_renewed(worker, 10)
    page = page_of(worker)
    with frozen(above(worker)["agent"]):
        note(tmp_path / "frozen", "")
        assert list(run.result(timeout=60)) == [1, 1]
    # Ray may end the agent, and so the worker, some seconds before the lease runs out.
    assert outlived_s(tmp_path, page, rank=1) < 1
    assert gap_s(tmp_path, rank=1) > 0


@pytest.mark.exhaustive
def test_lease_runs_out_while_the_launch_waits_for_the_report_of_a_host(
    cluster: None, tmp_path: Path
) -> None:
    """The agent there renews the lease, but cannot end the workers: their template is frozen."""
    run = _fail_beside_a_frozen_agent(tmp_path, lease_s=10)
    worker = beating(tmp_path, rank=1)
    until_renewed(worker, 10)
    with frozen(above(worker)["template"]):
        note(tmp_path / "frozen", "")
        with soon(stopping._LAST_WORDS_S + 5):
            assert list(run.result(timeout=60)) == [1, 1]
    assert gap_s(tmp_path, rank=1) > 0


@pytest.mark.exhaustive
def test_cancel_ends_the_run_while_it_waits_for_a_lease_to_run_out(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LAST_WORDS_S", 1.0)
    run = _fail_beside_a_frozen_agent(tmp_path, lease_s=100)
    agent = above(beating(tmp_path, rank=1))["agent"]
    until_renewed(beating(tmp_path, rank=1), 100)
    with frozen(agent):
        note(tmp_path / "frozen", "")
        time.sleep(4)  # the failed attempt has ended
        run.cancel()
        with soon(), pytest.raises(CancelledError):
            run.result(timeout=60)


def _fail_beside_a_frozen_agent(folder: Path, lease_s: float) -> trx.Run[int]:
    beats = beat(folder)

    def fail_or_beat() -> int:
        if trx.context().attempt == 0 and os.environ["RANK"] == "0":
            wait_until((folder / "frozen").exists, 60)
            raise ValueError
        return beats()

    launcher = trx.Launcher(
        hostnames=2,
        workers_per_host=1,
        placement_strategy="PACK",
        backend=None,
        max_restarts=1,
        shutdown_timeout=1,
        host_timeout=lease_s,
        linger=0,
    )
    return launcher.submit(fail_or_beat)


def test_template_outlives_the_lease_of_its_run(patient: trx.Launcher) -> None:
    def renew() -> int:
        until_renewed(os.getpid(), LEASE_S)
        return os.getppid()

    with patient.session() as session:
        template = session.run(renew).rank(0)
        time.sleep(LEASE_S + 1)
        assert session.run(os.getppid).rank(0) == template


def test_run_without_restarts_has_no_lease(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=1, backend=None)
    assert launcher.run(lambda: page_of(os.getpid()).expires_at_ns).rank(0) == 0


def test_lease_before_the_pulse_is_there_is_long(
    patient: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_s() -> float:
        return (page_of(os.getpid()).expires_at_ns - boot_ns()) / 1e9

    def left_once_renewed_s() -> float:
        until_renewed(os.getpid(), LEASE_S)
        return left_s()

    monkeypatch.setattr(pulses, "_current", None)  # the pulse of an earlier test
    assert 60 < patient.run(left_s).rank(0) < leases.FIRST_S
    assert patient.run(left_once_renewed_s).rank(0) <= LEASE_S
    assert patient.run(left_s).rank(0) < 30


@pytest.mark.exhaustive
def test_leases_run_out_although_both_keepers_were_killed(
    cluster: None, joined: None, tmp_path: Path
) -> None:
    script = f"""
import torchrunx_ray as trx
from pathlib import Path
from tests.leases import beat
launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1, host_timeout={LEASE_S})
launcher.run(beat(Path({str(tmp_path)!r})))
"""
    with driver(script) as process:
        worker = beating(tmp_path)
        until_renewed(worker, LEASE_S)
        over, page = above(worker), page_of(worker)
        for name in ("outer keeper", "keeper"):
            os.kill(over[name], signal.SIGKILL)
        with frozen(process.pid):
            assert wait_until(lambda: not is_alive(worker))
            assert -1 < outlived_s(tmp_path, page) < 1


class _Template:
    """As far as a lease knows a template."""

    def __init__(self) -> None:
        self.lease = HeldLease()
        self.has_hung_up = asyncio.Event()

    def hang_up(self) -> None:
        self.has_hung_up.set()


async def test_answer_that_comes_late_extends_nothing(cluster: None) -> None:
    @ray.remote(num_cpus=0)
    class Slow:
        async def renew(self, *_: object) -> bool:
            await asyncio.sleep(1.5)
            return True

    template, slow = _Template(), Slow.remote()
    lease = HostLease(AttemptId("run", 0), template, boot_ns())  # pyright: ignore[reportArgumentType]  # see _Template
    lease.renew_with(slow, 0, LEASE_S)
    assert await lease.is_held()
    assert template.lease.expires_at_ns - boot_ns() <= (LEASE_S - 1.5) * 1e9
    lease.end()
    assert template.lease.expires_at_ns == 0

    lease = HostLease(AttemptId("run", 1), template, boot_ns())  # pyright: ignore[reportArgumentType]  # see _Template
    lease.begin(1)
    expires_at_ns = template.lease.expires_at_ns
    lease.renew_with(slow, 0, LEASE_S)
    await asyncio.sleep(2)
    assert template.lease.expires_at_ns == expires_at_ns
    assert not await lease.is_held()


async def test_answer_that_comes_after_its_own_lease_leaves_the_first_one() -> None:
    template = _Template()
    lease = HostLease(AttemptId("run", 0), template, boot_ns())  # pyright: ignore[reportArgumentType]  # see _Template
    lease.begin(100)
    lease._extend(boot_ns() - 10**9, boot_ns())
    assert await lease.is_held()
    lease.end()


async def test_agent_hangs_up_after_a_first_lease_that_nobody_renews() -> None:
    """Both keepers may have been killed."""
    template = _Template()
    lease = HostLease(AttemptId("run", 0), template, boot_ns())  # pyright: ignore[reportArgumentType]  # see _Template
    lease.begin(0.5)
    async with asyncio.timeout(20):
        await template.has_hung_up.wait()
    assert boot_ns() > template.lease.expires_at_ns
    assert not await lease.is_held()


async def test_host_that_waited_long_for_others_has_no_shorter_first_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new host's runtime_env took 110 s. The lease of the others then ended in the middle of their start."""
    monkeypatch.setattr(pulses, "_current", None)
    waited_s = 110.0
    template, leases_here = _Template(), LeaseOfClaim()
    leases_here.claim()
    leases_here._claimed_at_ns -= int(waited_s * 1e9)
    agent: Any = SimpleNamespace(met_at=time.monotonic() - waited_s)
    crew: Any = None
    attempt = AttemptId("run", 0)
    first_s = leases.Leases(attempt, crew, LEASE_S).first_s(agent)
    leases_here.begin(attempt, template, first_s)  # pyright: ignore[reportArgumentType]  # see _Template
    left_s = (template.lease.expires_at_ns - boot_ns()) / 1e9
    assert leases.FIRST_S - 1 < left_s < leases.FIRST_S


async def test_late_order_of_an_earlier_attempt_leaves_the_lease_of_the_next_one_alone() -> None:
    template, leases_here = _Template(), LeaseOfClaim()
    for number in (0, 1):
        leases_here.claim()
        leases_here.begin(AttemptId("run", number), template, 100)  # pyright: ignore[reportArgumentType]  # see _Template
    assert leases_here.of(AttemptId("run", 0), template) is None  # pyright: ignore[reportArgumentType]
    assert template.lease.expires_at_ns > boot_ns()
    leases_here.claim()
    assert template.lease.expires_at_ns == 0


async def test_order_to_live_without_a_lease_may_come_before_the_attempt() -> None:
    template, leases_here = _Template(), LeaseOfClaim()
    leases_here.claim()
    early = leases_here.of(AttemptId("run", 0), template)  # pyright: ignore[reportArgumentType]  # see _Template
    assert early is not None
    early.give_up()
    assert leases_here.begin(AttemptId("run", 0), template, 100) is early  # pyright: ignore[reportArgumentType]
    assert await early.is_held()
    assert template.lease.expires_at_ns == 0


def wanted(*, lease_s: float, until_over_s: float, refused: tuple[int, ...] = ()) -> LeasesWanted:
    return LeasesWanted(AttemptId("run", 0), 2, lease_s, 0.0, until_over_s, refused)


def test_first_lease_counts_until_the_host_says_that_it_has_another() -> None:
    grants = Grants(wanted(lease_s=1, until_over_s=100))
    assert grants.renew(0, True)
    assert grants.revoke(0) > 90
    assert grants.renew(1, True)
    assert grants.renew(1, False)
    assert grants.revoke(1) <= 1


def test_host_gets_no_lease_after_it_was_refused_or_the_last_one_ran_out() -> None:
    grants = Grants(wanted(lease_s=1, until_over_s=0.01, refused=(1,)))
    assert not grants.renew(1, True)
    assert wait_until(lambda: grants.over(()) == [0, 1])
    assert not grants.renew(0, True)
    assert grants.over((0,)) == [1]
    grants = Grants(wanted(lease_s=1, until_over_s=100))
    grants.revoke(0)
    assert not grants.renew(0, True)


def test_driver_is_at_work_unless_it_is_stopped_or_gone() -> None:
    script = "from torchrunx_ray.pulse.driver_process import *; print(repr(DriverProcess.this()))"
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}; import sys, os; os.close(1); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        there: DriverProcess = eval(told)
        assert there.is_visible
        assert there.is_at_work
        os.kill(process.pid, signal.SIGSTOP)
        assert wait_until(lambda: not there.is_at_work)
        os.kill(process.pid, signal.SIGCONT)
        assert wait_until(lambda: there.is_at_work)
        process.kill()
        assert wait_until(lambda: not there.is_at_work)  # a zombie
    assert not there.is_at_work
    later = DriverProcess(os.getpid(), "0", there.pid_namespace)
    assert not later.is_at_work
