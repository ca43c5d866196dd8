"""Classes and functions of a script are in another process what they are in the script."""

import dataclasses
import enum
import functools
import re
import subprocess
import sys
import threading
import time
import types
from typing import Any

import pytest

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire.by_value import pickler_hooks
from torchrunx_ray.wire.values.payload import pack

CALL = """import sys
from torchrunx_ray.wire.by_value import pickler_hooks
from torchrunx_ray.wire.values import pickling
function = pickler_hooks.loads(sys.stdin.buffer.read())
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
    return pickler_hooks.loads(done.stdout)


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


SUBMODULES = """
import wsgiref.headers
import xml.dom.minidom

def look():
    def parse():
        return xml.dom.minidom.parseString("<a/>").firstChild.tagName

    class Answer:
        headers = wsgiref.headers.Headers([("a", "b")])

    return parse(), Answer.headers["a"]
"""


def test_submodules_that_only_inner_functions_and_classes_use_are_imported() -> None:
    assert elsewhere(of_a_script(SUBMODULES).look) == ("a", "b")


NAMES = """
from typing import Callable, Generic, NewType, ParamSpec, TypeVar, TypeVarTuple
import typing_extensions
from typing_extensions import TypeAliasType

T = TypeVar("T")
Number = TypeVar("Number", int, float)
DT = typing_extensions.TypeVar("DT", bound=int, covariant=True, default=bool)
DP = typing_extensions.ParamSpec("DP", default=[int])
DTs = typing_extensions.TypeVarTuple("DTs", default=typing_extensions.Unpack[tuple[int, str]])
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
    said += Number.__constraints__, DT.__bound__, DT.__covariant__, DT.__default__, T.__bound__
    said += [*DP.__default__], str(DTs.__default__), getattr(T, "has_default", bool)()
    said += Pairs.__type_params__ == (T,), Rows[int].__args__
    return said, [P, Ts, UserId, T, DT, DP, DTs, Users], [each.__module__ for each in (P, Ts, UserId, T, DT, Users)]
"""


def test_names_for_types_travel_and_come_back_as_the_scripts_own() -> None:
    script = of_a_script(NAMES)
    said, names, modules = elsewhere(script.look)

    assert said == script.look()[0]
    assert said[:6] == (6, True, True, True, int, True)
    own = [script.P, script.Ts, script.UserId, script.T, script.DT, script.DP, script.DTs]
    assert names[:7] == own
    assert modules == ["script_of_no_module"] * 6


ENUMS = """
import abc
import datetime
import enum
import functools

class Planet(enum.Enum):
    EARTH = (5.9, 6.3)
    MARS = (0.6, 3.3)
    def __init__(self, mass, radius):
        self.mass, self.radius = mass, radius
        self.neighbours = []

class Number(enum.Enum):
    ONE = 1
    UNO = 1
    TWO = 2

class Right(enum.IntFlag):
    READ = 1
    WRITE = 2
    BOTH = 3
    ALSO = 1

class Coord(bytes, enum.Enum):
    def __new__(cls, value, label):
        made = bytes.__new__(cls, [value])
        made._value_ = value
        made.label = label
        return made
    X = (1, "east")
    Y = (2, "north")

class Counted(enum.Enum):
    def __new__(cls):
        made = object.__new__(cls)
        made._value_ = len(cls.__members__) + 1
        return made

class Letter(Counted):
    A = ()
    B = ()

class Loose(enum.Enum):
    def __new__(cls, value, *others):
        made = object.__new__(cls)
        made._value_ = value
        for other in others:
            cls._value2member_map_[other] = made
        return made
    YES = ("yes", "y")

class Day(datetime.date, enum.Enum):
    FIRST = 2026, 1, 1

class Sized(tuple, enum.Enum):
    PAIR = (1, 2)

class Text(str, enum.Enum):
    HELLO = "hello"
    def __init__(self, value):
        self.upper_case = value.upper()

class Plain(enum.StrEnum):
    FIRST = enum.auto()

