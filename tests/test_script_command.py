"""`torchrunx-ray train.py`: kinds of scripts, output, failures, signals, and wrong usage."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.clusters.raylets import raylets
from tests.commands import OURS, TORCHRUNS, begin, ended, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]

SAY = """
import os, sys
sys.stdout.write(f"{os.environ['RANK']} {sys.argv[1:]}\\n")
"""

WAIT = """
import os, signal, sys, time
from pathlib import Path

def leave(signum, frame):
    Path(f"{os.environ['RANK']} got {signal.Signals(signum).name}").touch()
    sys.exit(0)

for each in signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1:
    signal.signal(each, IGNORE_OR leave)
Path(f"ready {os.environ['RANK']} {os.getpid()}").touch()
time.sleep(1000)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "say.py").write_text(SAY)
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("name = 'the package'")
    (package / "main.py").write_text(
        "import os, sys\nfrom . import name\n"
        "sys.stdout.write(f\"{os.environ['RANK']} {name} {__spec__.name} {sys.argv[1:]}\\n\")"
    )
    (tmp_path / "say.sh").write_text('#!/bin/bash\necho "$RANK of $WORLD_SIZE: $*"\nexit $1\n')
    (tmp_path / "say.sh").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["say.py", "a"], "{} ['a']"),
        (["-m", "package.main", "a"], "{} the package package.main ['a']"),
        (["--no-python", "./say.sh", "0", "a"], "{} of 2: 0 a"),
        (["--run-path", "say.py", "a"], "{} ['a']"),
        pytest.param(["--start-method=spawn", "say.py"], "{} []", marks=pytest.mark.exhaustive),
    ],
)
def test_each_kind_of_script_runs(folder: Path, words: list[str], said: str) -> None:
    done = run(folder, "--nproc-per-node=2", *words)

    assert sorted(done.stdout.splitlines()) == [said.format(rank) for rank in (0, 1)], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_modules_beside_a_script_in_another_folder_are_found(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "beside.py").write_text("name = 'beside'")
    (elsewhere / "train.py").write_text(
        "import sys\nfrom beside import name\nsys.stdout.write(f'{name} {sys.path[0]}\\n')\n"
    )

    done = run(folder, "elsewhere/train.py")

    assert done.stdout == f"beside {elsewhere}\n", done.stderr


def test_interpreter_that_the_user_names_runs_the_script(folder: Path) -> None:
    python = folder / "own_python"
    python.write_text(f'#!/bin/bash\necho "$@"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    done = run(folder, "say.py", "a", PYTHON_EXEC=str(python))

    assert done.stdout.splitlines() == ["-u say.py a", "0 ['a']"], done.stderr


def test_files_lie_where_torchrun_puts_them_and_have_the_same_lines(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(
        "import os, sys\nlocal_rank = os.environ['LOCAL_RANK']\n"
        "for stream in sys.stdout, sys.stderr:\n    stream.write(f'apple {local_rank}\\npear\\n')\n"
    )
    words = ["--nproc-per-node=3", "--rdzv-id=job7", "--log-dir=logs", "--role=trainer"]
    words += ["-t=0:3,1:1", "-r=1:2,2:1", "--local-ranks-filter=0,2", "--duplicate-stdout-filters"]
    found: list[dict[str, str]] = []
    shown: list[list[str]] = []
    for command in TORCHRUNS, OURS:
        folder = tmp_path / command[-1]
        folder.mkdir()
        # The name of the run is the user's only with a rendezvous; torchrun alone makes one up.
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        done = ended(begin(command, folder, *rendezvous, *words, "apple", "../talk.py"))
        assert done.returncode == 0, done.stderr
        (log,) = (folder / "logs").iterdir()
        assert log.name.startswith("job7_")
        found.append(
            {
                str(path.relative_to(log)): path.read_text()
                for path in sorted(log.rglob("*.log"))
                if path.stat().st_size
            }
        )
        shown.append(sorted(done.stdout.splitlines()))

    assert found[1] == found[0]
    assert shown[1] == shown[0]


def test_restarts_are_counted_and_told(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys\ncount = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "sys.stdout.write(f'attempt {count}\\n')\nsys.exit(int(count) < 2)\n"
    )

    done = run(tmp_path, "--max-restarts=2", "train.py")

    assert done.stdout.splitlines() == ["attempt 0", "attempt 1", "attempt 2"]
    assert done.returncode == 0
    assert "restart 2 of 2" in done.stderr


def test_failure_is_reported_with_its_cause_first(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, time\n"
        "def step():\n    raise ValueError('of rank 1')\n"
        "if os.environ['RANK'] == '1':\n    step()\n"
        "time.sleep(1000)\n"
    )

    done = run(tmp_path, "--nproc-per-node=2", "--shutdown-timeout=20", "train.py")

    assert done.returncode == 1
    report = done.stderr[done.stderr.index("=" * 60) :]
    assert "train.py FAILED\n\nRoot cause (first failure):\n" in report
    assert re.search(r"  rank +: 1 \(local rank 1\)\n  exit code +: 1 \(pid \d+\)\n", report)
    assert report.index('/train.py", line 3, in step') < report.index("ValueError: of rank 1")
    assert "rank 0" in report[report.index("Then:") :]
    assert "torchrunx_ray" not in done.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "import sys; sys.exit(3)",
            r"exit code +: 3 \(pid \d+\)\n\n  called sys.exit\(3\) in <module> \(train.py:1\)",
        ),
        ("import os; os.kill(os.getpid(), 9)", r"end +: was killed by SIGKILL \(pid \d+\)"),
        ("import os; os._exit(4)", r"end +: ended with exit code 4 \(pid \d+\)"),
        ("1 +", r"SyntaxError: invalid syntax"),
    ],
)
def test_each_end_of_a_script_is_a_failure_with_status_1(
    tmp_path: Path, script: str, said: str
) -> None:
    (tmp_path / "train.py").write_text(script)

    done = run(tmp_path, "train.py")

    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr


