"""The function's outcome, as one message to the agent."""

import bdb
import contextlib
import dataclasses
import errno
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torchrunx_ray import errors
from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire import foreign_errors, messages
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.values import memory, transfer
from torchrunx_ray.wire.values.culprit import users_part
from torchrunx_ray.wire.values.exceptions import dump_exception, own, text_of
from torchrunx_ray.wire.values.payload import Packed, pack
from torchrunx_ray.wire.values.transfer import Layout, Spans
from torchrunx_ray.worker.function import context, exits

_TWICE_NOTE = (
    "torchrunx_ray made a process group before it called the function. To make your own, launch with "
    "backend=None, or call destroy_process_group() first."
)

_NO_STDIN_NOTE = (
    "If breakpoint() or pdb raised this: a worker has no stdin, so a debugger that reads stdin ends at once. Call "
    "the function directly in one process, or let the worker wait for a debugger that attaches: "
    "debugpy.listen(...), then debugpy.wait_for_client(). PYTHONBREAKPOINT=0 makes breakpoint() do nothing. "
    "run.stacks() shows what every rank is doing."
)

_NOT_REPORTED_ADVICE = (
    "Did the function close descriptors that it had not opened, as os.closerange does?"
)

_PACKAGE = f"{os.path.dirname(errors.__file__)}{os.sep}"

_SHORT = 4096
"""Characters of each text that are sent if the full text cannot be."""

_offered: list[Packed] = []
"""Values that the agent may be reading, kept alive here."""


def unpack_call(packed: Packed, inserted: Sequence[Packed], hostname: str) -> Callable[[], Any]:
    """Return the function bound to its arguments; raise PayloadError if unpickling fails."""
    try:
        func, args, kwargs, cells = packed.unpack(inserted)
    except Exception as error:
        raise PayloadError(
            path="the function or its arguments",
            reason=f"{type(error).__name__}: {text_of(error)}",
            hostname=hostname,
            step="unpickle",
            missing_module=error.name if isinstance(error, ModuleNotFoundError) else None,
        ) from users_part(error)
    for name, lines in cells.items():  # for tracebacks
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    return lambda: func(*args, **kwargs)


def value_of(call: Callable[[], Any]) -> Any:
    """Call the function; `sys.exit(0)` counts as returning None."""
    try:
        return call()
    except SystemExit as error:
        if error.code in (None, 0):
            return None
        raise


def report_value(channel: Channel, wanted: messages.ForkWorker, value: object) -> None:
    """Wait until the agent has the value, which it copies out of this process's memory.

    If the agent cannot read that memory (page-locked memory of a GPU's driver, or a process that may not be
    inspected), it gets a file.
    """
    rank, hostname = wanted.place.rank, wanted.worker.hostname
    time_ns = now_ns()
    packed = pack([("the return value", value)], rank=rank, hostname=hostname)
    # A signal handler may raise here. The agent then continues to read until it receives the failure.
    _offered.append(packed)
    with _stdin_gives_way():
        try:
            own_memory = memory.open_own()
        except OSError:
            answer = _hand_over(channel, time_ns, *_as_file(packed))
        else:
            answer = _hand_over(channel, time_ns, transfer.offer(packed), own_memory)
        if isinstance(answer, messages.NotReadable):
            _hand_over(channel, time_ns, *_as_file(packed))
    _offered.clear()


def _as_file(packed: Packed) -> tuple[Layout, int]:
    layout = Layout.of([packed])
    fd = transfer.new_file(layout)
    memory.write_file(fd, transfer.moves(0, [packed]))
    return layout, fd


def _hand_over(channel: Channel, time_ns: int, value: Spans | Layout, fd: int) -> object:
    """Send the value; return the agent's answer, or None if the agent is gone and this process is about to end."""
    returned = messages.Returned(os.getpid(), time_ns, value, context.has_seen_stop())
    channel.send(returned, [fd])
    os.close(fd)
    with contextlib.suppress(EOFError, ConnectionResetError):
        return channel.receive()[0]
    return None


def report_failure(channel: Channel, wanted: messages.ForkWorker, error: BaseException) -> None:
    """Report an exception as an object, or else as text. If the agent cannot be reached, write it to stderr.

    Errors in the exception's own code do not become the outcome.
    """
    time_ns = now_ns()
    for describe in (_as_itself, _as_text, _as_short_text):
        try:
            with _stdin_gives_way():
                channel.send(describe(wanted, time_ns, error))
            return
        except BaseException as failure:
            reason = failure
    try:
        said = f"{messages.NOT_REPORTED}: {reason!r}. {_NOT_REPORTED_ADVICE}\n"
        os.write(2, (_remote_traceback(error) + said).encode(errors="backslashreplace"))
    except BaseException:
        pass  # only the exit code remains to show the failure


