"""Large values that a function takes along because it names them: most often not meant to travel."""

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
"""Bytes of one value that are worth a word."""

_told: set[str] = set()

_looked_at: "weakref.WeakSet[types.CodeType]" = weakref.WeakSet()
"""It takes pickling a large function several times, and most are launched again."""


def tell_of_large(name: str, func: object, replace: Replace) -> None:
    """Name what makes the function large, once; what comes as an argument is meant to travel."""
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
                "%s has %s, which every launch of the function sends to the cluster anew. Load it in the "
                "function; or make it an argument and pass the ref that ray.put gave for it, once: the "
                "function gets the value.",
                path,
                bytes_in_words(size),
            )


def _code_of(func: Any) -> types.CodeType | None:
    """Return the code of a function, also within a method or a partial."""
    while not isinstance(func, types.FunctionType):
        func = getattr(func, "func", getattr(func, "__func__", None))
        if func is None:
            return None
    return func.__code__


def _large_parts(
    path: str, value: object, replace: Replace, seen: set[int]
) -> Iterator[tuple[str, int]]:
    """The deepest that are large by themselves. Functions and classes of modules travel by name."""
    if id(value) in seen:
        return
    seen.add(id(value))
    size = _size(value, replace)
    if size < LARGE:
        return
    parts = _parts(value, path)
    if parts is None and _size(type(value), replace) >= LARGE:
        # What its class takes along is not this object's own.
        parts = iter([(f"{type(value).__name__} of {path}", type(value))])
    if parts is None:
        yield path, size
        return
    for part_path, part in parts:
        yield from _large_parts(part_path, part, replace, seen)


def _size(value: object, replace: Replace) -> int:
    try:
        return pack([("", value)], replace=replace).size
    except PayloadError:  # as a part of the whole it could be
        return 0


def _parts(value: Any, path: str) -> Iterator[tuple[str, object]] | None:
    """Return the parts that code takes along; None for data."""
    if isinstance(value, types.FunctionType):
        return parts_of_function(value, path)
    if isinstance(value, types.MethodType):
        return iter([(path, value.__func__), (f"the object of {path}", value.__self__)])
    if isinstance(value, type):
        return parts_of_class(value, path)
    inner = getattr(value, "func", getattr(value, "__func__", None))  # a partial; a static method
    return iter([(path, inner)]) if isinstance(inner, types.FunctionType) else None