class Meta(enum.EnumMeta):
    def __new__(metaclass, name, bases, namespace, *, about, **others):
        made = super().__new__(metaclass, name, bases, namespace, **others)
        made.about = [about]
        return made

    def __init__(cls, *arguments, about):
        pass

    def __contains__(cls, value):
        return value in cls._value2member_map_

class Mode(enum.Enum, metaclass=Meta, about="modes"):
    pass

class Device(Mode, about="devices"):
    CPU = "cpu"

class AbstractMeta(abc.ABCMeta, enum.EnumMeta):
    pass

class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

class Square(Shape, enum.Enum, metaclass=AbstractMeta):
    SMALL = 2
    def area(self):
        return self.value ** 2

ALL = [Square, Mode, Device, Planet, Number, Right, Coord, Counted, Letter, Loose, Day, Sized, Text, Plain]

def describe():
    members = [[(name, each.name, each.value) for name, each in kind.__members__.items()] for kind in ALL]
    iterated = [[each.name for each in kind] for kind in ALL]
    said = [Planet.EARTH.mass, Planet((0.6, 3.3)).radius, Planet.MARS.neighbours]
    said += [Number["UNO"] is Number.ONE, Number(1).name, len(Number)]
    said += [Right(3).name, (Right.READ | Right.WRITE) is Right.BOTH, ~Right.READ is Right.WRITE]
    said += [Right["ALSO"] is Right.READ, Right(7).value, [*Right], Right._all_bits_]
    said += [bytes(Coord.X), Coord(2).label, Coord.Y == bytes([2]), Letter(2) is Letter.B]
    said += [Loose("y") is Loose.YES, Day.FIRST.isoformat(), Sized.PAIR[1], Sized((1, 2)).name]
    said += [Text.HELLO.upper_case, Text("hello") + "!", f"{Plain.FIRST}", str(Text.HELLO)]
    said += [type(Device) is Meta, "cpu" in Device, 2 in Device, Mode.about, Device.about]
    said += [Square.SMALL.area(), isinstance(Square.SMALL, Shape), type(Square) is AbstractMeta]
    own = [sorted({"__new__", "__init__", "__new_member__", "_use_args_"} & {*vars(kind)}) for kind in ALL]
    return members, iterated, said, own

class Made(Counted):
    pass

def look():
    class Later(Counted):
        C = ()
    return describe(), [kind for each in ALL for kind in each], Later.C.value
"""


def test_members_of_an_enum_keep_names_attributes_and_data() -> None:
    script = of_a_script(ENUMS)
    described, members, later = elsewhere(script.look)

    assert described == script.describe()
    own = [each for kind in script.ALL for each in kind]
    assert [id(each) for each in members] == [id(each) for each in own]
    assert later == 1


def test_enum_whose_data_cannot_be_made_again_is_refused_with_what_to_do() -> None:
    kind = enum.Enum("Kind", {"A": [1]}, type=list, module="of_no_module")

    with pytest.raises(PayloadError) as caught:
        pack([("kind", kind)])
    assert str(caught.value) == (
        "kind.A cannot be pickled: the members of the enum Kind are of the type list, which cannot be "
        "recreated without Kind's own code; put Kind into a module beside the script, and import it"
    )


def test_attribute_of_a_member_that_cannot_be_pickled_is_named() -> None:
    kind = enum.Enum("Kind", {"A": 1}, module="of_no_module")
    vars(kind.A)["lock"] = threading.Lock()

    with pytest.raises(PayloadError, match=r"^kind.A.lock cannot be pickled: TypeError"):
        pack([("kind", kind)])


HOOKS = """
import abc

REGISTRY, NOTED = [], {}

class Base:
    def __init_subclass__(cls, *, tag, **others):
        super().__init_subclass__(**others)
        cls.tag = tag
        REGISTRY.append(cls)

class A(Base, tag="a"):
    pass

class Plain:
    seen = []
    def __init_subclass__(cls):
        Plain.seen.append(cls.__name__)

class B(Plain):
    __slots__ = ("x",)

class C(B):
    size = 2

class Meta(abc.ABCMeta):
    def __new__(metaclass, name, bases, namespace, *, key):
        made = super().__new__(metaclass, name, bases, namespace)
        NOTED[key] = made
        return made

    def __init__(cls, name, bases, namespace, *, key):
        super().__init__(name, bases, namespace)
        cls.key = key

