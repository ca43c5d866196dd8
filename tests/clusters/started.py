"""`ray start` by hand, ended with all that it started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.processes import mentioning, wait_until


@contextlib.contextmanager
def ray_start(
    *arguments: str,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[None]:
    """Not by `ray stop`, which ends every Ray on the machine."""
    mark = f"TORCHRUNX_RAY_TESTS={uuid.uuid4().hex}"
    command = [*prefix, "env", mark, str(python), "-m", "ray.scripts.scripts", "start"]
    started = subprocess.Popen(
        [*command, *arguments, "--block", "--disable-usage-stats"],
        # Where Ray runs the folder is in the path of every worker: not this repository's.
        cwd="/",
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        for pid in mentioning(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.wait(30)
        assert wait_until(lambda: not mentioning(mark), 30)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
