"""The lease that an agent's keepers hold, as the agent writes it."""

import contextlib
import os
import select

from torchrunx_ray.wire.clock import boot_ns
from torchrunx_ray.wire.lease import READ_EVERY_S, LeasePage

_SHORT_NS = int(1.5 * READ_EVERY_S * 10**9)
"""Time below which the keepers might read a new lease too late."""


class HeldLease:
    """Writes the time at which the keepers end the template with all its descendants.

    A keeper wakes up at the time that it read last. So each keeper is told through a pipe of its own if there is an
    earlier time. No keeper is told of the long first lease, since its wake-up would cost CPU during a launch.
    """

    def __init__(self) -> None:
        page_fd = LeasePage.create()
        self._page = LeasePage(page_fd)
        self.contact_at_ns = 0
        """Time at which this host sent the last request that the driver, or its pulse, has answered."""
        outer, inner = os.pipe(), os.pipe()
        self.fds = page_fd, outer[0], inner[0]
        """Descriptors for the keepers, to be closed here once the keepers have them."""
        self._telling = [outer[1], inner[1]]
        for fd in self._telling:
            os.set_blocking(fd, False)

    @property
    def expires_at_ns(self) -> int:
        """Time at which the lease runs out; 0 if there is no lease."""
        return self._page.expires_at_ns

    @property
    def ran_out_at_ns(self) -> int:
        """Time at which a keeper has begun to end the template because the lease had run out; 0 before that."""
        return self._page.ran_out_at_ns

    @property
    def has_both_keepers(self) -> bool:
        """True if each keeper still has its end of its pipe."""
        pipes = select.poll()
        for fd in self._telling:
            pipes.register(fd, 0)  # the end of the reader is reported always
        return not pipes.poll(0)

    def set(self, expires_at_ns: int) -> None:
        """Begin a lease, or change its time."""
        last_ns = self._page.expires_at_ns
        self._page.expires_at_ns = expires_at_ns
        is_short = expires_at_ns - boot_ns() < _SHORT_NS
        if is_short and (last_ns == 0 or expires_at_ns < last_ns):
            for fd in self._telling:
                # A full pipe wakes the keeper as well. A keeper that is gone needs no lease.
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    os.write(fd, b"1")

    def clear(self) -> None:
        """End the lease: the template may live on without contact with the driver."""
        self._page.expires_at_ns = 0

    def close(self) -> None:
        """Tell no keeper any more, because they are gone."""
        for fd in self._telling:
            os.close(fd)
        self._telling.clear()
