"""A program in the place of a worker."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from torchrunx_ray.wire import messages
from torchrunx_ray.wire.channel import Channel

_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that a program would find ignored, as its parent did. `subprocess` resets them, too."""

_ready: tuple[Channel, Callable[[], None]] | None = None
"""The channel to the agent, and a function that flushes all buffers."""


def begin(channel: Channel, flush: Callable[[], None]) -> None:
    """Note what `become` needs."""
    global _ready
    _ready = channel, flush


def become(command: Sequence[str]) -> NoReturn:
    """Run a program in this process. Its exit is the worker's outcome. Raises OSError if there is no such program."""
    assert _ready is not None
    channel, flush = _ready
    found = shutil.which(command[0])
    if found is None:
        where = f"the worker's PATH is {os.environ.get('PATH', '')!r}"
        raise FileNotFoundError(f"{command[0]} is no program that can be run here; {where}")
    channel.send(messages.Replaced())
    # From the answer on the agent sends no signals but those that end the worker.
    channel.receive()
    flush()
    for each in _IGNORED_BY_PYTHON:
        signal.signal(each, signal.SIG_DFL)
    os.execve(found, list(command), os.environ)


def interpreter(path: str) -> str:
    """Return the driver's interpreter, or this host's if the driver's is not here."""
    return path if os.access(path, os.X_OK) else sys.executable
