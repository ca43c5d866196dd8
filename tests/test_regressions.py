"""Bugs that were, each told in its test's docstring."""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

import torchrunx_ray as trx
from tests import processes
from tests.traces import objects_in_store


def sleep_until(gate: Path) -> str:
    while not gate.exists():
        time.sleep(0.01)
    return "through"


async def test_cancelled_await_leaves_the_run_alone(launcher: trx.Launcher, tmp_path: Path) -> None:
    """`asyncio.wait_for(run, ...)` cancelled the run's own future: done at once, workers alive."""
    run = launcher.submit(sleep_until, tmp_path / "gate")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(run, 0.2)

    assert not run.done()
    (tmp_path / "gate").touch()
    assert list(await run) == ["through", "through"]


@pytest.mark.parametrize("how", ["return", "raise", "exit"])
def test_child_that_the_function_forks_does_not_report_as_the_rank(
    launcher: trx.Launcher, how: str
) -> None:
    """A fork that came out of the function ran on as the worker, and its outcome replaced it."""

    def fork() -> str:
        pid = os.fork()
        if pid == 0:
            if how == "raise":
                raise ValueError("of the child")
            if how == "exit":
                raise SystemExit(0)
            return "child"
        os.waitpid(pid, 0)
        return "parent"

    assert list(launcher.run(fork)) == ["parent", "parent"]


class ShardError(Exception):
    def __init__(self, shard: str) -> None:
        super().__init__(f"{shard} is truncated")


class FrozenError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("frozen")


class DecodeError(UnicodeDecodeError):
    def __init__(self) -> None:
        super().__init__("utf-8", b"\xff", 0, 1, "bad start")


class DiskError(OSError):
    def __init__(self, where: str) -> None:
        super().__init__(5, f"{where} is broken")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ShardError("shard 17"), id="constructor that words the message"),
        pytest.param(lambda: FrozenError("cold"), id="refuses attributes"),
        pytest.param(DecodeError, id="fields of a built-in"),
        pytest.param(lambda: DiskError("sda"), id="fields of OSError"),
        pytest.param(lambda: StopIteration("over"), id="StopIteration"),
        pytest.param(lambda: asyncio.CancelledError("mine"), id="CancelledError"),
        pytest.param(lambda: ExceptionGroup("two", [ValueError(), ShardError("b")]), id="group"),
        pytest.param(lambda: KeyError("key"), id="KeyError"),
        pytest.param(lambda: torch.cuda.OutOfMemoryError("no memory"), id="OutOfMemoryError"),
        pytest.param(lambda: subprocess.CalledProcessError(3, ["cmd"]), id="CalledProcessError"),
    ],
)
def test_exception_arrives_with_its_type_and_text(
    launcher: trx.Launcher, make: Callable[[], BaseException]
) -> None:
    """Constructors ran twice on their own message; StopIteration and CancelledError were changed
    by the coroutine that raised them; those that refuse attributes broke the report."""

    def fail() -> None:
        raise make()

    with pytest.raises(type(make())) as caught:
        launcher.run(fail)

    assert type(caught.value) is type(make())
    assert str(caught.value) == str(make())
    assert isinstance(caught.value.__cause__, trx.RemoteFailure)


def test_group_at_a_port_of_the_functions_own(cluster: None) -> None:
    """MASTER_PORT was read when the group was made: a function that set it met nobody."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def join() -> int:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
        dist.init_process_group("gloo")
        return dist.get_world_size()

    assert list(trx.Launcher(workers_per_host=2, backend=None).run(join)) == [2, 2]


def test_early_cancels_leave_no_placement_group(cluster: None) -> None:
    """A cancellation while Ray made the group orphaned it; one while Ray placed it, its CPUs.

    That those are free again is checked after every test, by its `cluster`.
    """

    def living() -> set[str]:
        table = ray.util.placement_group_table()
        return {i for i, group in table.items() if group["state"] != "REMOVED"}

    before = living()
    for i in range(60):
        run = trx.Launcher(workers_per_host=1, linger=0).submit(os.getpid)
        time.sleep(i * 0.0003)
        run.cancel()
        try:
            run.result(timeout=30)
        except concurrent.futures.CancelledError:
            pass

    assert processes.wait_until(lambda: living() <= before)


def test_many_cancels_leave_no_worker(launcher: trx.Launcher, tmp_path: Path) -> None:
    """A third cancellation gave up on workers that ignore SIGTERM; the next launch met them."""

    def ignore_sigterm() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / str(os.getpid())).touch()
        time.sleep(1000)

    run = launcher.submit(ignore_sigterm)
    assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
    for _ in range(5):
        run.cancel()
        time.sleep(0.001)
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=30)

    assert not any(processes.is_alive(int(path.name)) for path in tmp_path.iterdir())
    assert list(launcher.run(lambda: "well")) == ["well", "well"]


def test_driver_without_stdout_does_not_hang(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """The thread that prints died of it, and the launch waited for it for ever."""
    done = run_script(
        f"""
