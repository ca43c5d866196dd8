"""Two hosts with addresses of their own: network namespaces on a bridge, a raylet in each.

The driver runs inside the first one, as a script.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

RAY = str(Path(sys.executable).with_name("ray"))
BRIDGE = "trxbr0"
IPS = {"trxh1": "10.77.0.11", "trxh2": "10.77.0.12"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def namespaces_are_possible() -> bool:
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and done.returncode == 0


pytestmark = pytest.mark.skipif(
    not namespaces_are_possible(), reason="needs root and a kernel that gives network namespaces"
)


@contextlib.contextmanager
def network() -> Iterator[None]:
    take_down()
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for host, address in IPS.items():
            ip("netns", "add", host)
            ip("link", "add", f"{host}v", "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", f"{host}v", "master", BRIDGE, "up")
            for command in (
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                "link set lo up",
            ):
                ip("-n", host, *command.split())
        yield
    finally:
        take_down()


def take_down() -> None:
    for host in IPS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


@dataclass
class TwoHosts:
    environment: dict[str, str]

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        """A driver on the first host; `ray` and `trx` are imported, and Ray is joined."""
        head = "import os, ray, torchrunx_ray as trx\nray.init(log_to_driver=False)\n"
        return subprocess.run(
            ["ip", "netns", "exec", "trxh1", sys.executable, "-c", head + script],
            env={**self.environment, "RAY_ADDRESS": f"{IPS['trxh1']}:6379"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[TwoHosts]:
    with tempfile.TemporaryDirectory(prefix="trx") as folder, network():
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        head, worker = (
            [RAY, "start", f"--node-ip-address={address}", "--num-cpus=4", "--block"]
            for address in IPS.values()
        )
        head += ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
        worker += [f"--address={IPS['trxh1']}:6379"]
        raylets = [
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for host, command in zip(IPS, (head, worker), strict=True)
        ]
        hosts = TwoHosts(environment)
        wait = "import time\nwhile len(ray.nodes()) < 2: time.sleep(0.1)"
        try:
            assert hosts.run(wait).returncode == 0
            yield hosts
        finally:
            for raylet in raylets:
                raylet.terminate()
            for raylet in raylets:
                raylet.wait(30)


@pytest.fixture
def run(two_hosts: TwoHosts) -> Callable[[str], str]:
    def run(script: str) -> str:
        done = two_hosts.run(script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_gloo_crosses_the_network(run: Callable[[str], str]) -> None:
    out = run(
        """
def total():
    import torch, torch.distributed as dist
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return value.item(), os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"]

result = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=2).run(total)
print(list(result) == [(6.0, "10.77.0.11", "eth0")] * 4, sorted(result.hostnames))
"""
    )

    assert out == "True ['10.77.0.11', '10.77.0.12']\n"


def test_hosts_are_found_by_ip_and_keep_their_order(run: Callable[[str], str]) -> None:
    out = run(
        """
launcher = trx.Launcher(hostnames=["10.77.0.12", "10.77.0.11"], workers_per_host=1)
result = launcher.run(lambda: os.environ["MASTER_ADDR"])
print(result.hostnames, list(result))
"""
    )

    assert out == "('10.77.0.12', '10.77.0.11') ['10.77.0.12', '10.77.0.12']\n"


def test_own_groups_cross_the_network(run: Callable[[str], str]) -> None:
    out = run(
        """
def groups():
    import torch, torch.distributed as dist
    value = torch.ones(1)
    for _ in range(3):
        dist.init_process_group("gloo")
        dist.all_reduce(value)
        dist.destroy_process_group()
    return value.item()

print(list(trx.Launcher(hostnames=2, workers_per_host=2, backend=None).run(groups)))
"""
    )

    assert out == f"{[64.0] * 4}\n"


def test_failure_on_the_other_host_is_named(run: Callable[[str], str]) -> None:
    out = run(
        """
def fail():
    import torch, torch.distributed as dist
    if dist.get_rank() == 3:
        raise KeyError("over there")
    dist.all_reduce(torch.ones(1))

launcher = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=2)
with launcher.session() as session:
    for _ in range(10):
        try:
            session.run(fail)
        except KeyError as error:
            cause = error.__cause__
            assert (cause.rank, cause.local_rank, cause.hostname) == (3, 1, "10.77.0.12")
print("always")
"""
    )

    assert out == "always\n"


def test_death_on_the_other_host_is_named(run: Callable[[str], str]) -> None:
    out = run(
        """
def die():
    import torch, torch.distributed as dist
    if dist.get_rank() == 3:
        os.kill(os.getpid(), 9)
    dist.all_reduce(torch.ones(1))

launcher = trx.Launcher(hostnames=["10.77.0.11", "10.77.0.12"], workers_per_host=2)
with launcher.session() as session:
    for _ in range(10):
        try:
            session.run(die)
        except trx.WorkerFailedError as error:
            assert (error.rank, error.hostname, error.signal) == (3, "10.77.0.12", 9)
print("always")
"""
    )

    assert out == "always\n"


def test_interface_that_the_user_names_is_kept(run: Callable[[str], str]) -> None:
    out = run(
        """
launcher = trx.Launcher(
    hostnames=2, workers_per_host=1, backend=None, extra_env_vars={"GLOO_SOCKET_IFNAME": "mine"}
)
print(list(launcher.run(lambda: os.environ["GLOO_SOCKET_IFNAME"])))
"""
    )

    assert out == "['mine', 'mine']\n"
