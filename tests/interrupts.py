"""Ctrl-C while a test waits for a run."""

import signal
from collections.abc import Callable
from typing import Any

import torchrunx_ray as trx


def result_with_one_ctrl_c(
    run: trx.Run[Any], interrupted: Callable[[], object] = lambda: None
) -> None:
    """Wait for the run, and interrupt that once."""

    def interrupt(*_: object) -> None:
        interrupted()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        run.result()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
