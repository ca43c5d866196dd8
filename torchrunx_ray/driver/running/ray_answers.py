"""Answers of Ray about a placement."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from torchrunx_ray.errors import LaunchError

T = TypeVar("T")

_ANSWER_S = 120.0
"""Time for Ray's answer about a placement. A restart of the head may delay the answer."""


async def answered(question: Awaitable[T]) -> T:
    """Await an answer of Ray. Raises LaunchError after _ANSWER_S."""
    limit = asyncio.timeout(_ANSWER_S)
    try:
        async with limit:
            return await question
    except TimeoutError:
        if not limit.expired():
            raise
        raise LaunchError(
            f"Ray has not answered a query about the placement of the launch for {_ANSWER_S:g} s. Is the head's "
            "machine frozen, overloaded or cut off? Check with `ray status` on that machine. Launch again."
        ) from None
    finally:
        del limit  # it refers to the task, whose exception refers to this frame
