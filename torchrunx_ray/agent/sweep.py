"""The last resort: find by its mark what a killed template and keepers left behind."""

import contextlib
import os
import signal

from torchrunx_ray.wire import proc, process_tree
from torchrunx_ray.wire.environment import MARK


def kill_marked(mark: str) -> None:
    """SIGKILL every process that has this agent's mark in the environment it was started with."""
    wanted = f"{MARK}={mark}".encode()
    for pid in proc.pids():
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            if wanted in proc.environment(pid) and not process_tree.ends_by_itself(pid):
                os.kill(pid, signal.SIGKILL)
