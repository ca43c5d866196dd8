"""torch's elastic agent whose workers Ray runs: one agent."""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
from torch.distributed.elastic import timer
from torch.distributed.elastic.agent.server import api as server_api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher import api as launcher_api
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import torchrunx_ray as trx
from tests.elastic import (
    agent_of,
    free_port,
    run,
    shut_down_handlers,
    spec_of,
)
from tests.freezer import Freezer, freezer, root
from tests.groups import summed
from tests.processes import command_line, is_alive, note, of_pool, own_mark, wait_until
from tests.soon import soon
from torchrunx_ray.elastic import RayElasticAgent, create_healthcheck_server
from torchrunx_ray.wire import proc

BACKENDS = ("ray", "c10d", "static")

RAY_FIRST = ("ray", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in BACKENDS[1:]))
"""Backends for tests whose torch imports or templates cost much, and that restarts cover as well."""

SET_BY_TORCH = [
    "RANK",
    "LOCAL_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "GROUP_RANK",
    "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
]


@pytest.fixture(autouse=True)
def _cluster(cluster: None) -> Iterator[None]:
    """Use the cluster of the session."""
    yield
    shut_down_handlers()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, Any]]:
    """Return torch's `elastic_launch` with our agent, and 2 workers."""
    monkeypatch.setattr(launcher_api, "LocalElasticAgent", RayElasticAgent)

    def launch(entrypoint: Callable[..., Any] | str, *args: object, **more: Any) -> dict[int, Any]:
        more = {"rdzv_backend": "ray", "max_restarts": 0, "monitor_interval": 0.01} | more
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="x", **more)
        return elastic_launch(config, entrypoint)(*args)

    return launch


def summed_by_a_peer() -> int:
    """Fail rank 1 in the first attempt, after the group has met."""
    total = summed()
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return total


@pytest.mark.parametrize("backend", RAY_FIRST)
def test_values_come_by_global_rank(backend: str) -> None:
    spec = spec_of(lambda given: (given, os.environ["RANK"]), "foo", backend=backend)

    result = run(spec)

    assert not result.is_failed()
    assert result.return_values == {0: ("foo", "0"), 1: ("foo", "1")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_works_again_after_a_restart(backend: str) -> None:
    """torch's own agent fails here with the shared c10d store: workers read addresses of dead peers."""
    result = run(spec_of(summed_by_a_peer, backend=backend, workers=3, max_restarts=2))

    assert result.return_values == {0: 3, 1: 3, 2: 3}


def test_every_variable_of_torchs_local_agent_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    names = tuple(SET_BY_TORCH)

    first, second = run(
        spec_of(lambda: {name: os.environ[name] for name in names}, max_restarts=3)
    ).return_values.values()

    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (second["LOCAL_RANK"], second["ROLE_RANK"], second["GROUP_RANK"]) == ("1", "1", "0")
    assert (first["ROLE_NAME"], first["TORCHELASTIC_RUN_ID"]) == ("trainer", "the run")
    assert (first["TORCHELASTIC_MAX_RESTARTS"], first["WORLD_SIZE"]) == ("3", "2")
    assert first["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert first["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert first["TORCHELASTIC_ERROR_FILE"] != second["TORCHELASTIC_ERROR_FILE"]


def test_drivers_choice_for_nccls_errors_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")

    result = run(spec_of(os.environ.get, "TORCH_NCCL_ASYNC_ERROR_HANDLING"))

    assert set(result.return_values.values()) == {"0"}


def test_whole_environment_of_the_agent_reaches_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OF_THE_SHELL", "here")

    assert set(run(spec_of(os.environ.get, "OF_THE_SHELL")).return_values.values()) == {"here"}


def test_chosen_master_address_is_shown_and_the_group_works() -> None:
    def seen() -> tuple[str, str, int]:
        return os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], summed()

    result = run(spec_of(seen, backend="c10d", master_addr="test_host", master_port=42))

    assert set(result.return_values.values()) == {("test_host", "42", 1)}


def test_group_can_be_made_by_the_address_of_a_static_rendezvous() -> None:
    port = free_port()

    def by_tcp() -> int:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=size
        )
        total = torch.tensor(rank)
        dist.all_reduce(total)
        return int(total)

    result = run(spec_of(by_tcp, backend="static", master_addr="localhost", master_port=port))

    assert set(result.return_values.values()) == {1}


