"""The way from torch's `expires` to the agent's watchdog."""

import os
from typing import Any

from torchrunx_ray.wire.environment import TIMER_ENABLED, TIMER_FILE
from torchrunx_ray.worker.function import import_hook

_MODULE = "torch.distributed.elastic.timer"


def configure() -> None:
    """Let `expires` work without further set-up, if the agent has a watchdog.

    Processes that this one forks inherit that. The function may configure another client.
    """
    path = os.environ.get(TIMER_FILE)
    if path is not None and os.environ.get(TIMER_ENABLED) == "1":
        import_hook.after_import(_MODULE, lambda timer: _configure(timer, path))


def _configure(timer: Any, path: str) -> None:
    timer.configure(timer.FileTimerClient(path))
