"""Attempts of a run, for the user."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Why = Literal["returned", "failed", "host lost", "resized", "drained", "stopped"]
"""Reasons for which an attempt ended.

"host lost": a failure that began with the loss of a host. "resized": more hosts could join. "drained": Ray drains a host.
"stopped": the run was cancelled.
"""


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt of a run."""

    number: int
    hostnames: tuple[str, ...]
    world_size: int
    begun: float
    """Time at which the attempt began, in seconds since the epoch, as in the next field."""
    ended: float | None
    """None while the attempt goes on, as in the next field."""
    why: Why | None
    """Reason why the attempt ended."""
    failure: str | None
    """First failure, in one line; for a stopped attempt, a failure from before the stop."""


class History:
    """All attempts of a run. Written only in the background loop; any thread may read `attempts`."""

    def __init__(self) -> None:
        self.attempts: tuple[AttemptRecord, ...] = ()
        """Attempts in order, replaced as a whole by each change."""

    def begin(self, hostnames: Sequence[str], world_size: int) -> None:
        """Begin an attempt."""
        number, begun = len(self.attempts), time.time()
        record = AttemptRecord(number, tuple(hostnames), world_size, begun, None, None, None)
        self.attempts = (*self.attempts, record)

    def end(self, why: Why, failure: str | None, ended: float) -> None:
        """End the current attempt, which ended at this time."""
        *earlier, last = self.attempts
        last = dataclasses.replace(last, ended=ended, why=why, failure=failure)
        self.attempts = (*earlier, last)
