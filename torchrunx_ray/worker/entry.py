"""A worker's life: join the process group, call the function, report one outcome, end."""

import atexit
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torchrunx_ray.wire import messages
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.payload import Packed
from torchrunx_ray.worker import group, outcome


def main() -> NoReturn:
    """Where a worker of start_method "spawn" begins, with the descriptors named on its command line."""
    task_fd, channel_fd, function_fd = (int(argument) for argument in sys.argv[1:])
    with open(task_fd, "rb") as file:
        wanted, sys_path, python_path = pickle.load(file)
    sys.path[:] = sys_path
    if python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = python_path
    for fd in (channel_fd, function_fd):
        os.set_inheritable(fd, False)
    live(wanted, Channel.from_fd(channel_fd), function_fd)


def live(wanted: messages.ForkWorker, channel: Channel, function_fd: int) -> NoReturn:
    """Never returns; whatever happens, one outcome is reported, unless the process dies."""
    _settle_in(wanted.argv)
    local_rank = wanted.place.local_rank
    failed = True
    try:
        group.join(wanted)
        channel.send(messages.Joined(local_rank))
        call = _unpack_function(function_fd, wanted.hostname)
        channel.send(messages.Started(local_rank))
        value = outcome.value_of(call)
        outcome.report_value(channel, wanted, value)
        failed = False
    except BaseException as error:
        outcome.report_failure(channel, wanted, error)
    _end(failed)


def _settle_in(argv: Sequence[str]) -> None:
    sys.argv[:] = argv  # a function may parse its script's command line
    # A module of its own: a child that multiprocessing spawns would import the keeper as main.
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # open for as long as the process lives
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    # Where another method is the default (Python 3.14), a DataLoader could not pickle a Dataset
    # class of the user's script.
    multiprocessing.set_start_method("fork", force=True)


def _unpack_function(function_fd: int, hostname: str) -> Callable[[], Any]:
    packed = Packed.map_file(function_fd)
    os.close(function_fd)
    return outcome.unpack_call(packed, hostname)


def _end(failed: bool) -> NoReturn:
    """End as an interpreter does, less what could wait for a peer that is gone."""
    if not failed:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # joins the function's own threads; no public name
        group.leave()
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # what multiprocessing's children call, too
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the function closed it
            pass
    ctypes.CDLL(None).fflush(None)  # what C code printed
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
