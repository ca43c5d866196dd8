"""The page of memory that an agent shares with its keepers: the lease of the host's workers.

Without contact with the driver, the workers may live until the lease runs out. The driver counts the same time, and
starts no workers elsewhere before. All times here are `clock.boot_ns` of the host.
"""

import ctypes
import mmap
import os

from torchrunx_ray.wire import linux

READ_EVERY_S = 60.0
"""Longest time until a keeper reads the page again. A lease that lasts well beyond needs no wake-up."""

_SIZE = mmap.PAGESIZE
_EXPIRES_AT, _RAN_OUT_AT = 0, 64  # each in a cache line of its own


class LeasePage:
    """Two times in shared memory. The agent writes the one, and the keepers write the other.

    ctypes copies an aligned 8-byte integer with one instruction, so that no reader sees half of a new time.
    """

    def __init__(self, fd: int) -> None:
        """Map the page. The descriptor can be closed afterwards."""
        self._memory = mmap.mmap(fd, _SIZE)
        self._expires_at = ctypes.c_int64.from_buffer(self._memory, _EXPIRES_AT)
        self._ran_out_at = ctypes.c_int64.from_buffer(self._memory, _RAN_OUT_AT)

    @staticmethod
    def create() -> int:
        """Return the descriptor of a new page, without a lease."""
        fd = linux.memory_file("torchrunx_ray_lease")
        os.ftruncate(fd, _SIZE)
        return fd

    @property
    def expires_at_ns(self) -> int:
        """Time at which the lease runs out; 0 if there is no lease. Written by the agent."""
        return self._expires_at.value

    @expires_at_ns.setter
    def expires_at_ns(self, at_ns: int) -> None:
        self._expires_at.value = at_ns

    @property
    def ran_out_at_ns(self) -> int:
        """Time at which a keeper found that the lease had run out; 0 if none did. Written by the keepers."""
        return self._ran_out_at.value

    @ran_out_at_ns.setter
    def ran_out_at_ns(self, at_ns: int) -> None:
        self._ran_out_at.value = at_ns
