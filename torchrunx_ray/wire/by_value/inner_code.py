"""Globals and submodules used by annotations and by inner functions and classes, which cloudpickle misses."""

import contextlib
import dis
import importlib
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from torchrunx_ray.wire.by_value import annotations
from torchrunx_ray.wire.by_value.code_first import Step
from torchrunx_ray.wire.by_value.private import of_cloudpickle

OPERATIONS = frozenset({"LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
"""Instructions that look a name up in a class's body first, then among the globals."""

_WHAT_MODULES_RAISE = Exception, SystemExit
"""Exceptions that an import may raise. A script may call sys.exit when it is imported without its arguments."""


def with_needs(function: Any, reduced: Any, can_be_pickled: Callable[[object], bool]) -> Any:
    """Add globals that only annotations or class bodies name, and submodules used by annotations and inner code."""
    _, _, (_, slots), *_ = reduced
    _, *inner = annotations.with_inner(function.__code__)
    if inner:
        there = function.__globals__
        names = _names_in_class_bodies(function.__code__)
        slots["__globals__"] |= {name: there[name] for name in names if name in there}
        slots["_cloudpickle_submodules"] += _submodules(inner, slots["__globals__"].values())
    if said := annotations.code_of(function):
        _add_needs_of_annotations(function, said, slots, can_be_pickled)
    return reduced


def _add_needs_of_annotations(
    function: Any,
    said: Iterable[types.CodeType],
    slots: dict[str, Any],
    can_be_pickled: Callable[[object], bool],
) -> None:
    """Add the globals of annotations. Skip those that cannot be pickled or imported, so that no call fails for them."""
    there = function.__globals__
    named = {name: there[name] for name in annotations.names_in(said) if name in there}
    submodules: list[object] = slots["_cloudpickle_submodules"]
    submodules += [Step(_import, module.__name__) for module in _submodules(said, named.values())]
    for name in [name for name in named if name not in slots["__globals__"]]:
        if place := _place_of(named[name]):
            submodules.append(Step(_import_global, function, name, *place))
        elif can_be_pickled(named[name]):
            slots["__globals__"][name] = named[name]


def _submodules(codes: Iterable[types.CodeType], packages: Iterable[object]) -> Any:
    names = types.SimpleNamespace(co_names=[name for code in codes for name in code.co_names])
    return of_cloudpickle["_find_imported_submodules"](names, packages)


def _place_of(value: Any) -> tuple[str, str] | None:
    """Return the module from which another process can import a value, and its name there; empty for a module."""
    found: Any = None
    kind = cast("Any", type(value))
    if issubclass(kind, types.ModuleType):
        found = (value, "") if sys.modules.get(value.__name__) is value else None
    elif issubclass(kind, type | types.FunctionType | types.BuiltinFunctionType):
        found = of_cloudpickle["_lookup_module_and_qualname"](value)
    if found is None or of_cloudpickle["_is_registered_pickle_by_value"](found[0]):
        return None
    return found[0].__name__, found[1]


def _import_global(function: Any, name: str, module_name: str, name_there: str) -> None:
    with contextlib.suppress(*_WHAT_MODULES_RAISE):
        found: Any = importlib.import_module(module_name)
        function.__globals__[name] = operator.attrgetter(name_there)(found) if name_there else found


def _import(module_name: str) -> None:
    with contextlib.suppress(*_WHAT_MODULES_RAISE):
        importlib.import_module(module_name)


def _names_in_class_bodies(code: types.CodeType, *, is_in_body: bool = False) -> Iterator[str]:
    """Yield the names that class bodies look up, which cloudpickle misses: it examines only functions."""
    is_in_body = is_in_body or not code.co_flags & inspect.CO_OPTIMIZED
    if is_in_body:
        for instruction in dis.get_instructions(code):
            if instruction.opname in OPERATIONS:
                yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in_class_bodies(constant, is_in_body=is_in_body)
