"""Warnings about large values that a function captures. Most of these are captured by mistake."""

import logging
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torchrunx_ray.errors import PayloadError, bytes_in_words
from torchrunx_ray.wire.values.culprit import parts_of_class, parts_of_function
from torchrunx_ray.wire.values.payload import pack
from torchrunx_ray.wire.values.pickling import Replace

logger = logging.getLogger("torchrunx_ray")

LARGE = 64 * 2**20
"""Least size of a value, in bytes, that is worth a warning."""

_told: set[str] = set()

_looked_at: "weakref.WeakSet[types.CodeType]" = weakref.WeakSet()
"""Code of functions that are not examined again.

An examination pickles a large function several times, and most functions are launched more than once.
"""


def tell_of_large(name: str, func: object, replace: Replace) -> None:
    """Warn once of each large value that the function captures. Arguments are meant to be sent."""
    code = _code_of(func)
    if code in _looked_at:
        return
    parts = list(_large_parts(name, func, replace, set()))
    if parts and code is not None:
        _looked_at.add(code)
    for path, size in parts:
        if path not in _told:
            _told.add(path)
            logger.warning(
                "%s has %s, which every launch of the function sends to the cluster again. Load the data in the "
                "function. Or call ray.put once, and pass the reference that it returns as an argument: "
                "the function gets the value.",
                path,
                bytes_in_words(size),
            )


def _code_of(func: Any) -> types.CodeType | None:
    """Return the code of a function, even if a method or a partial wraps the function."""
    while not isinstance(func, types.FunctionType):
        func = getattr(func, "func", getattr(func, "__func__", None))
        if func is None:
            return None
    return func.__code__


def _large_parts(
    path: str, value: object, replace: Replace, seen: set[int]
) -> Iterator[tuple[str, int]]:
    """Yield the innermost parts that are large by themselves.

    Functions and classes of modules are pickled by name, and so are small.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    size = _size(value, replace)
    if size < LARGE:
        return
    parts = _parts(value, path)
    if parts is None and _size(type(value), replace) >= LARGE:
        # The captures of an object's class are not the object's own.
        parts = iter([(f"{type(value).__name__} of {path}", type(value))])
    if parts is None:
        yield path, size
        return
    for part_path, part in parts:
        yield from _large_parts(part_path, part, replace, seen)


def _size(value: object, replace: Replace) -> int:
    try:
        return pack([("", value)], replace=replace).size
    except PayloadError:  # a part may be unpicklable by itself
        return 0


def _parts(value: Any, path: str) -> Iterator[tuple[str, object]] | None:
    """Return the captures of code; None for data."""
    if isinstance(value, types.FunctionType):
        return parts_of_function(value, path)
    if isinstance(value, types.MethodType):
        return iter([(path, value.__func__), (f"the object of {path}", value.__self__)])
    if isinstance(value, type):
        return parts_of_class(value, path)
    inner = getattr(value, "func", getattr(value, "__func__", None))  # a partial; a static method
    return iter([(path, inner)]) if isinstance(inner, types.FunctionType) else None
