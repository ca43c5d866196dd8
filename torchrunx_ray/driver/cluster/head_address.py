"""A check of RAY_ADDRESS before Ray tries it. Ray tries for a long time, and ignores Ctrl-C meanwhile."""

import os
import re
import socket
import time

from torchrunx_ray.errors import LaunchError

_PATIENCE_S = 5.0
"""Time that a head may take to start."""

_PAUSE_S = 0.2

_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?(?P<host>[^/\[\]]+)\]?:(?P<port>\d{1,5})")
"""An address with a port, also for IPv6. Other values, such as "auto" and "local", are left to Ray."""


def check(given: str | None = None) -> None:
    """Raise LaunchError if the given address, or RAY_ADDRESS, is a host and a port where nobody listens."""
    address = given or os.environ.get("RAY_ADDRESS", "").strip()
    parts = _HOST_AND_PORT.fullmatch(address)
    if parts is None or int(parts["port"]) > 65535:
        return
    begun = time.monotonic()
    while (problem := _problem(parts["host"], int(parts["port"]))) is not None:
        if time.monotonic() - begun >= _PATIENCE_S:
            raise LaunchError(
                f"{'--address' if given else 'RAY_ADDRESS'}={address}: nobody answers there ({problem}). Is the head of "
                "the cluster running, is this its address, and can this machine reach the port? Without an address, a "
                "launch joins the Ray that runs on this machine, or starts one."
            )
        time.sleep(_PAUSE_S)


def _problem(host: str, port: int) -> str | None:
    try:
        # create_connection tries every address of the name.
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except (OSError, UnicodeError) as error:
        return str(error)
    return None
