"""Functions, values and exceptions of every kind travel."""

import functools
import os
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchrunx_ray as trx


def of_a_module(x: int) -> int:
    return x + int(os.environ["RANK"])


class Adder:
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __call__(self, x: int) -> int:
        return self.amount + of_a_module(x)

    def method(self, x: int) -> int:
        return self(x)

    @classmethod
    def class_method(cls, x: int) -> int:
        return cls(1)(x)


def closure_over(amount: int) -> Callable[[int], int]:
    def add(x: int) -> int:
        return amount + of_a_module(x)

    return add


@pytest.mark.parametrize(
    "func",
    [
        pytest.param(lambda x: 1 + of_a_module(x), id="lambda"),
        pytest.param(closure_over(1), id="closure"),
        pytest.param(functools.partial(of_a_module, x=11), id="partial"),
        pytest.param(Adder(1), id="callable object"),
        pytest.param(Adder(1).method, id="bound method"),
        pytest.param(Adder.class_method, id="class method"),
        pytest.param(functools.partial(Adder(1).method, 10), id="partial of a method"),
    ],
)
def test_any_callable_can_be_launched(launcher: trx.Launcher, func: Callable[..., int]) -> None:
    args = () if isinstance(func, functools.partial) else (10,)

    assert list(launcher.run(func, *args)) == [11, 12]


def test_function_of_a_module(launcher: trx.Launcher) -> None:
    assert list(launcher.run(of_a_module, 1)) == [1, 2]


def test_builtin_function(launcher: trx.Launcher) -> None:
    assert list(launcher.run(max, 1, 2)) == [2, 2]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "text",
        {"nested": [1, (2.0, {3})]},
        b"x" * 1_000_000,
        np.arange(300_000).reshape(3, -1),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_travel_both_ways(launcher: trx.Launcher, value: Any) -> None:
    returned = launcher.run(lambda x: x, value).rank(1)

    np.testing.assert_equal(returned, value)
    assert type(returned) is type(value)


