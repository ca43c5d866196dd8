"""What a worker finds when it looks at itself; each test is one promise of the design's section 4."""

import bz2
import dataclasses
import gzip
import lzma
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch.distributed as dist

import torchrunx_ray as trx
from tests import processes
from torchrunx_ray.wire.messages import StartMethod
from torchrunx_ray.worker.function import open_files


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request: pytest.FixtureRequest) -> StartMethod:
    return request.param


FORKED_IN_CI = pytest.mark.parametrize(
    "start_method",
    ["fork", pytest.param("spawn", marks=[pytest.mark.slow, pytest.mark.exhaustive])],
    indirect=True,
)
"""Spawned workers come to this the same way as forked ones."""


@pytest.fixture
def launcher(cluster: None, start_method: StartMethod) -> trx.Launcher:
    """With a group where that costs little: each spawned worker imports torch for it, for 1.6 s of CPU."""
    backend = None if start_method == "spawn" else "auto"
    return trx.Launcher(workers_per_host=2, start_method=start_method, backend=backend)


@pytest.fixture
def in_group(launcher: trx.Launcher) -> trx.Launcher:
    return dataclasses.replace(launcher, backend="auto")


def status(name: str) -> str:
    line = re.search(rf"^{name}:\s*(.*)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None
    return line[1]


def signals(mask: str) -> set[int]:
    """Signal numbers of a mask as /proc shows it."""
    return {number + 1 for number in range(64) if int(mask, 16) >> number & 1}


def test_signal_mask_is_empty_and_dispositions_are_pythons_own(launcher: trx.Launcher) -> None:
    def look() -> tuple[str, str, str]:
        return status("SigBlk"), status("SigIgn"), status("SigCgt")

    for blocked, ignored, caught in launcher.run(look):
        assert signals(blocked) == set()
        # 32 and 33 are glibc's own, which nobody may reset.
        assert signals(ignored) - {32, 33} == {signal.SIGPIPE, signal.SIGXFSZ}
        # Ctrl-C, the request for stacks, and crashes, whose place faulthandler tells.
        crashes = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
        assert signals(caught) - {32, 33} == {signal.SIGINT, signal.SIGUSR2, *crashes}


def test_worker_leads_its_process_group_below_the_template(launcher: trx.Launcher) -> None:
    def look() -> tuple[int, int, int, int]:
        return os.getpid(), os.getpgid(0), os.getppid(), os.getsid(0)

    first, second = launcher.run(look)

    for pid, group, parent, session in (first, second):
        assert pid == group
        assert parent == session, "the template leads the session"
    assert first[2] == second[2]


@FORKED_IN_CI
def test_two_keepers_stand_between_agent_and_template(launcher: trx.Launcher) -> None:
    def look() -> dict[str, str]:
        above = processes.above(os.getpid())
        return {name: processes.command_line(pid) for name, pid in above.items()}

    above = launcher.run(look).rank(0)

    assert above["keeper"].startswith("torchrunx_ray: keeper ")
    assert above["outer keeper"].startswith("torchrunx_ray: outer keeper ")
    assert above["agent"].startswith("ray::")


@FORKED_IN_CI
def test_worker_is_not_niced(launcher: trx.Launcher) -> None:
    assert list(launcher.run(os.nice, 0)) == [0, 0]


def test_worker_has_no_descriptors_but_its_own(launcher: trx.Launcher) -> None:
    def look() -> dict[int, str]:
        fds: dict[int, str] = {}
        for fd in os.listdir("/proc/self/fd"):
            try:
                fds[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:  # that of the listing itself
                continue
        return fds

    fds = dataclasses.replace(launcher, backend=None).run(look).rank(1)

    assert fds.pop(0) == "/dev/null"
    assert fds.pop(1).startswith("pipe:")
    assert fds.pop(2).startswith("pipe:")
    kinds = sorted(name.partition(":")[0] for name in fds.values())
    assert kinds == ["pipe", "socket", "socket"], "for records, for stacks, and for the rest"


def test_worker_knows_its_rank_as_torchrunx_and_torchrun_tell_it(in_group: trx.Launcher) -> None:
    names = [
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
        "NODE_RANK",
        "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_MAX_RESTARTS",
    ]

    def look() -> tuple[str, ...]:
        assert os.environ["TORCHELASTIC_RUN_ID"]
        assert dist.is_torchelastic_launched()
        return tuple(os.environ[name] for name in names)

    expected = "{0} {0} 2 2 0 1 {0} 2 default 0 0 0"
    for rank, values in enumerate(in_group.run(look)):
        assert " ".join(values) == expected.format(rank)


@FORKED_IN_CI
def test_master_address_is_that_of_rank_0s_host(in_group: trx.Launcher) -> None:
    import ray

    def look() -> tuple[str, str]:
        return os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]

    first, second = in_group.run(look)

    assert first == second
    assert first[0] == ray.util.get_node_ip_address()
    assert 0 < int(first[1]) < 65536


@FORKED_IN_CI
def test_function_runs_on_the_main_thread(launcher: trx.Launcher) -> None:
    def look() -> bool:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # raises on any other thread
        return threading.current_thread() is threading.main_thread()

    assert list(launcher.run(look)) == [True, True]


def test_no_thread_runs_but_the_functions_own_and_one_that_tells_stacks(
    start_method: StartMethod, cluster: None
) -> None:
    launcher = trx.Launcher(workers_per_host=2, backend=None, start_method=start_method)

    assert list(launcher.run(lambda: len(os.listdir("/proc/self/task")))) == [2, 2]
    assert list(launcher.run(threading.active_count)) == [1, 1]


@FORKED_IN_CI
def test_folder_is_the_drivers(launcher: trx.Launcher) -> None:
    assert launcher.run(os.getcwd).rank(0) == os.getcwd()


@FORKED_IN_CI
def test_sys_path_is_the_agents(launcher: trx.Launcher) -> None:
    def look() -> tuple[list[str], str | None, str]:
        return sys.path, os.environ.get("PYTHONPATH"), sys.executable

    path, variable, executable = launcher.run(look).rank(0)

    assert os.getcwd() in path
    assert variable == os.environ.get("PYTHONPATH"), "what the function starts sees the user's own"
    assert executable == sys.executable


def test_command_line_is_the_drivers(launcher: trx.Launcher) -> None:
    assert launcher.run(lambda: sys.argv).rank(1) == sys.argv


def test_rays_own_variables_do_not_leak(launcher: trx.Launcher) -> None:
    def look() -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if k.startswith(("RAY_", "SPT_", "PYTHONB"))}

    variables = launcher.run(look).rank(0)

    assert "RAY_JOB_ID" not in variables
    assert "RAY_RAYLET_PID" not in variables
    assert "PYTHONBREAKPOINT" not in variables
    assert ":" in variables["RAY_ADDRESS"]


