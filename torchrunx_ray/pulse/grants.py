"""The leases of one attempt, as the pulse grants them."""

import math
from collections.abc import Collection

from torchrunx_ray.wire.clock import boot_ns
from torchrunx_ray.wire.messages import LeasesWanted

_NS = 10**9


class Grants:
    """Grants each host its lease, and knows when the lease must have run out there.

    A host counts from sending its request, which is earlier than the moment of the grant here. So the lease has run
    out on the host when it has run out here. The margin is for the keeper to wake up and kill, and for clocks that
    run at different speeds.
    """

    def __init__(self, wanted: LeasesWanted) -> None:
        self._lease_ns = _ns(wanted.lease_s)
        self._margin_ns = _ns(wanted.margin_s)
        first_ns = boot_ns() + _ns(wanted.until_over_s)
        self._over_at_ns = dict.fromkeys(range(wanted.hosts), first_ns)
        """Times by host index at which the lease must have run out. They include the margin."""
        self._refused = set(wanted.refused)
        """Hosts that get no more grants."""

    def renew(self, host_index: int, is_first: bool) -> bool:
        """Grant a lease, unless the last one has run out. `is_first`: no renewal has reached the host yet."""
        now = boot_ns()
        if host_index in self._refused or now >= self._over_at_ns[host_index]:
            self._refused.add(host_index)
            return False
        over_at_ns = now + self._lease_ns + self._margin_ns
        # A host whose first lease is in force may never get this answer, and then has the first one.
        last_ns = self._over_at_ns[host_index] if is_first else 0
        self._over_at_ns[host_index] = max(over_at_ns, last_ns)
        return True

    def revoke(self, host_index: int) -> float:
        """Grant no more to this host. Return the seconds after which its lease must have run out."""
        self._refused.add(host_index)
        return max(0.0, (self._over_at_ns[host_index] - boot_ns()) / _NS)

    def over(self, known: Collection[int]) -> list[int]:
        """Return the hosts whose lease must have run out, except those that are known."""
        now = boot_ns()
        return [i for i, at_ns in self._over_at_ns.items() if now >= at_ns and i not in known]

    def next_over_s(self, known: Collection[int]) -> float:
        """Return the time until the next lease may run out."""
        ends = [at_ns for i, at_ns in self._over_at_ns.items() if i not in known]
        return max(0.0, (min(ends) - boot_ns()) / _NS) if ends else math.inf


def _ns(seconds: float) -> int:
    return int(seconds * _NS)
