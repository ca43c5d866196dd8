"""A worker's error file, which torch's `@record` writes, reaches the driver."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import record

import torchrunx_ray as trx
from tests.processes import above, is_alive, note, wait_until

NAME = "TORCHELASTIC_ERROR_FILE"

SCRIPT = """
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    raise ValueError("the third shard is empty")

main()
"""


@pytest.fixture
def two(cluster: None) -> trx.Launcher:
    return trx.Launcher(workers_per_host=2, backend=None)


def error_file() -> Path:
    return Path(os.environ[NAME])


def raised(launcher: trx.Launcher, write: Any, *args: Any) -> trx.WorkerFailedError:
    with pytest.raises(trx.WorkerFailedError) as caught:
        launcher.run(write, *args)
    return caught.value


@pytest.mark.slow
def test_error_that_a_script_of_the_function_records_is_part_of_the_exception(
    two: trx.Launcher,
) -> None:
    def train() -> None:
        if os.environ["RANK"] == "1":
            os._exit(subprocess.run([sys.executable, "-c", SCRIPT]).returncode)

    error = raised(two, train)

    assert (error.rank, error.exit_code) == (1, 1)
    assert error.error_file_data is not None
    assert error.error_file_data["message"]["message"] == "ValueError: the third shard is empty"
    assert "Its error file:\n  Traceback (most recent call last):" in str(error)
    assert 'File "<string>", line 6, in main' in str(error)
    assert str(error).count("  ValueError: the third shard is empty") == 1


def test_each_rank_and_attempt_has_an_error_file_of_its_own(two: trx.Launcher) -> None:
    def train() -> tuple[str, bool]:
        path = error_file()
        if trx.context().attempt == 0:
            path.write_text("{}")
            raise ValueError("the first attempt")
        return str(path), path.exists()

    result = trx.Launcher(workers_per_host=2, backend=None, max_restarts=1).run(train)

    (first, existed), (second, also_existed) = result
    assert Path(first).parts[-3:] == ("attempt_1", "0", "error.json")
    assert Path(second).parts[-3:] == ("attempt_1", "1", "error.json")
    assert not existed
    assert not also_existed


def test_recorded_exception_is_raised_as_itself_and_told_once(two: trx.Launcher) -> None:
    @record
    def train() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("the third shard is empty")
        signal.pause()

    with pytest.raises(ValueError, match="the third shard is empty") as caught:
        two.run(train)

    failure = caught.value.__cause__
    assert isinstance(failure, trx.RemoteFailure)
    assert failure.error_file_data is not None
    extra = failure.error_file_data["message"]["extraInfo"]
    assert extra["py_callstack"].endswith("ValueError: the third shard is empty\n")
    assert not any("error file" in line for line in caught.value.__notes__)


def test_other_error_in_the_file_is_a_note_of_the_exception(two: trx.Launcher) -> None:
    def train() -> None:
        error_file().write_text(json.dumps({"message": "the card is lost", "timestamp": "1"}))
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch") as caught:
        two.run(train)

    assert "The error file of the rank:\n  the card is lost" in caught.value.__notes__


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"", None),
        (b"not JSON \xff", "not JSON \\xff"),
        (b"[1, 2]", "[1, 2]"),
        (b'{"message": {"message": 7, "extraInfo": []}}', "7"),
        (b'{"message": {}}', '{"message": {}}'),
        (b'{"cause": "a card"}', '{"cause": "a card"}'),
        (b'{"message": "' + b"x" * 5_000_000, '{"message": "xxxx'),
    ],
)
def test_any_content_of_the_file_is_shown(
    two: trx.Launcher, content: bytes, shown: str | None
) -> None:
    def train() -> None:
        error_file().write_bytes(content)
        os._exit(3)

    error = raised(two, train)

    assert error.exit_code == 3
    if shown is None:
        assert "error file" not in str(error)
    else:
        assert f"Its error file:\n  {shown}" in str(error)
    assert len(str(error)) < 100_000


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_agent_does_not_hang_on_what_is_no_plain_file(two: trx.Launcher, kind: str) -> None:
    def train() -> None:
        path = error_file()
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case _:
                path.symlink_to("/dev/zero")
        os._exit(3)

    error = raised(two, train)

    assert error.exit_code == 3


def test_folder_is_private_and_ends_with_the_template(cluster: None) -> None:
    def folder() -> tuple[Path, int]:
        path = error_file().parents[3]
        return path, stat.S_IMODE(path.stat().st_mode)

    path, mode = trx.Launcher(workers_per_host=1, backend=None, linger=0).run(folder).rank(0)

    assert mode == 0o700
    assert wait_until(lambda: not path.exists())


@pytest.mark.parametrize("victims", [("agent",), ("agent", "outer keeper"), ("agent", "keeper")])
def test_folder_ends_with_the_agent(
    cluster: None, tmp_path: Path, victims: tuple[str, ...]
) -> None:
    run = submit_and_wait(tmp_path)
    pids, path = run[1], run[2]

    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    with pytest.raises(trx.AgentFailedError):
        run[0].result(timeout=60)

    assert wait_until(lambda: not path.exists())


def test_next_agent_removes_what_an_agent_killed_with_both_keepers_has_left(
    cluster: None, tmp_path: Path
) -> None:
    run, pids, path = submit_and_wait(tmp_path)
    doomed = [pids[name] for name in ("outer keeper", "keeper", "agent")]
    for pid in doomed:
        os.kill(pid, signal.SIGSTOP)
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(trx.AgentFailedError):
        run.result(timeout=60)
    assert wait_until(lambda: not any(map(is_alive, doomed)))
    assert path.exists()

    trx.Launcher(workers_per_host=1, backend=None, extra_env_vars={"A_NEW": "agent"}).run(int)

    assert not path.exists()


def submit_and_wait(tmp_path: Path) -> tuple[Any, dict[str, int], Path]:
    def train() -> None:
        note(tmp_path / "worker", f"{os.getpid()} {error_file().parents[3]}")
        signal.pause()

    launcher = trx.Launcher(workers_per_host=1, backend=None)
    run = launcher.submit(train)
    assert wait_until((tmp_path / "worker").exists, 60)
    pid, path = (tmp_path / "worker").read_text().split()
    assert Path(path).exists()
    return run, above(int(pid)), Path(path)


def test_folders_of_others_with_a_similar_name_are_left_alone(
    cluster: None, tmp_path: Path
) -> None:
    parent = Path(tempfile.gettempdir())
    logs = parent / "torchrunx_ray_logs"
    logs.mkdir()
    open_to_all = parent / f"torchrunx_ray_{'0' * 32}"
    open_to_all.mkdir()
    victim = tmp_path / "authorized_keys"
    victim.touch()
    private = parent / f"torchrunx_ray_{'1' * 32}"
    private.mkdir(mode=0o700)
    (private / "outside").symlink_to(victim)

    trx.Launcher(workers_per_host=1, backend=None, extra_env_vars={"A_NEW": "one"}).run(int)

    assert logs.exists()
    assert open_to_all.exists()
    assert not private.exists()
    assert victim.exists()
    logs.rmdir()
    open_to_all.rmdir()
