"""Warnings about waiting launches: one every 10 s for all launches of this driver."""

import time
from enum import Enum, auto

from torchrunx_ray.driver.background.forks import empty_in_child

EVERY_S = 10.0

_NAMES_SHOWN = 4


class For(Enum):
    """Reasons for which a launch waits."""

    ROOM = auto()
    RETURN = auto()
    """The launch waits for nodes that left the cluster to come back."""


_waiting: dict[str, For] = {}
"""Waiting launches by name."""

_last: dict[For, float] = {}
"""Time of the last warning of each kind."""


def is_due(name: str, what: For) -> bool:
    """Note that the launch waits. Returns True if it should log the warning for all waiting launches."""
    is_first = what not in _waiting.values()
    _waiting[name] = what
    if not is_first and time.monotonic() - _last[what] < EVERY_S:
        return False
    _last[what] = time.monotonic()
    return True


def others_than(name: str) -> str:
    """Return the names of the other waiting launches, as the end of a sentence."""
    names = [waiting for waiting in _waiting if waiting != name]
    if not names:
        return ""
    shown = ", ".join([*names[:_NAMES_SHOWN], *(["..."] if names[_NAMES_SHOWN:] else [])])
    if len(names) == 1:
        return f"; 1 more launch of this driver waits: {shown}"
    return f"; {len(names)} more launches of this driver wait: {shown}"


def forget(name: str) -> None:
    """Note that the launch no longer waits."""
    _waiting.pop(name, None)


# A forked child has none of its parent's launches.
empty_in_child(_waiting)
