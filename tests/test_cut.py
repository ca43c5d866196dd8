"""The network between two hosts is cut, and the head of the cluster is lost."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters.two_hosts import TwoHosts, namespaces_are_possible, two_hosts
from tests.processes import of_pool, wait_until

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not namespaces_are_possible(), reason="needs root and a kernel that gives namespaces"
    ),
]


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


def link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "trxh2v", state], check=True)


SCRIPT = """
import sys, time
import logging
logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)

def train(seconds, folder):
    with open(f"{folder}/{os.environ['RANK']}", "w") as file:
        file.write(os.environ["TORCHRUNX_RAY_POOL"])
    time.sleep(seconds)
    return int(os.environ["RANK"])

launcher = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=1)
try:
    print("RETURNED", list(launcher.run(train, SECONDS, FOLDER)))
except Exception as error:
    print("RAISED", type(error).__name__, error)
"""


def drive_and(
    hosts: TwoHosts, seconds: float, folder: Path, act: Callable[[], object]
) -> tuple[str, float]:
    """What the driver says when this is done to its run, and how long after that."""
    acted: list[float] = []

    def wait_and_act() -> None:
        assert wait_until(lambda: len(list(folder.iterdir())) == 2, 60)
        act()
        acted.append(time.monotonic())

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    script = SCRIPT.replace("SECONDS", str(seconds)).replace("FOLDER", repr(str(folder)))
    done = hosts.drive(script, timeout_s=200)
    thread.join()
    return done.stdout + done.stderr, time.monotonic() - acted[0]


def test_short_cut_does_no_harm(hosts: TwoHosts, tmp_path: Path) -> None:
    def cut() -> None:
        link("down")
        time.sleep(5)
        link("up")

    said, _took_s = drive_and(hosts, 9, tmp_path, cut)
    assert "RETURNED [0, 1]" in said, said


def test_host_that_is_cut_off_for_good_is_named(hosts: TwoHosts, tmp_path: Path) -> None:
    said, took_s = drive_and(hosts, 1000, tmp_path, lambda: link("down"))

    assert "10.77.0.12 has not answered for 15 s" in said, said
    assert "RAISED AgentFailedError the agent died on 10.77.0.12" in said, said
    assert took_s < 120
    marks = {path.read_text() for path in tmp_path.iterdir()}
    assert len(marks) == 2
    link("up")  # a host that was cut off ends what it has when Ray there finds itself declared dead
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks), 30)


def test_driver_whose_head_is_lost_ends(tmp_path: Path) -> None:
    """Ray itself ends the driver's process, and with it go the agents and all below them."""
    script = tmp_path / "script.py"
    (tmp_path / "marks").mkdir()
    script.write_text(
        f"""
import os, ray, signal, time
import torchrunx_ray as trx
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)

def train():
    with open("{tmp_path}/marks/" + os.environ["RANK"], "w") as file:
        file.write(os.environ["TORCHRUNX_RAY_POOL"])
    time.sleep(1000)

run = trx.Launcher(workers_per_host=2).submit(train)
while len(os.listdir("{tmp_path}/marks")) < 2:
    time.sleep(0.01)
head = ray._private.worker._global_node.all_processes["gcs_server"][0].process.pid
os.kill(head, signal.SIGKILL)
print("the head is killed", flush=True)
try:
    run.result()
except Exception as error:
    print("RAISED", type(error).__name__, error)
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PATH": "/usr/bin:/bin",
            # For so long Ray looks for its head, on all of a CPU; it would be 60 s.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "the head is killed" in done.stdout, done.stderr
    assert "RAISED AgentFailedError" in done.stdout or done.returncode != 0
    marks = [path.read_text() for path in (tmp_path / "marks").iterdir()]
    assert len(marks) == 2
    assert all(marks)
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks), 30)