@pytest.mark.parametrize("backend", RAY_FIRST)
def test_program_is_an_entrypoint(backend: str, tmp_path: Path) -> None:
    code = (
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(dist.get_rank())\n"
        "dist.all_reduce(total)\n"
        "dist.barrier()\n"  # gloo fails on a rank that still connects when its peer leaves
        "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]} {sys.argv[2]} {int(total)}', 'w').close()\n"
    )
    spec = spec_of(sys.executable, "-c", code, str(tmp_path), "of ${local_rank}", backend=backend)

    result = run(spec)

    assert result.return_values == {0: None, 1: None}
    assert sorted(os.listdir(tmp_path)) == ["0 of 0 1", "1 of 1 1"]


def test_program_that_fails_has_its_exit_code() -> None:
    result = run(spec_of("bash", "-c", "[ $RANK = 0 ] && exit 7; sleep 100"))

    assert result.state is WorkerState.FAILED
    assert list(result.failures) == [0]
    assert result.failures[0].exitcode == 7


def test_program_that_a_signal_kills_has_the_signal() -> None:
    result = run(spec_of("bash", "-c", "[ $RANK = 1 ] && kill -9 $BASHPID; sleep 100"))

    assert list(result.failures) == [1]
    assert result.failures[1].exitcode == -signal.SIGKILL
    assert result.failures[1].message.startswith("Signal 9 (SIGKILL) received by PID")


def test_program_that_is_not_there_is_an_error_that_names_it() -> None:
    result = run(spec_of("no-such-program"))

    (told, *_) = (failure.message for failure in result.failures.values())
    assert "no-such-program is no program that can be run here" in str(told)


