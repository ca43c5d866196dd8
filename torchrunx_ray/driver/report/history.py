"""Attempts of a run, for the user."""

from dataclasses import dataclass
from typing import Literal

Why = Literal["returned", "failed", "host lost", "resized", "drained", "stopped"]
"""Reasons for which an attempt ended. "host lost": a failure that began with the loss of a host."""


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt of a run."""

    number: int
    hostnames: tuple[str, ...]
    world_size: int
    begun: float
    """Time at which the attempt began, in seconds since the epoch, as in the next field."""
    ended: float
    why: Why
    """Reason why the attempt ended."""
    failure: str | None
    """First failure, in one line."""
