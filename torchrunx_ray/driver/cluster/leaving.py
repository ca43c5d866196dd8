"""A driver's way out of Ray.

While Ray takes down its part of this process, another thread that calls it, or only frees one of its references, ends
the process without a word.
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
"""Time for Ray to be taken down. Ctrl-C in ray.shutdown() may leave it half done for ever."""

_taken_down_since: float | None = None

_CALLS_S = 3.0
"""Time for calls that are under way when the script has ended; most take a second at most."""

_STEP_S = 0.01

_has_begun = threading.Event()

_under_way = 0
_one_less = threading.Condition()


def has_begun() -> bool:
    """Return True once the script has ended: Ray's own exit function comes next."""
    return _has_begun.is_set()


@contextlib.contextmanager
def calling() -> Generator[None]:
    """Have the interpreter's end wait for a call of Ray's that is made within, for some seconds."""
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
    """Wait while Ray is taken down in another thread: by ray.shutdown(), or when the script has ended.

    This blocks the thread of all runs, so that nothing is freed there meanwhile. Every run ends with Ray anyway.
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
    """Wait for calls under way, before Ray's own exit function, which was registered earlier."""
    _has_begun.set()
    with _one_less:
        _one_less.wait_for(lambda: _under_way == 0, _CALLS_S)


def _forget() -> None:
    """A forked child has none of the threads."""
    global _under_way, _one_less
    _under_way, _one_less = 0, threading.Condition()


atexit.register(_leave)
in_child(_forget)
