"""A look at RAY_ADDRESS before Ray tries it: Ray tries for long, and hears no Ctrl-C meanwhile."""

import os
import re
import socket
import time

from torchrunx_ray.errors import LaunchError

_PATIENCE_S = 5.0
"""Time that a head may take to start."""

_PAUSE_S = 0.2

_HOST_AND_PORT = re.compile(r"\[?(?P<host>[^/\[\]]+)\]?:(?P<port>\d{1,5})")
"""Also of IPv6. Others are ray://, "auto" and "local", which lead to no head, or Ray's to judge."""


def check() -> None:
    """Raise LaunchError if RAY_ADDRESS is a host and a port, and nobody listens there."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    parts = _HOST_AND_PORT.fullmatch(address)
    if parts is None or int(parts["port"]) > 65535:
        return
    begun = time.monotonic()
    while (problem := _problem(parts["host"], int(parts["port"]))) is not None:
        if time.monotonic() - begun >= _PATIENCE_S:
            raise LaunchError(
                f"RAY_ADDRESS={address}: nobody answers there ({problem}). Does the head of the cluster run, is this "
                "its address, and can this machine reach the port? Without RAY_ADDRESS a launch joins the "
                "Ray that runs on this machine, or starts one."
            )
        time.sleep(_PAUSE_S)


def _problem(host: str, port: int) -> str | None:
    try:
        # Every address of the name is tried.
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except (OSError, UnicodeError) as error:
        return str(error)
    return None
