"""Private names of cloudpickle that this package uses. The import fails if a name is missing."""

import sys
from typing import Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

_NAMES = (
    "_DYNAMIC_CLASS_TRACKER_BY_CLASS",
    "_DYNAMIC_CLASS_TRACKER_BY_ID",
    "_DYNAMIC_CLASS_TRACKER_LOCK",
    "_class_setstate",
    "_code_reduce",
    "_find_imported_submodules",
    "_function_setstate",
    "_get_or_create_tracker_id",
    "_is_registered_pickle_by_value",
    "_lookup_class_or_track",
    "_lookup_module_and_qualname",
    "_make_function",
    "_make_skeleton_class",
    "_make_skeleton_enum",
)

of_cloudpickle: Any = vars(cloudpickle.cloudpickle)
"""The live namespace of cloudpickle: a worker replaces one name while it unpickles its call."""

if missing := ", ".join(name for name in _NAMES if name not in of_cloudpickle):
    raise ImportError(
        f"cloudpickle {cloudpickle.__version__} does not have {missing}, which torchrunx_ray needs; install "
        "cloudpickle>=3,<4 or a newer torchrunx-ray"
    )

_MADE_BY_A_CLASS_STATEMENT = 1 << 9
"""Py_TPFLAGS_HEAPTYPE, which built-in classes do not have."""


def goes_by_value(obj: object) -> bool:
    """Return True if cloudpickle pickles an object by value, because no other process could import it."""
    found = of_cloudpickle["_lookup_module_and_qualname"](obj)
    return found is None or of_cloudpickle["_is_registered_pickle_by_value"](found[0])


def is_of_the_script(kind: Any) -> bool:
    """Return True for a class that is pickled by value."""
    return bool(kind.__flags__ & _MADE_BY_A_CLASS_STATEMENT) and goes_by_value(kind)


def share_id(kind: type) -> None:
    """Register a class under the same id in cloudpickle and in Ray's copy of cloudpickle.

    Otherwise an object that came by `ray.put` would have another class than the function's objects.
    """
    theirs = cast("Any", sys.modules.get("ray.cloudpickle.cloudpickle"))
    if not hasattr(theirs, "_DYNAMIC_CLASS_TRACKER_BY_CLASS"):
        return
    tracker_id = theirs._DYNAMIC_CLASS_TRACKER_BY_CLASS.get(kind)
    if tracker_id is None:
        theirs._lookup_class_or_track(of_cloudpickle["_get_or_create_tracker_id"](kind), kind)
    elif kind not in of_cloudpickle["_DYNAMIC_CLASS_TRACKER_BY_CLASS"]:
        of_cloudpickle["_lookup_class_or_track"](tracker_id, kind)
