"""The worker's `__main__`: the user's script or notebook, as far as it travelled."""

import contextlib
import functools
import os
import sys
import types
from collections.abc import Generator
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

_cloudpickle: Any = vars(cloudpickle.cloudpickle)  # what follows has no public names


class _Script(types.ModuleType):
    """Shows what functions and classes of the script brought with them.

    What pickles by name finds them here (`all_gather_object`, `torch.save`, queues), and torch.compile
    looks up here what compiled code reads of the script's globals.
    """

    def __init__(self) -> None:
        super().__init__("__main__")
        self.__dict__["_brought"] = []

    def __getattr__(self, name: str) -> Any:
        # What came first is the function's own; an argument of an earlier launch may have brought
        # what the script was then.
        for brought in self.__dict__["_brought"]:
            if name in brought and (not name.startswith("__") or _is_the_file(name, brought)):
                return brought[name]
        with _cloudpickle["_DYNAMIC_CLASS_TRACKER_LOCK"]:
            kinds = list(_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_ID"].values())
        for kind in kinds:  # type variables, too, which have no such name
            if (kind.__module__, getattr(kind, "__qualname__", None)) == ("__main__", name):
                return kind
        raise AttributeError(f"module '__main__' has no attribute {name!r}", name=name, obj=self)


def _is_the_file(name: str, brought: dict[str, Any]) -> bool:
    """Children that multiprocessing spawns import it: only where they can."""
    if name != "__file__" or brought.get("__package__"):  # a part of a package needs its name
        return False
    return os.path.isfile(brought[name])


@contextlib.contextmanager
def brought_by_the_call() -> Generator[None]:
    """Make a `__main__` of the globals that come with functions which are unpickled within.

    In place of the keeper's module, which children that multiprocessing spawns would import.
    """
    script = _Script()
    sys.modules["__main__"] = script
    plain = _cloudpickle["_make_function"]
    brought: list[dict[str, Any]] = script.__dict__["_brought"]

    @functools.wraps(plain)
    def make_function(code: Any, base_globals: dict[str, Any], *rest: Any) -> Any:
        is_new = all(
            base_globals is not each for each in brought
        )  # what is pickled together shares one
        if is_new and base_globals.get("__name__") == "__main__":
            brought.append(base_globals)
        return plain(code, base_globals, *rest)

    _cloudpickle["_make_function"] = make_function
    try:
        yield
    finally:
        _cloudpickle["_make_function"] = plain
