"""`ray job submit` on a cluster with its dashboard."""

import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
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
    metrics_port: int
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
    by_default = {"TORCHRUNX_LOG_DIR": "torchrunx_logs"}
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", **by_default}
    port, dashboard, agent, metrics = free_port(), free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="trx") as folder:
        of_head = ("--head", f"--port={port}", "--num-cpus=4", f"--temp-dir={folder}")
        of_dashboard = (
            "--include-dashboard=true",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",  # other Rays of this machine have the default
            f"--metrics-export-port={metrics}",
        )
        with ray_start(*of_head, *of_dashboard, environment=environment):
            jobs = Jobs(f"http://127.0.0.1:{dashboard}", metrics, environment)
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


def test_failed_job_shows_its_output_and_traceback_and_how_far_it_was(
    jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        """
import time
import torchrunx_ray as trx

def train():
    print("from the function")
    time.sleep(3)
    raise ValueError("bad batch")

trx.launch(train, workers_per_host=2, name="train")
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    done = jobs.run("submit", "--submission-id=failing", *script)
    logs = jobs.run("logs", "failing").stdout

    assert done.returncode != 0
    assert logs.count("from the function\n") == 1, logs
    assert ": running 2 workers" in logs
    assert "ValueError: bad batch" in logs
    assert "All output of this launch: /" in logs


def test_agents_metrics_can_be_read_by_prometheus(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import time
import torchrunx_ray as trx

launcher = trx.Launcher(workers_per_host=2)
launcher.run(print, "hello")
try:
    launcher.run(lambda: 1 / 0)
except ZeroDivisionError:
    pass
launcher.run(time.sleep, 15)
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    submitted = jobs.run("submit", "--no-wait", "--submission-id=measured", *script)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    def metrics() -> dict[str, float]:
        """Those of ours, by name and the tag that we gave."""
        url = f"http://127.0.0.1:{jobs.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("ray_torchrunx_ray_"):
                name, _, rest = line.partition("{")
                tags, _, value = rest.rpartition("} ")
                own = [tag for tag in tags.split(",") if tag.startswith(("kind=", "phase="))]
                key = " ".join([name.removeprefix("ray_torchrunx_ray_"), *own])
                found[key] = found.get(key, 0) + float(value)
        return found

    assert wait_until(lambda: metrics().get("workers_running") == 2, 60), metrics()
    assert wait_until(lambda: metrics().get("runs_total", 0) >= 3, 30), sorted(metrics().items())
    seen = metrics()
    assert seen['failures_total kind="exception"'] >= 1
    for phase in ("template import", "process group", "run"):
        assert seen[f'seconds_total phase="{phase}"'] > 0, seen
    succeeded = lambda: "SUCCEEDED" in jobs.run("status", "measured").stdout.upper()  # noqa: E731
    assert wait_until(succeeded, 60)