class D(metaclass=Meta, key="d"):
    @abc.abstractmethod
    def run(self): ...

class E(D, key="e"):
    def run(self):
        return self.key

def look():
    class F(A, tag="f"):
        pass
    class G(Plain):
        pass
    try:
        D()
    except TypeError:
        said = [A.tag, F.tag, E().run(), C.size, [*map(id, REGISTRY)] == [id(A), id(F)]]
    return said, Plain.seen, NOTED == {"d": D, "e": E}, [A, B, C, D, E], F
"""


@pytest.mark.parametrize("names", ["look", "[C, A, E, look][-1]"])
def test_class_is_made_again_without_the_scripts_hooks_for_new_classes(names: str) -> None:
    script = of_a_script(HOOKS)
    said, seen, is_noted, kinds, new = elsewhere(eval(names, vars(script)))

    assert said == ["a", "f", "e", 2, True]
    assert seen == ["B", "C", "G"]
    assert is_noted
    assert kinds == [script.A, script.B, script.C, script.D, script.E]
    assert new.tag == "f"
    assert script.REGISTRY == [script.A]
    assert script.Plain.seen == ["B", "C"]


MODELS = """
import pydantic

class Base(pydantic.BaseModel):
    def __init_subclass__(cls, *, tag):
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(cls, *, tag, **others):
        super().__pydantic_init_subclass__(**others)
        cls.tag = tag

class Model(Base, tag="a", frozen=True):
    x: int

def look():
    try:
        Model(x=1).x = 2
    except pydantic.ValidationError:
        return Model.tag, Model(x="3"), Model.model_config["frozen"]
"""


def test_model_with_keywords_of_its_class_travels() -> None:
    script = of_a_script(MODELS)

    assert elsewhere(script.look) == ("a", script.Model(x=3), True)


@pytest.mark.alone
def test_search_for_classes_in_a_large_stream_costs_what_a_search_for_one_word_costs() -> None:
    stream = memoryview(bytes(2**26))
    pattern: Any = vars(pickler_hooks)["_MAKES_A_CLASS"]

    def cpu_s(pattern: re.Pattern[bytes]) -> float:
        begun = time.process_time()
        assert pattern.search(stream) is None
        return time.process_time() - begun

    word = re.compile(b"of_one_literal")
    ratios = [cpu_s(pattern) / cpu_s(word) for _ in range(5)]
    assert min(ratios) < 4


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


CLOSURES = """
def switch():
    on = False
    def is_on():
        return on
    def set_on(value):
        nonlocal on
        on = value
    return is_on, set_on

is_on, set_on = switch()

class Timer:
    def __init__(self):
        total = 0
        def add(seconds):
            nonlocal total
            total += seconds
        def get():
            return total
        self.add, self.get = add, get

timer = Timer()

def recursive():
    def factorial(n):
        return 1 if n == 0 else n * factorial(n - 1)
    def is_even(n):
        return n == 0 or is_odd(n - 1)
    def is_odd(n):
        return n > 0 and is_even(n - 1)
    def early():
        return late
    if False:
        late = None
    factorial.itself = factorial
    return factorial, is_even, early

factorial, is_even, early = recursive()

class Base:
    def name(self):
        return __class__.__name__

class Derived(Base):
    def name(self):
        return super().name() + __class__.__name__

def look():
    before = is_on(), timer.get()
    set_on(True)
    timer.add(3)
    said = factorial(4), factorial.itself is factorial, is_even(5), Derived().name()
    try:
        early()
    except NameError as error:
        return before, (is_on(), timer.get()), said, error.name, (is_on, timer)
"""


def test_closures_that_share_a_variable_share_it_in_another_process() -> None:
    script = of_a_script(CLOSURES)
    before, after, said, unbound, (is_on, timer) = elsewhere(script.look)

    assert before == (False, 0)
    assert after == (True, 3)
    assert said == (24, True, False, "BaseDerived")
    assert unbound == "late"
    timer.add(1)
    assert (is_on(), timer.get()) == (True, 4)
    assert elsewhere(script.Derived().name) == "BaseDerived"


TYPED_DICTS = """
import typing
import typing_extensions

