"""Shows how far a run is, where someone looks."""

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
from torchrunx_ray.driver.terminal.screen import can_be_live, has_rich, screen

logger = logging.getLogger("torchrunx_ray")

_LIVE_AFTER_S = 0.5
"""A status line is no help to a launch that is over before it is read."""

_LINE_AFTER_S = 2.0
"""The same, for what stays to be read: for as long a phase must have gone on."""

_LOOK_S = 0.5

_WAITING_S = 30.0
"""Interval at which a launch that waits for room says so again."""

_PATIENCE_S = 2.0
"""Time that a run waits at its end for the terminal to take its last status."""

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a job."""


def shown(progress: Progress, options: Options) -> contextlib.AbstractAsyncContextManager[None]:
    """Show it as a line at a terminal's foot; in a notebook, in a job's log, or if asked for, as plain lines.

    Plain lines also where handlers of `logging` may write to the terminal, of which a line at its
    foot would not know.
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
            screen.add_status(progress, lambda: progress.status)

    showing = asyncio.ensure_future(in_thread_only(show))

    async def hide() -> None:
        with contextlib.suppress(Exception):  # the terminal is gone; the run has an outcome
            await showing
        with contextlib.suppress(Exception):
            await in_thread_only(screen.remove_status, progress)
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
    """Let a stopped terminal delay the run's end, but not for ever."""
    await asyncio.wait({asyncio.ensure_future(work)}, timeout=_PATIENCE_S)


async def _say_last(progress: Progress) -> None:
    if progress.ended:  # a session that was opened has no end yet
        with contextlib.suppress(Exception):  # the terminal is gone
            await in_thread_only(screen.write, "stderr", f"{progress.last_line}\n")


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
                await in_thread_only(screen.write, "stderr", f"{progress.status}\n")
        await asyncio.sleep(_LOOK_S)


def _someone_looks() -> bool:
    return can_be_live() or _is_notebook() or _IN_JOB in os.environ


def _is_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # Colab's is derived from it.
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)
