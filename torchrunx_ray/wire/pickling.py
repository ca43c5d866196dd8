"""cloudpickle, with the types that it lacks."""

import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none

_cloudpickle: Any = cloudpickle


def dumps(value: object, buffers: Callable[[pickle.PickleBuffer], object] | None = None) -> bytes:
    """Pickle by cloudpickle; large buffers go to `buffers` instead of into the stream."""
    return _cloudpickle.dumps(value, protocol=5, buffer_callback=buffers)
