"""`ray job submit` on a cluster of two nodes, with its dashboard."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from tests.clusters.started import free_port, ray_start
from tests.processes import of_pool, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass
class Jobs:
    """Ray's command line for jobs, at one cluster; `metrics_port` is the head's."""

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

    def held(self) -> str:
        """What launches hold of the cluster, as a job of its own sees it."""
        look = """
import ray
ray.init(log_to_driver=False)
groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
cpus = ray.cluster_resources()["CPU"] - ray.available_resources()["CPU"]
actors = ray.util.list_named_actors(all_namespaces=True)
ours = [actor for actor in actors if actor["namespace"] == "torchrunx_ray"]
print(f"placement groups: {len(groups)}, CPUs: {cpus}, named actors: {len(ours)}")
"""
        said = self.run("submit", "--", sys.executable, "-c", look).stdout
        return next(line for line in said.splitlines() if line.startswith("placement groups"))


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    by_default = {"TORCHRUNX_LOG_DIR": "torchrunx_logs"}
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", **by_default}
    port, dashboard, metrics = free_port(), free_port(), free_port()
    with contextlib.ExitStack() as nodes:

        def start(*arguments: str, metrics_port: int) -> None:
            # Each node puts its copy of a working_dir there, in place of one that it finds.
            folder = nodes.enter_context(tempfile.TemporaryDirectory(prefix="trx"))
            # Other Rays of this machine have the default ports.
            ports = (
                f"--dashboard-agent-listen-port={free_port()}",
                f"--metrics-export-port={metrics_port}",
                f"--temp-dir={folder}",
            )
            nodes.enter_context(
                ray_start(*arguments, "--num-cpus=4", *ports, environment=environment)
            )

        of_dashboard = ("--include-dashboard=true", f"--dashboard-port={dashboard}")
        of_head = ("--head", f"--port={port}")
        start(*of_head, *of_dashboard, metrics_port=metrics)
        jobs = Jobs(f"http://127.0.0.1:{dashboard}", metrics, environment)
        # Its job agent comes up some seconds after the dashboard.
        assert wait_until(lambda: jobs.run("submit", "--", "true").returncode == 0, 60)
        address = f"{ray.util.get_node_ip_address()}:{port}"
        start(f"--address={address}", metrics_port=free_port())
        # A launch on more nodes than there are is refused.
        waiting = "import ray, time; ray.init()\nwhile len(ray.nodes()) < 2: time.sleep(0.1)"
        subprocess.run(
            [sys.executable, "-c", waiting],
            env={**environment, "RAY_ADDRESS": address},
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
        yield jobs


def test_working_dir_modules_and_variables_reach_both_nodes(jobs: Jobs, tmp_path: Path) -> None:
    job, modules, logs = tmp_path / "job", tmp_path / "modules" / "of_py_modules", tmp_path / "logs"
    job.mkdir()
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text("value = 42\n")
    (job / "data.txt").write_text("of the job")
    (job / "own_module.py").write_text(
        """
import os
import of_py_modules

def train():
    print("said by", os.environ["RANK"])
    return open("data.txt").read(), of_py_modules.value, os.environ["OF_JOB"]
"""
    )
    (job / "train.py").write_text(
        """
import logging
import own_module
import torchrunx_ray as trx

