"""The cells of a notebook, which no worker can read from a file."""

import linecache
import types
from typing import Any


class Brought:
    """A collector of the cells that a call's functions come from, filled while the call is pickled.

    A Brought is pickled as a mapping from the cells' file names to their lines.
    """

    def __init__(self) -> None:
        self._files: set[str] = set()

    def note(self, value: object) -> None:
        if isinstance(value, types.CodeType):
            self._files.add(value.co_filename)

    def __reduce__(self) -> tuple[Any, ...]:
        cells = [name for name in self._files if "ipykernel_" in name]
        return dict, ([(name, linecache.getlines(name)) for name in cells],)
