"""Through ray:// the driver is no process of the cluster: what holds there all the same."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.client_server import ClientServer, Drive, client_server, one_driver
from tests.clusters.other_python import python_without
from tests.clusters.shifted_clock import compiler, shifted_clock
from tests.processes import mentioning, of_pool, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head() -> Iterator[ClientServer]:
    with client_server() as head:
        yield head


@pytest.fixture(scope="module")
def drive(head: ClientServer) -> Iterator[Drive]:
    """Run a script in a driver that has run others before."""
    with one_driver(head) as drive:
        yield drive


@pytest.mark.exhaustive
def test_core_works_through_ray_client(head: ClientServer) -> None:
    tests = ["-m", "pytest", "-v", "--timeout=150", "tests/test_core.py"]
    done = subprocess.run(
        [sys.executable, *tests, f"--address={head.address}"],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_leases_outlast_the_interruption_that_ray_allows(drive: Drive) -> None:
    done = drive(
        """
def renewed_lease_s():
    from tests.leases import page_of, until_renewed
    from torchrunx_ray.wire.clock import boot_ns
    until_renewed(os.getpid(), 12)
    return (page_of(os.getpid()).expires_at_ns - boot_ns()) / 1e9

launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1, host_timeout=3)
print(10 < launcher.run(renewed_lease_s).rank(0) <= 12)
"""
    )

    assert done.stdout == "True\n", done.stderr


def test_tensors_and_references_travel(drive: Drive) -> None:
    done = drive(
        """
import numpy, torch
launcher = trx.Launcher(workers_per_host=2, backend=None)
big = torch.arange(5_000_000)

def double(tensor, array):
    rank = int(os.environ["RANK"])
    return {"tensor": tensor.mul_(2) + rank, "array": array + rank}

first = launcher.run(double, big, numpy.ones(1000))
for rank, value in enumerate(first):
    assert torch.equal(value["tensor"], big * 2 + rank)
    value["tensor"].add_(1)  # the driver's own copy
    assert value["array"].sum() == 1000 + 1000 * rank
assert torch.equal(ray.get(first.ref(1))["tensor"], first.rank(1)["tensor"])

def look(value, other):
    return int(value["tensor"].sum()), other["deep"][0].sum().item()

of_task = ray.remote(num_cpus=0)(lambda: numpy.ones(5)).remote()
second = launcher.run(look, first.ref(0), {"deep": [of_task]})
print(list(second) == [(int((big * 2).sum()), 5.0)] * 2)
print(launcher.run(lambda array: float(array.sum()), ray.put(numpy.ones(7))).rank(0))
"""
    )

    assert done.stdout == "True\n7.0\n", done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_what_cannot_travel_is_named_by_its_path(drive: Drive) -> None:
    done = drive(
        """
import threading
launcher = trx.Launcher(workers_per_host=1, backend=None, preload=())

@ray.remote(num_cpus=0)
class Counter: ...

def fails():
    raise OSError("no value")

for call in (
    lambda: launcher.run(print, {"lock": threading.Lock()}),
    lambda: launcher.run(threading.Lock),
    lambda: launcher.run(print, Counter.remote()),
    lambda: launcher.run(print, ray.remote(num_cpus=0, max_retries=0)(fails).remote()),
):
    try:
        call()
    except trx.PayloadError as error:
        print(error.path, error.step)
"""
    )

    assert done.stdout.splitlines() == [
        "args[0]['lock'] pickle",
        "the return value pickle",
        "args[0] pickle",
        "an ObjectRef in the arguments fetch",
    ], done.stdout + done.stderr


def test_output_arrives_on_the_console_and_in_files_where_the_driver_is(
    head: ClientServer, tmp_path: Path
) -> None:
    done = head.drive(
        """
def speak():
    print("rank", os.environ["RANK"])
    print("an error", file=sys.stderr)

trx.launch(speak, workers_per_host=2, backend=None, preload=())
""",
        cwd=tmp_path,
        TORCHRUNX_LOG_DIR="logs",
    )

    assert done.stdout == "rank 0\n", done.stderr
    assert done.stderr.count("an error") == 1
    files = sorted((tmp_path / "logs" / "latest").glob("*[[]*.log"))
    texts = [path.read_text() for path in files]
    assert ["rank 0" in texts[0], "rank 1" in texts[1]] == [True, True]


def test_launch_that_waits_shows_what_is_free(drive: Drive) -> None:
    done = drive(
        """
without_torch = {"backend": None, "preload": ()}
with trx.Launcher(workers_per_host=3, **without_torch).session():
    try:
        trx.launch(print, workers_per_host=2, placement_timeout=1, **without_torch)
    except trx.PlacementError as error:
        print(error)
try:
    trx.launch(print, workers_per_host=5, cpus_per_worker=1)
except trx.PlacementError as error:
    print(error)
