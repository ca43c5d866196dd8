"""A run, from its hosts to its outcome."""

import asyncio
import dataclasses
import enum
import logging
import time
from collections.abc import Callable

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import in_thread, to_the_end
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import AttemptRecord, Why
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.driver.running.watch import Watch
from torchrunx_ray.errors import LaunchError, counted
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import AttemptId

logger = logging.getLogger("torchrunx_ray")

Outcome = LaunchResult[object] | Failures

_TELL_AFTER_S = 2.0
"""Time that the last output may keep a failure back until the failure is logged."""


_CALM_S = 60.0
"""Length of an attempt after which lost hosts are no series any more."""

_ASSEMBLIES = 5
"""Times that a run tries to start its agents before another attempt. Agents worked before, so a death is no mistake."""

_PAUSE_S = 0.5
_MOST_PAUSE_S = 30.0


class Verdict(enum.Enum):
    """Decision after an attempt."""

    END = "the run ends"
    RESTART = "the workers are started again, which counts towards max_restarts"
    GO_ON = "the workers are started again on other hosts, which does not count"


class Supervisor:
    """Owner of all that belongs to the run and not to one attempt: logs, timeline, progress."""

    _attempt: Attempt
    """The current attempt, or the last one."""

    def __init__(self, hosts: Hosts, options: Options, call: Call, progress: Progress) -> None:
        self._hosts = hosts
        self._options = options
        self._call = call
        self._progress = progress
        self._records: list[AttemptRecord] = []
        self._begun = 0.0
        """Time at which the current attempt began, in seconds since the epoch."""
        self._restarts = 0
        """Number of restarts that count."""
        self._losses = 0
        """Number of attempts in a row that soon ended by a lost host."""
        self._asked_about: Failures | None = None
        """Failures that end the run, if `restart_if` was asked about them, or no restart was possible."""

    async def stacks(self) -> Stacks:
        """Return the stacks of the workers that live."""
        return await self._attempt.stacks()

    def kill(self) -> None:
        """Kill the workers that live."""
        self._attempt.kill()

    @property
    def spares(self) -> tuple[str, ...]:
        """Names of the hosts that are warm and have no workers."""
        return tuple(host.host.label for host in list(self._hosts.reserves.ready))

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
            attempt = self._begin_attempt(crew, backend, logs)
            progress.supervisor = self
            try:
                try:
                    attempt = await self._until_last(attempt, crew, backend, logs)
                finally:
                    await self._drain(logs)
                outcome = self._asked_about or await attempt.outcome()
            finally:
                # Other threads read these as soon as there is no supervisor.
                progress.stacks_at_stop = self._attempt.stacks_at_stop
                progress.failures_before_stop = self._attempt.failures_before_stop
                progress.supervisor = None
                await to_the_end(self._leave_hosts())
        if isinstance(outcome, Failures):
            return outcome if outcome is self._asked_about else self._with_attempts(outcome)
        hostnames = self._records[-1].hostnames
        return LaunchResult(
            hostnames, outcome, timeline, progress.log_directory, tuple(self._records)
        )

    async def _until_last(
        self, attempt: Attempt, crew: Crew, backend: str | None, logs: RunLogs
    ) -> Attempt:
        """Try as often as the failures and the options allow. Return the last attempt."""
        while True:
            failures: Failures | None = None
            try:
                await self._go(attempt)
                failures = attempt.failures
                why = await self._why_ended(attempt)
                self._note_end(crew, failures, why)
                verdict = await self._verdict(attempt, why)
                if verdict is Verdict.END:
                    return attempt
                await self._back_off(why)
                await to_the_end(self._hosts.give_up(attempt.broken))
                crew, backend = await self._hosts.assemble(
                    self._call.template, self._progress, tries=_ASSEMBLIES
                )
            except asyncio.CancelledError:
                if not attempt.was_cancelled:  # cancelled between two attempts
                    attempt.note_cancellation()
                raise
            except (LaunchError, RayError) as error:
                if failures is None:
                    raise
                remark = f"The run could not be started again: {error}"
                self._asked_about = self._with_attempts(failures, remark)
                return attempt
            logs.expect(crew.speakers)
            self._restarts += verdict is Verdict.RESTART
            self._tell_of_restart(verdict, failures, crew)
            self._asked_about = None
            attempt = self._begin_attempt(crew, backend, logs)

    async def _go(self, attempt: Attempt) -> None:
        """Run an attempt, and watch the hosts meanwhile."""
        options = self._options
        watch = Watch(self._call.run_name, attempt, self._hosts, options)
        if options.spares or options.is_elastic:
            name, template = self._call.run_name, self._call.template
            self._hosts.reserves.begin(name, template, watch.reserves_wanted)
        watching = asyncio.create_task(watch.watch()) if self._options.may_go_on else None
        try:
            await attempt.go(self._call)
        finally:
            if watching is not None:
                watching.cancel()

    async def _leave_hosts(self) -> None:
        await self._hosts.reserves.pause()
        await self._hosts.give_up(self._attempt.broken)

    def _begin_attempt(self, crew: Crew, backend: str | None, logs: RunLogs) -> Attempt:
        number = len(self._records)
        id_ = AttemptId(self._call.run_name, number)
        logs.begin_attempt(id_)
        self._begun = time.time()
        self._attempt = Attempt(
            id_, self._options, crew, backend, self._progress.timeline, logs, self._restarts
        )
        return self._attempt

    def _note_end(self, crew: Crew, failures: Failures | None, why: Why) -> None:
        self._records.append(
            AttemptRecord(
                number=len(self._records),
                hostnames=tuple(host.label for host in crew.hosts),
                world_size=len(crew.places),
                begun=self._begun,
                ended=time.time(),
                why=why,
                failure=None if failures is None else failures.in_brief,
            )
        )

    def _with_attempts(self, failures: Failures, remark: str = "") -> Failures:
        return dataclasses.replace(failures, attempts=tuple(self._records), remark=remark)

    async def _why_ended(self, attempt: Attempt) -> Why:
        if attempt.was_cancelled:
            return "stopped"
        if (reason := attempt.ended_as_asked) is not None:
            return "resized" if reason == "resize" else "drained"
        if attempt.failures is None:
            return "returned"
        if self._options.may_go_on and attempt.broken:
            await to_the_end(self._hosts.give_up(attempt.broken))
            if await self._hosts.has_lost_some():
                return "host lost"
        return "failed"

    async def _verdict(self, attempt: Attempt, why: Why) -> Verdict:
        """Decide if the workers are to be started again. Raises the error of `restart_if`."""
        # A worker on a host that is cut off might write beside its replacement.
        if why in ("returned", "stopped") or not attempt.is_surely_over:
            return Verdict.END
        if why in ("resized", "drained") or (why == "host lost" and self._options.is_elastic):
            return Verdict.GO_ON
        failures = attempt.failures
        may_restart = self._restarts < self._options.max_restarts
        if failures is None or not (may_restart and failures.may_go_away):
            return Verdict.END
        return Verdict.RESTART if await self._user_agrees(failures) else Verdict.END

    async def _user_agrees(self, failures: Failures) -> bool:
        """Ask `restart_if`. Raises its error."""
        if self._options.restart_if is None:
            return True
        # This object makes its exception once, so that the launch raises what `restart_if` was given.
        self._asked_about = failures = self._with_attempts(failures)
        answer = await in_thread(_answer, self._options.restart_if, failures)
        if isinstance(answer, BaseException):
            try:
                raise answer from failures.exception
            finally:
                del answer  # it refers to this frame
        return answer

    async def _back_off(self, why: Why) -> None:
        """Wait before another attempt if hosts are lost again and again, since such losses may not count."""
        last = self._records[-1]
        self._losses = self._losses + 1 if why == "host lost" else 0
        if last.ended - last.begun > _CALM_S:
            self._losses = 1
        if self._losses > 1:
            await asyncio.sleep(min(_MOST_PAUSE_S, _PAUSE_S * 2 ** (self._losses - 2)))

    def _tell_of_restart(self, verdict: Verdict, failures: Failures | None, crew: Crew) -> None:
        name, last = self._call.run_name, self._records[-1]
        hosts = ", ".join(host.label for host in crew.hosts)
        on = f"with {counted(len(crew.places), 'worker')} on {hosts}"
        if failures is None:
            logger.info("%s was %s, and goes on %s", name, last.why, on)
            return
        what = "goes on"
        if verdict is Verdict.RESTART:
            what = f"restart {self._restarts} of {self._options.max_restarts}"
        after_s = (now_ns() - failures.first_ns) / 1e9
        logger.warning(
            "%s: %s, %.2f s after the failure, %s\n  %s", name, what, after_s, on, failures.in_brief
        )

    async def _drain(self, logs: RunLogs) -> None:
        """Wait until all output is written; not for long if the run is cancelled."""
        loop = asyncio.get_running_loop()
        telling = loop.call_later(_TELL_AFTER_S, self._tell_of_last_lines)
        try:
            await to_the_end(logs.drain(), self._attempt.note_cancellation)
        finally:
            telling.cancel()

    def _tell_of_last_lines(self) -> None:
        """Warn of the failure while the last output waits for a terminal or a handler."""
        attempt = self._attempt
        if attempt.failures is not None and not attempt.was_cancelled:
            logger.warning(
                "%s has failed, and still waits for a terminal or a logging handler that does not accept the "
                "output of the workers: %s",
                self._call.run_name,
                attempt.failures.in_brief,
            )


def _answer(
    restart_if: Callable[[BaseException], bool], failures: Failures
) -> bool | BaseException:
    """Ask in a thread, since the exception and `restart_if` are the user's code. Return an error as a value.

    Some exceptions mean something else to a coroutine or an event loop; they are in a RuntimeError.
    """
    try:
        return bool(restart_if(failures.exception))
    except BaseException as error:
        error.add_note("Raised by restart_if, which was asked about the failure of the run.")
        if isinstance(error, Exception) and not isinstance(
            error, StopIteration | StopAsyncIteration
        ):
            return error
        return RuntimeError(f"restart_if raised {type(error).__name__}: {error}")


async def run_once(options: Options, call: Call, progress: Progress) -> Outcome:
    """Hold hosts for one run."""
    hosts = Hosts(options)
    try:
        await references.wait_for(call.inserted, Connection())
        await hosts.open(progress)
        return await Supervisor(hosts, options, call, progress).run(is_fresh=True)
    finally:
        await to_the_end(hosts.close())