launcher = trx.Launcher(hostnames=2, workers_per_host=1, placement_timeout=60)
result = launcher.run(own_module.train)
print("returned", len(set(result.hostnames)), list(result))
"""
    )
    variables = {"OF_JOB": "here", "TORCHRUNX_LOG_DIR": str(logs)}
    runtime_env = json.dumps({"py_modules": [str(modules)], "env_vars": variables})
    options = ("--submission-id=shipped", f"--runtime-env-json={runtime_env}")
    script = ("--working-dir", str(job), "--", sys.executable, "train.py")
    done = jobs.run("submit", *options, *script)

    said = jobs.run("logs", "shipped").stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"returned 2 {[('of the job', 42, 'here')] * 2}" in said
    assert said.count("said by 0\n") == 1
    assert "said by 1" not in said
    written = "".join(path.read_text() for path in (logs / "latest").iterdir())
    assert [written.count(f"said by {rank}\n") for rank in (0, 1)] == [1, 1]


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

trx.launch(train, hostnames=2, workers_per_host=2, placement_timeout=60)
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    submitted = jobs.run("submit", "--no-wait", "--submission-id=stopped", *script)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    marks = lambda: [path.read_text() for path in tmp_path.glob("mark*")]  # noqa: E731
    assert wait_until(lambda: len(marks()) == 4, 60), jobs.run("logs", "stopped").stdout
    assert len(set(marks())) == 2, "of the agents on two nodes"
    assert all(of_pool(mark) for mark in marks())
    stopped = jobs.run("stop", "stopped")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks()))
    assert "STOPPED" in jobs.run("status", "stopped").stdout.upper()
    assert jobs.held() == "placement groups: 0, CPUs: 0.0, named actors: 0"


def test_jobs_that_want_the_same_hosts_take_turns(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import time
import torchrunx_ray as trx

def train():
    begun = time.time()
    time.sleep(3)
    return begun, time.time()

launcher = trx.Launcher(hostnames=2, workers_per_host=4, backend=None, placement_timeout=60)
spans = list(launcher.run(train))
print("SPAN", min(begun for begun, _ in spans), max(ended for _, ended in spans))
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: jobs.run("submit", *script), range(2)))

    said = [done.stdout + done.stderr for done in both]
    assert [done.returncode for done in both] == [0, 0], said
    spans = [re.search(r"^SPAN (\S+) (\S+)$", text, re.MULTILINE) for text in said]
    (_, first_ended), (second_begun, _) = sorted(
        (float(span[1]), float(span[2])) for span in spans if span is not None
    )
    assert first_ended < second_begun


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

trx.launch(train, hostnames=1, workers_per_host=2, name="train")
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    done = jobs.run("submit", "--submission-id=failing", *script)
    logs = jobs.run("logs", "failing").stdout

    assert done.returncode == 1
    assert "FAILED" in jobs.run("status", "failing").stdout.upper()
    assert logs.count("from the function\n") == 1, logs
    assert ": running 2 workers" in logs
    assert "ValueError: bad batch" in logs
    assert 'train.py", line 8, in train' in logs, "the traceback of the worker"
    # The default lies where Ray keeps its copy of the working_dir.
    directory = Path(logs.partition("All output of this launch: ")[2].splitlines()[0])
    assert directory.parent.name == "torchrunx_logs"
    assert "working_dir_files" in str(directory)
    assert "from the function" in "".join(path.read_text() for path in directory.iterdir())


def test_agents_metrics_can_be_read_by_prometheus(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import time
import torchrunx_ray as trx

launcher = trx.Launcher(hostnames=["localhost"], workers_per_host=2)
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


@pytest.mark.parametrize(("given", "seen"), [({}, None), ({"OMP_NUM_THREADS": "3"}, "3")])
def test_threads_that_ray_gives_the_jobs_supervisor_are_not_the_workers(
    jobs: Jobs, tmp_path: Path, given: dict[str, str], seen: str | None
) -> None:
    """One worker alone on its host computed with one thread."""
    (tmp_path / "train.py").write_text(
        """
import os
import torchrunx_ray as trx

launcher = trx.Launcher(hostnames=1, workers_per_host=1, backend=None)
print("driver", os.environ["OMP_NUM_THREADS"])
print("worker", launcher.run(os.getenv, "OMP_NUM_THREADS").rank(0))
"""
    )
    options = (f"--runtime-env-json={json.dumps({'env_vars': given})}", "--working-dir")
    done = jobs.run("submit", *options, str(tmp_path), "--", sys.executable, "train.py")

    lines = done.stdout.splitlines()
    assert f"driver {seen or 1}" in lines, done.stdout + done.stderr
    assert f"worker {seen}" in lines
