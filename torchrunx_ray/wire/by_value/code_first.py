"""Code before data: a class has its methods, and the code that these use, before objects of it are made.

Attributes of a class, and the globals of its methods, may be objects of this very class. pickle would make them
while the class is empty: hashed as `object` does, and without the class's `__setstate__`. So data are put off
while the code of a class is pickled, and follow when that code is whole.
"""

import enum
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import chain, islice
from typing import Any, NamedTuple, cast

from torchrunx_ray.wire.by_value.private import is_of_the_script, of_cloudpickle

CODE, OTHER, OF_THE_SCRIPT = range(3)
"""Kinds of values, in the order in which they come."""

DESCRIPTOR, ATTRIBUTE, OUTSIDE = range(3)
"""Places of values of one kind, in the order in which they come.

What is outside a class may have objects of it, which are hashed as the attributes say.
"""

_LOOKED_AT = 100
"""Parts of a container that are looked at. Further ones are taken to be alike."""

_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes})
_CONTAINERS = frozenset({tuple, list, dict, set, frozenset})
_CONTAINERS_OF_LIBRARIES = tuple, list, dict, set, frozenset, deque
_WITH_AN_EMPTY_ONE = _CONTAINERS | {OrderedDict, defaultdict, deque, Counter}

_WAYS_OF_OBJECT = object.__reduce__, object.__reduce_ex__


class Step:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class PutOff(NamedTuple):
    """Data that come when the code is whole."""

    rank: int
    place: int
    step: Step


