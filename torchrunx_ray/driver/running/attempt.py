"""One attempt of a run: workers start, the first failure or every value comes back."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from torchrunx_ray.driver.agents.agent_link import AgentLink
from torchrunx_ray.driver.agents.clocks import Clocks
from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output import host_story
from torchrunx_ray.driver.output.host_story import HostEvent
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.output.speaker import Speaker
from torchrunx_ray.driver.placing.placement import Host
from torchrunx_ray.driver.report.failures import DriverFailed, Failure, Failures, NotJoined, Report
from torchrunx_ray.driver.report.results import Value
from torchrunx_ray.driver.report.stacks import Stacks
from torchrunx_ray.driver.report.stored import until_stored
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.running.stragglers import Stragglers
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.ranks import Place, lay_out

logger = logging.getLogger("torchrunx_ray")

_SETTLING_S = 0.1
"""How long an earlier failure may take to arrive after a later one."""

_CAUSE_S = 0.5
"""How much longer a failure may take to arrive that errors in collectives came of."""

_LAST_WORDS_S = 12.0
"""How long after SIGKILL a host may take to report its end before it is given up.

Longer than a template waits for a process that gives back much memory.
"""

_DEAF_S = 1.0
"""How long after a second cancellation an agent may take to hear that it shall kill."""

_LAST_LINES_S = 5.0
"""How long a handler or terminal may take for the last output of a cancelled run.