"""
    )

    assert "1 of 4 CPU" in done.stdout, done.stdout + done.stderr
    assert "a host needs 5 CPU; the largest node has 4" in done.stdout


@pytest.mark.exhaustive
def test_failed_run_is_restarted_and_may_change_its_size(drive: Drive) -> None:
    """The questions about nodes are asked inside the cluster."""
    done = drive(
        """
import signal
from tests.processes import agent_pid

def fail(how):
    attempt = trx.context().attempt
    if attempt == 0 and how == "raise":
        raise ValueError
    if attempt == 0:
        os.kill(agent_pid(), signal.SIGKILL)
        time.sleep(1000)
    return attempt, trx.context().world_size

options = dict(workers_per_host=1, backend=None, max_restarts=1, placement_strategy="PACK")
for hosts in (1, (1, 2)):
    for how in ("raise", "kill"):
        launcher = trx.Launcher(hostnames=hosts, cpus_per_worker=2, **options)
        print(*launcher.run(fail, how))
"""
    )

    assert done.stdout.splitlines() == [
        "(1, 1)",
        "(1, 1)",
        "(1, 2) (1, 2)",
        "(1, 2) (1, 2)",
    ], done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_localhost_is_the_head(drive: Drive) -> None:
    done = drive(
        "without_torch = {'backend': None, 'preload': ()}\n"
        "print(trx.launch(os.getpid, hostnames=['localhost'], workers_per_host=1, **without_torch).hostnames)"
    )

    assert done.stdout == "('localhost',)\n", done.stderr


def test_working_dir_brings_the_drivers_modules(head: ClientServer, tmp_path: Path) -> None:
    (tmp_path / "own_module.py").write_text("def train():\n    return open('data.txt').read()\n")
    (tmp_path / "data.txt").write_text("of the driver")
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import torchrunx_ray as trx
import ray
ray.init({head.address!r}, runtime_env={{"working_dir": "."}}, log_to_driver=False)
import own_module
print(trx.launch(own_module.train, workers_per_host=1, backend=None, preload=()).rank(0))
"""
    )
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.stdout == "of the driver\n", done.stderr


def test_env_file_of_the_drivers_machine_is_told_to_be_read_on_the_hosts(drive: Drive) -> None:
    done = drive(
        """
try:
    trx.launch(print, workers_per_host=1, env_file="/of/the/laptop/env")
except trx.LaunchError as error:
    print(error)
"""
    )

    assert "env_file='/of/the/laptop/env': No such file or directory" in done.stdout, done.stderr
    assert (
        "The file is read on every host of the launch, not on the driver's machine" in done.stdout
    )


SLEEPING = """
def sleep(seconds):
    print("mark", os.environ["TORCHRUNX_RAY_POOL"], flush=True)
    time.sleep(seconds)

launcher = trx.Launcher(workers_per_host=2, backend=None, preload=(), console_ranks="all")
"""


def marks_in(text: str) -> list[str]:
    return re.findall(r"mark (\w+)", text)


@contextlib.contextmanager
def sleeping_driver(
    head: ClientServer, begin: str, **variables: str
) -> "Iterator[tuple[subprocess.Popen[str], list[str]]]":
    """A driver whose two workers sleep, and the marks of what they belong to."""
    with subprocess.Popen(
        head.command(SLEEPING + begin),
        env=head.environment | {"PYTHONFAULTHANDLER": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as driver:
        try:
            assert driver.stdout is not None
            said = ""
            while len(marks_in(said)) < 2:
                line = driver.stdout.readline()
                assert line, said
                said += line
            yield driver, marks_in(said)
        finally:
            driver.kill()


def test_ctrl_c_stops_the_workers_and_the_driver_launches_again(head: ClientServer) -> None:
    begin = """
try:
    launcher.run(sleep, 1000)
except KeyboardInterrupt as error:
    print("INTERRUPTED")
print(len(launcher.run(os.getpid)))
"""
    with sleeping_driver(head, begin) as (driver, marks):
        driver.send_signal(signal.SIGINT)
        said, _ = driver.communicate(timeout=60)

    assert driver.returncode == 0, said
    # test_ctrl_c.py has the ranks' stacks; on a busy machine they may come too late for this.
    assert "INTERRUPTED" in said
    assert said.endswith("2\n")
    assert "Traceback" not in said, said
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks), 10)


@pytest.mark.parametrize("end", [pytest.param("SIGTERM", marks=pytest.mark.exhaustive), "SIGKILL"])
def test_driver_that_is_killed_leaves_nothing_after_the_grace_period(
    head: ClientServer, end: str
) -> None:
    with sleeping_driver(head, "launcher.run(sleep, 1000)") as (driver, marks):
        assert of_pool(marks[0])
        driver.send_signal(signal.Signals[end])
        driver.wait(30)

        assert wait_until(lambda: not any(of_pool(mark) for mark in marks), 30)


