"""Classes and functions of a script are in another process what they are in the script."""

import dataclasses
import subprocess
import sys
import types
from typing import Any

import pytest

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire import by_value
from torchrunx_ray.wire.payload import pack

CALL = """import sys
from torchrunx_ray.wire import by_value, pickling
function = by_value.loads(sys.stdin.buffer.read())
sys.stdout.buffer.write(pickling.dumps(function()))
"""


def of_a_script(source: str) -> types.SimpleNamespace:
    """Return what a script defines, which is in no module that could be imported."""
    names: dict[str, Any] = {"__name__": "script_of_no_module"}
    exec(source, names)
    return types.SimpleNamespace(**names)


def elsewhere(function: Any) -> Any:
    """Return what the function returns in a new process."""
    stream = bytes(pack([("function", function)]).stream)
    done = subprocess.run(
        [sys.executable, "-c", CALL], input=stream, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return by_value.loads(done.stdout)


DATACLASSES = """
import dataclasses

@dataclasses.dataclass
class Config:
    name: str
    steps: int = 3
    layers: list = dataclasses.field(default_factory=list)
    _: dataclasses.KW_ONLY
    seed: int = 0

def look():
    @dataclasses.dataclass
    class Larger(Config):
        rate: float = 0.1

    made = dataclasses.make_dataclass("Made", [("more", int, 1)], bases=(Config,))
    (name, *_) = dataclasses.fields(Config)
    return Larger("a"), made("b"), name.default is dataclasses.MISSING, Config
"""


def test_field_of_a_dataclass_without_a_default_has_none() -> None:
    larger, made, is_missing, config = elsewhere(of_a_script(DATACLASSES).look)

    assert dataclasses.astuple(larger) == ("a", 3, [], 0, 0.1)
    assert dataclasses.astuple(made) == ("b", 3, [], 0, 1)
    assert is_missing
    assert dataclasses.fields(config)[0].default is dataclasses.MISSING


CLASS_BODIES = """
import threading
from dataclasses import dataclass, field

DEFAULT, OTHER, UNUSED = 4, 5, threading.Lock()

def look():
    @dataclass
    class Config:
        xs: list = field(default_factory=list)
        steps: int = DEFAULT

        class Inner:
            other = [OTHER for _ in range(2)]
            unused = lambda value: value.UNUSED

    return Config().xs, Config().steps, Config.Inner.other
"""


def test_globals_that_only_the_body_of_a_class_names_travel_with_the_function() -> None:
    assert elsewhere(of_a_script(CLASS_BODIES).look) == ([], 4, [5, 5])


def test_global_that_cannot_be_pickled_is_found_in_the_body_of_a_class() -> None:
    script = of_a_script(CLASS_BODIES.replace("value.UNUSED", "1; lock = UNUSED"))

    with pytest.raises(PayloadError, match=r"^global 'UNUSED' used by function cannot be pickled"):
        pack([("function", script.look)])


NAMES = """
from typing import Callable, Generic, NewType, ParamSpec, TypeVar, TypeVarTuple
from typing_extensions import TypeAliasType

T = TypeVar("T")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")
UserId = NewType("UserId", int)
Users = TypeAliasType("Users", list[UserId])
Pairs = TypeAliasType("Pairs", list[tuple[T, T]], type_params=(T,))

class Timed(Generic[P, T]):
    def __init__(self, call: Callable[P, T]):
        self.call = call

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.call(*args, **kwargs)

class Rows(Generic[*Ts]):
    pass

def double(user: UserId) -> UserId:
    return UserId(user * 2)

def look(users: Users = [], pairs: Pairs[int] = []):
    said = Timed(double)(UserId(3)), Timed.__parameters__ == (P, T), Rows.__parameters__ == (Ts,)
    hint = double.__annotations__["user"]
    said += hint is UserId, hint.__supertype__, Users.__value__.__args__[0] is UserId
    said += Pairs.__type_params__ == (T,), Rows[int].__args__
    return said, [P, Ts, UserId, Users], [each.__module__ for each in (P, Ts, UserId, Users)]
"""


def test_names_for_types_travel_and_come_back_as_the_scripts_own() -> None:
    script = of_a_script(NAMES)
    said, names, modules = elsewhere(script.look)

    assert said == (6, True, True, True, int, True, True, (int,))
    assert names[:3] == [script.P, script.Ts, script.UserId]
    assert modules == ["script_of_no_module"] * 4


CACHED = """
import functools

@functools.lru_cache(maxsize=7)
def double(x: int) -> int:
    "About."
    return x * 2

double.version = 3
double.itself = double

def look():
    said = double(2), double.version, double.itself is double, double.cache_parameters()["maxsize"]
    return said, double.__doc__, double.__annotations__ is double.__wrapped__.__annotations__
"""


def test_cached_function_keeps_its_attributes() -> None:
    assert elsewhere(of_a_script(CACHED).look) == ((4, 3, True, 7), "About.", True)
