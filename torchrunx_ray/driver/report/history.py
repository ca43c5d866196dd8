"""Attempts of a run, for the user."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt of a run."""

    number: int
    hostnames: tuple[str, ...]
    world_size: int
    begun: float
    """Time at which the attempt began, in seconds since the epoch, as in the next field."""
    ended: float
    why: Literal["returned", "failed"]
    """Reason why the attempt ended."""
    failure: str | None
    """First failure, in one line."""
