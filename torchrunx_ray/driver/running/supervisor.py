"""A run, from its hosts to its outcome."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import Why
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.driver.running.restart_policy import RestartPolicy, Verdict, ask_user
from torchrunx_ray.driver.running.watch import Watch
from torchrunx_ray.driver.running.why_ended import why_failed, why_returned
from torchrunx_ray.errors import AgentFailedError, LaunchError, counted
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import AttemptId, Restarted

logger = logging.getLogger("torchrunx_ray")

Outcome = LaunchResult[object] | Failures

_TELL_AFTER_S = 2.0
"""Time that the last output, or `restart_if`, may keep a failure back until the failure is logged."""


_TRIES = 5
"""Number of times that an elastic run tries to start its agents again when no restart is left."""


@dataclasses.dataclass(frozen=True)
class _Decision:
    """Decision about what follows an attempt, with all that the user gets to know if the run ends."""

    verdict: Verdict
    remark: str = ""
    """Reason why no other attempt follows, if there is one to tell."""
    judged: Failures | None = None
    """Failures about which `restart_if` was asked. The launch raises the same exception object."""


class Supervisor:
    """Owner of all that belongs to the run and not to one attempt: logs, timeline, progress."""

    _attempt: Attempt
    """The current attempt, or the last one."""

    def __init__(self, hosts: Hosts, options: Options, call: Call, progress: Progress) -> None:
        self._hosts = hosts
        self._options = options
        self._call = call
        self._progress = progress
        self._history = progress.history
        self._policy = RestartPolicy(options)

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
            await self._hosts.until_fenced(call.run_name)
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
                    last = await self._until_last(attempt, crew, backend, logs)
                finally:
                    progress.between = ""
                    await self._drain(logs)
                outcome = last.judged or await self._attempt.outcome()
            finally:
                # Other threads read these as soon as there is no supervisor.
                progress.stacks_at_stop = self._attempt.stacks_at_stop
                progress.failures_before_stop = self._attempt.failures_before_stop
                progress.supervisor = None
                await to_the_end(self._leave_hosts())
        if isinstance(outcome, Failures):
            return outcome if outcome is last.judged else self._with_attempts(outcome, last.remark)
        attempts = self._history.attempts
        hostnames = attempts[-1].hostnames
        return LaunchResult(hostnames, outcome, timeline, progress.log_directory, attempts)

    async def _until_last(
        self, attempt: Attempt, crew: Crew, backend: str | None, logs: RunLogs
    ) -> _Decision:
        """Try as often as the failures and the options allow. Return the decision that ends the run."""
        while True:
            why: Why = "failed"
            decision: _Decision | None = None
            try:
                why = await self._go(attempt)
                decision = await self._decide(attempt, why)
                if decision.verdict is Verdict.END:
                    return decision
                await self._policy.back_off()
                await to_the_end(self._hosts.give_up(attempt.broken))
                hosts_before = crew.hosts
                self._policy.restarts += decision.verdict is Verdict.RESTART
                crew, backend = await self._assemble_again()
            except asyncio.CancelledError:
                if not attempt.was_cancelled:  # cancelled between two attempts
                    attempt.note_cancellation()
                raise
            except (LaunchError, RayError, OSError, ValueError) as error:
                if decision is None:
                    raise  # such as the error of `restart_if`
                if attempt.failures is None:
                    error.add_note(f"The run was {why}, and could not be started again.")
                    raise
                return _Decision(Verdict.END, f"The run could not be started again: {error}")
            logs.expect(crew.speakers)
            failures = attempt.failures
            self._tell_of_restart(decision.verdict, failures, crew)
            restarted = _restarted(why, failures, hosts_before, crew.hosts)
            attempt = self._begin_attempt(crew, backend, logs, restarted)

    async def _assemble_again(self) -> tuple[Crew, str | None]:
        """Return the hosts of another attempt. An agent that dies before the attempt costs one more restart.

        If none is left, an elastic run still tries some times: agents have worked there before.
        """
        tries = _TRIES if self._options.is_elastic else 0
        while True:
            try:
                return await self._hosts.assemble(
                    self._call.template, self._progress, is_fresh=False
                )
            except AgentFailedError as error:
                has_restarts = self._policy.restarts < self._options.max_restarts
                if not (has_restarts or tries):
                    raise
                self._policy.restarts += has_restarts
                tries -= not has_restarts
                again = self._policy.in_words if has_restarts else "starting again"
                logger.warning(
                    "%s: %s, since the last start has failed: %s",
                    self._call.run_name,
                    again,
                    error,
                )

    async def _go(self, attempt: Attempt) -> Why:
        """Await an attempt, and note its end."""
        why: Why = "failed"  # also if a bug of the driver ends the attempt
        ended: float | None = None
        try:
            await self._run_watched(attempt)
            ended = time.time()
            why = await self._why_ended(attempt)
        except asyncio.CancelledError:
            why = "stopped"
            raise
        finally:
            failures = attempt.failures_before_stop
            failure = None if failures is None else failures.in_brief
            self._history.end(why, failure, ended or time.time())
        return why

    async def _run_watched(self, attempt: Attempt) -> None:
        """Run an attempt, and watch its hosts meanwhile."""
        name, options = self._call.run_name, self._options
        watch = Watch(name, attempt, self._hosts, options)
        if options.spares or options.is_elastic:
            self._hosts.reserves.begin(name, self._call.template, watch.reserves_wanted)
        watching = asyncio.create_task(watch.watch()) if self._options.may_restart else None
        try:
            await attempt.go(self._call)
        finally:
            if watching is not None:
                watching.cancel()

    async def _why_ended(self, attempt: Attempt) -> Why:
        """Return the reason, after a look at the hosts if a loss may be the reason."""
        if attempt.was_cancelled:
            return "stopped"
        failures, request = attempt.failures, attempt.stop_request
        if failures is None:
            return why_returned(request, have_all_returned=attempt.have_all_returned)
        if not self._options.may_restart:
            return "failed"
        lost: set[str] = set()
        if attempt.broken or request.asked is not None:
            self._progress.between = self._restarting
            await to_the_end(self._hosts.give_up(attempt.broken))
            lost = await self._lost_hosts()
        return why_failed(failures, request, lost)

    async def _lost_hosts(self) -> set[str]:
        """Return the names of lost and draining hosts. An error of this query must not replace the failure."""
        try:
            return await self._hosts.lost()
        except (LaunchError, RayError) as error:
            logger.warning(
                "%s has failed, and Ray does not say if a host is lost: %s",
                self._call.run_name,
                error,
            )
            return set()

    @property
    def _restarting(self) -> str:
        return f"restarting {counted(self._history.attempts[-1].world_size, 'worker')}"

    async def _decide(self, attempt: Attempt, why: Why) -> _Decision:
        """Decide if the workers are to be started again. Raises the error of `restart_if`."""
        failures = attempt.failures
        self._policy.note_end(self._history.attempts[-1])
        verdict = self._policy.verdict(why, failures)
        if verdict is Verdict.END:
            return _Decision(verdict, self._policy.last_words)
        self._progress.between = self._restarting
        if in_doubt := await attempt.silent_hosts.in_doubt():
            return _end_in_doubt(in_doubt, failures)
        restart_if = self._options.restart_if
        if verdict is not Verdict.RESTART or restart_if is None or failures is None:
            return _Decision(verdict)
        self._progress.between = "asking restart_if"
        judged = self._with_attempts(failures)
        telling = asyncio.get_running_loop().call_later(
            _TELL_AFTER_S, self._tell_of_restart_if, judged
        )
        try:
            if not await ask_user(restart_if, judged):
                return _Decision(Verdict.END, judged=judged)
        finally:
            telling.cancel()
        self._progress.between = self._restarting
        return _Decision(verdict)

    def _begin_attempt(
        self,
        crew: Crew,
        backend: str | None,
        logs: RunLogs,
        restarted: Restarted | None = None,
    ) -> Attempt:
        id_ = AttemptId(self._call.run_name, len(self._history.attempts))
        self._history.begin(crew.hostnames, len(crew.places))
        logs.begin_attempt(id_)
        progress, restarts = self._progress, self._policy.restarts
        self._attempt = Attempt(
            id_, self._options, crew, backend, progress.timeline, logs, restarts, restarted
        )
        progress.workers = self._attempt.workers
        progress.restart = self._policy.in_words
        progress.between = ""
        return self._attempt

    async def _leave_hosts(self) -> None:
        self._hosts.forget_call()
        await self._hosts.reserves.pause()
        self._hosts.fence(self._attempt.silent_hosts.fences())
        await self._hosts.give_up(self._attempt.broken)

    def _with_attempts(self, failures: Failures, remark: str = "") -> Failures:
        return dataclasses.replace(failures, attempts=self._history.attempts, remark=remark)

    def _tell_of_restart(self, verdict: Verdict, failures: Failures | None, crew: Crew) -> None:
        name, why = self._call.run_name, self._history.attempts[-1].why
        on = f"with {counted(len(crew.places), 'worker')} on {', '.join(crew.hostnames)}"
        if failures is None:
            logger.info("%s was %s, and goes on %s", name, why, on)
            return
        what = self._policy.in_words if verdict is Verdict.RESTART else "goes on"
        after_s = (now_ns() - failures.first_ns) / 1e9
        logger.warning(
            "%s: %s, %.2f s after the failure, %s\n  %s", name, what, after_s, on, failures.in_brief
        )

    def _tell_of_restart_if(self, failures: Failures) -> None:
        """Warn of the failure while `restart_if` has not answered."""
        logger.warning(
            "%s has failed, and waits for the answer of restart_if: %s",
            self._call.run_name,
            failures.in_brief,
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


def _end_in_doubt(hosts: Sequence[str], failures: Failures | None) -> _Decision:
    """End the run: a worker that lives on might write beside its replacement.

    Raises AgentFailedError if nothing else has failed. The workers were asked to stop, so they have no values.
    """
    where = ", ".join(hosts)
    if failures is None:
        what = "the workers were asked to stop, and some of their processes may live on"
        raise AgentFailedError(hostname=where, what=what)
    remark = (
        f"The run was not started again: processes of this attempt may live on {where}, and would run beside the new "
        "ones."
    )
    return _Decision(Verdict.END, remark)


def _restarted(
    why: Why, failures: Failures | None, old: Sequence[Host], new: Sequence[Host]
) -> Restarted:
    """Return the reason for an attempt on the `new` hosts, after an attempt on the `old` hosts."""
    if failures is None or why in ("resized", "drained"):
        return Restarted("resize" if why == "resized" else "drain", 0)
    if why != "host lost":
        return Restarted(failures.kind, 0)
    still_there = {host.node.node_id for host in new}
    return Restarted("host", sum(host.node.node_id not in still_there for host in old))


async def run_once(options: Options, call: Call, progress: Progress) -> Outcome:
    """Hold hosts for one run."""
    hosts = Hosts(options)
    try:
        await references.wait_for(call.inserted, Connection())
        await hosts.open(progress)
        return await Supervisor(hosts, options, call, progress).run(is_fresh=True)
    finally:
        await to_the_end(hosts.close())
