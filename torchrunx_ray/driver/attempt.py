"""One attempt of a run: agents meet, workers start, the first failure or every value comes back."""

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from torchrunx_ray.driver.cluster import untyped_ray
from torchrunx_ray.driver.console import Console
from torchrunx_ray.driver.failures import Failure, Report, exception_of
from torchrunx_ray.driver.loop import in_thread
from torchrunx_ray.driver.options import Options
from torchrunx_ray.driver.placement import Host
from torchrunx_ray.driver.pool import Agent
from torchrunx_ray.errors import LaunchError
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.ranks import Place, lay_out

_SETTLING_S = 0.1
"""How long an earlier failure may take to arrive after a later one."""

_LAST_WORDS_S = 5.0
"""How long after SIGKILL a host may take to report its end before it is given up."""


class Attempt:
    """Everything that belongs to one try at a run: addresses, failures, hosts that ended."""

    def __init__(
        self, run_id: str, options: Options, hosts: Sequence[Host], agents: Sequence[Agent]
    ) -> None:
        self._run_id = run_id
        self._options = options
        self._hosts = hosts
        self._agents = agents
        self._layout = lay_out([host.workers for host in hosts])
        self._clock_offsets_ns = [0] * len(hosts)
        self._failures: list[Failure] = []
        self._is_stopping = False
        self._stopped: list[str] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._watching: list[asyncio.Task[None]] = []
        self._values: dict[int, list[ray.ObjectRef[Any]]] = {}
        self.broken: set[int] = set()
        """Hosts, by index, whose agent cannot be used again."""

    async def go(self, function: Any) -> "list[list[ray.ObjectRef[Any]]]":
        """References to every rank's value, by host. Raises the first failure.

        On cancellation, as on failure, it returns only when no worker lives; a second
        cancellation kills them.
        """
        self._console = Console(sum(host.workers for host in self._hosts))
        try:
            master = await self._meet()
            self._watching = [
                asyncio.create_task(self._watch(i, self._wanted(i, master), function))
                for i in range(len(self._hosts))
            ]
            await self._until_ended()
        finally:
            for timer in self._timers:
                timer.cancel()
            await self._console.drain()
        if self._failures:
            raise exception_of(self._failures, self._stopped)
        values = [self._values[i] for i in range(len(self._hosts))]
        await in_thread(_wait_until_stored, [ref for refs in values for ref in refs])
        return values

    async def _until_ended(self) -> None:
        cancelled: asyncio.CancelledError | None = None
        for grace_s in (self._options.shutdown_timeout, 0, 0):
            try:
                await asyncio.wait(self._watching)
                break
            except asyncio.CancelledError as error:
                cancelled = error
                self._stop(grace_s)
        if cancelled is not None:
            raise cancelled
        for watching in self._watching:
            if not watching.cancelled():
                watching.result()

    async def _meet(self) -> messages.Met:
        met = await asyncio.gather(*(self._ask(i) for i in range(len(self._agents))))
        for i, agent in enumerate(met):
            if agent.problem is not None:
                raise LaunchError(f"On {self._hosts[i].label}: {agent.problem}")
        return met[0]

    async def _ask(self, host_index: int) -> messages.Met:
        asked_ns = now_ns()
        try:
            met: messages.Met = await self._agents[host_index].calls.meet.remote(host_index == 0)
        except RayError as error:
            self._lose(host_index, "the agent could not be started", str(error))
            raise exception_of(self._failures, ()) from error
        # Half the round trip is the best guess of when the agent read its clock.
        self._clock_offsets_ns[host_index] = met.clock_ns - (asked_ns + now_ns()) // 2
        return met

    def _wanted(self, host_index: int, master: messages.Met) -> messages.RunWanted:
        assert master.master_port is not None
        host = self._hosts[host_index]
        return messages.RunWanted(
            run_id=self._run_id,
            hostname=host.label,
            places=tuple(self._layout[host_index]),
            master_addr=master.ip,
            master_port=master.master_port,
            backend=self._backend(host),
            timeout=self._options.timeout,
            gpu_ids=host.gpu_ids,
            gpus_per_worker=host.gpus_per_worker,
            argv=tuple(sys.argv),
        )

    def _backend(self, host: Host) -> str | None:
        if self._options.backend != "auto":
            return self._options.backend
        return "nccl" if host.gpus_per_worker else "gloo"

    async def _watch(self, host_index: int, wanted: messages.RunWanted, function: Any) -> None:
        """Start one host's workers and hear all that its agent has to say, until it has ended."""
        calls = self._agents[host_index].calls
        try:
            await calls.start.remote(wanted, function)
            self._values[host_index] = [calls.value.remote(p.local_rank) for p in wanted.places]
            while True:
                events: list[messages.Event] = await calls.poll.remote()
                for event in events:
                    if isinstance(event, messages.HostEnded):
                        return
                    await self._hear(host_index, event)
        except RayError as error:
            self._lose(host_index, "the agent died", str(error))

    async def _hear(self, host_index: int, event: messages.Event) -> None:
        match event:
            case messages.Printed():
                await self._print(host_index, event)
            case messages.Failed():
                self._fail(host_index, event.local_rank, event.time_ns, event)
            case messages.Died():
                self._has_died(host_index, event)
            case messages.AgentFailed():
                self._fail(host_index, None, event.time_ns, event)
            case messages.TemplateRefused():
                self._fail(host_index, None, now_ns(), event)
            case _:
                pass  # the steps of a worker that is well

    async def _print(self, host_index: int, printed: messages.Printed) -> None:
        label = self._hosts[host_index].label
        if printed.local_rank is None:
            who = f"{label}:template"
        else:
            who = f"{label}:{self._place(host_index, printed.local_rank).rank}"
        await self._console.put(who, printed.stream, printed.data)

    def _has_died(self, host_index: int, died: messages.Died) -> None:
        exited = died.exited
        if self._is_stopping and exited.signal in (signal.SIGTERM, signal.SIGKILL):
            assert exited.local_rank is not None
            rank = self._place(host_index, exited.local_rank).rank
            self._stopped.append(f"rank {rank} on {self._hosts[host_index].label}")
        else:
            self._fail(host_index, exited.local_rank, exited.time_ns, died)

    def _lose(self, host_index: int, what: str, evidence: str) -> None:
        self.broken.add(host_index)
        time_ns = now_ns() + self._clock_offsets_ns[host_index]
        self._fail(host_index, None, time_ns, messages.AgentFailed(time_ns, what, evidence))

    def _fail(self, host_index: int, local_rank: int | None, time_ns: int, report: Report) -> None:
        if not self._failures:
            self._later(_SETTLING_S, self._stop, self._options.shutdown_timeout)
        rank = None if local_rank is None else self._place(host_index, local_rank).rank
        on_our_clock = time_ns - self._clock_offsets_ns[host_index]
        self._failures.append(Failure(on_our_clock, self._hosts[host_index].label, rank, report))

    def _later(self, delay_s: float, call: Callable[..., None], *args: object) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, *args))

    def _place(self, host_index: int, local_rank: int) -> Place:
        return self._layout[host_index][local_rank]

    def _stop(self, grace_s: float) -> None:
        self._is_stopping = True
        for i, agent in enumerate(self._agents):
            if i not in self.broken:
                agent.calls.stop.remote(grace_s)
        self._later(grace_s + _LAST_WORDS_S, self._give_up)

    def _give_up(self) -> None:
        """What SIGKILL does not end is in the kernel's hands; do not wait for it."""
        for i, watching in enumerate(self._watching):
            if not watching.done():
                self._lose(i, "processes are left, which not even SIGKILL ended", "")
                watching.cancel()


def _wait_until_stored(refs: "list[ray.ObjectRef[Any]]") -> None:
    """Until then a value is in its agent only, and would be lost with it."""
    untyped_ray.wait(refs, num_returns=len(refs), fetch_local=False)