class Order:
    """Data that one pickler has put off, while it pickles the code of classes.

    The code of one class reaches other classes, whose code is whole first. So their data come first, too: the
    data of the class around them may be made by what the inner class puts off.
    """

    def __init__(self) -> None:
        self._of_classes_in_code: list[list[PutOff]] = []
        """Lists of the classes whose code is being pickled, the innermost last."""
        self._of_whole_classes: list[PutOff] = []

    @property
    def is_in_code(self) -> bool:
        return bool(self._of_classes_in_code)

    def begin(self) -> None:
        """Put data off, for a class whose code comes now."""
        self._of_classes_in_code.append([])

    def end(self) -> list[Step]:
        """Declare the innermost class's code whole. Return the steps that bring the data, if it was the last.

        Last come those that may have objects of the script's classes.
        """
        self._of_whole_classes += self._of_classes_in_code.pop()
        if self.is_in_code:
            return []
        put_off, self._of_whole_classes = self._of_whole_classes, []
        return [each.step for each in sorted(put_off, key=lambda each: (each.rank, each.place))]

    def put_off(self, rank: int, step: Step, place: int = OUTSIDE) -> None:
        self._of_classes_in_code[-1].append(PutOff(rank, place, step))

    def divide(
        self, parts: dict[str, Any], later: Callable[[str, Any], Step], place: int = OUTSIDE
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the data among named parts off; return the code, and what stands for the script's objects.

        Until these come, a `__new__` may look for them. Before them was None there, most often, or an empty
        container. Nothing stands for a descriptor: it was there before all objects.
        """
        code: dict[str, Any] = {}
        stand_ins: dict[str, Any] = {}
        for name, value in parts.items():
            rank = rank_of(value)
            if rank == CODE:
                code[name] = value
                continue
            is_descriptor = place == ATTRIBUTE and hasattr(cast("Any", type(value)), "__get__")
            self.put_off(rank, later(name, value), DESCRIPTOR if is_descriptor else place)
            if rank == OF_THE_SCRIPT and not is_descriptor:
                stand_ins[name] = type(value)() if type(value) in _WITH_AN_EMPTY_ONE else None
        return code, stand_ins


def rank_of(value: object, depth: int = 3) -> int:
    kind = cast("Any", type(value))
    if kind in _SIMPLE or isinstance(value, type | types.ModuleType):
        return CODE
    if kind in _CONTAINERS:
        return _rank_of_container(value, depth)
    if is_of_the_script(kind) and not isinstance(value, enum.Enum):
        return OF_THE_SCRIPT
    if isinstance(value, _CONTAINERS_OF_LIBRARIES):
        return max(OTHER, _rank_of_container(value, depth))
    if hasattr(kind, "__get__") or kind is types.BuiltinFunctionType:
        return CODE
    return max(OTHER, _rank_of_container(_attributes_of(value), depth))


def _rank_of_container(value: Any, depth: int) -> int:
    if depth == 0:
        return OTHER
    if _hashes(value) and any(_has_members(each) for each in islice(value, _LOOKED_AT)):
        return OF_THE_SCRIPT
    is_mapping = isinstance(value, dict)
    parts: Any = chain.from_iterable(cast("Any", value).items()) if is_mapping else value
    return max((rank_of(each, depth - 1) for each in islice(parts, _LOOKED_AT)), default=CODE)


def _hashes(container: object) -> bool:
    return isinstance(container, dict | set | frozenset)


def _has_members(part: object) -> bool:
    """Return True for members of the script's enums. By itself one is found by name; a hash may need all of it."""
    if type(part) is tuple:
        return any(map(_has_members, cast("tuple[object, ...]", part)))
    return isinstance(part, enum.Enum) and is_of_the_script(type(part))


def _attributes_of(value: Any) -> dict[str, Any]:
    """Return what is pickled with an object of a library, unless the library does it in a way of its own."""
    kind = cast("Any", type(value))
    ways = kind.__reduce__, kind.__reduce_ex__
    if kind is not types.SimpleNamespace and ways != _WAYS_OF_OBJECT:
        return {}
    attributes = getattr(value, "__dict__", None)
    return cast("dict[str, Any]", attributes) if isinstance(attributes, dict) else {}


def of_function(function: Any, reduced: Any, order: Order) -> Any:
    """Put off what a function has beside code, if a class's code is being pickled."""
    if not order.is_in_code:
        return reduced
    make, arguments, (attributes, slots, *others), *rest = reduced
    attributes, _ = order.divide(attributes, lambda name, part: Step(setattr, function, name, part))
    submodules, there = slots.pop("_cloudpickle_submodules"), slots.pop("__globals__")
    slots, _ = order.divide(slots, lambda name, part: Step(setattr, function, name, part))
    there, stand_ins = order.divide(
        there, lambda name, part: Step(set_global, function, name, part)
    )
    submodules += [Step(set_global_if_new, function, *part) for part in stand_ins.items()]
    slots |= {"__globals__": there, "_cloudpickle_submodules": submodules}
    return make, arguments, (attributes, slots, *others), *rest


def of_class(kind: type, reduced: Any, order: Order, needs: object) -> Any:
    """Bring the attributes of a class in steps. What the class needs beside them is unpickled with these."""
    make, arguments, (attributes, _), *_ = reduced
    return (
        make,
        arguments,
        steps(order, kind, attributes, (set_class_state, needs)),
        None,
        None,
        keep,
    )


def steps(
    order: Order,
    kind: type,
    attributes: dict[str, Any],
    first: tuple[Any, ...],
    last: Step | None = None,
) -> Any:
    """Return a class's state: its code, by a call of `first`, then data, those of `last` included."""
    return _Code(order, kind, attributes, first, last), _Data(order)


class _Code:
    def __init__(
        self,
        order: Order,
        kind: type,
        attributes: dict[str, Any],
        first: tuple[Any, ...],
        last: Step | None,
    ) -> None:
        self._order, self._kind, self._attributes = order, kind, attributes
        self._first, self._last = first, last

    def __reduce__(self) -> Any:
        self._order.begin()
        code, stand_ins = self._order.divide(self._attributes, self._later, ATTRIBUTE)
        if self._last is not None:
            self._order.put_off(OF_THE_SCRIPT, self._last, ATTRIBUTE)
        function, *arguments = self._first
        return function, (self._kind, *arguments, code | stand_ins)

    def _later(self, name: str, value: object) -> Step:
        return Step(set_class_state, self._kind, None, {name: value})


class _Data:
    """The data of a class. Within another class's code they wait for that class's."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __reduce__(self) -> Any:
        return list, (self._order.end(),)


def set_class_state(kind: Any, _needs: object, attributes: dict[str, Any]) -> None:
    of_cloudpickle["_class_setstate"](kind, (attributes, {}))


def set_global_if_new(function: Any, name: str, stand_in: object) -> None:
    function.__globals__.setdefault(name, stand_in)


def set_global(function: Any, name: str, value: object) -> None:
    function.__globals__[name] = value


def keep(kind: type, state: object) -> None:
    """Stand for a class's own way to take its state: the steps have done it."""
