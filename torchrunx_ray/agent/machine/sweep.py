"""Last resort: find processes that a killed template and keepers left behind, by their mark."""

import contextlib
import os
import signal

from torchrunx_ray.wire import proc, process_tree
from torchrunx_ray.wire.environment import MARK


def kill_marked(mark: str) -> None:
    """Send SIGKILL to every process whose initial environment has this mark."""
    wanted = f"{MARK}={mark}".encode()
    for pid in proc.pids():
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if wanted in proc.environment(pid) and not process_tree.ends_by_itself(pid):
                os.kill(pid, signal.SIGKILL)
