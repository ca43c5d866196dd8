"""Safe shutdown of Ray in the driver.

While Ray shuts down in this process, another thread must neither call Ray nor free one of its references. Otherwise
the process ends without a message.
"""

import atexit
import contextlib
import threading
import time
from collections.abc import Generator
from typing import Any

import ray

from torchrunx_ray.driver.background.forks import in_child

_untyped_ray: Any = ray

_LONGEST_S = 10.0
"""Limit of the wait for Ray's shutdown, since Ctrl-C in ray.shutdown() may leave it incomplete."""

_taken_down_since: float | None = None

_CALLS_S = 3.0
"""Time for calls that are under way when the script has ended. Most take less than a second."""

_STEP_S = 0.01

_has_begun = threading.Event()

_under_way = 0
_one_less = threading.Condition()


def has_begun() -> bool:
    """Return True once the script has ended. Ray's own exit function is called next."""
    return _has_begun.is_set()


@contextlib.contextmanager
def calling() -> Generator[None]:
    """Make the interpreter's exit wait, for some seconds, for a call to Ray inside this context."""
    global _under_way
    with _one_less:
        _under_way += 1
    try:
        yield
    finally:
        with _one_less:
            _under_way -= 1
            _one_less.notify_all()


def wait_until_over() -> None:
    """Wait while another thread shuts Ray down, by ray.shutdown() or when the script has ended.

    This blocks the thread of all runs, so that no reference is freed there. Every run ends with Ray anyway.
    """
    global _taken_down_since
    worker = _untyped_ray._private.worker.global_worker
    while hasattr(worker, "core_worker") and not worker.connected:
        now = time.monotonic()
        if _taken_down_since is None:
            _taken_down_since = now
        if now - _taken_down_since > _LONGEST_S:
            return
        time.sleep(_STEP_S)
    _taken_down_since = None


def _leave() -> None:
    """Wait for calls under way. Ray's own exit function, which was registered earlier, is called later."""
    _has_begun.set()
    with _one_less:
        _one_less.wait_for(lambda: _under_way == 0, _CALLS_S)


def _forget() -> None:
    """Reset the state in a forked child, which has none of the threads."""
    global _under_way, _one_less
    _under_way, _one_less = 0, threading.Condition()


atexit.register(_leave)
in_child(_forget)
