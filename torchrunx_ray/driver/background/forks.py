"""Forked children of the driver: they have its state, but none of its threads.

Each module that keeps state for the whole process says here what a child does with the state. The calls are made in
the order in which the modules were imported, so a module can rely on those that it imports.
"""

import os
from collections.abc import Callable

_in_child: list[Callable[[], object]] = []


def in_child(call: Callable[[], object]) -> None:
    """Call it in every child that is forked from now on."""
    _in_child.append(call)


def _begin() -> None:
    for call in _in_child:
        call()


os.register_at_fork(after_in_child=_begin)
