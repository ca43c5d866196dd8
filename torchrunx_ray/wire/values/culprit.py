"""Search for the part of a value that causes a pickling error."""

import contextlib
import copyreg
import dis
import enum
import functools
import os
import pickle
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

from torchrunx_ray import errors
from torchrunx_ray.wire.by_value import annotations, inner_code
from torchrunx_ray.wire.values import pickling

_DEPTH = 50

_PICKLING = (
    f"{os.path.dirname(errors.__file__)}{os.sep}",
    f"{os.path.dirname(cloudpickle.__file__)}{os.sep}",
    pickle.__file__,
    copyreg.__file__,
)
"""Files of the code that pickles and unpickles."""

_GLOBAL_OPERATIONS = inner_code.OPERATIONS | {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"}


@dataclass(frozen=True)
class Culprit:
    """The deepest part of a value that cannot be pickled by itself."""

    path: str
    error: Exception
    """The error that pickling this part alone raises."""
    chain: Sequence[object]
    """The parts along the path, the deepest last."""


def find_culprit(
    parts: Iterable[tuple[str, object]], error: Exception, replace: pickling.Replace | None = None
) -> Culprit:
    """Search the named parts of a value whose pickling raised this error.

    The search runs the user's code, such as a `__reduce__`, and stops at the first exception from that code.
    """
    found = Culprit("the value", error, ())
    candidates: Iterable[tuple[str, object]] = parts
    with contextlib.suppress(Exception):  # StopIteration if each part can be pickled by itself
        while len(found.chain) < _DEPTH:
            path, part, reason = next(
                (path, part, reason)
                for path, part in candidates
                if all(part is not each for each in found.chain)
                and (reason := _why_not_pickled(part, replace)) is not None
            )
            found = Culprit(path, reason, (*found.chain, part))
            candidates = _parts(part, path)
    return found


def is_of_a_library(kind: type) -> bool:
    """Return True for a class of an installed module."""
    # Programs may put objects into sys.modules that are not modules.
    file = getattr(sys.modules.get(module_of(kind)), "__dict__", {}).get("__file__")
    return isinstance(file, str) and any(
        f"{os.sep}{each}{os.sep}" in file for each in ("site-packages", "dist-packages")
    )


def module_of(kind: type) -> str:
    """Return the name of a class's module; empty if `__module__` is no string."""
    name = cast("object", kind.__module__)
    return name if isinstance(name, str) else ""


def users_part(error: BaseException) -> BaseException | None:
    """Return the exception that the user's code raised during pickling or unpickling.

    Its traceback begins in that code. Return None if only the pickling code itself raised.
    """
    raised: BaseException | None = error
    while raised is not None:
        frames = raised.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_PICKLING):
            frames = frames.tb_next
        if frames is not None:
            return raised.with_traceback(frames)
        raised = raised.__cause__
    return None


def _why_not_pickled(value: object, replace: pickling.Replace | None) -> Exception | None:
    try:
        pickling.dumps_with_buffers(value, replace)
    except Exception as error:
        return error
    return None


def _parts(value: Any, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]  # any mapping
            yield f"{path}.keys()", key
            yield f"{path}[{_shown(key)}]", item
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]  # any sequence
            yield f"{path}[{i}]", item
    elif isinstance(value, set | frozenset):
        for item in value:  # pyright: ignore[reportUnknownVariableType]  # any set
            yield f"an item of {path}", item
    elif isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        yield from _parts(value.args, f"{path}.args")
        yield from _parts(value.keywords, f"{path}.keywords")
    elif isinstance(value, types.MethodType):
        yield f"{path}.__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from parts_of_function(value, path)
    elif isinstance(value, type):
        yield from parts_of_class(value, path)
    elif isinstance(value, property):
        accessors = (("fget", value.fget), ("fset", value.fset), ("fdel", value.fdel))
        yield from ((f"{path}.{name}", function) for name, function in accessors)
    elif isinstance(value, staticmethod | classmethod):
        yield f"{path}.__func__", value.__func__  # pyright: ignore[reportUnknownMemberType]  # any
    elif isinstance(value, enum.Enum):
        own = ((name, part) for name, part in vars(value).items() if name != "__objclass__")
        yield from ((f"{path}.{name}", part) for name, part in own)
        yield f"{path}.__class__", type(value)
    elif not isinstance(value, types.ModuleType):
        yield from _attributes(value, path)
        yield f"{path}.__class__", type(value)


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except Exception:
        return f"a {type(key).__name__}"


def parts_of_function(function: types.FunctionType, path: str) -> Iterator[tuple[str, object]]:
    """Yield the parts that cloudpickle pickles with a function: closure, globals it names, defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable {name!r} captured by {path}", cell.cell_contents
        except ValueError:  # the cell is empty
            continue
    there = function.__globals__
    named = [name for name in dict.fromkeys(_globals_named_in(function.__code__)) if name in there]
    yield from ((f"global {name!r} used by {path}", there[name]) for name in named)
    for name in dict.fromkeys(annotations.names_in(annotations.code_of(function))):
        is_other = name in there and name not in named
        if is_other and _why_not_pickled(there[name], None) is None:  # otherwise it is left out
            yield f"global {name!r} used by {path}", there[name]
    for i, default in enumerate(function.__defaults__ or ()):
        yield f"default {i} of {path}", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f"default {name!r} of {path}", default


def parts_of_class(kind: type, path: str) -> Iterator[tuple[str, object]]:
    """Yield the parts that cloudpickle pickles with a class: its attributes and its bases."""
    made_by_python = types.GetSetDescriptorType | types.MemberDescriptorType
    for name, part in vars(kind).items():
        kind_of_part: Any = type(part)  # pyright: ignore[reportUnknownVariableType]
        if name in ("_member_map_", "_value2member_map_"):  # members are also attributes
            continue
        if not isinstance(part, made_by_python) and not is_of_a_library(kind_of_part):
            yield f"{path}.{name}", part
    carrier = annotations.carrier_of(kind)
    yield from () if carrier is None else parts_of_function(carrier, path)
    for i, base in enumerate(kind.__bases__):
        yield f"{path}.__bases__[{i}]", base


def _globals_named_in(code: types.CodeType) -> Iterator[str]:
    """Yield the globals that code names, including the code of functions inside it."""
    for each in annotations.with_inner(code):
        for instruction in dis.get_instructions(each):
            if instruction.opname in _GLOBAL_OPERATIONS:
                yield instruction.argval


def _attributes(value: Any, path: str) -> Iterator[tuple[str, object]]:
    """Yield the parts of an object that are pickled; nothing if its class refuses."""
    reduced: Any = ""
    with contextlib.suppress(Exception):
        reduced = value.__reduce_ex__(5)
    if not isinstance(reduced, tuple):  # the name of a global, or an invalid answer
        return
    reduced = (*reduced, None, None, None, None)
    arguments, state, items, pairs = reduced[1:5]
    for each in state if isinstance(state, tuple) else (state,):  # pyright: ignore[reportUnknownVariableType]  # its __dict__, and slots
        if isinstance(each, dict):
            yield from ((f"{path}.{name}", part) for name, part in each.items())  # pyright: ignore[reportUnknownVariableType]
        else:
            yield f"{path}.__getstate__()", each
    yield from ((f"{path}[{i}]", item) for i, item in enumerate(items or ()))
    yield from ((f"{path}[{_shown(key)}]", item) for key, item in pairs or ())
    for i, part in enumerate(arguments or ()):
        if part is not type(value):
            yield f"{path}.__reduce__()[1][{i}]", part
