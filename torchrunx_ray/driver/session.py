"""A placement that is kept for several runs."""

import asyncio
from asyncio import CancelledError
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

from torchrunx_ray.driver import interruption
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.background.own_lines import own_lines
from torchrunx_ray.driver.call.pack_call import Call, put_call, unique
from torchrunx_ray.driver.cluster import connection
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.placing import own_sessions
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.run import Run
from torchrunx_ray.driver.running.hosts import Hosts
from torchrunx_ray.driver.running.supervisor import Supervisor
from torchrunx_ray.driver.terminal.status_line import shown
from torchrunx_ray.driver.terminal.summary import follow
from torchrunx_ray.driver.tracebacks import short_traceback
from torchrunx_ray.errors import LaunchError, counted

P = ParamSpec("P")
R = TypeVar("R")

Stop = Literal["cancel", "kill"]

_CLOSING_S = 6.0
"""Time to wait for a session to close if it was interrupted while it opened.

Slow clean-up moves to the background sooner.
"""


class Session:
    """Hosts that stay reserved, so that nobody takes their GPUs between runs.

    Every run gets fresh worker processes. Runs execute one after another. The session stays usable after a
    failed run: processes that died are replaced. A session ends with `close()`, at the end of its `with`
    block, or with the driver. If an exception leaves the `with` block, runs that still go on are cancelled.

    In an event loop use `async with launcher.session() as session`. It waits for room, and at the end for
    the runs, without blocking the loop.
    """

    def __init__(self, options: Options) -> None:
        connection.connect()
        self._cluster = Connection()
        self._options = options
        self._hosts = Hosts(options)
        self._name = unique(options.name or "session")
        self._running: set[Run[Any]] = set()
        self._opening = loop.start(self._open())
        if not loop.is_called_in_one():
            self._wait_until_open()

    def run(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> LaunchResult[R]:
        """Call the function on every worker, and wait for all workers."""
        with short_traceback:
            return self.submit(func, *args, **kwargs).result()

    def submit(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """Start a run in the background."""
        with short_traceback:
            self._check_usable()
            call = put_call(func, args, kwargs, self._options)
            progress = Progress(call.run_name, call.files)
            life = follow(lambda: self._run(call, progress), progress, self._options)
            run: Run[R] = Run(life, progress, self._options.shutdown_timeout)
            self._running.add(run)
            # Called in the loop: Ctrl-C inside add_done_callback would leave the run's lock held.
            loop.running().call_soon_threadsafe(run.add_done_callback, self._running.discard)
            return run

    def close(self) -> None:
        """Wait for the submitted runs, then give the hosts back.

        Ctrl-C, or any other exception of a signal handler, cancels these runs. A second one kills them.
        """
        with short_traceback:
            self._close(("cancel", "kill"))

    def _close(self, stops: Sequence[Stop], told_of: BaseException | None = None) -> None:
        """Wait for the runs. Each interruption stops them by the next of `stops`."""
        if self._cluster.is_inherited:
            return  # only the parent process may close the session
        raised: BaseException | None = None
        for stop in (*stops, None):
            try:
                self._wait_until_closed(told_of)
                break
            except BaseException as error:
                if not interruption.is_interruption(error):
                    raise
                raised, told_of = error, error if stop == "cancel" else None
                self._stop_all(stop)
        else:
            loop.start(self._close_hosts())  # nobody waits for this
        try:
            if raised is not None:
                raise raised
        finally:
            del raised, told_of  # they refer to this frame

    def _wait_until_closed(self, told_of: BaseException | None) -> None:
        for run in list(self._running):
            interruption.wait_after(told_of, run, run.name, self._options.shutdown_timeout)
        closing = loop.start(self._close_hosts())
        loop.wait(closing)
        closing.result()

    def _stop_all(self, stop: Stop | None) -> None:
        for run in list(self._running):
            if stop == "cancel":
                run.cancel()
            elif stop == "kill":
                run.kill()

    def __repr__(self) -> str:
        if self._hosts.is_closed:
            return "<Session: closed>"
        runs = sum(not run.done() for run in list(self._running))
        state = f"{counted(runs, 'run')} under way" if runs else "idle"
        return f"<Session on {', '.join(self._hosts.names) or 'no hosts'}: {state}>"

    async def _open(self) -> None:
        progress = Progress(self._name)
        async with shown(progress, self._options):
            await self._hosts.open(progress)
        own_sessions.note_open(self._name, lambda: self._hosts.held)
        await own_lines.written()

    async def _run(self, call: Call, progress: Progress) -> LaunchResult[Any] | Failures:
        await asyncio.shield(asyncio.wrap_future(self._opening))
        return await Supervisor(self._hosts, self._options, call, progress).run()

    async def _close_hosts(self) -> None:
        self._opening.cancel()  # it may still wait for room
        try:
            await self._hosts.close()
        finally:
            own_sessions.forget(self._name)

    def _wait_until_open(self) -> None:
        try:
            loop.wait(self._opening)
            self._opening.result()
        except BaseException:
            # The session may have opened at this moment.
            loop.wait(loop.start(self._close_hosts()), _CLOSING_S)
            raise

    def _check_usable(self) -> None:
        if self._cluster.is_inherited:
            raise connection.forked()
        if not self._cluster.is_ours():
            raise LaunchError(
                "the session's hosts are gone, because the driver has left the Ray cluster of the session: by "
                "ray.shutdown(), or because its ray:// connection was lost. Open a new session."
            )

    def __enter__(self) -> "Session":
        with short_traceback:
            self._wait_until_open()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with short_traceback:
            if error is None:
                self._close(("cancel", "kill"))
                return
            self._stop_all("cancel")
            was_interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            self._close(("kill",) if was_interrupted else ("cancel", "kill"), error)

    async def __aenter__(self) -> "Session":
        with short_traceback:
            try:
                await asyncio.wrap_future(self._opening)
            except BaseException:
                closing = loop.start(self._close_hosts())
                await loop.to_the_end(asyncio.wrap_future(closing))
                raise
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._cluster.is_inherited:
            return
        if error is not None:
            self._stop_all("cancel")
        cancelled: BaseException | None = error if isinstance(error, CancelledError) else None
        for run in list(self._running):
            try:
                await run.until_ended(was_cancelled=cancelled is not None)
            except CancelledError as again:
                cancelled = again
                self._stop_all("cancel")
        closing = loop.start(self._close_hosts())
        await loop.to_the_end(asyncio.wrap_future(closing))
        try:
            if cancelled is not None and cancelled is not error:
                raise cancelled
        finally:
            del cancelled, error  # they refer to this frame
