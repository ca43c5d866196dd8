"""All that workers say is in log files, one for each; where none can be written, the launch goes on."""

import dataclasses
import logging
import os
import re
import time
from datetime import datetime
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.logs import HEAD, Kept
from tests.processes import wait_until


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default files go."""
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "logs"


def run_dir(logs: Path) -> Path:
    (directory,) = run_dirs(logs)
    assert directory == (logs / "latest").resolve()
    return directory


def run_dirs(logs: Path) -> list[Path]:
    return sorted(path for path in logs.iterdir() if not path.is_symlink())


class HostStory:
    """The lines of the only host's file of the last run."""

    def __init__(self, logs: Path) -> None:
        (path,) = (path for path in (logs / "latest").iterdir() if "[" not in path.name)
        self.lines = texts(path, "INFO")

    def tells(self, line: str) -> None:
        assert any(re.match(line, each) for each in self.lines), (line, self.lines)

    def ends_with(self, line: str) -> None:
        assert re.match(line, self.lines[-1]), self.lines


def texts(path: Path, level: str) -> list[str]:
    """The lines of a file that have this level."""
    heads = [line.split(": ", 1) for line in path.read_text().splitlines() if HEAD.match(line)]
    return [text for head, text in heads if head.endswith(f":{level}")]


@pytest.mark.parametrize("lines", [5_000, pytest.param(50_000, marks=pytest.mark.exhaustive)])
def test_every_line_of_every_rank_is_in_its_file(cluster: None, logs: Path, lines: int) -> None:
    def flood() -> None:
        for i in range(lines):
            print(f"line {i} of rank {os.environ['RANK']} {'x' * 70}")

    launcher = trx.Launcher(workers_per_host=4, backend=None, console_ranks=())
    (hostname,) = launcher.run(flood).hostnames

    for rank in range(4):
        path = run_dir(logs) / f"{hostname}[{rank}].log"
        assert texts(path, "INFO") == [f"line {i} of rank {rank} {'x' * 70}" for i in range(lines)]


def test_files_are_named_after_time_and_worker(cluster: None, logs: Path) -> None:
    launcher = trx.Launcher(workers_per_host=2, backend=None, name="a/b c")
    for _ in range(3):
        run = launcher.submit(print, "hello")
        result = run.result()
        (hostname,) = result.hostnames
        assert run.log_directory == result.log_directory == (logs / "latest").resolve()
        time, _, name = result.log_directory.name.partition("_")
        assert datetime.fromisoformat(time)
        assert name == run.name.replace("a/b c", "a_b_c")
        names = sorted(path.name for path in result.log_directory.iterdir())
        assert names == [f"{hostname}.log", f"{hostname}[0].log", f"{hostname}[1].log"]

    assert len(run_dirs(logs)) == 3


def test_log_directory_is_known_while_the_run_goes_on(cluster: None, logs: Path) -> None:
    run = trx.Launcher(workers_per_host=1, backend=None).submit(time.sleep, 1000)
    assert wait_until(lambda: run.log_directory is not None, 60)
    assert run.log_directory == run_dir(logs)
    run.kill()
    run.wait()
    assert run.log_directory == run_dir(logs)


def test_folder_of_the_name_latest_is_left_alone(cluster: None, logs: Path) -> None:
    (logs / "latest").mkdir(parents=True)
    result = trx.Launcher(workers_per_host=1, backend=None).run(print, "hello")
    assert {path.name for path in logs.iterdir()} == {"latest", result.log_directory.name}


def test_hosts_file_tells_what_happened_there(cluster: None, logs: Path) -> None:
    def live(rank_0_ends: str) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(1000)
        elif rank_0_ends == "killed":
            os.kill(os.getpid(), 9)
        raise ValueError("shard 17\nis truncated")

    launcher = trx.Launcher(workers_per_host=2, backend=None)
    pids = list(launcher.run(os.getpid))
    story = HostStory(logs)
    story.tells("run .*, attempt 0: ranks 0-1 of 2 on this host")
    story.tells(r"the template .* its imports took \d+\.\d\d s")
    for rank, pid in enumerate(pids):
        story.tells(rf"rank {rank} \(local rank {rank}, pid {pid}\) calls the function")
        story.tells(f"rank {rank} has returned")
        story.tells(rf"rank {rank} .*, pid {pid}\) ended with exit code 0")
    story.ends_with("the run has ended on this host.*")

    with pytest.raises(trx.WorkerFailedError):
        launcher.run(live, "killed")
    story = HostStory(logs)
    story.tells(r"the template is warm; its imports took .* s, until \d{4}.*")
    story.tells(r"rank 0 \(local rank 0, pid \d+\) was killed by SIGKILL, without an outcome")
    story.tells("stopping the workers that still run: SIGTERM, and SIGKILL after 5 s")
    story.tells("rank 1 .* was killed by SIGTERM, without an outcome")
    story.ends_with("the run has ended on this host.*")

    with pytest.raises(ValueError, match="shard 17"):
        launcher.run(live, "fails")
    story = HostStory(logs)
    story.tells(r"rank 0 \(local rank 0, pid \d+\) has failed: ValueError: shard 17")
    story.tells(r"  File .*test_log_files.py\", line \d+, in live")


