"""What ps, top and py-spy call the processes of a launch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import torchrunx_ray as trx
from tests import processes
from torchrunx_ray.wire.messages import StartMethod

NAMES = list[str]
"""The title, which is the first word of the command line, and the short name of one process."""


def names(pid: int) -> NAMES:
    title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    return [title, Path(f"/proc/{pid}/comm").read_text().rstrip("\n")]


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_every_process_is_called_by_role_run_and_rank(
    cluster: None, start_method: StartMethod
) -> None:
    def look() -> tuple[dict[str, NAMES], list[NAMES]]:
        above = processes.above(os.getpid())
        siblings = Path(f"/proc/{above['template']}/task/{above['template']}/children").read_text()
        found = {name: names(above[name]) for name in ("outer keeper", "keeper", "template")}
        workers_and_store = sorted(names(int(pid)) for pid in siblings.split())
        dist.barrier()  # both ranks live until both have looked
        return found, workers_and_store

    launcher = trx.Launcher(workers_per_host=2, start_method=start_method, name="train")
    run = launcher.submit(look)
    above, workers_and_store = run.result().rank(1)

    assert re.fullmatch(r"train-\w{6}", run.name)
    assert above == {name: [f"torchrunx_ray: {name}", name] for name in above}
    assert workers_and_store == [
        [f"torchrunx_ray: store of {run.name}", f"store {run.name}"[:15]],
        [f"torchrunx_ray: worker rank 0 of {run.name}", f"rank 0 {run.name}"[:15]],
        [f"torchrunx_ray: worker rank 1 of {run.name}", f"rank 1 {run.name}"[:15]],
    ]


def test_title_that_the_function_gives_its_process_is_seen(cluster: None) -> None:
    """setproctitle looks for the arguments over which our title was written.

    It does not find them in a process whose environment was changed, such as a forked worker.
    """

    def rename() -> str:
        from ray._raylet import setproctitle  # Ray has a copy of it

        setproctitle("my training")
        return processes.command_line(os.getpid())

    launcher = trx.Launcher(workers_per_host=1, backend=None, start_method="spawn")
    assert " my training " in launcher.run(rename).rank(0)


def test_title_that_is_too_long_is_cut_between_letters(cluster: None) -> None:
    def look() -> NAMES:
        return names(os.getpid())

    launcher = trx.Launcher(workers_per_host=1, backend=None, name="ü" * 500)
    title, short = launcher.run(look).rank(0)

    assert re.fullmatch("torchrunx_ray: worker rank 0 of ü{20,}", title)
    assert short == "rank 0 üüüü"


def test_process_without_descriptors_goes_on_without_a_title() -> None:
    script = """
import resource
from torchrunx_ray.wire.title import set_title
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
set_title("worker rank 3", "train-1a2b3c")
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(open("/proc/self/cmdline").read().split("\\0")[1], open("/proc/self/comm").read())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("-c rank 3 train-1a\n\n", "")


def test_environment_behind_the_arguments_is_never_overwritten() -> None:
    script = """
from torchrunx_ray.wire.title import set_title
set_title("worker rank 3", "train-1a2b3c" * 50)
print(open("/proc/self/environ").read())
"""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable], env={"PYTHONPATH": root}, input=script, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"PYTHONPATH={root}\0\n", "")