T = typing.TypeVar("T")

class Base(typing.TypedDict):
    a: int

class Sub(Base, total=False):
    b: typing.Required[str]
    c: int

Made = typing.TypedDict("Made", {"a": int}, total=False)

class Rows(typing.TypedDict, typing.Generic[T]):
    row: T

class Numbers(Rows[int]):
    b: int

class Other(typing_extensions.TypedDict):
    a: typing_extensions.ReadOnly[int]

class More(Other):
    b: int

KINDS = [Base, Sub, Made, Rows, Numbers, Other, More]

def describe():
    names = "__annotations__", "__required_keys__", "__optional_keys__", "__total__"
    return [[getattr(kind, name) for name in names] for kind in KINDS]

def look(given: Sub):
    return describe(), given, Made(a=1), Numbers(row=1, b=2), More(a=1, b=2), KINDS
"""


def test_typed_dicts_travel_also_those_that_inherit_or_are_made_by_a_call() -> None:
    script = of_a_script(TYPED_DICTS)
    described, *made, kinds = elsewhere(functools.partial(script.look, script.Sub(a=1, b="x")))

    assert described == script.describe()
    assert made == [{"a": 1, "b": "x"}, {"a": 1}, {"row": 1, "b": 2}, {"a": 1, "b": 2}]
    assert kinds == script.KINDS


CALLS = """
import enum
import functools

class Activation(enum.Enum):
    RELU = functools.partial(max, 0)
    SQUARE = enum.member(lambda x: x * x)

class Options(enum.Enum):
    def __init__(self, value):
        self.other = type(self)._member_map_.get("SMALL")
    SMALL = [1]
    LARGE = type("Spec", (), {"size": 2})()

class Own(enum.Enum):
    A = 1
    def __reduce_ex__(self, protocol):
        return getattr, (Own, "B")
    B = 2

class Right(enum.Flag):
    READ = 1
    WRITE = 2

def look(given):
    said = given(-3), given is Activation.RELU.value, Options.LARGE.other is Options.SMALL
    members = *Activation, *Options, Own.A, Right.READ, Right.READ | Right.WRITE
    return said, members
"""


def test_members_of_an_enum_whose_values_equal_no_other_come_back_as_themselves() -> None:
    script = of_a_script(CALLS)
    given = script.Activation.RELU.value
    said, members = elsewhere(functools.partial(script.look, given))

    assert said == (0, True, True)
    both = script.Right.READ | script.Right.WRITE
    expected = *script.Activation, *script.Options, script.Own.B, script.Right.READ, both
    assert [each is other for each, other in zip(members, expected, strict=True)] == [True] * 7
    assert elsewhere(script.Activation.SQUARE.value.__get__(3)) == 9


OWN_OBJECTS = """
import collections
import enum
import functools
import logging
import operator
import re
import threading
import typing
from dataclasses import dataclass

@dataclass(frozen=True)
class Stage:
    name: str
    def is_last(self):
        return self in LAST and self in helper()

def helper():
    return {each: 1 for each in ALSO_LAST}

LAST = frozenset({Stage("b")})
ALSO_LAST = frozenset({Stage("b")})

def of_a_function():
    @dataclass(frozen=True)
    class Local:
        name: str
        def is_last(self):
            return self in last
    last = {Local("b"): 1}
    return Local

Local = of_a_function()

class Cache:
    _instance = None
    names = {"mine": 1}
    def __init__(self):
        self.lock = threading.Lock()
    @classmethod
    def shared(cls):
        cls._instance = cls._instance or cls()
        return cls._instance
    def __getstate__(self):
        return (1,)
    def __setstate__(self, state):
        self.names[LOGGER.name] = 1
        self.lock = threading.Lock()
    def other(self):
        return OTHER

Cache.shared()
OTHER = Cache()
LOGGER = logging.getLogger("mine")

@dataclass(frozen=True, slots=True)
class Vector:
    x: float
    def is_zero(self):
        return self == Vector.ZERO

