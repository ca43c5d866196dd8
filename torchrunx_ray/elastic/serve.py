"""The process of a run whose agent is in a forked child of a driver; see `fresh`."""

import contextlib
import functools
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from torchrunx_ray.elastic.reach import OwnRun
from torchrunx_ray.elastic.run import Work
from torchrunx_ray.errors import LaunchError, PayloadError
from torchrunx_ray.wire import process_tree
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.values.payload import Packed, pack


class _Stopped(BaseException):
    """The agent has ended, or wants this process to end."""


def main(fd: int, agent_pid: int) -> None:
    """Serve the requests of one agent until it closes the run, ends, or sends SIGTERM."""
    signal.signal(signal.SIGTERM, _stop)
    channel = Channel.from_fd(fd)
    run: OwnRun | None = None
    try:
        with contextlib.suppress(_Stopped, EOFError, OSError):
            process_tree.die_with(agent_pid, signal.SIGTERM)
            while True:
                request: Any = channel.receive()[0]
                method, args = request
                if method == "begin":
                    run = _begun(channel, *args)
                    continue
                _answer(channel, functools.partial(_called, run, method, args))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if run is not None:
            run.close(signal.SIGTERM)


def _begun(
    channel: Channel,
    argv: tuple[str, ...],
    options: Any,
    call: tuple[Any, tuple[Any, ...]],
    numa_options: Any,
) -> OwnRun | None:
    sys.argv[:] = argv
    entrypoint, args = call
    begun: list[OwnRun] = []

    def begin() -> None:
        begun.append(OwnRun(options, Work(entrypoint, args, sys.executable, numa_options)))

    _answer(channel, begin)
    return begun[0] if begun else None


def _called(run: OwnRun | None, name: str, args: tuple[Any, ...]) -> Any:
    """Return what a method of the run returns, or the value of a property."""
    found = getattr(run, name)
    return found(*args) if callable(found) else found


def _answer(channel: Channel, call: Callable[[], Any]) -> None:
    """Send what a call returns, or raises."""
    try:
        packed = pack([("the answer", (False, call()))])
    except Exception as error:
        packed = _packed_error(error)
    channel.send(packed)


def _packed_error(error: Exception) -> Packed:
    try:
        return pack([("the answer", (True, error))])
    except PayloadError:
        told = LaunchError("".join(traceback.format_exception(error)))
        return pack([("the answer", (True, told))])


def _stop(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise _Stopped
