"""The steps of a run, for whoever decides what follows an attempt: a supervisor, or torch's elastic agent."""

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
from torchrunx_ray.driver.output.speaker import Sink
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import Why
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.crew import Crew, GroupPlan
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.driver.running.restart_policy import RestartPolicy
from torchrunx_ray.driver.running.watch import Watch
from torchrunx_ray.driver.running.why_ended import why_failed, why_returned
from torchrunx_ray.errors import AgentFailedError, LaunchError, counted
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.messages import AttemptId, Restarted

logger = logging.getLogger("torchrunx_ray")

_TRIES = 5
"""Number of times that an elastic run tries to start its agents again when no restart is left."""


class Steps:
    """One run on its hosts, step by step. Used only in the background loop.

    The order is `assemble`, `begin_attempt`, `go`, and for each further attempt `assemble_again`, `begin_attempt`, `go`.
    `leave` comes last.
    """

    attempt: Attempt
    """The current attempt, or the last one."""
    crew: Crew
    """The hosts of the current attempt, or of the next one."""
    logs: RunLogs

    def __init__(self, hosts: Hosts, options: Options, call: Call, progress: Progress) -> None:
        self.hosts = hosts
        self.policy = RestartPolicy(options)
        self._options = options
        self._call = call
        self._progress = progress
        self._history = progress.history
        self._backend: str | None = None
        self._restarted: Restarted | None = None

    async def assemble(self, *, is_fresh: bool = False, sink: Sink | None = None) -> None:
        """Wait for the arguments, then for the hosts with an agent on each.

        `is_fresh`: the room was taken a moment ago, and nobody can have taken it away. `sink` takes all output in the
        place of what the options name.
        """
        call, timeline = self._call, self._progress.timeline
        await references.wait_for(call.inserted, Connection())
        await self.hosts.until_fenced(call.run_name)
        timeline.placed_ns = now_ns()
        self.crew, self._backend = await self.hosts.assemble(
            call.template, self._progress, is_fresh=is_fresh
        )
        timeline.met_ns = now_ns()
        self.logs = RunLogs(
            call.run_name, self._options, call.log_handlers, call.files, self.crew.speakers, sink
        )

    async def assemble_again(self, why: Why) -> None:
        """Wait for the hosts of another attempt. `why` is the reason why the last one has ended.

        An agent that dies meanwhile costs one more restart. If none is left, an elastic run still tries some times:
        agents have worked there before.
        """
        await self.policy.back_off()
        await to_the_end(self.hosts.give_up(self.attempt.broken))
        hosts_before = self.crew.hosts
        tries = _TRIES if self._options.is_elastic else 0
        while True:
            try:
                self.crew, self._backend = await self.hosts.assemble(
                    self._call.template, self._progress, is_fresh=False
                )
                break
            except AgentFailedError as error:
                has_restarts = self.policy.restarts < self._options.max_restarts
                if not (has_restarts or tries):
                    raise
                self.policy.restarts += has_restarts
                tries -= not has_restarts
                again = self.policy.in_words if has_restarts else "starting again"
                logger.warning(
                    "%s: %s, since the last start has failed: %s",
                    self._call.run_name,
                    again,
                    error,
                )
        self._restarted = _restarted(why, self.attempt.failures, hosts_before, self.crew.hosts)

    def begin_attempt(self, plan: GroupPlan | None = None) -> None:
        """Begin an attempt on the assembled hosts."""
        if plan is not None:
            self.crew = dataclasses.replace(self.crew, part=plan.part)
        id_ = AttemptId(self._call.run_name, len(self._history.attempts))
        self._history.begin(self.crew.hostnames, len(self.crew.places))
        self.logs.expect(self.crew.speakers)
        self.logs.begin_attempt(id_)
        progress, restarted = self._progress, self._restarted
        self._restarted = None
        self.attempt = Attempt(
            id_,
            self._options,
            self.crew,
            self._backend,
            progress.timeline,
            self.logs,
            self.policy.restarts,
            restarted,
            plan,
        )
        progress.workers = self.attempt.workers
        progress.restart = self.policy.in_words
        progress.between = ""

    async def go(self) -> Why:
        """Await the attempt. Note why it has ended, and return that."""
        attempt = self.attempt
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
        self.policy.note_end(self._history.attempts[-1])
        return why

    async def leave(self) -> None:
        """End the run on its hosts, which stay held."""
        self.hosts.forget_call()
        await self.hosts.reserves.pause()
        self.hosts.fence(self.attempt.silent_hosts.fences())
        await self.hosts.give_up(self.attempt.broken)

    @property
    def restarting(self) -> str:
        """Words for the step from the last attempt to another one."""
        return f"restarting {counted(self._history.attempts[-1].world_size, 'worker')}"

    async def _run_watched(self, attempt: Attempt) -> None:
        """Run an attempt, and watch its hosts meanwhile."""
        name, options = self._call.run_name, self._options
        watch = Watch(name, attempt, self.hosts, options)
        if options.spares or options.is_elastic:
            self.hosts.reserves.begin(name, self._call.template, watch.reserves_wanted)
        watching = asyncio.create_task(watch.watch()) if options.may_restart else None
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
            self._progress.between = self.restarting
            await to_the_end(self.hosts.give_up(attempt.broken))
            lost = await self._lost_hosts()
        return why_failed(failures, request, lost)

    async def _lost_hosts(self) -> set[str]:
        """Return the names of lost and draining hosts. An error of this query must not replace the failure."""
        try:
            return await self.hosts.lost()
        except (LaunchError, RayError) as error:
            logger.warning(
                "%s has failed, and Ray does not say if a host is lost: %s",
                self._call.run_name,
                error,
            )
            return set()


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
