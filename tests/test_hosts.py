"""Launches on three raylets: a head with CPUs only, and two nodes of 4 CPUs and 4 (logical) GPUs."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import torchrunx_ray as trx
from tests import processes
from tests.clusters.raylets import raylets
from tests.soon import SOON_S, soon
from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.placing import gpu_question, returning
from torchrunx_ray.driver.placing.plan import resolve


@pytest.fixture(scope="module")
def three_raylets() -> Iterator[Cluster]:
    gpu_nodes = [
        {
            "num_cpus": 4,
            "num_gpus": 4,
            "resources": {"fast": 1, f"accelerator_type:{kind}": 1},
            "labels": {"zone": zone},
        }
        for zone, kind in (("a", "T4"), ("b", "H100"))
    ]
    with raylets({"num_cpus": 2}, *gpu_nodes) as cluster:
        yield cluster


def place() -> tuple[int, int, str]:
    return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), os.environ["GROUP_RANK"]


def gpus() -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def raylet_pid() -> int:
    return processes.parent(processes.agent_pid())


def node_of(raylet: int) -> str:
    arguments = processes.command_line(raylet).split()
    return next(
        node["NodeID"]
        for node in ray.nodes()
        if f"--raylet_socket_name={node['RayletSocketName']}" in arguments
    )


def nodes(**resources: float) -> list[dict[str, Any]]:
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(k) == v for k, v in resources.items())
    ]


def test_auto_takes_the_nodes_with_gpus_and_a_worker_per_gpu(three_raylets: Cluster) -> None:
    result = trx.Launcher(backend="gloo").run(gpus)

    assert list(result) == ["0,1,2,3"] * 8
    assert len(result.hostnames) == 2


@pytest.mark.exhaustive
def test_auto_hosts_with_a_number_of_workers_leaves_the_cpu_head_out(
    three_raylets: Cluster,
) -> None:
    assert len(trx.Launcher(workers_per_host=1, backend="gloo").run(gpus).hostnames) == 2


@pytest.mark.slow
def test_cpu_workers_are_on_every_node_and_see_no_gpu(three_raylets: Cluster) -> None:
    result = trx.Launcher(workers_per_host="cpu").run(gpus)

    assert sorted(map(len, result.results.values())) == [2, 4, 4]
    assert set(result) == {""}


@pytest.mark.parametrize(
    ("workers", "per_worker", "held"),
    [
        pytest.param(2, None, 2, id="some"),
        pytest.param(4, 0.5, 2, id="halves"),
        pytest.param(8, None, 0, id="more workers than GPUs"),
        pytest.param(1, 2, 2, id="one worker with two", marks=pytest.mark.exhaustive),
        pytest.param(3, 0.5, 2, id="three halves", marks=pytest.mark.exhaustive),
        pytest.param(1, 0.5, 1, id="half", marks=pytest.mark.exhaustive),
    ],
)
def test_gpus_held_on_a_host(
    three_raylets: Cluster, workers: int, per_worker: float | None, held: int
) -> None:
    launcher = trx.Launcher(
        hostnames=1, workers_per_host=workers, gpus_per_worker=per_worker, backend="gloo"
    )

    seen = set(launcher.run(gpus))
    assert len(seen) == 1
    assert len([i for i in seen.pop().split(",") if i]) == held


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


def test_launches_side_by_side_never_see_the_same_gpu(three_raylets: Cluster) -> None:
    (node, _) = nodes(GPU=4)
    launcher = trx.Launcher(hostnames=[node["NodeID"]], workers_per_host=2, backend="gloo")
    with launcher.session() as one, launcher.session() as other:
        first, second = one.run(gpus).rank(0), other.run(gpus).rank(0)

    assert sorted([*first.split(","), *second.split(",")]) == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_unequal_counts(three_raylets: Cluster) -> None:
    result = trx.Launcher(hostnames=3, workers_per_host=[1, 3, 2]).run(place)

    assert [len(values) for values in result.results.values()] == [1, 3, 2]
    assert [where[1] for where in result] == [0, 0, 1, 2, 0, 1]


@pytest.mark.slow
def test_label_selector_and_further_resources(three_raylets: Cluster) -> None:
    (in_b,) = [n["NodeID"] for n in nodes() if n["Labels"].get("zone") == "b"]
    launcher = trx.Launcher(
        label_selector={"zone": "!in(a, c)"}, workers_per_host=1, gpus_per_worker=0, backend=None
    )
    # The head has no zone at all, which is not "a" either; the fast nodes do.
    fast = trx.Launcher(
        hostnames=1,
        label_selector={"zone": "in(b, c)"},
        resources_per_host={"fast": 1},
        workers_per_host=1,
        gpus_per_worker=0,
        backend=None,
    )
    assert [node_of(raylet) for raylet in launcher.run(raylet_pid)] == [in_b]
    assert [node_of(raylet) for raylet in fast.run(raylet_pid)] == [in_b]


@pytest.mark.slow
def test_accelerator_type(three_raylets: Cluster) -> None:
    (in_b,) = [n["NodeID"] for n in nodes() if n["Labels"].get("zone") == "b"]
    launcher = trx.Launcher(workers_per_host="gpu", accelerator_type="H100", backend="gloo")

    assert [node_of(raylet) for raylet in launcher.run(raylet_pid)] == [in_b] * 4


def test_accelerator_type_that_no_node_has(three_raylets: Cluster) -> None:
    launcher = trx.Launcher(hostnames=1, workers_per_host=1, accelerator_type="TPU-V9000")

    with pytest.raises(trx.PlacementError) as caught:
        launcher.run(place)
    assert "no node has accelerator_type='TPU-V9000'; there are: H100, T4." in str(caught.value)
    assert (
        "Change label_selector or accelerator_type to what a node has, or add a matching node."
        in str(caught.value)
    )
    assert "fewer hosts" not in str(caught.value)


def test_what_ray_makes_of_an_accelerator_type_is_in_no_message(three_raylets: Cluster) -> None:
    launcher = trx.Launcher(
        hostnames=1, workers_per_host=5, gpus_per_worker=1, accelerator_type="H100"
    )
    with pytest.raises(trx.PlacementError) as caught:
        launcher.run(place)

    message = str(caught.value)
    assert "wanted: 1 x (5 CPU, 5 GPU, accelerator type H100)\n" in message
    assert "0.001" not in message
    assert "accelerator_type:" not in message
    assert "4 of 4 CPU, 4 of 4 GPU free, accelerator type H100\n" in message


def test_label_that_no_node_has(three_raylets: Cluster) -> None:
    selector = {"zone": "mars", "planet": "!in(earth)"}
    with pytest.raises(trx.PlacementError) as caught:
        trx.Launcher(hostnames=1, workers_per_host=1, label_selector=selector).run(place)
    assert (
        f"no node matches label_selector={selector!r}; the nodes have: zone a, b; planet (none)."
        in str(caught.value)
    )
    assert (
        "Change label_selector or accelerator_type to what a node has, or add a matching node."
        in str(caught.value)
    )


def test_accelerator_that_only_nodes_without_the_label_have(three_raylets: Cluster) -> None:
    launcher = trx.Launcher(
        workers_per_host="gpu", accelerator_type="H100", label_selector={"zone": "a"}
    )

    with pytest.raises(
        trx.PlacementError,
        match=r"no node that matches label_selector={'zone': 'a'} has accelerator_type='H100'; there are: T4",
    ):
        launcher.run(place)


@pytest.mark.slow
def test_hosts_by_node_id_are_taken_in_order(three_raylets: Cluster) -> None:
    ids = [node["NodeID"] for node in nodes(GPU=4)]
    launcher = trx.Launcher(hostnames=ids[::-1], workers_per_host=1, backend="gloo")

    assert launcher.run(place).hostnames == tuple(ids[::-1])


def test_one_node_by_two_names_is_refused(three_raylets: Cluster) -> None:
    mine = ray.get_runtime_context().get_node_id()
    for other in (mine, "127.0.0.1"):
        with pytest.raises(ValueError, match="are the same node"):
            trx.Launcher(hostnames=["localhost", other], workers_per_host=1).run(place)


@pytest.mark.parametrize("change", [str, str.upper, str.title])
def test_hostnames_ignore_case_and_loopback_names_mean_the_drivers_host(
    three_raylets: Cluster, change: Callable[[str], str]
) -> None:
    there = inventory.live_nodes()
    mine = ray.get_runtime_context().get_node_id()
    names = ("localhost", "127.0.0.1", "127.0.1.1", "::1", socket.gethostname())
    for name in names:
        options = trx.Launcher(hostnames=[change(name)], workers_per_host=1)
        (host,) = resolve(options, there, mine).hosts
        assert host.node is not None
        assert host.node.node_id == mine, name


def test_list_of_counts_must_have_one_for_each_host(three_raylets: Cluster) -> None:
    with pytest.raises(ValueError, match="has 3 numbers, but the launch has 2 hosts"):
        trx.Launcher(hostnames="auto", workers_per_host=[1, 1, 1], backend="gloo").run(place)


@pytest.mark.slow
def test_two_agents_on_one_node_do_not_disturb_each_other(three_raylets: Cluster) -> None:
    launcher = trx.Launcher(
        hostnames=2, workers_per_host=2, placement_strategy="STRICT_PACK", gpus_per_worker=0
    )

    result = launcher.run(place)
    assert [where[0] for where in result] == [0, 1, 2, 3]
    assert len(result.hostnames) == 2


def test_impossible_is_said_at_once_with_the_numbers(three_raylets: Cluster) -> None:
    with soon(), pytest.raises(trx.PlacementError) as caught:
        trx.Launcher(hostnames=2, workers_per_host=1, gpus_per_worker=8).run(place)

    assert "a host needs 8 GPU; the largest node has 4" in str(caught.value)
    assert "wanted: 2 x (1 CPU, 8 GPU)" in str(caught.value)
    assert len(caught.value.total) == 3
    assert len(caught.value.free) == 3


def test_more_hosts_than_nodes_is_impossible(three_raylets: Cluster) -> None:
    with pytest.raises(
        trx.PlacementError, match=r"5 hosts are wanted, each on a separate node .* has 3 nodes"
    ):
        trx.Launcher(hostnames=5, workers_per_host=1).run(place)
    in_a = {"label_selector": {"zone": "a"}}
    with pytest.raises(trx.PlacementError, match=r"2 hosts are wanted, .* 1 node that matches"):
        trx.Launcher(hostnames=2, workers_per_host=4, **in_a).run(place)
    with pytest.raises(
        trx.PlacementError, match=r"3 hosts are wanted, .* only 2 nodes could hold one"
    ):
        trx.Launcher(hostnames=3, workers_per_host=1, gpus_per_worker=1).run(place)


@pytest.mark.slow
def test_busy_cluster_is_waited_for_and_said(
    three_raylets: Cluster, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    launcher = trx.Launcher(hostnames=2, workers_per_host=4, backend="gloo")
    with caplog.at_level(logging.INFO, "torchrunx_ray"), launcher.session():
        waiting = launcher.submit(place)
        assert processes.wait_until(lambda: "waiting for room" in caplog.text, 10)
        assert not waiting.done()
    assert len(waiting.result(timeout=30)) == 8

    assert "wanted: 2 x (4 CPU, 4 GPU)" in caplog.text
    assert "0 of 4 CPU, 0 of 4 GPU free" in caplog.text
    assert "launching on 2 hosts (" in caplog.text
    assert "8 workers, 8 GPUs, backend gloo" in caplog.text


def test_placement_timeout_leaves_no_demand_behind(three_raylets: Cluster) -> None:
    launcher = trx.Launcher(hostnames=2, workers_per_host=4, backend="gloo", placement_timeout=0.5)
    with launcher.session():
        begun = time.monotonic()
        with pytest.raises(trx.PlacementError, match=r"placement_timeout=0\.5 s") as caught:
            launcher.run(place)
        assert 0.4 < time.monotonic() - begun < SOON_S
    assert {"CPU": 0.0} in [{"CPU": free.get("CPU", 0.0)} for free in caught.value.free.values()]

    table = ray.util.placement_group_table()
    assert {group["state"] for group in table.values()} == {"REMOVED"}


@pytest.mark.slow
def test_unused_gpus_are_mentioned(
    three_raylets: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torchrunx_ray"):
        trx.Launcher(hostnames=1, workers_per_host=1, backend="gloo").run(place)

    assert "3 GPUs of these hosts stay unused" in caplog.text


@pytest.mark.slow
def test_slurm(three_raylets: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in scontrol."""
    ids = [node["NodeID"] for node in nodes(GPU=4)]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\n[ \"$*\" = 'show hostnames gpu[1-2]' ] && printf '%s\\n' {' '.join(ids)}\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "3,2")
    launcher = trx.Launcher(hostnames="slurm", workers_per_host="slurm", backend="gloo")

    by_cpus = launcher.run(place)
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "a100:4")
    by_gpus = launcher.run(gpus)

    assert by_cpus.hostnames == by_gpus.hostnames == tuple(ids)
    assert [len(values) for values in by_cpus.results.values()] == [3, 2]
    assert list(by_gpus) == ["0,1,2,3"] * 8


