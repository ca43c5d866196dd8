"""Steps that turn a fresh fork into a worker."""

import faulthandler
import os
import pickle
import signal
import sys
from typing import NoReturn

from torchrunx_ray.wire import linux, messages, process_tree
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.title import PADDING
from torchrunx_ray.wire.values.transfer import Layout
from torchrunx_ray.worker import entry
from torchrunx_ray.worker.function.call import HeldCall

_NOT_RESETTABLE = {signal.SIGKILL, signal.SIGSTOP}
_PYTHONS_OWN = {signal.SIGPIPE: signal.SIG_IGN, signal.SIGXFSZ: signal.SIG_IGN}
"""Settings that a fresh interpreter makes by itself."""


def become_worker(
    wanted: messages.ForkWorker,
    fds: list[int],
    template_pid: int,
    call: HeldCall,
    start_method: messages.StartMethod,
) -> NoReturn:
    """Turn a new child of the template into the worker that `wanted` describes.

    With start_method "spawn", a fresh interpreter does the rest (see `entry.main`).
    """
    channel_fd, stdout_fd, stderr_fd, records_fd, stacks_fd, stop_fd = fds
    os.setpgid(0, 0)
    process_tree.die_with(template_pid)
    _reset_signals()
    _take_streams(stdout_fd, stderr_fd)
    os.environ.update(wanted.default_variables | os.environ | wanted.variables)
    if start_method == "spawn":
        passed_fds = (channel_fd, records_fd, stacks_fd, stop_fd, call.fd)
        _exec_fresh_interpreter(wanted, call.layout, passed_fds)
    channel = Channel.from_fd(channel_fd)
    entry.live(wanted, channel, records_fd, stacks_fd, stop_fd, call.values())


def _reset_signals() -> None:
    faulthandler.disable()  # so that the worker's own enable installs the handlers again
    for signum in signal.valid_signals() - _NOT_RESETTABLE:
        signal.signal(signum, _PYTHONS_OWN.get(signum, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _take_streams(stdout_fd: int, stderr_fd: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (stdout_fd, 1), (stderr_fd, 2)):
        os.dup2(fd, target)
        os.close(fd)


def _exec_fresh_interpreter(
    wanted: messages.ForkWorker, layout: Layout, passed_fds: tuple[int, ...]
) -> NoReturn:
    task_fd = linux.memory_file("torchrunx_ray_spawn")
    os.write(task_fd, pickle.dumps((wanted, layout, sys.path, os.environ.get("PYTHONPATH"))))
    os.lseek(task_fd, 0, os.SEEK_SET)
    fds = (task_fd, *passed_fds)
    for fd in fds:
        os.set_inheritable(fd, True)
    package_parent = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = os.environ | {"PYTHONPATH": package_parent}
    command = [sys.executable, "-P", "-m", "torchrunx_ray.worker.entry", *map(str, fds), PADDING]
    os.execve(sys.executable, command, environment)
