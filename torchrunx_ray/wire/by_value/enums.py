"""Enums pickled by value, whose members arrive as their class's own code made them.

cloudpickle makes members again from their values, without that code.
"""

import enum
import types
from dataclasses import dataclass
from typing import Any, cast

from torchrunx_ray.wire.by_value import code_first, skeletons
from torchrunx_ray.wire.by_value.private import of_cloudpickle
from torchrunx_ray.wire.by_value.unfit import UnfitError

_CREATION = ("__new__", "__init__", "__new_member__", "_new_member_", "_use_args_")
"""Attributes of an enum that control how members are made."""

_SET_BY_ENUM = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_"})
"""Attributes of a member that the enum module sets."""


@dataclass(frozen=True, eq=False)
class Member:
    """A member's value, and the arguments from which its data type makes the data."""

    value: Any
    data: tuple[Any, ...]


def is_found_by_name(obj: object) -> bool:
    """Return True for a member that has a name, and whose class does not define its own way of pickling.

    enum itself looks members up by value, but a value such as a function may equal no other after pickling.
    """
    kind: Any = type(obj)
    if not isinstance(obj, enum.Enum) or kind.__reduce_ex__ is not enum.Enum.__reduce_ex__:
        return False
    return kind._member_map_.get(obj._name_) is obj


def member_named(kind: Any, name: str) -> Any:
    return kind._member_map_[name]


def reduce_enum(kind: Any, reduced: Any, order: code_first.Order) -> Any:
    """Return a reduce tuple for an enum: cloudpickle's, with the full state of the members."""
    _, (bases, name, *_, tracker_id, extra), (attributes, _), *_ = reduced
    members: dict[str, Any] = dict(kind.__members__)
    made_by = _maker_of_data(kind._member_type_)
    described: dict[str, Any] = {"__new__": new_member, "__init__": leave_as_it_is}
    for each, member in members.items():
        described[each] = Member(member._value_, _data_of(kind, made_by, member))
    others = {key: part for key, part in attributes.items() if key not in {*members, *_CREATION}}
    creation: dict[str, Any] = {key: vars(kind)[key] for key in _CREATION if key in vars(kind)}
    of_members = {name: _state_of(member) for name, member in members.items()}
    code = code_first.Code(
        order,
        kind,
        others,
        first=(set_class_state_of_enum, creation),
        last=code_first.Step(set_members, kind, of_members, _further_values(kind)),
    )
    names = (kind.__module__, kind.__qualname__)
    arguments = (cast("Any", type(kind)), name, bases, described, names, tracker_id, extra)
    state = code, code_first.Data(order)
    return make_enum, arguments, state, None, None, code_first.keep


def make_enum(
    metaclass: Any,
    name: str,
    bases: tuple[type, ...],
    members: dict[str, Any],
    names: tuple[str, str],
    tracker_id: str,
    _extra: Any,
) -> Any:
    """Make an enum as cloudpickle does, but with the enum's own metaclass."""
    namespace = skeletons.of_a_library(metaclass, "__prepare__")(name, bases)
    for each, member in members.items():
        namespace[each] = member
    made: Any = skeletons.make_as_a_library(metaclass, name, bases, namespace)
    made.__module__, made.__qualname__ = names
    return of_cloudpickle["_lookup_class_or_track"](tracker_id, made)


def new_member(kind: Any, described: Any) -> Any:
    """Make a member in place of the class's own `__new__`."""
    if isinstance(described, tuple):  # enum wraps it if the data type is tuple
        (described,) = cast("tuple[Member]", described)
    member = _maker_of_data(kind._member_type_).__new__(kind, *described.data)
    member._value_ = described.value
    return member


def leave_as_it_is(member: object, described: object) -> None:
    """Do nothing in place of the class's own `__init__`: the member's attributes are set later."""


def set_class_state_of_enum(
    kind: Any, creation: dict[str, Any], attributes: dict[str, Any]
) -> None:
    for name in _CREATION:
        if name in creation:
            setattr(kind, name, creation[name])
        elif name in vars(kind):
            delattr(kind, name)
    code_first.set_class_state(kind, None, attributes)


def set_members(kind: Any, of_members: dict[str, Any], values: list[tuple[Any, str]]) -> None:
    """Set the attributes of members, and the further values that map to members."""
    for name, (attributes, slots) in of_members.items():
        member = kind.__members__[name]
        member.__dict__.update(attributes)
        for slot, part in slots.items():
            object.__setattr__(member, slot, part)
    for value, name in values:
        kind._value2member_map_.setdefault(value, kind.__members__[name])


def _maker_of_data(data_type: type) -> Any:
    """Return the class in C whose `__new__` makes the data; `object` if the data type is only Python."""
    return next(
        each
        for each in data_type.__mro__
        if isinstance(vars(each).get("__new__"), types.BuiltinFunctionType)
    )


def _data_of(kind: Any, made_by: Any, member: Any) -> tuple[Any, ...]:
    if made_by is object:
        return ()
    if "__getnewargs__" in vars(made_by):
        return made_by.__getnewargs__(member)
    if "__reduce__" in vars(made_by) and "__init__" not in vars(made_by):
        return made_by.__reduce__(member)[1]
    raise UnfitError(
        f"the members of the enum {kind.__qualname__} are of the type {made_by.__qualname__}, which cannot be "
        f"recreated without {kind.__qualname__}'s own code; put {kind.__qualname__} into a module beside the "
        "script, and import it"
    )


def _state_of(member: enum.Enum) -> tuple[dict[str, Any], dict[str, Any]]:
    state = cast("Any", object.__getstate__(member))
    attributes, slots = cast("Any", state if type(state) is tuple else (state, {}))
    return {name: part for name, part in attributes.items() if name not in _SET_BY_ENUM}, slots


def _further_values(kind: Any) -> list[tuple[Any, str]]:
    """Return the further values, with member names, that the class's `__new__` has put into the map of values."""
    return [
        (value, member.name)
        for value, member in kind._value2member_map_.items()
        if value != member._value_ and kind.__members__.get(member._name_) is member
    ]
