"""Ctrl-C on a real terminal, in a real notebook kernel, and other ends of a driver."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from jupyter_client.manager import start_new_kernel
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

import torchrunx_ray as trx
from tests.processes import mentioning, of_pool, wait_until
from tests.soon import SOON_S, soon

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.usefixtures("joined")]

SCRIPT = """
import os, signal, sys, time, traceback
import ray
import torchrunx_ray as trx

phase, grace_s = sys.argv[1], float(sys.argv[2])
ray.init(log_to_driver=False)
before = signal.getsignal(signal.SIGINT)

class PickledLast:
    def __reduce__(self):
        print("at it", flush=True)
        return str, ()

def linger_at_exit():
    print("at it", flush=True)
    time.sleep(1000)

def train():
    print("mark", os.environ["TORCHRUNX_RAY_POOL"], flush=True)
    if phase == "collecting":
        if os.environ["RANK"] == "1":
            time.sleep(1000)
        import torch
        return torch.ones(2**30, dtype=torch.uint8), PickledLast()
    if phase == "tearing down":
        import atexit
        atexit.register(linger_at_exit)
        return
    if phase == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if phase == "deaf and parked":
        import ctypes
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("at it", flush=True)
        ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
    print("at it", flush=True)
    time.sleep(1000)

launcher = trx.Launcher(
    workers_per_host=2,
    cpus_per_worker=ray.cluster_resources()["CPU"] / 2 if phase == "placing" else None,
    shutdown_timeout=grace_s,
    console_ranks="all",
    preload=("torch", "torch.distributed", *([phase] if phase in ("importing", "forming") else [])),
    runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}} if phase in ("importing", "forming") else None,
)
try:
    if phase == "placing":
        with launcher.session():
            launcher.run(train)
    elif phase == "session":
        with launcher.session() as session:
            session.run(train)
    else:
        launcher.run(train)
except KeyboardInterrupt as error:
    notes = getattr(error, "__notes__", [])
    assert signal.getsignal(signal.SIGINT) is before
    print("INTERRUPTED", *notes, sep="\\n", flush=True)
    result = trx.Launcher(workers_per_host=2).run(os.getpid)
    print("AND AGAIN", len(result), flush=True)
