"""Two hosts with addresses of their own: network namespaces on a bridge, a raylet in each."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.clusters.started import ray_start

_BRIDGE = "trxbr0"
IPS = {"trxh1": "10.77.0.11", "trxh2": "10.77.0.12"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def namespaces_are_possible() -> bool:
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and done.returncode == 0


@contextlib.contextmanager
def _network() -> Iterator[None]:
    _take_down()
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        for host, address in IPS.items():
            _ip("netns", "add", host)
            _ip("link", "add", f"{host}v", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("link", "set", f"{host}v", "master", _BRIDGE, "up")
            for command in (
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                "link set lo up",
            ):
                _ip("-n", host, *command.split())
        yield
    finally:
        _take_down()


def _take_down() -> None:
    for host in IPS:
        # By itself: with its namespace it would go at some later time.
        subprocess.run(["ip", "link", "del", f"{host}v"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)


@dataclass
class TwoHosts:
    environment: dict[str, str]

    def drive(self, script: str, timeout_s: float = 110) -> "subprocess.CompletedProcess[str]":
        """A driver on the first host; `ray` and `trx` are imported, and Ray is joined."""
        head = "import os, ray, torchrunx_ray as trx\nray.init(log_to_driver=False)\n"
        return self.run("-c", head + script, timeout_s=timeout_s)

    def run(self, *arguments: str, timeout_s: float = 110) -> "subprocess.CompletedProcess[str]":
        """Python on the first host."""
        return subprocess.run(
            ["ip", "netns", "exec", "trxh1", sys.executable, *arguments],
            env={**self.environment, "RAY_ADDRESS": f"{IPS['trxh1']}:6379"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextlib.contextmanager
def two_hosts(of_other_host: Mapping[str, str] | None = None) -> Iterator[TwoHosts]:
    """A head on one of them, and a raylet on the other, with this in its environment."""
    head, other = (
        (["ip", "netns", "exec", host], [f"--node-ip-address={address}", "--num-cpus=4"])
        for host, address in IPS.items()
    )
    hosts = TwoHosts({**os.environ, "RAY_AUTH_MODE": "disabled"})
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trx"))
        stack.enter_context(_network())
        of_head = ("--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}")
        stack.enter_context(
            ray_start(*head[1], *of_head, environment=hosts.environment, prefix=head[0])
        )
        of_other = (f"--address={IPS['trxh1']}:6379",)
        stack.enter_context(
            ray_start(
                *other[1],
                *of_other,
                environment={**hosts.environment, **(of_other_host or {})},
                prefix=other[0],
            )
        )
        wait = "import time\nwhile len(ray.nodes()) < 2: time.sleep(0.1)"
        assert hosts.drive(wait).returncode == 0
        yield hosts
