"""The worker's `__main__`: the parts of the user's script or notebook that were sent."""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Generator
from typing import Any

from torchrunx_ray.wire.by_value.private import of_cloudpickle
from torchrunx_ray.wire.values.payload import is_inserting


class _Brought:
    """Globals of scripts that came with functions and classes. Objects pickled together share one dict."""

    def __init__(self) -> None:
        self.of_the_call: dict[str, Any] | None = None
        self.of_values: list[dict[str, Any]] = []
        """Globals that came with values. A value of an earlier launch may have the script's globals of that time."""

    def take(self, came: dict[str, Any], of_the_script: dict[str, Any]) -> dict[str, Any]:
        """Return the globals for an object that came with `came`: the script's, if `came` belongs to the call."""
        if self.of_the_call is None and not is_inserting():
            self.of_the_call = came
            of_the_script.update(came)
        if came is self.of_the_call:
            return of_the_script
        if all(came is not each for each in self.of_values):
            self.of_values.append(came)
        return came


class _Outer(type):
    """Metaclass of placeholders for classes that were not sent although a class inside them was."""

    def __getattr__(cls, name: str) -> Any:
        found = _class_named(f"{cls.__qualname__}.{name}")
        if found is None:
            raise AttributeError(f"class {cls.__qualname__!r} has no attribute {name!r}")
        return found


@functools.cache
def _outer_class(name: str) -> _Outer:
    """Return a placeholder for this class, always the same one: pickle compares by identity."""
    short = name.rpartition(".")[2]
    return _Outer(short, (), {"__module__": "__main__", "__qualname__": name})


def _class_named(name: str) -> type | None:
    """Return a class of the script that was sent, or a placeholder if only a class inside it was."""
    kinds = _classes()
    if name in kinds:
        return kinds[name]
    are_inside = (each.startswith(f"{name}.") and "<locals>" not in each for each in kinds)
    return _outer_class(name) if any(are_inside) else None


def _classes() -> dict[str, type]:
    """Return the script's classes that were sent, the first of each name."""
    with of_cloudpickle["_DYNAMIC_CLASS_TRACKER_LOCK"]:
        kinds = list(of_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_ID"].values())
    named: dict[str, type] = {}
    for kind in kinds:  # includes type variables, which have no __qualname__
        if kind.__module__ == "__main__" and hasattr(kind, "__qualname__"):
            named.setdefault(kind.__qualname__, kind)
    return named


class _Script(types.ModuleType):
    """A `__main__` module with the globals of the function and of everything that came with it.

    Code that pickles by name finds them here (`all_gather_object`, `torch.save`, queues). So do torch.compile and
    code that evaluates annotations.
    """

    __slots__ = ("_brought",)

    def __init__(self, brought: _Brought) -> None:
        super().__init__("__main__")
        self._brought = brought

    @property
    def __file__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # read-only
        """The script's file, if children that multiprocessing spawns can import it."""
        path = vars(self).get("__file__")
        if vars(self).get("__package__") or not isinstance(path, str) or not os.path.isfile(path):
            raise AttributeError("__file__")  # a module of a package is imported by name
        return path

    def __getattr__(self, name: str) -> Any:
        for came in self._brought.of_values:
            if name in came and not name.startswith("__"):
                return came[name]
        found = _class_named(name)
        if found is not None:
            return found
        raise AttributeError(f"module '__main__' has no attribute {name!r}", name=name, obj=self)


@contextlib.contextmanager
def brought_by_the_call() -> Generator[None]:
    """Make a `__main__` from the globals of functions that are unpickled inside the context.

    It replaces the keeper's module, which children that multiprocessing spawns would import.
    """
    brought = _Brought()
    script = sys.modules["__main__"] = _Script(brought)
    plain = of_cloudpickle["_make_function"]

    @functools.wraps(plain)
    def make_function(code: Any, came: dict[str, Any], *rest: Any) -> Any:
        if came.get("__name__") == "__main__":
            came = brought.take(came, vars(script))
        return plain(code, came, *rest)

    of_cloudpickle["_make_function"] = make_function
    try:
        yield
    finally:
        of_cloudpickle["_make_function"] = plain
