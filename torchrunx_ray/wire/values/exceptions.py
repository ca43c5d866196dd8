"""Exceptions as bytes, and back as the same type."""

import copyreg
import types
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torchrunx_ray.errors import made_without_constructor
from torchrunx_ray.wire.by_value import pickler_hooks
from torchrunx_ray.wire.values import pickling

_BASE: Any = vars(BaseException)

_LEFT = {(AttributeError, "obj")}
"""Any object of the function's, however large; pickle leaves it as well."""


def dump_exception(error: BaseException) -> bytes:
    """Pickle an exception so that it loads again here; raises what makes that impossible.

    A class's own way to be pickled wins where it works.
    """
    try:
        return _dump(error, _by_parts)
    except BaseException as reason:
        try:
            return _dump(error, _by_parts_whatever_its_class_says)
        except BaseException:
            raise reason from None


def load_exception(data: bytes) -> BaseException:
    return pickler_hooks.loads(data)


def text_of(error: BaseException) -> str:
    """Return an exception's text, also if its class makes trouble."""
    try:
        return str.__str__(str(error))  # not of a class of the function's
    except BaseException as reason:
        return f"<its __str__ raised {type(reason).__name__}>"


def _dump(error: BaseException, replace: pickling.Replace) -> bytes:
    data = pickling.dumps(error, replace)
    loaded = pickler_hooks.loads(data)
    if type(loaded) is not type(error):
        raise TypeError(f"it comes back as {type(loaded).__qualname__}")
    return data


def _by_parts(value: object) -> Any:
    """A call that makes the exception without its constructor, also one inside of another.

    Not where its class has a way of its own, or the usual one, a call of its type with `args`, makes
    the same of it.
    """
    kind = untyped = cast("Any", type(value))
    if not issubclass(kind, BaseException) or kind in copyreg.dispatch_table:
        return NotImplemented
    if _defines(kind, "__reduce__", "__reduce_ex__"):
        return NotImplemented
    if _defines(kind, "__getstate__", "__setstate__"):
        state = untyped.__getstate__(value) if _defines(kind, "__getstate__") else _state(value)
        in_builtins = (base for base in kind.__mro__ if base.__module__ == "builtins")
        fields = [*_fields(value, in_builtins)]
        return made_without_constructor, (kind, _args(value), {}, fields), state
    is_usual = isinstance(kind.__init__, types.WrapperDescriptorType) and not isinstance(
        kind.__new__, types.FunctionType
    )
    parts = _by_parts_whatever_its_class_says(value)
    return NotImplemented if is_usual and not parts[1][3] else parts


def _by_parts_whatever_its_class_says(value: object) -> Any:
    kind = type(value)
    if not issubclass(kind, BaseException):
        return NotImplemented
    fields = [*_fields(value, kind.__mro__)]
    return made_without_constructor, (kind, _args(value), _state(value), fields)


def _defines(kind: type, *names: str) -> bool:
    """Return True if a class that is not built in has one of these methods."""
    own = (base for base in kind.__mro__ if base.__module__ != "builtins")
    return any(name in vars(base) for base in own for name in names)


def _fields(error: Any, kinds: Iterable[type]) -> Iterator[tuple[type, str, Any]]:
    """Return the values that it keeps in C and in slots, except those that nobody may set."""
    for owner in kinds:
        if owner in (BaseException, object):
            continue
        for name, field in vars(owner).items():
            if not isinstance(field, types.MemberDescriptorType | types.GetSetDescriptorType):
                continue
            if name in ("__dict__", "__weakref__") or (owner, name) in _LEFT:
                continue
            try:
                value = field.__get__(error)
                if value is not None:  # None may stand for none, which is something else
                    field.__set__(error, value)
                    yield owner, name, value
            except Exception:
                continue  # it has no value, or is read-only


# By the base class: an exception may refuse to be asked for attributes.


def _args(error: object) -> tuple[Any, ...]:
    return _BASE["args"].__get__(error)


def _state(error: object) -> dict[str, Any]:
    return dict(_BASE["__dict__"].__get__(error))
