"""Hosts that are held for one run or a session, with an agent on each."""

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayError

from torchrunx_ray.driver.agents import pool
from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster import inventory, token
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.placement import Placement, reserve
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.errors import AgentFailedError, LaunchError
from torchrunx_ray.wire import versions
from torchrunx_ray.wire.messages import Met, TemplateWanted

T = TypeVar("T")

logger = logging.getLogger("torchrunx_ray")

_SILENT_S = 15.0
"""Time without an answer from an agent before a warning.

An agent starts in a few seconds, unless packages are installed first. A running agent answers at once.
"""


_ANSWER_S = 120.0
"""Time for Ray's answer about a placement. A restart of the head may delay the answer."""


class Hosts:
    """A placement and its agents. Used only in the background loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._placement: Placement | None = None
        self.is_closed = False
        self._agents: dict[int, PooledAgent] = {}
        self.turn = asyncio.Lock()
        """Held by one run at a time, and while the hosts are taken or given back."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the hosts; empty before they are placed, between two placements, and after `close`."""
        placement = self._placement
        return () if placement is None else tuple(host.label for host in placement.hosts)

    @property
    def held(self) -> list[Host]:
        placement = self._placement
        return [] if placement is None else placement.held

    async def open(self, progress: Progress) -> None:
        """Reserve room in the cluster. `close` waits until this has ended, or its cancellation has cleaned up."""
        async with self.turn:
            if self.is_closed:
                raise RuntimeError("the session is closed")
            self._placement = await reserve(self._options, progress)

    async def close(self) -> None:
        """Let the agents rest or end, and give the room back. Safe to call again."""
        async with self.turn:
            self.is_closed = True
            agents, self._agents = list(self._agents.values()), {}
            placement, self._placement = self._placement, None
            releasing = [agent.release(self._options.linger) for agent in agents]
            released = await asyncio.gather(*releasing, return_exceptions=True)
            if placement is not None:
                await placement.remove()
            for done in released:
                if isinstance(done, BaseException):
                    logger.warning("an agent could not be released: %s", done)

    async def assemble(
        self, template: TemplateWanted, progress: Progress, *, is_fresh: bool, may_move: bool = True
    ) -> tuple[Crew, str | None]:
        """Return the hosts with an agent on each. If a node has died and they `may_move`, place the hosts again first."""
        while True:
            if self.is_closed:
                raise RuntimeError("the session is closed")
            if self._placement is None:  # the last attempt to place the hosts again found no room
                self._placement = await reserve(self._options, progress)
            placement, hosts = self._placement, self._placement.hosts
            try:
                if not is_fresh:
                    await _answered(placement.check())
                met = await _all_or_first_error(
                    [self._meet(i, host, template) for i, host in enumerate(hosts)]
                )
                gpu_ids = await placement.gpu_ids()
            except (AgentFailedError, RayError) as error:
                if not may_move or await _is_whole(placement):
                    raise
                logger.warning("a node died before the run began; placing the run again: %s", error)
                await self.drop(set(self._agents))
                self._placement = None
                await placement.remove()
                continue
            agents = [self._agents[i] for i in range(len(hosts))]
            return Crew(hosts, agents, met, gpu_ids), placement.backend

    async def _meet(self, index: int, host: Host, template: TemplateWanted) -> Met:
        """Claim an agent on this host, and replace an agent that died since its last run."""
        wanted = dataclasses.replace(template, one_worker=host.workers == 1)
        while True:
            agent = self._agents.get(index)
            if agent is not None and agent.wanted != wanted:  # environment or folder has changed
                await to_the_end(self._agents.pop(index).release(self._options.linger))
                agent = None
            if agent is None:
                agent = await pool.acquire(host.node.node_id, host.label, wanted, self._options)
                self._agents[index] = agent
            silent = asyncio.get_running_loop().call_later(_SILENT_S, _say_silent, host.label)
            try:
                met = await agent.meet(listen=index == 0)
            except (RayError, TimeoutError) as error:
                await self.drop({index})
                missing = versions.missing_package(str(error), versions.of_this_process())
                if missing is not None:
                    raise LaunchError(f"On {host.label}: {missing}") from None
                what, why = "the agent could not be started", _why_not_started(error)
                raise AgentFailedError(hostname=host.label, what=what, evidence=why) from None
            finally:
                silent.cancel()
            if met is None:
                if agent.fault:
                    logger.warning(
                        "%s: the idle agent there %s A new agent takes its place.",
                        host.label,
                        agent.fault,
                    )
                await self.drop({index})
                continue
            ours = versions.of_this_process()
            problem = met.problem or versions.problem_between(ours, met.versions)
            if problem is not None:
                await self.drop({index})
                raise LaunchError(f"On {host.label}: {problem}")
            doubt = versions.doubt_between(ours, met.versions)
            for warning in filter(None, (met.warning, doubt)):
                logger.warning("%s: %s", host.label, warning)
            return met

    async def are_surely_whole(self) -> bool:
        """Return True if Ray says that all nodes of the placement live."""
        if self._placement is None:
            return False
        try:
            return await _answered(self._placement.is_whole())
        except (LaunchError, RayError):
            return False

    def forget_call(self) -> None:
        """Let the agents free the function and the arguments of a run that has ended."""
        for agent in self._agents.values():
            agent.forget_call()

    async def drop(self, indices: set[int]) -> None:
        """End these agents, even if cancelled meanwhile: nothing else refers to them."""
        agents = [self._agents.pop(i) for i in indices if i in self._agents]
        if ending := [asyncio.create_task(agent.end()) for agent in agents]:
            await to_the_end(asyncio.wait(ending))


def _why_not_started(error: Exception) -> str:
    # A cluster that this process started has the same token.
    doubt = "" if inventory.was_started_here() else token.doubt(str(error))
    return f"{error}\n{doubt}".rstrip()


def _say_silent(hostname: str) -> None:
    logger.warning(
        "%s: its agent has not answered for %.0f s: Ray is still creating the runtime_env, or the machine is too "
        "busy to run the agent, or is swapping, or the agent is frozen or cut off. The launch continues when the "
        "agent answers.",
        hostname,
        _SILENT_S,
    )


async def _is_whole(placement: Placement) -> bool:
    """Return True if all nodes live, or if Ray does not answer: the first failure then says more."""
    try:
        return await _answered(placement.is_whole())
    except (LaunchError, RayError):
        return True


async def _answered(question: Awaitable[T]) -> T:
    """Await an answer of Ray. Raises LaunchError after _ANSWER_S."""
    limit = asyncio.timeout(_ANSWER_S)
    try:
        async with limit:
            return await question
    except TimeoutError:
        if not limit.expired():
            raise
        raise LaunchError(
            f"Ray has not answered a query about the placement of the launch for {_ANSWER_S:g} s. Is the head's "
            "machine frozen, overloaded or cut off? Check with `ray status` on that machine. Launch again."
        ) from None
    finally:
        del limit  # it refers to the task, whose exception refers to this frame


async def _all_or_first_error(work: "Sequence[Coroutine[Any, Any, T]]") -> list[T]:
    """Return all results. At the first error, cancel the other tasks, wait for them, and raise the error."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and task.exception() is not None]
        return [task.result() for task in failed or tasks]
    finally:
        for task in tasks:
            task.cancel()
        await to_the_end(asyncio.wait(tasks))
        del tasks, work  # an exception refers to this frame, and must not wait for Python's gc
