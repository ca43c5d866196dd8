"""One host's share of a run."""

import asyncio
import enum
import os
import signal
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from torchrunx_ray.agent.blocked import BlockedWatch
from torchrunx_ray.agent.error_files import ErrorFiles
from torchrunx_ray.agent.lease import HostLease
from torchrunx_ray.agent.machine import memory_group
from torchrunx_ray.agent.machine.network import interface_of
from torchrunx_ray.agent.mailbox import Mailbox
from torchrunx_ray.agent.template import Template
from torchrunx_ray.agent.watchdog import Watchdog
from torchrunx_ray.agent.worker import Worker
from torchrunx_ray.errors import OomKills, describe_exit
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.ranks import Place, visible_gpus
from torchrunx_ray.wire.stop_board import StopAsked, StopBoard, StopReason, asked_within
from torchrunx_ray.wire.values.payload import Packed

T = TypeVar("T")


class State(enum.Enum):
    """States of a host's share of an attempt."""

    STARTING = "forks the workers"
    ABORTING = "was told to stop while it started"
    RUNNING = "has forked all workers"
    STOPPING = "waits for its workers to end, and forks no more"
    ENDING = "has no worker left"


_NEXT = {
    State.STARTING: (State.ABORTING, State.RUNNING),
    State.ABORTING: (State.STOPPING,),
    State.RUNNING: (State.STOPPING, State.ENDING),
    State.STOPPING: (State.ENDING,),
    State.ENDING: (),
}


