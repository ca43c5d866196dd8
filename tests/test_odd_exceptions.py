"""Exceptions that resist: whatever their own code does, and wherever they keep what they know, they arrive."""

import copyreg
import os
import resource
import sys
import traceback
from typing import Any

import pytest

import torchrunx_ray as trx
from torchrunx_ray.wire.values.exceptions import dump_exception, load_exception

pytestmark = pytest.mark.by_reference


class Unspeakable(Exception):
    def __init__(self, raised: type[BaseException]) -> None:
        super().__init__("unspeakable")
        self.raised = raised

    def __str__(self) -> str:
        raise self.raised("in __str__")


class PicklingRaises(Exception):
    def __init__(self, raised: type[BaseException]) -> None:
        super().__init__("a part is missing")
        self.raised = raised

    def __reduce__(self) -> Any:
        raise self.raised("in __reduce__")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.raised("in __reduce_ex__")


def raise_it(raised: type[BaseException]) -> None:
    raise raised("while it is unpickled")


class UnpicklingRaises(PicklingRaises):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return raise_it, (self.raised,)


class Bottomless(Exception):
    def __getattr__(self, name: str) -> Any:
        return getattr(self, name + "_")


class BaseBottomless(BaseException):
    """Not even its type is told without recursion."""

    def __getattribute__(self, name: str) -> Any:
        return getattr(self, name + "_")


class OddText(str):
    """Cannot be pickled."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("no")


class OddlySpoken(Exception):
    def __str__(self) -> str:
        return OddText("odd words")


class Untruthful(Exception):
    """Cannot be told to be true or false, as an array of several numbers."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


def caused_by(cause: BaseException) -> BaseException:
    error = KeyError("what came of it")
    error.__cause__ = cause
    return error


ODD: dict[str, BaseException] = {
    "its cause has no truth": caused_by(Untruthful("cause")),
    "its text raises KeyError": Unspeakable(KeyError),
    "its text exits": Unspeakable(SystemExit),
    "pickling raises": PicklingRaises(ValueError),
    "pickling is interrupted": PicklingRaises(KeyboardInterrupt),
    "pickling exits": PicklingRaises(SystemExit),
    "unpickling is interrupted": UnpicklingRaises(KeyboardInterrupt),
    "unpickling exits": UnpicklingRaises(SystemExit),
    "any attribute is looked for without end": Bottomless("no bottom"),
    "every attribute is looked for without end": BaseBottomless("no bottom"),
    "its text is of a class of its own": OddlySpoken(),
}


@pytest.mark.parametrize("odd", ODD)
def test_exception_that_resists_is_never_said_to_be_an_exit(
    launcher: trx.Launcher, odd: str
) -> None:
    """The report itself failed, and the worker "ended with exit code 1 before its function raised"."""
    kind = type(ODD[odd])

    arrived = failure_of(launcher, odd)
    assert type(arrived) in (kind, trx.WorkerFailedError)
    if isinstance(arrived, trx.WorkerFailedError):
        assert kind.__name__ in arrived.args[0]
        assert "before its function returned or raised" not in arrived.args[0]
        assert "in raise_odd" in arrived.traceback


def raise_odd(odd: str) -> None:
    raise ODD[odd]


