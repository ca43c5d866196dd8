"""Signals to the command while its run goes on."""

import contextlib
import enum
import os
import signal
from collections.abc import Callable, Generator, Sequence
from types import FrameType
from typing import Any


class _State(enum.Enum):
    RUNNING = "no signal has come"
    STOPPING = "the run was asked to stop"
    KILLING = "the run was killed"


class Signals:
    """Passes the first signal on to the workers, which stop, and kills them at the second one."""

    def __init__(self, stop: Callable[[signal.Signals], None], kill: Callable[[], None]) -> None:
        self._stop = stop
        self._kill = kill
        self._state = _State.RUNNING
        self.first: signal.Signals | None = None
        """The signal that stopped the run; None if none has come."""

    @contextlib.contextmanager
    def handled(self, wanted: Sequence[signal.Signals], *, may_restart: bool) -> Generator[None]:
        """Handle these signals, except those that were ignored when the command began, as under nohup."""
        before: dict[signal.Signals, Any] = {}
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(
            wanted, self._take
        )
        if may_restart:
            handlers[signal.SIGTSTP] = _refuse_to_pause
        try:
            for signum, handler in handlers.items():
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    before[signum] = signal.signal(signum, handler)
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        match self._state:
            case _State.RUNNING:
                self._state = _State.STOPPING
                self.first = signal.Signals(signum)
                self._stop(self.first)
            case _State.STOPPING:
                self._state = _State.KILLING
                self._kill()
            case _State.KILLING:
                pass


def _refuse_to_pause(_signum: int, _frame: FrameType | None) -> None:
    """Say why Ctrl-Z does nothing. `print` may be in the middle of a line, and is not re-entrant."""
    said = (
        b"torchrunx-ray: Ctrl-Z is ignored, because the workers may be started again: they live only as long as this "
        b"command answers.\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, said)
