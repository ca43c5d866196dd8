"""A run, from its hosts to its outcome."""

import asyncio
import dataclasses
import logging
import signal
from collections.abc import Sequence

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.call import references
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import Why
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.crew import RunSetup
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.driver.running.restart_policy import Verdict, ask_user
from torchrunx_ray.driver.running.steps import Steps
from torchrunx_ray.errors import AgentFailedError, LaunchError, counted
from torchrunx_ray.wire.clock import now_ns

logger = logging.getLogger("torchrunx_ray")

Outcome = LaunchResult[object] | Failures

_TELL_AFTER_S = 2.0
"""Time that the last output, or `restart_if`, may keep a failure back until the failure is logged."""


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

    def __init__(
        self,
        hosts: Hosts,
        options: Options,
        call: Call,
        progress: Progress,
        setup: RunSetup | None = None,
    ) -> None:
        self._setup = setup
        self._hosts = hosts
        self._options = options
        self._call = call
        self._progress = progress
        self._history = progress.history
        self._steps = Steps(hosts, options, call, progress)
        self._policy = self._steps.policy

    async def stacks(self) -> Stacks:
        """Return the stacks of the workers that live."""
        return await self._steps.attempt.stacks()

    def stop_by(self, signum: signal.Signals) -> None:
        """Let a cancellation send this signal to the workers, in the place of SIGTERM."""
        self._steps.attempt.stop_signal = signum

    def kill(self) -> None:
        """Kill the workers that live."""
        self._steps.attempt.kill()

    @property
    def spares(self) -> tuple[str, ...]:
        """Names of the hosts that are warm and have no workers."""
        return tuple(host.host.label for host in list(self._hosts.reserves.ready))

    async def run(self, *, is_fresh: bool = False) -> Outcome:
        """Run the call on every worker, as often as the options allow. Return the values or the failures.

        `is_fresh`: the room was taken a moment ago, and nobody can have taken it away.
        """
        steps, progress = self._steps, self._progress
        progress.waits_for_turn = self._hosts.turn.locked()
        async with self._hosts.turn:
            progress.waits_for_turn = False
            sink = None if self._setup is None else self._setup.sink
            await steps.assemble(is_fresh=is_fresh, sink=sink)
            self._begin_attempt()
            progress.supervisor = self
            try:
                try:
                    last = await self._until_last()
                finally:
                    progress.between = ""
                    await self._drain()
                outcome = last.judged or await steps.attempt.outcome()
            finally:
                # Other threads read these as soon as there is no supervisor.
                progress.stacks_at_stop = steps.attempt.stacks_at_stop
                progress.failures_before_stop = steps.attempt.failures_before_stop
                progress.supervisor = None
                await to_the_end(steps.leave())
        if isinstance(outcome, Failures):
            return outcome if outcome is last.judged else self._with_attempts(outcome, last.remark)
        attempts = self._history.attempts
        hostnames = attempts[-1].hostnames
        return LaunchResult(hostnames, outcome, progress.timeline, progress.log_directory, attempts)

    async def _until_last(self) -> _Decision:
        """Try as often as the failures and the options allow. Return the decision that ends the run."""
        steps = self._steps
        while True:
            attempt = steps.attempt
            why: Why = "failed"
            decision: _Decision | None = None
            try:
                why = await steps.go()
                decision = await self._decide(attempt, why)
                if decision.verdict is Verdict.END:
                    return decision
                self._policy.restarts += decision.verdict is Verdict.RESTART
                await steps.assemble_again(why)
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
            self._tell_of_restart(decision.verdict, attempt.failures)
            self._begin_attempt()

    def _begin_attempt(self) -> None:
        steps, plan = self._steps, None
        if self._setup is not None:
            number = len(self._history.attempts)
            plan = self._setup.plan(steps.crew, number, self._policy.restarts)
        steps.begin_attempt(plan)

    async def _decide(self, attempt: Attempt, why: Why) -> _Decision:
        """Decide if the workers are to be started again. Raises the error of `restart_if`."""
        failures = attempt.failures
        verdict = self._policy.verdict(why, failures)
        if verdict is Verdict.END:
            return _Decision(verdict, self._policy.last_words)
        self._progress.between = self._steps.restarting
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
        self._progress.between = self._steps.restarting
        return _Decision(verdict)

    def _with_attempts(self, failures: Failures, remark: str = "") -> Failures:
        return dataclasses.replace(failures, attempts=self._history.attempts, remark=remark)

    def _tell_of_restart(self, verdict: Verdict, failures: Failures | None) -> None:
        crew = self._steps.crew
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

    async def _drain(self) -> None:
        """Wait until all output is written; not for long if the run is cancelled."""
        loop = asyncio.get_running_loop()
        telling = loop.call_later(_TELL_AFTER_S, self._tell_of_last_lines)
        try:
            await to_the_end(self._steps.logs.drain(), self._steps.attempt.note_cancellation)
        finally:
            telling.cancel()

    def _tell_of_last_lines(self) -> None:
        """Warn of the failure while the last output waits for a terminal or a handler."""
        attempt = self._steps.attempt
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


async def run_once(
    options: Options, call: Call, progress: Progress, setup: RunSetup | None = None
) -> Outcome:
    """Hold hosts for one run."""
    hosts = Hosts(options)
    try:
        await references.wait_for(call.inserted, Connection())
        await hosts.open(progress)
        return await Supervisor(hosts, options, call, progress, setup).run(is_fresh=True)
    finally:
        await to_the_end(hosts.close())
