"""Stacks of this worker's threads, for the agent on request."""

import _thread
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from types import FrameType

from torchrunx_ray.wire.messages import END_OF_STACKS


def answer_on(fd: int) -> None:
    """Answer each byte that arrives on this socket with the stacks of all Python threads.

    A thread of ours answers, and holds the GIL while it reads the frames. faulthandler's signal handler does not
    hold the GIL, and can crash a healthy process in the middle of a call. So that handler is only for workers
    whose C code holds the GIL, when no frame changes.
    """
    faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True)
    # Signals must go to the main thread, so that they interrupt its system calls.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        # Not a `threading.Thread`: the function must not see this thread among its own.
        _thread.start_new_thread(_answer, (fd,))
    except RuntimeError:  # the host allows no more threads; the signal still works
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _answer(fd: int) -> None:
    own = _thread.get_ident()
    with contextlib.suppress(OSError):  # the agent is gone, or the function closed our descriptor
        while os.read(fd, 1):
            answer = memoryview(_all_stacks(own).encode(errors="backslashreplace") + END_OF_STACKS)
            while answer:
                answer = answer[os.write(fd, answer) :]


def _all_stacks(own: int) -> str:
    """Return the stacks of all threads but our own, like faulthandler with the main thread last."""
    main = threading.main_thread().ident
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # documented so
    others = [ident for ident in frames if ident not in (own, main)]
    return "\n".join(_stack(ident, frames[ident]) for ident in [*others, main] if ident in frames)


def _stack(ident: int, frame: FrameType | None) -> str:
    lines = [f"Thread 0x{ident:016x} (most recent call first):\n"]
    while frame is not None:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}\n')
        frame = frame.f_back
    return "".join(lines)
