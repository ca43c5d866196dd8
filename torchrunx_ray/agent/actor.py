"""The Ray actor that is a launch's agent on one host."""

import asyncio
import socket
from typing import Any

import ray

from torchrunx_ray.agent import host
from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.agent.output import Output
from torchrunx_ray.agent.run import HostRun
from torchrunx_ray.agent.template import Template
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.payload import Packed, carry_values_packed

_ray: Any = ray  # most of its functions have no types

_POLL_S = 5.0


class Agent:
    """Serves one run at a time, and keeps its template warm between runs.

    The constructor starts the template, so that torch is imported while the driver still asks.
    Every method is a coroutine that does not block the loop.
    """

    def __init__(self, name: str, wanted: messages.TemplateWanted) -> None:
        carry_values_packed()
        self._name = name
        self._wanted = wanted
        self._context: Any = _ray.get_runtime_context()
        self._template: Template | None = None
        self._problem: str | None = None
        self._attached = False
        self._run: HostRun | None = None
        self._listening: socket.socket | None = None
        self._template_output: list[Output] = []
        self._leaving: asyncio.TimerHandle | None = None
        self._begin_template()

    def __repr__(self) -> str:
        """What Ray puts before the actor's own lines."""
        return f"torchrunx_ray agent {self._name}"

    async def meet(self, listen: bool) -> messages.Met:
        """Claim the agent for a run; with `listen`, hold a port for the run's store."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self._renew_template()
        port = None
        if listen:
            self._listening = socket.create_server(("", 0), backlog=4096)
            port = self._listening.getsockname()[1]
        return messages.Met(
            hostname=socket.gethostname(),
            ip=_ray.util.get_node_ip_address(),
            clock_ns=now_ns(),
            master_port=port,
            warning=self._warning,
            problem=self._problem,
        )

    async def start(self, wanted: messages.RunWanted, function: Packed) -> None:
        """Begin the run; all that comes of it is told through `poll` and `value`."""
        assert self._template is not None
        listening, self._listening = self._listening, None
        self._run = HostRun(wanted, self._template, self._mailbox, listening)
        await self._run.start(function)

    async def poll(self) -> list[messages.Event]:
        """Events as soon as there are some; none after a while."""
        return await self._mailbox.take(_POLL_S)

    async def value(self, local_rank: int) -> Packed | None:
        """What one worker's function returned, as soon as it has."""
        assert self._run is not None
        return await self._run.value(local_rank)

    async def stop(self, grace_s: float) -> None:
        if self._run is not None:
            self._run.stop(grace_s)

    async def rest(self, linger_s: float) -> None:
        """Wait for another run, holding no resources; end after `linger_s` without one."""
        self._run = None
        if self._listening is not None:  # the run that asked for it was cancelled
            self._listening.close()
        loop = asyncio.get_running_loop()
        self._leaving = loop.call_later(linger_s, lambda: asyncio.ensure_future(self._leave()))

    async def close(self) -> None:
        """Return when nothing that this agent started lives."""
        if self._template is not None:
            self._attach()
            await self._template.close()

    async def retire(self) -> None:
        _ray.actor.exit_actor()

    async def _leave(self) -> None:
        await self.close()
        # Only a method that Ray itself called may end its actor in an orderly way.
        self._context.current_actor.retire.remote()

    def _begin_template(self) -> None:
        in_job_dir = bool(self._context.runtime_env.get("working_dir"))
        cwd, self._warning = host.working_directory(self._wanted, in_job_dir)
        try:
            environment = host.template_environment(self._wanted, self._context.gcs_address)
        except ValueError as error:
            self._problem = str(error)
            return
        self._template = Template(environment, cwd, self._wanted.preload, self._wanted.start_method)
        self._attached = False

    def _renew_template(self) -> None:
        if self._attached and self._template is not None and not self._template.is_whole:
            self._begin_template()
        self._attach()

    def _attach(self) -> None:
        """Listen to the template; the constructor could not, it ran outside the loop."""
        if self._attached or self._template is None:
            return
        self._attached = True
        self._mailbox = Mailbox(self._resume_output)
        self._template.attach(self._worker_exited, self._template_gone)
        self._template_output = [
            Output(self._template.stdout_fd, None, "stdout", self._mailbox),
            Output(self._template.stderr_fd, None, "stderr", self._mailbox),
        ]

    def _resume_output(self) -> None:
        for output in self._template_output:
            output.resume()
        if self._run is not None:
            self._run.resume_output()

    def _worker_exited(self, exited: messages.Exited) -> None:
        if self._run is not None:
            self._run.has_exited(exited)

    def _template_gone(self, evidence: str) -> None:
        if self._run is not None:
            self._run.template_is_gone(evidence)
