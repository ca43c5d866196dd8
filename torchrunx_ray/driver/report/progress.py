"""Progress of a run."""

import signal
import time
from pathlib import Path
from typing import Protocol

from torchrunx_ray.driver.background.forks import empty_in_child
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import History
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.report.workers import Workers
from torchrunx_ray.errors import counted


class HasDirectory(Protocol):
    """The run's default files."""

    directory: Path | None


class GoesOn(Protocol):
    """The part of a supervisor that its run's user may call."""

    async def stacks(self) -> Stacks: ...

    def stop_by(self, signum: signal.Signals) -> None: ...

    def kill(self) -> None: ...

    @property
    def spares(self) -> tuple[str, ...]: ...


class Progress:
    """State of a run, for the status line, and for the user's questions during the run or after its stop.

    Written only in the background loop.
    """

    def __init__(self, name: str, files: HasDirectory | None = None) -> None:
        self.name = name
        self._files = files
        self.timeline = Timeline()
        self.history = History()
        self.workers: Workers | None = None
        """Workers of the current attempt, or of the last one."""
        self.restart = ""
        """Words for the restart that the current attempt is, such as "restart 1 of 3"; "" for none."""
        self.between = ""
        """Words for the step between two attempts; "" during an attempt."""
        self.supervisor: GoesOn | None = None
        self.waits_for_turn = False
        self.waiting_for = ""
        """Words for the reason of the wait while the run waits for room."""
        self.ended = ""
        """Words for the run's end."""
        self.stacks_at_stop = Stacks({})
        """Stacks of the workers when the run was cancelled."""
        self.failures_before_stop: Failures | None = None
        """Failures from before the cancellation; all failures if the run was not cancelled."""

    async def stacks(self) -> Stacks:
        return Stacks({}) if self.supervisor is None else await self.supervisor.stacks()

    @property
    def spares(self) -> tuple[str, ...]:
        """Names of the hosts that are warm and have no workers."""
        supervisor = self.supervisor
        return () if supervisor is None else supervisor.spares

    @property
    def log_directory(self) -> Path | None:
        """Directory of the run's default files, once something was written to them."""
        return None if self._files is None else self._files.directory

    @property
    def phase(self) -> str:
        """Words for the current phase, which change only with the phase."""
        timeline = self.timeline
        if self.ended:
            return self.ended
        if self.waits_for_turn:
            return "waiting for the session's other runs"
        if timeline.placed_ns is None:
            return f"placing {self.waiting_for}".strip()
        if timeline.met_ns is None:
            return "starting agents"
        if self.between:
            return ": ".join(filter(None, (self.between, self.waiting_for)))
        ranks = len(timeline.places)
        if timeline.is_stopping:
            return f"stopping {counted(ranks, 'worker')}"
        if len(timeline.started) < ranks:
            return f"starting {counted(ranks, 'worker')}{self._restart}"
        if len(timeline.finished) < ranks:
            return f"running {counted(ranks, 'worker')}{self._restart}"
        return "collecting results"

    @property
    def status(self) -> str:
        """The current phase with counts and times."""
        timeline = self.timeline
        ranks, returned = len(timeline.places), len(timeline.finished)
        text = self.phase
        if not (self.ended or self.between or timeline.is_stopping):
            if timeline.met_ns is not None and len(timeline.started) < ranks:
                text = f"starting {len(timeline.started)}/{ranks} workers{self._restart}"
            elif 0 < returned < ranks:
                text += f", {returned} returned"
        return f"{self._begin_of_line}{text}"

    @property
    def last_line(self) -> str:
        """The status after the run has ended."""
        logs = f"; logs in {self.log_directory}" if self.log_directory else ""
        return f"{self._begin_of_line}{self.ended}{logs}"

    @property
    def _restart(self) -> str:
        return f", {self.restart}" if self.restart else ""

    @property
    def _begin_of_line(self) -> str:
        return f"{_clock(time.time() - self.timeline.begun_ns / 1e9)} {self.name}: "


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


living: set[Progress] = set()
"""Runs of this process that have not ended."""

# A forked child has none of its parent's runs.
empty_in_child(living)
