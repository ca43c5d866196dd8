"""Work that is done at the same time, and all of it."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from torchrunx_ray.driver.background.loop import to_the_end

T = TypeVar("T")


async def all_or_first_error(work: "Sequence[Coroutine[Any, Any, T]]") -> list[T]:
    """Return all results. At the first error, cancel the other tasks, wait for them, and raise the error.

    Results of tasks that ended beside an error are lost: such work must keep for itself what it holds.
    """
    tasks = [asyncio.create_task(each) for each in work]
    if not tasks:
        return []
    try:
        return await asyncio.gather(*tasks)
    finally:
        await to_the_end(_cancelled(tasks))
        del tasks, work  # an exception refers to this frame, and must not wait for Python's gc


async def _cancelled(tasks: "Sequence[asyncio.Task[Any]]") -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
