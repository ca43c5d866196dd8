"""The agent's handle on its template process, through the keepers."""

import asyncio
import contextlib
import enum
import os
import signal
from collections.abc import Callable, Sequence

from torchrunx_ray.agent.keeper import Keeper
from torchrunx_ray.agent.machine.sweep import kill_marked
from torchrunx_ray.agent.mailbox import Slot
from torchrunx_ray.agent.output import Output
from torchrunx_ray.errors import describe_exit
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.values import memory, transfer
from torchrunx_ray.wire.values.payload import Packed
from torchrunx_ray.wire.values.transfer import Layout

_Reply = messages.CallHeld | messages.Forked | messages.ForkFailed | messages.RunEnded

_NO_CONTACT = (
    "the host had no contact with the driver for {:.0f} s: the driver or its machine was stopped, this host or its "
    "agent was stopped or very busy, or the network was cut"
)


class State(enum.Enum):
    """States of a template, as its agent knows them."""

    LOADING = "imports, and reads no messages"
    READY = "can fork"
    LEARNING = "imports what workers had to import, and forks after that"
    SPENT = "forks no more, and ends after its last child"
    REFUSED = "cannot be forked from, and ends"
    CLOSING = "ends because the agent wants it, or because it refused"
    DYING = "has ended unexpectedly; the keepers clean up"
    GONE = "has ended with its keepers"


_NEXT = {
    State.LOADING: (State.READY, State.REFUSED, State.CLOSING, State.DYING),
    State.READY: (State.LEARNING, State.CLOSING, State.DYING),
    State.LEARNING: (State.READY, State.SPENT, State.CLOSING, State.DYING),
    State.SPENT: (State.CLOSING, State.DYING),
    State.REFUSED: (State.CLOSING,),
    State.CLOSING: (State.GONE,),
    State.DYING: (State.CLOSING, State.GONE),
    State.GONE: (),
}


