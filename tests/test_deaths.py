"""Deaths are explained by what the host shows, and by nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.conftest import RunScript
from tests.soon import SOON_S, raised_soon
from torchrunx_ray.agent.machine import memory_group

MIB = 2**20

NOTE_TIME = "open({!r}, 'a').write(str(time.monotonic()) + chr(10))"
"""For whoever is about to crash; the first line is the first one's."""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    own = memory_group.of_process(os.getpid())
    if own is None or not (own.path / "memory.limit_in_bytes").exists():
        pytest.skip(
            "only where cgroup v1 has the memory controller, and a folder can be made there"
        )
    path = own.path / f"torchrunx_ray_test_{os.getpid()}"
    path.mkdir()
    (path / "memory.limit_in_bytes").write_text(str(1500 * MIB))
    yield path
    while pids := (path / "cgroup.procs").read_text().split():
        for pid in pids:  # what a failing test left
            os.kill(int(pid), signal.SIGKILL)
    path.rmdir()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_death_by_signal_names_rank_pid_and_signal(
    launcher: trx.Launcher, signum: signal.Signals
) -> None:
    def die() -> None:
        if os.environ["RANK"] == "1":
            print("the last words", file=sys.stderr)
            os.kill(os.getpid(), signum)
        time.sleep(1000)

    launcher.run(os.getpid)
    caught = raised_soon(trx.WorkerFailedError, launcher.run, die)

    error = caught.value
    assert (error.rank, error.local_rank, error.signal, error.exit_code) == (1, 1, signum, None)
    assert f"pid {error.pid}" in str(error)
    assert f"was killed by {signum.name}" in str(error)
    assert "the last words" in error.last_lines
    assert error.peak_memory
    assert error.peak_memory > 10_000_000


@pytest.mark.parametrize("code", [0, 3])
def test_exit_without_an_outcome(launcher: trx.Launcher, code: int) -> None:
    launcher.run(os.getpid)
    caught = raised_soon(trx.WorkerFailedError, launcher.run, os._exit, code)

    assert caught.value.exit_code == code
    assert "before its function returned or raised" in str(caught.value)


@pytest.mark.slow
def test_out_of_memory_kill_is_told_on_the_cgroups_evidence(
    small_cgroup: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, time
open("{small_cgroup}/cgroup.procs", "w").write(str(os.getpid()))
import ray, torch
import torchrunx_ray as trx
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)

def eat():
    kept = []
    while os.environ["RANK"] == "1":
        kept.append(torch.ones(2**24))
    time.sleep(1000)

try:
    trx.Launcher(workers_per_host=2).run(eat)
except trx.WorkerFailedError as error:
    kills = error.oom_kills
    print(error.rank, kills.after - kills.before, kills.limit, error.peak_memory)
    print(error)

def kill():
    os.kill(os.getpid(), 9)

try:
    trx.Launcher(workers_per_host=2).run(kill)
except trx.WorkerFailedError as error:
    print(error)
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )

    numbers, out_of_memory, killed = (
        done.stdout.split("\nrank ")[0],
        *done.stdout.split("\nrank ")[1:],
    )
    rank, more_kills, limit, peak = map(int, numbers.split())
    assert (rank, more_kills, limit) == (1, 1, 1500 * MIB)
    assert 500 * MIB < peak < 1500 * MIB
    assert "was killed by SIGKILL; its peak memory was " in out_of_memory
    assert "Out of memory: the kernel's count of out-of-memory kills in its memory" in out_of_memory
    assert "limit 1.5 GiB) rose from 0 to 1 during the run" in out_of_memory
    assert "Nothing shows a lack of memory" in killed
    assert "as before (1)" in killed


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_evidence_is_read_from_either_version_of_cgroups(version: int, tmp_path: Path) -> None:
    """As in a container: the mount shows a part of the tree only."""
    folder = tmp_path / "cgroup"
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(
        "9:name=systemd:/docker/1\n4:cpu,memory:/docker/1\n0::/\n"
        if version == 1
        else "0::/docker/1\n"
    )
    kind = "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup2 rw"
    (tmp_path / "7" / "mountinfo").write_text(
        f"35 31 0:32 /docker/1 {folder} rw,relatime shared:9 - {kind}\n"
        "36 31 0:33 / /elsewhere rw - tmpfs tmpfs rw\n"
    )
    folder.mkdir()
    if version == 1:
        (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
        (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    else:
        (folder / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\n")
        (folder / "memory.max").write_text("1048576\n")

    group = memory_group.of_process(7, proc=tmp_path)
    assert group is not None
    assert group.path == folder
    assert group.oom_kills == 3
    assert group.limit == (None if version == 1 else MIB)
    shutil.rmtree(folder)
    assert memory_group.of_process(7, proc=tmp_path) is None


@pytest.mark.slow
@pytest.mark.alone  # it takes a seventh of the machine's memory
def test_agent_that_rays_memory_monitor_kills_is_told_with_the_workers_memory(
    run_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    used = 1 - memory["MemAvailable"] / memory["MemTotal"]
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{used + 0.15:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    done = run_script(
        """
import os, time, torch
import torchrunx_ray as trx

def eat():
    kept = []
    while os.environ["RANK"] == "1":
        kept.append(torch.ones(2**24))
        time.sleep(0.02)
    time.sleep(1000)

try:
    trx.Launcher(workers_per_host=2).run(eat)
except trx.AgentFailedError as error:
    print("said", error)
""",
        own_ray={},
    )

    assert "said Ray's memory monitor killed the agent on " in done.stdout, done.stderr
    assert "Ray kills its own processes first. Memory of the workers: rank 1 (pid " in done.stdout
    assert "RAY_memory_usage_threshold" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", ["os._exit(3)", "os.kill(os.getpid(), 11)"])
def test_crash_while_the_users_module_is_imported_is_the_workers(
    run_script: RunScript, code: str, tmp_path: Path
) -> None:
    (tmp_path / "crashing.py").write_text(
        "import os, time\n"
        f"if 'RANK' in os.environ:\n    {NOTE_TIME.format('crashed')}; {code}\n"
        "def train(): pass\n"
    )
    done = run_script(
        f"""
import os, time
import crashing
import torchrunx_ray as trx
try:
    trx.Launcher(workers_per_host=2).run(crashing.train)
except trx.WorkerFailedError as error:
    print(error)
    print("soon", time.monotonic() - float(open("crashed").readline()) < {SOON_S})
"""
    )

    said = "ended with exit code 3" if "exit" in code else "was killed by SIGSEGV"
    assert said in done.stdout, done.stderr
    assert "soon True" in done.stdout
    if "kill" in code:
        assert 'crashing.py", line 3 in <module>' in done.stdout


@pytest.mark.slow
def test_crash_in_the_template_is_told_with_its_last_words(cluster: None, tmp_path: Path) -> None:
    note = NOTE_TIME.format(str(tmp_path / "crashed"))
    (tmp_path / "crashing_preload.py").write_text(
        f"import os, time\n{note}\nos.kill(os.getpid(), 11)\n"
    )
    launcher = trx.Launcher(
        workers_per_host=2,
        preload=("torch", "crashing_preload"),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
    )
    with pytest.raises(trx.AgentFailedError) as caught:
        launcher.run(os.getpid)

    assert time.monotonic() - float((tmp_path / "crashed").read_text()) < SOON_S
    assert "the template process, from which workers are forked, died" in str(caught.value)
    assert "it was killed by SIGSEGV" in str(caught.value)
    assert 'crashing_preload.py", line 3 in <module>' in str(caught.value)