def test_cancelled_run_leaves_no_traceback(drive: Drive) -> None:
    done = drive(
        SLEEPING
        + """
import concurrent.futures
for _ in range(3):
    run = launcher.submit(sleep, 1000)
    while "running" not in repr(run):
        time.sleep(0.01)
    run.cancel()
    try:
        run.result(timeout=60)
    except concurrent.futures.CancelledError:
        print("CANCELLED")
"""
    )

    assert done.stdout.count("CANCELLED") == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Callback error" not in done.stderr


@pytest.mark.skipif(compiler() is None, reason="needs a C compiler for a clock that is wrong")
@pytest.mark.parametrize("shift_s", [100, pytest.param(-100, marks=pytest.mark.exhaustive)])
def test_drivers_clock_may_be_wrong(head: ClientServer, shift_s: int, tmp_path: Path) -> None:
    """Ranks that the launch itself had stopped counted as failures that came first."""
    done = head.drive(
        """
def fail():
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        raise ValueError("first")
    time.sleep(1000)

launcher = trx.Launcher(workers_per_host=2, backend=None, preload=())
print(time.time())
try:
    launcher.run(fail)
except ValueError as error:
    print(len(error.__cause__.failures))
timings = launcher.run(time.sleep, 0.5).timings
print(0.4 < timings["run"] < 30 and all(0 <= seconds < 30 for seconds in timings.values()), timings)
""",
        **shifted_clock(shift_s, tmp_path),
    )

    lines = done.stdout.splitlines()
    assert lines[1] == "1", done.stdout + done.stderr
    assert lines[2].startswith("True"), lines[2]


def test_driver_of_several_connections_is_told_what_to_do(head: ClientServer) -> None:
    """The launch started a Ray of its own, and failed."""
    done = head.drive(
        f"""
ray.shutdown()
with ray.init({head.address!r}, allow_multiple=True):
    try:
        trx.launch(print, workers_per_host=1)
    except trx.LaunchError as error:
        print(error)
"""
    )

    assert "allow_multiple=True) connects only one thread" in done.stdout, done.stderr


def test_connection_that_is_lost_ends_the_run_with_words(head: ClientServer) -> None:
    begin = """
try:
    launcher.run(sleep, 1000)
except trx.LaunchError as error:
    print("LOST", type(error).__name__, error)
try:
    launcher.run(os.getpid)
except trx.LaunchError as error:
    print("AGAIN", error)
ray.shutdown()
try:
    launcher.run(os.getpid)
except trx.LaunchError as error:
    print("AFTER SHUTDOWN", error)
"""
    of_others = servers_of(head)
    with sleeping_driver(head, begin) as (driver, marks):
        for server in set(servers_of(head)) - set(of_others):
            os.kill(server, signal.SIGKILL)
        said, _ = driver.communicate(timeout=90)

        assert "LOST" in said, said
        assert "ray:// connection to the Ray cluster ended before the run did" in said
        not_at_home = "this process was connected to its Ray cluster through ray://, and the connection has ended"
        assert f"AGAIN {not_at_home}" in said
        assert f"AFTER SHUTDOWN {not_at_home}" in said, (driver.returncode, said)
        assert "Callback error" not in said
        assert wait_until(lambda: not any(of_pool(mark) for mark in marks), 30)


def test_driver_with_a_token_on_a_cluster_without_one_is_told_so(
    head: ClientServer, tmp_path: Path
) -> None:
    """Any local Ray of the user writes ~/.ray/auth_token, which later drivers then send."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    script = dataclasses.replace(head, address=head.of_head)
    done = script.drive(
        "trx.launch(print, hostnames=1, workers_per_host=1)",
        HOME=str(tmp_path),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN="",
    )

    assert "AgentFailedError: the agent could not be started on" in done.stderr
    assert done.stderr.strip().endswith(
        "This driver has a token (from ~/.ray/auth_token), and the cluster may have been started without a token. "
        "Restart the cluster with the token, or set RAY_AUTH_MODE=disabled for this script."
    )


def servers_of(head: ClientServer) -> list[int]:
    """The processes on the head that stand for its drivers."""
    return [pid for pid, line in mentioning(head.mark).items() if "--mode=specific-server" in line]


@pytest.mark.exhaustive
def test_cluster_without_the_package_is_told_with_what_to_install(tmp_path: Path) -> None:
    """It was a bare ModuleNotFoundError, of what the driver has."""
    with client_server(python_without("torchrunx_ray", tmp_path)) as head:
        done = head.drive("trx.launch(print, workers_per_host=1)")

    assert (
        "LaunchError: On the head of the Ray cluster: torchrunx-ray is not installed" in done.stderr
    )
    assert "ray.init(runtime_env={'pip': [...]})" in done.stderr


def test_command_runs_a_script_from_outside_the_cluster(head: ClientServer, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys\nsys.stdout.write(f\"rank {os.environ['RANK']}\\n\")\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torchrunx_ray", "--nproc-per-node=2", "train.py"],
        env={**head.environment, "RAY_ADDRESS": head.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert sorted(done.stdout.splitlines()) == ["rank 0", "rank 1"], done.stderr
    assert done.returncode == 0
