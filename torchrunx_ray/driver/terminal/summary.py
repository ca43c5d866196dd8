"""A run's status while it goes on, and its summary at the end."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.background.own_lines import own_lines
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.report.failures import Failures
from torchrunx_ray.driver.report.progress import Progress, living
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.terminal.status_line import shown
from torchrunx_ray.wire.clock import now_ns

logger = logging.getLogger("torchrunx_ray")

Outcome = LaunchResult[Any] | Failures


async def follow(
    life: Callable[[], Coroutine[Any, Any, Outcome]], progress: Progress, options: Options
) -> Outcome:
    """Await the run, show its status, log a one-line summary."""
    living.add(progress)
    why = ""
    try:
        async with shown(progress, options):
            outcome = await _lived(life, progress)
        if isinstance(outcome, Failures):
            why = f"; {outcome.in_brief}"
        return outcome
    except asyncio.CancelledError:
        if progress.failures_before_stop is not None:
            why = f"; before that, the run had failed: {progress.failures_before_stop.in_brief}"
        raise
    finally:
        living.discard(progress)
        progress.timeline.ended_ns = now_ns()
        logger.info("%s %s%s", progress.name, _summary(progress), why)
        await to_the_end(own_lines.written())


async def _lived(life: Callable[[], Coroutine[Any, Any, Outcome]], progress: Progress) -> Outcome:
    how = "failed"
    try:
        outcome = await life()
        how = "failed" if isinstance(outcome, Failures) else "done"
        return outcome
    except asyncio.CancelledError:
        how = "stopped"
        raise
    finally:
        progress.ended = how


def _summary(progress: Progress) -> str:
    how = progress.ended
    seconds = progress.timeline.seconds
    total = seconds.pop("total")
    phases = ", ".join(f"{phase} {took:.2f}" for phase, took in seconds.items())
    logs = f"; logs in {progress.log_directory}" if progress.log_directory else ""
    after = "in" if how == "done" else "after"
    return f"{how} {after} {total:.2f} s ({phases}){logs}"
