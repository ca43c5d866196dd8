"""Private names of cloudpickle that this package uses."""

import sys
from typing import Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

_cloudpickle: Any = vars(cloudpickle.cloudpickle)

_is_registered: Any = _cloudpickle.get("_is_registered_pickle_by_value", lambda _module: False)  # pyright: ignore[reportUnknownLambdaType]
"""Tells whether a module was given to cloudpickle.register_pickle_by_value."""

_MADE_BY_A_CLASS_STATEMENT = 1 << 9
"""Py_TPFLAGS_HEAPTYPE, which no class has that is built in."""


def goes_by_value(obj: object) -> bool:
    """Return True for what is in no module that another process could import, as cloudpickle decides it."""
    found = _cloudpickle["_lookup_module_and_qualname"](obj)
    return found is None or _is_registered(found[0])


def is_of_the_script(kind: Any) -> bool:
    """Return True for classes that travel by value."""
    return bool(kind.__flags__ & _MADE_BY_A_CLASS_STATEMENT) and goes_by_value(kind)


def share_id(kind: type) -> None:
    """Have a class found by one id, whether it travels by cloudpickle or by Ray's copy of it.

    What came by `ray.put` would otherwise be of another class than the function's own.
    """
    theirs = cast("Any", sys.modules.get("ray.cloudpickle.cloudpickle"))
    if not hasattr(theirs, "_DYNAMIC_CLASS_TRACKER_BY_CLASS"):
        return
    tracker_id = theirs._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(kind)
    if tracker_id is None:
        theirs._lookup_class_or_track(_cloudpickle["_get_or_create_tracker_id"](kind), kind)
    elif kind not in _cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_CLASS"]:
        _cloudpickle["_lookup_class_or_track"](tracker_id, kind)
