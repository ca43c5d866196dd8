"""Hooks for forked children of the driver, which have its state but none of its threads.

Each module with process-wide state registers a function that resets the state in a child. Functions are called in the
order of registration, which is the order of imports. A module can rely on the modules that it imports.

A child must not drop what it has inherited. Ray would hear of the end of a reference on the parent's own connection,
which then is of no more use: the parent would wait for ever for the next answer.
"""

import gc
import os
import traceback
from collections.abc import Callable
from typing import Any

_in_child: list[Callable[[], object]] = []

_inherited: list[object] = []
"""State of the parent, for as long as this child lives."""


def in_child(reset: Callable[[], object]) -> None:
    """Register a function to call in every child that is forked from now on. It returns what it has inherited."""
    _in_child.append(reset)


def empty_in_child(state: set[Any] | dict[Any, Any]) -> None:
    """Empty a set or a dict in every child that is forked from now on."""

    def empty() -> object:
        inherited = state.copy()
        state.clear()
        return inherited

    in_child(empty)


def _begin() -> None:
    gc.freeze()  # garbage of the parent may hold references to Ray, too
    for reset in _in_child:
        try:
            _inherited.append(reset())
        except BaseException:  # such as Ctrl-C, which must not keep the others from their calls
            traceback.print_exc()


os.register_at_fork(after_in_child=_begin)
