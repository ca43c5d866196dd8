"""One host that is held for runs: its bundle, its GPUs, its agent."""

import asyncio
import dataclasses
import enum
import logging

from ray.exceptions import RayError

from torchrunx_ray.driver.agents import pool
from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.call.health_port import health_port
from torchrunx_ray.driver.cluster import inventory, token
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing.gpu_question import GpuQuestion
from torchrunx_ray.driver.placing.placement import Placement
from torchrunx_ray.driver.placing.plan import Host
from torchrunx_ray.errors import AgentFailedError, LaunchError
from torchrunx_ray.wire import messages, versions
from torchrunx_ray.wire.messages import Met, TemplateWanted

logger = logging.getLogger("torchrunx_ray")

_SILENT_S = 15.0
"""Time without an answer from an agent before a warning, or before an agent that warms up is checked.

An agent starts in a few seconds, unless packages are installed first. A running agent answers at once.
"""


class HeldState(enum.Enum):
    """States of a held host."""

    NEW = "no agent has been met on it"
    UNFIT = "the first agent could not be met"
    SOUND = "its last agent was met"
    SUSPECT = "its agent was lost, and perhaps its node"
    LOST = "its node or bundle is lost, and another host takes its place"


class HeldHost:
    """A host that is held for runs. Used only in the background loop."""

    def __init__(self, host: Host, placement: Placement, bundle: int, options: Options) -> None:
        self.host = host
        self.placement = placement
        self.bundle = bundle
        self.state = HeldState.NEW
        self._options = options
        self._agent: PooledAgent | None = None
        self._told_health_port: int | None = None
        # Asked while the agent starts, since Ray has to start a process for the answer.
        gpus = float(host.bundle.get("GPU", 0))
        self._gpu_question = GpuQuestion(
            placement.group, bundle, host.label, gpus, options.runtime_env
        )

    @property
    def agent(self) -> PooledAgent:
        assert self._agent is not None
        return self._agent

    @property
    def node_id(self) -> str:
        return self.host.node.node_id

    async def meet(self, template: TemplateWanted, *, listen: bool) -> Met:
        """Claim an agent on this host, and replace an agent that died since its last run."""
        is_new = self.state is HeldState.NEW
        try:
            return await self._meet_living(template, listen)
        except ClusterLeft:
            raise
        except LaunchError:
            if is_new:
                self.state = HeldState.UNFIT
            raise

    async def _meet_living(self, template: TemplateWanted, listen: bool) -> Met:
        label = self.host.label
        wanted = dataclasses.replace(template, one_worker=self.host.workers == 1)
        while True:
            met = await self._meet(wanted, listen)
            if met is None:
                await self.give_up_agent()
                await self._check_node()
                continue
            ours = versions.of_this_process()
            problem = met.problem or versions.problem_between(ours, met.versions)
            if problem is not None:
                await self.end_agent()
                raise LaunchError(f"On {label}: {problem}")
            doubt = versions.doubt_between(ours, met.versions)
            for warning in filter(None, (met.warning, doubt)):
                logger.warning("%s: %s", label, warning)
            if met.health_port is not None and met.health_port != self._told_health_port:
                self._told_health_port = met.health_port
                logger.info("%s answers health checks at http://%s", label, met.health_address)
            self.state = HeldState.SOUND
            return met

    async def warm(self, template: TemplateWanted) -> None:
        """Wait until workers can be forked. Raises AgentFailedError or LaunchError if they cannot be.

        Raises TimeoutError if the agent freezes meanwhile.
        """
        await self.meet(template, listen=False)
        agent = self.agent
        warming = asyncio.create_task(agent.connection.ask(agent.calls.warm))
        try:
            while not warming.done():
                await asyncio.wait({warming}, timeout=_SILENT_S)
                if warming.done() or await agent.answers():
                    continue
                if not warming.done():
                    raise TimeoutError("its agent does not answer")
            refused: messages.TemplateRefused | None = warming.result()
        finally:
            warming.cancel()
            del warming  # an exception refers to this frame, and must not wait for Python's gc
        if refused is not None:
            raise LaunchError(f"On {self.host.label}: {refused.problem}")

    def forget_call(self) -> None:
        """Let the agent free the function and the arguments of a run that has ended."""
        if self._agent is not None:
            self._agent.forget_call()

    async def gpu_ids(self) -> tuple[str, ...]:
        """Return the GPUs of the bundle. Raises AgentFailedError if Ray cannot answer."""
        return await self._gpu_question.answer()

    def has(self, agent: PooledAgent) -> bool:
        """Return True if this is the host's agent."""
        return self._agent is agent

    async def answers(self) -> bool:
        """Return True if the agent lives and answers."""
        return self._agent is not None and await self._agent.answers()

    async def end_agent(self) -> None:
        """End the agent, even if cancelled meanwhile: nothing else refers to it."""
        agent, self._agent = self._agent, None
        if agent is not None:
            await to_the_end(agent.end())

    async def give_up_agent(self) -> None:
        """End an agent that a run has lost."""
        self.state = HeldState.SUSPECT
        await self.end_agent()

    async def abandon(self) -> None:
        """Forget the GPUs and end the agent of a host that is lost."""
        self._gpu_question.drop()
        await self.give_up_agent()
        self.state = HeldState.LOST

    async def release(self) -> None:
        """Let the agent rest or end, and forget the GPUs."""
        self._gpu_question.drop()
        agent, self._agent = self._agent, None
        if agent is not None:
            await agent.release(self._options.linger)

    async def _check_node(self) -> None:
        """Raise AgentFailedError if the node does not answer.

        Ray itself notices the end of a node much later, and would let a new agent there wait until then.
        """
        if not await node_answers(self.host.node):
            what = "the agent has ended, and the node does not answer"
            evidence = f"{self.host.node.name} accepts no connection at the port of its raylet"
            raise AgentFailedError(hostname=self.host.label, what=what, evidence=evidence)

    async def _meet(self, wanted: TemplateWanted, listen: bool) -> Met | None:
        """Return the agent's answer; None if it ended while it rested."""
        label = self.host.label
        if (
            self._agent is not None and self._agent.wanted != wanted
        ):  # environment or folder has changed
            agent, self._agent = self._agent, None
            await to_the_end(agent.release(self._options.linger))
        silent = asyncio.get_running_loop().call_later(_SILENT_S, _say_silent, label)
        try:
            if self._agent is None:
                self._agent = await pool.acquire(self.host.node, label, wanted, self._options)
            agent = self._agent
            port = health_port(self._options, wanted)
            met = await agent.meet(listen=listen, health_port=port)
        except (RayError, TimeoutError) as error:
            await self.give_up_agent()
            missing = versions.missing_package(str(error), versions.of_this_process())
            if missing is not None:
                raise LaunchError(f"On {label}: {missing}") from None
            what, why = "the agent could not be started", _why_not_started(error)
            raise AgentFailedError(hostname=label, what=what, evidence=why) from None
        finally:
            silent.cancel()
        if met is None and agent.fault:
            logger.warning(
                "%s: the idle agent there %s A new agent takes its place.", label, agent.fault
            )
        return met


async def node_answers(node: Node) -> bool:
    """Return True if the node's raylet accepts connections."""
    connection = Connection()
    return await connection.call(connection.inside, inventory.answers, node)


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
