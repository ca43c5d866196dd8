"""The last resort: find by its mark what a killed template and keepers left behind."""

import os
import signal
from pathlib import Path

from torchrunx_ray.wire import process_tree
from torchrunx_ray.wire.environment import MARK


def kill_marked(mark: str) -> None:
    """SIGKILL every process that has this agent's mark in the environment it was started with."""
    wanted = f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            is_marked = wanted in Path("/proc", entry, "environ").read_bytes().split(b"\0")
            if is_marked and not process_tree.ends_by_itself(int(entry)):
                os.kill(int(entry), signal.SIGKILL)
        except OSError:  # it ended meanwhile, or is not ours
            continue
