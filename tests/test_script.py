"""A worker's `__main__` is the user's script, as far as functions and arguments brought it along."""

from pathlib import Path

import pytest

from tests.scripts import run_alone

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]


SCRIPT = """
import dataclasses
import multiprocessing
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchrunx_ray as trx
from typing import Generic, TypeVar

T = TypeVar("T")

class Kept(Generic[T]):
    kept: T

@dataclasses.dataclass
class Score(Kept[int]):
    rank: int

class Network(torch.nn.Module):
    def forward(self, x):
        return F.relu(x) + 1

def square(x):
    return x * x

def gather():
    scores = [None]
    dist.all_gather_object(scores, Score(dist.get_rank()))
    return scores

def compiled():
    return torch.compile(torch.nn.Sequential(Network()), backend="eager")(torch.ones(2)).sum().item()

def spawned():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(square, [3])

def everything():
    return gather(), compiled(), spawned()

if __name__ == "__main__":
    print(trx.launch(everything, workers_per_host=1, start_method=METHOD).rank(0))
"""


@pytest.mark.parametrize(
    "start_method", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)]
)
def test_a_scripts_own_classes_and_globals_are_found_by_name(
    tmp_path: Path, start_method: str
) -> None:
    """Functions come without the module `__main__`; pickle and torch.compile look there."""
    done = run_alone(SCRIPT.replace("METHOD", repr(start_method)), tmp_path)

    assert done.stdout == "([Score(rank=0)], 4.0, [9])\n", done.stderr


def test_a_process_that_multiprocessing_starts_cannot_launch_by_importing_the_script(
    tmp_path: Path,
) -> None:
    script = """
import multiprocessing
import torchrunx_ray as trx

def spawn():
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    return child.exitcode

def load():
    from torch.utils.data import DataLoader
    next(iter(DataLoader([1], num_workers=1, multiprocessing_context="spawn")))

print(trx.launch(spawn, workers_per_host=1, backend=None).rank(0))
trx.launch(load, workers_per_host=1, backend=None)
"""
    done = run_alone(script, tmp_path)

    assert done.stdout == "1\n", done.stderr
    printed, _, raised = done.stderr.rpartition("RuntimeError: DataLoader worker")
    what_to_do = 'Put the launch under `if __name__ == "__main__":`'
    assert what_to_do in printed
    assert what_to_do in raised, raised


def test_value_of_an_earlier_launch_does_not_bring_old_globals_to_the_function(
    tmp_path: Path,
) -> None:
    """All that was unpickled shared one set of globals, and what came last won."""
    script = """
import torchrunx_ray as trx

RATE = 0.1

class Model:
    def rate(self):
        return RATE

def make():
    return Model()

def train(model):
    return RATE, model.rate()

if __name__ == "__main__":
    launcher = trx.Launcher(workers_per_host=1, backend=None, preload=())
    made = launcher.run(make)
    RATE = 0.01
    print(launcher.run(train, made.ref(0)).rank(0))
"""
    done = run_alone(script, tmp_path)

    assert done.stdout == "(0.01, 0.1)\n", done.stderr


def test_function_keeps_its_globals_when_it_unpickles_one_of_its_own(tmp_path: Path) -> None:
    script = """
import pickle
import cloudpickle
import torchrunx_ray as trx

seen = []

def note():
    seen.append(1)

def train():
    again = pickle.loads(cloudpickle.dumps(note))
    seen.append(0)
    again()
    note()
    return seen

if __name__ == "__main__":
    print(trx.launch(train, workers_per_host=1, backend=None, preload=()).rank(0))
"""
    done = run_alone(script, tmp_path)

    assert done.stdout == "[0, 1]\n", done.stderr


DRIVERS_OWN = """
import dataclasses
import enum
import functools
import ray
import torchrunx_ray as trx

ray.init()
LOG, RATE = [], 0.1

class Model:
    steps = 0
    def note(self):
        LOG.append("noted")
        return RATE

class Colour(enum.Enum):
    RED = 1
    def rate(self):
        return RATE

class Bad(Exception):
    def rate(self):
        return RATE

@dataclasses.dataclass(slots=True)
class Score:
    loss: float

class Pair:
    __slots__ = "first", "__second"
    def __init__(self):
        self.first, self.__second = 1, 2
    def second(self):
        return self.__second

@functools.lru_cache(maxsize=7)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

def train():
    Model.steps = 100
    return Model(), Colour.RED, Score(0.5), Pair(), fibonacci(30), fibonacci.cache_info().misses

def fail():
    raise Bad

launcher = trx.Launcher(hostnames=1, workers_per_host=1, backend=None, preload=())
mine = Model()
model, colour, score, pair, number, misses = launcher.run(train).rank(0)
try:
    launcher.run(fail)
except Bad as error:
    bad = error
RATE = 0.01
print([type(model) is Model, colour is Colour.RED, score == Score(0.5), type(pair) is Pair])
print([pair.first, pair.second(), number, misses])
print([Model.steps, mine.note(), model.note(), colour.rate(), bad.rate()], LOG)
print(launcher.run(lambda: (Model().note(), Colour.RED.rate(), RATE)).rank(0))
"""


def test_what_comes_back_leaves_the_drivers_classes_as_they_are(tmp_path: Path) -> None:
    """A fetched value overwrote the script's class: with what the worker had set, and the worker's globals.

    Objects with slots could not be unpickled, as their class came to the worker without these; nor
    could cached functions, which cloudpickle looks up by name.
    """
    done = run_alone(DRIVERS_OWN, tmp_path)
    assert done.stdout.splitlines() == [
        "[True, True, True, True]",
        "[1, 2, 832040, 31]",
        "[0, 0.01, 0.01, 0.01, 0.01] ['noted', 'noted']",
        "(0.01, 0.01, 0.01)",
    ], done.stderr


RETRIED = """
import pickle, sys, types
import ray
import torchrunx_ray as trx

ray.init()

def make():
    import fractions, sys, types
    sys.modules["only_here"] = there = types.ModuleType("only_here")
    exec("class Part: pass", there.__dict__)

    class Whole:
        part = there.Part()
        def well(self):
            return "well"

    return Whole()

result = trx.launch(make, hostnames=1, workers_per_host=1, backend=None, preload=())
try:
    result.rank(0)
except trx.PayloadError as error:
    kept = error
sys.modules["only_here"] = there = types.ModuleType("only_here")
exec("class Part: pass", there.__dict__)
first, second = result.rank(0), result.rank(0)
print(first.well(), type(first) is type(second))
"""


def test_class_that_could_not_be_loaded_is_whole_at_the_next_attempt(tmp_path: Path) -> None:
    """cloudpickle makes an empty class first; it was taken for one that is left as it is."""
    done = run_alone(RETRIED, tmp_path)
    assert done.stdout == "well True\n", done.stderr
