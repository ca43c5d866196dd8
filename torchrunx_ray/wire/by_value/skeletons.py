"""Empty classes that later get the state of a class pickled by value.

The script's own hooks for new classes are not called if they were pickled by value themselves. Their effects are
already part of the class's state, and they would need keywords that no class keeps.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Generator, Iterator
from typing import Any, cast

from torchrunx_ray.wire.by_value.private import of_cloudpickle

_travelled: Any = of_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_CLASS"]
"""Classes that were received or sent by value."""

_HOOKS = "__init_subclass__", "__pydantic_init_subclass__"


def with_name_and_slots(kind: type, reduced: Any) -> Any:
    """Add a class's slots and its qualified name to the reduce tuple. A TypedDict also gets its base again.

    Without its slots, a class has another memory layout. A class inside a function keeps only its short name, by
    which pickle finds it.
    """
    own = {name: value for name, value in vars(kind).items() if name == "__slots__"}
    if "<locals>" not in kind.__qualname__:
        own["__qualname__"] = kind.__qualname__
    make, (metaclass, name, bases, namespace, tracker_id, extra), *rest = reduced
    if metaclass.__name__ == "_TypedDictMeta" and "__orig_bases__" not in vars(kind):
        # Before Python 3.12, a TypedDict that inherits or was made by a call has no base but dict.
        bases = (sys.modules[metaclass.__module__].TypedDict,)
    return make, (metaclass, name, bases, namespace | own, tracker_id, extra), *rest


@contextlib.contextmanager
def calm(bases: Any) -> Generator[None]:
    """Suppress the bases' hooks for new subclasses inside the context, except the hooks of libraries."""
    hooks = list(_hooks_of(bases))
    for kind, name, _ in hooks:
        type.__setattr__(kind, name, _passing_on(kind, name))
    try:
        yield
    finally:
        for kind, name, hook in hooks:
            type.__setattr__(kind, name, hook)


def _hooks_of(bases: Any) -> Iterator[tuple[type, str, object]]:
    family: dict[type, None] = dict.fromkeys(
        each for base in types.resolve_bases(bases) for each in base.__mro__
    )
    for kind in family:
        if kind in _travelled:
            yield from ((kind, name, vars(kind)[name]) for name in _HOOKS if name in vars(kind))


def _passing_on(kind: type, name: str) -> object:
    """Return a hook that only calls the next hook, which may be a library's."""

    def hook(cls: type, **keywords: Any) -> None:
        getattr(after(kind, cls), name)(**keywords)

    after = cast("Any", super)  # type checkers accept neither super nor classmethod with variables
    return cast("Any", classmethod)(hook)


def make(metaclass: Any, name: str, bases: Any, namespace: dict[str, Any], *rest: Any) -> type:
    """Call cloudpickle's own function, but without the methods of a metaclass that was pickled by value."""
    if metaclass in _travelled:
        metaclass = functools.partial(make_as_a_library, metaclass)
    make: Any = of_cloudpickle["_make_skeleton_class"]
    try:
        return make(metaclass, name, bases, namespace, *rest)
    except Exception:
        if "__slots__" not in namespace:
            raise
        # A metaclass that makes the slots itself may forbid the name, as typing.NamedTuple's does.
        others = {key: part for key, part in namespace.items() if key != "__slots__"}
        return make(metaclass, name, bases, others, *rest)


def make_as_a_library(metaclass: Any, name: str, bases: Any, namespace: Any) -> type:
    made = of_a_library(metaclass, "__new__")(metaclass, name, bases, namespace)
    of_a_library(metaclass, "__init__")(made, name, bases, namespace)
    return made


def of_a_library(metaclass: Any, name: str) -> Any:
    """Return a method from the first class in a metaclass's MRO that defines it and was not pickled by value."""
    own = (each for each in metaclass.__mro__ if each not in _travelled and name in vars(each))
    return getattr(next(own), name)