def test_program_may_handle_any_signal(tmp_path: Path) -> None:
    """The stacks of a program cannot be asked for, and a signal would mean something else to it."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: os._exit(9))\n"
        "sys.exit(3) if os.environ['RANK'] == '0' and time.sleep(1) is None else time.sleep(100)\n"
    )

    result = run(spec_of(sys.executable, "-c", code), shutdown_timeout=1)

    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {0: 3}


def test_functions_failure_has_its_traceback(tmp_path: Path) -> None:
    def fail() -> None:
        if os.environ["RANK"] == "1":
            raise RuntimeError("sad because I throw")
        time.sleep(100)

    result = run(spec_of(fail), logs_specs=DefaultLogsSpecs(str(tmp_path)))

    (failure,) = result.failures.values()
    assert (failure.local_rank, failure.exitcode) == (1, 1)
    data = json.loads(Path(failure.error_file).read_text())
    assert data == failure.error_file_data
    assert data["message"]["message"] == "RuntimeError: sad because I throw"
    assert "in fail" in data["message"]["extraInfo"]["py_callstack"]
    assert int(data["message"]["extraInfo"]["timestamp"]) == failure.timestamp
    assert Path(failure.error_file).relative_to(tmp_path).parts[1:] == (
        "attempt_0",
        "1",
        "error.json",
    )


def test_restarts_are_counted_down_and_the_group_fails() -> None:
    agent = agent_of(spec_of(lambda: 1 // 0, workers=4, max_restarts=2))

    result = agent.run()

    assert result.is_failed()
    assert agent._remaining_restarts == 0
    assert agent.get_worker_group().state is WorkerState.FAILED
    assert "ZeroDivisionError" in str(result.failures[next(iter(result.failures))].message)


def test_worker_group_shows_the_workers() -> None:
    agent = agent_of(spec_of(os.getpid))

    result = agent.run()

    group = agent.get_worker_group()
    assert group.state is WorkerState.SUCCEEDED
    assert [worker.id for worker in group.workers] == list(result.return_values.values())
    assert [(each.local_rank, each.global_rank, each.role_rank) for each in group.workers] == [
        (0, 0, 0),
        (1, 1, 1),
    ]
    assert {(each.world_size, each.role_world_size) for each in group.workers} == {(2, 2)}


def test_failure_before_the_function_is_raised_and_costs_no_restart() -> None:
    agent = agent_of(
        spec_of(print, max_restarts=3), launcher=trx.Launcher(preload=["no_such_module"])
    )

    with pytest.raises(trx.PreloadError, match="no_such_module"):
        agent.run()
    assert agent._remaining_restarts == 3


def test_signal_ends_the_workers_and_its_handler_is_put_back(tmp_path: Path) -> None:
    def wait() -> None:
        note(tmp_path / os.environ["RANK"], f"{os.getpid()} {own_mark()}")
        time.sleep(1000)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}

    def signal_when_running() -> None:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_when_running, daemon=True).start()
    with pytest.raises(SignalException) as caught:
        run(spec_of(wait), shutdown_timeout=5)

    assert caught.value.sigval is signal.SIGTERM
    assert {each: signal.getsignal(each) for each in before} == before
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        assert not is_alive(int(path.read_text().split()[0]))


def test_second_signal_kills_the_workers(tmp_path: Path) -> None:
    def refuse_to_end() -> None:
        rank = os.environ["RANK"]
        signal.signal(signal.SIGTERM, lambda *_: note(tmp_path / f"told {rank}", ""))
        note(tmp_path / f"begun {rank}", os.getpid())
        while True:
            time.sleep(1000)

    def signal_twice() -> None:
        for what, signum in (("begun *", signal.SIGTERM), ("told *", signal.SIGINT)):
            wait_until(lambda: len(list(tmp_path.glob(what))) == 2, 60)  # noqa: B023
            os.kill(os.getpid(), signum)

    threading.Thread(target=signal_twice, daemon=True).start()
    with pytest.raises(SignalException) as caught, soon():
        run(spec_of(refuse_to_end), shutdown_timeout=100)

    assert caught.value.sigval is signal.SIGINT
    for path in tmp_path.glob("begun *"):
        assert not is_alive(int(path.read_text()))


def test_agent_runs_in_a_thread() -> None:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(run(spec_of(int))), daemon=True)
    thread.start()
    thread.join(60)

    assert results[0].return_values == {0: 0, 1: 0}


def test_output_goes_where_the_logs_specs_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        print("out of", os.environ["RANK"])
        print("err of", os.environ["RANK"], file=sys.stderr)

    logs = DefaultLogsSpecs(str(tmp_path), redirects={0: Std.OUT, 1: Std.ALL}, tee={1: Std.OUT})
    run(
        spec_of(speak, duplicate_stdout_filters=["of 1"]),
        logs_specs=logs,
        log_line_prefix_template="[${role_name}-${local_rank}:${rank}] ",
    )

    shown = capsys.readouterr()
    (folder,) = (path / "attempt_0" for path in tmp_path.iterdir())
    written = {str(path.relative_to(folder)): path.read_text() for path in folder.glob("**/*.log")}
    assert written == {
        "0/stdout.log": "out of 0\n",
        "1/stdout.log": "out of 1\n",
        "1/stderr.log": "err of 1\n",
        "filtered_stdout.log": "[trainer-1:1] out of 1\n",
    }
    assert shown.out == "[trainer-1:1] out of 1\n"
    assert shown.err.splitlines().count("err of 0") == 1
    assert "err of 1" not in shown.err


def test_each_attempts_output_is_in_its_own_files(tmp_path: Path) -> None:
    def speak_and_fail() -> None:
        print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise ValueError("once more")

    logs = DefaultLogsSpecs(str(tmp_path), redirects=Std.ALL)
    run(spec_of(speak_and_fail, workers=1, max_restarts=1), logs_specs=logs)

    (folder,) = tmp_path.iterdir()
    said = [(folder / f"attempt_{i}" / "0" / "stdout.log").read_text() for i in (0, 1)]
    assert said == ["attempt 0\n", "attempt 1\n"]


def test_functions_logging_is_text_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def warn() -> None:
        import logging

        logging.getLogger("of the user").warning("as plain Python shows it")

    run(spec_of(warn, workers=1))

    assert "as plain Python shows it\n" in capsys.readouterr().err


class Extended(RayElasticAgent):
    """An agent that somebody has built on ours."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.calls: list[str] = []

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        self.calls.append("start")
        return super()._start_workers(worker_group)

    def _stop_workers(self, worker_group: Any, is_restart: bool = False) -> None:
        self.calls.append("stop")
        super()._stop_workers(worker_group, is_restart)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is not WorkerState.HEALTHY:
            self.calls.append(result.state.name.lower())
        return result

    def _shutdown(self, *args: Any, **more: Any) -> None:
        self.calls.append("shutdown")
        super()._shutdown(*args, **more)


