"""A bound that only a hang passes, whatever else the machine does meanwhile.

How long things take is measured by tests that run alone, and by benchmarks.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

E = TypeVar("E", bound=BaseException)

SOON_S = 12.0
"""Ray by itself notices the end of a node after 15 s at the earliest."""


@contextlib.contextmanager
def soon(within_s: float = SOON_S) -> Iterator[None]:
    """Fail if what is done within takes longer."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < within_s


def raised_soon(
    error: type[E] | tuple[type[E], ...], call: Callable[..., object], *args: object
) -> pytest.ExceptionInfo[E]:
    with soon(), pytest.raises(error) as caught:
        call(*args)
    return caught
