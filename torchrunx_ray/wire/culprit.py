"""Which part of a value is to blame for a pickling error."""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torchrunx_ray.wire import pickling

_DEPTH = 20


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
        yield from _parts_of_function(value, path)
    elif not isinstance(value, type | types.ModuleType):
        yield from _attributes(value, path)


def _parts_of_function(function: types.FunctionType, path: str) -> Iterator[tuple[str, object]]:
    """What cloudpickle takes along with a function: closure, globals it names, defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable {name!r} captured by {path}", cell.cell_contents
        except ValueError:  # the cell is empty
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f"global {name!r} used by {path}", function.__globals__[name]
    for i, default in enumerate(function.__defaults__ or ()):
        yield f"default {i} of {path}", default


def _attributes(value: object, path: str) -> Iterator[tuple[str, object]]:
    names = list(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    for name in names:
        if hasattr(value, name):
            yield f"{path}.{name}", getattr(value, name)
