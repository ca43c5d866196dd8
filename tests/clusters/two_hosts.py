"""Two hosts with addresses of their own: network namespaces on a bridge, a raylet in each."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.clusters.started import ray_start

_BRIDGE = "trxbr0"
IPS = {"trxh1": "10.77.0.11", "trxh2": "10.77.0.12"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def namespaces_are_possible() -> bool:
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return os.geteuid() == 0 and done.returncode == 0


@contextlib.contextmanager
def network(ips: Mapping[str, str] = IPS, own: str | None = None) -> Iterator[None]:
    """Have these hosts on a bridge, without processes. With `own`, this process is on it too, with this address."""
    _take_down(ips)
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        if own is not None:
            _ip("addr", "add", f"{own}/24", "dev", _BRIDGE)
        for host, address in ips.items():
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
        _take_down(ips)


def _take_down(ips: Mapping[str, str]) -> None:
    for host in ips:
        # By itself: with its namespace it would go at some later time.
        subprocess.run(["ip", "link", "del", f"{host}v"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)


class TwoHosts:
    """A raylet on each, that of the first being the head's."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        of_other_host: Mapping[str, str],
        names: Mapping[str, Sequence[str]],
    ) -> None:
        self.environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        self.of_driver = {**self.environment, "RAY_ADDRESS": f"{IPS['trxh1']}:6379"}
        self._of_other_host = {**self.environment, **of_other_host}
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trx"))
        stack.enter_context(network())
        self._prefixes = {host: [*inside(host), *under_names(host, names, folder)] for host in IPS}
        head = ("--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}")
        stack.enter_context(self._raylet("trxh1", head, self.environment))
        self._other = stack.enter_context(contextlib.ExitStack())
        self._raylets = 1
        self.start_other_host()

    def start_other_host(self) -> None:
        """Its raylet, in place of one that was killed; Ray knows of that end when this returns."""
        self._other.close()
        address = f"--address={IPS['trxh1']}:6379"
        self._other.enter_context(self._raylet("trxh2", (address,), self._of_other_host))
        self._raylets += 1
        done = self.drive(
            "import time\n"
            f"while len(ray.nodes()) < {self._raylets} or sum(n['Alive'] for n in ray.nodes()) != 2:\n"
            "    time.sleep(0.1)"
        )
        assert done.returncode == 0, done.stderr

    def drive(self, script: str, timeout_s: float = 110) -> "subprocess.CompletedProcess[str]":
        """A driver on the first host; `ray` and `trx` are imported, and Ray is joined."""
        head = "import os, ray, torchrunx_ray as trx\nray.init(log_to_driver=False)\n"
        return self.run("-c", head + script, timeout_s=timeout_s)

    def begin(self, script: str) -> "subprocess.Popen[str]":
        """A driver on the first host that goes on beside the test; it can import `tests`."""
        head = "import os, ray, torchrunx_ray as trx\nray.init(log_to_driver=False)\n"
        return subprocess.Popen(
            [*self._prefixes["trxh1"], sys.executable, "-c", head + script],
            env={**self.of_driver, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, timeout_s: float = 110) -> "subprocess.CompletedProcess[str]":
        """Python on the first host."""
        return subprocess.run(
            [*self._prefixes["trxh1"], sys.executable, *arguments],
            env=self.of_driver,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _raylet(
        self, host: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> contextlib.AbstractContextManager[None]:
        address = (f"--node-ip-address={IPS[host]}", "--num-cpus=4", "--include-log-monitor=false")
        prefix = self._prefixes[host]
        return ray_start(*address, *arguments, environment=environment, prefix=prefix)


@contextlib.contextmanager
def cut_off(host: str) -> Iterator[None]:
    """Cut the host's link, which loses packets in both directions and tells nobody."""
    cut(host)
    try:
        yield
    finally:
        mend(host)


def cut(host: str) -> None:
    _ip("link", "set", f"{host}v", "down")


def mend(host: str) -> None:
    _ip("link", "set", f"{host}v", "up")


def pids_on(host: str) -> list[int]:
    """All processes of a host."""
    done = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


@contextlib.contextmanager
def two_hosts(
    of_other_host: Mapping[str, str] | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[TwoHosts]:
    """A head on one of them, and a raylet on the other, with this in its environment.

    Both have the machine's hostname where they are given no names.
    """
    with contextlib.ExitStack() as stack:
        yield TwoHosts(stack, of_other_host or {}, names or {})


def inside(host: str) -> list[str]:
    """What a command begins with that runs on this host."""
    return ["ip", "netns", "exec", host]


def under_names(host: str, names: Mapping[str, Sequence[str]], folder: str | Path) -> list[str]:
    """What a command begins with that finds all these names in /etc/hosts.

    The first of its host's is the hostname; the folder must last as long as the command.
    """
    if not names:
        return []
    file = Path(folder, "hosts")
    lines = [f"{IPS[name]} {' '.join(called)}" for name, called in names.items()]
    file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", script, names[host][0], str(file)]
