"""The run of an agent's worker group: its hosts, and its attempts one after the other."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from torchrunx_ray.driver.background.loop import in_thread, to_the_end
from torchrunx_ray.driver.call.pack_call import Call
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.to_destinations import Destinations, ToDestinations
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.history import Why
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.running.crew import Crew, GroupPlan
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.driver.running.restart_policy import Verdict
from torchrunx_ray.driver.running.steps import Steps
from torchrunx_ray.errors import AgentFailedError, LaunchError
from torchrunx_ray.wire.ranks import Part, Place, lay_out

logger = logging.getLogger("torchrunx_ray")

_WARM_S = 60.0
"""Limit of the wait for templates before an agent joins others."""


@dataclass(frozen=True)
class Work:
    """The work of each worker."""

    entrypoint: Callable[..., Any] | str | None
    args: Sequence[Any]
    drivers_interpreter: str
    numa_options: Any


@dataclass(frozen=True)
class Host:
    """One host of an attempt."""

    label: str
    workers: int
    gpu_ids: Sequence[str]
    gpus_per_worker: float


@dataclass(frozen=True)
class Assembled:
    """The hosts of an attempt that can begin."""

    hosts: Sequence[Host]
    store: tuple[str, int]
    """Address at which the first host can serve the workers' store."""
    restarts: int
    """Number of restarts so far. An agent that died while the hosts assembled has cost one more."""

    def places(self, part: Part | None = None) -> list[Place]:
        """Return the workers' places in the order of their ranks."""
        layout = lay_out([host.workers for host in self.hosts], part)
        return [place for places in layout for place in places]


@dataclass(frozen=True)
class Returned:
    """All workers have returned. The values are in the order of their ranks."""

    values: list[Any]


@dataclass(frozen=True)
class Failed:
    """The attempt has failed."""

    failures: Failures


@dataclass(frozen=True)
class MustMove:
    """The hosts change, which counts as no restart: another attempt must follow."""

    why: Why


@dataclass(frozen=True)
class Stopped:
    """The workers were stopped."""


Ended = Returned | Failed | MustMove | Stopped
"""How an attempt has ended."""