"""

MODULES = {
    "importing": "import time\nprint('at it', flush=True)\ntime.sleep(1000)\n",
    "forming": (
        "import time, torch.distributed as dist\n"
        "def hang(*args, **kwargs):\n    print('at it', flush=True)\n    time.sleep(1000)\n"
        "dist.init_process_group = hang\n"
    ),
}


class Terminal:
    """A driver in the foreground of a terminal."""

    def __init__(self, phase: str, grace_s: float, folder: Path) -> None:
        self._folder = folder
        (folder / "script.py").write_text(SCRIPT)
        for name, text in MODULES.items():
            (folder / f"{name}.py").write_text(text)
        self.shown = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
            os.execv(sys.executable, [sys.executable, "script.py", phase, str(grace_s)])

    def press_ctrl_c(self) -> None:
        os.write(self._fd, b"\x03")

    def wait_for(self, text: str, timeout_s: float, times: int = 1) -> float:
        """Seconds until it was shown."""
        begun = time.monotonic()
        while self.shown.count(text) < times:
            left_s = begun + timeout_s - time.monotonic()
            assert left_s > 0, f"{text!r} was not shown in {timeout_s} s, but:\n{self.shown}"
            if select.select([self._fd], [], [], left_s)[0]:
                try:
                    self.shown += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:  # the last process of the terminal has ended
                    assert text in self.shown, self.shown
        return time.monotonic() - begun

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._fd)

    def processes(self) -> dict[int, str]:
        """Of its launches: workers tell their mark, templates may have the folder on their path."""
        found = mentioning(str(self._folder))
        for mark in set(re.findall(r"mark (\w+)", self.shown)):
            found |= of_pool(mark)
        return found


@contextlib.contextmanager
def terminal(phase: str, grace_s: float, folder: Path) -> Iterator[Terminal]:
    terminal = Terminal(phase, grace_s, folder)
    try:
        yield terminal
    finally:
        terminal.close()


AT_IT = {"placing": "waiting for room"}


def groups() -> set[str]:
    """The states of the placement groups that there are."""
    return {group["state"] for group in placement_group_table().values()} - {"REMOVED"}


@pytest.mark.parametrize(
    "phase",
    ["placing", "importing", "forming", "running", "session", "collecting", "tearing down"],
)
def test_ctrl_c_ends_every_phase_long_before_the_grace_is_over(phase: str, tmp_path: Path) -> None:
    with terminal(phase, 60, tmp_path) as driver:
        times = 2 if phase in ("running", "session", "tearing down") else 1
        driver.wait_for(AT_IT.get(phase, "at it"), 90, times)
        if phase == "placing":
            assert "PENDING" in groups()
        else:
            assert driver.processes()
        driver.press_ctrl_c()
        driver.wait_for("INTERRUPTED", SOON_S)
        driver.wait_for("AND AGAIN 2", 40)
        if phase in ("running", "session"):
            shown = re.findall(r"^ranks? .+: train \(script.py:\d+\)", driver.shown, re.MULTILINE)
            assert len(shown) in (1, 2), driver.shown  # each may be at another line
    assert wait_until(lambda: not driver.processes() and not groups())


@pytest.mark.parametrize("phase", ["deaf", "deaf and parked"])
def test_ctrl_c_waits_for_deaf_workers_as_long_as_it_was_told(phase: str, tmp_path: Path) -> None:
    with terminal(phase, 2, tmp_path) as driver:
        driver.wait_for("at it", 40)
        driver.press_ctrl_c()
        assert driver.wait_for("INTERRUPTED", 2 + SOON_S) >= 2
        driver.wait_for("AND AGAIN 2", 40)


@pytest.mark.parametrize("phase", ["deaf", "deaf and parked"])
def test_second_ctrl_c_kills_at_once(phase: str, tmp_path: Path) -> None:
    with terminal(phase, 60, tmp_path) as driver:
        driver.wait_for("at it", 40)
        driver.press_ctrl_c()
        time.sleep(0.5)  # a person's finger
        driver.press_ctrl_c()
        driver.wait_for("INTERRUPTED", SOON_S)
        driver.wait_for("AND AGAIN 2", 40)


def test_notebook_that_is_interrupted_lives_on_and_launches_again(tmp_path: Path) -> None:
    manager, client = start_new_kernel(
        cwd=str(tmp_path), env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    said: list[str] = []

    def hear(message: Any) -> None:
        content = message["content"]
        said.append(content.get("text", "") + "\n".join(content.get("traceback", [])))

    try:
        client.execute_interactive(
            "import os, time, ray, torchrunx_ray as trx\n"
            "ray.init(log_to_driver=False)\n"
            "launcher = trx.Launcher(workers_per_host=2, console_ranks='all')\n"
            "class Stuck(Exception): pass\n"
            "def train(seconds):\n"
            "    print('at it', flush=True)\n"
            "    time.sleep(seconds)\n"
            "    if seconds == 0: raise Stuck('in a cell', 7)\n"
            "    return os.environ['RANK']\n",
            timeout=60,
            output_hook=hear,
        )
        client.execute("launcher.run(train, 1000)")
        while "".join(said).count("at it") < 2:
            hear(client.get_iopub_msg(timeout=60))
        with soon():
            manager.interrupt_kernel()
            while "KeyboardInterrupt" not in "".join(said):
                hear(client.get_iopub_msg(timeout=SOON_S))
        assert re.search(r"ranks? 0(-1)?: train", "".join(said))  # each may be at another line
        client.get_shell_msg(timeout=10)  # until then the kernel takes no other cell

        client.execute_interactive("print(list(launcher.run(train, 0.1)))", output_hook=hear)
        assert "['0', '1']" in "".join(said)
        client.execute_interactive(
            "try: launcher.run(train, 0)\nexcept Stuck as error: print(type(error) is Stuck, error.args)",
            output_hook=hear,
        )
        assert "True ('in a cell', 7)" in "".join(said)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


ENDS = {
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "sys.exit": "sys.exit(3)",
    "exception": "raise ValueError('in the main thread')",
    "end": "pass",
}


DRIVE = """
import os, pathlib, signal, sys, time
import ray
import torchrunx_ray as trx

