"""Clean-up that neither changes a run's outcome nor delays the run for long."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from torchrunx_ray.driver.background.forks import empty_in_child
from torchrunx_ray.driver.background.loop import to_the_end
from torchrunx_ray.driver.cluster.connection import ClusterLeft

logger = logging.getLogger("torchrunx_ray")

_PATIENCE_S = 5.0
"""Time that a run waits for clean-up.

Ray's head answers in milliseconds, unless its machine is frozen, overloaded or cut off.
"""

_under_way: set[asyncio.Task[None]] = set()
"""References that keep the tasks alive; an event loop keeps none."""


async def clean_up(work: Coroutine[Any, Any, object], what: str) -> None:
    """Await clean-up work, and log its errors. After some seconds the work goes on in the background.

    A cancellation during the wait is raised after it.
    """
    task = asyncio.create_task(_logged(work, what))
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    await to_the_end(_wait_for_a_while(task, what))


def in_background(work: Coroutine[Any, Any, None], failed: str) -> None:
    """Begin work that nobody waits for. `failed` is the text of the debug message if it fails."""

    def has_ended(task: "asyncio.Task[None]") -> None:
        _under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug(failed, error)

    task = asyncio.create_task(work)
    _under_way.add(task)
    task.add_done_callback(has_ended)


async def _wait_for_a_while(task: "asyncio.Task[None]", what: str) -> None:
    _, late = await asyncio.wait({task}, timeout=_PATIENCE_S)
    if late:
        logger.warning(
            "%s takes more than %g s: Ray's head does not answer, or its machine is very busy. The clean-up "
            "continues in the background.",
            what,
            _PATIENCE_S,
        )


async def _logged(work: Coroutine[Any, Any, object], what: str) -> None:
    try:
        await work
    except ClusterLeft:
        pass  # Ray has cleaned up after this driver
    except Exception as error:
        logger.warning("%s failed: %s: %s", what, type(error).__name__, error)


empty_in_child(_under_way)
