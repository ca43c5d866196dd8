"""Classes and functions that travel by value, where cloudpickle alone would lose something of them."""

import functools
import io
import pickle
import re
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

_cloudpickle: Any = vars(cloudpickle.cloudpickle)  # what follows has no public names

_by_id: Any = _cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_ID"]

_loading = threading.RLock()
"""cloudpickle lets others find a class before it is whole; what is loaded may load something itself."""

_MAKES_A_CLASS = re.compile(rb"_class_setstate")

_NO_FILE = "<dynamic-code>"
"""What cloudpickle writes in place of a file's name, since 3.1.3."""


def reduce(obj: Any) -> Any:
    """As for pickle, or NotImplemented where cloudpickle does it well."""
    if type(obj) is types.CodeType:
        return _with_file(obj)
    if issubclass(type(obj), type) and _is_struct(obj):
        raise TypeError(
            "msgspec keeps what it knows of a Struct class out of Python's reach; put the class into a "
            "module beside the script, and import it"
        )
    if (
        type(obj) is functools._lru_cache_wrapper  # pyright: ignore[reportPrivateUsage]
        and _cloudpickle["_lookup_module_and_qualname"](obj) is None
    ):
        return _cached, (obj.__wrapped__, obj.cache_parameters())
    return NotImplemented


def _with_file(code: types.CodeType) -> Any:
    """Tracebacks, inspect.getsource and torch.jit.script look for its lines there."""
    make, parts = _cloudpickle["_code_reduce"](code)
    return make, tuple(
        code.co_filename if type(part) is str and part == _NO_FILE else part for part in parts
    )


def _is_struct(kind: type) -> bool:
    """Whether a class is made by msgspec and has to travel by value."""
    return (
        type(kind).__module__.partition(".")[0] == "msgspec"
        and _cloudpickle["_lookup_module_and_qualname"](kind) is None
    )


def with_slots(obj: object, reduced: Any) -> Any:
    """What cloudpickle makes of a class, which otherwise comes without slots, so that its objects fit no other."""
    if reduced is NotImplemented or reduced[0] is not _cloudpickle["_make_skeleton_class"]:
        return reduced
    slots = {name: value for name, value in vars(obj).items() if name == "__slots__"}
    make, (metaclass, name, bases, namespace, tracker_id, extra), *rest = reduced
    return make, (metaclass, name, bases, namespace | slots, tracker_id, extra), *rest


def loads(stream: "bytes | memoryview", buffers: Sequence[Any] = ()) -> Any:
    """pickle.loads, but classes that this process has stay as they are."""
    if _MAKES_A_CLASS.search(stream) is None:
        return pickle.loads(stream, buffers=buffers)
    with _loading:
        return _Unpickler(io.BytesIO(stream), buffers=buffers).load_whole()


class _Unpickler(pickle.Unpickler):
    """A class of the script comes back with a value as it was in the worker, bound to that script's globals.

    cloudpickle would write all of that into the driver's own class.
    """

    def __init__(self, file: io.BytesIO, *, buffers: Sequence[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._were_here: list[type] = []
        self._made: list[Any] = []

    def load_whole(self) -> Any:
        try:
            return self.load()
        except BaseException:
            for tracker_id in self._made:  # or the next attempt would take an empty class for whole
                _by_id.pop(tracker_id, None)
            raise

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = super().find_class(module_name, global_name)
        if module_name == "cloudpickle.cloudpickle":
            if global_name in ("_make_skeleton_class", "_make_skeleton_enum"):
                return functools.partial(self._make_class, found)
            if global_name == "_class_setstate":
                return functools.partial(self._set_state, found)
        return found

    def _make_class(self, make: Callable[..., type], *arguments: Any) -> type:
        *_, tracker_id, _ = arguments
        here = _by_id.get(tracker_id)
        try:
            kind = make(*arguments)
        except Exception:
            if "__slots__" not in arguments[3]:
                raise
            kind = make(*_without_slots(*arguments))
        if kind is here:
            self._were_here.append(kind)
        else:
            self._made.append(tracker_id)
        return kind

    def _set_state(self, set_state: Callable[..., type], kind: type, state: Any) -> type:
        if any(kind is each for each in self._were_here):
            return kind
        return set_state(kind, state)


def _without_slots(metaclass: Any, name: Any, bases: Any, namespace: Any, *rest: Any) -> Any:
    """For a metaclass that makes the slots and forbids the name, as that of typing.NamedTuple."""
    namespace = {key: value for key, value in namespace.items() if key != "__slots__"}
    return metaclass, name, bases, namespace, *rest


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)
