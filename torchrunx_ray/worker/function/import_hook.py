"""Calls at the import of a module, in a worker or template."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Callable, Generator, Sequence


def after_import(name: str, then: Callable[[types.ModuleType], None]) -> None:
    """Call `then` with a module once the module is imported; at once if it already is."""
    module = sys.modules.get(name)
    if module is not None:
        then(module)
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


@contextlib.contextmanager
def between_imports(call: Callable[[], None]) -> Generator[None]:
    """Call this before each module that this thread of this process imports inside the context."""
    hook = _BetweenImports(call)
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        sys.meta_path.remove(hook)


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, then: Callable[[types.ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None",  # noqa: ARG002  # the protocol's signature
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_call(module: types.ModuleType) -> None:
            load(module)
            self._then(module)

        spec.loader.exec_module = load_and_call
        return spec


class _BetweenImports(importlib.abc.MetaPathFinder):
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._caller = _caller()

    def find_spec(
        self,
        fullname: str,  # noqa: ARG002  # the protocol's signature
        path: "Sequence[str] | None",  # noqa: ARG002
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> None:
        if _caller() == self._caller:  # an imported module may fork, or start a thread
            self._call()


def _caller() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()