def test_hosts_file_tells_of_a_lost_template_and_a_lost_store(cluster: None, logs: Path) -> None:
    def kill(victim: str) -> None:
        pid = os.getppid()
        if victim == "store":
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            (pid,) = {int(child) for child in children} - {os.getpid()}
        os.kill(pid, 9)
        time.sleep(1000)

    launcher = trx.Launcher(workers_per_host=1, backend=None)
    for victim, line in (
        ("template", "the template process, from which workers are forked, died: .*SIGKILL"),
        ("store", r"the process that serves the store \(pid \d+\) was killed by SIGKILL"),
    ):
        with pytest.raises(trx.AgentFailedError):
            launcher.run(kill, victim)
        HostStory(logs).tells(line)


def test_handler_for_a_host_gets_its_story_and_others_do_not(cluster: None) -> None:
    everybody, of_host, of_other = Kept(), Kept(), Kept()
    launcher = trx.Launcher(workers_per_host=1, backend=None)
    (hostname,) = launcher.run(os.getpid).hostnames
    trx.add_filter_to_handler(of_host, hostname)
    trx.add_filter_to_handler(of_other, hostname, 0)
    handlers = [everybody, of_host, of_other]
    dataclasses.replace(launcher, log_handlers=handlers).run(print, "hello")

    assert everybody.said == of_other.said == [("INFO", "hello")]
    assert [level for level, text in of_host.said if "calls the function" in text] == ["INFO"]


def test_agents_file_has_what_imports_print(cluster: None, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "says_at_import.py").write_text("print('imported')\n")
    launcher = trx.Launcher(
        workers_per_host=1,
        backend=None,
        preload=("says_at_import",),
        runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}},
        linger=0,
    )
    (hostname,) = launcher.run(os.getpid).hostnames

    assert "imported" in texts(run_dir(logs) / f"{hostname}.log", "INFO")


@pytest.mark.slow
def test_empty_directory_means_no_files(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launcher = trx.Launcher(workers_per_host=1, backend=None)
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", "")
    launcher.run(print, "hello")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.delenv("TORCHRUNX_LOG_DIR")
    launcher.run(print, "hello")
    assert [path.name for path in tmp_path.iterdir()] == ["torchrunx_logs"]


def test_nobody_takes_it_where_handlers_are_none(
    cluster: None, logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trx.Launcher(workers_per_host=1, backend=None, log_handlers=None).run(print, "hello")

    assert capfd.readouterr().out == ""
    assert not logs.exists()


def test_level_of_the_files_is_the_environments(
    cluster: None, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak() -> None:
        print("to stdout")
        logging.getLogger("mine").debug("fine")
        logging.getLogger("mine").warning("grave")

    launcher = trx.Launcher(workers_per_host=1, backend=None)
    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "warning")
    (hostname,) = launcher.run(speak).hostnames
    (path,) = run_dir(logs).iterdir()
    assert path.name == f"{hostname}[0].log"
    assert [HEAD.sub("", line) for line in path.read_text().splitlines()] == ["mine: grave"]

    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "DEBUG")
    directory = launcher.run(speak).log_directory
    assert directory is not None
    path = directory / f"{hostname}[0].log"
    assert texts(path, "DEBUG") == ["mine: fine"]
    assert texts(path, "INFO") == ["to stdout"]


def test_files_that_cannot_be_written_are_reported_once(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "a file" / "logs"))

    def speak() -> str:
        for _ in range(10):
            print("hello", flush=True)
            time.sleep(0.01)
        return "well"

    result = trx.Launcher(workers_per_host=2, backend=None).run(speak)

    assert list(result) == ["well", "well"]
    said = [record.getMessage() for record in caplog.records if "log files" in record.getMessage()]
    assert len(said) == 1
    assert "TORCHRUNX_LOG_DIR" in said[0]


def test_file_that_cannot_be_written_costs_no_other(
    cluster: None, logs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def speak() -> None:
        print("first", flush=True)
        if os.environ["RANK"] == "1":
            assert wait_until(
                lambda: any("first" in path.read_text() for path in files_of_rank_1())
            )
            (path,) = files_of_rank_1()
            path.unlink()
            path.mkdir()
        print("second", flush=True)

    def files_of_rank_1() -> list[Path]:
        return list((logs / "latest").glob("*1].log"))

    launcher = trx.Launcher(workers_per_host=2, backend=None, console_ranks=())
    (hostname,) = launcher.run(speak).hostnames

    assert texts(run_dir(logs) / f"{hostname}[0].log", "INFO") == ["first", "second"]
    assert "Some or all log files of this launch cannot be written" in caplog.text


def test_failure_says_where_the_output_is(cluster: None, logs: Path) -> None:
    def fail() -> None:
        print("before")
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad") as caught:
        trx.Launcher(workers_per_host=1, backend=None).run(fail)

    assert f"All output of this launch: {run_dir(logs)}" in caught.value.__notes__
