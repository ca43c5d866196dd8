"""Main function of a worker: join the process group, call the function, report one outcome, exit."""

import atexit
import contextlib
import faulthandler
import multiprocessing.context
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torchrunx_ray.wire import messages
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.stop_board import StopReader
from torchrunx_ray.wire.title import set_title
from torchrunx_ray.wire.values import tensors
from torchrunx_ray.wire.values.payload import Packed
from torchrunx_ray.wire.values.transfer import map_file
from torchrunx_ray.worker import dns, preload
from torchrunx_ray.worker.function import (
    context,
    group,
    logs,
    main_module,
    open_files,
    outcome,
    program,
    stacks,
    timer_client,
)


def main() -> NoReturn:
    """Start a worker with start_method "spawn". The command line has its descriptors."""
    task_fd, channel_fd, records_fd, stacks_fd, stop_fd, call_fd = map(int, sys.argv[1:7])
    with open(task_fd, "rb") as file:
        wanted, layout, sys_path, python_path = pickle.load(file)
    sys.path[:] = sys_path
    restore_python_path(python_path)
    for fd in (channel_fd, records_fd, stacks_fd, stop_fd):
        os.set_inheritable(fd, False)
    channel = Channel.from_fd(channel_fd)
    live(wanted, channel, records_fd, stacks_fd, stop_fd, map_file(call_fd, layout))


def restore_python_path(python_path: str | None) -> None:
    """Restore PYTHONPATH: our own interpreters start with one that finds only this package."""
    if python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = python_path


def live(
    wanted: messages.ForkWorker,
    channel: Channel,
    records_fd: int,
    stacks_fd: int,
    stop_fd: int,
    values: list[Packed],
) -> NoReturn:
    """Run the worker and never return. One outcome is always reported, unless the process dies."""
    set_title(f"worker rank {wanted.place.rank}", wanted.worker.attempt.run_id)
    context.begin(wanted, StopReader(stop_fd))
    _settle_in(wanted.worker.argv)
    if wanted.worker.log_level is not None:
        logs.take_records(records_fd, wanted.worker.log_level)
    stacks.answer_on(stacks_fd)
    dns.threads_are_ours()
    open_files.watch()
    preload.note_late_imports()
    timer_client.configure()
    local_rank = wanted.place.local_rank
    worker_pid = os.getpid()
    leave: Callable[[], None] | None = None
    try:
        leave_group = group.join(wanted)
        channel.send(messages.Joined(local_rank, now_ns()))
        call = _unpack_call(values, wanted.worker.hostname)
        program.begin(channel, preload.flush)
        channel.send(messages.Started(local_rank, worker_pid, now_ns()))
        value = outcome.value_of(call)
        if os.getpid() != worker_pid:
            _end_forked_child(None)
        outcome.report_value(channel, wanted, value)
        leave = leave_group
    except BaseException as error:
        if os.getpid() != worker_pid:
            _end_forked_child(error)
        outcome.report_failure(channel, wanted, error)
    _end(leave)


def _settle_in(argv: Sequence[str]) -> None:
    sys.argv[:] = argv  # the function may parse its script's command line
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # open for as long as the process lives
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    faulthandler.enable(file=2)  # shows where a crash in C code happened
    # Only the default is set, so the function may choose another. If the default is not fork (Python 3.14),
    # a DataLoader cannot pickle a Dataset class of the user's script.
    default: Any = vars(multiprocessing.context)["_default_context"]  # it has no public name
    default._default_context = multiprocessing.get_context("fork")
    _draw_other_numbers_than_peers()


def _draw_other_numbers_than_peers() -> None:
    """Seed torch's and numpy's generators again if only their import in the template seeded them.

    If a module in `preload` has seeded them, the same numbers are wanted everywhere. Python reseeds its own
    generator after every fork.
    """
    torch: Any = sys.modules.get("torch")
    # A seed that torch takes from the system has more bits than a seed that people choose.
    if torch is not None and torch.initial_seed() >= 2**32:
        torch.default_generator.seed()
    generators: Any = sys.modules.get("numpy.random")
    # AttributeError: numpy is not imported, or is older than 1.25 and does not show its seed.
    with contextlib.suppress(AttributeError):
        if generators.get_bit_generator().seed_seq is not None:  # only its import has seeded it
            generators.seed()


def _unpack_call(values: list[Packed], hostname: str) -> Callable[[], Any]:
    tensors.bring_all_to_current_device()
    packed, *inserted = values
    values.clear()  # from here on only used values keep the memory behind them
    with main_module.brought_by_the_call():
        return outcome.unpack_call(packed, inserted, hostname)


def _end_forked_child(error: BaseException | None) -> NoReturn:
    """End a process that the function forked and that left the function, since this process is not the worker."""
    code: object = 0
    if isinstance(error, SystemExit):
        code = error.code
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    preload.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _end(leave_group: Callable[[], None] | None) -> NoReturn:
    """Exit as an interpreter does. After a failure (None), skip steps that could wait for a peer."""
    if leave_group is not None:
        _join_threads()
        try:
            leave_group()
        except BaseException:
            pass  # a peer failed, and so did the launch; the agent already has this rank's value
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  # as multiprocessing's children do
    open_files.finish()
    preload.flush()
    os._exit(1 if leave_group is None else 0)


def _join_threads() -> None:
    """Wait until the function's own threads have ended."""
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # no public name
    except BaseException:
        pass  # a signal handler of the function raised; the agent already has the value


if __name__ == "__main__":
    main()