import sys, torchrunx_ray as trx
sys.stdout = None
trx.launch(print, ("hello",), workers_per_host=1)
open({str(tmp_path / "done")!r}, "w").close()
"""
    )

    assert (tmp_path / "done").exists(), done.stderr


def test_stream_that_cannot_show_a_character_shows_the_rest(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """One such character lost the whole chunk."""
    done = run_script(
        """
import sys, torchrunx_ray as trx
sys.stdout.reconfigure(encoding="ascii")
trx.launch(print, ("caf\\u00e9",), workers_per_host=1)
"""
    )

    assert done.stdout == "caf\\xe9\n", done.stderr


@pytest.mark.unconfigured_logging
def test_prefix_stands_at_the_beginning_of_lines_only(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Other characters that Python takes for line ends got one too."""
    launcher = trx.Launcher(workers_per_host=2, console_ranks="all")
    launcher.run(print, "a\u2028b\x0cc")

    out = capfd.readouterr().out
    assert sorted(line[-5:] for line in out.removesuffix("\n").split("\n")) == [
        "a\u2028b\x0cc",
        "a\u2028b\x0cc",
    ]


def test_env_file_that_was_corrected_is_read_again(cluster: None, tmp_path: Path) -> None:
    """The first reading, or its error, stayed with the agent."""
    env_file = tmp_path / "env"
    launcher = trx.Launcher(workers_per_host=1, env_file=env_file)
    seen: list[str] = []
    for text in ("no_such_command", "export A=1", "export A=22"):
        env_file.write_text(text)
        try:
            seen.append(launcher.run(lambda: os.environ["A"]).rank(0))
        except trx.LaunchError:
            seen.append("error")

    assert seen == ["error", "1", "22"]


@pytest.mark.parametrize("victim", ["agent", "outer keeper", "keeper", "template"])
def test_launch_after_a_resting_agent_was_killed(cluster: None, victim: str) -> None:
    """It failed with "the agent could not be started"; a replaced template stayed alive."""
    launcher = trx.Launcher(workers_per_host=1, extra_env_vars={"OWN_AGENT_FOR": victim})
    pids = launcher.run(lambda: processes.above(os.getpid())).rank(0)
    os.kill(pids[victim], signal.SIGKILL)
    assert processes.wait_until(lambda: not all(map(processes.is_alive, pids.values())))

    template = launcher.run(os.getppid).rank(0)
    assert (template == pids["template"]) is (victim == "keeper"), "the outer keeper keeps it"
    if victim != "keeper":
        assert processes.wait_until(lambda: not processes.is_alive(pids["template"]))


def test_short_linger_is_used(cluster: None) -> None:
    """An agent that would end within 2 s was never taken."""
    launcher = trx.Launcher(
        workers_per_host=1, linger=1.5, extra_env_vars={"OWN_AGENT_FOR": "short linger"}
    )

    assert launcher.run(os.getppid).rank(0) == launcher.run(os.getppid).rank(0)


def test_launches_at_the_end_of_linger_all_work(cluster: None) -> None:
    launcher = trx.Launcher(
        workers_per_host=1, linger=0.3, extra_env_vars={"OWN_AGENT_FOR": "a race"}
    )
    for i in range(8):
        assert launcher.run(lambda: "well").rank(0) == "well"
        time.sleep(0.26 + 0.01 * i)