def test_missing_script_is_looked_for_on_the_host(tmp_path: Path) -> None:
    done = run(tmp_path, "missing.py")

    assert done.returncode == 1
    assert f"there is no {tmp_path}/missing.py on this host" in done.stderr
    assert "--working-dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_program_is_told_without_a_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "--no-python", "missing-program")

    assert done.returncode == 1
    assert "missing-program is no program that can be run here" in done.stderr
    assert "Traceback" not in done.stderr


def test_working_dir_is_sent(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()

    done = run(elsewhere, "--working-dir", str(folder), "say.py", "a")

    assert done.stdout == "0 ['a']\n", done.stderr


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".py")


def waiting(
    folder: Path,
    *words: str,
    handler: str = "",
    command: tuple[str, ...] = (),
    **variables: str,
) -> "subprocess.Popen[str]":
    """Begin a script that waits for signals, on two workers."""
    (folder / "train.py").write_text(WAIT.replace("IGNORE_OR", handler))
    running = begin(
        [*command, *OURS], folder, "--nproc-per-node=2", *words, "train.py", **variables
    )
    assert processes.wait_until(lambda: len(made(folder)) == 2, 60)
    return running


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signal_is_passed_on_and_ends_the_run(tmp_path: Path, name: str) -> None:
    with waiting(tmp_path, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1") as running:
        running.send_signal(signal.Signals[name])
        done = ended(running)

    assert made(tmp_path)[:2] == [f"0 got {name}", f"1 got {name}"]
    assert done.returncode == 1
    assert done.stderr == f"torchrunx-ray: stopped by {name}\n"


def test_second_signal_kills(tmp_path: Path) -> None:
    with waiting(tmp_path, handler="signal.SIG_IGN or") as running:
        pids = [int(name.split()[-1]) for name in made(tmp_path)]
        for _ in range(2):
            running.send_signal(signal.SIGINT)
            processes.wait_until(lambda: running.poll() is not None, 1)
        done = ended(running)

    assert done.returncode == 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    with waiting(tmp_path, command=("nohup",)) as running:
        running.send_signal(signal.SIGHUP)
        assert not processes.wait_until(lambda: running.poll() is not None, 1)
        running.send_signal(signal.SIGTERM)
        ended(running)

    assert made(tmp_path)[:2] == ["0 got SIGTERM", "1 got SIGTERM"]


def test_sigterm_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    """ray.init() installs a handler for it."""
    with waiting(tmp_path, command=("env", "--ignore-signal=TERM")) as running:
        running.send_signal(signal.SIGTERM)
        assert not processes.wait_until(lambda: running.poll() is not None, 1)
        running.send_signal(signal.SIGINT)
        ended(running)

    assert made(tmp_path)[:2] == ["0 got SIGINT", "1 got SIGINT"]


def test_pause_is_refused_if_workers_may_restart(tmp_path: Path) -> None:
    with waiting(tmp_path, "--max-restarts=1") as running:
        running.send_signal(signal.SIGTSTP)
        running.send_signal(signal.SIGTERM)
        done = ended(running)

    assert "Ctrl-Z is ignored" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: training_script"),
        (["--unknown", "train.py"], "unrecognized arguments: --unknown"),
        (["-m", "--no-python", "x"], "Don't use both the '--no-python' flag and the '--module'"),
        (["--nnodes=0", "train.py"], "--nnodes=0: expected at least one host"),
        (["--nnodes=2:1", "train.py"], "--nnodes=2:1: expected at least one host"),
        (
            ["--nnodes=some", "train.py"],
            "--nnodes=some: expected a number of hosts, MIN:MAX, or all",
        ),
        (["--nproc-per-node=xpu", "train.py"], "Ray does not count a host's XPUs"),
        (["--nproc-per-node=0", "train.py"], "--nproc-per-node=0: expected a number of workers"),
        (["--node-rank=1", "train.py"], "type the command once, on one machine"),
        (["--logs-specs=mine", "train.py"], "RayElasticAgent, which takes one"),
        (["--event-log-handler=console", "train.py"], "records no events of torch"),
        (["--max-restarts=-1", "train.py"], "--max-restarts=-1: expected"),
        (["--tee=4", "train.py"], "--tee=4: expected 0 (nothing), 1 (stdout)"),
        (["--local-ranks-filter=a", "train.py"], "expected local ranks"),
        (["--signals-to-handle=SIGNONE", "train.py"], "SIGNONE is no signal's name"),
        (["--signals-to-handle=SIGKILL", "train.py"], "no process can handle SIGKILL"),
        (["--rdzv-conf=join_timeout", "train.py"], "expected NAME=VALUE"),
        (["--standalone", "--address=x:1", "train.py"], "--standalone starts a Ray of its own"),
        (["--hostnames=a", "--nnodes=1", "train.py"], "give one of the two"),
        (["--env=RANK=3", "train.py"], "--env"),
    ],
)
def test_wrong_usage_is_told_with_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchrunx_ray.cli.main import run as run_here

    assert run_here(words) == 2
    assert said in capsys.readouterr().err


