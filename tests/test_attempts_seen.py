"""What a user sees of a run whose workers are started again."""

import json
import os
import signal
import sys
import threading
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from torch.distributed.elastic.agent.server import api

import torchrunx_ray as trx
from tests.processes import above, is_alive, note, parent, wait_until
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.output.speaker import Speaker
from torchrunx_ray.driver.output.to_files import ToFiles
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.report import timeline as timelines
from torchrunx_ray.driver.report.failures import Failure, Failures
from torchrunx_ray.driver.report.history import History
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.report.trace import write_trace
from torchrunx_ray.driver.report.workers import WorkerState
from torchrunx_ray.driver.running import stopping
from torchrunx_ray.driver.running.steps import _restarted
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.ranks import lay_out


@pytest.fixture
def patient(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=2, max_restarts=3, shutdown_timeout=30)


def states(run: trx.Run[Any]) -> list[str]:
    return [worker.state for worker in run.workers()]


def test_attempts_are_seen_while_the_run_goes_on(patient: trx.Launcher, tmp_path: Path) -> None:
    def fail_twice() -> None:
        attempt = trx.context().attempt
        note(tmp_path / f"{attempt}-{os.environ['RANK']}", os.getpid())
        while not (tmp_path / f"go{attempt}").exists():
            time.sleep(0.01)
        if attempt < 2:
            raise ValueError(f"attempt {attempt}")

    run = patient.submit(fail_twice)
    for i in range(3):
        assert wait_until(lambda i=i: len(list(tmp_path.glob(f"{i}-*"))) == 2, 30)
        *earlier, current = run.attempts
        assert [each.why for each in earlier] == ["failed"] * i
        assert (current.number, current.world_size) == (i, 2)
        assert (current.ended, current.why, current.failure) == (None, None, None)
        assert [each.ended for each in earlier if each.ended is None] == []
        assert len(current.hostnames) == 1
        note(tmp_path / f"go{i}", "")

    result = run.result(timeout=60)
    assert run.attempts == result.attempts
    assert [each.why for each in run.attempts] == ["failed", "failed", "returned"]
    assert "ValueError: attempt 1" in (run.attempts[1].failure or "")