As long again its agent may take to send it.
"""

_STUCK_S = 2.0
"""How long a handler or terminal may keep one piece of output after that."""

_STUCK_KILLED_S = 0.5
"""The same when a run is killed."""

_SLOW_START_S = 60.0
"""How long a host may take until it can fork before that is told."""

_START_S = 1800.0
"""How long a host may take until it can fork before the run fails."""

_SILENT_STOP_S = 2.0
"""For how long failed runs may stop what is left of them before anybody is told why."""

_ENDING_S = 0.8
"""For an agent that ends itself to say that its workers are gone."""

_STACKS_AFTER_FAILURE = messages.StacksWanted(within_s=1.0, thread_s=0.1)
"""They come in milliseconds, and later from a machine that is busy."""

_STACKS_AT_CANCEL = messages.StacksWanted(within_s=0.5, thread_s=0.1)
"""A person waits."""


@dataclass(frozen=True)
class Crew:
    """Hosts of an attempt, and by the same index their agents, what these said, their GPUs."""

    hosts: Sequence[Host]
    agents: Sequence[PooledAgent]
    met: Sequence[messages.Met]
    gpu_ids: Sequence[tuple[str, ...]]


class Attempt:
    """Everything that belongs to one try at a run: addresses, failures, hosts that ended."""

    def __init__(
        self,
        run_id: str,
        options: Options,
        crew: Crew,
        backend: str | None,
        timeline: Timeline,
    ) -> None:
        self._run_id = run_id
        self._options = options
        self._crew = crew
        self._backend = backend
        self._cluster = Connection()
        self._layout = lay_out([host.workers for host in crew.hosts])
        self._timeline = timeline
        timeline.hostnames = [host.label for host in crew.hosts]
        timeline.places = self._places()
        self._clocks = Clocks(crew.agents)
        self._stragglers = Stragglers(run_id, crew.agents, self._layout)
        self._failed: list[tuple[int | None, Failure]] = []
        """With the hosts on whose clocks their times are; None for the driver's."""
        self._cause_is_known = asyncio.Event()
        """A failure is there that is no error in a collective, or each rank has failed or returned."""
        self._stopped_at_ns: int | None = None
        self._kills_at = math.inf
        """Time of the loop at which SIGKILL follows."""
        self._deaf: set[int] = set()
        """Hosts, by index, whose agents have not confirmed the last stop that they were told."""
        self._tasks: set[asyncio.Task[None]] = set()
        """They end with the attempt."""
        self._stopped: dict[int, str] = {}
        """Ranks that the run itself has stopped, with their hosts."""
        self._timers: list[asyncio.TimerHandle] = []
        self._watching: list[asyncio.Task[None]] = []
        self._sizes: dict[tuple[int, int], int] = {}
        self._can_fork: set[int] = set()
        """Hosts, by index, of which the workers can be forked."""
        self._pids: list[dict[int, int]] = [{} for _ in crew.hosts]
        """Ranks of each host by pid."""
        self._stacks = Stacks({})
        self._failed_before_cancel: int | None = None
        """How many failures were known when the run was cancelled; None if it was not."""
        self._is_to_be_killed = False
        self.stacks_at_stop = Stacks({})
        """Stacks of the workers when the run was cancelled."""
        self._over: set[int] = set()
        """Hosts, by index, of whose workers none lives, or that nobody will hear of any more."""
        self.broken: set[int] = set(range(len(crew.hosts)))
        """Hosts whose agent cannot be used again: it has not said all that it had to say."""

    async def go(self, call: Call) -> list[list[Value]] | Failures:
        """Every rank's value, by host, or what failed.

        On cancellation, as on failure, it returns only when no worker lives; a cancellation after
        `kill`, or a second one, kills them.
        """
        self._logs = RunLogs(
            self._run_id, self._options, call.log_handlers, call.files, self._speakers()
        )
        try:
            links = [
                AgentLink(
                    self._crew.agents[i],
                    host.label,
                    self._logs,
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
        finally:
            self._stragglers.close()
            for timer in self._timers:
                timer.cancel()
            for task in (*self._tasks, *self._watching):
                task.cancel()
            await self._drain_logs()
        if (failures := self.failures) is not None:
            return failures
        hosts = zip(self._crew.hosts, links, strict=True)
        values = [(host.label, link.values) for host, link in hosts]
        await until_stored(self._run_id, values, self._cluster)
        return [
            [Value(ref, self._sizes.get((i, k), 0), host.node) for k, ref in enumerate(link.values)]
            for i, (host, link) in enumerate(zip(self._crew.hosts, links, strict=True))
        ]

    @property
    def log_directory(self) -> Path | None:
        """With the default files, once something was written to them."""
        logs: RunLogs | None = getattr(self, "_logs", None)  # none before `go`
        return None if logs is None else logs.directory

    @property
    def failures(self) -> Failures | None:
        """All that has failed so far."""
        return self._first_failures(None)

    @property
    def failures_before_stop(self) -> Failures | None:
        """Failures from before the cancellation, if there was one: later ones are its consequence."""
        return self._first_failures(self._failed_before_cancel)

    def _first_failures(self, count: int | None) -> Failures | None:
        failures = [self._on_our_clock(*failure) for failure in self._failed[:count]]
        if not failures:
            return None
        stopped = [f"rank {rank} on {label}" for rank, label in sorted(self._stopped.items())]
        return Failures(failures, stopped, self._stacks, self.log_directory, self._stopped_at_ns)

    def _on_our_clock(self, host_index: int | None, failure: Failure) -> Failure:
        """Only now: the clocks may not have been compared yet when it was heard of."""
        if host_index is None:
            return failure
        time_ns = self._clocks.on_ours(host_index, failure.time_ns)
        return dataclasses.replace(failure, time_ns=time_ns)

    def kill(self) -> None:
        """Let the next cancellation kill the workers."""
        self._is_to_be_killed = True

    async def stacks(self) -> Stacks:
        """Return the stacks of the workers that live."""
        return await self._stragglers.stacks()

    async def _until_ended(self) -> None:
        cancelled: asyncio.CancelledError | None = None
        for grace_s in (self._options.shutdown_timeout, 0, 0):
            try:
                await asyncio.wait(self._watching)
                break
            except asyncio.CancelledError as error:
                if self._is_first_cancellation():
                    self._begin(self._look_and_stop(grace_s))
                else:
                    self._stop(0)
                    self._later(_DEAF_S, self._give_up_deaf)
                    self._logs.hurry(_STUCK_KILLED_S)
                cancelled = error
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled  # it refers to this frame, and must not wait for Python's gc
        for watching in self._watching:
            if not watching.cancelled():
                watching.result()

    def _is_first_cancellation(self) -> bool:
        """Take note of a cancellation; False for one that kills."""
        if self._was_cancelled:
            return False
        self._failed_before_cancel = len(self._failed)
        self._bound_last_lines()
        return not self._is_to_be_killed

    def _bound_last_lines(self) -> None:
        """Let nobody who cancelled a run wait long for a handler that blocks, or a stopped terminal."""
        if self._was_cancelled and len(self._over) == len(self._crew.hosts):
            loop = asyncio.get_running_loop()
            loop.call_later(_LAST_LINES_S, self._logs.hurry, _STUCK_S)
            self._later(2 * _LAST_LINES_S, self._give_up_silent)

    @property
    def _was_cancelled(self) -> bool:
        return self._failed_before_cancel is not None

    async def _drain_logs(self) -> None:
        """All of it, unless the run is cancelled."""
        draining = asyncio.ensure_future(self._logs.drain())
        loop = asyncio.get_running_loop()
        telling = loop.call_later(_SILENT_STOP_S, self._tell_of_last_lines)
        cancelled: asyncio.CancelledError | None = None
        while not draining.done():
            try:
                await asyncio.shield(draining)
            except asyncio.CancelledError as error:
                if not self._is_first_cancellation():
                    self._logs.hurry(_STUCK_KILLED_S)
                cancelled = error
        telling.cancel()
        try:
            if cancelled is not None:
                raise cancelled
        finally:
            del cancelled  # it refers to this frame

    def _wanted(self, host_index: int, call: Call) -> messages.RunWanted:
        master = self._crew.met[0]
        assert master.master_port is not None
        host = self._crew.hosts[host_index]
        return messages.RunWanted(
            run_id=self._run_id,
            hostname=host.label,
            places=tuple(self._layout[host_index]),
            master_addr=master.ip,
            master_port=master.master_port,
            backend=self._backend,
            timeout=self._options.timeout,
            gpu_ids=self._crew.gpu_ids[host_index],
            gpus_per_worker=host.gpus_per_worker,
            argv=call.argv,
            log_level=self._logs.level,
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
        """Handle an event; a bug must not keep the others, and this host's end, from being heard."""
        try:
            self._handle(host_index, event)
        except (
            Exception,
            SystemExit,
        ) as error:  # the latter from a handler of the driver's logging
            doing = f"handled {type(event).__name__} of an agent"
            self._fail(host_index, None, None, DriverFailed(doing, error))

    def _handle(self, host_index: int, event: messages.Event) -> None:
        self._note(host_index, event)
        match event:
            case messages.Printed():
                who = self._speaker(host_index, event.local_rank)
                time_ns = self._clocks.on_ours(host_index, event.time_ns)
                self._logs.put(who, event.stream, event.data, time_ns / 1e9)
            case messages.CanFork():
                self._can_fork_at(host_index)
            case messages.Started():
                self._pids[host_index][event.pid] = self._layout[host_index][event.local_rank].rank
            case messages.Finished():
                self._sizes[host_index, event.local_rank] = event.size
                self._stragglers.has_returned(self._layout[host_index][event.local_rank].rank)
                self._look_for_others()
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
                pass  # the steps of a worker that is well

    def _note(self, host_index: int, event: messages.Event) -> None:
        about = event.exited if isinstance(event, messages.Died) else event
        local_rank: int | None = getattr(about, "local_rank", None)
        rank = None if local_rank is None else self._layout[host_index][local_rank].rank
        self._timeline.hear(host_index, rank, event, -self._clocks.on_ours(host_index, 0))
        if not isinstance(event, messages.AgentFailed | messages.TemplateRefused):  # see `_fail`
            self._tell_of_host(host_index, rank, event)

    def _tell_of_host(self, host_index: int, rank: int | None, event: HostEvent) -> None:
        on_ours = functools.partial(self._clocks.on_ours, host_index)
        line, time_ns = host_story.line_of(event, rank, on_ours, self._timeline.begun_ns)
        if line:
            self._logs.tell(self._speaker(host_index, None), line, time_ns / 1e9)

    def _speaker(self, host_index: int, local_rank: int | None) -> Speaker:
        rank = None if local_rank is None else self._layout[host_index][local_rank].rank
        return Speaker(self._crew.hosts[host_index].label, local_rank, rank, host_index == 0)

    def _speakers(self) -> list[Speaker]:
        hosts = range(len(self._crew.hosts))
        templates = [self._speaker(host_index, None) for host_index in hosts]
        return templates + [self._speaker(p.host_index, p.local_rank) for p in self._places()]

    def _has_died(self, host_index: int, died: messages.Died) -> None:
        exited = died.exited
        assert exited.local_rank is not None
        if self._has_sent(exited.signal, self._clocks.on_ours(host_index, exited.time_ns)):
            rank = self._layout[host_index][exited.local_rank].rank
            self._stopped[rank] = self._crew.hosts[host_index].label
        else:
            self._fail(host_index, exited.local_rank, exited.time_ns, died)

    def _has_sent(self, signal_number: int | None, died_at_ns: int) -> bool:
        """Return whether a worker that this signal ended may have been stopped by the run itself."""
        if self._stopped_at_ns is None or died_at_ns <= self._stopped_at_ns:
            return False
        if signal_number == signal.SIGKILL:
            return asyncio.get_running_loop().time() >= self._kills_at
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
        """The store is served as long as a worker of another host may ask it."""
        if host_index in self._over:
            return
        self._over.add(host_index)
        self._bound_last_lines()
        serving = self._crew.agents[0]
        alone = self._over == set(range(1, len(self._crew.hosts)))
        if alone and not serving.is_gone:
            self._cluster.tell(serving.calls.others_have_ended, self._run_id)

    @property
    def _forks_when_told(self) -> bool:
        return self._backend is not None and len(self._crew.hosts) > 1

    def _can_fork_at(self, host_index: int) -> None:
        """Have the hosts fork, and the group's timeout begin, as soon as all hosts can fork."""
        self._can_fork.add(host_index)
        if len(self._can_fork) < len(self._crew.hosts):
            return
        if self._backend is not None:
            self._later(self._options.timeout, self._check_joined)
        if self._forks_when_told:
            for agent in self._crew.agents:
                self._cluster.tell(agent.calls.fork, self._run_id)

    def _check_can_fork(self, waited_s: float, is_enough: bool) -> None:
        """Tell which hosts keep the others waiting; and fail after very long."""
        if self._failed or self._was_cancelled:
            return
        for i in set(range(len(self._crew.hosts))) - self._can_fork - self._over:
            what = f"{waited_s:g} s after the run began no worker can be forked"
            if i in self._timeline.loaded:
                why = "the function and its arguments are still on their way to its template"
            else:  # an agent hears of the run when the arguments are there
                preload = ", ".join(self._options.preload)
                of_template = f"still imports {preload}" if preload else "is still being started"
                why = f"its template {of_template}, or the arguments are still on their way there"
            if is_enough:
                self._lose(i, what, why)
            else:
                logger.warning("%s: %s: %s", self._crew.hosts[i].label, what, why)

    def _check_joined(self) -> None:
        """Tell who is missing, also if those who waited for them have just given up."""
        if self._cause_is_known.is_set() or self._was_cancelled or self._stopped_at_ns is not None:
            return
        missing = {
            place.rank: self._crew.hosts[place.host_index].label
            for place in self._places()
            if place.rank not in self._timeline.joined
        }
        if missing:
            host_index = next(p.host_index for p in self._places() if p.rank in missing)
            not_joined = NotJoined(self._options.timeout, missing)
            self._fail(host_index, None, None, not_joined)

    def _lose(self, host_index: int, what: str, evidence: str) -> None:
        self._fail(host_index, None, None, messages.AgentFailed(now_ns(), what, evidence))

    def _fail(
        self, host_index: int, local_rank: int | None, time_ns: int | None, report: Report
    ) -> None:
        """Take note of a failure, whose time is on its host's clock; None for one that we see now."""
        if not self._failed:
            self._stragglers.close()
            self._begin(self._settle_and_stop())
            if not self._was_cancelled:
                self._later(_SILENT_STOP_S, self._tell_of_failure)
        rank = None if local_rank is None else self._layout[host_index][local_rank].rank
        label = self._crew.hosts[host_index].label
        if time_ns is None:
            self._failed.append((None, Failure(now_ns(), label, rank, report)))
        else:
            self._failed.append((host_index, Failure(time_ns, label, rank, report)))
        if rank is None:
            self._tell_of_host(host_index, None, report)
        if not (isinstance(report, messages.Failed) and report.in_collective):
            self._cause_is_known.set()
        self._look_for_others()

    def _look_for_others(self) -> None:
        """Wait for no cause if each rank has failed or returned."""
        failed = {failure.rank for _, failure in self._failed}
        if all(p.rank in failed or p.rank in self._timeline.finished for p in self._places()):
            self._cause_is_known.set()

    def _tell_of_failure(self) -> None:
        """Workers may take long to stop, as long as `shutdown_timeout` lets them save their work."""
        assert self.failures is not None
        logger.warning(
            "%s has failed, and stops what is left of it, for %g s at most: %s",
            self._run_id,
            self._options.shutdown_timeout + _LAST_WORDS_S,
            self.failures.in_brief,
        )

    def _tell_of_last_lines(self) -> None:
        """A failure must not be kept back with the output."""
        if self.failures is not None and not self._was_cancelled:
            logger.warning(
                "%s has failed, and still waits for a terminal or a handler of logging that does not take what "
                "the workers said: %s",
                self._run_id,
                self.failures.in_brief,
            )

    async def _settle_and_stop(self) -> None:
        """Wait for earlier failures, and for what the others are doing while they still do it."""
        looking = self._look(_STACKS_AFTER_FAILURE)
        self._stacks, _ = await asyncio.gather(looking, self._settle())
        self._stop(self._options.shutdown_timeout)

    async def _settle(self) -> None:
        """Let earlier failures arrive, and what errors in collectives came of."""
        await asyncio.sleep(_SETTLING_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CAUSE_S):
                await self._cause_is_known.wait()

    async def _look_and_stop(self, grace_s: float) -> None:
        self.stacks_at_stop = await self._look(_STACKS_AT_CANCEL)
        self._stop(grace_s)

    async def _look(self, wanted: messages.StacksWanted) -> Stacks:
        """Ask for what the others do; a bug in that must not keep them from being stopped."""
        try:
            return await self._stragglers.stacks(wanted)
        except Exception as error:
            logger.warning("%s: no stacks of its workers", self._run_id, exc_info=error)
            return Stacks({})

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, *args))

    def _places(self) -> list[Place]:
        return [place for places in self._layout for place in places]

    def _stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace. SIGTERM again only with a shorter one."""
        kills_at = asyncio.get_running_loop().time() + grace_s
        if grace_s > 0 and kills_at >= self._kills_at:
            return
        self._kills_at = min(kills_at, self._kills_at)
        if self._stopped_at_ns is None:
            self._stopped_at_ns = now_ns()
        self._timeline.is_stopping = True
        self._deaf = deaf = set[int]()
        for i, watching in enumerate(self._watching):
            if not watching.done() and self._cluster.is_ours():
                self._logs.tell(self._speaker(i, None), host_story.stop(grace_s), now_ns() / 1e9)
                deaf.add(i)
                self._begin(self._tell_to_stop(i, grace_s, deaf))
        self._later(grace_s + _LAST_WORDS_S, self._give_up)

    async def _tell_to_stop(self, host_index: int, grace_s: float, deaf: set[int]) -> None:
        stop = self._crew.agents[host_index].calls.stop
        with contextlib.suppress(RayError, ClusterLeft):  # the link to that agent tells why
            await self._cluster.ask(stop, self._run_id, grace_s)
            deaf.discard(host_index)

    def _forget(self, host_index: int) -> None:
        """Ask its agent nothing more: it ends, is frozen or cut off, which Ray tells much later."""
        self._crew.agents[host_index].is_gone = True
        self._watching[host_index].cancel()

    def _give_up(self) -> None:
        """Wait no longer for hosts that do not even report the end of killed workers.

        One that has done so may have more to say than the driver's terminal takes just now.
        """
        what = f"{_LAST_WORDS_S:g} s after SIGKILL the agent has not reported the end"
        evidence = "the machine is too busy, or it is frozen, or cut off, or a process is stuck in the kernel"
        for i, watching in enumerate(self._watching):
            if i not in self._over and not watching.done():
                self._lose(i, what, evidence)
                self._forget(i)

    def _give_up_silent(self) -> None:
        """Wait no longer for the last output of agents that do not answer, though nothing keeps it here."""
        if not self._logs.is_at_work:
            for i, watching in enumerate(self._watching):
                if not watching.done():
                    self._forget(i)
        else:
            self._later(_LAST_LINES_S, self._give_up_silent)

    def _give_up_deaf(self) -> None:
        """Wait no longer for agents that do not even confirm that they kill."""
        what = f"{_DEAF_S:g} s after it was told to kill the workers the agent has not answered"
        for i in sorted(self._deaf - self._over):
            if not self._watching[i].done():
                self._lose(i, what, "the machine is too busy, or it is frozen, swapping or cut off")
                self._forget(i)
