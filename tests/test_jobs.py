"""`ray job submit` on a cluster with its dashboard."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clusters.started import ray_start
from tests.processes import of_pool, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass
class Jobs:
    """Ray's command line for jobs, at one cluster."""

    address: str
    environment: dict[str, str]

    def run(self, *arguments: str, timeout_s: float = 100) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments],
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    port, dashboard, agent = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="trx") as folder:
        of_head = ("--head", f"--port={port}", "--num-cpus=4", f"--temp-dir={folder}")
        of_dashboard = (
            "--include-dashboard=true",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",  # other Rays of this machine have the default
        )
        with ray_start(*of_head, *of_dashboard, environment=environment):
            jobs = Jobs(f"http://127.0.0.1:{dashboard}", environment)
            # Its job agent comes up some seconds after the dashboard.
            assert wait_until(lambda: jobs.run("submit", "--", "true").returncode == 0, 60)
            yield jobs


def test_job_that_is_stopped_leaves_nothing(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        f"""
import os, subprocess, time
import torchrunx_ray as trx

def train():
    subprocess.Popen(["setsid", "sleep", "1000"])
    with open("{tmp_path}/mark" + os.environ["RANK"], "w") as file:
        file.write(os.environ["TORCHRUNX_RAY_POOL"])
    time.sleep(1000)

trx.launch(train, workers_per_host=2)
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    submitted = jobs.run("submit", "--no-wait", "--submission-id=stopped", *script)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    marks = lambda: [path.read_text() for path in tmp_path.glob("mark*")]  # noqa: E731
    assert wait_until(lambda: len(marks()) == 2, 60), jobs.run("logs", "stopped").stdout
    assert of_pool(marks()[0])
    stopped = jobs.run("stop", "stopped")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks()), 5)
    assert "STOPPED" in jobs.run("status", "stopped").stdout.upper()
