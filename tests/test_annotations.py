"""Annotations that are text can be evaluated in a worker: the names that they use travel."""

import pathlib
import pickle
import re
import subprocess
import sys
import types
from typing import Any

import pytest

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire.by_value import pickler_hooks
from torchrunx_ray.wire.values import pickling
from torchrunx_ray.wire.values.payload import Inserted, pack

WORKER = """import pickle, sys
from torchrunx_ray.wire.values import pickling
from torchrunx_ray.wire.values.payload import Packed
from torchrunx_ray.worker.function import main_module
call, *inserted = [Packed(stream) for stream in pickle.load(sys.stdin.buffer)]
with main_module.brought_by_the_call():
    function, arguments = call.unpack(inserted)
sys.stdout.buffer.write(pickling.dumps(function(*arguments)))
"""


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty script, in place of pytest's."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def in_a_worker(function: Any, *arguments: Any, inserted: tuple[bytes, ...] = ()) -> Any:
    """Return what the function returns in a process whose `__main__` is made as a worker's."""
    call = pack([("function", function), ("arguments", arguments)])
    streams = pickle.dumps([bytes(call.stream), *inserted])
    done = subprocess.run(
        [sys.executable, "-c", WORKER], input=streams, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return pickler_hooks.loads(done.stdout)


SCRIPT = """
from __future__ import annotations
import dataclasses
import inspect
import pathlib
import threading
import typing
import wsgiref.headers
import xml.dom.minidom
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal, NamedTuple, Optional, Union

LOCK = threading.Lock()
minidom = "not what the annotation names"
Inside, InsideMethod, Unpack = list[int], set[int], dict[int, str]
Name = Union[str, int]

@dataclass
class Optimizer:
    rate: float = 1e-3

class Plain:
    optimizer: Optimizer
    document: xml.dom.minidom.Document
    twin: list[Plain]

class Pair(NamedTuple):
    first: Optional[Name]

@dataclass
class Config(Plain):
    name: Optional[str] = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    mode: Literal["LOCK", "b"] = "LOCK"

def hints():
    said = [typing.get_type_hints(each) for each in (Config, Plain, Pair)]
    said.append(str(inspect.signature(train, eval_str=True)))
    return said

def train(config: Config, headers: wsgiref.headers.Headers, *names: Name, n: Optional[int] = None):
    "LOCK"

def inner():
    @dataclass
    class Layer:
        a: int = 1
        b: ClassVar[int] = 3
        c: InitVar[int] = 4
        def meth(self, other: InsideMethod): pass
    def typed(config: Inside, *paths: pathlib.Path, n: int = 3) -> Unpack:
        pass
    names = "config", "LOCK"
    signatures = [str(inspect.signature(each, eval_str=True)) for each in (typed, Layer.meth)]
    return [each.name for each in dataclasses.fields(Layer)], signatures

def command_line(tyro):
    return tyro.cli(Config, args=["--optimizer.rate", "3", "--name", "a"])

look = lambda tyro: (hints(), inner(), command_line(tyro), "minidom" in globals())
"""

TEXTS = """
import typing
from typing import Optional

class Node:
    twin: "Node"
    others: "list[Node]"

class Tree:
    leaf: Optional["Leaf"]
    nodes: list["Node"]
    about: "not even Python"

class Leaf:
    pass

def grow(tree: "Optional[Tree]" = None) -> "Leaf":
    pass

def look():
    del Tree.__annotations__["about"]
    hints = [typing.get_type_hints(each) for each in (Node, Tree, grow)]
    return hints == EXPECTED(Node, Tree, Leaf)

def EXPECTED(Node, Tree, Leaf):
    return [
        {"twin": Node, "others": list[Node]},
        {"leaf": Optional[Leaf], "nodes": list[Node]},
        {"tree": Optional[Tree], "return": Leaf},
    ]
"""


def test_names_in_annotations_that_are_text_travel(main: types.ModuleType) -> None:
    import tyro

    exec(SCRIPT, vars(main))
    hints, fields, parsed, has_other = in_a_worker(main.look, tyro)

    assert hints == main.hints()
    assert fields == main.inner()
    assert fields[0] == ["a"]
    assert parsed == main.Config(name="a", optimizer=main.Optimizer(3))
    assert not has_other


def test_names_in_single_annotations_travel(main: types.ModuleType) -> None:
    exec(TEXTS, vars(main))

    assert in_a_worker(main.look)


NOT_NEEDED = """
import threading
import driver_only
import driver_only.part
import exiting.part
from driver_only import Client, connect

LOCK = threading.Lock()
LOCKS = [LOCK]

class Locked:
    locks = LOCKS

class Twin:
    twin: "Twin | Locked"
    config: "Config"

class Config:
    twin: "Twin"
    locked: "Locked"
    client: "driver_only.part.Client"

def train(a: "driver_only.part.Client", b: "Client", c: "Locked", d: "LOCKS", e: "Config", f: "connect",
          g: "exiting.part.Client"):
    return sorted({"driver_only", "Client", "connect", "Locked", "LOCKS", "Config", "Twin"} & {*globals()})
"""


def test_call_does_not_fail_for_what_only_annotations_need(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """For modules that another process does not have, or that end it, as scripts do that are called wrongly."""
    (tmp_path / "exiting.py").write_text("raise SystemExit('usage')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in "driver_only", "exiting":
        module, part = types.ModuleType(name), types.ModuleType(f"{name}.part")
        module.__package__, vars(module)["part"] = name, part
        for each in module, part:
            monkeypatch.setitem(sys.modules, each.__name__, each)
            exec("class Client: pass\ndef connect(): pass", vars(each))
    exec(NOT_NEEDED, vars(main))

    assert in_a_worker(main.train, *[None] * 7) == ["Config", "Twin"]


DEEP = "from dataclasses import dataclass\n" + "".join(
    f"""
@dataclass
class C{i}:
    a: "C{i + 1}"
    b: "C{i * 7 % 150}"
    def look(self, a: "C{i + 3}"): pass
"""
    for i in range(150)
)


def test_call_does_not_fail_for_annotations_that_are_too_deep(main: types.ModuleType) -> None:
    exec(DEEP + "def train(a: 'C0'): return 3", vars(main))

    assert in_a_worker(main.train, None) == 3


MANY = """
from __future__ import annotations

class Data:
    pickled = 0
    def __reduce__(self):
        Data.pickled += 1
        return Data, ()

DATA = Data()

class Reader:
    def read(self):
        return DATA
"""


def test_data_are_pickled_twice_at_most_however_many_classes_annotations_name(
    main: types.ModuleType,
) -> None:
    """Once to see whether they can be pickled, and once to send them."""
    classes = (
        f"class C{i}:\n  def grow(self, other: C{i + 1}):\n    return Reader()\n" for i in range(9)
    )
    exec(MANY + "".join(classes) + "C9 = C0\ndef train():\n  return C0", vars(main))
    pack([("train", main.train)])

    assert main.Data.pickled <= 2


def test_search_for_what_cannot_be_pickled_does_not_blame_annotations(
    main: types.ModuleType,
) -> None:
    exec("import threading\nlock = other = threading.Lock()", vars(main))
    exec("def train(a: 'lock' = other): pass", vars(main))
    exec("class Base:\n  b = other\nclass Config(Base):\n  a: 'lock'", vars(main))

    for name, blamed in ("train", "default 0 of train"), ("Config", "Config.__bases__[0].b"):
        with pytest.raises(PayloadError, match=rf"^{re.escape(blamed)} cannot be pickled"):
            pack([(name, vars(main)[name])])


MIXED = """
import sys
RATE = 0.1

class Model:
    def rate(self):
        return RATE

def make():
    return Model()

def train(model):
    global SET
    SET = model.rate()
    sys.modules["__main__"].OTHER = 1
    return RATE, model.rate(), sys.modules["__main__"].RATE, sys.modules["__main__"].SET, OTHER

def with_captured(model):
    return lambda: (RATE, model.rate(), sys.modules["__main__"].RATE)
"""


def test_main_of_a_worker_has_the_globals_of_the_function_and_not_those_of_values(
    main: types.ModuleType,
) -> None:
    exec(MIXED, vars(main))
    earlier = pickling.dumps(main.Model())
    main.RATE = 0.01
    captured = main.with_captured(Inserted(0))

    assert in_a_worker(main.train, Inserted(0), inserted=(earlier,)) == (0.01, 0.1, 0.01, 0.1, 1)
    assert in_a_worker(captured, inserted=(earlier,)) == (0.01, 0.1, 0.01)


NESTED = """
import pickle

class Outer:
    class Config: pass
    class Middle:
        class Config: pass

class Absent:
    class Middle:
        class Config: pass

class Config: pass

def make():
    class Local: pass
    return Local

Local = make()

def look(of_absent):
    kinds = Outer.Config, Config, Outer.Middle.Config, type(of_absent)
    streams = [pickle.dumps(kinds, protocol) for protocol in (2, 5)]
    return [pickle.loads(each) == kinds for each in streams], pickle.loads(pickle.dumps(Local)) is Local, streams
"""


def test_pickle_finds_classes_of_the_script_by_their_names_also_those_inside_others(
    main: types.ModuleType,
) -> None:
    exec(NESTED, vars(main))
    are_found, is_local_found, streams = in_a_worker(main.look, main.Absent.Middle.Config())

    assert (are_found, is_local_found) == ([True, True], True)
    of_absent = main.Absent.Middle.Config
    kinds = main.Outer.Config, main.Config, main.Outer.Middle.Config, of_absent
    assert [pickle.loads(each) for each in streams] == [kinds, kinds]
