"""Globals that functions name only in the bodies of classes."""

import dis
import inspect
import types
from collections.abc import Iterator

OPERATIONS = frozenset({"LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
"""Look a name up in a class's body first, then among the globals."""


def names_in_class_bodies(code: types.CodeType, *, is_in_body: bool = False) -> Iterator[str]:
    """Yield the names that bodies of classes look up. cloudpickle looks only for those of functions."""
    is_in_body = is_in_body or not code.co_flags & inspect.CO_OPTIMIZED
    if is_in_body:
        for instruction in dis.get_instructions(code):
            if instruction.opname in OPERATIONS:
                yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in_class_bodies(constant, is_in_body=is_in_body)