@pytest.mark.slow  # Ray takes 15 s to shut down where another thread than the main one began it
def test_first_launches_in_threads_share_one_ray(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """All but one raised "Perhaps you called ray.init twice by accident?"."""
    done = run_script(
        """
ray.shutdown()
import os, concurrent.futures, torchrunx_ray as trx
os.environ["RAY_ADDRESS"] = "local"
launcher = trx.Launcher(workers_per_host=1, cpus_per_worker=0.1)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(sorted(pool.map(lambda i: launcher.run(lambda: i).rank(0), range(4))))
"""
    )

    assert done.stdout.endswith("[0, 1, 2, 3]\n"), done.stderr


@pytest.mark.slow
def test_ray_shutdown_ends_the_runs_and_a_new_ray_can_be_used(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """They never ended, and asking Ray for their end made it join some other cluster."""
    done = run_script(
        """
import os, time, torchrunx_ray as trx
def begin():
    open("begun", "w").close()
    time.sleep(1000)

launcher = trx.Launcher(workers_per_host=1)
run = launcher.submit(begin)
while not os.path.exists("begun"):
    time.sleep(0.01)
ray.shutdown()
try:
    run.result(timeout=30)
except trx.AgentFailedError as error:
    print(type(error).__name__)
assert not ray.is_initialized()
ray.init(address="local", num_cpus=4, include_dashboard=False)
print(launcher.run(lambda: "well").rank(0))
"""
    )

    lines = done.stdout.splitlines()  # Ray may have something to tell as well
    # Ray ends the agent on its way out, and that may be heard first.
    assert "AgentFailedError" in lines, done.stdout + done.stderr
    assert lines[-1] == "well"


def test_session_does_not_keep_the_values_of_its_runs(cluster: None) -> None:
    """It held every run, and so every value, until it was closed."""
    import gc
    import weakref

    with trx.Launcher(workers_per_host=1).session() as session:
        result = weakref.ref(session.run(os.getpid))
        gc.collect()
        assert result() is None


def test_function_may_choose_its_start_method(launcher: trx.Launcher) -> None:
    """It could not: ours had been set with force."""

    def choose() -> str | None:
        import multiprocessing

        multiprocessing.set_start_method("spawn")
        return multiprocessing.get_start_method()

    assert list(launcher.run(choose)) == ["spawn", "spawn"]


def test_rank_that_returns_at_once_does_not_break_the_group_of_others(cluster: None) -> None:
    """It ended while others still connected to it: "Gloo connectFullMesh failed", in 22 of 150."""
    with trx.Launcher(workers_per_host=8, cpus_per_worker=0.1).session() as session:
        for _ in range(60):
            assert list(session.run(lambda: 1)) == [1] * 8


def test_death_is_named_rather_than_what_it_did_to_its_peers(cluster: None) -> None:
    """The kernel closes a dying worker's sockets first: its peer's gloo error had the earlier time."""

    def die_or_wait() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with trx.Launcher(workers_per_host=2).session() as session:
        for _ in range(20):
            with pytest.raises(trx.WorkerFailedError) as caught:
                session.run(die_or_wait)
            assert (caught.value.rank, caught.value.signal) == (1, signal.SIGKILL)


def test_template_that_dies_before_the_run_starts_is_a_failure(cluster: None) -> None:
    """The launch "succeeded", with None for every value."""
    with pytest.raises(trx.AgentFailedError, match="the template process"):
        trx.Launcher(workers_per_host=1, extra_env_vars={"PYTHONHOME": "/nowhere"}).run(os.getpid)


def test_driver_that_ends_while_a_preload_hangs_leaves_nothing(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """A template looks for its agent only after its imports."""
    (tmp_path / "hangs.py").write_text(
        f"import time; open({str(tmp_path / 'imported')!r}, 'w').close(); time.sleep(1000)"
    )
    done = run_script(
        f"""
import os, time, torchrunx_ray as trx
trx.Launcher(
    workers_per_host=1, preload=("hangs",), extra_env_vars={{"OF_THIS_TEST": {str(tmp_path)!r}}}
).submit(os.getpid)
while not os.path.exists({str(tmp_path / "imported")!r}):
    time.sleep(0.01)
"""
    )

    assert done.returncode == 0, done.stderr
    assert processes.wait_until(lambda: not processes.mentioning(f"OF_THIS_TEST={tmp_path}"))


def test_env_file_that_blocks_does_not_hold_a_cancel(cluster: None, tmp_path: Path) -> None:
    """The agent's constructor waited for bash, and whoever wanted to end the agent for it."""
    (tmp_path / "env").write_text("sleep 30")
    launcher = trx.Launcher(workers_per_host=1, linger=0, env_file=tmp_path / "env")
    run = launcher.submit(os.getpid)
    assert processes.wait_until(lambda: bool(sleeping_bash(tmp_path)), 20)
    run.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=5)
    for pid in sleeping_bash(tmp_path):
        os.kill(pid, signal.SIGKILL)


def sleeping_bash(folder: Path) -> list[int]:
    return [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit()
        and processes.is_alive(int(entry))
        and str(folder) in processes.command_line(int(entry))
        and processes.command_line(int(entry)).startswith("bash")
    ]


def test_env_file_that_exits_is_an_error(cluster: None, tmp_path: Path) -> None:
    """All of its variables were dropped in silence."""
    (tmp_path / "env").write_text("export A=1\nexit 0\n")

    with pytest.raises(trx.LaunchError, match="use return, not exit"):
        trx.Launcher(workers_per_host=1, env_file=tmp_path / "env").run(os.getpid)


def test_env_file_whose_last_line_is_a_condition_is_no_error(cluster: None, tmp_path: Path) -> None:
    """Its exit code was taken for one."""
    (tmp_path / "env").write_text("export A=1\n[ -f /nowhere ] && export B=1\n")

    launcher = trx.Launcher(workers_per_host=1, env_file=tmp_path / "env")
    assert launcher.run(lambda: os.environ["A"]).rank(0) == "1"


def test_deleted_folder_of_the_driver_is_no_error(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """os.getcwd() raised in the driver."""
    (tmp_path / "gone").mkdir()
    done = run_script(
        f"""
import os, torchrunx_ray as trx
os.chdir({str(tmp_path / "gone")!r})
os.rmdir({str(tmp_path / "gone")!r})
print(trx.launch(lambda: "well", workers_per_host=1).rank(0))
"""
    )

    assert done.stdout == "well\n", done.stderr
    assert "the driver's folder (deleted) cannot be used here; the function runs in" in done.stderr


def test_worker_that_left_its_process_group_is_stopped_too(
    launcher: trx.Launcher,
) -> None:
    """Only its group was signalled, and a failure elsewhere took 10 s."""

    def leave_or_fail() -> None:
        if os.environ["RANK"] == "0":
            os.setpgid(0, os.getpgid(os.getppid()))
            time.sleep(1000)
        time.sleep(0.2)
        raise ValueError("elsewhere")

    launcher.run(os.getpid)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="elsewhere"):
        launcher.run(leave_or_fail)
    assert time.monotonic() - begun < 2


def test_rank_that_has_returned_but_not_ended_does_not_delay_a_failure(
    launcher: trx.Launcher,
) -> None:
    """SIGTERM spared it, and SIGKILL came after shutdown_timeout."""

    def return_or_fail() -> None:
        import threading

        if os.environ["RANK"] == "0":
            threading.Thread(target=time.sleep, args=(1000,)).start()
            return
        time.sleep(0.2)
        raise ValueError("elsewhere")

    launcher.run(os.getpid)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="elsewhere"):
        launcher.run(return_or_fail)
    assert time.monotonic() - begun < 2


@pytest.mark.unconfigured_logging
def test_output_without_newlines_is_not_quadratic(
    cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """20 MB took 1.4 s, 60 MB 10.7 s."""
    launcher = trx.Launcher(workers_per_host=1)
    launcher.run(os.getpid)

    def write(megabytes: int) -> None:
        for _ in range(megabytes):
            os.write(1, b"x" * 1_000_000)

    begun = time.monotonic()
    launcher.run(write, 60)
    assert time.monotonic() - begun < 5
    assert capfd.readouterr().out.count("x") == 60_000_000


def test_arguments_may_have_any_name(launcher: trx.Launcher) -> None:
    """`func` and `self` were taken for our own."""

    def named(func: int, self: int) -> int:
        return func + self

    kwargs: dict[str, Any] = {"func": 1, "self": 2}
    assert trx.launch(named, func_kwargs=kwargs, workers_per_host=1).rank(0) == 3


def test_func_args_that_is_no_list_is_named(cluster: None) -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"func_args=3: expected a list or tuple, such as \(3,\)"):
        trx.launch(print, wrong)


def test_local_hostname_can_be_asked_for_in_the_result(cluster: None) -> None:
    result = trx.Launcher(hostnames=["localhost"], workers_per_host=1).run(os.getpid)

    assert result.index("localhost", 0) == result.rank(0)


def test_file_that_a_run_writes_does_not_cost_the_next_its_template(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was taken for an env_file that had changed."""
    monkeypatch.chdir(tmp_path)
    launcher = trx.Launcher(workers_per_host=1)

    def write() -> int:
        Path(f"checkpoint{time.time_ns()}").touch()
        return os.getppid()

    assert launcher.run(write).rank(0) == launcher.run(write).rank(0)


def test_sigterm_is_delivered_once(cluster: None, tmp_path: Path) -> None:
    """It went to the group and to its leader: a handler that saves a checkpoint began twice."""

    def count_or_fail() -> None:
        if os.environ["RANK"] == "1":
            assert processes.wait_until((tmp_path / "ready").exists)
            raise ValueError("stop")

        def save(_signum: int, _frame: object) -> None:
            with (tmp_path / "saved").open("a") as file:
                file.write("x")

        signal.signal(signal.SIGTERM, save)
        (tmp_path / "ready").touch()
        time.sleep(1000)

    with trx.Launcher(workers_per_host=2, shutdown_timeout=0.3).session() as session:
        for times in range(1, 9):
            with pytest.raises(ValueError, match="stop"):
                session.run(count_or_fail)
            assert (tmp_path / "saved").read_text() == "x" * times
            (tmp_path / "ready").unlink()


def test_ray_shutdown_while_a_launch_waits_ends_it(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """Whoever waited went on asking, and Ray began another cluster to answer."""
    done = run_script(
        """
import os, time, torchrunx_ray as trx
def begin():
    open("begun", "a").close()
    time.sleep(1000)

launcher = trx.Launcher(workers_per_host=4)
first = launcher.submit(begin)
while not os.path.exists("begun"):
    time.sleep(0.01)
waiting = launcher.submit(begin)
time.sleep(1)  # nothing tells that it waits
ray.shutdown()
for run in (first, waiting):
    try:
        run.result(timeout=30)
    except trx.LaunchError as error:
        print(type(error).__name__)
assert not ray.is_initialized()
"""
    )

    lines = done.stdout.splitlines()
    assert "AgentFailedError" in lines, done.stderr
    assert "ClusterLeft" in lines, done.stderr


@pytest.mark.slow  # Ray looks for the value for 20 s
def test_value_that_is_lost_names_its_rank(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """A raw Ray error came out of `rank`. Lost here with the only node that had it."""
    done = run_script(
        """
ray.shutdown()
from ray.cluster_utils import Cluster
import torchrunx_ray as trx
cluster = Cluster()
cluster.add_node(num_cpus=0, include_dashboard=False)
node = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False)
result = trx.launch(bytearray, (1_000_000,), hostnames=1, workers_per_host=1, linger=0)
cluster.remove_node(node, allow_graceful=False)
try:
    result.rank(0)
except trx.AgentFailedError as error:
    print(str(error).partition(" on ")[0])
"""
    )

    # Ray tells of the node's end on stdout, too.
    assert "the value that rank 0 returned is lost\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("per_worker", "workers", "firsts", "held"),
    [
        (0.4, 3, [0, 0, 1], 2),
        (0.6, 2, [0, 1], 2),
        (0.5, 4, [0, 0, 1, 1], 2),
        (0.25, 4, [0, 0, 0, 0], 1),
        (0.5, 1, [0], 0.5),
        (1, 3, [0, 1, 2], 3),
        (2, 2, [0, 2], 4),
        (0, 2, [], 0),
    ],
)
def test_parts_of_a_gpu_never_span_two(
    per_worker: float, workers: int, firsts: list[int], held: float
) -> None:
    """Three workers of 0.4 were all put on the first of the two GPUs that were held for them."""
    from torchrunx_ray.wire.ranks import first_gpu, gpus_held

    assert gpus_held(per_worker, workers) == held
    assert [first_gpu(per_worker, i) for i in range(workers) if per_worker] == firsts


@pytest.mark.parametrize("how", ["return", "raise", "agent", "cancel"])
def test_what_ended_leaves_rays_store_before_python_collects_garbage(
    cluster: None, how: str, tmp_path: Path
) -> None:
    """Reference cycles kept arguments (killed agent, cancelled run), and values (in a session)."""

    def end(large: torch.Tensor) -> torch.Tensor:
        processes.note(tmp_path / str(os.getpid()), "")
        if how == "raise":
            raise ValueError
        if how == "agent":
            os.kill(processes.agent_pid(), signal.SIGKILL)
        while how != "return":
            time.sleep(0.01)
        return large

    with trx.Launcher(workers_per_host=1).session() as session:
        gc.collect()  # what other tests left
        before = objects_in_store()
        gc.disable()
        try:
            run = session.submit(end, torch.zeros(2**20))
            assert processes.wait_until(lambda: any(tmp_path.iterdir()), 30)
            if how == "cancel":
                run.cancel()
            with contextlib.suppress(ValueError, trx.AgentFailedError, CancelledError):
                run.result(timeout=30)
            del run
            assert processes.wait_until(lambda: objects_in_store() <= before, 5)
        finally:
            gc.enable()


def test_keepers_are_not_in_the_group_that_ray_ends_with_the_agent(launcher: trx.Launcher) -> None:
    """Ray's SIGTERM had it kill the template at its work, and SIGKILL came 0.2 s later.

    Daemons of a worker that took longer to die were left.
    """

    def groups() -> tuple[set[int], int]:
        above = processes.above(os.getpid())
        keepers = above["outer keeper"], above["keeper"]
        return {os.getpgid(pid) for pid in keepers}, above["outer keeper"]

    assert all(groups == {outer} for groups, outer in launcher.run(groups))
