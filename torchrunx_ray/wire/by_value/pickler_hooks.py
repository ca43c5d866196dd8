"""Hooks for classes and functions pickled by value, which keep the parts that cloudpickle would lose."""

import dataclasses
import functools
import inspect
import io
import pickle
import re
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

from torchrunx_ray.wire.by_value import (
    annotations,
    closures,
    code_first,
    enums,
    inner_code,
    skeletons,
    type_names,
)
from torchrunx_ray.wire.by_value.private import (
    goes_by_value,
    is_of_the_script,
    of_cloudpickle,
    share_id,
)
from torchrunx_ray.wire.by_value.unfit import UnfitError

_by_id: Any = of_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_ID"]

_loading = threading.RLock()
"""Lock for loading, since cloudpickle publishes a class before it is complete. Re-entrant, since loading may nest."""

_MAKES_A_CLASS = re.compile(rb"set_class_state")
"""Pattern that is in every stream with a class: our function's name, and the start of the enums' setter's name."""

_MAKERS = {
    id(of_cloudpickle["_make_skeleton_class"]): skeletons.make,
    id(enums.make_enum): enums.make_enum,
}
"""Makers of empty classes by the id of the function in the stream, with the function called instead."""

_SETTERS = code_first.set_class_state, enums.set_class_state_of_enum, enums.set_members
"""Functions that a stream calls to fill a class, which is the first argument."""

_NO_FILE = "<dynamic-code>"
"""Placeholder that cloudpickle writes instead of a file's name, since 3.1.3."""

_SENTINELS: dict[type, str] = {
    type(vars(dataclasses)[name]): name for name in ("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY")
}
"""Types of sentinels that dataclasses compares by identity, with the name of its own object.

Other pickling libraries, such as Ray's copy of cloudpickle, make further objects of these types.
"""


def reduce(obj: Any, order: code_first.Order) -> Any:
    """Return a reduce tuple, or NotImplemented to leave the object to cloudpickle."""
    kind = cast("Any", type(obj))
    if kind is types.CodeType:
        return _with_file(obj)
    if kind is types.CellType:
        return closures.reduce_cell(obj, order)
    if kind is functools.cached_property:  # has a lock before Python 3.12
        return _cached_property, (obj.func, obj.attrname)
    if kind is functools._lru_cache_wrapper and goes_by_value(obj):  # pyright: ignore[reportPrivateUsage]
        return _cached, (obj.__wrapped__, obj.cache_parameters()), _attributes_of_cached(obj)
    if kind in _SENTINELS:
        return getattr, (dataclasses, _SENTINELS[kind])
    if enums.is_found_by_name(obj) and goes_by_value(kind):
        return enums.member_named, (kind, obj._name_)
    if type_names.is_part_of_parameters(kind):
        return type_names.reduce_part_of_parameters(obj)
    if type_names.is_type_name(kind) and goes_by_value(obj):
        return type_names.reduce_type_name(obj)
    if _is_dispatcher(obj) and goes_by_value(obj):
        return _dispatching, (), _state_of_dispatcher(obj), None, None, _set_dispatcher_state
    if issubclass(kind, type) and is_of_the_script(obj):
        _refuse_class_of_msgspec(kind)
        share_id(obj)
    return NotImplemented


def _refuse_class_of_msgspec(metaclass: type) -> None:
    if any(each.__module__.partition(".")[0] == "msgspec" for each in metaclass.__mro__):
        raise UnfitError(
            "msgspec keeps the definition of a Struct class where Python cannot read it; put the class into a "
            "module beside the script, and import it"
        )


def _with_file(code: types.CodeType) -> Any:
    """Keep the file's name, from which tracebacks, inspect.getsource and torch.jit.script read lines."""
    make, parts = of_cloudpickle["_code_reduce"](code)
    return make, tuple(
        code.co_filename if type(part) is str and part == _NO_FILE else part for part in parts
    )


def _is_dispatcher(obj: Any) -> bool:
    """Return True for a dispatcher of functools.singledispatch. A wrapper has its attributes, but not its code."""
    return type(obj) is types.FunctionType and obj.__code__ is _CODE_OF_DISPATCHERS


def _state_of_dispatcher(function: Any) -> Any:
    """Return a dispatcher's state without singledispatch's own attributes.

    These attributes have weak references, and a new dispatcher has its own.
    """
    named = {
        name: getattr(function, name)
        for name in functools.WRAPPER_ASSIGNMENTS
        if hasattr(function, name)
    }
    attributes = cast("dict[str, Any]", vars(function))
    others = {name: part for name, part in attributes.items() if name not in _OF_DISPATCHERS}
    return tuple(function.registry.items()), named | others


