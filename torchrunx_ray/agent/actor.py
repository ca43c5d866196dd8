"""The Ray actor that is a launch's agent on one host."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ray

from torchrunx_ray.agent import template_environment
from torchrunx_ray.agent.condition import Condition
from torchrunx_ray.agent.keeper import Keeper
from torchrunx_ray.agent.kept_call import KeptCall
from torchrunx_ray.agent.lease import HostLease, LeaseOfClaim
from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.agent.metrics import Metrics
from torchrunx_ray.agent.run import HostRun
from torchrunx_ray.agent.services import Services
from torchrunx_ray.agent.template import Template
from torchrunx_ray.wire import linux, messages, versions
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.stop_board import StopReason, asked_within
from torchrunx_ray.wire.values.payload import Packed, carry_values_packed

_ray: Any = ray  # most of its functions have no types

VALUES = "values"
"""The concurrency group of the calls that return values."""

_POLL_S = 5.0

_CLOSING_S = 15.0
"""Time for keepers and template to end before an agent exits without them. The keepers then notice its end.

Longer than they wait for processes that SIGKILL does not end. A keeper that is frozen never ends, unless Ray kills it
with the agent.
"""

_LAST_WORDS_S = 1.0
"""Time for the driver to receive the reason before an agent without a raylet exits."""


class Agent:
    """An agent that serves one run at a time and keeps its template warm between runs.

    The constructor starts the template, so torch is imported while the driver is still setting up the run.
    Every method is a coroutine that does not block the loop.
    """

    def __init__(self, name: str, wanted: messages.TemplateWanted) -> None:
        _end_at_sigterm()
        carry_values_packed()
        self._name = name
        self._wanted = wanted
        self._context: Any = _ray.get_runtime_context()
        self._cwd, self._warning = template_environment.working_directory(
            wanted, in_job_working_dir=bool(self._context.runtime_env.get("working_dir"))
        )
        self._ip: str = _ray.util.get_node_ip_address()
        self._problem: str | None = None
        # An env_file may take long; `meet` sources it without blocking the loop.
        self._keeper = self._start_keeper() if wanted.env_file is None else None
        self._template: Template | None = None
        self._metrics = Metrics()
        self._mailbox = Mailbox(self._resume_output, self._hear)
        self._run: HostRun | None = None
        self._early = defaultdict[messages.AttemptId, list[Callable[[HostRun], None]]](list)
        """Orders to runs that have not begun. Ray may deliver them before `start`, whose argument takes time."""
        self._kept_call = KeptCall()
        self._listening: socket.socket | None = None
        self._having_template = asyncio.Lock()
        self._claim = 0
        """The highest claim that `meet` or `rest` has received."""
        self._rested = 0
        """The last claim whose run is over."""
        self._rest_ends: asyncio.TimerHandle | None = None
        self._leaving = False
        self._lease = LeaseOfClaim()
        self._condition = Condition()
        self._services = Services(self._ip, self._condition)
        self._raylet_fd: int | None = None

    def __repr__(self) -> str:
        """Return the name that Ray puts before the actor's own lines and shows in its dashboard."""
        return f"torchrunx_ray {self._name}"

    async def meet(self, claim: int, listen: bool, health_port: int | None = None) -> messages.Met:
        """Claim the agent for a run; with `listen`, hold a port for the run's store.

        With `health_port`, answer health checks until the agent rests.

        `claim` counts the driver's claims. Ray may deliver the `rest` that ends a claim before or after
        the `meet` of the next claim. Nobody waits for the answer to a claim that is over.
        """
        self._claim = max(self._claim, claim)
        self._loop = asyncio.get_running_loop()
        if self._serves(claim):
            self._forget_last_claim()
            self._lease.claim()
        self._watch_raylet()
        if self._serves(claim) and not self._leaving:
            async with self._having_template:
                await self._have_template()
        problem = self._problem
        if problem is None:
            problem = await self._open_services(claim, health_port)
        port = None
        if self._serves(claim) and not self._leaving and listen:
            family = socket.AF_INET6 if ":" in self._ip else socket.AF_INET
            self._listening = socket.create_server(("", 0), family=family, backlog=4096)
            port = self._listening.getsockname()[1]
        return messages.Met(
            ip=self._ip,
            master_port=port,
            leaving=self._leaving,
            versions=versions.of_this_process(),
            warning=self._warning,
            problem=problem,
            health_port=self._services.health_port,
        )

    async def warm(self) -> messages.TemplateRefused | None:
        """Wait until the template can fork; return its refusal if it cannot."""
        async with self._having_template:
            await self._have_template()
            template = self._template
        return None if template is None else await template.ready()

    async def clock(self) -> int:
        return now_ns()

    async def start(self, wanted: messages.ShareWanted, *values: Packed) -> None:
        """Begin an attempt; its events come through `poll`, its values through `value`.

        `values` are the function with its arguments, and the values of references in the arguments. There are none
        if this agent keeps them from an earlier attempt of the run.
        """
        assert self._template is not None
        kept = self._kept_call.values_for(wanted.worker, values)
        listening, self._listening = self._listening, None
        if listening is not None and not wanted.serves_store:
            listening.close()
            listening = None
        self._metrics.begins(wanted, now_ns())
        self._condition.begins(wanted)
        lease = self._lease.begin(wanted.worker.attempt, self._template, wanted.first_lease_s)
        run = HostRun(
            wanted,
            self._template,
            self._mailbox,
            listening,
            self._ip,
            lease,
            self._services.watchdog,
        )
        self._run = run
        for order in self._early[run.attempt]:
            order(run)
        self._early.clear()
        await run.start(kept)

    async def forget_call(self, run_id: str) -> None:
        """Free the function and the arguments of a run, since no attempt of the run will follow."""
        self._kept_call.forget(run_id)

    async def renew_with(
        self, attempt: messages.AttemptId, pulse: Any, host_index: int, lease_s: float
    ) -> None:
        """Renew the lease of an attempt's workers with this pulse. Like `stop`, this may come early or late."""
        if (lease := self._lease_of(attempt)) is not None:
            lease.renew_with(pulse, host_index, lease_s)

    async def need_no_lease(self, attempt: messages.AttemptId) -> None:
        """Let an attempt's workers live without contact with the driver. Like `stop`, this may come early or late."""
        if (lease := self._lease_of(attempt)) is not None:
            lease.give_up()

    def _lease_of(self, attempt: messages.AttemptId) -> HostLease | None:
        """Return the lease of an attempt; None if the attempt cannot be the current one."""
        if self._template is None or not self._serves(self._claim):
            return None
        return self._lease.of(attempt, self._template)

    async def fork(self, attempt: messages.AttemptId) -> None:
        """Fork the workers of a run that waits until all hosts can fork."""
        if self._run is not None and self._run.attempt == attempt:
            self._run.fork()

    async def poll(self, with_output: bool) -> list[messages.Told]:
        """Return events as soon as there are any, or none after a timeout."""
        return await self._mailbox.take(_POLL_S, with_output=with_output)

    async def nudge(self) -> None:
        """Make a pending poll return."""
        self._mailbox.nudge()

    @_ray.method(concurrency_group=VALUES)
    async def value(self, attempt: messages.AttemptId, local_rank: int) -> Packed | None:
        """Return the value of one worker's function, as soon as the function has returned.

        The method runs in a loop of its own. Ray copies the returned value in the thread that ran the method,
        and a large value would block the agent.
        """
        waiting = asyncio.run_coroutine_threadsafe(self._value(attempt, local_rank), self._loop)
        return await asyncio.wrap_future(waiting)

    async def _value(self, attempt: messages.AttemptId, local_rank: int) -> Packed | None:
        if self._run is None or self._run.attempt != attempt:
            return None  # the run failed before this call arrived
        return await self._run.value(local_rank)

    async def stacks(
        self, attempt: messages.AttemptId, wanted: messages.StacksWanted
    ) -> dict[int, str]:
        """Return the workers' stacks by local rank; the text is empty if the worker did not answer in time."""
        if self._run is None or self._run.attempt != attempt:
            return {}
        return await self._run.stacks(wanted)

    async def ask_to_stop(
        self, attempt: messages.AttemptId, reason: StopReason, within_s: float | None
    ) -> None:
        """Show the function a request to return within this time. Like `stop`, this may come early."""
        asked = asked_within(reason, within_s)
        if self._run is not None and self._run.attempt == attempt:
            self._run.ask_to_stop(asked)
        else:
            self._early[attempt].append(lambda run: run.ask_to_stop(asked))

    async def stop(
        self, attempt: messages.AttemptId, grace_s: float, signum: int, reason: StopReason | None
    ) -> None:
        """End a run, by this signal first. `reason` is the last one that the function was given, or None."""
        if self._run is not None and self._run.attempt == attempt:
            self._metrics.stops()
            self._condition.stops()
            self._run.stop(grace_s, signum, reason)
        else:
            self._early[attempt].append(lambda run: run.stop(0, signal.SIGKILL))

    async def others_have_ended(self, attempt: messages.AttemptId) -> None:
        """Note that no worker of another host uses this host's store any more. Like `stop`, this may come early."""
        if self._run is not None and self._run.attempt == attempt:
            self._run.others_have_ended()
        else:
            self._early[attempt].append(HostRun.others_have_ended)

    async def rest(self, claim: int, linger_s: float) -> None:
        """Wait for another run without holding resources; exit if none comes within `linger_s`."""
        if claim < self._claim:
            return  # the next run has already claimed this agent
        self._claim = self._rested = claim
        self._forget_last_claim()
        self._condition.ends()
        self._run = None
        self._kept_call = KeptCall()
        self._rest_ends = asyncio.get_running_loop().call_later(linger_s, self._leave)
        await self._services.close()

    def _serves(self, claim: int) -> bool:
        """Return True for the newest claim, unless its run is over."""
        return claim == self._claim > self._rested

    def _forget_last_claim(self) -> None:
        if self._rest_ends is not None:
            self._rest_ends.cancel()
            self._rest_ends = None
        if self._listening is not None:  # the run that asked for the port was cancelled
            self._listening.close()
            self._listening = None
        self._lease.end()

    async def _open_services(self, claim: int, health_port: int | None) -> str | None:
        """Open the services that a claim wants, if it is still the newest. Return the reason if that fails."""
        async with self._having_template:
            if not self._serves(claim) or self._leaving or self._template is None:
                return None
            path, folder = self._template.timer_file, self._template.folder
            place = None if path is None else (path, folder)
            problem = await self._services.open(place, health_port)
            if not self._serves(claim):  # the run was cancelled meanwhile
                await self._services.close()
            return problem

    async def close(self) -> None:
        """End everything that this agent started; return when all of it is gone."""
        # Before the keepers end, which remove the FIFO only if nobody reads it.
        await self._services.close()
        self._attach()
        if self._template is not None:
            await self._template.close()

    async def _closes_in_time(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING_S):
                await self.close()
                return True
        return False

    async def retire(self) -> None:
        _ray.actor.exit_actor()

    def _leave(self) -> None:
        self._leaving = True  # first, so that a later claim takes another agent
        self._ending = asyncio.ensure_future(self._close_and_retire())

    async def _close_and_retire(self) -> None:
        await self._closes_in_time()
        # Only a method that Ray called can exit its actor cleanly.
        self._context.current_actor.retire.remote()

    def _start_keeper(self) -> Keeper | None:
        self._env_file_version = template_environment.env_file_version(self._wanted, self._cwd)
        self._problem = None
        made = {**os.environ, **dict(self._wanted.driver_variables)}  # for the errors below
        try:
            made = template_environment.template_environment(
                self._wanted, self._context.gcs_address, self._cwd
            )
            return Keeper(made, self._cwd, self._wanted, self._context.runtime_env)
        except ValueError as error:
            self._problem = str(error)
        except OSError as error:
            self._problem = template_environment.why_no_process(error, made)
        return None

    async def _have_template(self) -> None:
        """Replace the template if it lost a keeper, cannot fork any more, or its env_file has changed."""
        self._attach()
        version = template_environment.env_file_version(self._wanted, self._cwd)
        if self._template is not None:
            await self._template.until_learned()
            if self._template.is_whole and version == self._env_file_version:
                return
            await self._template.close()
            self._template = None
        self._keeper = await asyncio.to_thread(self._start_keeper)
        self._attach()

    def _attach(self) -> None:
        """Listen to a new template. The constructor could not, because it ran outside the loop."""
        if self._keeper is None:
            return
        keeper, self._keeper = self._keeper, None
        self._condition.template_is_gone = ""
        self._template = Template(
            keeper, self._mailbox.of(None), self._worker_exited, self._template_gone
        )

    def _watch_raylet(self) -> None:
        """Watch the raylet's process. Ray itself reports a killed raylet only after 15 to 30 s."""
        if self._raylet_fd is None:
            # Not os.getppid(): an actor that `uv run` started has another parent.
            pid = int(os.environ["RAY_RAYLET_PID"])
            self._raylet_fd = linux.pidfd_open(pid)
            loop = asyncio.get_running_loop()
            loop.add_reader(self._raylet_fd, self._raylet_gone, pid, loop)

    def _raylet_gone(self, pid: int, loop: asyncio.AbstractEventLoop) -> None:
        assert self._raylet_fd is not None
        loop.remove_reader(self._raylet_fd)
        self._leaving = True  # no further run may claim this agent
        what = f"the raylet, Ray's process for the node (pid {pid}), ended"
        self._mailbox.of(None).put(messages.AgentFailed(now_ns(), what, "", is_ending=True))
        self._ending = asyncio.ensure_future(self._end_with_raylet())

    async def _end_with_raylet(self) -> None:
        if await self._closes_in_time() and self._run is not None:
            self._run.everything_is_gone()
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)

    def _hear(self, event: messages.Event) -> None:
        self._metrics.hear(event)
        self._condition.hear(event)

    def _resume_output(self) -> None:
        if self._template is not None:
            self._template.resume_output()
        if self._run is not None:
            self._run.resume_output()

    def _worker_exited(self, exited: messages.Exited) -> None:
        if self._run is not None:
            self._run.has_exited(exited)

    def _template_gone(self, death: messages.AgentFailed) -> None:
        self._condition.template_is_gone = death.what
        if self._run is not None:
            self._run.template_is_gone(death)


def _end_at_sigterm() -> None:
    """Exit on SIGTERM, which Ray's node sends when the agent's owner has died.

    Ray's own handler waits for pending calls, but the driver makes a new poll after each one. Python's `signal`
    works only in the main thread, which belongs to Ray.
    """
    ctypes.CDLL(None).signal(signal.SIGTERM, None)  # SIG_DFL
