"""Times that tests hold a launch to, on machines that may be busy with something else."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import ray

E = TypeVar("E", bound=BaseException)

_THROUGH_CLIENT = 5
"""How much longer a launch may take through ray://, where each of its calls passes two more processes."""

_ATTEMPTS = 3
"""A regression is slow each time; a neighbour on the machine seldom is that often."""


def raised_soon(
    error: type[E] | tuple[type[E], ...],
    within_s: float,
    call: Callable[..., object],
    *args: object,
) -> pytest.ExceptionInfo[E]:
    """What the call raises, at one of some attempts within this time."""
    untyped_ray: Any = ray
    if untyped_ray.util.client.ray.is_connected():
        within_s *= _THROUGH_CLIENT
    took_s: list[float] = []
    while len(took_s) < _ATTEMPTS:
        begun = time.monotonic()
        with pytest.raises(error) as caught:
            call(*args)
        took_s.append(time.monotonic() - begun)
        if took_s[-1] < within_s:
            return caught
    pytest.fail(f"it took {took_s} s, each time longer than {within_s} s")
