"""Empty classes, for the state of a class that travels by value.

What the script's own hooks for new classes did travels with the class, and they would need keywords that
no class keeps. So hooks that came by value themselves are not called.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Generator, Iterator
from typing import Any, cast

from torchrunx_ray.wire.by_value.private import of_cloudpickle

_travelled: Any = of_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_CLASS"]
"""Classes that came, or went, by value."""

_HOOKS = "__init_subclass__", "__pydantic_init_subclass__"


def with_name_and_slots(kind: type, reduced: Any) -> Any:
    """Add the slots to a class, without which its objects fit no other, and its name within the script.

    A class inside a function has only its short name, by which pickle finds it. A TypedDict has its base again.
    """
    own = {name: value for name, value in vars(kind).items() if name == "__slots__"}
    if "<locals>" not in kind.__qualname__:
        own["__qualname__"] = kind.__qualname__
    make, (metaclass, name, bases, namespace, tracker_id, extra), *rest = reduced
    if metaclass.__name__ == "_TypedDictMeta" and "__orig_bases__" not in vars(kind):
        # Before Python 3.12, one that inherits or was made by a call knows no base but dict.
        bases = (sys.modules[metaclass.__module__].TypedDict,)
    return make, (metaclass, name, bases, namespace | own, tracker_id, extra), *rest


@contextlib.contextmanager
def calm(bases: Any) -> Generator[None]:
    """Within, these bases do not hear of a new subclass, except by the hooks of libraries."""
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
    """Return a hook that calls the next one, which may be a library's."""

    def hook(cls: type, **keywords: Any) -> None:
        getattr(after(kind, cls), name)(**keywords)

    after = cast("Any", super)  # its type, and classmethod's, are not for variables
    return cast("Any", classmethod)(hook)


def make(metaclass: Any, name: str, bases: Any, namespace: dict[str, Any], *rest: Any) -> type:
    """Call cloudpickle's own function, but no metaclass that came by value."""
    if metaclass in _travelled:
        metaclass = functools.partial(make_as_a_library, metaclass)
    make: Any = of_cloudpickle["_make_skeleton_class"]
    try:
        return make(metaclass, name, bases, namespace, *rest)
    except Exception:
        if "__slots__" not in namespace:
            raise
        # A metaclass that makes the slots may forbid the name, as that of typing.NamedTuple.
        others = {key: part for key, part in namespace.items() if key != "__slots__"}
        return make(metaclass, name, bases, others, *rest)


def make_as_a_library(metaclass: Any, name: str, bases: Any, namespace: Any) -> type:
    made = of_a_library(metaclass, "__new__")(metaclass, name, bases, namespace)
    of_a_library(metaclass, "__init__")(made, name, bases, namespace)
    return made


def of_a_library(metaclass: Any, name: str) -> Any:
    """Return a method as the first class among a metaclass and its bases defines it that did not travel."""
    own = (each for each in metaclass.__mro__ if each not in _travelled and name in vars(each))
    return getattr(next(own), name)
