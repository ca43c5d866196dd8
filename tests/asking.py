"""The driver's means to ask a function to stop, without an event that makes it ask."""

from typing import Any

import torchrunx_ray as trx
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.wire.stop_board import StopReason


def ask_to_stop(run: "trx.Run[Any]", reason: StopReason, within_s: float | None) -> Attempt:
    """Ask the function of a run whose attempt has begun. Return the attempt."""
    untyped: Any = run
    attempt: Attempt = untyped._progress.supervisor._steps.attempt

    async def ask() -> None:
        attempt.ask_to_stop(reason, within_s)

    loop.start(ask()).result(timeout=30)
    return attempt
