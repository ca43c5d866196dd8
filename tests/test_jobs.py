"""`ray job submit` on a cluster of two nodes, with its dashboard, that asks for a token."""

import contextlib
import json
import os
import re
import shlex
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


_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_PAGE = (Path(__file__).parents[1] / "docs" / "jobs.md").read_text()


@dataclass
class Jobs:
    """Ray's command line for jobs, at one cluster; both ports are the head's."""

    address: str
    of_head: str
    """The address for drivers on the head's machine."""
    metrics_port: int
    client_port: int
    environment: dict[str, str]
    token_file: Path

    def run(
        self, *arguments: str, timeout_s: float = 100, folder: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*_RAY, "job", *arguments],
            cwd=folder,
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.address},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def without_token(self, home: Path) -> dict[str, str]:
        """The environment of somebody who knows nothing of tokens."""
        return {
            **{name: value for name, value in self.environment.items() if "RAY_AUTH" not in name},
            "HOME": str(home),
        }

    def held(self) -> str:
        """What launches hold of the cluster."""
        look = """
import ray
ray.init(log_to_driver=False)
groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
cpus = ray.cluster_resources()["CPU"] - ray.available_resources()["CPU"]
actors = ray.util.list_named_actors(all_namespaces=True)
ours = [actor for actor in actors if actor["namespace"] == "torchrunx_ray"]
print(f"placement groups: {len(groups)}, CPUs: {cpus}, named actors: {len(ours)}")
"""
        return self.drive(look)

    def drive(self, script: str) -> str:
        """Run a driver that is no job: that costs a third of the CPU; returns what it printed."""
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**self.environment, "RAY_ADDRESS": self.of_head},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
            check=True,
        ).stdout


@pytest.fixture(scope="module", autouse=True)
def own_token() -> Iterator[None]:
    """The cluster has another one than the shared cluster."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_AUTH_TOKEN", raising=False)
        yield


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    home = tmp_path_factory.mktemp("home")
    token_file = home / ".ray" / "auth_token"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "TORCHRUNX_LOG_DIR": "torchrunx_logs",  # the default
    }
    generate = [*_RAY, "get-auth-token", "--generate"]
    of_home = {"HOME": str(home), "RAY_AUTH_TOKEN_PATH": ""}
    subprocess.run(generate, env={**environment, **of_home}, capture_output=True, check=True)
    port, dashboard, metrics, client = free_port(), free_port(), free_port(), free_port()
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
        of_head = ("--head", f"--port={port}", f"--ray-client-server-port={client}")
        start(*of_head, *of_dashboard, metrics_port=metrics)
        address = f"{ray.util.get_node_ip_address()}:{port}"
        server = f"http://127.0.0.1:{dashboard}"
        jobs = Jobs(server, address, metrics, client, environment, token_file)
        # Its job agent comes up some seconds after the dashboard.
        assert wait_until(lambda: jobs.run("submit", "--", "true").returncode == 0, 60)
        start(f"--address={address}", metrics_port=free_port())
        # A launch on more nodes than there are is refused.
        jobs.drive("import ray, time; ray.init()\nwhile len(ray.nodes()) < 2: time.sleep(0.1)")
        yield jobs


@pytest.fixture(scope="module")
def told_behind_ray_client(
    jobs: Jobs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Iterator[str]]:
    """Output of a driver without a token, and of one with a wrong one: Ray tries for half a minute."""
    script = """
import torchrunx_ray as trx
try:
    trx.launch(print, hostnames=1, workers_per_host=1)
except trx.LaunchError as error:
    print(error)
"""
    environment = jobs.without_token(tmp_path_factory.mktemp("nothing"))
    environment["RAY_ADDRESS"] = f"ray://127.0.0.1:{jobs.client_port}"

    def launch(variables: dict[str, str]) -> str:
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, **variables},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        ).stdout

    with ThreadPoolExecutor() as pool:
        yield pool.map(launch, [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}])


# First, since agents of other tests' runs on this cluster would be counted, too.
def test_agents_metrics_can_be_read_by_prometheus(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        f"""
import os, time
from pathlib import Path
import torchrunx_ray as trx
from torchrunx_ray.driver.running import steps
from torchrunx_ray.wire.messages import Restarted

def fail(often):
    if trx.context().attempt < often:
        raise ValueError

def die_once():
    if trx.context().attempt == 0 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    if trx.context().attempt == 0:
        time.sleep(1000)

def wait():
    while not Path({str(tmp_path / "seen")!r}).exists():
        time.sleep(0.1)

launcher = trx.Launcher(hostnames=["localhost"], workers_per_host=2)
launcher.run(print, "hello")
try:
    launcher.run(lambda: 1 / 0)
except ZeroDivisionError:
    pass
