"""A driver that is killed, interrupted or done leaves nothing of its launch."""

import asyncio
import contextlib
import gc
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import torchrunx_ray as trx
from tests import processes
from tests.processes import wait_until
from tests.soon import soon
from torchrunx_ray.driver.background.loop import in_thread, in_thread_only


def test_driver_that_is_killed_leaves_nothing(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    done = run_script(
        """
import os
import re, pathlib, signal, subprocess, sys
sys.path.insert(0, os.getcwd())
import torchrunx_ray as trx

def sleep(driver):
    import time
    subprocess.run(["setsid", "sh", "-c", "sleep 1000 &"], check=True)
    pathlib.Path("mark" + os.environ["RANK"]).write_text(os.environ["TORCHRUNX_RAY_POOL"])
    if os.environ["RANK"] == "0":
        while not os.path.exists("mark1"):
            time.sleep(0.01)
        os.kill(driver, signal.SIGKILL)
    time.sleep(1000)

trx.launch(sleep, (os.getpid(),), workers_per_host=2)
"""
    )

    assert done.returncode == -signal.SIGKILL, done.stderr
    mark = (tmp_path / "mark0").read_text()
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


def test_ctrl_c_stops_the_run_and_leaves_nothing(joined: None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import ray, time, os
import torchrunx_ray as trx
ray.init()

def sleep():
    print("mark", os.environ["TORCHRUNX_RAY_POOL"], flush=True)
    time.sleep(1000)

try:
    trx.launch(sleep, workers_per_host=1, shutdown_timeout=60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    mark = driver.stdout.readline().split()[1]
    driver.send_signal(signal.SIGINT)

    with soon():
        assert driver.stdout.readline() == "interrupted\n"
    assert driver.wait(30) == 0
    driver.stdout.close()
    assert processes.wait_until(lambda: processes.of_pool(mark) == {})


@pytest.mark.slow
def test_driver_that_ends_while_a_preload_hangs_leaves_nothing(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """A template looks for its agent only after its imports."""
    (tmp_path / "hangs.py").write_text(
        f"import time; open({str(tmp_path / 'imported')!r}, 'w').close(); time.sleep(1000)"
    )
    done = run_script(
        f"""
import os, time, torchrunx_ray as trx
trx.Launcher(
    workers_per_host=1, preload=("hangs",), extra_env_vars={{"OF_THIS_TEST": {str(tmp_path)!r}}}
).submit(os.getpid)
while not os.path.exists({str(tmp_path / "imported")!r}):
    time.sleep(0.01)
"""
    )

    assert done.returncode == 0, done.stderr
    assert processes.wait_until(lambda: not processes.mentioning(f"OF_THIS_TEST={tmp_path}"))


SAVES_ON_SIGTERM = """
import os, pathlib, signal, sys, time, torchrunx_ray as trx

def train(folder):
    def save(*_):
        (folder / f"saved {os.environ['RANK']}").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    (folder / f"ready {os.environ['RANK']}").touch()
    time.sleep(1000)

def is_ready():
    return len(list(pathlib.Path().glob("ready *"))) == 2

folder = pathlib.Path().absolute()
launcher = trx.Launcher(workers_per_host=2, backend=None, name="left")
"""

IN_TIME = """
import threading
def press():
    while not is_ready():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=press).start()
"""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("run = launcher.submit(train, folder)\nwhile not is_ready(): time.sleep(0.01)", 0),
        (IN_TIME + "launcher.run(train, folder)", 15),
        (IN_TIME + "with launcher.session() as session: session.run(train, folder)", 15),
        (
            IN_TIME + "import asyncio\nasync def main(): await launcher.submit(train, folder)\n"
            "asyncio.run(main())",
            15,
        ),
    ],
    ids=["the script ends", "SIGTERM", "SIGTERM in a session", "SIGTERM while it is awaited"],
)
def test_workers_may_save_their_work_when_their_driver_ends(
    script: str,
    code: int,
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
    tmp_path: Path,
) -> None:
    """They were killed, and the driver said that it had left Ray and that nobody asked for the result."""
    done = run_script(SAVES_ON_SIGTERM + script)

    assert (done.returncode, done.stderr.count("nobody asked")) == (code, 0), done.stderr
    assert {path.name for path in tmp_path.glob("saved *")} == {"saved 0", "saved 1"}, done.stderr
    if code == 15 and "asyncio" not in script:
        assert "was stopped, because the driver is exiting (SystemExit: 15" in done.stderr
        # Each may be at another line.
        assert re.search(r"ranks? 0(-1)?: train \(script.py:", done.stderr), done.stderr


def test_launch_that_a_signal_handler_ends_leaves_nothing(launcher: trx.Launcher) -> None:
    """Only Ctrl-C stopped it: what a time limit raised left it running, with nobody to stop it."""

    class TooLong(Exception):
        pass

    def raise_too_long(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, raise_too_long)
    free = ray.available_resources()["CPU"]
    try:
        signal.alarm(2)
        with pytest.raises(TooLong):
            launcher.run(time.sleep, 1000)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert wait_until(lambda: ray.available_resources().get("CPU", 0) == free)


@pytest.mark.slow
def test_forked_child_of_a_driver_stops_no_run_at_its_end(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """It waited for its parent's run, without the thread that this lives in.

    What Ray itself registered with atexit hangs in such a child; it is left out.
    """
    done = run_script(
        """
import os, time, torchrunx_ray.driver.run, torchrunx_ray as trx
run = trx.Launcher(workers_per_host=1, backend=None).submit(time.sleep, 4)
child = os.fork()
if child == 0:
    torchrunx_ray.driver.run._stop_living()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run.done())
run.result()
"""
    )
    assert done.stdout.splitlines() == ["7 False"], done.stderr


async def test_calls_that_block_are_made_where_no_thread_starts_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As from Python 3.12 on at the end of a script, when runs that still go on are stopped."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert await in_thread(abs, -3) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)
    called: list[str] = []
    await in_thread_only(called.append, "may hold the loop for ever")
    assert called == []


@pytest.mark.parametrize("start", [in_thread, in_thread_only])
async def test_call_that_fails_in_a_thread_leaves_nothing_for_pythons_gc(start: Any) -> None:
    """Ray's references in it may be freed in a bad moment then."""

    class Held:
        pass

    def fail() -> None:
        held = Held()
        kept.append(weakref.ref(held))
        raise ValueError

    kept: list[weakref.ref[Held]] = []
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            await start(fail)
        await asyncio.sleep(0.01)  # what has woken this task has the failure, too
        assert wait_until(lambda: kept[0]() is None)
    finally:
        gc.enable()


@pytest.mark.slow
def test_forked_child_of_a_driver_is_told_that_it_cannot_launch(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """It would wait for ever: neither Ray's threads nor ours come with a fork."""
    done = run_script(
        """
import os, time, torchrunx_ray as trx
launcher = trx.Launcher(workers_per_host=1, backend=None)
run = launcher.submit(time.sleep, 2)
child = os.fork()
if child == 0:
    for ask in (run.result, lambda: launcher.run(os.getpid), lambda: launcher.session()):
        try:
            ask()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run.done())
run.result()
"""
    )
    asked, launched, session, parent = done.stdout.splitlines()
    assert asked.startswith("RuntimeError sleep-")
    assert asked.endswith("belongs to the process from which this process was forked")
    assert launched == session
    assert "was forked from a process that was already connected to Ray" in launched
    assert parent == "7 False", done.stderr


@pytest.mark.slow
def test_forked_child_leaves_a_session_to_its_parent(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import os, sys, time, torchrunx_ray as trx
with trx.Launcher(workers_per_host=1, backend=None).session() as session:
    run = session.submit(time.sleep, 2)
    child = os.fork()
    if child == 0:
        try:
            session.run(os.getpid)
        except trx.LaunchError as error:
            print(error, flush=True)
        session.close()
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run.done())
    print(len(session.run(os.getpid)))
"""
    )
    launched, parent, again = done.stdout.splitlines()
    assert "was forked from a process that was already connected to Ray" in launched
    assert (parent, again) == ("7 False", "1"), done.stderr


@pytest.mark.slow
def test_launch_works_after_one_that_no_thread_could_be_started_for(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """It hung: the loop was there, and nobody ran it."""
    done = run_script(
        """
import os, threading, torchrunx_ray as trx
launcher = trx.Launcher(workers_per_host=1, backend=None)
start = threading.Thread.start

def refuse(thread):
    if thread.name == "torchrunx_ray":
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = refuse
try:
    launcher.run(os.getpid)
except RuntimeError as error:
    print(error)
threading.Thread.start = start
print(len(launcher.run(os.getpid)))
"""
    )
    assert done.stdout.splitlines() == ["can't start new thread", "1"], done.stderr


@pytest.mark.exhaustive
def test_driver_that_has_forked_can_still_start_agents(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """The child dropped what it had inherited. It told Ray so, on the parent's connection, which was of no more use."""
    done = run_script(
        """
import gc, os, time, torchrunx_ray as trx
launcher = trx.Launcher(workers_per_host=1, backend=None, max_restarts=1)
launcher.run(time.sleep, 1)
for i in range(3):
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    print(len(trx.Launcher(workers_per_host=1, backend=None, extra_env_vars={"I": str(i)}).submit(os.getpid).result(20)))
"""
    )
    assert done.stdout.split() == ["1", "1", "1"], done.stderr[-3000:]
