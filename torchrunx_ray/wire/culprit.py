"""Which part of a value is to blame for a pickling error."""

import copyreg
import dis
import functools
import os
import pickle
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

from torchrunx_ray.wire import pickling

_DEPTH = 20

_PICKLING = (
    f"{os.path.dirname(os.path.dirname(__file__))}{os.sep}",
    f"{os.path.dirname(cloudpickle.__file__)}{os.sep}",
    pickle.__file__,
    copyreg.__file__,
)
"""Where the code lies that pickles, and unpickles."""


def find_culprit(
    parts: Iterable[tuple[str, object]], replace: pickling.Replace | None = None
) -> str:
    """The path to the deepest part that cannot be pickled by itself, starting at a named part."""
    path = "the value"
    candidates: Iterable[tuple[str, object]] = parts
    seen: set[int] = set()
    for _ in range(_DEPTH):
        for child_path, child in candidates:
            if id(child) not in seen and not _can_be_pickled(child, replace):
                path = child_path
                seen.add(id(child))
                candidates = _parts(child, child_path)
                break
        else:
            break
    return path


def users_part(error: BaseException) -> BaseException | None:
    """What code of the user's raised while a value was pickled or unpickled, from that code on.

    None where nothing but pickling itself raised.
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


def _can_be_pickled(value: object, replace: pickling.Replace | None) -> bool:
    try:
        pickling.dumps_with_buffers(value, replace)
    except Exception:
        return False
    return True


def _parts(value: Any, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]  # any mapping
            yield f"{path}.keys()", key
            yield f"{path}[{key!r}]", item
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
    elif not isinstance(value, type | types.ModuleType):
        yield from _attributes(value, path)


def parts_of_function(function: types.FunctionType, path: str) -> Iterator[tuple[str, object]]:
    """What cloudpickle takes along with a function: closure, globals it names, defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable {name!r} captured by {path}", cell.cell_contents
        except ValueError:  # the cell is empty
            continue
    for name in dict.fromkeys(_globals_named_in(function.__code__)):
        if name in function.__globals__:
            yield f"global {name!r} used by {path}", function.__globals__[name]
    for i, default in enumerate(function.__defaults__ or ()):
        yield f"default {i} of {path}", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f"default {name!r} of {path}", default


def _globals_named_in(code: types.CodeType) -> Iterator[str]:
    """Also by functions that it makes."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_named_in(constant)


def _attributes(value: object, path: str) -> Iterator[tuple[str, object]]:
    names = list(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    for name in names:
        if hasattr(value, name):
            yield f"{path}.{name}", getattr(value, name)
