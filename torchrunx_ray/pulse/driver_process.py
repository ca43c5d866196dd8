"""The process of the driver, as the pulse beside it sees it."""

import os
from dataclasses import dataclass

from torchrunx_ray.wire import proc

_STARTED_AT = 19
"""Index of the start time among the fields of `proc.stat`."""

_NOT_AT_WORK = "TtZX"
"""States of a process that was stopped, is traced, or has ended."""


@dataclass(frozen=True)
class DriverProcess:
    """Identity of a process. The start time tells it from a later process with the same pid."""

    pid: int
    started_at: str
    pid_namespace: str

    @classmethod
    def this(cls) -> "DriverProcess":
        return cls(os.getpid(), proc.stat("self")[_STARTED_AT], _pid_namespace())

    @property
    def is_visible(self) -> bool:
        """True if the calling process has the same pids, and not those of another container."""
        return self.pid_namespace == _pid_namespace()

    @property
    def is_at_work(self) -> bool:
        """True if the process lives and is not stopped. A process that is only busy is at work."""
        try:
            fields = proc.stat(self.pid)
        except OSError:
            return False
        return fields[_STARTED_AT] == self.started_at and fields[0] not in _NOT_AT_WORK


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
