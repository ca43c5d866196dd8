"""A run, from its hosts to its outcome."""

import asyncio
import dataclasses
import logging
import time

from torchrunx_ray.driver.background.loop import in_thread, to_the_end
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import AttemptRecord
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult, Value
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.errors import LaunchError
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
        """The current attempt, or the last one."""
        self._attempts: list[AttemptRecord] = []
        self._failed_at = 0.0
        """Time of the last failure, on the monotonic clock."""

    async def stacks(self) -> Stacks:
        """Return the stacks of the workers that live."""
        return Stacks({}) if self._attempt is None else await self._attempt.stacks()

    def kill(self) -> None:
        """Kill the workers that live."""
        if self._attempt is not None:
            self._attempt.kill()

    async def run(self, *, is_fresh: bool = False) -> Outcome:
        """Run the call on every worker, as often as the options allow. Return the values or the failures.

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
            try:
                while True:
                    outcome = await self._attempt_with(crew, backend, logs)
                    if not isinstance(outcome, Failures) or not await self._restarts_after(outcome):
                        break
                    try:
                        crew, backend = await self._hosts.assemble(
                            call.template, progress, is_fresh=False
                        )
                    except LaunchError as error:
                        error.add_note(f"The run was to be restarted after: {outcome.in_brief}")
                        raise
                    logs.expect(crew.speakers)
                    self._tell_of_restart(outcome, crew)
            finally:
                await self._drain(logs)
        if isinstance(outcome, Failures):
            return dataclasses.replace(outcome, attempts=self._attempts)
        hostnames = [host.label for host in crew.hosts]
        directory = progress.log_directory
        return LaunchResult(hostnames, outcome, timeline, directory, self._attempts)

    async def _attempt_with(
        self, crew: Crew, backend: str | None, logs: RunLogs
    ) -> list[list[Value]] | Failures:
        progress = self._progress
        number = len(self._attempts)
        id_ = AttemptId(self._call.run_name, number)
        logs.begin_attempt(id_)
        begun = time.time()
        attempt = self._attempt = Attempt(
            id_, self._options, crew, backend, progress.timeline, logs, number
        )
        progress.supervisor = self
        try:
            await attempt.go(self._call)
            outcome = await attempt.outcome()
        finally:
            # Other threads read these as soon as there is no supervisor.
            progress.stacks_at_stop = attempt.stacks_at_stop
            progress.failures_before_stop = attempt.failures_before_stop
            await to_the_end(self._hosts.drop(attempt.broken))
        failure = outcome.in_brief if isinstance(outcome, Failures) else None
        self._attempts.append(
            AttemptRecord(
                number=number,
                hostnames=tuple(host.label for host in crew.hosts),
                world_size=len(crew.places),
                begun=begun,
                ended=time.time(),
                why="returned" if failure is None else "failed",
                failure=failure,
            )
        )
        return outcome

    async def _restarts_after(self, failures: Failures) -> bool:
        """Return True if the workers are to be started again. Raises the error of `restart_if`."""
        if len(self._attempts) > self._options.max_restarts:
            return False
        self._failed_at = time.monotonic()
        assert self._attempt is not None
        # A worker on a host that is cut off might write beside its replacement.
        if not (self._attempt.is_surely_over and await self._hosts.are_whole()):
            return False
        return await in_thread(self._may_restart, failures)

    def _may_restart(self, failures: Failures) -> bool:
        # In a thread: the exception and `restart_if` are the user's code.
        if not failures.may_go_away:
            return False
        asked = self._options.restart_if
        if asked is None:
            return True
        try:
            return bool(asked(failures.exception))
        except Exception as error:
            error.add_note("Raised by restart_if, which was asked about the failure of the run.")
            raise error from failures.exception

    def _tell_of_restart(self, failures: Failures, crew: Crew) -> None:
        logger.warning(
            "%s: restart %d of %d, %.2f s after the failure, with %d workers on %s\n  %s",
            self._call.run_name,
            len(self._attempts),
            self._options.max_restarts,
            time.monotonic() - self._failed_at,
            len(crew.places),
            ", ".join(host.label for host in crew.hosts),
            failures.in_brief,
        )

    async def _drain(self, logs: RunLogs) -> None:
        """Wait until all output is written; not for long if the run is cancelled."""
        loop = asyncio.get_running_loop()
        telling = loop.call_later(_TELL_AFTER_S, self._tell_of_last_lines)
        try:
            await to_the_end(logs.drain(), self._note_cancellation)
        finally:
            telling.cancel()
            self._progress.supervisor = None

    def _note_cancellation(self) -> None:
        if self._attempt is not None:
            self._attempt.note_cancellation()

    def _tell_of_last_lines(self) -> None:
        """Warn of the failure while the last output waits for a terminal or a handler."""
        attempt = self._attempt
        if attempt is not None and attempt.failures is not None and not attempt.was_cancelled:
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