def test_hooks_of_an_extended_agent_are_called() -> None:
    def fail_once() -> None:
        assert os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"

    agent = Extended(spec_of(fail_once, max_restarts=1), DefaultLogsSpecs())
    agent.run()

    assert agent.calls == ["start", "failed", "stop", "start", "succeeded", "shutdown"]


def test_elastic_launch_with_our_agent_returns_the_values(
    launched: Callable[..., dict[int, Any]],
) -> None:
    assert launched(summed) == {0: 1, 1: 1}


def test_elastic_launch_names_the_first_failure_first(
    launched: Callable[..., dict[int, Any]], tmp_path: Path
) -> None:
    def fail(fails: Path) -> None:
        if os.environ["RANK"] == "1":
            note(fails, "")
        else:
            wait_until(fails.exists, 60)
            time.sleep(0.2)
        raise ValueError(f"from rank {os.environ['RANK']}")

    for number in range(3):  # torch takes whole seconds, and would choose rank 0 in most cases
        with pytest.raises(ChildFailedError) as caught:
            launched(fail, tmp_path / f"{number} fails")
        rank, failure = caught.value.get_first_failure()
        assert (rank, failure.message["message"]) == (1, "ValueError: from rank 1")
        root = str(caught.value).partition("Root Cause (first observed failure):")[2]
        assert "ValueError: from rank 1" in root
        assert "rank      : 1 (local_rank: 1)" in root


def test_error_file_of_a_recorded_launcher_has_the_cause(
    launched: Callable[..., dict[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torchrun: `@record` around the launch copies the first failure to its own file."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    with pytest.raises(ChildFailedError):
        record(launched)(lambda: 1 // 0)

    data = json.loads((tmp_path / "error.json").read_text())
    assert data["message"]["message"].startswith("ZeroDivisionError")
    assert data["message"]["errorCode"] == 1


def test_events_and_metrics_have_torchs_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    metrics: dict[str, int] = {}
    monkeypatch.setattr(server_api, "record", lambda event, *_: names.append(event.name))
    monkeypatch.setattr(server_api, "put_metric", lambda name, value: metrics.update({name: value}))

    run(spec_of(int))

    assert names.count("torchelastic.worker.status.START") == 2
    assert names.count("torchelastic.worker.status.SUCCEEDED") == 2
    assert metrics["workers.trainer.run_success_no_retries"] == 1
    assert metrics["workers.trainer.remaining_restarts"] == 0


def test_port_of_health_checks_is_in_the_workers_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = str(free_port())
    monkeypatch.setenv("TORCHELASTIC_HEALTH_CHECK_PORT", port)

    result = run(spec_of(os.environ.get, "TORCHELASTIC_HEALTH_CHECK_PORT"))

    assert set(result.return_values.values()) == {port}


def test_healthcheck_server_answers(cluster: None) -> None:
    alive_at = [int(time.time())]
    server = create_healthcheck_server(lambda: alive_at[0], 0, timeout=60)
    server.start()
    try:
        address = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
        alive_at[0] -= 100
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(address)
        assert caught.value.code == 503
        assert "no progress for" in caught.value.read().decode()
        caught.value.close()
    finally:
        server.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)


def test_virtual_local_rank_is_0_for_all() -> None:
    def seen() -> tuple[str, str]:
        return os.environ["LOCAL_RANK"], os.environ["RANK"]

    result = run(spec_of(seen, virtual_local_rank=True))

    assert list(result.return_values.values()) == [("0", "0"), ("0", "1")]


def test_watchdog_ends_a_worker_and_the_group_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ENABLE_FILE_TIMER", "1")

    def hang_at_first() -> str:
        with timer.expires(after=0.5, scope="a step"):
            time.sleep(1000 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0)
        return os.environ["TORCHELASTIC_RESTART_COUNT"]

    failed = run(spec_of(hang_at_first))
    again = run(spec_of(hang_at_first, max_restarts=1))

    (message, *_) = (failure.message for failure in failed.failures.values())
    said = r"has not left the scope a step in 0\.\d+ s, so the watchdog sent SIGKILL"
    assert re.search(said, message)
    assert again.return_values == {0: "1", 1: "1"}


@pytest.mark.skipif(root() is None, reason="needs root and a cgroup that freezes")
def test_worker_that_stays_blocked_in_the_kernel_fails_and_is_not_replaced(tmp_path: Path) -> None:
    def wait_for_ever() -> None:
        note(tmp_path / os.environ["RANK"], os.getpid())
        time.sleep(1000)

    def block(group: Freezer) -> None:
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
        group.take([int((tmp_path / "1").read_text())])
        group.freeze()  # in the table of processes, frozen ones have the state of blocked ones

    agent = agent_of(
        spec_of(wait_for_ever, max_restarts=2), uninterruptible_state_timeout=1, shutdown_timeout=1
    )
    with freezer() as group, ThreadPoolExecutor(1) as blocking:
        blocked = blocking.submit(block, group)
        result = agent.run()
        blocked.result()

    assert "has not left the scope uninterruptible sleep" in result.failures[1].message
    assert agent._remaining_restarts == 0


def test_nothing_is_left_of_an_agents_run(tmp_path: Path) -> None:
    def mark() -> str:
        return own_mark()

    (found, _) = run(
        spec_of(mark), launcher=trx.Launcher(linger=0, cpus_per_worker=0)
    ).return_values.values()

    with soon():
        assert wait_until(lambda: not of_pool(found))


def test_rpc_works_among_the_workers() -> None:
    def ask_the_other() -> int:
        rank = int(os.environ["RANK"])
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
        answer: int = rpc.rpc_sync(f"worker{1 - rank}", max, args=(rank, 7))
        rpc.shutdown()
        return answer

    assert run(spec_of(ask_the_other)).return_values == {0: 7, 1: 7}


def test_25_workers_fit_on_few_cores() -> None:
    assert len(run(spec_of(int, workers=25)).return_values) == 25


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"local_world_size": 0}, AssertionError),
        ({"entrypoint": None}, AssertionError),
        ({"monitor_interval": 0}, AssertionError),
    ],
)
def test_wrong_spec_is_an_error(changes: dict[str, Any], expected: type[Exception]) -> None:
    with pytest.raises(expected):
        dataclasses.replace(spec_of(int), **changes)


