"""Names for types that a script makes, such as a NewType, pickled as their parts."""

import sys
import typing
from typing import Any, cast

from torchrunx_ray.wire.by_value.private import of_cloudpickle


def is_type_name(kind: type) -> bool:
    """Return True for kinds of objects that pickle can only import from a module."""
    return kind in _PARAMETERS or kind is typing.NewType or _is_alias(kind)


def is_part_of_parameters(kind: type) -> bool:
    """Return True for `P.args` and `P.kwargs`, which have no name of their own."""
    return kind is typing.ParamSpecArgs or kind is typing.ParamSpecKwargs


def reduce_part_of_parameters(obj: Any) -> Any:
    return getattr, (obj.__origin__, "args" if type(obj) is typing.ParamSpecArgs else "kwargs")


def reduce_type_name(obj: Any) -> Any:
    """Return a reduce tuple for a type name that is pickled by value."""
    kind = cast("Any", type(obj))
    if _is_alias(kind):  # cannot be weakly referenced, so cloudpickle cannot track it by id
        return _alias, (kind, obj.__name__, obj.__value__, obj.__type_params__, obj.__module__)
    tracker_id = of_cloudpickle["_get_or_create_tracker_id"](obj)
    if kind is typing.NewType:
        qualname = obj.__qualname__
        return _new_type, (obj.__name__, qualname, obj.__supertype__, obj.__module__, tracker_id)
    options = {name: getattr(obj, f"__{name}__") for name in _PARAMETERS[kind]}
    constraints = getattr(obj, "__constraints__", ())
    make, newer = _with_newer_options(obj)
    parts = make, obj.__name__, constraints, options | newer, obj.__module__, tracker_id
    return _parameter, parts


def _with_newer_options(obj: Any) -> tuple[Any, dict[str, Any]]:
    """Return the constructor of a type parameter, and its options that are new in Python 3.12 and 3.13."""
    newer: dict[str, Any] = {}
    if getattr(obj, "__infer_variance__", False):
        newer["infer_variance"] = True
    if getattr(obj, "has_default", bool)():
        newer["default"] = obj.__default__
    # typing_extensions makes typing's own kinds with these options, on older versions of Python.
    made_by = sys.modules.get("typing_extensions", typing) if newer else typing
    return getattr(made_by, type(obj).__name__), newer


_PARAMETERS: dict[type, tuple[str, ...]] = {
    typing.TypeVar: ("bound", "covariant", "contravariant"),
    typing.ParamSpec: ("bound", "covariant", "contravariant"),
    typing.TypeVarTuple: (),
}
"""Kinds of type parameters, with their options."""


def _is_alias(kind: type) -> bool:
    is_of_typing = kind.__module__ in ("typing", "typing_extensions")
    return is_of_typing and kind.__name__ == "TypeAliasType"


def _parameter(
    make: Any, name: str, constraints: Any, options: Any, module: str, tracker_id: str
) -> Any:
    made = make(name, *constraints, **options)
    made.__module__ = module
    return of_cloudpickle["_lookup_class_or_track"](tracker_id, made)


def _new_type(name: str, qualname: str, supertype: Any, module: str, tracker_id: str) -> Any:
    make: Any = typing.NewType  # type checkers do not accept NewType with variables
    made = make(name, supertype)
    made.__qualname__ = qualname
    made.__module__ = module
    return of_cloudpickle["_lookup_class_or_track"](tracker_id, made)


def _alias(kind: Any, name: str, value: Any, parameters: Any, module: str) -> Any:
    """Make an alias. It takes its module from the globals of the code that makes it, hence `eval`."""
    parts = {"kind": kind, "name": name, "value": value, "parameters": parameters}
    return eval("kind(name, value, type_params=parameters)", {"__name__": module, **parts})
