"""Two hosts with addresses of their own: network namespaces on a bridge, a raylet in each."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_RAY = str(Path(sys.executable).with_name("ray"))
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

    def drive(self, script: str) -> "subprocess.CompletedProcess[str]":
        """A driver on the first host; `ray` and `trx` are imported, and Ray is joined."""
        head = "import os, ray, torchrunx_ray as trx\nray.init(log_to_driver=False)\n"
        return self.run("-c", head + script)

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Python on the first host."""
        return subprocess.run(
            ["ip", "netns", "exec", "trxh1", sys.executable, *arguments],
            env={**self.environment, "RAY_ADDRESS": f"{IPS['trxh1']}:6379"},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """A head on one of them, and a raylet on the other."""
    with tempfile.TemporaryDirectory(prefix="trx") as folder, _network():
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        head, worker = (
            [_RAY, "start", f"--node-ip-address={address}", "--num-cpus=4", "--block"]
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
            assert hosts.drive(wait).returncode == 0
            yield hosts
        finally:
            for raylet in raylets:
                raylet.terminate()
            for raylet in raylets:
                raylet.wait(30)
