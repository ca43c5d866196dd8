"""A run, from its hosts to its outcome."""

import asyncio
import logging

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult, Value
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.attempt import Attempt
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
        self._attempt: Attempt | None = None

    async def stacks(self) -> Stacks:
        """Return the stacks of the workers that live."""
        return Stacks({}) if self._attempt is None else await self._attempt.stacks()

    def kill(self) -> None:
        """Kill the workers that live."""
        if self._attempt is not None:
            self._attempt.kill()

    async def run(self, *, is_fresh: bool = False) -> Outcome:
        """Run the call on every worker. Return the values or the failures.

        `is_fresh`: the room was taken a moment ago, and nobody can have taken it away.
        """
        call, progress, timeline = self._call, self._progress, self._progress.timeline
        progress.waits_for_turn = self._hosts.turn.locked()
        async with self._hosts.turn:
            progress.waits_for_turn = False
            await references.wait_for(call.inserted, Connection())
            timeline.placed_ns = now_ns()
            crew, backend = await self._hosts.assemble(call.template, progress, is_fresh=is_fresh)
            timeline.met_ns = now_ns()
            logs = RunLogs(
                call.run_name, self._options, call.log_handlers, call.files, crew.speakers
            )
            id_ = AttemptId(call.run_name, 0)
            attempt = self._attempt = Attempt(id_, self._options, crew, backend, timeline, logs)
            progress.supervisor = self
            try:
                outcome = await self._outcome_of(attempt, logs)
            finally:
                # Other threads read these as soon as there is no supervisor.
                progress.stacks_at_stop = attempt.stacks_at_stop
                progress.failures_before_stop = attempt.failures_before_stop
                progress.supervisor = None
                await to_the_end(self._hosts.drop(attempt.broken))
        if isinstance(outcome, Failures):
            return outcome
        hostnames = [host.label for host in crew.hosts]
        return LaunchResult(hostnames, outcome, timeline, progress.log_directory)

    async def _outcome_of(self, attempt: Attempt, logs: RunLogs) -> list[list[Value]] | Failures:
        try:
            await attempt.go(self._call)
        finally:
            loop = asyncio.get_running_loop()
            telling = loop.call_later(_TELL_AFTER_S, self._tell_of_last_lines, attempt)
            try:
                await to_the_end(logs.drain(), attempt.note_cancellation)
            finally:
                telling.cancel()
        return await attempt.outcome()

    def _tell_of_last_lines(self, attempt: Attempt) -> None:
        """Warn of the failure while the last output waits for a terminal or a handler."""
        if attempt.failures is not None and not attempt.was_cancelled:
            logger.warning(
                "%s has failed, and still waits for a terminal or a logging handler that does not accept the "
                "output of the workers: %s",
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
