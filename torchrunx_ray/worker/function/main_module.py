"""The worker's `__main__`: the user's script or notebook, as far as it travelled."""

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
    """Globals of scripts that came with functions and classes. What is pickled together shares one dict."""

    def __init__(self) -> None:
        self.of_the_call: dict[str, Any] | None = None
        self.of_values: list[dict[str, Any]] = []
        """A value of an earlier launch may have brought what the script was then."""

    def take(self, came: dict[str, Any], of_the_script: dict[str, Any]) -> dict[str, Any]:
        """Return the globals for what came with these: the script's, if they came with the call itself."""
        if self.of_the_call is None and not is_inserting():
            self.of_the_call = came
            of_the_script.update(came)
        if came is self.of_the_call:
            return of_the_script
        if all(came is not each for each in self.of_values):
            self.of_values.append(came)
        return came


class _Outer(type):
    """Kind of classes that stand for those that did not travel, where a class inside them did."""

    def __getattr__(cls, name: str) -> Any:
        found = _class_named(f"{cls.__qualname__}.{name}")
        if found is None:
            raise AttributeError(f"class {cls.__qualname__!r} has no attribute {name!r}")
        return found


@functools.cache
def _outer_class(name: str) -> _Outer:
    """Return the same one each time: pickle compares."""
    short = name.rpartition(".")[2]
    return _Outer(short, (), {"__module__": "__main__", "__qualname__": name})


def _class_named(name: str) -> type | None:
    """Return a class of the script that travelled, or what stands for it if only a class inside it did."""
    kinds = _classes()
    if name in kinds:
        return kinds[name]
    are_inside = (each.startswith(f"{name}.") and "<locals>" not in each for each in kinds)
    return _outer_class(name) if any(are_inside) else None


def _classes() -> dict[str, type]:
    """Return the script's classes that travelled, the first of each name."""
    with of_cloudpickle["_DYNAMIC_CLASS_TRACKER_LOCK"]:
        kinds = list(of_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_ID"].values())
    named: dict[str, type] = {}
    for kind in kinds:  # type variables, too, which have no such name
        if kind.__module__ == "__main__" and hasattr(kind, "__qualname__"):
            named.setdefault(kind.__qualname__, kind)
    return named


class _Script(types.ModuleType):
    """Has the globals of the function and of all that came with it.

    What pickles by name finds them here (`all_gather_object`, `torch.save`, queues). So do torch.compile, and
    what evaluates annotations.
    """

    __slots__ = ("_brought",)

    def __init__(self, brought: _Brought) -> None:
        super().__init__("__main__")
        self._brought = brought

    @property
    def __file__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # read-only
        """The script's, if children that multiprocessing spawns can import it."""
        path = vars(self).get("__file__")
        if vars(self).get("__package__") or not isinstance(path, str) or not os.path.isfile(path):
            raise AttributeError("__file__")  # a part of a package needs its name
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
    """Make a `__main__` of the globals that come with functions which are unpickled within.

    In place of the keeper's module, which children that multiprocessing spawns would import.
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
