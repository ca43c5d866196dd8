"""A cluster for drivers that come through ray://, and such drivers."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.clusters.started import free_port, ray_start
from tests.processes import wait_until

_BEGIN = """
import os, sys, time
import ray
import torchrunx_ray as trx
ray.init(ADDRESS, log_to_driver=False)
"""


_ONE_AFTER_ANOTHER = """
import traceback
for script in map(eval, sys.stdin):
    try:
        exec(script, dict(globals()))
    except BaseException:
        traceback.print_exc()
    print(END, flush=True)
"""
_END = "the end of a script"


@dataclass(frozen=True)
class ClientServer:
    """A head that serves ray://, of 4 CPUs."""

    address: str
    mark: str
    """In the environment of all its processes."""
    of_head: str
    """The address for drivers on the head's machine."""
    environment: dict[str, str]

    def command(self, script: str) -> list[str]:
        """A driver's; `ray` and `trx` are imported, and the cluster is joined."""
        return [sys.executable, "-c", _BEGIN.replace("ADDRESS", repr(self.address)) + script]

    def drive(
        self, script: str, *, cwd: Path | None = None, timeout_s: float = 100, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(script),
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


class Drive(Protocol):
    def __call__(self, script: str) -> "subprocess.CompletedProcess[str]": ...


@contextlib.contextmanager
def one_driver(head: ClientServer) -> Iterator[Drive]:
    """Run scripts one after another in one driver: each driver behind ray:// costs 3 s of CPU."""
    command = head.command(_ONE_AFTER_ANOTHER.replace("END", repr(_END)))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.NamedTemporaryFile("w") as written,
        open(written.name) as errors,
        subprocess.Popen(
            command, env=head.environment, stderr=written, text=True, **pipes
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        to_driver, from_driver = process.stdin, process.stdout

        def drive(script: str) -> "subprocess.CompletedProcess[str]":
            print(repr(script), file=to_driver, flush=True)
            said = ""
            while not said.endswith(f"{_END}\n"):
                line = from_driver.readline()
                assert line, (said, errors.read())
                said += line
            said = said.removesuffix(f"{_END}\n")
            return subprocess.CompletedProcess(command, 0, said, errors.read())

        yield drive
        to_driver.close()
        process.wait(30)


@contextlib.contextmanager
def client_server(python: Path = Path(sys.executable)) -> Iterator[ClientServer]:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        # For how long a driver that was killed keeps its agents.
        "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "2",
    }
    port, client_port = free_port(), free_port()
    of_head = ("--head", f"--port={port}", f"--ray-client-server-port={client_port}")
    sizes = ("--num-cpus=4", "--include-dashboard=false", "--include-log-monitor=false")
    with tempfile.TemporaryDirectory(prefix="trx") as folder:
        arguments = (*of_head, *sizes, f"--temp-dir={folder}")
        of_servers = {
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": "",
            "CLIENT_SERVER": folder,
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # see conftest.py
        }
        if python == Path(sys.executable):
            of_servers["PYTHONPATH"] = environment["PYTHONPATH"]
        with ray_start(*arguments, python=python, environment=of_servers):
            address = f"ray://127.0.0.1:{client_port}"
            server = ClientServer(
                address, f"CLIENT_SERVER={folder}", f"127.0.0.1:{port}", environment
            )
            # Ray starts a process for each driver, and gives up on one that a busy machine is slow to start.
            joined = [sys.executable, "-c", f"import ray; ray.init({address!r})"]
            assert wait_until(
                lambda: (
                    subprocess.run(joined, env=environment, capture_output=True).returncode == 0
                ),
                100,
            )
            yield server