def finish(
    obj: Any, reduced: Any, order: code_first.Order, can_be_pickled: Callable[[object], bool]
) -> Any:
    """Return cloudpickle's reduce tuple with the parts of the object that cloudpickle loses."""
    if reduced is NotImplemented:
        return reduced
    if reduced[0] is of_cloudpickle["_make_skeleton_class"]:
        reduced = skeletons.with_name_and_slots(obj, reduced)
        return code_first.of_class(obj, reduced, order, annotations.carrier_of(obj))
    if reduced[0] is of_cloudpickle["_make_skeleton_enum"]:
        return enums.reduce_enum(obj, reduced, order)
    if reduced[0] is of_cloudpickle["_make_function"]:
        reduced = closures.with_own_cells(obj, reduced)
        reduced = inner_code.with_needs(obj, reduced, can_be_pickled)
        return code_first.of_function(obj, _without_parts_of_dispatcher(obj, reduced), order)
    return reduced


def _without_parts_of_dispatcher(function: Any, reduced: Any) -> Any:
    """Let a dispatcher's wrapper copy again the attributes that functools.wraps copied from the dispatcher."""
    if not hasattr(function, "__wrapped__"):
        return reduced
    try:
        below: Any = inspect.unwrap(function, stop=_is_dispatcher)
    except Exception:  # a circle, or a property that raises; cloudpickle does not follow it
        return reduced
    if not _is_dispatcher(below):
        return reduced
    make, arguments, (attributes, slots), items, pairs, _ = reduced
    own = cast("dict[str, Any]", vars(below))
    copied = [name for name in _OF_DISPATCHERS if attributes.get(name, reduced) is own[name]]
    attributes = {name: part for name, part in attributes.items() if name not in copied}
    return make, arguments, (attributes, slots, below, copied), items, pairs, _set_wrapper_state


def loads(stream: "bytes | memoryview", buffers: Sequence[Any] = ()) -> Any:
    """Load a pickle stream. Classes that this process already has stay unchanged."""
    if _MAKES_A_CLASS.search(stream) is None:
        return pickle.loads(stream, buffers=buffers)
    with _loading:
        return _Unpickler(io.BytesIO(stream), buffers=buffers).load_whole()


class _Unpickler(pickle.Unpickler):
    """An unpickler that keeps existing classes unchanged.

    A class of the script comes back with a value in its state in the worker, bound to the worker's globals.
    cloudpickle would write that state into the driver's own class.
    """

    def __init__(self, file: io.BytesIO, *, buffers: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._classes = _Classes()

    def load_whole(self) -> Any:
        try:
            value = self.load()
        except BaseException:
            self._classes.forget()
            raise
        self._classes.are_whole()
        return value

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = super().find_class(module_name, global_name)
        if id(found) in _MAKERS:
            return functools.partial(self._classes.make, _MAKERS[id(found)])
        if any(found is each for each in _SETTERS):
            return functools.partial(self._classes.fill, found)
        return found


class _Classes:
    """The classes in one stream.

    This object is separate from the unpickler, because the unpickler's memo refers to it. If the memo referred to
    the unpickler itself, the cycle would keep all loaded objects and buffers alive until garbage collection.
    """

    def __init__(self) -> None:
        self._were_here: list[type] = []
        self._made: dict[Any, type] = {}

    def forget(self) -> None:
        """Forget these classes after a failure. Otherwise the next attempt would reuse an incomplete class."""
        for tracker_id in self._made:
            _by_id.pop(tracker_id, None)

    def are_whole(self) -> None:
        for kind in self._made.values():
            share_id(kind)

    def make(self, make: Callable[..., type], *arguments: Any) -> type:
        *_, tracker_id, _ = arguments
        here = _by_id.get(tracker_id)
        if here is not None:
            if tracker_id not in self._made:  # otherwise its bases, which come first, have made it
                self._were_here.append(here)
            return here
        _metaclass, _name, bases, *_ = arguments
        with skeletons.calm(bases):
            self._made[tracker_id] = make(*arguments)
        return self._made[tracker_id]

    def fill(self, fill: Callable[..., None], kind: type, *arguments: Any) -> None:
        if all(kind is not each for each in self._were_here):
            fill(kind, *arguments)


def _cached_property(function: Callable[..., Any], name: str | None) -> Any:
    made = functools.cached_property(function)
    made.attrname = name
    return made


def _dispatching() -> Any:
    """Return a dispatcher without implementations. It comes first, since implementations may refer to it."""
    return functools.singledispatch(_dispatching)


def _set_dispatcher_state(function: Any, state: Any) -> None:
    implementations, attributes = state
    for kind, implementation in implementations:
        function.register(kind, implementation)
    for name, part in attributes.items():
        setattr(function, name, part)


def _set_wrapper_state(function: Any, state: Any) -> None:
    attributes, slots, dispatcher, copied = state
    of_cloudpickle["_function_setstate"](function, (attributes, slots))
    function.__dict__.update({name: getattr(dispatcher, name) for name in copied})


_CODE_OF_DISPATCHERS = _dispatching().__code__
"""Code that all dispatchers of functools.singledispatch share."""

_OF_DISPATCHERS = frozenset(cast("dict[str, Any]", vars(_dispatching()))) - {"__wrapped__"}


def _attributes_of_cached(function: Any) -> dict[str, Any]:
    """Return the attributes of a cached function, except those that functools.lru_cache sets."""
    attributes = cast("dict[str, Any]", vars(function))
    own = ("__wrapped__", "cache_parameters")
    return {name: part for name, part in attributes.items() if name not in own}


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)
