"""Private names of cloudpickle that this package uses."""

from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

_cloudpickle: Any = vars(cloudpickle.cloudpickle)

_is_registered: Any = _cloudpickle.get("_is_registered_pickle_by_value", lambda _module: False)  # pyright: ignore[reportUnknownLambdaType]
"""Tells whether a module was given to cloudpickle.register_pickle_by_value."""


def goes_by_value(obj: object) -> bool:
    """Return True for what is in no module that another process could import, as cloudpickle decides it."""
    found = _cloudpickle["_lookup_module_and_qualname"](obj)
    return found is None or _is_registered(found[0])