patient = trx.Launcher(hostnames=["localhost"], workers_per_host=2, max_restarts=5)
patient.run(fail, 2)
patient.run(die_once)
# As after the loss of two hosts.
steps._restarted = lambda *_: Restarted("host", 2)
patient.run(fail, 1)
launcher.run(wait)
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
                own = [
                    tag for tag in tags.split(",") if tag.startswith(("kind=", "phase=", "reason="))
                ]
                key = " ".join([name.removeprefix("ray_torchrunx_ray_"), *own])
                found[key] = found.get(key, 0) + float(value)
        return found

    # A look makes Ray gather all of its metrics anew, for 0.1 s of CPU.
    assert wait_until(lambda: metrics().get("workers_running") == 2, 120), metrics()
    (tmp_path / "seen").touch()
    assert wait_until(lambda: metrics().get("runs_total", 0) >= 6, 30), sorted(metrics().items())
    seen = metrics()
    assert seen["runs_total"] == 6
    restarts = {key: count for key, count in seen.items() if key.startswith("restarts_total")}
    assert restarts == {
        'restarts_total reason="exception"': 2,
        'restarts_total reason="death"': 1,
        'restarts_total reason="host"': 1,
    }
    assert seen["hosts_lost_total"] == 2
    assert seen['failures_total kind="exception"'] >= 1
    for phase in ("template import", "process group", "run"):
        assert seen[f'seconds_total phase="{phase}"'] > 0, seen
    succeeded = lambda: "SUCCEEDED" in jobs.run("status", "measured").stdout.upper()  # noqa: E731
    assert wait_until(succeeded, 60)


