"""Pickling of exceptions, which come back as the same type."""

import copyreg
import types
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torchrunx_ray.errors import made_without_constructor
from torchrunx_ray.wire.by_value import pickler_hooks
from torchrunx_ray.wire.values import pickling

_LEFT = {(AttributeError, "obj")}
"""Fields that are left out. `obj` may be any object, however large, and pickle leaves it out as well."""


def dump_exception(error: BaseException) -> bytes:
    """Pickle an exception and check that it loads again here. Raise the error that prevents this.

    If the class has its own way of pickling, and that way works, it is used.
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
    """Return an exception's text, even if its class raises in `__str__`."""
    try:
        return str.__str__(str(error))  # a plain str, even if __str__ returned a subclass
    except BaseException as reason:
        return f"<its __str__ raised {type(reason).__name__}>"


def _dump(error: BaseException, replace: pickling.Replace) -> bytes:
    data = pickling.dumps(error, replace)
    loaded = pickler_hooks.loads(data)
    if type(loaded) is not type(error):
        raise TypeError(f"it is unpickled as {type(loaded).__qualname__}")
    return data


def _by_parts(value: object) -> Any:
    """Return a reduce tuple that makes an exception without its constructor, also an exception inside a value.

    Return NotImplemented if the class has its own way of pickling. Also return it if the usual way, a call of the
    type with `args`, gives the same exception.
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
        return made_without_constructor, (kind, own(value, "args"), {}, fields), state
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
    return made_without_constructor, (kind, own(value, "args"), _state(value), fields)


def _defines(kind: type, *names: str) -> bool:
    """Return True if a class that is not built in has one of these methods."""
    own = (base for base in kind.__mro__ if base.__module__ != "builtins")
    return any(name in vars(base) for base in own for name in names)


def _fields(error: Any, kinds: Iterable[type]) -> Iterator[tuple[type, str, Any]]:
    """Yield the values that an exception keeps in C and in slots, except read-only ones."""
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
                if value is not None:  # an unset field also reads as None
                    field.__set__(error, value)
                    yield owner, name, value
            except Exception:
                continue  # the field has no value, or is read-only


def _state(error: object) -> dict[str, Any]:
    return dict(own(error, "__dict__"))


def own(error: object, attribute: str) -> Any:
    """Return an attribute through BaseException, since the exception's class may override attribute access."""
    return vars(BaseException)[attribute].__get__(error)
