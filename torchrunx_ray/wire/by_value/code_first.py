"""Order of unpickling: a class gets its methods, and the code that they use, before its objects are made.

Attributes of a class, and globals of its methods, may be objects of the same class. pickle would make these
objects while the class is still empty: with the hash of `object`, and without the class's `__setstate__`. So data
are deferred while the code of a class is pickled, and follow when the code is complete.
"""

import enum
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, cast

from torchrunx_ray.wire.by_value.private import is_of_the_script, of_cloudpickle

CODE, OTHER, OF_THE_SCRIPT = range(3)
"""Kinds of values, in the order in which they are unpickled."""

DESCRIPTOR, ATTRIBUTE, OUTSIDE = range(3)
"""Places of values of one kind, in the order in which they are unpickled.

Values outside a class come last: they may contain objects of the class, whose hash may need its attributes.
"""

_LOOKED_AT = 100
"""Parts of a container that are examined. Further parts are assumed to be similar."""

_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes})
_CONTAINERS = frozenset({tuple, list, dict, set, frozenset})
_CONTAINERS_OF_LIBRARIES = tuple, list, dict, set, frozenset, deque
_WITH_AN_EMPTY_ONE = _CONTAINERS | {OrderedDict, defaultdict, deque, Counter}

_WAYS_OF_OBJECT = object.__reduce__, object.__reduce_ex__


class Step:
    """A function call that runs when this object is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class PutOff(NamedTuple):
    """Data that are deferred until the code is complete."""

    rank: int
    place: int
    step: Step


class Order:
    """Data that a pickler has deferred while it pickles the code of classes.

    The code of a class may refer to other classes, whose code is complete first. Their data come first as well:
    the data of the outer class may be made with the deferred data of the inner class.
    """

    def __init__(self) -> None:
        self._of_classes_in_code: list[list[PutOff]] = []
        """A list for each class whose code is being pickled, the innermost last."""
        self._of_whole_classes: list[PutOff] = []

    @property
    def is_in_code(self) -> bool:
        return bool(self._of_classes_in_code)

    def begin(self) -> None:
        """Begin to defer data for a class whose code is pickled next."""
        self._of_classes_in_code.append([])

    def end(self) -> list[Step]:
        """Declare the innermost class's code complete. If it was the last such class, return the steps for the data.

        Steps whose data may contain objects of the script's classes come last.
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
        """Defer the data among named parts; return the code, and stand-ins for the script's objects.

        A `__new__` may look these objects up before they arrive. A stand-in is None or an empty container, which most
        often was there in the script before the objects. A descriptor gets no stand-in, because it was there before
        all objects.
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
    """Return True if a part is, or contains, a member of the script's enums.

    A member alone is found by its name, but its hash may need all of its attributes.
    """
    if type(part) is tuple:
        return any(map(_has_members, cast("tuple[object, ...]", part)))
    return isinstance(part, enum.Enum) and is_of_the_script(type(part))


def _attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes pickled with a library's object; none if its class has its own way of pickling."""
    kind = cast("Any", type(value))
    ways = kind.__reduce__, kind.__reduce_ex__
    if kind is not types.SimpleNamespace and ways != _WAYS_OF_OBJECT:
        return {}
    attributes = getattr(value, "__dict__", None)
    return cast("dict[str, Any]", attributes) if isinstance(attributes, dict) else {}


def of_function(function: Any, reduced: Any, order: Order) -> Any:
    """Defer a function's data, if a class's code is being pickled."""
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
    """Return a reduce tuple that sets a class's attributes in steps, and unpickles `needs` with them."""
    make, arguments, (attributes, _), *_ = reduced
    state = Code(order, kind, attributes, (set_class_state, needs)), Data(order)
    return make, arguments, state, None, None, keep


@dataclass(eq=False)
class Code:
    """The code of a class, set by a call of `first`; `last` is a further step for its data. `Data` comes next."""

    order: Order
    kind: type
    attributes: dict[str, Any]
    first: tuple[Any, ...]
    last: Step | None = None

    def __reduce__(self) -> Any:
        self.order.begin()
        code, stand_ins = self.order.divide(self.attributes, self._later, ATTRIBUTE)
        if self.last is not None:
            self.order.put_off(OF_THE_SCRIPT, self.last, ATTRIBUTE)
        function, *arguments = self.first
        return function, (self.kind, *arguments, code | stand_ins)

    def _later(self, name: str, value: object) -> Step:
        return Step(set_class_state, self.kind, None, {name: value})


class Data:
    """The data of a class. Inside another class's code, they wait until that code is complete."""

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
    """Do nothing in place of a state setter: the steps have already set the state."""