class Template:
    """Handle on a template process. `on_gone` is called if the template ends unexpectedly."""

    def __init__(
        self,
        keeper: Keeper,
        mailbox: Slot,
        on_exited: Callable[[messages.Exited], None],
        on_gone: Callable[[messages.AgentFailed], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._keeper = keeper
        self._channel = keeper.channel
        self.lease = keeper.lease
        self.folder = keeper.folder
        self.timer_file = keeper.timer_file
        self.loaded: messages.TemplateLoaded | None = None
        self._on_exited, self._on_gone = on_exited, on_gone
        self._refusal: messages.TemplateRefused | None = None
        self._replies: asyncio.Queue[tuple[_Reply, list[int]]] = asyncio.Queue()
        self._asking = asyncio.Lock()
        self._state = State.LOADING
        self._changed = asyncio.Event()
        """Set when the state changes, and then replaced."""
        self.death: messages.AgentFailed | None = None
        """Evidence of an unexpected end, if there was one."""
        self._keepers_ended = asyncio.Event()
        self._loop.add_reader(keeper.alive_fd, self._keepers_have_ended)
        self._stdout = Output(keeper.stdout_fd, None, "stdout", mailbox)
        self._stderr = Output(keeper.stderr_fd, None, "stderr", mailbox)
        self._channel.set_blocking(False)
        self._loop.add_reader(self._channel.fileno(), self._listen)

    def resume_output(self) -> None:
        self._stdout.resume()
        self._stderr.resume()

    @property
    def is_whole(self) -> bool:
        """True if the keepers and the template can serve another attempt.

        With one keeper, nobody could clean up if it was killed together with the agent.
        """
        may_serve = self._state in (State.LOADING, State.READY, State.LEARNING)
        return may_serve and self.lease.has_both_keepers

    @property
    def is_ready(self) -> bool:
        """True if the template listens, which it does not during its imports."""
        return self._state is not State.LOADING

    async def ready(self) -> messages.TemplateRefused | None:
        """Wait until the template can fork; return its refusal if it cannot."""
        await self._while_in(State.LOADING, State.CLOSING, State.DYING)
        return self._refusal

    async def until_learned(self) -> None:
        """Wait until the template does not learn."""
        await self._while_in(State.LEARNING)

    async def fork(
        self, wanted: messages.ForkStore | messages.ForkWorker, fds: Sequence[int]
    ) -> messages.Forked | messages.ForkFailed:
        reply, _ = await self._ask(wanted, fds)
        return reply if isinstance(reply, messages.Forked) else _as_refused(reply)

    async def hold_call(
        self, values: Sequence[Packed], is_wanted: Callable[[], bool]
    ) -> messages.ForkFailed | None:
        """Copy the function and its arguments to the template, so that every forked worker has them.

        The copy stops when `is_wanted` returns False.
        """
        reply, fds = await self._ask(messages.HoldCall(Layout.of(values)))
        if not isinstance(reply, messages.CallHeld):
            return _as_refused(reply)
        try:
            if reply.address is None:
                await asyncio.to_thread(memory.write_file, fds[0], transfer.moves(0, values))
            else:  # if the template ends meanwhile, `_listen` notices
                write = memory.Remote(reply.pid, fds[0], is_wanted).write
                await asyncio.to_thread(write, transfer.moves(reply.address, values))
        finally:
            os.close(fds[0])

    async def end_run(self) -> tuple[int, ...]:
        """Kill what is left of the run. Return the pids that SIGKILL did not end.

        Processes that end by themselves are left alone.
        """
        reply, _ = await self._ask(messages.EndRun())
        return reply.left if isinstance(reply, messages.RunEnded) else ()

    def hang_up(self) -> None:
        """Let the template end itself with its workers. The keepers do the same, unless they were killed."""
        if self._state is not State.GONE:
            with contextlib.suppress(OSError):  # the template has just ended
                self._channel.say_no_more()

    async def close(self) -> None:
        """End keepers and template with all their descendants, and wait until they are gone."""
        if self._state is State.GONE:
            return
        self._end_as(State.CLOSING)
        # A signal works even if the template does not listen.
        self._keeper.process.send_signal(signal.SIGTERM)
        self._channel.say_no_more()  # ends a template whose outer keeper was killed
        await self._while_in(State.CLOSING)

    async def _while_in(self, *states: State) -> None:
        while self._state in states:
            await self._changed.wait()

    def _become(self, state: State) -> None:
        assert state in _NEXT[self._state], f"{self._state} -> {state}"
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def _hear(self, state: State) -> None:
        """Take the state that the template tells, unless the agent ends it already."""
        if self._state is not State.CLOSING:
            self._become(state)

    def _end_as(self, state: State) -> None:
        if self._state is not State.CLOSING:
            self._become(State.CLOSING if self._state is State.REFUSED else state)

    async def _ask(self, message: object, fds: Sequence[int] = ()) -> tuple[_Reply, list[int]]:
        """Send one message at a time and return the reply: the channel's buffer is small, and a fork is quick."""
        async with self._asking:
            if self._state is State.GONE:
                return messages.RunEnded(()), []
            self.tell(message, fds)
            return await self._replies.get()

    def tell(self, message: object, fds: Sequence[int] = ()) -> None:
        """Send a message that has no reply, or whose reply somebody waits for; nothing if the template is gone."""
        if self._state is State.GONE:
            return
        # If the template is gone, `_listen` will notice, and a reply is made in its place.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(message, fds)

    def _listen(self) -> None:
        while True:
            try:
                message, fds = self._channel.receive()
            except BlockingIOError:
                return
            except (EOFError, OSError):
                self._end_as(State.DYING)
                self._loop.remove_reader(self._channel.fileno())
                self._cleaning = asyncio.ensure_future(self._has_gone(now_ns()))
                return
            match message:
                case messages.TemplateReady():
                    self.loaded = messages.TemplateLoaded(self._keeper.begun_ns, now_ns())
                    self._hear(State.READY)
                case messages.TemplateRefused():
                    self._refusal = message
                    self._hear(State.REFUSED)
                case messages.Learning():
                    self._hear(State.LEARNING)
                case messages.Learned():
                    self._hear(State.READY if message.may_fork else State.SPENT)
                case messages.Exited():
                    self._on_exited(message)
                case (
                    messages.CallHeld()
                    | messages.Forked()
                    | messages.ForkFailed()
                    | messages.RunEnded()
                ):
                    self._replies.put_nowait((message, fds))
                case _:
                    raise TypeError(f"a template does not send {message!r}")

    async def _has_gone(self, gone_at_ns: int) -> None:
        await self._keepers_ended.wait()
        exit_code = self._keeper.process.wait()
        with contextlib.suppress(OSError):  # out of descriptors; the end is reported anyway
            kill_marked(self._keeper.mark)
        await asyncio.to_thread(self._keeper.end_folder)
        self._channel.close()
        self.lease.close()
        self._stdout.drain_and_close()
        self._stderr.drain_and_close()
        is_unexpected = self._state is State.DYING
        self._become(State.GONE)
        if is_unexpected:
            self.death = self._describe_death(gone_at_ns, exit_code)
            self._on_gone(self.death)
        self._replies.put_nowait((messages.RunEnded(()), []))

    def _describe_death(self, gone_at_ns: int, exit_code: int) -> messages.AgentFailed:
        if self.lease.ran_out_at_ns:
            silent_s = (self.lease.ran_out_at_ns - self.lease.contact_at_ns) / 1e9
            what = "the workers' lease ran out, and their keeper ended them"
            evidence = _NO_CONTACT.format(silent_s)
            return messages.AgentFailed(gone_at_ns, what, evidence)
        how, said = _evidence(exit_code), self._stderr.last_lines
        lines = [f"{how}. Its last lines of stderr:", *said] if said else [how]
        what = "the template process, from which workers are forked, died"
        return messages.AgentFailed(gone_at_ns, what, "\n  ".join(lines))

    def _keepers_have_ended(self) -> None:
        self._loop.remove_reader(self._keeper.alive_fd)
        os.close(self._keeper.alive_fd)
        self._keepers_ended.set()


def _as_refused(reply: _Reply) -> messages.ForkFailed:
    gone = messages.ForkFailed("the template is gone")
    return reply if isinstance(reply, messages.ForkFailed) else gone


def _evidence(exit_code_of_keeper: int) -> str:
    """Describe how the template ended; its keeper passes on the exit code."""
    if exit_code_of_keeper < 0:
        return f"its keeper {describe_exit(None, -exit_code_of_keeper)}, too"
    killed = exit_code_of_keeper > 128
    return "it " + describe_exit(exit_code_of_keeper, exit_code_of_keeper - 128 if killed else None)