class ElasticRun:
    """The attempts of a worker group, begun and stopped as its agent says.

    Used only in the background loop, except where a method says otherwise.
    """

    def __init__(self, options: Options, call: Call) -> None:
        self._options = options
        self._sink = ToDestinations()
        self._has_hosts = False
        """True once the first hosts are there and the logs are open, also if no attempt has begun."""
        self._closing: asyncio.Task[None] | None = None
        """The end of the run; None until the agent closes it."""
        self._begun = 0
        """Number of attempts that have begun."""
        self._hosts = Hosts(options)
        self._progress = Progress(call.run_name)
        self._steps = Steps(self._hosts, options, call, self._progress)
        self._going: asyncio.Task[Ended] | None = None
        """The current attempt, or the last one; None before the first."""

    async def assemble(self, restarts: int, until_warm: bool) -> Assembled:
        """Return the hosts of the next attempt, with an agent on each. `restarts` is the number of those that count.

        `until_warm`: other agents join the group, and all workers should start at about the same time.
        """
        self._steps.policy.restarts = restarts
        if not self._has_hosts:
            await self._hosts.open(self._progress)
            await self._steps.assemble(is_fresh=True, sink=self._sink)
            self._has_hosts = True
        elif self._going is not None:
            await self._assemble_again()
        crew = self._steps.crew
        if until_warm:
            await _until_warm(crew)
        hosts = [
            Host(host.label, host.workers, gpu_ids, host.gpus_per_worker)
            for host, gpu_ids in zip(crew.hosts, crew.gpu_ids, strict=True)
        ]
        return Assembled(hosts, crew.store, self._steps.policy.restarts)

    async def start(self, plan: GroupPlan, destinations: Destinations) -> dict[int, int]:
        """Start the workers. Return their pids by rank, all of them unless the attempt has failed meanwhile."""
        self._sink.expect(self._begun, destinations)
        self._begun += 1
        self._steps.begin_attempt(plan)
        going = self._going = asyncio.create_task(self._go())
        forked = asyncio.create_task(self._steps.attempt.are_forked.wait())
        try:
            await asyncio.wait({going, forked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            forked.cancel()
        infos = self._steps.attempt.workers.infos()
        return {info.rank: info.pid for info in infos if info.pid is not None}

    def ended(self) -> Ended | None:
        """Return how the attempt has ended; None while it goes on. Raises the error of a bug. Any thread may call this."""
        going = self._going
        return going.result() if going is not None and going.done() else None

    @property
    def hosts_waiting(self) -> int:
        """Number of hosts with which another attempt can begin, which counts as no restart. Any thread may ask."""
        must_move = isinstance(self.ended(), MustMove)
        return max(1, len(self._hosts.reserves.ready)) if must_move else 0

    async def stop(self) -> None:
        """End the workers, if they live: SIGTERM, and SIGKILL after `shutdown_timeout`. Another attempt may follow."""
        if self._going is not None and not self._going.done():
            self._steps.attempt.stop_for_another()
            await asyncio.wait({self._going})

    async def close(self, signum: signal.Signals) -> None:
        """End the workers by this signal, write the last output, and give the hosts back. A second call kills the workers."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(signum))
        elif self._going is not None:
            self._steps.attempt.kill()
        await asyncio.shield(self._closing)

    async def _close(self, signum: signal.Signals) -> None:
        try:
            if self._going is not None:
                if not self._going.done():
                    self._steps.attempt.stop_signal = signum
                    self._steps.attempt.note_cancellation()
                await asyncio.wait({self._going})
            if self._has_hosts:
                await self._steps.logs.drain()
            if self._going is not None:
                await self._steps.leave()
        finally:
            await to_the_end(self._hosts.close())

    async def _assemble_again(self) -> None:
        failures = self._steps.attempt.failures
        why = self._progress.history.attempts[-1].why
        assert why is not None
        try:
            await self._refuse_in_doubt()
            await self._steps.assemble_again(why)
        except (LaunchError, RayError, OSError, ValueError) as error:
            if failures is not None:
                error.add_note(f"The workers had to be started again: {failures.in_brief}")
            raise
        if failures is not None:
            goes_on = isinstance(self.ended(), MustMove)
            what = "goes on" if goes_on else self._steps.policy.in_words or "starting again"
            logger.warning("%s: %s, since %s", self._progress.name, what, failures.in_brief)

    async def _go(self) -> Ended:
        steps = self._steps
        why = await steps.go()
        if why == "stopped":
            return Stopped()
        failures = steps.attempt.failures
        if steps.policy.verdict(why, failures) is Verdict.GO_ON:
            return MustMove(why)
        if failures is not None:
            return Failed(failures)
        if why != "returned":
            return Stopped()
        values = await steps.attempt.outcome()
        if isinstance(values, Failures):
            return Failed(values)
        result: LaunchResult[Any] = LaunchResult(
            steps.crew.hostnames, values, self._progress.timeline, None
        )
        return Returned(await in_thread(list, result))

    async def _refuse_in_doubt(self) -> None:
        """Raise AgentFailedError if workers may live on a silent host: they would run beside the new ones."""
        if hosts := await self._steps.attempt.silent_hosts.in_doubt():
            what = "the workers cannot be started again, since processes of the last attempt may live on"
            raise AgentFailedError(hostname=", ".join(hosts), what=what)


async def _until_warm(crew: Crew) -> None:
    """Wait for a while until workers can be forked. What prevents that is told when they are started."""
    asking = (agent.connection.ask(agent.calls.warm) for agent in crew.agents)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_WARM_S):
            await asyncio.gather(*asking, return_exceptions=True)
