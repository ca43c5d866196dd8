"""All that workers say is in log files, one for each; where none can be written, the launch goes on."""

import logging
import os
import time
from datetime import datetime
from pathlib import Path

import pytest

import torchrunx_ray as trx
from tests.logs import HEAD


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default files go."""
    monkeypatch.setenv("TORCHRUNX_LOG_DIR", str(tmp_path / "logs"))
    return tmp_path / "logs"


def run_dir(logs: Path) -> Path:
    (directory,) = logs.iterdir()
    return directory


def texts(path: Path, level: str) -> list[str]:
    """The lines of a file that have this level."""
    heads = [line.split(": ", 1) for line in path.read_text().splitlines() if HEAD.match(line)]
    return [text for head, text in heads if head.endswith(f":{level}")]


def test_every_line_of_every_rank_is_in_its_file(cluster: None, logs: Path) -> None:
    def flood() -> None:
        for i in range(50_000):
            print(f"line {i} of rank {os.environ['RANK']} {'x' * 70}")

    launcher = trx.Launcher(workers_per_host=4, backend=None, console_ranks=())
    (hostname,) = launcher.run(flood).hostnames

    for rank in range(4):
        path = run_dir(logs) / f"{hostname}[{rank}].log"
        assert texts(path, "INFO") == [f"line {i} of rank {rank} {'x' * 70}" for i in range(50_000)]


def test_files_are_named_after_time_and_worker(cluster: None, logs: Path) -> None:
    launcher = trx.Launcher(workers_per_host=2, backend=None)
    for _ in range(3):
        (hostname,) = launcher.run(print, "hello").hostnames

    directories = sorted(logs.iterdir())
    assert len(directories) == 3
    assert all(datetime.fromisoformat(directory.name) for directory in directories)
    for directory in directories:
        names = sorted(path.name for path in directory.iterdir())
        assert names == [f"{hostname}[0].log", f"{hostname}[1].log"]


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

    assert texts(run_dir(logs) / f"{hostname}.log", "INFO") == ["imported"]


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
    assert [HEAD.sub("", line) for line in path.read_text().splitlines()] == ["mine: grave"]

    path.unlink()
    path.parent.rmdir()
    monkeypatch.setenv("TORCHRUNX_LOG_LEVEL", "DEBUG")
    launcher.run(speak)
    (path,) = run_dir(logs).iterdir()
    assert texts(path, "DEBUG") == ["mine: fine"]
    assert texts(path, "INFO") == ["to stdout"]
    assert path.name == f"{hostname}[0].log"


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
        time.sleep(0.5)
        if os.environ["RANK"] == "1":
            (directory,) = logs.iterdir()
            (path,) = directory.glob("*1].log")
            path.unlink()
            path.mkdir()
        time.sleep(0.5)
        print("second", flush=True)

    launcher = trx.Launcher(workers_per_host=2, backend=None, console_ranks=())
    (hostname,) = launcher.run(speak).hostnames

    assert texts(run_dir(logs) / f"{hostname}[0].log", "INFO") == ["first", "second"]
    assert "cannot be written, or not all" in caplog.text


def test_failure_says_where_the_output_is(cluster: None, logs: Path) -> None:
    def fail() -> None:
        print("before")
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad") as caught:
        trx.Launcher(workers_per_host=1, backend=None).run(fail)

    assert f"All output of this launch: {run_dir(logs)}" in caught.value.__notes__
