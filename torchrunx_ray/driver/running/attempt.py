"""One attempt of a run: start the workers, and return their values or the failures."""

import asyncio
import enum
import functools
import logging
import signal
from collections.abc import Sequence

from torchrunx_ray.driver.agents import clocks
from torchrunx_ray.driver.agents.agent_link import AgentLink
from torchrunx_ray.driver.agents.pool import AgentState, PooledAgent
from torchrunx_ray.driver.background.chores import Chores
from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output import host_story
from torchrunx_ray.driver.output.host_story import HostEvent
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.report import expired
from torchrunx_ray.driver.report.failures import DriverFailed, Failure, Failures, Report
from torchrunx_ray.driver.report.results import Value
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.report.stored import until_stored
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.report.workers import Workers
from torchrunx_ray.driver.running.crew import Crew, GroupPlan
from torchrunx_ray.driver.running.ledger import Ledger
from torchrunx_ray.driver.running.share import End, Share, ShareState
from torchrunx_ray.driver.running.silent_hosts import SilentHosts
from torchrunx_ray.driver.running.start_limits import StartLimits
from torchrunx_ray.driver.running.stop_request import StopRequest
from torchrunx_ray.driver.running.stopping import Stopping
from torchrunx_ray.driver.running.stragglers import Stragglers
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.stop_board import StopAsked, StopReason

logger = logging.getLogger("torchrunx_ray")

_STUCK_KILLED_S = 0.5
"""Time that a handler or terminal may take for one piece of output after a run is killed."""

_SILENT_STOP_S = 2.0
"""Time that a failed run may take to stop its workers before a warning names the failure."""

_ENDING_S = 0.8
"""Time for an agent that ends itself to report that its workers are gone."""

_ENDING_FOR_RESTART_S = 5.0
"""The same if another attempt may follow, which must not begin beside workers that may live on."""

_STACKS_AFTER_FAILURE = messages.StacksWanted(within_s=1.0, thread_s=0.1)
"""Limits for stacks after a failure. They arrive in milliseconds, or later if the machine is busy."""

_STACKS_BEFORE_RESTART = messages.StacksWanted(within_s=0.1, thread_s=0.1)
"""Limits for stacks if another attempt may follow, which waits for them. faulthandler is not asked."""

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


class Asked(enum.IntEnum):
    """The last order of the user to a run."""

    TO_GO_ON = 0
    TO_STOP = 1
    """Workers get SIGTERM, and SIGKILL after `shutdown_timeout`."""
    TO_DIE = 2
    """Workers get SIGKILL."""