def test_unknown_backend_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="no_such_backend"):
        get_rendezvous_handler(RendezvousParameters("no_such_backend", "", "x", 1, 1))


def test_workers_without_room_are_an_error_that_shows_the_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launcher = trx.Launcher(cpus_per_worker=1000, placement_timeout=0)

    with pytest.raises(trx.PlacementError, match="2000 CPU"):
        run(spec_of(int), launcher=launcher)


@pytest.fixture
def children() -> Iterator[list[int]]:
    found: list[int] = []
    yield found
    for pid in found:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_agent_of_a_forked_child_runs_in_a_fresh_process(
    tmp_path: Path, children: list[int]
) -> None:
    """As with torch's agent, which multiprocessing's fork carries along. Ray's connection does not survive a fork."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            result = run(spec_of(summed_by_a_peer, backend="c10d", max_restarts=1))
            (tmp_path / "values").write_text(repr(result.return_values))
            code = 0
        finally:
            os._exit(code)
    children.append(pid)

    _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "values").read_text() == "{0: 1, 1: 1}"


@pytest.mark.exhaustive
def test_death_of_the_fresh_process_ends_its_workers_and_is_told(
    tmp_path: Path, children: list[int]
) -> None:
    def wait() -> None:
        note(tmp_path / os.environ["RANK"], os.getpid())
        time.sleep(1000)

    pid = os.fork()
    if pid == 0:
        try:
            run(spec_of(wait))
        except trx.LaunchError as error:
            note(tmp_path / "told", error)
        finally:
            os._exit(0)
    children.append(pid)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 100)
    workers = [int(path.read_text()) for path in tmp_path.iterdir()]
    (serving,) = (each for each in proc.children(pid) if "elastic.serve" in command_line(each))

    os.kill(serving, signal.SIGKILL)
    os.waitpid(pid, 0)

    assert f"(pid {serving}) has ended with status -9" in (tmp_path / "told").read_text()
    with soon():
        assert wait_until(lambda: not any(map(is_alive, workers)))
