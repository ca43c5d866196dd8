"""One attempt of a run: start the workers, and return their values or the failures."""

import asyncio
import contextlib
import enum
import functools
import logging
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.agents.agent_link import AgentLink
from torchrunx_ray.driver.agents.clocks import Clocks
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output import host_story
from torchrunx_ray.driver.output.host_story import HostEvent
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.report.failures import DriverFailed, Failures, NotJoined, Report
from torchrunx_ray.driver.report.results import Value
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.report.stored import until_stored
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.ledger import Ledger
from torchrunx_ray.driver.running.stragglers import Stragglers
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns

logger = logging.getLogger("torchrunx_ray")

_LAST_WORDS_S = 12.0
"""Time after SIGKILL until a host that does not report its end is given up.

This is longer than a template waits for a process that frees much memory.
"""

_DEAF_S = 1.0
"""Time after a second cancellation that an agent may take to confirm the kill."""

_LAST_LINES_S = 5.0
"""Time that a handler or terminal may take for the last output of a cancelled run.

The agents have twice this time to send the output.
"""

_STUCK_S = 2.0
"""Time that a handler or terminal may take for one piece of output after that."""

STUCK_KILLED_S = 0.5
"""The same when a run is killed."""

_SLOW_START_S = 60.0
"""Time that a host may take until it can fork before a warning."""

_START_S = 1800.0
"""Time that a host may take until it can fork before the run fails."""

_SILENT_STOP_S = 2.0
"""Time that a failed run may take to stop its workers before a warning names the failure."""

_ENDING_S = 0.8
"""Time for an agent that ends itself to report that its workers are gone."""

_STACKS_AFTER_FAILURE = messages.StacksWanted(within_s=1.0, thread_s=0.1)
"""Limits for stacks after a failure. They arrive in milliseconds, or later if the machine is busy."""

_STACKS_AT_CANCEL = messages.StacksWanted(within_s=0.5, thread_s=0.1)
"""Limits for stacks at a cancellation. They are short because a person is waiting."""


class Phase(enum.IntEnum):
    """Phases of an attempt. An attempt may skip phases, and never goes back."""

    STARTING = 1
    """Hosts get ready to fork."""
    JOINING = 2
    """All hosts can fork; ranks join the process group."""
    RUNNING = 3
    """All ranks are in the process group."""
    SETTLING = 4
    """A failure is known, and its cause may still arrive."""
    STOPPING = 5
    """The hosts were told to stop their workers."""
    ENDED = 6
    """No worker lives."""


@dataclass(frozen=True)
class StopOrder:
    """The last order to stop: when the first one was given, and when SIGKILL follows, on the loop's clock."""

    first_ns: int
    kills_at: float


