"""Hooks for forked children of the driver, which have its state but none of its threads.

Each module with process-wide state registers a function that resets the state in a child. Functions are called in the
order of registration, which is the order of imports. A module can rely on the modules that it imports.
"""

import os
import traceback
from collections.abc import Callable

_in_child: list[Callable[[], object]] = []


def in_child(call: Callable[[], object]) -> None:
    """Register a function to call in every child that is forked from now on."""
    _in_child.append(call)


def _begin() -> None:
    for call in _in_child:
        try:
            call()
        except BaseException:  # such as Ctrl-C, which must not keep the others from their calls
            traceback.print_exc()


os.register_at_fork(after_in_child=_begin)
