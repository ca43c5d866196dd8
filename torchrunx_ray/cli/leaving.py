"""The end of the command's process."""

import contextlib
import os
import sys
import threading
from typing import NoReturn

from torchrunx_ray.driver.background.own_lines import own_lines
from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.connection import untyped_ray

_FLUSH_S = 1.0


def leave(status: int) -> NoReturn:
    """Exit. A Ray of this process ends first; from another one, the end of the process is the sign to leave.

    Ray's own exit takes up to 0.9 s, and nobody waits for what it does.
    """
    if untyped_ray.is_initialized() and inventory.was_started_here():
        sys.exit(status)
    own_lines.wait_until_written()
    # In a thread: a pipe that nobody reads would hold the flush for ever.
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # None or closed, or a pipe whose reader has ended
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