class Attempt:
    """The state of one attempt of a run: its layout, failures, and hosts that have ended."""

    def __init__(
        self,
        id_: messages.AttemptId,
        options: Options,
        crew: Crew,
        backend: str | None,
        timeline: Timeline,
    ) -> None:
        self._id = id_
        self._options = options
        self._crew = crew
        self._backend = backend
        self._cluster = Connection()
        self._timeline = timeline
        timeline.hostnames = [host.label for host in crew.hosts]
        timeline.places = crew.places
        self._clocks = Clocks(crew.agents)
        self._stragglers = Stragglers(id_, crew.agents, crew.layout)
        self._ledger = Ledger(crew, self._clocks)
        self._phase = Phase.STARTING
        self._stop_order: StopOrder | None = None
        self._deaf: set[int] = set()
        """Indices of hosts whose agents have not confirmed the last stop."""
        self._tasks: set[asyncio.Task[None]] = set()
        """Background tasks, which are cancelled at the end of the attempt."""
        self._stopped: dict[int, str] = {}
        """Ranks that the run itself has stopped, with their hosts."""
        self._timers: list[asyncio.TimerHandle] = []
        self._watching: list[asyncio.Task[None]] = []
        self._refs: list[list[ray.ObjectRef[Any]]] = []
        """References to the values, by host and local rank, once all hosts have ended."""
        self._sizes: dict[tuple[int, int], int] = {}
        self._can_fork: set[int] = set()
        """Indices of hosts whose workers can be forked."""
        self._pids: list[dict[int, int]] = [{} for _ in crew.hosts]
        """Ranks of each host by pid."""
        self._stacks = Stacks({})
        self._failed_before_cancel: int | None = None
        """Number of failures known when the run was cancelled; None if the run was not cancelled."""
        self._is_to_be_killed = False
        self.stacks_at_stop = Stacks({})
        """Stacks of the workers when the run was cancelled."""
        self._over: set[int] = set()
        """Indices of hosts that have no living worker, or whose link has ended."""
        self.broken: set[int] = set(range(len(crew.hosts)))
        """Indices of hosts whose agents cannot be used again, since they have not sent all their output."""

    async def go(self, call: Call, logs: RunLogs) -> None:
        """Run the call. Return when no worker lives, and all output has been sent.

        A failure or a cancellation stops the workers. A second cancellation, or a first one after `kill`, kills
        the workers.
        """
        self._logs = logs
        try:
            links = [
                AgentLink(
                    self._crew.agents[i],
                    host.label,
                    logs,
                    self._pids[i],
                    functools.partial(self._hear, i),
                )
                for i, host in enumerate(self._crew.hosts)
            ]
            self._begin(self._clocks.compare())
            self._watching = [
                asyncio.create_task(self._watch(i, link, call)) for i, link in enumerate(links)
            ]
            for wait_s, is_enough in ((_SLOW_START_S, False), (_START_S, True)):
                self._later(wait_s, self._check_can_fork, wait_s, is_enough)
            await self._until_ended()
            self._refs = [link.values for link in links]
        finally:
            self._become(Phase.ENDED)
            self._stragglers.close()
            for timer in self._timers:
                timer.cancel()
            for task in (*self._tasks, *self._watching):
                task.cancel()

    async def outcome(self) -> list[list[Value]] | Failures:
        """Return every rank's value, by host, or the failures."""
        if (failures := self.failures) is not None:
            return failures
        hosts = list(zip(self._crew.hosts, self._refs, strict=True))
        values = [(host.label, refs) for host, refs in hosts]
        await until_stored(self._id.run_id, values, self._cluster)
        return [
            [Value(ref, self._sizes.get((i, k), 0), host.node) for k, ref in enumerate(refs)]
            for i, (host, refs) in enumerate(hosts)
        ]

    @property
    def failures(self) -> Failures | None:
        """All failures so far; None if there are none."""
        return self._first_failures(None)

    @property
    def failures_before_stop(self) -> Failures | None:
        """Failures from before the cancellation, since later ones may be its consequence.

        All failures if the run was not cancelled; None if there are none.
        """
        return self._first_failures(self._failed_before_cancel)

    def _first_failures(self, count: int | None) -> Failures | None:
        failures = self._ledger.first(count)
        if not failures:
            return None
        stopped = [f"rank {rank} on {label}" for rank, label in sorted(self._stopped.items())]
        stopped_at_ns = None if self._stop_order is None else self._stop_order.first_ns
        return Failures(failures, stopped, self._stacks, self._logs.directory, stopped_at_ns)

    def kill(self) -> None:
        """Make the next cancellation kill the workers."""
        self._is_to_be_killed = True

    async def stacks(self) -> Stacks:
        """Return the stacks of the living workers."""
        return await self._stragglers.stacks()

    async def _until_ended(self) -> None:
        cancelled: asyncio.CancelledError | None = None
        for grace_s in (self._options.shutdown_timeout, 0, 0):
            try:
                await asyncio.wait(self._watching)
                break
            except asyncio.CancelledError as error:
                if self.note_cancellation():
                    self._begin(self._look_and_stop(grace_s))
                else:
                    self._stop(0)
                    self._later(_DEAF_S, self._give_up_deaf)
                    self._logs.hurry(STUCK_KILLED_S)
                cancelled = error
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled  # it refers to this frame, and must not wait for Python's gc
        for watching in self._watching:
            if not watching.cancelled():
                watching.result()

    def note_cancellation(self) -> bool:
        """Note a cancellation. Returns False if this cancellation kills the workers."""
        if self.was_cancelled:
            return False
        self._failed_before_cancel = len(self._ledger)
        self._bound_last_lines()
        return not self._is_to_be_killed

    def _bound_last_lines(self) -> None:
        """Limit the wait for a blocked handler or a stopped terminal after a cancelled run's hosts have ended."""
        if self.was_cancelled and len(self._over) == len(self._crew.hosts):
            loop = asyncio.get_running_loop()
            loop.call_later(_LAST_LINES_S, self._logs.hurry, _STUCK_S)
            self._later(2 * _LAST_LINES_S, self._give_up_silent)

    @property
    def was_cancelled(self) -> bool:
        return self._failed_before_cancel is not None

    def _wanted(self, host_index: int, call: Call) -> messages.ShareWanted:
        master = self._crew.met[0]
        assert master.master_port is not None
        host = self._crew.hosts[host_index]
        worker = messages.WorkerWanted(
            attempt=self._id,
            hostname=host.label,
            backend=self._backend,
            timeout=self._options.timeout,
            argv=call.argv,
            log_level=self._logs.level,
        )
        return messages.ShareWanted(
            worker=worker,
            places=tuple(self._crew.layout[host_index]),
            master_addr=master.ip,
            master_port=master.master_port,
            gpu_ids=self._crew.gpu_ids[host_index],
            gpus_per_worker=host.gpus_per_worker,
            forks_when_told=self._forks_when_told,
        )

    async def _watch(self, host_index: int, link: AgentLink, call: Call) -> None:
        try:
            failed = await link.hold(self._wanted(host_index, call), call)
        except Exception as error:
            failed = DriverFailed("talked with an agent", error)
        finally:
            self._is_over(host_index)
        if failed is not None:
            self._fail(host_index, None, None, failed)

    def _hear(self, host_index: int, event: messages.Event) -> None:
        """Handle an event. A bug here must not prevent the handling of later events."""
        try:
            self._handle(host_index, event)
        except (
            Exception,
            SystemExit,
        ) as error:  # SystemExit may come from a log handler of the driver
            doing = f"handled {type(event).__name__} of an agent"
            self._fail(host_index, None, None, DriverFailed(doing, error))

    def _handle(self, host_index: int, event: messages.Event) -> None:
        self._note(host_index, event)
        match event:
            case messages.Printed():
                who = self._crew.speaker(host_index, event.local_rank)
                time_ns = self._clocks.on_ours(host_index, event.time_ns)
                self._logs.put(who, event.stream, event.data, time_ns / 1e9)
            case messages.CanFork():
                self._can_fork_at(host_index)
            case messages.Joined():
                if len(self._timeline.joined) == len(self._crew.places):
                    self._become(Phase.RUNNING)
            case messages.Started():
                self._pids[host_index][event.pid] = self._crew.rank(host_index, event.local_rank)
            case messages.Finished():
                self._sizes[host_index, event.local_rank] = event.size
                self._stragglers.has_returned(self._crew.rank(host_index, event.local_rank))
                self._ledger.look_for_others(self._timeline.finished)
            case messages.Failed():
                self._fail(host_index, event.local_rank, event.time_ns, event)
            case messages.Died():
                self._has_died(host_index, event)
            case messages.AgentFailed():
                self._fail(host_index, None, event.time_ns, event)
                if event.is_ending:
                    self._later(_ENDING_S, self._forget, host_index)
            case messages.TemplateRefused():
                self._fail(host_index, None, None, event)
            case messages.HostEnded():
                self._has_ended(host_index, event)
            case messages.OutputEnded():
                self.broken.discard(host_index)
            case _:
                pass  # a normal step of a worker

    def _note(self, host_index: int, event: messages.Event) -> None:
        about = event.exited if isinstance(event, messages.Died) else event
        local_rank: int | None = getattr(about, "local_rank", None)
        rank = None if local_rank is None else self._crew.rank(host_index, local_rank)
        self._timeline.hear(host_index, rank, event, -self._clocks.on_ours(host_index, 0))
        if not isinstance(event, messages.AgentFailed | messages.TemplateRefused):  # see `_fail`
            self._tell_of_host(host_index, rank, event)

    def _tell_of_host(self, host_index: int, rank: int | None, event: HostEvent) -> None:
        on_ours = functools.partial(self._clocks.on_ours, host_index)
        line, time_ns = host_story.line_of(event, rank, on_ours, self._timeline.begun_ns)
        if line:
            self._logs.tell(self._crew.speaker(host_index, None), line, time_ns / 1e9)

    def _has_died(self, host_index: int, died: messages.Died) -> None:
        exited = died.exited
        assert exited.local_rank is not None
        if self._has_sent(exited.signal, self._clocks.on_ours(host_index, exited.time_ns)):
            rank = self._crew.rank(host_index, exited.local_rank)
            self._stopped[rank] = self._crew.hosts[host_index].label
        else:
            self._fail(host_index, exited.local_rank, exited.time_ns, died)

    def _has_sent(self, signal_number: int | None, died_at_ns: int) -> bool:
        """Return True if the run itself may have sent the signal that ended a worker."""
        order = self._stop_order
        if order is None or died_at_ns <= order.first_ns:
            return False
        if signal_number == signal.SIGKILL:
            return asyncio.get_running_loop().time() >= order.kills_at
        return signal_number == signal.SIGTERM

    def _has_ended(self, host_index: int, ended: messages.HostEnded) -> None:
        self._is_over(host_index)
        if ended.left:
            logger.warning(
                "%s: processes %s are left; the kernel holds them, SIGKILL did not end them",
                self._crew.hosts[host_index].label,
                ", ".join(map(str, ended.left)),
            )

    def _is_over(self, host_index: int) -> None:
        """Note that a host has no living worker.

        The first host's agent is told when all other hosts have ended, since it serves the store for them.
        """
        if host_index in self._over:
            return
        self._over.add(host_index)
        self._bound_last_lines()
        serving = self._crew.agents[0]
        alone = self._over == set(range(1, len(self._crew.hosts)))
        if alone and not serving.is_gone:
            self._cluster.tell(serving.calls.others_have_ended, self._id)

    @property
    def _forks_when_told(self) -> bool:
        return self._backend is not None and len(self._crew.hosts) > 1

    def _can_fork_at(self, host_index: int) -> None:
        """Note that a host can fork. When all hosts can, make them fork, and start the group's timeout."""
        self._can_fork.add(host_index)
        if len(self._can_fork) < len(self._crew.hosts):
            return
        self._become(Phase.JOINING)
        if self._backend is not None:
            self._later(self._options.timeout, self._check_joined)
        if self._forks_when_told:
            for agent in self._crew.agents:
                self._cluster.tell(agent.calls.fork, self._id)

    def _check_can_fork(self, waited_s: float, is_enough: bool) -> None:
        """Warn about hosts that keep the others waiting. If `is_enough`, fail the run."""
        if self._phase is not Phase.STARTING or self.was_cancelled:
            return
        for i in set(range(len(self._crew.hosts))) - self._can_fork - self._over:
            what = f"{waited_s:g} s after the run began no worker can be forked"
            if i in self._timeline.loaded:
                why = "the function and its arguments are still on their way to its template"
            else:  # an agent gets the run only together with its arguments
                preload = ", ".join(self._options.preload)
                of_template = f"still imports {preload}" if preload else "is still being started"
                why = f"its template {of_template}, or the arguments are still on their way there"
            if is_enough:
                self._lose(i, what, why)
            else:
                logger.warning("%s: %s: %s", self._crew.hosts[i].label, what, why)

    def _check_joined(self) -> None:
        """Tell who is missing, also if those who waited for them have just given up."""
        waits = self._phase in (Phase.JOINING, Phase.SETTLING) and not self._ledger.cause_is_known
        if not waits or self.was_cancelled:
            return
        missing = {
            place.rank: self._crew.label_of(place)
            for place in self._crew.places
            if place.rank not in self._timeline.joined
        }
        if missing:
            host_index = next(p.host_index for p in self._crew.places if p.rank in missing)
            not_joined = NotJoined(self._options.timeout, missing)
            self._fail(host_index, None, None, not_joined)

    def _lose(self, host_index: int, what: str, evidence: str) -> None:
        self._fail(host_index, None, None, messages.AgentFailed(now_ns(), what, evidence))

    def _fail(
        self, host_index: int, local_rank: int | None, time_ns: int | None, report: Report
    ) -> None:
        """Note a failure. Its time is on its host's clock; None means now, on the driver's clock."""
        if not self._ledger:
            self._become(Phase.SETTLING)
            self._stragglers.close()
            self._begin(self._settle_and_stop())
            if not self.was_cancelled:
                self._later(_SILENT_STOP_S, self._tell_of_failure)
        self._ledger.add(host_index, local_rank, time_ns, report)
        if local_rank is None:
            self._tell_of_host(host_index, None, report)
        self._ledger.look_for_others(self._timeline.finished)

    def _tell_of_failure(self) -> None:
        """Warn of the failure while workers stop, which `shutdown_timeout` may make slow."""
        assert self.failures is not None
        logger.warning(
            "%s has failed, and stops what is left of it, for %g s at most: %s",
            self._id.run_id,
            self._options.shutdown_timeout + _LAST_WORDS_S,
            self.failures.in_brief,
        )

    async def _settle_and_stop(self) -> None:
        """Wait for earlier failures, take the stacks of the other workers, then stop them."""
        looking = self._look(_STACKS_AFTER_FAILURE)
        self._stacks, _ = await asyncio.gather(looking, self._ledger.settle())
        self._stop(self._options.shutdown_timeout)

    async def _look_and_stop(self, grace_s: float) -> None:
        self.stacks_at_stop = await self._look(_STACKS_AT_CANCEL)
        self._stop(grace_s)

    async def _look(self, wanted: messages.StacksWanted) -> Stacks:
        """Return the workers' stacks. A bug here must not prevent the stop of the workers."""
        try:
            return await self._stragglers.stacks(wanted)
        except Exception as error:
            logger.warning("%s: no stacks of its workers", self._id.run_id, exc_info=error)
            return Stacks({})

    def _become(self, phase: Phase) -> None:
        """Enter a phase, unless the attempt is past it."""
        self._phase = max(phase, self._phase)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, *args))

    def _stop(self, grace_s: float) -> None:
        """Send SIGTERM, and SIGKILL after the grace time.

        A later call does nothing, unless its grace time ends earlier or is 0.
        """
        kills_at = asyncio.get_running_loop().time() + grace_s
        last = self._stop_order
        if last is None:
            self._stop_order = StopOrder(now_ns(), kills_at)
        elif grace_s == 0 or kills_at < last.kills_at:
            self._stop_order = StopOrder(last.first_ns, min(kills_at, last.kills_at))
        else:
            return
        self._become(Phase.STOPPING)
        self._timeline.is_stopping = True
        self._deaf = deaf = set[int]()
        for i, watching in enumerate(self._watching):
            if not watching.done() and self._cluster.is_ours():
                self._logs.tell(
                    self._crew.speaker(i, None), host_story.stop(grace_s), now_ns() / 1e9
                )
                deaf.add(i)
                self._begin(self._tell_to_stop(i, grace_s, deaf))
        self._later(grace_s + _LAST_WORDS_S, self._give_up)

    async def _tell_to_stop(self, host_index: int, grace_s: float, deaf: set[int]) -> None:
        stop = self._crew.agents[host_index].calls.stop
        with contextlib.suppress(RayError, ClusterLeft):  # the agent's link reports the reason
            await self._cluster.ask(stop, self._id, grace_s)
            deaf.discard(host_index)

    def _forget(self, host_index: int) -> None:
        """Give up a host's agent, which is ending, frozen or cut off. Ray reports this much later."""
        self._crew.agents[host_index].is_gone = True
        self._watching[host_index].cancel()

    def _give_up(self) -> None:
        """Give up the hosts that have not reported the end of their killed workers.

        A host that has reported the end is kept: its output may wait for the driver's terminal.
        """
        what = f"{_LAST_WORDS_S:g} s after SIGKILL the agent has not reported the end"
        evidence = "the machine is too busy, or it is frozen, or cut off, or a process is stuck in the kernel"
        for i, watching in enumerate(self._watching):
            if i not in self._over and not watching.done():
                self._lose(i, what, evidence)
                self._forget(i)

    def _give_up_silent(self) -> None:
        """Give up the agents whose last output is missing, unless the driver is still writing output."""
        if not self._logs.is_at_work:
            for i, watching in enumerate(self._watching):
                if not watching.done():
                    self._forget(i)
        else:
            self._later(_LAST_LINES_S, self._give_up_silent)

    def _give_up_deaf(self) -> None:
        """Give up the agents that have not confirmed the kill."""
        what = f"{_DEAF_S:g} s after it was told to kill the workers the agent has not answered"
        for i in sorted(self._deaf - self._over):
            if not self._watching[i].done():
                self._lose(i, what, "the machine is too busy, or it is frozen, swapping or cut off")
                self._forget(i)