@FORKED_IN_CI
def test_function_can_join_the_ray_cluster(launcher: trx.Launcher) -> None:
    import ray

    def count_nodes() -> int:
        import ray

        ray.init(log_to_driver=False)
        return len(ray.nodes())

    one = trx.Launcher(workers_per_host=1, start_method=launcher.start_method)

    assert one.run(count_nodes).rank(0) == len(ray.nodes())


def threads() -> tuple[str | None, int]:
    import torch

    return os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()


@FORKED_IN_CI
def test_several_workers_get_one_openmp_thread_each(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    assert list(launcher.run(threads)) == [("1", 1), ("1", 1)]


@FORKED_IN_CI
def test_one_worker_gets_as_many_openmp_threads_as_without_us(
    start_method: StartMethod, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ask_torch = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    plain = int(subprocess.run(ask_torch, capture_output=True, check=True).stdout)

    launcher = trx.Launcher(workers_per_host=1, start_method=start_method)

    assert launcher.run(threads).rank(0) == (None, plain)


@FORKED_IN_CI
def test_users_own_openmp_threads_win(
    launcher: trx.Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    assert list(launcher.run(threads)) == [("2", 2), ("2", 2)]


@FORKED_IN_CI
def test_launch_without_gpus_sees_none(launcher: trx.Launcher) -> None:
    assert launcher.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).rank(0) == ""


def test_stdin_is_empty_and_streams_are_line_buffered(launcher: trx.Launcher) -> None:
    def look() -> tuple[str, bool, bool]:
        return sys.stdin.read(), sys.stdout.line_buffering, sys.stderr.line_buffering

    assert launcher.run(look).rank(0) == ("", True, True)


@FORKED_IN_CI
def test_multiprocessing_forks(launcher: trx.Launcher) -> None:
    def look() -> str | None:
        import multiprocessing

        return multiprocessing.get_start_method()

    assert list(launcher.run(look)) == ["fork", "fork"]


@FORKED_IN_CI
def test_workers_do_not_load_ray(in_group: trx.Launcher) -> None:
    def look() -> tuple[bool, str]:
        return "ray" in sys.modules, Path(f"/proc/{os.getppid()}/maps").read_text()

    loaded, template_maps = in_group.run(look).rank(0)

    assert not loaded
    assert "_raylet" not in template_maps


@FORKED_IN_CI
def test_agent_does_not_load_torch(in_group: trx.Launcher) -> None:
    def look() -> str:
        return Path(f"/proc/{processes.agent_pid()}/maps").read_text()

    maps = in_group.run(look).rank(0)

    assert "_raylet" in maps, "this is the agent"
    assert "libtorch" not in maps


def test_worker_exits_as_an_interpreter_does(in_group: trx.Launcher, tmp_path: Path) -> None:
    """Exit functions run and threads that are no daemons are waited for; finalizers too."""

    def leave_things_behind() -> None:
        import atexit
        import time
        import weakref

        class Thing: ...

        rank = os.environ["RANK"]
        thing = Thing()
        globals()["kept"] = thing
        weakref.finalize(thing, (tmp_path / f"finalized{rank}").touch)
        atexit.register((tmp_path / f"exited{rank}").touch)

        def work() -> None:
            time.sleep(0.3)
            (tmp_path / f"worked{rank}").touch()

        threading.Thread(target=work).start()

    in_group.run(leave_things_behind)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{what}{rank}" for what in ("exited", "finalized", "worked") for rank in (0, 1)
    ]


def test_file_whose_lock_a_thread_holds_for_ever_keeps_no_run_from_ending(
    one: trx.Launcher,
) -> None:
    def leave_a_thread_that_writes() -> int:
        open_files._FINISH_S = 0.3
        _, writer = os.pipe()  # nobody reads
        file = os.fdopen(writer, "wb")
        threading.Thread(target=file.write, args=(b"x" * 2**20,), daemon=True).start()
        time.sleep(0.2)
        return 7

    assert one.submit(leave_a_thread_that_writes).result(timeout=30).rank(0) == 7


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_what_is_left_in_buffers_is_written(
    cluster: None, tmp_path: Path, start_method: StartMethod
) -> None:
    """An interpreter closes files at its end; they were lost with the process."""

    def train() -> None:
        class Trainer:
            def __init__(self) -> None:
                self.log = open(tmp_path / "log", "w")  # noqa: SIM115
                self.step = self.write  # a cycle
                self.raw = open(tmp_path / "raw", "wb")  # noqa: SIM115

            def write(self) -> None:
                self.log.write("last step")
                self.raw.write(b"bytes")

        Trainer().step()

    trx.Launcher(workers_per_host=1, backend=None, start_method=start_method).run(train)

    assert (tmp_path / "log").read_text() == "last step"
    assert (tmp_path / "raw").read_text() == "bytes"


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_files_that_write_their_end_at_close_are_whole(
    cluster: None, tmp_path: Path, start_method: StartMethod
) -> None:
    """Compressed files lacked their end, and gc.freeze() hid every file."""

    def train() -> None:
        import bz2
        import gc
        import gzip
        import io
        import lzma
        import zipfile

        text = open(tmp_path / "text", "w")  # noqa: SIM115
        text.write("last step")
        archive = zipfile.ZipFile(tmp_path / "zip", "w")
        archive.writestr("closed", "closed")
        frozen = [
            gzip.open(tmp_path / "frozen.gz", "wt"),  # noqa: SIM115
            lzma.open(tmp_path / "lzma", "wt"),  # noqa: SIM115
            io.TextIOWrapper(archive.open("member", "w")),
        ]
        globals()["kept"] = text, frozen
        gc.freeze()
        inner = open(tmp_path / "inner.gz", "wb")  # noqa: SIM115
        local = [bz2.open(tmp_path / "bz2", "wt"), gzip.open(inner, "wt")]  # noqa: SIM115
        for file in frozen + local:
            file.write("last step")

        class Unhashable(type):
            def __eq__(cls, other: object) -> bool:
                return NotImplemented

        globals()["odd"] = Unhashable("Odd", (), {})()
        error = ValueError("late")  # a cycle, which keeps what is local
        raise error

    launcher = trx.Launcher(workers_per_host=1, backend=None, start_method=start_method)
    with pytest.raises(ValueError, match="late"):
        launcher.run(train)

    with zipfile.ZipFile(tmp_path / "zip") as archive:
        assert archive.read("closed") == b"closed"
        assert [
            (tmp_path / "text").read_bytes(),
            archive.read("member"),
            gzip.decompress((tmp_path / "frozen.gz").read_bytes()),
            gzip.decompress((tmp_path / "inner.gz").read_bytes()),
            bz2.decompress((tmp_path / "bz2").read_bytes()),
            lzma.decompress((tmp_path / "lzma").read_bytes()),
        ] == [b"last step"] * 6
