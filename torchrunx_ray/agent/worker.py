"""The agent's handle on one worker: its channel, its output, its outcome."""

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
from collections.abc import Sequence

from torchrunx_ray.agent.error_files import ErrorFiles
from torchrunx_ray.agent.mailbox import Slot
from torchrunx_ray.agent.output import Output
from torchrunx_ray.agent.scopes import Scope
from torchrunx_ray.agent.stacks import StackReader
from torchrunx_ray.errors import OomKills
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.values import transfer
from torchrunx_ray.wire.values.memory import Remote
from torchrunx_ray.wire.values.payload import Packed, pack
from torchrunx_ray.wire.values.transfer import Layout

_PIPES: tuple[messages.Stream, ...] = ("stdout", "stderr", "records")
"""Streams that have a pipe, in the order of `ForkWorker`."""


class Worker:
    """Handle on one worker: turns its messages, its output and its exit into events."""

    def __init__(self, local_rank: int, mailbox: Slot, error_files: ErrorFiles) -> None:
        self.local_rank = local_rank
        self.has_outcome = False
        self.has_failed = False
        self.has_exited = False
        self._is_replaced = False
        """True once a program has the worker's place."""
        self._is_told_to_stop = False
        self._mailbox = mailbox
        self._error_files = error_files
        self._loop = asyncio.get_running_loop()
        self._value: asyncio.Future[Packed | None] = self._loop.create_future()
        self._taking: asyncio.Task[None] | None = None
        self._channel, self._theirs = Channel.pair()
        self._channel.set_blocking(False)
        self._loop.add_reader(self._channel.fileno(), self._listen)
        self._outputs: dict[messages.Stream, Output] = {}
        self._pipes_theirs: list[int] = []
        for stream in _PIPES:
            ours, theirs = os.pipe()
            self._pipes_theirs.append(theirs)
            self._outputs[stream] = Output(ours, local_rank, stream, mailbox)
        self._stacks = StackReader(local_rank, mailbox)
        self.pid: int | None = None
        """None until the worker is forked."""

    @property
    def fds(self) -> list[int]:
        """The worker's ends of its channel, pipes and socket, in the order of `ForkWorker`."""
        return [self._theirs.fileno(), *self._pipes_theirs, self._stacks.theirs]

    def give_fds_away(self) -> None:
        """Close our copies of the worker's ends, so that its death closes the last ones. Safe to repeat."""
        if self._theirs.fileno() >= 0:
            self._theirs.close()
            _close_all([*self._pipes_theirs, self._stacks.theirs])

    async def value(self) -> Packed | None:
        """Return the function's value, once; None if the worker ended without a value.

        The agent then drops its copy, since Ray has the value.
        """
        packed = await asyncio.shield(self._value)
        self._value = self._loop.create_future()
        self._value.set_result(None)
        return packed

    async def stacks(self, wanted: messages.StacksWanted) -> str:
        """Return the worker's Python stacks; empty if the worker does not answer, as other programs do not."""
        if self.pid is None or self._is_replaced:
            return ""
        return await self._stacks.ask(self.pid, wanted)

    def will_be_stopped(self) -> None:
        """Note that the worker gets SIGTERM. A program that then exits with 0 has not done all its work."""
        self._is_told_to_stop = True

    async def until_taken(self) -> None:
        """Wait until a pending copy of the worker's value is done."""
        if self._taking is not None:
            await asyncio.wait([self._taking])

    def resume_output(self) -> None:
        for output in self._outputs.values():
            output.resume()

    def ended(self, exited: messages.Exited, oom_kills: OomKills | None) -> None:
        """Note that the worker was reaped and its group killed. No more messages will come."""
        if self._is_replaced and not self.has_outcome and exited.exit_code == 0:
            self._finish(
                pack([("the value of a program", None)]),
                exited.time_ns,
                has_seen_stop=self._is_told_to_stop,
            )
        self._close_books()
        if self.has_outcome:
            self._mailbox.put(exited)
        else:
            said = self._outputs["stderr"].last_lines
            recorded = self._error_files.read(self.local_rank)
            died = messages.Died(exited, said, oom_kills, recorded, self._is_replaced)
            self._mailbox.put(died)

    @property
    def is_running(self) -> bool:
        """True from the fork until the worker has an outcome."""
        return self.pid is not None and not (self.has_exited or self.has_outcome)

    def has_stayed_in(self, scope: Scope, stacks: str) -> None:
        """Note that a scope has expired. If it asks for a signal, that is the worker's outcome."""
        assert self.pid is not None
        self.has_outcome = scope.signal > 0
        # A worker that has got SIGTERM is about to exit; see `HostRun.stop`.
        self.has_failed = scope.signal == signal.SIGTERM and scope.process.pid == self.pid
        self._outputs["stderr"].drain()
        self._mailbox.put(
            messages.ScopeExpired(
                local_rank=self.local_rank,
                pid=self.pid,
                in_pid=scope.process.pid,
                time_ns=now_ns(),
                scope=scope.name,
                seconds=scope.seconds,
                signal=scope.signal,
                stacks=stacks,
                last_lines=self._outputs["stderr"].last_lines,
                recorded=self._error_files.read(self.local_rank),
            )
        )

    def abandon(self) -> None:
        """Give up a worker whose exit nobody will report: it was never forked, or died with its template."""
        if not self.has_exited:
            self._close_books()

    def _close_books(self) -> None:
        self.has_exited = True
        self.give_fds_away()
        self._listen()
        if self._channel.fileno() >= 0:
            self._hang_up()
        self._stacks.close()
        for output in self._outputs.values():
            output.drain_and_close()
        if not self._value.done():
            self._value.set_result(None)

    def _listen(self) -> None:
        while self._channel.fileno() >= 0:
            try:
                message, fds = self._channel.receive()
            except BlockingIOError:
                return
            except (EOFError, ConnectionResetError):  # the latter if it left a message unread
                # This need not be the worker's death, which the template reports with the exit status.
                self._hang_up()
                return
            except Exception as error:
                what = "the agent could not receive a worker's message"
                evidence = f"{type(error).__name__}: {error}"
                self._mailbox.put(messages.AgentFailed(now_ns(), what, evidence))
                self._hang_up()
                return
            if self.has_outcome:
                _close_all(fds)
                continue  # only the first outcome counts; a process that the function forked may send another
            match message:
                case messages.Returned():
                    self._taking = asyncio.ensure_future(self._take_value(message, fds[0]))
                case messages.Failed():
                    self.has_outcome = self.has_failed = True
                    self._outputs["stderr"].drain()
                    self._mailbox.put(
                        dataclasses.replace(
                            message,
                            last_lines=self._outputs["stderr"].last_lines,
                            recorded=self._error_files.read(self.local_rank),
                        )
                    )
                case messages.Joined() | messages.Started():
                    self._mailbox.put(message)
                case messages.Replaced():
                    self._is_replaced = True
                    self._answer(messages.Taken())
                case _:
                    raise TypeError(f"a worker does not send {message!r}")

    async def _take_value(self, returned: messages.Returned, fd: int) -> None:
        """Copy the value and tell the worker that it may exit, or report why the copy failed."""
        try:
            packed = await asyncio.to_thread(self._copy, returned, fd)
        except Exception as error:
            is_refused = isinstance(error, OSError) and error.errno != errno.ENOMEM
            if is_refused and not isinstance(returned.value, Layout):
                self._answer(messages.NotReadable())
            else:  # such as out of memory or of threads
                self._cannot_take(error)
            return
        self._listen()  # a signal handler may have raised in the worker during the copy
        if packed is not None and self._is_wanted():
            self._finish(packed, returned.time_ns, has_seen_stop=returned.has_seen_stop)
            self._answer(messages.Taken())

    def _finish(self, value: Packed, time_ns: int, *, has_seen_stop: bool) -> None:
        self.has_outcome = True
        self._value.set_result(value)
        self._mailbox.put(messages.Finished(self.local_rank, time_ns, value.size, has_seen_stop))

    def _copy(self, returned: messages.Returned, fd: int) -> Packed | None:
        """Return a copy of the value; None if it is not wanted any more. Runs in a thread."""
        if isinstance(returned.value, Layout):
            return transfer.map_file(fd, returned.value)[0]
        try:
            return transfer.take(Remote(returned.pid, fd, self._is_wanted), returned.value)
        finally:
            os.close(fd)

    def _is_wanted(self) -> bool:
        """Return False if the worker has exited or has another outcome: its value then does not count."""
        return not (self.has_exited or self.has_outcome)

    def _cannot_take(self, error: Exception) -> None:
        if self._is_wanted():
            what = f"the agent could not copy the return value of local rank {self.local_rank}"
            evidence = f"{type(error).__name__}: {error}"
            self._mailbox.put(messages.AgentFailed(now_ns(), what, evidence))

    def _answer(self, message: object) -> None:
        if self._channel.fileno() >= 0:
            with contextlib.suppress(OSError):  # the worker has ended
                self._channel.send(message)

    def _hang_up(self) -> None:
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