@pytest.mark.slow
def test_slurm_outside_of_an_allocation(
    three_raylets: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)

    with pytest.raises(RuntimeError, match="outside of a Slurm allocation"):
        trx.Launcher(hostnames="slurm", workers_per_host=1).run(place)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_twenty_launches_from_eight_threads(three_raylets: Cluster) -> None:
    launcher = trx.Launcher(
        hostnames=1, workers_per_host=2, cpus_per_worker=0.1, gpus_per_worker=0, backend="gloo"
    )

    def launch(number: int) -> list[int]:
        return list(launcher.run(lambda: number))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(launch, range(20))) == [[i, i] for i in range(20)]


@pytest.mark.slow
def test_two_drivers_on_one_cluster(three_raylets: Cluster) -> None:
    script = """
import sys, ray, torchrunx_ray as trx
ray.init(address=sys.argv[1], log_to_driver=False)
launcher = trx.Launcher(hostnames=2, workers_per_host=1, gpus_per_worker=0, backend="gloo")
for i in range(3):
    assert list(launcher.run(lambda: i)) == [i, i]
"""
    command = [sys.executable, "-c", script, three_raylets.address]

    def drive(_: int) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in pool.map(drive, range(2)):
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_launch_inside_a_ray_task_and_an_actor(three_raylets: Cluster) -> None:
    def launch() -> list[int]:
        import torchrunx_ray as trx

        launcher = trx.Launcher(hostnames=1, workers_per_host=2, gpus_per_worker=0)
        return list(launcher.run(lambda: int(os.environ["RANK"])))

    class Trainer:
        def train(self) -> list[int]:
            return launch()

    task: Any = ray.remote(num_cpus=0)(launch)
    actor: Any = ray.remote(num_cpus=0)(Trainer)
    trainer = actor.remote()
    assert ray.get([task.remote(), trainer.train.remote()]) == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_node_that_comes_back_while_it_is_asked_which_ones_left_is_taken(
    three_raylets: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.3"}
    three_raylets.remove_node(three_raylets.add_node(**passing), allow_graceful=True)
    ask = returning.nodes_that_left
    asked, is_back = threading.Event(), threading.Event()

    async def ask_late(connection: Connection) -> list[Node]:
        asked.set()
        await asyncio.to_thread(is_back.wait, 30)
        return await ask(connection)

    monkeypatch.setattr(returning, "nodes_that_left", ask_late)
    launcher = trx.Launcher(hostnames=["127.0.0.3"], workers_per_host=1, backend=None, linger=0)
    run = launcher.submit(os.getpid)
    assert asked.wait(30)
    node = three_raylets.add_node(**passing)
    is_back.set()
    try:
        assert run.result(timeout=60).hostnames == ("127.0.0.3",)
    finally:
        three_raylets.remove_node(node, allow_graceful=True)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_node_that_left_a_moment_ago_is_waited_for(
    three_raylets: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing: dict[str, Any] = {
        "num_cpus": 2,
        "resources": {"passing": 1},
        "labels": {"zone": "c"},
        "node_ip_address": "127.0.0.2",
    }
    by_name = trx.Launcher(hostnames=["127.0.0.2"], workers_per_host=1, backend=None)
    by_label = trx.Launcher(workers_per_host="cpu", label_selector={"zone": "c"}, backend=None)
    launchers = [
        by_name,
        dataclasses.replace(by_label, cpus_per_worker=0.1),
        dataclasses.replace(by_name, hostnames=1, resources_per_host={"passing": 1}),
    ]
    node = three_raylets.add_node(**passing)
    by_id = dataclasses.replace(by_name, hostnames=[nodes(passing=1)[0]["NodeID"]])
    session = by_name.session()
    session.run(os.getpid)
    runs = [dataclasses.replace(by_name, cpus_per_worker=2).submit(os.getpid)]
    assert processes.wait_until(lambda: "waiting for room" in caplog.text, 10)

    three_raylets.remove_node(node, allow_graceful=True)
    with pytest.raises(trx.PlacementError, match="is not a live node"):
        by_id.run(os.getpid)  # its successor has another id
    with monkeypatch.context() as patched:
        patched.setattr(returning, "WAIT_S", 0)
        for launcher in launchers:
            with pytest.raises(trx.PlacementError):
                launcher.run(os.getpid)
    caplog.clear()
    runs += [session.submit(os.getpid), *(launcher.submit(os.getpid) for launcher in launchers)]
    left = r"127\.0\.0\.2, \w+\) left the cluster \d+ s ago\. The launch waits for such a node"
    assert processes.wait_until(lambda: re.search(left, caplog.text) is not None, 20), caplog.text
    assert not any(run.done() for run in runs)

    three_raylets.add_node(**passing)
    for run in runs[1:]:
        assert run.result(timeout=60).hostnames[0] in ("127.0.0.2", socket.gethostname())
    session.close()
    assert len(runs[0].result(timeout=60)) == 1
    assert not [
        node for node in inventory.left_nodes() if "passing" in node.resources
    ]  # it is back


@pytest.mark.parametrize(("strategy", "nodes_used"), [("SPREAD", 2), ("PACK", 1)])
def test_hosts_are_preferably_apart_or_together(
    three_raylets: Cluster, strategy: Any, nodes_used: int
) -> None:
    total = ray.cluster_resources()["CPU"]  # a node that Ray takes for full changes what it prefers
    assert processes.wait_until(lambda: ray.available_resources().get("CPU") == total)
    launcher = trx.Launcher(
        hostnames=2,
        placement_strategy=strategy,
        workers_per_host=1,
        gpus_per_worker=0,
        backend=None,
        preload=(),
    )

    assert len(set(launcher.run(raylet_pid))) == nodes_used


HOLDS_THE_QUESTION = """
import os, sys, time

class Holds:
    # Holds the first process for ever, and no other.

    def find_spec(self, name, path=None, target=None):
        if name == "torchrunx_ray.driver":
            try:
                os.mkdir(HELD)
            except FileExistsError:
                return None
            time.sleep(1000)
        return None

HELD = os.path.join(os.path.dirname(__file__), "held")
sys.meta_path.insert(0, Holds())
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_question_for_gpus_that_is_not_answered_is_named_and_asked_again(
    three_raylets: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error named Ray's head; and later runs waited for the old task, which held the GPUs."""
    (tmp_path / "sitecustomize.py").write_text(HOLDS_THE_QUESTION)
    launcher = trx.Launcher(
        hostnames=1,
        workers_per_host=2,
        gpus_per_worker=1,
        backend=None,
        preload=(),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    with launcher.session() as session:
        with monkeypatch.context() as patched:
            patched.setattr(gpu_question, "_ANSWER_S", 1.0)
            with pytest.raises(trx.AgentFailedError, match=r"GPU ids has not answered for 1 s"):
                session.submit(gpus).result(timeout=60)
        assert (tmp_path / "held").exists()
        assert list(session.submit(gpus).result(timeout=60)) == ["0,1", "0,1"]


BREAKS_THE_QUESTION = """
import os, sys

class Breaks:
    def find_spec(self, name, path=None, target=None):
        if name == "torchrunx_ray.driver" and os.path.exists(BROKEN):
            raise ImportError("the disk is away")
        return None

BROKEN = os.path.join(os.path.dirname(__file__), "broken")
sys.meta_path.insert(0, Breaks())
"""


@pytest.mark.slow
def test_failed_question_for_gpus_fails_its_run_only(
    three_raylets: Cluster, tmp_path: Path
) -> None:
    """Ray answers it by a task, in a process that imports us."""
    (tmp_path / "sitecustomize.py").write_text(BREAKS_THE_QUESTION)
    (tmp_path / "broken").touch()
    launcher = trx.Launcher(
        hostnames=1,
        workers_per_host=2,
        gpus_per_worker=1,
        backend=None,
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    with launcher.session() as session:
        with pytest.raises(
            trx.AgentFailedError, match="the task that asks Ray for the launch's GPU ids failed"
        ):
            session.run(gpus)
        (tmp_path / "broken").unlink()
        assert list(session.run(gpus)) == ["0,1", "0,1"]


def test_killed_raylet_is_told_at_once(three_raylets: Cluster, tmp_path: Path) -> None:
    """Last in this module: it takes a node away. Ray itself tells after 15 s or more."""

    def announce_and_sleep() -> None:
        processes.note(tmp_path / os.environ["RANK"], f"{raylet_pid()} {processes.own_mark()}")
        time.sleep(1000)

    launcher = trx.Launcher(hostnames=2, workers_per_host=1, gpus_per_worker=1, backend="gloo")
    run = launcher.submit(announce_and_sleep)
    assert processes.wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 90)
    raylet, mark = (tmp_path / "1").read_text().split()
    assert "raylet" in processes.command_line(int(raylet))
    os.kill(int(raylet), signal.SIGKILL)

    with soon(), pytest.raises(trx.AgentFailedError, match="raylet") as caught:
        run.result(timeout=60)
    assert caught.value.hostname.endswith("#1")
    assert processes.wait_until(lambda: not processes.of_pool(mark))