def train(folder):
    mark = os.environ["TORCHRUNX_RAY_POOL"]
    (folder / (os.environ["RANK"] + ".mark")).write_text(mark)
    time.sleep(1000)

def drive(folder):
    run = trx.Launcher(workers_per_host=2).submit(train, folder)
    while len(list(folder.glob("*.mark"))) < 2 or not all(p.read_text() for p in folder.glob("*.mark")):
        time.sleep(0.01)
    END
"""


def marks_in(folder: Path) -> set[str]:
    marks = {path.read_text() for path in folder.glob("*.mark")}
    assert len(marks) == 1
    return marks


@pytest.mark.parametrize(
    ("how", "address"),
    [
        pytest.param(how, address, marks=[] if how in in_ci else pytest.mark.exhaustive)
        for address, in_ci in (("local", ("SIGKILL", "end")), ("outside", ENDS))
        for how in ENDS
    ],
)
def test_driver_that_ends_while_a_run_goes_on_leaves_nothing(
    how: str, address: str, cluster: None, tmp_path: Path
) -> None:
    own = 'ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)'
    outside = f'ray.init("{ray.get_runtime_context().gcs_address}", log_to_driver=False)'
    end = f"{own if address == 'local' else outside}\ndrive(pathlib.Path())\n"
    path = tmp_path / "script.py"
    path.write_text(DRIVE.replace("END", ENDS[how]) + end)
    driver = subprocess.Popen(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    driver.wait(60)

    marks = marks_in(tmp_path)
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks))


@pytest.mark.parametrize(
    ("kind", "how"),
    # An actor that exits by itself ends when the calls that it made have ended: Ray's rule.
    [("task", "SIGTERM"), ("task", "SIGKILL"), ("task", "sys.exit"), ("actor", "SIGKILL")],
)
def test_task_or_actor_that_ends_while_its_run_goes_on_leaves_nothing(
    kind: str, how: str, cluster: None, tmp_path: Path
) -> None:
    """Its room is Ray's to give back, or the next launch's: see test_orphans.py."""
    names: dict[str, Any] = {}
    exec(DRIVE.replace("END", ENDS[how]), names)
    untyped: Any = ray
    if kind == "task":
        ending = untyped.remote(num_cpus=0, max_retries=0)(names["drive"]).remote(tmp_path)
    else:

        class Driver:
            def drive(self, folder: Path) -> None:
                names["drive"](folder)

        actor = untyped.remote(num_cpus=0)(Driver).remote()
        ending = actor.drive.remote(tmp_path)
    with pytest.raises(RayError):
        ray.get(ending, timeout=60)

    marks = marks_in(tmp_path)
    assert wait_until(lambda: not any(of_pool(mark) for mark in marks))
    assert len(trx.Launcher(workers_per_host=8).run(os.getpid)) == 8


def test_run_is_cancelled_from_another_thread(launcher: trx.Launcher, tmp_path: Path) -> None:
    import concurrent.futures
    import threading

    def announce_and_sleep() -> None:
        (tmp_path / os.environ["RANK"]).touch()
        time.sleep(1000)

    run = launcher.submit(announce_and_sleep)
    threading.Thread(
        target=lambda: wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30) and run.cancel()
    ).start()
    with pytest.raises(concurrent.futures.CancelledError):
        run.result(timeout=40)
    assert len(launcher.run(os.getpid)) == 2
