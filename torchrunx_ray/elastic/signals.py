"""Signals that end an agent's run."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import SignalException

logger = logging.getLogger("torchrunx_ray")

_DEFAULT = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


@contextlib.contextmanager
def raised() -> Generator[None]:
    """Raise torch's SignalException at the signals that TORCHELASTIC_SIGNALS_TO_HANDLE names.

    The handlers from before are put back at the end. Outside of the main thread, Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for signum in dict.fromkeys(_wanted()):
            try:
                before[signum] = signal.signal(signum, _raise)
            except (OSError, ValueError) as error:  # such as SIGKILL
                logger.warning(
                    "TORCHELASTIC_SIGNALS_TO_HANDLE: %s cannot be handled: %s", signum.name, error
                )
        yield
    finally:
        for signum, handler in before.items():
            # None: a handler that was not set by Python. It cannot be put back from here.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _wanted() -> list[signal.Signals]:
    found: list[signal.Signals] = []
    for name in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", _DEFAULT).split(","):
        try:
            found.append(signal.Signals[name.strip()])
        except KeyError:
            logger.warning("TORCHELASTIC_SIGNALS_TO_HANDLE: %r is no signal's name", name)
    return found


def _raise(signum: int, _frame: FrameType | None) -> NoReturn:
    name = signal.Signals(signum)
    raise SignalException(f"Process {os.getpid()} got signal: {name}", sigval=name)
