"""Of several failures, the cause is raised, also if it is reported after what it did to its peers."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from torchrunx_ray.driver.report import failures
from torchrunx_ray.driver.report.failures import Failure, Failures, Report
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running import ledger
from torchrunx_ray.wire import messages

MS = 1_000_000


def failed(text: str, *, in_collective: bool = False) -> messages.Failed:
    return messages.Failed(
        0, 1, 2, "ValueError", text, "", None, text, 1, in_collective=in_collective
    )


def died(signum: int | None = None, code: int | None = None) -> messages.Died:
    return messages.Died(messages.Exited(0, 1, 2, code, signum, 1000), (), None)


COLLECTIVE = failed("Connection closed by peer", in_collective=True)
EXIT = failed("called sys.exit(1)")
BAD_BATCH = failed("bad batch")
KILLED, ABORTED = died(signal.SIGKILL), died(signal.SIGABRT)
CRASHED, EXITED = died(signal.SIGSEGV), died(code=3)
AGENT_DIED = messages.AgentFailed(2, "the agent died", "")


def first_of(reports: dict[int, Report], stopped_at_ms: int) -> Report:
    """Return the report that is raised, of those that were made at these milliseconds."""
    found = [Failure(ms * MS, "vm", rank, each) for rank, (ms, each) in enumerate(reports.items())]
    brief = Failures(found, [], Stacks({}), None, stopped_at_ms * MS).in_brief
    (rank,) = (rank for rank in range(len(found)) if brief.startswith(f"rank {rank} "))
    return found[rank].report


@pytest.mark.parametrize("consequence", [EXIT, EXITED, ABORTED])
def test_kill_goes_before_what_its_peers_made_of_it_in_that_moment(consequence: Report) -> None:
    """Scripts catch the peer's error, and exit where it is no exception's context any more."""
    assert first_of({0: consequence, 50: KILLED}, stopped_at_ms=100) is KILLED
    assert first_of({0: consequence, 150: KILLED}, stopped_at_ms=200) is consequence
    assert first_of({0: consequence, 50: KILLED}, stopped_at_ms=40) is consequence


def test_kill_of_the_workers_of_a_host_that_ends_is_not_its_cause() -> None:
    """An agent whose raylet is gone ends its workers before the launch does."""
    assert first_of({0: AGENT_DIED, 50: KILLED}, stopped_at_ms=100) is AGENT_DIED


@pytest.mark.parametrize("cause", [AGENT_DIED, EXITED, BAD_BATCH])
def test_cause_that_is_told_late_goes_before_errors_of_collectives(cause: Report) -> None:
    """Ray tells of an agent's death, and a busy template of a worker's, later than gloo of a closed socket."""
    assert first_of({0: COLLECTIVE, 500: cause}, stopped_at_ms=600) is cause
    assert first_of({0: COLLECTIVE, 700: cause}, stopped_at_ms=600) is COLLECTIVE


@pytest.mark.parametrize("cause", [KILLED, AGENT_DIED])
def test_death_goes_before_an_exception_of_a_peer_that_was_told_sooner(cause: Report) -> None:
    reports: dict[int, Report] = {0: COLLECTIVE, 10: EXIT, 300: cause}
    assert first_of(reports, stopped_at_ms=400) is cause


def test_crash_of_a_rank_that_was_told_to_stop_does_not_go_before_an_exception() -> None:
    """Nor if a busy machine had no stacks that show that the rank lived."""
    reports: dict[int, Report] = {0: COLLECTIVE, 50: BAD_BATCH, 700: CRASHED}
    assert first_of(reports, stopped_at_ms=600) is BAD_BATCH
    assert first_of({0: COLLECTIVE, 700: CRASHED}, stopped_at_ms=600) is CRASHED


def test_kill_is_named_before_the_exit_of_a_peer_that_caught_its_error(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_or_exit() -> None:
        dist.barrier()
        template = os.getppid()  # which reports the death
        if dist.get_rank() == 1:
            subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {template}"])
            os.kill(template, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL)
        code = 0
        try:
            dist.barrier()
        except Exception:
            code = 1
        sys.exit(code)

    # For a machine that is busy.
    monkeypatch.setattr(ledger, "_SETTLING_S", 2.0)
    monkeypatch.setattr(failures, "_NOTICE_NS", 2000 * MS)
    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(die_or_exit)
    assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)
    assert any("earlier, rank 0" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("kind", ["ValueError", "TypeError"])
def test_wrong_argument_of_a_collective_is_named_rather_than_what_came_of_it(
    launcher: trx.Launcher, kind: str
) -> None:
    """It is raised in torch.distributed, too, but by no peer."""

    def give_a_wrong_argument() -> None:
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(0.3)
            raise RuntimeError("rank 0 does not answer")
        if kind == "ValueError":
            dist.send(torch.ones(1), dst=0)
        else:
            dist.all_reduce([1])  # pyright: ignore[reportArgumentType]

    with pytest.raises((ValueError, TypeError)) as caught:
        launcher.run(give_a_wrong_argument)
    assert type(caught.value).__name__ == kind


@pytest.mark.slow
def test_rank_that_fails_before_it_joins_is_not_said_to_be_late_as_well(
    cluster: None, tmp_path: Path
) -> None:
    """Its peers take longer to stop than the process group's timeout."""
    (tmp_path / "fails_to_join.py").write_text(
        "import signal, time, torch.distributed as dist\n"
        "def fail(*args, rank, **kwargs):\n"
        "    if rank == 1: raise ValueError('no interface')\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    time.sleep(1000)\n"
        "dist.init_process_group = fail\n"
    )
    launcher = trx.Launcher(
        workers_per_host=2,
        timeout=3,
        shutdown_timeout=4,
        preload=("torch", "torch.distributed", "fails_to_join"),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
    )
    with pytest.raises(ValueError, match="no interface") as caught:
        launcher.run(os.getpid)
    assert "the process group was not complete in time" not in "".join(caught.value.__notes__)


@pytest.mark.parametrize("returns_first", [True, False])
def test_error_of_a_collective_waits_for_no_cause_where_all_others_have_returned(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch, returns_first: bool
) -> None:
    """A returned rank's process may live on, for its threads."""

    def return_or_fail() -> None:
        if (dist.get_rank() == 1) is not returns_first:
            time.sleep(0.5)
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(1, dtype=torch.int16))  # gloo has none of these
        threading.Thread(target=time.sleep, args=(1000,)).start()

    monkeypatch.setattr(ledger, "_CAUSE_S", 1000)
    run = launcher.submit(return_or_fail)
    try:
        assert type(run.exception(timeout=30)) is RuntimeError
    finally:
        run.kill()
