"""A keeper's watch over the lease."""

import os
import time
from collections.abc import Sequence

from torchrunx_ray.wire import linux
from torchrunx_ray.wire.clock import boot_ns
from torchrunx_ray.wire.lease import READ_EVERY_S, LeasePage

_MOST_NEWS = 4096
_READ_EVERY_NS = int(READ_EVERY_S * 10**9)


class LeaseWatch:
    """A keeper's view of the lease: waits for its end beside other events.

    The keeper wakes up at the time that it read last, or after `READ_EVERY_S`, and reads again: most often, the lease
    has been renewed. The agent writes to `news_fd` if the keeper must read earlier.
    """

    def __init__(self, page_fd: int, news_fd: int) -> None:
        self._page = LeasePage(page_fd)
        self._timer_fd = linux.boot_timer()
        self._heard_fds = [news_fd, self._timer_fd]

    def runs_out_before(self, fds: Sequence[int], timeout_s: float | None = None) -> bool:
        """Wait until a descriptor is readable, or for `timeout_s`. Return True if the lease runs out before that."""
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            expires_at_ns, now = self._page.expires_at_ns, boot_ns()
            if 0 < expires_at_ns <= now:
                self._page.ran_out_at_ns = now
                return True
            read_at_ns = now + _READ_EVERY_NS
            linux.set_boot_timer(self._timer_fd, min(expires_at_ns or read_at_ns, read_at_ns))
            left_s = None if ends_at is None else max(0, ends_at - time.monotonic())
            found = linux.ready([*fds, *self._heard_fds], left_s)
            if not found or set(found) - set(self._heard_fds):
                return False
            self._hear(found)

    def _hear(self, found: Sequence[int]) -> None:
        for fd in found:
            if fd != self._timer_fd and not os.read(fd, _MOST_NEWS):
                self._heard_fds.remove(fd)  # the agent is gone