Vector.ZERO = Vector(0)

class Point(typing.NamedTuple):
    x: float
    def plus(self, default=None):
        return Point(self.x + (default or ORIGIN).x)

ORIGIN = Point(5)

class Base:
    def __eq__(self, other):
        return type(self) is type(other)
    def __hash__(self):
        return 7
    def table(self):
        return TABLE

class Derived(Base):
    def __hash__(self):
        return 8
    def one_of(self):
        return self in TABLE, self in self.own, DEFAULT(self)
    def given(self, table=()):
        return self in table

TABLE = {Derived(): 1, Base(): 2}
Derived.own = [TABLE, TABLE][0]
DEFAULT = lambda self, table=frozenset(TABLE): self in table
Derived.given.__defaults__ = (frozenset(TABLE),)

@functools.singledispatch
def size(value):
    return 1

@size.register
def _(value: str):
    return len(value)

@functools.wraps(size)
def safe_size(value):
    return size(value)

class Sized:
    def size(self):
        return safe_size("abc"), safe_size(1), safe_size.registry is size.registry

class Weighed:
    n = 7
    def __call__(self):
        return self in HEAVY
    def __eq__(self, other):
        return self.n == other.n
    def __hash__(self):
        return WEIGHTS[self.n] + NESTED["a"]["b"]["c"]["d"]

WEIGHTS = {n: n for n in range(200)}
NESTED = {"a": {"b": {"c": {"d": 3}}}}
HEAVY = {Weighed()}

class Single:
    single = None
    singles = {}
    def __new__(cls):
        global SINGLE
        cls.single = SINGLE = cls.single or SINGLE or super().__new__(cls)
        return cls.singles.setdefault(cls, cls.single)
    def is_single(self):
        return Single() is self.single is self.singles[Single] is SINGLE and self.size == 3

SINGLE = None
Single().size = 3

class Kind(enum.Enum):
    A = 1
    B = 2
    def __init__(self, value):
        self.others = {self: value}
    def __hash__(self):
        return hash(("kind", self.value))
    def cost(self):
        return COSTS[self], self.others[self]

COSTS = {Kind.A: 3, Kind.B: 4}

class Positive:
    def __get__(self, owner, kind=None):
        return owner.__dict__["_size"]
    def __set__(self, owner, value):
        owner.__dict__["_size"] = value

class Key:
    size = Positive()
    def __init__(self, size):
        self.size = size
    def __eq__(self, other):
        return self.size == other.size
    def __hash__(self):
        return hash(self.size)

class Trainer:
    def run(self):
        return SIZES[Key(5)], OR_0[Key(5)]

SIZES = {Key(5): "five"}
OR_0 = collections.defaultdict(int, SIZES)

class Named:
    by = operator.attrgetter("name")
    def __init__(self, name):
        self.name = name
    def __eq__(self, other):
        return self.name == other.name
    def __hash__(self):
        return hash(self.by(self))

class Finder:
    def run(self):
        return NUMBERS[Named("a")]

NUMBERS = collections.OrderedDict({Named("a"): 1})

class Query:
    pattern = re.compile("a+")
    def __init__(self, text):
        self.text = text
    def __setstate__(self, state):
        self.text = self.pattern.match(state["text"]).group()

def of_a_queue():
    queue = collections.deque([Query("aa")])
    class Searcher:
        def run(self):
            return [each.text for each in queue if isinstance(each, Query)]
    return Searcher

Searcher = of_a_queue()

def look(*given):
    said = [Stage("b").is_last(), Local("b").is_last(), Cache._instance.lock is not None]
    said += [Cache.shared().other().lock is not None, Cache.names, Cache.shared() is Cache._instance]
    said += [Vector(0).is_zero(), Vector.ZERO, Point(1).plus(), Kind.A.cost(), Derived().table()]
    said += [each().run() for each in (Trainer, Finder, Searcher)]
    return said + [Sized().size(), Weighed()(), Single().is_single(), Derived().one_of(), Derived().given(), len(given)]
