"""The progress of a run, shown where a user can see it."""

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from torchrunx_ray.driver.background.loop import in_thread_only, to_the_end
from torchrunx_ray.driver.background.own_lines import driver_has_configured_logging
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.report.progress import Progress
from torchrunx_ray.driver.terminal.console import can_be_live, console, has_rich

logger = logging.getLogger("torchrunx_ray")

_LIVE_AFTER_S = 0.5
"""Time until the status line appears. A status line is useless if the launch ends before anybody reads it."""

_LINE_AFTER_S = 2.0
"""Time that a phase must last before it is printed as a plain line, which stays on the screen."""

_LOOK_S = 0.5

_WAITING_S = 30.0
"""Interval at which a launch that waits for room prints its status again."""

_PATIENCE_S = 2.0
"""Time that a run waits at its end for the terminal to show its last status."""

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray sets for the driver of a job."""


def shown(progress: Progress, options: Options) -> contextlib.AbstractAsyncContextManager[None]:
    """Show the progress as a status line at the bottom of a terminal, or as plain lines.

    Plain lines are for a notebook, for a job's log, or if `progress` is True. They also replace the status
    line if `logging` handlers may write to the terminal, since a status line cannot notice their output.
    """
    is_wanted = _someone_looks() if options.progress is None else options.progress
    if not is_wanted:
        return contextlib.nullcontext()
    has_handlers = driver_has_configured_logging() or options.log_handlers not in ("auto", None)
    return (
        _live(progress) if can_be_live() and has_rich() and not has_handlers else _lines(progress)
    )


@contextlib.asynccontextmanager
async def _live(progress: Progress) -> AsyncGenerator[None, None]:
    over, is_shown = threading.Event(), False

    def show() -> None:
        nonlocal is_shown
        if not over.wait(_LIVE_AFTER_S):
            is_shown = True
            console.add_status(progress, lambda: progress.status)

    showing = asyncio.ensure_future(in_thread_only(show))

    async def hide() -> None:
        with contextlib.suppress(Exception):  # a lost terminal must not change the run's outcome
            await showing
        with contextlib.suppress(Exception):
            await in_thread_only(console.remove_status, progress)
        if is_shown:
            await _say_last(progress)

    try:
        yield
    finally:
        over.set()
        await to_the_end(_at_most_for_a_while(hide()))


@contextlib.asynccontextmanager
async def _lines(progress: Progress) -> AsyncGenerator[None, None]:
    said = asyncio.Event()
    saying = asyncio.ensure_future(_say_phases(progress, said))
    try:
        yield
    finally:
        saying.cancel()
        if said.is_set() and not _summary_is_seen():
            await to_the_end(_at_most_for_a_while(_say_last(progress)))


async def _at_most_for_a_while(work: Coroutine[Any, Any, None]) -> None:
    """Wait for a write to the terminal, which may be stopped, for _PATIENCE_S at most."""
    await asyncio.wait({asyncio.ensure_future(work)}, timeout=_PATIENCE_S)


async def _say_last(progress: Progress) -> None:
    if progress.ended:  # not set when a session has only been opened
        with contextlib.suppress(Exception):  # the terminal is gone
            await in_thread_only(console.write, "stderr", f"{progress.last_line}\n")


def _summary_is_seen() -> bool:
    return driver_has_configured_logging() and logger.isEnabledFor(logging.INFO)


async def _say_phases(progress: Progress, has_said: asyncio.Event) -> None:
    now = asyncio.get_running_loop().time
    phase, since, said, said_at = "", now(), "", now()
    while True:
        if progress.phase != phase:
            phase, since = progress.phase, now()
        is_news = phase != said and now() - since >= _LINE_AFTER_S
        still_waits = progress.timeline.placed_ns is None and now() - said_at >= _WAITING_S
        if is_news or still_waits:
            said, said_at = phase, now()
            has_said.set()
            with contextlib.suppress(Exception):  # the terminal is gone
                await in_thread_only(console.write, "stderr", f"{progress.status}\n")
        await asyncio.sleep(_LOOK_S)


def _someone_looks() -> bool:
    return can_be_live() or _is_notebook() or _IN_JOB in os.environ


def _is_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # Colab's shell is a subclass.
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)
