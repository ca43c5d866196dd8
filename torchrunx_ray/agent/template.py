"""The agent's hold on its template process, through the keeper."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torchrunx_ray.agent.sweep import kill_marked
from torchrunx_ray.errors import describe_exit
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.environment import MARK

_PACKAGE_PARENT = str(Path(__file__).parents[2])


class Template:
    """A keeper with its template. Started at once; usable from an event loop after `attach`."""

    def __init__(
        self,
        environment: Mapping[str, str],
        cwd: str,
        preload: Sequence[str],
        start_method: messages.StartMethod,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._channel, theirs = Channel.pair()
        self.stdout_fd, stdout = os.pipe()
        self.stderr_fd, stderr = os.pipe()
        # -P and PYTHONPATH find this package and nothing else; the template then takes over the
        # agent's sys.path, and puts the variable back for what the function may start.
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "torchrunx_ray.worker.keeper", str(theirs.fileno())],
            env={**environment, "PYTHONPATH": _PACKAGE_PARENT, MARK: self._mark},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        os.close(stdout)
        os.close(stderr)
        self._channel.send(
            messages.TemplateSetup(
                tuple(sys.path),
                (("PYTHONPATH", environment.get("PYTHONPATH")),),
                tuple(preload),
                start_method,
            )
        )

    def attach(
        self,
        on_exited: Callable[[messages.Exited], None],
        on_gone: Callable[[str], None],
    ) -> None:
        """Begin to listen. `on_gone(evidence)` is called when the template ended unasked."""
        self._loop = asyncio.get_running_loop()
        self._on_exited, self._on_gone = on_exited, on_gone
        self._ready: asyncio.Future[messages.TemplateRefused | None] = self._loop.create_future()
        self._replies: asyncio.Queue[messages.Forked | messages.RunEnded | None] = asyncio.Queue()
        self._forking = asyncio.Lock()
        self._closing = False
        self._keeper_ended = asyncio.Event()
        self._gone = asyncio.Event()
        self._keeper_fd = os.pidfd_open(self._keeper.pid)
        self._loop.add_reader(self._keeper_fd, self._reap_keeper)
        self._channel.set_blocking(False)
        self._loop.add_reader(self._channel.fileno(), self._listen)

    @property
    def is_whole(self) -> bool:
        """Whether keeper and template are there for another run."""
        return not (self._closing or self._keeper_ended.is_set())

    async def ready(self) -> messages.TemplateRefused | None:
        """Wait until it can fork; its refusal where it cannot."""
        return await asyncio.shield(self._ready)

    async def fork_store(self, listening: socket.socket) -> int | None:
        port: int = listening.getsockname()[1]
        return await self._fork(messages.ForkStore(port), [listening.fileno()])

    async def fork_worker(self, wanted: messages.ForkWorker, fds: Sequence[int]) -> int | None:
        return await self._fork(wanted, fds)

    def signal_workers(self, local_ranks: Sequence[int], signum: int) -> None:
        self._tell(messages.SignalWorkers(tuple(local_ranks), signum))

    async def end_run(self) -> None:
        """Return when nothing of the run lives, or the template is gone."""
        self._tell(messages.EndRun())
        while isinstance(await self._replies.get(), messages.Forked):
            pass

    async def close(self) -> None:
        """End keeper and template with all that is below them, and wait until they are gone."""
        self._closing = True
        if self._keeper_ended.is_set():
            self._channel.say_no_more()
        else:
            self._keeper.send_signal(signal.SIGTERM)
            await self._keeper_ended.wait()
        await self._gone.wait()

    async def _fork(self, message: object, fds: Sequence[int]) -> int | None:
        """The child's pid; None where the template is gone."""
        async with self._forking:  # one at a time: the channel's buffer is small, a fork quick
            self._tell(message, fds)
            reply = await self._replies.get()
            return reply.pid if isinstance(reply, messages.Forked) else None

    def _tell(self, message: object, fds: Sequence[int] = ()) -> None:
        try:
            self._channel.send(message, fds)
        except OSError:  # it is gone, and `_listen` is about to hear of it
            self._replies.put_nowait(None)

    def _listen(self) -> None:
        while True:
            try:
                message, _ = self._channel.receive()
            except BlockingIOError:
                return
            except (EOFError, OSError):
                self._loop.remove_reader(self._channel.fileno())
                self._cleaning = asyncio.ensure_future(self._has_gone())
                return
            match message:
                case messages.TemplateReady():
                    self._ready.set_result(None)
                case messages.TemplateRefused():
                    self._ready.set_result(message)
                case messages.Exited():
                    self._on_exited(message)
                case messages.Forked() | messages.RunEnded():
                    self._replies.put_nowait(message)
                case _:
                    raise TypeError(f"a template does not send {message!r}")

    async def _has_gone(self) -> None:
        await self._keeper_ended.wait()
        kill_marked(self._mark)
        self._channel.close()
        self._gone.set()
        refused = self._ready.done() and self._ready.result() is not None
        if not self._closing and not refused:
            self._on_gone(_evidence(self._keeper.returncode))
        self._closing = True
        self._replies.put_nowait(None)
        if not self._ready.done():
            self._ready.set_result(None)

    def _reap_keeper(self) -> None:
        self._loop.remove_reader(self._keeper_fd)
        os.close(self._keeper_fd)
        self._keeper.wait()
        self._keeper_ended.set()


def _evidence(exit_code_of_keeper: int) -> str:
    """How the template ended, which its keeper passes on."""
    if exit_code_of_keeper < 0:
        return f"its keeper {describe_exit(None, -exit_code_of_keeper)}, too"
    killed = exit_code_of_keeper > 128
    return "it " + describe_exit(exit_code_of_keeper, exit_code_of_keeper - 128 if killed else None)