"""


@pytest.mark.parametrize(
    "first", ["()", "[Cache.shared()]", "COSTS, Stage, ORIGIN", "[DEFAULT, SINGLE]"]
)
def test_objects_that_their_own_class_reaches_are_made_when_it_has_its_methods(first: str) -> None:
    """They were hashed as object does, and made without the class's `__setstate__`."""
    script = of_a_script(OWN_OBJECTS)
    given = eval(first, vars(script))
    call = functools.partial(lambda given, look: look(*given), given, script.look)

    assert elsewhere(call) == script.look(*given)


ORDER = """
import collections
import enum
import logging
import torch
from dataclasses import dataclass
from torchrunx_ray.wire.by_value import pickler_hooks

class Units:
    def __init__(self):
        self.meters = {"km": 1000, "m": 1}

UNITS = Units()

@dataclass
class Length:
    size: float
    unit: str
    def meters(self):
        return self.size * UNITS.meters[self.unit]
    def __eq__(self, other):
        return self.meters() == other.meters()
    def __hash__(self):
        return hash(self.meters())

KNOWN = {Length(1, "km"): "one"}

class Converter:
    def __call__(self):
        return KNOWN.get(Length(1000, "m"))

class WithItsUnit:
    UNIT = Length  # comes before `__call__`
    def __call__(self):
        return KNOWN.get(self.UNIT(1000, "m"))

class Vocabulary:
    def __getitem__(self, word):
        return 0

class Token:
    vocabulary = Vocabulary()
    def __init__(self, word):
        self.word = word
    def __hash__(self):
        return self.vocabulary[self.word]
    def __eq__(self, other):
        return self.word == other.word

class Model:
    weights = {Token("x"): 1.0}
    def __call__(self):
        return self.weights[Token("x")]

LOGGER = logging.getLogger("mine")

class Block(torch.nn.Module):
    scale = Vocabulary()
    def __setstate__(self, state):
        LOGGER.debug("restored")
        super().__setstate__(state)
        self.size = self.scale["x"]

BLOCKS = torch.nn.Sequential(Block())

class Trainer:
    def __call__(self):
        return [type(each) is Block for each in BLOCKS]

class OfItself(torch.nn.Module):
    scale = Vocabulary()
    def __setstate__(self, state):
        super().__setstate__(state)
        self.size = self.scale["x"]
    def __call__(self):
        return [type(each) is OfItself for each in SELF]

SELF = torch.nn.Sequential(OfItself())

class Connection:
    def __init__(self, url):
        self.url = url
        LOGGER.info("connect")
    def __reduce__(self):
        return Connection, (self.url,)

CONNECTIONS = collections.UserDict(a=Connection("db"))

class Client:
    def __call__(self):
        return CONNECTIONS["a"].url, Connection.__name__

@dataclass(frozen=True)
class Spec:
    width: int
    depth: int

class Size(Spec, enum.Enum):
    SMALL = 1, 2
    LARGE = 3, 4
    def __call__(self):
        return BATCHES[self]

BATCHES = {Size.SMALL: 64, Size.LARGE: 8}

class Color(enum.Enum):
    RED = 1, "r"
    def __init__(self, code, letter):
        self.code = code
    def __hash__(self):
        return self.code
    def __call__(self):
        return COSTS[self, 1]

COSTS = {(Color.RED, 1): 3}

class Painted:
    def __call__(self):
        return self in PAINTED
    def __eq__(self, other):
        return True
    def __hash__(self):
        return hash(DEFAULT)

DEFAULT = Color.RED
PAINTED = {Painted()}

CALLED = [each() for each in (Converter, WithItsUnit, Model, Trainer, OfItself, Client)]
CALLED += [Size.LARGE, Color.RED, Painted()]

def load_and_call(streams):
    return [pickler_hooks.loads(stream)() for stream in streams]
"""


def test_objects_are_made_after_all_that_their_class_needs_whichever_class_comes_first() -> None:
    script = of_a_script(ORDER)
    streams = [bytes(pack([("called", called)]).stream) for called in script.CALLED]
    said = elsewhere(functools.partial(script.load_and_call, streams))

    assert said == [called() for called in script.CALLED]