def test_attempts_of_a_failed_run_are_those_of_its_error(patient: trx.Launcher) -> None:
    def fail() -> None:
        raise ValueError

    run = patient.submit(fail)
    cause = getattr(run.exception(timeout=60), "__cause__", None)
    assert isinstance(cause, trx.RemoteFailure)
    assert run.attempts == tuple(cause.attempts)
    assert [each.why for each in run.attempts] == ["failed"] * 4
    assert all(each.ended is not None for each in run.attempts)


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_attempt_of_a_cancelled_run_is_stopped(
    patient: trx.Launcher, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_DEAF_S", 30.0)  # a busy machine is no lost host

    def fail_and_wait() -> None:
        if trx.context().attempt == 0:
            raise ValueError
        note(tmp_path / os.environ["RANK"], "")
        time.sleep(1000)

    run = patient.submit(fail_and_wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    getattr(run, how)()
    run.wait()

    first, second = run.attempts
    assert (first.why, second.why, second.failure) == ("failed", "stopped", None)
    assert second.ended is not None
    assert [(worker.attempt, worker.state) for worker in run.workers()] == [(1, "STOPPED")] * 2


def test_run_that_found_no_room_has_no_attempts(cluster: None) -> None:
    launcher = trx.Launcher(workers_per_host=7, backend=None)
    with launcher.session():
        run = launcher.submit(os.getpid)
        assert run.attempts == ()
        assert run.workers() == []
        run.cancel()
        run.wait()
    assert run.attempts == ()
    assert run.workers() == []


def test_workers_are_those_of_the_current_attempt(patient: trx.Launcher, tmp_path: Path) -> None:
    def fail_once() -> None:
        attempt = trx.context().attempt
        note(tmp_path / f"{attempt}-{os.environ['RANK']}", os.getpid())
        while not (tmp_path / f"go{attempt}").exists():
            time.sleep(0.01)
        if attempt == 0 and os.environ["RANK"] == "1":
            raise ValueError
        if attempt == 0:
            time.sleep(1000)

    run = patient.submit(fail_once)
    for attempt in range(2):
        files = [tmp_path / f"{attempt}-{rank}" for rank in range(2)]
        assert wait_until(lambda files=files: all(path.exists() for path in files), 30)
        pids = [int(path.read_text()) for path in files]
        assert wait_until(lambda: states(run) == ["HEALTHY"] * 2)
        (hostname,) = run.attempts[-1].hostnames
        assert run.workers() == [
            trx.WorkerInfo(rank, rank, hostname, pids[rank], attempt, "HEALTHY")
            for rank in range(2)
        ]
        note(tmp_path / f"go{attempt}", "")
    run.result(timeout=60)
    assert [(each.pid, each.state) for each in run.workers()] == [
        (pid, "SUCCEEDED") for pid in pids
    ]


def test_workers_of_several_hosts_are_in_the_order_of_their_ranks(cluster: None) -> None:
    def fail_once() -> int:
        if trx.context().attempt == 0 and os.environ["RANK"] == "2":
            raise ValueError
        return os.getpid()

    launcher = trx.Launcher(
        hostnames=2, workers_per_host=2, placement_strategy="PACK", backend=None, max_restarts=1
    )
    run = launcher.submit(fail_once)
    pids = list(run.result(timeout=60))
    workers = run.workers()
    assert [(each.rank, each.local_rank) for each in workers] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert [(each.pid, each.attempt, each.state) for each in workers] == [
        (pid, 1, "SUCCEEDED") for pid in pids
    ]


def test_pid_is_known_before_a_worker_has_joined(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "slow_to_join.py").write_text(
        "import os, time, torch.distributed as dist\n"
        "join = dist.init_process_group\n"
        "def wait(*args, **kwargs):\n"
        f"    while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
        "    join(*args, **kwargs)\n"
        "dist.init_process_group = wait\n"
    )
    launcher = trx.Launcher(
        workers_per_host=2,
        preload=("torch", "torch.distributed", "slow_to_join"),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    run = launcher.submit(os.getpid)
    seen: list[trx.WorkerInfo] = []
    assert wait_until(lambda: seen.extend(run.workers()) or len(seen) == 2, 30)
    assert [(each.pid, each.state) for each in seen] == [(None, "INIT")] * 2
    assert wait_until(lambda: states(run) == ["HEALTHY"] * 2, 60)
    pids = [each.pid for each in run.workers()]
    assert all(pid is not None and is_alive(pid) for pid in pids)
    note(tmp_path / "go", "")
    assert list(run.result(timeout=60)) == pids


@pytest.mark.parametrize("at_sigterm", ["dies", "raises", "exits"])
def test_only_the_worker_that_failed_by_itself_has_failed(
    launcher: trx.Launcher, at_sigterm: str, tmp_path: Path
) -> None:
    def fail_or_wait() -> None:
        if at_sigterm == "raises":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if at_sigterm == "exits":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        if os.environ["RANK"] == "1":
            while not (tmp_path / "waits").exists():
                time.sleep(0.01)
            raise KeyError
        note(tmp_path / "waits", "")
        time.sleep(1000)

    run = launcher.submit(fail_or_wait)
    with pytest.raises(KeyError):
        run.result(timeout=60)
    assert states(run) == ["STOPPED", "FAILED"]


def test_worker_that_was_killed_has_failed(launcher: trx.Launcher, tmp_path: Path) -> None:
    def wait() -> None:
        note(tmp_path / os.environ["RANK"], os.getpid())
        time.sleep(1000)

    run = launcher.submit(wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    with pytest.raises(trx.WorkerFailedError):
        run.result(timeout=60)
    assert states(run) == ["STOPPED", "FAILED"]


@pytest.mark.parametrize(("whom", "state"), [("template", "FAILED"), ("agent", "UNKNOWN")])
def test_workers_that_died_with_a_process_above_them(
    launcher: trx.Launcher, whom: str, state: str, tmp_path: Path
) -> None:
    """Their template's agent hears that they are gone; nobody hears of those of a dead agent."""

    def wait() -> None:
        note(tmp_path / os.environ["RANK"], os.getpid())
        time.sleep(1000)

    run = launcher.submit(wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    os.kill(above(int((tmp_path / "1").read_text()))[whom], signal.SIGKILL)
    with pytest.raises(trx.AgentFailedError):
        run.result(timeout=60)
    assert states(run) == [state] * 2


def test_workers_are_answered_at_once_if_the_agent_is_frozen(
    launcher: trx.Launcher, tmp_path: Path
) -> None:
    def wait() -> None:
        note(tmp_path / os.environ["RANK"], os.getpid())
        time.sleep(1000)

    run = launcher.submit(wait)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    assert wait_until(lambda: states(run) == ["HEALTHY"] * 2)
    agent = above(int((tmp_path / "1").read_text()))["agent"]
    os.kill(agent, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        assert states(run) == ["HEALTHY"] * 2
        assert time.monotonic() - begun < 0.5
    finally:
        os.kill(agent, signal.SIGCONT)
    run.kill()
    run.wait()


def test_states_have_the_names_of_torchs() -> None:
    assert set(get_args(WorkerState)) == set(api.WorkerState.__members__)
    assert all(state.value == state.name for state in api.WorkerState)


def test_every_phase_between_two_attempts_is_told(cluster: None, tmp_path: Path) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def fail_once() -> None:
        note(tmp_path / "pid", os.getpid())
        if trx.context().attempt == 0:
            raise ValueError
        while not (tmp_path / "go").exists():
            time.sleep(0.01)

    def ask(_: BaseException) -> bool:
        asked.set()
        assert goes_on.wait(60)
        os.kill(agent, signal.SIGSTOP)  # it then meets the next attempt late
        return True

    launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=3, restart_if=ask)
    with launcher.session() as session:
        agent = session.run(lambda: parent(above(os.getpid())["outer keeper"])).rank(0)
        run = session.submit(fail_once)
        assert asked.wait(30)
        assert repr(run).endswith(": asking restart_if>")
        assert [each.why for each in run.attempts] == ["failed"]
        goes_on.set()
        try:
            assert wait_until(lambda: repr(run).endswith(": restarting 1 worker>"))
        finally:
            wait_until(lambda: not is_running(agent))
            os.kill(agent, signal.SIGCONT)
        assert wait_until(lambda: repr(run).endswith(": running 1 worker, restart 1 of 3>"), 30)
        assert run._progress.status.endswith(": running 1 worker, restart 1 of 3")
        note(tmp_path / "go", "")
        run.result(timeout=60)
        assert repr(run).endswith(": ended>")


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"


def test_start_of_a_restarted_run_counts_its_workers(cluster: None, tmp_path: Path) -> None:
    """A new template imports what is slow again."""
    (tmp_path / "slow_again.py").write_text(
        f"import os, time\nwhile os.path.exists({str(tmp_path / 'slow')!r}): time.sleep(0.01)\n"
    )

    def wait() -> None:
        note(tmp_path / f"pid{trx.context().attempt}", os.getpid())
        if trx.context().attempt == 0:
            time.sleep(1000)

    launcher = trx.Launcher(
        workers_per_host=1,
        backend=None,
        max_restarts=1,
        preload=("slow_again",),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    run = launcher.submit(wait)
    assert wait_until((tmp_path / "pid0").exists, 30)
    assert repr(run).endswith(": running 1 worker>") or repr(run).endswith(": starting 1 worker>")
    (tmp_path / "slow").touch()
    os.kill(above(int((tmp_path / "pid0").read_text()))["template"], signal.SIGKILL)
    try:
        assert wait_until(lambda: repr(run).endswith(": starting 1 worker, restart 1 of 1>"), 30)
        assert run._progress.status.endswith(": starting 0/1 workers, restart 1 of 1")
        assert states(run) == ["INIT"]
    finally:
        (tmp_path / "slow").unlink()
    run.result(timeout=60)


def test_trace_has_all_attempts_beside_each_other(patient: trx.Launcher, tmp_path: Path) -> None:
    def fail_twice() -> None:
        time.sleep(0.2)
        if trx.context().attempt < 2 and os.environ["RANK"] == "1":
            raise ValueError("bad day")
        if trx.context().attempt < 2:
            time.sleep(1000)

    result = patient.run(fail_twice)
    result.timeline(tmp_path / "trace.json")

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    attempts = [span for span in spans if span["name"].startswith("attempt ")]
    assert [span["name"] for span in attempts] == ["attempt 0", "attempt 1", "attempt 2"]
    assert {(span["pid"], span["tid"]) for span in attempts} == {(0, 1)}
    assert [span["args"]["why"] for span in attempts] == ["failed", "failed", "returned"]
    assert "bad day" in attempts[0]["args"]["failure"]
    for thread in (1, 2):
        of_rank = [span for span in spans if (span["pid"], span["tid"]) == (1, thread)]
        runs = [span for span in of_rank if span["name"] == "run"]
        assert [span["args"]["attempt"] for span in runs] == [0, 1, 2]
        assert all(span["dur"] >= 0.19e6 for span in runs)
        for before, after in pairwise(of_rank):
            assert before["ts"] + before["dur"] <= after["ts"] + 1
        for span in of_rank:
            attempt = attempts[span["args"]["attempt"]]
            # The first attempt begins a moment after its agents were met, from when on its ranks may join.
            assert attempt["ts"] - 1e5 <= span["ts"]
            assert span["ts"] + span["dur"] <= attempt["ts"] + attempt["dur"] + 1e3
    assert next(iter(result.timings)) == "earlier attempts"
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert sorted(names) == ["attempts", "phases", "rank 0", "rank 1", "template"]


def test_trace_has_the_import_of_each_template_once(cluster: None, tmp_path: Path) -> None:
    def die_with_template() -> None:
        attempt = trx.context().attempt
        if attempt == 0:
            raise ValueError
        if attempt == 1:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)

    launcher = trx.Launcher(
        workers_per_host=1, backend=None, preload=("colorsys",), max_restarts=3, linger=0
    )
    launcher.run(die_with_template).timeline(tmp_path / "trace.json")

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    first, second = [event for event in events if event["name"] == "import"]
    assert first["ts"] + first["dur"] < second["ts"]


def test_trace_of_attempts_on_other_hosts_has_each_host_once(tmp_path: Path) -> None:
    timeline, history = Timeline(), History()
    for hostnames in (["a", "b"], ["c", "b", "d"]):
        places = [place for host in lay_out([1] * len(hostnames)) for place in host]
        timeline.begin_attempt(hostnames, places)
        history.begin(hostnames, len(places))
        timeline.met_ns = time.time_ns()
        for place in places:
            started = messages.Started(0, 1, time.time_ns())
            timeline.hear(place.host_index, place.rank, started, 0)
        history.end("failed", "first failure", time.time())
    write_trace(tmp_path / "trace.json", timeline, history.attempts)

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(processes.values()) == ["a", "b", "c", "d", "driver"]
    threads = {
        (processes[e["pid"]], e["args"]["name"]) for e in events if e["name"] == "thread_name"
    }
    of_ranks = {(host, name) for host, name in threads if name.startswith("rank")}
    assert of_ranks == {("a", "rank 0"), ("b", "rank 1"), ("c", "rank 0"), ("d", "rank 2")}
    spans = [event for event in events if event["name"] == "run" and event["pid"] > 0]
    runs = [(span["args"]["attempt"], processes[span["pid"]]) for span in spans]
    assert runs == [(0, "a"), (0, "b"), (1, "c"), (1, "b"), (1, "d")]


def test_two_hundred_attempts_of_many_ranks_take_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And many more take no more than a limit."""
    monkeypatch.setattr(timelines, "_MOST_KEPT", 200 * 64)

    def attempt() -> None:
        places = [place for host in lay_out([8] * 8) for place in host]
        timeline.begin_attempt([f"host{i}" for i in range(8)], places)
        for place in places:
            for event in (
                messages.Joined(place.local_rank, time.time_ns()),
                messages.Started(place.local_rank, 1, time.time_ns()),
                messages.Exited(place.local_rank, 1, time.time_ns(), 0, None, 0),
            ):
                timeline.hear(place.host_index, place.rank, event, 0)

    timeline = Timeline()
    attempt()
    tracemalloc.start()
    try:
        for _ in range(200):
            attempt()
        grown, _ = tracemalloc.get_traced_memory()
        for _ in range(100):
            attempt()
        grown_later, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 2 * 2**20
    assert grown_later < 1.1 * grown


async def test_files_of_a_host_that_comes_later_say_where_it_begins(tmp_path: Path) -> None:
    """Rank 0 moves to another host, and rank 1 to another place on its host."""

    def speakers(*places: tuple[str, int | None, int | None]) -> list[Speaker]:
        return [Speaker(*place, is_first_host=place[0] == places[0][0]) for place in places]

    first = speakers(("a", None, None), ("b", None, None), ("a", 0, 0), ("b", 0, 1))
    later = speakers(("c", None, None), ("b", None, None), ("c", 0, 0), ("c", 1, 1), ("b", 0, 2))
    files = ToFiles(str(tmp_path), "run")
    launcher = trx.Launcher(console_ranks=())
    logs = RunLogs("run", launcher, "auto", files, first)
    logs.begin_attempt(messages.AttemptId("run", 0))
    logs.expect(later)
    logs.begin_attempt(messages.AttemptId("run", 1))
    for who in later[2:]:
        logs.put(who, "stdout", f"rank {who.rank} speaks\n".encode(), time.time())
    await logs.drain()

    assert files.directory is not None
    said = {
        path.name.removesuffix(".log"): [
            line.partition(":INFO: ")[2] for line in path.read_text().splitlines()
        ]
        for path in files.directory.iterdir()
    }
    assert said == {
        "a": ["run run, attempt 0: rank 0 of 2 on this host", "attempt 1 is not on this host"],
        "b": [
            "run run, attempt 0: rank 1 of 2 on this host",
            "run run, attempt 1: rank 2 of 3 on this host",
        ],
        "c": ["run run, attempt 1: ranks 0-1 of 3 on this host"],
        "b[0]": ["attempt 1 begins as rank 2", "rank 2 speaks"],
        "c[0]": ["attempt 1 begins as rank 0", "rank 0 speaks"],
        "c[1]": ["attempt 1 begins as rank 1", "rank 1 speaks"],
    }


def test_lost_hosts_are_those_whose_node_the_next_attempt_does_not_have() -> None:
    def hosts(*names: str) -> list[Host]:
        return [Host(node_of(name), name, 1, {}, 0) for name in names]

    def node_of(name: str) -> Node:
        return Node(name, name, "", {}, {})

    death = messages.Died(messages.Exited(0, 1, 0, None, signal.SIGKILL, 0), (), None)
    failures = Failures([Failure(0, "b", 1, death)], [], Stacks({}), None)
    same = _restarted("failed", failures, hosts("a", "b"), hosts("a", "b"))
    assert same == messages.Restarted("death", 0)
    lost = _restarted("host lost", failures, hosts("a", "b", "c"), hosts("a", "d"))
    assert lost == messages.Restarted("host", 2)