def _as_itself(wanted: messages.ForkWorker, time_ns: int, error: BaseException) -> messages.Failed:
    if foreign_errors.is_second_group(error):
        error.add_note(_TWICE_NOTE)
    if isinstance(error, bdb.BdbQuit) and _is_stdin_empty():
        error.add_note(_NO_STDIN_NOTE)
    exception, unraisable = _dump(error)
    code = error.code if isinstance(error, SystemExit) else None
    return dataclasses.replace(
        _as_text(wanted, time_ns, error),
        kind=type(error).__qualname__,
        exception=exception,
        unraisable=unraisable,
        # The agent lacks an IntEnum of the script.
        exit_code=int(code) if isinstance(code, int) else None,
    )


def _as_text(wanted: messages.ForkWorker, time_ns: int, error: BaseException) -> messages.Failed:
    kind = _full_name(error)
    text = text_of(error)
    return messages.Failed(
        wanted.place.local_rank,
        os.getpid(),
        time_ns,
        kind.rpartition(".")[2],
        text,
        _remote_traceback(error),
        exception=None,
        unraisable=f"raised {kind}: {text} (shown as text, since the exception itself cannot be sent)",
        exit_code=None,
        in_collective=_came_of_a_collective(error),
    )


def _as_short_text(
    wanted: messages.ForkWorker, time_ns: int, error: BaseException
) -> messages.Failed:
    """Return a message that needs no descriptor and little memory."""
    failed = _as_text(wanted, time_ns, error)
    return dataclasses.replace(
        failed,
        text=failed.text[:_SHORT],
        traceback=failed.traceback[-_SHORT:],
        unraisable=failed.unraisable[:_SHORT],
    )


@contextlib.contextmanager
def _stdin_gives_way() -> Generator[None]:
    """Free a descriptor for a report if the function has used up all of them, by closing an empty stdin.

    stdin is opened again afterwards, for exit functions.
    """
    is_needed = not _is_one_free() and _is_stdin_empty()
    if is_needed:
        os.close(0)
    try:
        yield
    finally:
        if is_needed:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDONLY)


def _is_stdin_empty() -> bool:
    """Return True if stdin is /dev/null, as at the worker's start; the function may have replaced it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(0), os.stat(os.devnull))
    return False


def _is_one_free() -> bool:
    try:
        os.close(os.dup(2))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def _dump(error: BaseException) -> tuple[bytes | None, str]:
    if isinstance(error, SystemExit):
        frames = traceback.walk_tb(_frames(error))
        return None, exits.describe(error, (each for each in frames if not _is_own(each[0])))
    if isinstance(error, KeyboardInterrupt):
        return None, "was interrupted (KeyboardInterrupt)"
    if isinstance(error, GeneratorExit):
        return None, "raised GeneratorExit"
    try:
        return dump_exception(error), ""
    except BaseException as reason:
        kind = type(error)
        why = f"{type(reason).__name__}: {text_of(reason)}"
        return None, (
            f"raised {kind.__module__}.{kind.__qualname__}: {text_of(error)} (shown as text, since the "
            f"exception itself cannot be pickled and unpickled: {why})"
        )


def _came_of_a_collective(error: BaseException) -> bool:
    """Return True if torch.distributed raised the exception or one that led to it, perhaps because a peer ended."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and not any(following is each for each in chain):
        chain.append(following)
        cause = own(following, "__cause__")  # its class may define __bool__
        following = own(following, "__context__") if cause is None else cause
    return any(map(_is_of_a_collective, chain))


def _is_of_a_collective(error: BaseException) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if issubclass(type(error), getattr(distributed, "DistError", ())):  # __class__ may lie
        return True
    if type(error) is not RuntimeError:  # wrong arguments are ValueErrors and TypeErrors
        return False
    # In autograd and in Work.wait(), gloo raises a RuntimeError without a frame of torch.distributed.
    if foreign_errors.names_gloo(text_of(error)):
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(_frames(error))]
    return bool(files) and f"{os.sep}torch{os.sep}distributed{os.sep}" in files[-1]


def _frames(error: BaseException) -> types.TracebackType | None:
    return own(error, "__traceback__")


def _full_name(error: BaseException) -> str:
    """Return the full name of the exception's type, without calling a metaclass of the user."""
    return type.__repr__(type(error)).removeprefix("<class '").removesuffix("'>")


def _is_own(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_PACKAGE)


def _remote_traceback(error: BaseException) -> str:
    """Format the traceback without this package's frames around the function."""
    frames = _frames(error)
    while frames is not None and frames.tb_next is not None and _is_own(frames.tb_frame):
        frames = frames.tb_next
    if type(error) is PayloadError and frames is not None and _is_own(frames.tb_frame):
        # The error's text is reported separately, and no line of the function raised it.
        return "" if error.__cause__ is None else _remote_traceback(error.__cause__)
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except BaseException:  # formatting runs code of the exception
        shown = "".join(traceback.format_tb(frames))
        said = f"{_full_name(error)}: {text_of(error)}"
        return f"Traceback (most recent call last):\n{shown}{said}\n"
