"""Tells the agent, whenever it asks, what this worker's threads are doing."""

import _thread
import faulthandler
import os
import signal
import sys
import threading
from types import FrameType

from torchrunx_ray.wire.messages import END_OF_STACKS


def answer_on(fd: int) -> None:
    """Answer each byte that comes on this socket with the stacks of all Python threads.

    A thread does so, which holds the GIL while it looks. faulthandler's signal handler does not:
    asked in the middle of a call it has crashed a healthy process. So it is for workers only whose
    C code keeps the GIL, where no frame moves.
    """
    faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True)
    # A signal must find the main thread, whose system calls it is to interrupt.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        # Not of `threading`: the function's own view of its threads stays as it is.
        _thread.start_new_thread(_answer, (fd,))
    except RuntimeError:  # a limit on processes: the signal remains
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _answer(fd: int) -> None:
    own = _thread.get_ident()
    try:
        while os.read(fd, 1):
            answer = memoryview(_all_stacks(own).encode(errors="backslashreplace") + END_OF_STACKS)
            while answer:
                answer = answer[os.write(fd, answer) :]
    except OSError:  # the agent is gone, or the function closed what it did not open
        pass


def _all_stacks(own: int) -> str:
    """Like faulthandler's text: the main thread is the last."""
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
