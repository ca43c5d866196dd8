"""A run's life as it is told: its status while it goes on, and a summary at its end."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from torchrunx_ray.driver.failures import Failures
from torchrunx_ray.driver.logs.own_lines import own_lines
from torchrunx_ray.driver.loop import to_the_end
from torchrunx_ray.driver.options import Options
from torchrunx_ray.driver.progress import Progress
from torchrunx_ray.driver.results import LaunchResult
from torchrunx_ray.driver.status import shown
from torchrunx_ray.wire.clock import now_ns

logger = logging.getLogger("torchrunx_ray")

Outcome = LaunchResult[Any] | Failures


async def told(
    life: Callable[[], Coroutine[Any, Any, Outcome]], progress: Progress, options: Options
) -> Outcome:
    """Live the life, and tell of it."""
    how, why = "failed", ""
    try:
        async with shown(progress, options):
            outcome = await life()
        if isinstance(outcome, Failures):
            why = f"; {outcome.in_brief}"
        else:
            how = "done"
        return outcome
    except asyncio.CancelledError:
        how = "stopped"
        if progress.failures_before_stop is not None:
            why = f"; before that it had failed: {progress.failures_before_stop.in_brief}"
        raise
    finally:
        progress.history.ended_ns = now_ns()
        logger.info("%s %s%s", progress.name, _summary(progress, how), why)
        await to_the_end(own_lines.written())


def _summary(progress: Progress, how: str) -> str:
    seconds = progress.history.seconds
    total = seconds.pop("total")
    phases = ", ".join(f"{phase} {took:.2f}" for phase, took in seconds.items())
    logs = f"; logs in {progress.log_directory}" if progress.log_directory else ""
    after = "in" if how == "done" else "after"
    return f"{how} {after} {total:.2f} s ({phases}){logs}"