class HostRun:
    """A run on this host: forks the workers and watches them. Its last events are `HostEnded` and `OutputEnded`."""

    def __init__(
        self,
        wanted: messages.ShareWanted,
        template: Template,
        mailbox: Mailbox,
        listening: socket.socket | None,
        ip: str,
        lease: HostLease | None,
        watchdog: Watchdog | None,
    ) -> None:
        self._wanted = wanted
        self.attempt = wanted.worker.attempt
        self._template = template
        self._mailbox = mailbox.of(self.attempt)
        self._listening = listening
        self._ip = ip
        self._lease = lease
        self._watchdog = watchdog
        self._error_files = ErrorFiles(template.folder, self.attempt.number)
        self._workers: dict[int, Worker] = {
            place.local_rank: Worker(place.local_rank, self._mailbox, self._error_files)
            for place in wanted.places
        }
        if watchdog is not None:
            watchdog.watch(self._workers)
        self._blocked = (
            BlockedWatch(wanted.blocked_after_s, self._workers) if wanted.blocked_after_s else None
        )
        self._stop_board = StopBoard()
        self._memory_group = memory_group.of_process(os.getpid())  # the workers' as well
        self._oom_kills_before = self._memory_group and self._memory_group.oom_kills
        self._state = State.STARTING
        self._is_told_to_stop = asyncio.Event()
        self._serves_others = listening is not None and wanted.places[0].hosts > 1
        """True while this host must keep the store for workers of other hosts, even if its own have ended."""
        self._may_fork = asyncio.Event()

    async def start(self, values: Sequence[Packed]) -> None:
        """Fork the workers. Return once every worker is forked, or the run has stopped before that."""
        refused = await self._unless_stopped(self._template.ready())
        if refused is not None:
            self._mailbox.put(refused)
            self._fork_no_more()
        elif self._template.death is not None and self._state is State.STARTING:
            self.template_is_gone(self._template.death)
        if self._template.loaded is not None:
            self._mailbox.put(self._template.loaded)
        if self._listening is not None:
            if self._state is State.STARTING:
                port: int = self._listening.getsockname()[1]
                store = messages.ForkStore(self.attempt, port)
                self._check(await self._template.fork(store, [self._listening.fileno()]))
            self._listening.close()
        if self._state is State.STARTING:
            self._check(await self._template.hold_call(values, self._is_starting))
        if self._lease is not None and self._state is State.STARTING:
            asked = self._lease.is_held()
            # Two tasks, as `_unless_stopped` needs them, would cost each launch some time.
            self._check_lease(
                await (asked if self._lease.is_decided else self._unless_stopped(asked))
            )
        if self._state is State.STARTING:
            self._mailbox.put(messages.CanFork())
            if self._wanted.forks_when_told:
                await self._unless_stopped(self._may_fork.wait())
        for place in self._wanted.places:
            if self._state is State.STARTING:
                await self._fork(place)
        pids = {worker.local_rank: worker.pid for worker in self._workers.values()}
        forked = tuple((rank, pid) for rank, pid in pids.items() if pid is not None)
        self._mailbox.put(messages.WorkersForked(forked))
        self._template.tell(messages.DropCall())
        self._become(State.RUNNING if self._state is State.STARTING else State.STOPPING)
        for worker in self._workers.values():
            if worker.pid is None:
                worker.abandon()
        self._end_if_over()

    def fork(self) -> None:
        """Let `start` continue, because all hosts can fork."""
        self._may_fork.set()

    async def value(self, local_rank: int) -> Packed | None:
        return await self._workers[local_rank].value()

    async def stacks(self, wanted: messages.StacksWanted) -> dict[int, str]:
        """Return the stacks of living workers by local rank; the text is empty if the worker did not answer."""
        living = [worker for worker in self._workers.values() if not worker.has_exited]
        texts = await asyncio.gather(*(worker.stacks(wanted) for worker in living))
        return {worker.local_rank: text for worker, text in zip(living, texts, strict=True)}

    def resume_output(self) -> None:
        for worker in self._workers.values():
            worker.resume_output()

    def ask_to_stop(self, asked: StopAsked) -> None:
        """Show a request to the function, also if it has not been called yet."""
        if self._state is not State.ENDING:
            self._stop_board.ask(asked)

    def stop(self, grace_s: float, signum: int, reason: StopReason | None = None) -> None:
        """Send the signal to the workers, then SIGKILL after `grace_s`. With 0, send SIGKILL at once.

        A worker that has failed gets only SIGKILL: it is already exiting, and has `grace_s` for its exit functions.
        `reason` is the reason of a request to the function, which Ray may deliver after this order.
        """
        if reason is not None:
            self.ask_to_stop(asked_within(reason, grace_s))
        self._fork_no_more()
        self._watch_no_more()  # the workers have a deadline now
        for worker in self._workers.values():
            worker.will_be_stopped()
        if grace_s > 0:
            self._signal(signum, spare_failed=True)
            asyncio.get_running_loop().call_later(grace_s, self._kill)
        else:
            self._kill()

    def others_have_ended(self) -> None:
        self._serves_others = False
        self._end_if_over()

    def has_exited(self, exited: messages.Exited) -> None:
        """Note that the template has reaped a worker or the store."""
        if exited.local_rank is not None:
            self._workers[exited.local_rank].ended(exited, self._oom_kills(exited))
            self._end_if_over()
        elif self._state is not State.ENDING:
            how = describe_exit(exited.exit_code, exited.signal)
            self._fail(f"the process that serves the store (pid {exited.pid}) {how}", "")

    def template_is_gone(self, death: messages.AgentFailed) -> None:
        """Note that the template died. The kernel killed the workers with it, and nobody will report their exits."""
        if self._state is not State.ENDING:
            self._mailbox.put(death)
            self.everything_is_gone()

    def everything_is_gone(self) -> None:
        """End the run, because nobody is left to report how the remaining workers exit."""
        self._fork_no_more()
        self._serves_others = False
        for worker in self._workers.values():
            worker.abandon()
        self._end_if_over()

    def _become(self, state: State) -> None:
        assert state in _NEXT[self._state], f"{self._state} -> {state}"
        self._state = state

    def _is_starting(self) -> bool:
        return self._state is State.STARTING

    def _fork_no_more(self) -> None:
        if self._state is State.STARTING:
            self._become(State.ABORTING)
            self._is_told_to_stop.set()
        elif self._state is State.RUNNING:
            self._become(State.STOPPING)

    def _oom_kills(self, exited: messages.Exited) -> OomKills | None:
        group = self._memory_group
        if group is None or exited.signal != signal.SIGKILL:
            return None
        before, after = self._oom_kills_before, group.oom_kills
        if before is None or after is None:
            return None
        return OomKills(str(group.path), group.limit, before, after)

    async def _unless_stopped(self, wanted: Coroutine[Any, Any, T]) -> T | None:
        """Await a coroutine until the run stops. Ctrl-C must not wait for an import of torch, or for other hosts."""
        waiting = asyncio.ensure_future(wanted)
        stopped = asyncio.ensure_future(self._is_told_to_stop.wait())
        await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        return None

    async def _fork(self, place: Place) -> None:
        wanted = self._wanted
        worker = self._workers[place.local_rank]
        visible, cuda_device = visible_gpus(
            wanted.gpu_ids, wanted.gpus_per_worker, place.local_rank
        )
        variables = place.variables(
            *wanted.worker.store,
            self.attempt.run_id,
            wanted.worker.restarts,
            wanted.worker.max_restarts,
        )
        own = wanted.own_variables[place.local_rank] if wanted.own_variables else {}
        answer = await self._template.fork(
            messages.ForkWorker(
                worker=wanted.worker,
                place=place,
                variables={
                    **variables,
                    **self._error_files.make_room(place.local_rank),
                    **({} if self._watchdog is None else self._watchdog.variables()),
                    "CUDA_VISIBLE_DEVICES": visible,
                    **own,
                },
                default_variables=self._default_variables(place),
                cuda_device=None if "CUDA_VISIBLE_DEVICES" in own else cuda_device,
            ),
            [*worker.fds, self._stop_board.fd],
        )
        worker.give_fds_away()
        if isinstance(answer, messages.Forked):
            worker.pid = answer.pid
        self._check(answer)

    def _default_variables(self, place: Place) -> dict[str, str]:
        """Return GLOO_SOCKET_IFNAME. By default gloo takes the interface of the hostname, often the loopback."""
        interface = interface_of(self._ip) if place.hosts > 1 else None
        return {} if interface is None else {"GLOO_SOCKET_IFNAME": interface}

    def _check(self, answer: messages.Forked | messages.ForkFailed | None) -> None:
        if isinstance(answer, messages.ForkFailed) and self._state is State.STARTING:
            self._fork_no_more()
            self._fail("no process could be forked", answer.reason)

    def _check_lease(self, is_held: bool | None) -> None:
        if not is_held and self._state is State.STARTING:
            self._fork_no_more()
            why = "the function and its arguments took long to arrive, and nothing was heard of the driver's pulse"
            self._fail("the host has no lease for its workers", why)

    def _watch_no_more(self) -> None:
        if self._watchdog is not None:
            self._watchdog.rest()
        if self._blocked is not None:
            self._blocked.close()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.others_have_ended()

    def _signal(self, signum: int, spare_failed: bool = False) -> None:
        living = [
            worker.local_rank
            for worker in self._workers.values()
            if not (worker.has_exited or (spare_failed and worker.has_failed))
        ]
        if living and self._state is not State.ENDING:
            self._template.tell(messages.SignalWorkers(tuple(living), signum))

    def _end_if_over(self) -> None:
        is_forked = self._state in (State.RUNNING, State.STOPPING)
        if not is_forked or self._serves_others:
            return
        if all(worker.has_exited for worker in self._workers.values()):
            self._become(State.ENDING)
            self._stop_board.close()
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        for worker in self._workers.values():
            await worker.until_taken()
        left = await self._template.end_run() if self._template.is_ready else ()
        self._watch_no_more()
        if self._lease is not None:
            self._lease.end()
        self._mailbox.put(messages.HostEnded(left))
        self._mailbox.put(messages.OutputEnded())
        # Last, since the driver waits for the events above.
        await asyncio.to_thread(self._error_files.remove)

    def _fail(self, what: str, evidence: str) -> None:
        self._mailbox.put(messages.AgentFailed(now_ns(), what, evidence))
