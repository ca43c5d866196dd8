"""A run, from its hosts to its outcome."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.output.speaker import Speaker
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult, Value
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.attempt import STUCK_KILLED_S, Attempt
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import AttemptId

logger = logging.getLogger("torchrunx_ray")

Outcome = LaunchResult[object] | Failures

_TELL_AFTER_S = 2.0
"""Time that the last output may keep a failure back until the failure is logged."""


class Supervisor:
    """Owner of all that belongs to the run and not to one attempt: logs, timeline, progress."""

    def __init__(self, hosts: Hosts, options: Options, call: Call, progress: Progress) -> None:
        self._hosts = hosts
        self._options = options
        self._call = call
        self._progress = progress
        self._logs: RunLogs | None = None
        self._attempt: Attempt | None = None

    @property
    def log_directory(self) -> Path | None:
        """Directory of the default files, once something was written to them."""
        return None if self._logs is None else self._logs.directory

    async def stacks(self) -> Stacks:
        """Return the stacks of the workers that live."""
        return Stacks({}) if self._attempt is None else await self._attempt.stacks()

    def kill(self) -> None:
        """Let the next cancellation kill the workers."""
        if self._attempt is not None:
            self._attempt.kill()

    async def run(self, *, is_fresh: bool = False) -> Outcome:
        """Run the call on every worker. Return the values or the failures.

        `is_fresh`: the room was taken a moment ago, and nobody can have taken it away.
        """
        progress, timeline = self._progress, self._progress.timeline
        progress.waits_for_turn = self._hosts.turn.locked()
        async with self._hosts.turn:
            progress.waits_for_turn = False
            await references.wait_for(self._call.inserted, Connection())
            timeline.placed_ns = now_ns()
            crew, backend = await self._hosts.assemble(
                self._call.template, progress, is_fresh=is_fresh
            )
            timeline.met_ns = now_ns()
            id_ = AttemptId(self._call.run_name, 0)
            attempt = self._attempt = Attempt(id_, self._options, crew, backend, timeline)
            progress.supervisor = self
            try:
                outcome = await self._outcome_of(attempt, crew.speakers)
            finally:
                # Other threads read these as soon as there is no supervisor.
                progress.log_directory = self.log_directory
                progress.stacks_at_stop = attempt.stacks_at_stop
                progress.failures_before_stop = attempt.failures_before_stop
                progress.supervisor = None
                await to_the_end(self._hosts.drop(attempt.broken))
        if isinstance(outcome, Failures):
            return outcome
        hostnames = [host.label for host in crew.hosts]
        return LaunchResult(hostnames, outcome, timeline, progress.log_directory)

    async def _outcome_of(
        self, attempt: Attempt, speakers: Sequence[Speaker]
    ) -> list[list[Value]] | Failures:
        call = self._call
        logs = self._logs = RunLogs(
            call.run_name, self._options, call.log_handlers, call.files, speakers
        )
        try:
            await attempt.go(call, logs)
        finally:
            await self._drain(logs, attempt)
        return await attempt.outcome()

    async def _drain(self, logs: RunLogs, attempt: Attempt) -> None:
        """Wait until all output is written; not for long if the run is cancelled."""
        draining = asyncio.ensure_future(logs.drain())
        loop = asyncio.get_running_loop()
        telling = loop.call_later(_TELL_AFTER_S, self._tell_of_last_lines, attempt)
        cancelled: asyncio.CancelledError | None = None
        while not draining.done():
            try:
                await asyncio.shield(draining)
            except asyncio.CancelledError as error:
                if not attempt.note_cancellation():
                    logs.hurry(STUCK_KILLED_S)
                cancelled = error
        telling.cancel()
        try:
            if cancelled is not None:
                raise cancelled
        finally:
            del cancelled  # it refers to this frame

    def _tell_of_last_lines(self, attempt: Attempt) -> None:
        """Warn of the failure while the last output waits for a terminal or a handler."""
        if attempt.failures is not None and not attempt.was_cancelled:
            logger.warning(
                "%s has failed, and still waits for a terminal or a handler of logging that does not take what "
                "the workers said: %s",
                self._call.run_name,
                attempt.failures.in_brief,
            )


async def run_once(options: Options, call: Call, progress: Progress) -> Outcome:
    """Hold hosts for one run."""
    hosts = Hosts(options)
    try:
        await references.wait_for(call.inserted, Connection())
        await hosts.open(progress)
        return await Supervisor(hosts, options, call, progress).run(is_fresh=True)
    finally:
        await to_the_end(hosts.close())