def test_step_of_slurm_that_starts_the_command_several_times_is_refused(folder: Path) -> None:
    done = run(folder, "say.py", SLURM_STEP_NUM_TASKS="2")
    # The last word is the name of the shell, whose child the command then is.
    below = begin(
        ["bash", "-c", f"{sys.executable} -m torchrunx_ray say.py; exit $?", "symmetric-run"],
        folder,
        SLURM_STEP_NUM_TASKS="2",
    )

    assert done.returncode == 2
    assert "`srun` starts this command 2 times (SLURM_STEP_NUM_TASKS=2)" in done.stderr
    assert ended(below).stdout == "0 []\n"


def test_options_for_a_rendezvous_are_accepted_with_a_line(folder: Path) -> None:
    done = run(folder, "--master-port=1", "--rdzv-backend=c10d", "--rdzv-conf=timeout=60", "say.py")

    assert done.stdout == "0 []\n"
    assert done.stderr == (
        "torchrunx-ray: --rdzv-backend, --master-port: not needed, since Ray finds the hosts\n"
    )


def test_address_where_nobody_answers_is_told(folder: Path) -> None:
    done = run(folder, "--address=localhost:1", "say.py")

    assert done.returncode == 1
    assert "--address=localhost:1: nobody answers there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.exhaustive
def test_hosts_that_can_never_be_there_are_told(folder: Path) -> None:
    done = run(folder, "--nnodes=9", "--rdzv-conf=join_timeout=5", "say.py")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "can never hold this launch: 9 hosts are wanted" in done.stderr
    assert "hostnames" not in done.stderr


def test_command_starts_a_ray_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")

    done = run(folder, "--standalone", "say.py")

    assert done.stdout == "0 []\n", done.stderr
    assert done.returncode == 0


def test_nothing_is_left_whatever_is_killed(tmp_path: Path) -> None:
    """The command ends without Ray's clean-up, so the cluster has to notice its end."""
    mark = {"OF_THIS_TEST": str(tmp_path)}

    def left() -> dict[int, str]:
        return processes.mentioning(f"OF_THIS_TEST={tmp_path}")

    (tmp_path / "quick.py").write_text("")
    assert run(tmp_path, "quick.py", **mark).returncode == 0
    assert processes.wait_until(lambda: not left(), 10), left()
    with waiting(tmp_path, **mark) as running:
        running.kill()
    assert processes.wait_until(lambda: not left(), 10), left()


@pytest.mark.exhaustive
def test_run_goes_on_with_fewer_hosts(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "seen = os.environ['WORLD_SIZE'], os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "Path(' '.join(['seen', os.environ['RANK'], 'of', seen[0], 'restarts', seen[1]])).touch()\n"
        "if seen[0] == '2':\n    time.sleep(1000)\n"
    )
    with (
        raylets({"num_cpus": 1}, {"num_cpus": 1}) as cluster,
        begin(OURS, tmp_path, "--nnodes=1:2", "train.py", RAY_ADDRESS=cluster.address) as running,
    ):
        assert processes.wait_until(lambda: len(made(tmp_path)) == 2, 60)
        (lost,) = cluster.worker_nodes
        cluster.remove_node(lost, allow_graceful=False)
        done = ended(running)

    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == [
        "seen 0 of 1 restarts 0",
        "seen 0 of 2 restarts 0",
        "seen 1 of 2 restarts 0",
    ]
    assert "goes on" in done.stderr


def test_virtual_local_ranks_and_variables_reach_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, sys\nnames = 'RANK', 'LOCAL_RANK', 'ROLE_NAME', 'A', 'B', 'C'\n"
        "sys.stdout.write(' '.join(os.environ.get(each, '-') for each in names) + '\\n')\n"
    )
    (tmp_path / "more.sh").write_text("C=of-the-file\n")
    options = ["--nproc-per-node=2", "--virtual-local-rank", "--role=trainer"]

    done = run(
        tmp_path, *options, "--env=A=given", "--env-file=more.sh", "train.py", B="of-the-shell"
    )

    said = "{} 0 trainer given of-the-shell of-the-file"
    assert sorted(done.stdout.splitlines()) == [said.format(rank) for rank in (0, 1)], done.stderr
