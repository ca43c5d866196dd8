"""The end of the command's process."""

import contextlib
import os
import sys
from typing import NoReturn

from torchrunx_ray.driver.background.own_lines import own_lines
from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.connection import untyped_ray


def leave(status: int) -> NoReturn:
    """Exit. A Ray of this process ends first; from another one, the end of the process is the sign to leave.

    Ray's own exit takes up to 0.9 s, and nobody waits for what it does.
    """
    if untyped_ray.is_initialized() and inventory.was_started_here():
        sys.exit(status)
    own_lines.wait_until_written()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(status)