def failure_of(launcher: trx.Launcher, *args: Any, func: Any = raise_odd) -> BaseException:
    try:
        launcher.run(func, *args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def use_up_descriptors() -> None:
    used = [os.dup(2)]
    while True:
        try:
            used.append(os.dup(2))
        except OSError:
            globals()["kept"] = used
            return


def raise_without_descriptors(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    use_up_descriptors()
    raise KeyError("x" * size)


def return_without_descriptors(value: object) -> object:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    use_up_descriptors()
    return value


@pytest.mark.parametrize("size", [10, 100_000])
def test_function_that_used_up_all_descriptors_raises(launcher: trx.Launcher, size: int) -> None:
    arrived = failure_of(launcher, size, func=raise_without_descriptors)

    assert type(arrived) is KeyError
    assert len(arrived.args[0]) == size


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_function_that_used_up_all_descriptors_returns(launcher: trx.Launcher, size: int) -> None:
    assert launcher.run(return_without_descriptors, b"x" * size).rank(1) == b"x" * size


def raise_unheard(size: int) -> None:
    os.closerange(3, size)
    raise KeyError("nobody hears")


def return_unheard(size: int) -> int:
    os.closerange(3, size)
    return 7


@pytest.mark.parametrize("func", [raise_unheard, return_unheard])
def test_function_that_closes_what_its_worker_reports_through_is_told_of_it(
    cluster: None, func: Any
) -> None:
    """It was said to have ended before its function returned or raised."""
    launcher = trx.Launcher(workers_per_host=2, backend=None)  # gloo aborts without its own
    arrived = failure_of(launcher, 256, func=func)

    assert type(arrived) is trx.WorkerFailedError
    message = arrived.args[0]
    assert "before its function returned or raised" not in message
    assert "ended with exit code 1 without reporting the outcome of its function" in message
    assert "Did the function close descriptors that it had not opened" in message
    if func is raise_unheard:
        assert "KeyError: 'nobody hears'" in message


class MissingShard(FileNotFoundError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such shard", path)


class Slots(Exception):
    __slots__ = ("_hidden", "code", "never_set")

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)
        self.code = code
        self._hidden = -code


class PlainSlots(Exception):
    __slots__ = ("code",)


class MissingPlugin(ImportError):
    def __init__(self, plugin: str) -> None:
        super().__init__(f"no plugin {plugin}", name=plugin, path="/plugins")


class BadText(UnicodeDecodeError):
    def __init__(self, where: int) -> None:
        super().__init__("utf-8", b"abc\xff", where, where + 1, "bad")
        self.reason = "worse"


class NeverInitialised(UnicodeDecodeError):
    def __init__(self, line: int) -> None:
        self.line = line


class BadConfig(SyntaxError):
    def __init__(self, line: int) -> None:
        super().__init__("bad config", ("config.yaml", line, 3, "a: :"))


class Absent(AttributeError):
    def __init__(self, owner: object) -> None:
        super().__init__("absent", name="weights", obj=owner)


class Done(StopIteration):
    def __init__(self, *, value: int) -> None:
        super().__init__()
        self.value = value


class Many(ExceptionGroup[Exception]):
    __slots__ = ("code",)


def plain_slots() -> BaseException:
    error = PlainSlots("plain")
    error.code = 5
    return error


def many() -> BaseException:
    error = Many("many", [MissingShard("/a"), ValueError(2)])
    error.code = 7
    return error


FIELDS: dict[str, tuple[BaseException, dict[str, Any]]] = {
    "OSError": (
        MissingShard("/data/7"),
        {"errno": 2, "strerror": "no such shard", "filename": "/data/7", "filename2": None},
    ),
    "slots": (Slots("slots", 3), {"code": 3, "_hidden": -3, "args": ("slots",)}),
    "slots and the usual constructor": (plain_slots(), {"code": 5}),
    "ImportError": (MissingPlugin("x"), {"name": "x", "path": "/plugins", "msg": "no plugin x"}),
    "UnicodeDecodeError": (BadText(3), {"object": b"abc\xff", "start": 3, "reason": "worse"}),
    "base that was not initialised": (NeverInitialised(4), {"line": 4, "args": (4,)}),
    "SyntaxError": (BadConfig(9), {"filename": "config.yaml", "lineno": 9, "text": "a: :"}),
    "AttributeError": (Absent(lambda: sys._getframe()), {"name": "weights", "obj": None}),
    "NameError": (NameError("no x", name="x"), {"name": "x"}),
    "StopIteration": (Done(value=4), {"value": 4, "args": ()}),
    "group": (many(), {"code": 7, "message": "many"}),
}


@pytest.mark.parametrize("which", FIELDS)
def test_what_an_exception_keeps_beside_its_dict_arrives(which: str) -> None:
    error, fields = FIELDS[which]

    arrived = load_exception(dump_exception(error))

    assert type(arrived) is type(error)
    assert {name: getattr(arrived, name) for name in fields} == fields
    assert str(arrived) == str(error)
    assert arrived.__dict__ == error.__dict__
    assert not hasattr(arrived, "never_set")


class SaysHow(Exception):
    def __init__(self, what: str, *, by: str = "constructor") -> None:
        super().__init__(what)
        self.by = by


class SaysByReduce(SaysHow):
    def __reduce__(self) -> Any:
        return _again, (type(self), "reduce")


class SaysByState(SaysHow):
    def __getstate__(self) -> Any:
        return {"by": "getstate"}


class SaysByCopyreg(SaysHow):
    pass


class SaysByItsBasesReduce(SaysByReduce):
    """Which does not know of this class."""

    def __reduce__(self) -> Any:
        return _again, (SaysByReduce, "reduce of the base")


def _again(kind: type[SaysHow], by: str) -> SaysHow:
    return kind("again", by=by)


copyreg.pickle(SaysByCopyreg, lambda error: (_again, (type(error), "copyreg")))


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        (SaysHow, "constructor"),
        (SaysByReduce, "reduce"),
        (SaysByState, "getstate"),
        (SaysByCopyreg, "copyreg"),
        (SaysByItsBasesReduce, "constructor"),
    ],
)
def test_own_way_of_an_exception_to_be_pickled_wins_where_it_works(
    kind: type[SaysHow], by: str
) -> None:
    arrived = load_exception(dump_exception(kind("what")))

    assert type(arrived) is kind
    assert arrived.by == by


def test_missing_file_is_named_on_the_driver(launcher: trx.Launcher) -> None:
    def fail() -> None:
        raise MissingShard("/data/7")

    with pytest.raises(MissingShard, match="no such shard: '/data/7'") as caught:
        launcher.run(fail)

    assert caught.value.filename == "/data/7"
    assert "MissingShard" in "".join(traceback.format_exception(caught.value))
