"""Needs of annotations, and of functions and classes inside a function, that cloudpickle does not see."""

import dis
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torchrunx_ray.wire import annotations
from torchrunx_ray.wire.private import of_cloudpickle

OPERATIONS = frozenset({"LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
"""Look a name up in a class's body first, then among the globals."""


def with_needs(function: Any, reduced: Any) -> Any:
    """Add globals that only annotations or bodies of classes name, and submodules that only they use."""
    said = annotations.code_of(function)
    inner = [*_inner_code(function.__code__), *said]
    if not inner:
        return reduced
    make, arguments, (attributes, slots), *rest = reduced
    named = [*_names_in_class_bodies(function.__code__), *annotations.names_in(said)]
    there = function.__globals__
    needed = slots["__globals__"] | {name: there[name] for name in named if name in there}
    all_names = types.SimpleNamespace(co_names=[name for code in inner for name in code.co_names])
    modules = of_cloudpickle["_find_imported_submodules"](all_names, needed.values())
    submodules = [*slots["_cloudpickle_submodules"], *modules]
    slots |= {"__globals__": needed, "_cloudpickle_submodules": submodules}
    return make, arguments, (attributes, slots), *rest


def _names_in_class_bodies(code: types.CodeType, *, is_in_body: bool = False) -> Iterator[str]:
    """Yield the names that bodies of classes look up. cloudpickle looks only for those of functions."""
    is_in_body = is_in_body or not code.co_flags & inspect.CO_OPTIMIZED
    if is_in_body:
        for instruction in dis.get_instructions(code):
            if instruction.opname in OPERATIONS:
                yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in_class_bodies(constant, is_in_body=is_in_body)


def _inner_code(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of all functions and classes within."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _inner_code(constant)
