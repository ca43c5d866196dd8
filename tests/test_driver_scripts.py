"""`python train.py`: which Ray it runs on, what it leaves as it was, and which streams and folder it may have."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clusters.other_python import python_of_an_older_system
from tests.clusters.two_hosts import namespaces_are_possible
from tests.processes import mentioning, wait_until

TRAIN = """
import os
import ray
import torchrunx_ray as trx

def train():
    return int(os.environ["RANK"]), os.environ["RAY_ADDRESS"]

if __name__ == "__main__":
    result = trx.launch(train, hostnames=1, workers_per_host=2, backend=None, preload=())
    print(list(result))
"""

MORE_HOSTS = """
    for hosts in {"hostnames": 2}, {"hostnames": 2, "workers_per_host": "cpu"}, {"hostnames": ["node1"]}:
        try:
            trx.launch(train, **{"workers_per_host": 1, **hosts})
        except trx.PlacementError as error:
            print(error)
"""


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a script as a user does, in a folder of its own."""

    def drive(
        script: str, *redirected: str, python: str | Path = sys.executable, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "train.py").write_text(script)
        line = " ".join(["exec", str(python), "train.py", *redirected])
        return subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **variables},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return drive


def test_ray_that_the_launch_started_ends_with_the_script(
    drive: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """`RAY_TMPDIR` is where Ray looks for one that runs already: the machine may have others."""
    mark = f"OF_SCRIPT={tmp_path}"
    assert "RAY_ADDRESS" not in os.environ
    with tempfile.TemporaryDirectory(prefix="trx") as folder:
        done = drive(TRAIN + MORE_HOSTS, RAY_TMPDIR=folder, OF_SCRIPT=str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert "Started a local Ray instance" in done.stderr
    assert done.stdout.startswith("[(0, '"), done.stdout
    assert (
        done.stdout.count("The launch itself started this Ray, because it found no Ray to join")
        == 3
    )
    assert wait_until(lambda: not mentioning(mark), 10), mentioning(mark)


def test_launch_joins_the_cluster_of_ray_address(
    drive: Callable[..., "subprocess.CompletedProcess[str]"], address: str
) -> None:
    done = drive(TRAIN, RAY_ADDRESS=address)

    port = address.rpartition(":")[2]
    assert done.stdout.count(f":{port}'") == 2, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("log_to_driver", [True, False])
def test_launch_uses_the_ray_that_is_there_and_shows_no_line_twice(
    drive: Callable[..., "subprocess.CompletedProcess[str]"],
    address: str,
    log_to_driver: bool,
) -> None:
    done = drive(
        f"""
import os, sys
import ray
import torchrunx_ray as trx

ray.init(
    {address!r},
    namespace="mine",
    runtime_env={{"env_vars": {{"OF_RUNTIME_ENV": "here"}}}},
    log_to_driver={log_to_driver},
)
job = ray.get_runtime_context().get_job_id()

def train():
    print("to stdout", os.environ["OF_RUNTIME_ENV"])
    print("to stderr", file=sys.stderr)
    os.system("echo of a child")

trx.launch(train, hostnames=1, workers_per_host=2, backend=None, preload=())
trx.launch(train, hostnames=1, workers_per_host=1, backend=None, preload=(), console_ranks=())
context = ray.get_runtime_context()
assert (context.get_job_id(), context.namespace) == (job, "mine")
"""
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "to stdout here\nof a child\n", done.stdout
    assert done.stderr.count("to stderr") == 1, done.stderr


CHANGES = """
import json, logging, os, re, signal, sys, threading, time
import ray

def state():
    loggers = [logging.getLogger(name) for name in (None, "torchrunx_ray", "ray", "asyncio")]
    with open("/proc/self/status") as file:  # handlers of C code, too
        of_kernel = [line for line in file if line.startswith(("SigCgt", "SigIgn", "SigBlk"))]
    return {
        **{s.name: repr(signal.getsignal(s)) for s in signal.Signals},
        **{f"os.environ[{name}]": "set" for name in os.environ},
        **{repr(l): repr((l.level, l.propagate, l.disabled, l.handlers)) for l in loggers},
        "filters": repr([l.filters for l in loggers if l.name != "torchrunx_ray"]),  # ours is ours
        "logging": repr((logging.root.manager.disable, logging.getLoggerClass(), logging.raiseExceptions)),
        "of kernel": of_kernel,
        "streams": repr((sys.stdout, sys.stderr, sys.excepthook, threading.excepthook)),
        "process": [os.getcwd(), *sys.argv, *sys.path],
    }

def show_changes(before):
    after = state()
    changes = {key: after.get(key) for key in before | after if before.get(key) != after.get(key)}
    print(re.sub(" at 0x[0-9a-f]+", "", json.dumps(changes)))
"""

LAUNCHES = """
import torchrunx_ray as trx

def fail():
    raise ValueError("bad")

launcher = trx.Launcher(hostnames=1, workers_per_host=2, backend=None, preload=())
launcher.run(os.getpid)
with launcher.session() as session:
    session.run(os.getpid)
    try:
        session.run(fail)
    except ValueError:
        pass
run = launcher.submit(signal.pause)
while "running" not in repr(run):
    time.sleep(0.01)
run.cancel()
run.wait()
"""


@pytest.mark.slow
def test_launches_change_nothing_of_the_driver(
    drive: Callable[..., "subprocess.CompletedProcess[str]"], address: str
) -> None:
    begin = f"ray.init({address!r})\nbefore = state()\n"
    with_values = CHANGES.replace('"set" for name', "os.environ[name] for name")
    done = drive(with_values + begin + LAUNCHES + "show_changes(before)\n")

    assert done.stdout == "{}\n", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_launch_that_calls_ray_init_changes_what_that_changes(
    drive: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    changes = [
        drive(
            CHANGES + "before = state()\n" + then + "\nshow_changes(before)\n", RAY_ADDRESS="local"
        )
        for then in ("ray.init()", LAUNCHES)
    ]

    of_init, of_launch = [json.loads(done.stdout.splitlines()[-1]) for done in changes]
    assert of_init == of_launch
    assert of_init, "ray.init does change something, or this sees nothing"


@pytest.mark.slow
def test_stdout_that_is_closed_costs_a_launch_nothing(
    joined: None, drive: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """It warned that nothing could be shown. (Without a stderr Ray itself does not start.)"""
    done = drive(
        """
import ray, sys
import torchrunx_ray as trx

def speak():
    print("to stdout")
    print("to stderr", file=sys.stderr)

trx.launch(speak, hostnames=1, workers_per_host=2, backend=None, preload=(), progress=True)
open("done", "w").close()
""",
        ">&-",
    )

    assert (done.returncode, (tmp_path / "done").exists()) == (0, True), done.stderr
    assert done.stdout == ""
    assert "cannot be shown" not in done.stderr
    assert done.stderr.count("to stderr") == 1, done.stderr


@pytest.mark.slow
def test_stream_that_the_script_has_closed_is_told_once(
    joined: None, drive: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    done = drive(
        """
import os, ray, sys, time
import torchrunx_ray as trx

def speak():
    for i in range(5):
        print("hello", flush=True)
        time.sleep(0.01)

ray.init()
sys.stdout.close()
trx.launch(speak, hostnames=1, workers_per_host=2, backend=None, preload=())
open("done", "w").close()
os._exit(0)  # Python itself complains at its end
"""
    )

    assert (tmp_path / "done").exists(), done.stderr
    assert (
        done.stderr.count("The output of the workers cannot be shown here. The launch continues")
        == 1
    )


@pytest.mark.slow
def test_driver_without_stdout_does_not_hang(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """The thread that prints died of it, and the launch waited for it for ever."""
    done = run_script(
        f"""
import sys, torchrunx_ray as trx
sys.stdout = None
trx.launch(print, ("hello",), workers_per_host=1, backend=None, preload=())
open({str(tmp_path / "done")!r}, "w").close()
"""
    )

    assert (tmp_path / "done").exists(), done.stderr


@pytest.mark.slow
def test_stream_that_cannot_show_a_character_shows_the_rest(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    """One such character lost the whole chunk."""
    done = run_script(
        """
import sys, torchrunx_ray as trx
sys.stdout.reconfigure(encoding="ascii")
trx.launch(print, ("caf\\u00e9",), workers_per_host=1, backend=None, preload=())
"""
    )

    assert done.stdout == "caf\\xe9\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not namespaces_are_possible(), reason="needs root and a kernel that gives mount namespaces"
)
def test_read_only_folder_costs_the_log_files_and_one_warning(joined: None, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "train.py").write_text(
        """
import ray
import torchrunx_ray as trx

def speak(times):
    for _ in range(times):
        print("hello", flush=True)

launcher = trx.Launcher(hostnames=1, workers_per_host=2, backend=None, preload=())
launcher.run(speak, 3)
"""
    )
    # Root may write anywhere, but not where nobody can.
    inside = (
        f"mount -t tmpfs -o ro none {tmp_path / 'here'} && cd {tmp_path / 'here'} && "
        f"exec {sys.executable} {tmp_path / 'train.py'}"
    )
    variables = {"PYTHONPATH": str(Path(__file__).parents[1])}
    by_default = {"TORCHRUNX_LOG_DIR": "torchrunx_logs"}
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", inside],
        env={**os.environ, **variables, **by_default},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello\n" * 3
    assert done.stderr.count("log files of this launch cannot be written") == 1, done.stderr
    assert "Read-only file system" in done.stderr


@pytest.mark.slow
def test_deleted_folder_costs_the_log_files_and_one_warning(
    joined: None, drive: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """The launch failed, with a bare FileNotFoundError."""
    done = drive(
        f"""
import os, ray
import torchrunx_ray as trx
ray.init(log_to_driver=False)
os.mkdir("gone")
os.chdir("gone")
os.rmdir({str(tmp_path / "gone")!r})
trx.launch(print, ("hello",), hostnames=1, workers_per_host=2, backend=None, preload=())
""",
        TORCHRUNX_LOG_DIR="torchrunx_logs",
    )

    assert done.stdout.splitlines()[-1:] == ["hello"], done.stderr
    assert done.stderr.count("log files of this launch cannot be written") == 1, done.stderr


@pytest.mark.slow
def test_deleted_folder_of_the_driver_is_no_error(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """os.getcwd() raised in the driver."""
    (tmp_path / "gone").mkdir()
    done = run_script(
        f"""
import os, torchrunx_ray as trx
os.chdir({str(tmp_path / "gone")!r})
os.rmdir({str(tmp_path / "gone")!r})
print(trx.launch(lambda: "well", workers_per_host=1, backend=None, preload=()).rank(0))
"""
    )

    assert done.stdout == "well\n", done.stderr
    assert (
        "the driver's folder (deleted) cannot be used on this host; the function runs in"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "start_method", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)]
)
@pytest.mark.exhaustive
def test_python_that_was_built_on_an_older_system_will_do(
    drive: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path, start_method: str
) -> None:
    """conda's, on which Ray's own images are built, lacks these whatever kernel it runs on."""
    script = f"""
import os
import torchrunx_ray as trx

def train():
    assert not (hasattr(os, "pidfd_open") or hasattr(os, "memfd_create"))
    if os.environ["RANK"] == "1":
        raise ValueError("x" * 100_000)

if __name__ == "__main__":
    launcher = trx.Launcher(workers_per_host=2, start_method="{start_method}")
    print(list(launcher.run(os.getenv, "RANK")))
    try:
        launcher.run(train)
    except ValueError as error:
        print(len(str(error)))
"""
    python = python_of_an_older_system(tmp_path / "older")
    done = drive(script, python=python, RAY_ADDRESS="local", PYTHONPATH="")

    assert done.stdout == "['0', '1']\n100000\n", done.stdout + done.stderr
