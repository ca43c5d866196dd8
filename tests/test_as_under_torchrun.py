"""Scripts that were written for torchrun, under torchrun and under torchrunx-ray: the same output, rank by rank."""

from pathlib import Path

import pytest

from tests.commands import OURS, TORCHRUNS, begin, ended, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]

HEAD = """
import os, sys
rank = int(os.environ["RANK"])
def say(*what):
    sys.stdout.write(" ".join(["rank", str(rank), *map(str, what)]) + "\\n")
"""

GROUP = (
    HEAD
    + """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
def total(number):
    summed = torch.tensor(number)
    dist.all_reduce(summed)
    dist.barrier()  # gloo fails on a rank that still connects when its peer leaves
    return int(summed)
"""
)

SCRIPTS = {
    "how it is started": HEAD
    + """
import inspect, warnings
say(__name__, os.path.basename(__file__), __spec__, __package__, sys.argv, os.path.basename(sys.path[0]))
say(sys.modules["__main__"].say is say, inspect.getsource(say).splitlines()[0], sys.stdin.read() == "")
say(*(f"{name}={os.environ.get(name)}" for name in (
    "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "ROLE_NAME", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "OMP_NUM_THREADS", "OF_THE_SHELL")))
""",
    "DistributedDataParallel": GROUP
    + """
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    model(torch.full((4, 2), float(rank + step))).square().mean().backward()
    optimizer.step()
say([round(float(each), 5) for each in model.module.weight.flatten()])
dist.destroy_process_group()
""",
    "a group that is made twice": GROUP
    + """
say(total(rank))
dist.destroy_process_group()
dist.init_process_group("gloo")
say(total(rank + 1))
dist.destroy_process_group()
""",
    "no group": HEAD + "say(sum(range(rank + 3)))",
    "a training that continues after a failure": GROUP
    + """
from pathlib import Path
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
saved = Path("step")
begin = int(saved.read_text()) if saved.exists() else 0
for step in range(begin, 4):
    if total(step) and step == 2 and attempt == 0:
        if rank == 0:
            saved.write_text(str(step))
        dist.barrier()
        sys.exit(1)
say(attempt, begin, step)
""",
    "children of its own": HEAD
    + """
import multiprocessing
class Square:
    def __init__(self, of): self.of = of
    def __call__(self): return self.of ** 2
def squared(each): return each()
if __name__ == "__main__":
    for method in "spawn", "fork":
        with multiprocessing.get_context(method).Pool(1) as pool:
            say(method, pool.map(squared, [Square(rank + 2)]))
""",
    "arguments": HEAD
    + """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--local-rank", type=int, default=int(os.environ["LOCAL_RANK"]))
parser.add_argument("--lr", type=float)
parser.add_argument("overrides", nargs="*")
args = parser.parse_args()
say(args.local_rank, args.lr, dict(each.split("=") for each in args.overrides))
""",
    "words at the end": HEAD
    + """
import atexit, threading, time
atexit.register(say, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), say("a thread"))).start()
say("the last line")
""",
    "a signal handler, a warning and a traceback": HEAD
    + """
import signal, traceback, warnings
signal.signal(signal.SIGUSR2, lambda signum, frame: say(signal.Signals(signum).name, frame.f_code.co_name))
os.kill(os.getpid(), signal.SIGUSR2)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("default")
    warnings.warn("old", DeprecationWarning)
say([(each.filename, each.lineno) for each in seen])
def fail():
    raise KeyError("x")
try:
    fail()
except KeyError:
    say([(each.filename, each.name, each.line) for each in traceback.extract_tb(sys.exc_info()[2])])
""",
    "workers of a DataLoader": HEAD
    + """
import torch
class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return index * rank
if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2)
    say([batch.tolist() for batch in loader])
""",
    "another torchrun": HEAD
    + """
from torch.distributed import run
if "INNER" in os.environ:
    say("inner", os.environ["WORLD_SIZE"])
else:
    os.environ["INNER"] = str(rank)
    run.main(["--standalone", "--nproc-per-node=1", "--monitor-interval=0.05", __file__])
    say("outer", os.environ["WORLD_SIZE"])
""",
}

EXPECTED = {
    "a group that is made twice": ["rank 0 1", "rank 0 3", "rank 1 1", "rank 1 3"],
    "a training that continues after a failure": ["rank 0 1 2 3", "rank 1 1 2 3"],
}
"""Output of scripts with which torchrun hangs or fails now and then: a group reads keys of an earlier one."""

WORDS = {"arguments": ["--lr", "0.1", "model=small", "steps=3"], "how it is started": ["a", "-m"]}

IN_CI = {
    "how it is started",
    "DistributedDataParallel",
    "children of its own",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_script_says_what_it_should_say_under_torchrun(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPTS[name])

    done = run(tmp_path, "--nproc-per-node=2", "--max-restarts=1", "train.py")

    assert sorted(done.stdout.splitlines()) == EXPECTED[name], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=() if each in IN_CI else pytest.mark.exhaustive)
        for each in SCRIPTS
        if each not in EXPECTED
    ],
)
def test_script_says_the_same(tmp_path: Path, name: str) -> None:
    said: dict[str, list[str]] = {}
    status: dict[str, int] = {}
    words = ["--nproc-per-node=2", "--max-restarts=1", "train.py", *WORDS.get(name, ())]
    for command in TORCHRUNS, OURS:
        folder = tmp_path / command[-1]
        folder.mkdir()
        (folder / "train.py").write_text(SCRIPTS[name])
        done = ended(begin(command, folder, *words, OF_THE_SHELL="here"))
        said[command[-1]] = sorted(done.stdout.replace(command[-1], "FOLDER").splitlines())
        status[command[-1]] = done.returncode
        assert done.stdout, done.stderr

    torchruns, ours = said.values()
    assert ours == torchruns
    assert list(status.values()) == [0, 0]
