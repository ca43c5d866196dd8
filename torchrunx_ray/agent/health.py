"""The health of an agent over HTTP: 200 while all is well, 503 with the reason when not."""

import asyncio
import contextlib
import errno
import json
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_REQUEST_S = 5.0
"""Time for a client to send its request."""

_HEAD = 8192
"""Bytes of the longest request, without a body: nobody reads a body."""

_MOST = 256
"""Connections at a time. A further one ends the oldest."""

_BACKLOG = 1024

_CLOSING_S = 1.0

_PHRASES = {200: "OK", 400: "Bad Request", 405: "Method Not Allowed", 503: "Service Unavailable"}


class HealthPortError(Exception):
    """The port cannot be opened. The text is for the user."""


class HealthPortInUseError(HealthPortError):
    """Another process has the port now."""


class HealthServer:
    """Answers from a thread of its own, also if the agent's event loop is blocked.

    Own code, since the servers of Python's http.server have a thread for each connection, or one for all.
    """

    def __init__(self, ip: str, port: int, describe: Callable[[], dict[str, Any]]) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        try:
            self._socket = socket.create_server((ip, port), family=family)
        except OSError as error:
            raise _port_error(ip, port, error.errno) from None
        self.port: int = self._socket.getsockname()[1]
        self._describe = describe
        self._connections = OrderedDict[asyncio.Task[None], None]()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the host allows no more threads
            self._loop.close()
            self._socket.close()
            raise HealthPortError(
                "the host allows no more threads, and health checks need one"
            ) from None

    def close(self) -> None:
        """Close the port, so that another agent can open it."""
        with contextlib.suppress(RuntimeError):  # the thread has ended
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_CLOSING_S)
        self._socket.close()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._take, sock=self._socket, limit=_HEAD, backlog=_BACKLOG
        )
        await self._closing.wait()
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = None
        if len(self._connections) > _MOST:
            oldest, _ = self._connections.popitem(last=False)
            oldest.cancel()
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(_REQUEST_S):
                    writer.write(self._answer(*await _request(reader)))
                    await writer.drain()
                    writer.write_eof()
                    await reader.read(
                        _HEAD
                    )  # a reset would take the answer from a client that still sends
        finally:
            self._connections.pop(task, None)
            writer.transport.abort()

    def _answer(self, method: str, is_whole: bool) -> bytes:
        body: dict[str, Any]
        if not is_whole:
            status, body = 400, {"error": "this is no HTTP request, or its head is too long"}
        elif method not in ("GET", "HEAD"):
            status, body = 405, {"error": "use GET"}
        else:
            body = self._describe()
            status = 200 if body["healthy"] else 503
        content = json.dumps(body).encode() + b"\n"
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else content)


async def _request(reader: asyncio.StreamReader) -> tuple[str, bool]:
    """Return a request's method, and True if the head of the request is whole."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return "", False
    method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
    return method.decode("ascii", "replace"), b" HTTP/1." in rest


def _port_error(ip: str, port: int, number: int | None) -> HealthPortError:
    """Return the error for a port that cannot be opened, with advice."""
    kind, advice = HealthPortError, "Choose another port, or 0 for any free one."
    match number:
        case errno.EADDRINUSE:
            kind = HealthPortInUseError
            advice = f"Another agent or program on this node uses it. {advice}"
        case errno.EACCES:
            advice = f"Ports below 1024 need root, or the capability CAP_NET_BIND_SERVICE. {advice}"
        case errno.EADDRNOTAVAIL:
            advice = "The address that the node has in Ray is no address of this host."
        case _:
            pass
    reason = os.strerror(number or 0)
    return kind(f"the port of the health checks, {ip}:{port}, cannot be opened: {reason}. {advice}")
