"""Signals that end an agent's run."""

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException

_DEFAULT = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


@contextlib.contextmanager
def raised() -> Generator[None]:
    """Raise torch's SignalException at the signals that TORCHELASTIC_SIGNALS_TO_HANDLE names.

    The handlers from before are put back at the end. Outside of the main thread, Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _wanted()}
    for signum in before:
        signal.signal(signum, _raise)
    try:
        yield
    finally:
        for signum, handler in before.items():
            # None: a handler that was not set by Python. It cannot be put back from here.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _wanted() -> list[signal.Signals]:
    names = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", _DEFAULT).split(",")
    try:
        return [signal.Signals[name.strip()] for name in names if name.strip()]
    except KeyError as error:
        known = ", ".join(each.name for each in signal.Signals)
        raise ValueError(
            f"TORCHELASTIC_SIGNALS_TO_HANDLE: {error} is no signal. Signals are {known}."
        ) from None


def _raise(signum: int, _frame: FrameType | None) -> NoReturn:
    name = signal.Signals(signum)
    raise SignalException(f"Process {os.getpid()} got signal: {name}", sigval=name)