def test_tensors_arrive_writable_and_one_worker_does_not_see_anothers(
    launcher: trx.Launcher,
) -> None:
    def add_rank(tensor: torch.Tensor, array: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        tensor += int(os.environ["RANK"])
        array += int(os.environ["RANK"])
        return tensor, array

    result = launcher.run(add_rank, torch.zeros(100_000), np.zeros(100_000))

    for rank, (tensor, array) in enumerate(result):
        assert tensor.sum() == array.sum() == rank * 100_000


def of_a_script(source: str, folder: Path) -> types.SimpleNamespace:
    """What a script defines: in a file, and in no module that could be imported."""
    path = folder / "train_script.py"
    path.write_text(source)
    names: dict[str, Any] = {"__name__": "train_script_of_no_module", "__file__": str(path)}
    exec(compile(source, path, "exec"), names)
    return types.SimpleNamespace(**names)


CODE = """import inspect

import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def double(x):
    return x * 2


def look():
    scripted = torch.jit.script(double)(torch.ones(1)).item()
    network = torch.jit.script(Net())(torch.ones(1, 2)).shape
    inner = (lambda: None).__code__
    return inspect.getsource(double), inner.co_filename, scripted, list(network)


def fail():
    raise RuntimeError("here")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_code_of_a_script_keeps_its_file_and_its_lines(one: trx.Launcher, tmp_path: Path) -> None:
    """cloudpickle since 3.1.3 calls all code's file <dynamic-code>."""
    script = of_a_script(CODE, tmp_path)
    path = str(tmp_path / "train_script.py")

    source = "def double(x):\n    return x * 2\n"
    assert one.run(script.look).rank(0) == (source, path, 2.0, [1, 2])
    with pytest.raises(RuntimeError, match="here") as caught:
        one.run(script.fail)
    line = CODE.splitlines().index('    raise RuntimeError("here")') + 1
    assert f'  File "{path}", line {line}, in fail\n    raise RuntimeError("here")\n' in str(
        caught.value.__cause__
    )


KINDS = """import functools
from typing import Any, Generic, NamedTuple, Protocol, TypedDict, TypeVar

import attrs
import pydantic

T = TypeVar("T")


class Point(NamedTuple):
    x: int
    y: int = 2

    def total(self):
        return self.x + self.y


class Pair(NamedTuple, Generic[T]):
    first: T


class Deeper(Point):
    __slots__ = ()


class Forbids(type):
    def __new__(cls, name, bases, namespace):
        if "__slots__" in namespace:
            raise TypeError(f"{name} has slots")
        return super().__new__(cls, name, bases, {**namespace, "__slots__": ()})


class Slotless(tuple, metaclass=Forbids):
    pass


@functools.singledispatch
def size(value):
    return 0


@size.register
def size_of_int(value: int):
    return size("") + value


class Circle:
    def __init__(self):
        self.radius = 2

    @functools.cached_property
    def area(self):
        \"\"\"About.\"\"\"
        return 3 * self.radius**2

    @functools.singledispatchmethod
    def scaled(self, by):
        return None

    @scaled.register
    def _(self, by: int):
        return self.radius * by


class Options(TypedDict):
    rate: float


class Scored(Protocol):
    def score(self) -> int: ...


@attrs.define
class Tree(Scored):
    leaves: list[int] = attrs.field(factory=list)

    def score(self):
        return super().__sizeof__() and len(self.leaves)


class Config(pydantic.BaseModel):
    steps: int
    inner: "Config | None" = None
    _seen: int = pydantic.PrivateAttr(3)

    @pydantic.field_validator("steps")
    @classmethod
    def positive(cls, steps):
        assert steps > 0
        return steps


VALUES = [
    Point(1),
    Pair("a"),
    Deeper(3, 4),
    Slotless([1]),
    Tree([1, 2]),
    Config(steps=1, inner=Config(steps=2)),
]


def look(values):
    assert [type(value) for value in values] == [Point, Pair, Deeper, Slotless, Tree, Config]
    point, pair, deeper, slotless, tree, config = values
    try:
        Config(steps=-1)
    except pydantic.ValidationError:
        said = [point.total(), pair.first, deeper.total(), slotless[0], tree.score(), config._seen]
    circle = Circle()
    said += [circle.area, vars(circle)["area"], Circle.area.__doc__, circle.scaled(3), size(4), size]
    return said, [hasattr(value, "__dict__") for value in values], Options(rate=0.1), values
"""


@pytest.mark.slow
def test_classes_of_every_metaclass_travel_both_ways(one: trx.Launcher, tmp_path: Path) -> None:
    """cloudpickle's slots were given to metaclasses that forbid the name."""
    script = of_a_script(KINDS, tmp_path)
    said, has_dict, options, values = one.run(script.look, script.VALUES).rank(0)

    assert said[:6] == [3, "a", 7, 1, 2, 3]
    assert said[6:-1] == [12, 12, "About.", 6, 4]
    assert (said[-1](4), said[-1](None), said[-1].__name__) == (4, 0, "size")
    assert has_dict == [hasattr(value, "__dict__") for value in script.VALUES]
    assert options == {"rate": 0.1}
    assert values == script.VALUES
    assert list(map(type, values)) == list(map(type, script.VALUES))


def test_everything_of_main_travels_both_ways(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"],
) -> None:
    done = run_script(
        """
import dataclasses, enum, typing, torchrunx_ray as trx

Steps = typing.NewType("Steps", int)
KINDS = []

class Kind:
    def __init_subclass__(cls, *, tag):
        KINDS.append(tag)

class Resumed(Kind, tag="resumed"):
    pass

class Device(enum.Enum):
    CPU = ("cpu", 2)
    HOST = CPU
    def __init__(self, name, count):
        self.count = count

@dataclasses.dataclass
class Config:
    steps: Steps

class Trouble(Exception):
    def __init__(self, what, code):
        super().__init__(f"{what}: {code}")
        self.code = code

def train(config):
    assert isinstance(config, Config)
    assert Resumed and KINDS == ["resumed"]
    assert Device.HOST is Device.CPU and Device["HOST"].count == 2
    if config.steps < 0:
        raise Trouble("steps", config.steps)
    return Config(config.steps + 1)

launcher = trx.Launcher(workers_per_host=2)
returned = launcher.run(train, Config(1)).rank(1)
assert type(returned) is Config and returned == Config(2)
try:
    launcher.run(train, Config(-7))
except Trouble as error:
    assert type(error) is Trouble and error.code == -7 and str(error) == "steps: -7"
    print("all of it")
"""
    )

    assert done.stdout == "all of it\n", done.stderr


def test_module_beside_the_script_reaches_the_workers(
    run_script: Callable[[str], "subprocess.CompletedProcess[str]"], tmp_path: Any
) -> None:
    (tmp_path / "beside_the_script.py").write_text("def answer():\n    return 42\n")
    done = run_script(
        """
import beside_the_script, torchrunx_ray as trx
print(trx.launch(beside_the_script.answer, workers_per_host=1).rank(0))
"""
    )

    assert done.stdout == "42\n", done.stderr
