"""What became of the function, as one message to the agent."""

import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from torchrunx_ray.errors import PayloadError
from torchrunx_ray.wire import memory, messages, transfer
from torchrunx_ray.wire.channel import Channel
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.exceptions import dump_exception
from torchrunx_ray.wire.payload import Packed, pack
from torchrunx_ray.wire.transfer import Layout, Spans

_TWICE_NOTE = (
    "torchrunx_ray made a process group before it called the function; launch with backend=None "
    "to make your own, or destroy_process_group() first."
)


_offered: list[Packed] = []
"""What the agent may be reading right now."""


def unpack_call(packed: Packed, inserted: Sequence[Packed], hostname: str) -> Callable[[], Any]:
    """The function with its arguments; PayloadError where they cannot be unpickled here."""
    try:
        func, args, kwargs = packed.unpack(inserted)
    except Exception as error:
        raise PayloadError(
            path="the function or its arguments",
            reason=f"{type(error).__name__}: {error}",
            hostname=hostname,
            step="unpickle",
            missing_module=error.name if isinstance(error, ModuleNotFoundError) else None,
        ) from error
    return lambda: func(*args, **kwargs)


def value_of(call: Callable[[], Any]) -> Any:
    """Call it; `sys.exit(0)` is a return of None."""
    try:
        return call()
    except SystemExit as error:
        if error.code in (None, 0):
            return None
        raise


def report_value(channel: Channel, wanted: messages.ForkWorker, value: object) -> None:
    """Return when the agent has the value, which it copies out of this process's memory.

    Where it cannot (page-locked memory of a GPU's driver, a process that may not be looked at) it
    gets a file.
    """
    rank, hostname = wanted.place.rank, wanted.hostname
    time_ns = now_ns()
    packed = pack([("the return value", value)], rank=rank, hostname=hostname)
    # A signal handler may raise meanwhile; the agent still reads until it has heard of that.
    _offered.append(packed)
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
    transfer.place_in_file(fd, [packed])
    return layout, fd


def _hand_over(channel: Channel, time_ns: int, value: Spans | Layout, fd: int) -> object:
    """What the agent answers; None where it is gone, which is this process's end."""
    channel.send(messages.Returned(os.getpid(), time_ns, value), [fd])
    os.close(fd)
    try:
        answer, _ = channel.receive()
    except (EOFError, ConnectionResetError):
        return None
    return answer


def report_failure(channel: Channel, wanted: messages.ForkWorker, error: BaseException) -> None:
    time_ns = now_ns()
    if isinstance(error, ValueError) and "default process group twice" in str(error):
        error.add_note(_TWICE_NOTE)
    exception, unraisable = _dump(error)
    channel.send(
        messages.Failed(
            wanted.place.local_rank,
            os.getpid(),
            time_ns,
            type(error).__qualname__,
            _text(error),
            _remote_traceback(error),
            exception,
            unraisable,
            error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else None,
            _was_raised_in_torch_distributed(error),
        )
    )


def _dump(error: BaseException) -> tuple[bytes | None, str]:
    if isinstance(error, SystemExit):
        return None, f"called sys.exit({error.code!r})"
    if isinstance(error, KeyboardInterrupt):
        return None, "was interrupted (KeyboardInterrupt)"
    if isinstance(error, GeneratorExit):
        return None, "raised GeneratorExit"
    try:
        return dump_exception(error), ""
    except Exception as reason:
        kind = type(error)
        why = f"{type(reason).__name__}: {reason}"
        return None, (
            f"raised {kind.__module__}.{kind.__qualname__}: {_text(error)} (shown as text, since the "
            f"exception itself cannot be pickled and unpickled: {why})"
        )


def _was_raised_in_torch_distributed(error: BaseException) -> bool:
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    return frames is not None and f"{os.sep}torch{os.sep}distributed{os.sep}" in (
        frames.tb_frame.f_code.co_filename
    )


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as reason:
        return f"<its __str__ raised {type(reason).__name__}>"


def _remote_traceback(error: BaseException) -> str:
    """The traceback without the frames of this package around the function."""
    frames = error.__traceback__
    own = os.path.dirname(os.path.dirname(__file__))
    while (
        frames is not None and frames.tb_frame.f_code.co_filename.startswith(own) and frames.tb_next
    ):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))
