"""Exceptions as bytes, and back as the same type."""

import pickle
import types
from typing import Any

from torchrunx_ray.errors import made_without_constructor
from torchrunx_ray.wire import pickling


def dump_exception(error: BaseException) -> bytes:
    """Pickle an exception so that it loads again here; raises what makes that impossible."""
    data = pickling.dumps(error, _by_parts)
    loaded = pickle.loads(data)
    if type(loaded) is not type(error):
        raise TypeError(f"it comes back as {type(loaded).__qualname__}")
    return data


def load_exception(data: bytes) -> BaseException:
    return pickle.loads(data)


def _has_constructor_of_its_own(error: BaseException) -> bool:
    """Whether the usual way, a call of its type with `args`, would make something else of it."""
    kind = type(error)
    own_reduce = any(
        "__reduce__" in k.__dict__ or "__reduce_ex__" in k.__dict__
        for k in kind.__mro__
        if k.__module__ != "builtins"
    )
    return isinstance(kind.__init__, types.FunctionType) and not own_reduce


def _by_parts(value: object) -> Any:
    """A call that makes the exception without its constructor, also one inside of another."""
    if isinstance(value, BaseException) and _has_constructor_of_its_own(value):
        return made_without_constructor, (type(value), value.args, dict(value.__dict__))
    return NotImplemented