class Attempt:
    """One attempt of a run: its phase, its hosts' shares, its failures."""

    def __init__(
        self,
        id_: messages.AttemptId,
        options: Options,
        crew: Crew,
        backend: str | None,
        timeline: Timeline,
        logs: RunLogs,
        restarts: int = 0,
        restarted: messages.Restarted | None = None,
        plan: GroupPlan | None = None,
    ) -> None:
        self._id = id_
        self._plan = plan
        self._restarts = restarts
        self._restarted = restarted
        self._options = options
        self._crew = crew
        self._backend = backend
        self._timeline = timeline
        self._logs = logs
        timeline.begin_attempt(crew.hostnames, crew.places)
        self.workers = Workers(id_.number, crew.hostnames, crew.places)
        self.are_forked = asyncio.Event()
        """Set once all workers are forked."""
        self._phase = Phase.STARTING
        self._asked = Asked.TO_GO_ON
        self._chores = Chores()
        self._stragglers = Stragglers(id_, crew)
        self._ledger = Ledger(crew)
        self._shares = [
            Share(i, host.label, crew.agents[i], id_) for i, host in enumerate(crew.hosts)
        ]
        self.silent_hosts = SilentHosts(
            id_, options, crew, self._shares, self._chores, self._fail_host
        )
        self._stopping = Stopping(self._shares, logs, self._chores, self.silent_hosts)
        self._limits = StartLimits(self._shares, crew, timeline, options)
        self._stopped: dict[int, str] = {}
        """Ranks that the run itself has stopped, with their hosts."""
        self.stop_request = StopRequest(self._shares)
        self._sizes: dict[tuple[int, int], int] = {}
        """Sizes of the values, by host index and local rank."""
        self._stacks = Stacks({})
        """Stacks of the workers at the first failure."""
        self.stop_signal = signal.SIGTERM
        """The signal by which a cancellation stops the workers."""
        self.stacks_at_stop = Stacks({})
        """Stacks of the workers when the run was cancelled."""

    async def go(self, call: Call) -> None:
        """Run the call. Return when no worker lives, and all output has been sent.

        A failure or a cancellation stops the workers. A second cancellation kills the workers.
        """
        try:
            self._chores.begin(clocks.compare(self._crew.agents))
            self._chores.begin(self.silent_hosts.watch())
            watching = [share.watch(self._watch(share, call)) for share in self._shares]
            self._limits.begin(self._chores, self._is_starting, self._lose)
            await to_the_end(asyncio.wait(watching), self.note_cancellation)
            for task in watching:
                if not task.cancelled():
                    task.result()
        finally:
            self._become(Phase.ENDED)
            self._stragglers.close()
            self._chores.close()
            self.silent_hosts.close()
            for share in self._shares:
                share.close()

    async def outcome(self) -> list[list[Value]] | Failures:
        """Return every rank's value, by host, or the failures."""
        if (failures := self.failures) is not None:
            return failures
        values = [(share.label, share.values) for share in self._shares]
        await until_stored(self._id.run_id, values, self._crew.agents[0].connection)
        return [
            [
                Value(ref, self._sizes.get((share.index, k), 0), host.node)
                for k, ref in enumerate(share.values)
            ]
            for share, host in zip(self._shares, self._crew.hosts, strict=True)
        ]

    @property
    def failures(self) -> Failures | None:
        """All failures so far; None if there are none."""
        return self._with_context(self._ledger.all())

    @property
    def failures_before_stop(self) -> Failures | None:
        """Failures from before the cancellation, since later ones may be its consequence.

        All failures if the run was not cancelled; None if there are none.
        """
        return self._with_context(self._ledger.before_cancellation())

    def _with_context(self, failures: list[Failure]) -> Failures | None:
        if not failures:
            return None
        stopped = [f"rank {rank} on {label}" for rank, label in sorted(self._stopped.items())]
        order = self._stopping.order
        stopped_at_ns = None if order is None else order.first_ns
        started = frozenset(self._timeline.started)
        stacks = Stacks(self._stacks.by_rank, self._timeline.finished)
        return Failures(failures, stopped, stacks, self._logs.directory, stopped_at_ns, started)

    @property
    def broken(self) -> set[PooledAgent]:
        """Agents that cannot be used again."""
        return {share.agent for share in self._shares if share.is_broken}

    async def stacks(self) -> Stacks:
        """Return the stacks of the living workers."""
        return await self._stragglers.stacks()

    @property
    def was_cancelled(self) -> bool:
        return self._asked is not Asked.TO_GO_ON

    def note_cancellation(self) -> None:
        """Stop the run; kill it if it is being stopped."""
        self._ask(Asked.TO_DIE if self.was_cancelled else Asked.TO_STOP)

    def kill(self) -> None:
        """Kill the workers, and wait only a moment for their last output."""
        self._ask(Asked.TO_DIE)

    @property
    def have_all_returned(self) -> bool:
        return len(self._timeline.finished) == len(self._crew.places)

    def ask_to_stop(self, reason: StopReason, within_s: float | None) -> bool:
        """Ask the function to return. After `within_s`, unless it is None, stop the workers that are left.

        Does nothing and returns False if the last request is as urgent. A more urgent request has its own time.
        A resize is not worth it once the attempt comes to its end: the work of ranks that have returned would be lost.
        """
        is_near_end = self._phase >= Phase.SETTLING or bool(self._timeline.finished)
        if self._phase is Phase.ENDED or (reason == "resize" and is_near_end):
            return False
        if (asked := self.stop_request.make(reason, within_s)) is None:
            return False
        for share in self._shares:
            who = self._crew.speaker(share.index, None)
            self._logs.tell(who, host_story.ask_to_stop(reason, within_s), now_ns() / 1e9)
        if within_s is not None:
            self._chores.later(within_s, self._stop_if_last, asked)
        return True

    def stop_for_another(self) -> None:
        """Stop the workers, since another attempt will follow. This is no cancellation, which would hurry the output."""
        if self._phase is not Phase.ENDED:
            self.stop_request.make(
                "resize", self._stopping.grace_left_s(self._options.shutdown_timeout)
            )
            self._stop(self._options.shutdown_timeout)

    def _stop_if_last(self, asked: StopAsked) -> None:
        if self.stop_request.asked is asked:
            self._stop(self._options.shutdown_timeout)

    def _ask(self, asked: Asked) -> None:
        if asked <= self._asked:
            return
        was_cancelled, self._asked = self.was_cancelled, asked
        if not was_cancelled:
            self._ledger.note_cancellation()
            self._bound_last_lines()
        if asked is Asked.TO_STOP:
            if self._phase is not Phase.ENDED:
                self._chores.begin(self._look_and_stop())
            return
        if self._phase is not Phase.ENDED:
            self._stop(0)
            self._stopping.give_up_deaf(self._lose)
        self._logs.hurry(_STUCK_KILLED_S)

    def _bound_last_lines(self) -> None:
        if self.was_cancelled and all(share.is_over for share in self._shares):
            self._stopping.bound_last_lines()

    def _wanted(self, share: Share, call: Call) -> messages.ShareWanted:
        plan, leases = self._plan, self.silent_hosts.leases
        places = self._crew.layout[share.index]
        own: Sequence[dict[str, str]] = ()
        if plan is not None:
            before = places[0].rank - plan.part.first_rank
            own = plan.variables[before : before + len(places)]
        worker = messages.WorkerWanted(
            attempt=self._id,
            hostname=share.label,
            store=self._store,
            backend=self._backend,
            timeout=self._options.timeout,
            argv=call.argv,
            log_level=self._logs.level,
            restarts=self._restarts,
            max_restarts=self._options.max_restarts,
            may_be_restarted=self._may_be_restarted,
        )
        return messages.ShareWanted(
            worker=worker,
            places=tuple(places),
            own_variables=tuple(own),
            serves_store=share.index == 0 and (plan is None or plan.store is None),
            gpu_ids=self._crew.gpu_ids[share.index],
            gpus_per_worker=self._crew.hosts[share.index].gpus_per_worker,
            forks_when_told=self._forks_when_told,
            restarted=self._restarted if share.index == 0 else None,
            first_lease_s=None if leases is None else leases.first_s(share.agent),
            blocked_after_s=0 if plan is None else plan.blocked_after_s,
        )

    @property
    def _store(self) -> tuple[str, int]:
        if self._plan is not None and self._plan.store is not None:
            return self._plan.store
        return self._crew.store

    async def _watch(self, share: Share, call: Call) -> None:
        hear = functools.partial(self._hear, share)
        link = AgentLink(share.agent, share.label, self._logs, share.ranks_by_pid, hear)
        try:
            failed = await link.hold(self._wanted(share, call), call)
        except Exception as error:
            failed = DriverFailed("talked with an agent", error)
        finally:
            share.values = link.values
            self._share_becomes(share, ShareState.LOST)
            if link.has_agent_died:
                share.note_end(End.WITH_AGENT)
        if failed is not None:
            self._fail(share, None, None, failed)

    def _hear(self, share: Share, event: messages.Event) -> None:
        """Handle an event. A bug here must not prevent the handling of later events."""
        try:
            self._handle(share, event)
        except (Exception, SystemExit) as error:
            # SystemExit may come from a log handler of the driver.
            doing = f"handled {type(event).__name__} of an agent"
            self._fail(share, None, None, DriverFailed(doing, error))

    def _handle(self, share: Share, event: messages.Event) -> None:
        self._note(share, event)
        match event:
            case messages.Printed():
                who = self._crew.speaker(share.index, event.local_rank)
                time_s = share.agent.on_ours(event.time_ns) / 1e9
                self._logs.put(who, event.stream, event.data, time_s)
            case messages.CanFork():
                self._share_becomes(share, ShareState.READY)
            case messages.WorkersForked() if self.workers.have_pids:
                self.are_forked.set()
            case messages.Joined():
                if len(self._timeline.joined) == len(self._crew.places):
                    self._become(Phase.RUNNING)
            case messages.Started():
                share.ranks_by_pid[event.pid] = self._crew.rank(share.index, event.local_rank)
                if (leases := self.silent_hosts.leases) is not None and self._all_have_started:
                    leases.take_soon()
            case messages.Finished():
                rank = self._crew.rank(share.index, event.local_rank)
                self._sizes[share.index, event.local_rank] = event.size
                self._stragglers.has_returned(rank)
                if event.has_seen_stop:
                    self.stop_request.seen_by.add(rank)
                self._ledger.look_for_others(self._timeline.finished)
            case messages.Failed():
                self._fail(share, event.local_rank, event.time_ns, event)
            case messages.Died():
                self._has_died(share, event)
            case messages.ScopeExpired() if event.signal > 0:
                self._fail(share, event.local_rank, event.time_ns, event)
            case messages.ScopeExpired():
                rank = self._crew.rank(share.index, event.local_rank)
                logger.warning("rank %d on %s %s", rank, share.label, expired.in_words(event))
            case messages.AgentFailed():
                self._fail(share, None, event.time_ns, event)
                if event.is_ending:
                    share.agent.state = AgentState.GONE
                    self.silent_hosts.refuse(share)
                    ending_s = _ENDING_FOR_RESTART_S if self._options.may_restart else _ENDING_S
                    self._chores.later(ending_s, share.give_up)
            case messages.TemplateRefused():
                self._fail(share, None, None, event)
            case messages.HostEnded():
                self._share_becomes(share, ShareState.OVER)
                share.note_end(End.NOT_KILLED if event.left else End.REPORTED)
                if event.left:
                    logger.warning(
                        "%s: SIGKILL did not end the processes %s, which are blocked in the kernel",
                        share.label,
                        ", ".join(map(str, event.left)),
                    )
            case messages.OutputEnded():
                self._share_becomes(share, ShareState.DONE)
            case _:
                pass  # a normal step of a worker

    def _note(self, share: Share, event: messages.Event) -> None:
        about = event.exited if isinstance(event, messages.Died) else event
        local_rank: int | None = getattr(about, "local_rank", None)
        rank = None if local_rank is None else self._crew.rank(share.index, local_rank)
        self._timeline.hear(share.index, rank, event, share.agent.ahead_ns)
        is_stopped = self._stopping.explains(event, share.agent.on_ours)
        self.workers.hear(share.index, event, is_stopped=is_stopped)
        if not isinstance(event, messages.AgentFailed | messages.TemplateRefused):  # see `_fail`
            self._tell_of_host(share, rank, event)

    def _tell_of_host(self, share: Share, rank: int | None, event: HostEvent) -> None:
        begun_ns = self._timeline.begun_ns
        line, time_ns = host_story.line_of(event, rank, share.agent.on_ours, begun_ns)
        if line:
            self._logs.tell(self._crew.speaker(share.index, None), line, time_ns / 1e9)

    def _has_died(self, share: Share, died: messages.Died) -> None:
        exited = died.exited
        assert exited.local_rank is not None
        died_at_ns = share.agent.on_ours(exited.time_ns)
        if self._stopping.has_sent(exited.signal, died_at_ns):
            self._stopped[self._crew.rank(share.index, exited.local_rank)] = share.label
        else:
            self._fail(share, exited.local_rank, exited.time_ns, died)

    def _share_becomes(self, share: Share, state: ShareState) -> None:
        was_over = share.is_over
        share.become(state)
        if share.state is ShareState.LOST:
            self.workers.lose(share.index)
        if share.is_over and not was_over:
            self._bound_last_lines()
            self._tell_server()
        if all(share.state is ShareState.READY for share in self._shares):
            self._let_them_join()

    def _tell_server(self) -> None:
        """Tell the first host, which serves the store, if no worker of the others is left to use it."""
        first, *others = self._shares
        is_alone = not first.is_over and all(share.is_over for share in others)
        if is_alone and others and first.agent.state is not AgentState.GONE:
            first.agent.connection.tell(first.agent.calls.others_have_ended, self._id)

    @property
    def _may_be_restarted(self) -> bool:
        return self._restarts < self._options.max_restarts or self._options.is_elastic

    @property
    def _all_have_started(self) -> bool:
        return len(self._timeline.started) == len(self._crew.places)

    @property
    def _forks_when_told(self) -> bool:
        return self._backend is not None and len(self._crew.hosts) > 1

    def _let_them_join(self) -> None:
        """Make the hosts fork, now that all can, and start the group's timeout."""
        self._become(Phase.JOINING)
        if self._backend is not None:
            self._chores.later(self._options.timeout, self._check_joined)
        if self._forks_when_told:
            for agent in self._crew.agents:
                agent.connection.tell(agent.calls.fork, self._id)

    def _is_starting(self) -> bool:
        return self._phase is Phase.STARTING and not self.was_cancelled

    def _check_joined(self) -> None:
        """Tell who is missing, also if those who waited for them have just given up."""
        waits = self._phase in (Phase.JOINING, Phase.SETTLING)
        if not waits or self._ledger.cause_is_known.is_set() or self.was_cancelled:
            return
        if (missing := self._limits.not_joined()) is not None:
            share, report = missing
            self._fail(share, None, None, report)

    def _lose(self, share: Share, what: str, evidence: str) -> None:
        self._fail(share, None, None, messages.AgentFailed(now_ns(), what, evidence))

    def _fail_host(self, share: Share, time_ns: int, report: messages.AgentFailed) -> None:
        self._fail(share, None, time_ns, report)

    def _fail(
        self, share: Share, local_rank: int | None, time_ns: int | None, report: Report
    ) -> None:
        """Note a failure. Its time is on its host's clock; None means now, on the driver's clock."""
        if not self._ledger:
            self._become(Phase.SETTLING)
            self._stragglers.close()
            self._chores.begin(self._settle_and_stop())
            if not self.was_cancelled and self._stopping.order is None:
                self._chores.later(_SILENT_STOP_S, self._tell_of_failure)
        self._ledger.add(share.index, local_rank, time_ns, report)
        if local_rank is None:
            self._tell_of_host(share, None, report)
        self._ledger.look_for_others(self._timeline.finished)

    def _tell_of_failure(self) -> None:
        """Warn of the failure while workers stop, which `shutdown_timeout` may make slow."""
        assert self.failures is not None
        logger.warning(
            "%s has failed, and is stopping its workers%s, for %g s at most: %s",
            self._id.run_id,
            " before it may start again" if self._restarts < self._options.max_restarts else "",
            self._stopping.longest_s(self._options.shutdown_timeout),
            self.failures.in_brief,
        )

    async def _settle_and_stop(self) -> None:
        """Wait for earlier failures, take the stacks of the other workers, then stop them."""
        in_haste = self._may_be_restarted
        looking = self._look(_STACKS_BEFORE_RESTART if in_haste else _STACKS_AFTER_FAILURE)
        settling = self._ledger.settle(in_haste=in_haste)
        self._stacks, _ = await asyncio.gather(looking, settling)
        self._stop(self._options.shutdown_timeout)

    async def _look_and_stop(self) -> None:
        grace_s = self._options.shutdown_timeout
        self.stop_request.make("cancel", self._stopping.grace_left_s(grace_s))
        self.stacks_at_stop = await self._look(_STACKS_AT_CANCEL)
        self._stop(grace_s, self.stop_signal)

    async def _look(self, wanted: messages.StacksWanted) -> Stacks:
        """Return the workers' stacks. A bug here must not prevent the stop of the workers."""
        try:
            return await self._stragglers.stacks(wanted)
        except Exception as error:
            logger.warning(
                "%s: could not get the stacks of its workers", self._id.run_id, exc_info=error
            )
            return Stacks({})

    def _stop(self, grace_s: float, signum: signal.Signals = signal.SIGTERM) -> None:
        self._become(Phase.STOPPING)
        self._timeline.is_stopping = True
        for share in self._stopping.stop(grace_s, signum, self._lose):
            who = self._crew.speaker(share.index, None)
            self._logs.tell(who, host_story.stop(grace_s, signum), now_ns() / 1e9)

    def _become(self, phase: Phase) -> None:
        """Enter a phase, unless the attempt is past it."""
        self._phase = max(phase, self._phase)