def test_commands_of_the_page_run_with_each_way_to_give_the_token(
    jobs: Jobs, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(
        "import torchrunx_ray as trx\n"
        "trx.Launcher(hostnames=1, workers_per_host=1, backend=None, preload=()).run(print, 'hello')\n"
    )
    nothing, home = tmp_path / "nothing", tmp_path / "home"
    nothing.mkdir()
    (home / ".ray").mkdir(parents=True)
    token = jobs.token_file.read_text()
    (home / ".ray" / "auth_token").write_text(token)

    def run(command: str, *, home: Path = nothing, **variables: str) -> str:
        done = subprocess.run(
            shlex.split(command),
            env={
                **jobs.without_token(home),
                "RAY_API_SERVER_ADDRESS": jobs.address,
                **variables,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return f"{done.stdout}{done.stderr}exit code {done.returncode}"

    found = re.search(r"^ray job submit .*$", _PAGE, re.MULTILINE)
    assert found is not None
    submit = found[0].replace("http://head:8265", jobs.address)
    refused = run(submit)
    assert "Authentication required" in refused
    assert refused.endswith("exit code 1")

    submitted = run(submit, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert submitted.endswith("exit code 0"), submitted
    (job_id,) = set(re.findall(r"raysubmit_\w+", submitted))
    status, logs = _of_the_page("status", job_id), _of_the_page("logs", job_id)
    by_path = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(jobs.token_file)}
    assert "hello\n" in run(logs, **by_path)
    assert "SUCCEEDED" in run(status, home=home, RAY_AUTH_MODE="token").upper()


def _of_the_page(verb: str, job_id: str) -> str:
    command = f"ray job {verb} ID"
    assert f"`{command}`" in _PAGE
    return command.replace("ID", job_id)


def test_working_dir_modules_and_variables_reach_both_nodes(jobs: Jobs, tmp_path: Path) -> None:
    job, modules = tmp_path / "job", tmp_path / "common"
    job.mkdir()
    modules.mkdir()
    (modules / "__init__.py").write_text("value = 42\n")
    (job / "data.txt").write_text("of the job")
    (job / "own_module.py").write_text(
        """
import os
import common

def train():
    print("said by", os.environ["RANK"])
    return open("data.txt").read(), common.value, os.environ["HF_HOME"]
"""
    )
    (job / "train.py").write_text(
        """
import logging
import own_module
import torchrunx_ray as trx

launcher = trx.Launcher(
    hostnames=2, workers_per_host=1, backend=None, preload=(), placement_timeout=60
)
result = launcher.run(own_module.train)
print("returned", len(set(result.hostnames)), list(result))
"""
    )
    of_code, of_logs = map(json.loads, re.findall(r"--runtime-env-json '(.+?)'", _PAGE))
    logs = Path(of_logs["env_vars"]["TORCHRUNX_LOG_DIR"].replace("/data", str(tmp_path)))
    of_code["env_vars"]["TORCHRUNX_LOG_DIR"] = str(logs)
    options = ("--submission-id=shipped", f"--runtime-env-json={json.dumps(of_code)}")
    script = ("--working-dir", ".", "--", sys.executable, "train.py")
    done = jobs.run("submit", *options, *script, folder=job)

    said = jobs.run("logs", "shipped").stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"returned 2 {[('of the job', 42, '/data/hf')] * 2}" in said
    assert said.count("said by 0\n") == 1
    assert "said by 1" not in said
    written = "".join(path.read_text() for path in (logs / "latest").iterdir())
    assert [written.count(f"said by {rank}\n") for rank in (0, 1)] == [1, 1]


@pytest.mark.exhaustive
def test_driver_behind_ray_client_without_the_token_is_told_how_to_give_it(
    told_behind_ray_client: Iterator[str], jobs: Jobs
) -> None:
    """Ray advised to look at the ports."""
    why = (
        "wants a token, and this process sent none: RAY_AUTH_MODE is not set.",
        "refused the token of this process, which is from RAY_AUTH_TOKEN.",
    )
    for words, said in zip(why, told_behind_ray_client, strict=True):
        assert said.startswith(f"The Ray cluster at ray://127.0.0.1:{jobs.client_port} {words}")
        assert "Set RAY_AUTH_MODE=token, and give the cluster's token: in RAY_AUTH_TOKEN" in said


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

trx.launch(
    train, hostnames=2, workers_per_host=2, backend=None, preload=(), placement_timeout=60
)
"""
    )
    script = ("--working-dir", str(tmp_path), "--", sys.executable, "train.py")
    submitted = jobs.run("submit", "--no-wait", "--submission-id=stopped", *script)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    marks = lambda: [text for p in tmp_path.glob("mark*") if (text := p.read_text())]  # noqa: E731
    assert wait_until(lambda: len(marks()) == 4, 60), jobs.run("logs", "stopped").stdout
    assert len(set(marks())) == 2, "of the agents on two nodes"
    assert all(of_pool(mark) for mark in marks())
    stopped = jobs.run("stop", "stopped")

    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks()))
    assert "STOPPED" in jobs.run("status", "stopped").stdout.upper()
    assert jobs.held() == "placement groups: 0, CPUs: 0.0, named actors: 0\n"


@pytest.mark.exhaustive
def test_jobs_that_want_the_same_hosts_take_turns(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import time
import torchrunx_ray as trx

def train():
    begun = time.time()
    time.sleep(3)
    return begun, time.time()

launcher = trx.Launcher(
    hostnames=2,
    workers_per_host=1,
    cpus_per_worker=4,
    backend=None,
    preload=(),
    placement_timeout=60,
)
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


def test_run_of_a_job_is_restarted(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import os, signal
import torchrunx_ray as trx

def fail():
    if trx.context().attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trx.context().attempt

launcher = trx.Launcher(hostnames=(1, 2), workers_per_host=1, cpus_per_worker=4, max_restarts=1)
print("attempts", *launcher.run(fail))
"""
    )
    done = jobs.run("submit", "--working-dir", ".", "--", "python", "train.py", folder=tmp_path)

    assert "attempts 1 1" in done.stdout, done.stdout + done.stderr
    assert "restart 1 of 1" in done.stdout
    assert wait_until(lambda: "placement groups: 0, CPUs: 0.0" in jobs.held(), 60)


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

trx.launch(train, hostnames=1, workers_per_host=2, backend=None, preload=(), name="train")
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


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, None),
        pytest.param({"OMP_NUM_THREADS": "3"}, "3", marks=pytest.mark.exhaustive),
    ],
)
def test_threads_that_ray_gives_the_jobs_supervisor_are_not_the_workers(
    jobs: Jobs, tmp_path: Path, given: dict[str, str], seen: str | None
) -> None:
    """One worker alone on its host computed with one thread."""
    (tmp_path / "train.py").write_text(
        """
import os
import torchrunx_ray as trx

launcher = trx.Launcher(hostnames=1, workers_per_host=1, backend=None, preload=())
print("driver", os.environ["OMP_NUM_THREADS"])
print("worker", launcher.run(os.getenv, "OMP_NUM_THREADS").rank(0))
"""
    )
    options = (f"--runtime-env-json={json.dumps({'env_vars': given})}", "--working-dir")
    done = jobs.run("submit", *options, str(tmp_path), "--", sys.executable, "train.py")

    lines = done.stdout.splitlines()
    assert f"driver {seen or 1}" in lines, done.stdout + done.stderr
    assert f"worker {seen}" in lines


def test_job_can_be_the_command_of_a_script(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys\nsys.stdout.write(f\"rank {os.environ['RANK']} says {sys.argv[1]}\\n\")\n"
    )
    command = [sys.executable, "-m", "torchrunx_ray", "--nnodes=2", "train.py", "it"]

    done = jobs.run("submit", "--working-dir", str(tmp_path), "--", *command)

    assert done.returncode == 0, done.stdout + done.stderr
    assert {"rank 0 says it", "rank 1 says it"} <= set(done.stdout.splitlines())
