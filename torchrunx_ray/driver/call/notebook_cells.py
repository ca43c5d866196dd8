"""The cells of a notebook, which are in no file that a worker could read."""

import linecache
import types
from typing import Any


class Brought:
    """Takes note, while a call is pickled, of the cells that its functions come from.

    It is pickled itself as their lines, by the names of files that Python knows them by.
    """

    def __init__(self) -> None:
        self._files: set[str] = set()

    def note(self, value: object) -> None:
        if isinstance(value, types.CodeType):
            self._files.add(value.co_filename)

    def __reduce__(self) -> tuple[Any, ...]:
        cells = [name for name in self._files if "ipykernel_" in name]
        return dict, ([(name, linecache.getlines(name)) for name in cells],)
