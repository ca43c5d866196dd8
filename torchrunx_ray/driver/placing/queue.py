"""Queue of this driver's launches that wait for room. Released resources are offered to them in order.

Ray itself retries a group that found no room only once a second.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from ray.util.placement_group import PlacementGroup

from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.cluster.connection import ClusterLeft, Connection, untyped_ray
from torchrunx_ray.driver.placing.feasibility import is_in

logger = logging.getLogger("torchrunx_ray")

Amounts = Mapping[str, float]

_RELEASE_S = 1.0
"""Time after which the head knows that a removed group's resources are free. Nodes report every 0.1 s."""

_POLL_S = 0.01

_OFFER_S = 1.0
"""Time that a launch has to use an offer. After that the launches behind it get offers."""

_PATIENCE_S = 10.0
"""Wait after which a launch is due. Launches behind a due launch get no offers; Ray itself still serves them."""


class Waiter:
    """A launch that waits in the queue."""

    def __init__(self, needed: Amounts) -> None:
        self.needed = needed
        self.since = time.monotonic()
        self.offered_release = -1
        self.has_left = False
        self._offered = asyncio.Event()
        self._used = asyncio.Event()

    async def offered(self, timeout_s: float, unless: "asyncio.Future[Any] | None" = None) -> None:
        """Wait until the launch has an offer, `unless` is done, or the time is over."""
        offered = asyncio.ensure_future(self._offered.wait())
        try:
            await asyncio.wait(
                {offered} | ({unless} if unless else set()),
                timeout=timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            offered.cancel()

    def take(self) -> bool:
        """Take the offer, and return True if there is one. The offer lasts until `pass_on`."""
        was_offered = self._offered.is_set()
        self._offered.clear()
        return was_offered

    def pass_on(self) -> None:
        """End the offer, so that the launches behind may use what is left of it."""
        self._used.set()

    async def offer(self, release: int) -> None:
        """Offer free resources. Returns when the launch has passed the offer on, or after _OFFER_S."""
        if self.has_left:
            return
        self.offered_release = release
        self._used.clear()
        self._offered.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._used.wait(), _OFFER_S)
        self._offered.clear()


class _Queue:
    """The waiting launches and held resources. Used only in the background loop."""

    def __init__(self) -> None:
        self.waiters: list[Waiter] = []
        self.held: dict[PlacementGroup, Amounts] = {}
        self.releases = 0
        self.last_release = float("-inf")
        self._serving: asyncio.Task[None] | None = None

    def serve(self) -> None:
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        """Offer free resources while a release is recent.

        This polls, since Ray has no event for free resources: nodes report to Ray's head every 0.1 s.
        """
        try:
            connection = Connection()
            while release_is_recent() and self._unserved():
                free: dict[str, float] = await connection.call(untyped_ray.available_resources)
                chosen = list(self._who_fits(free))
                await asyncio.gather(*(waiter.offer(self.releases) for waiter in chosen))
                await asyncio.sleep(0 if chosen else _POLL_S)
        except ClusterLeft:
            pass
        except Exception as error:  # the launches still wait for Ray's own retries
            logger.debug("could not tell waiting launches about free resources: %s", error)

    def _unserved(self) -> list[Waiter]:
        """Return the launches without an offer since the last release.

        Each release is offered once: even if the sum of resources fits, single hosts may not.
        """
        return [waiter for waiter in self.waiters if waiter.offered_release < self.releases]

    def _who_fits(self, free: Amounts) -> Iterable[Waiter]:
        left = Counter[str](free)
        unserved = self._unserved()
        for waiter in self.waiters:
            if is_in(waiter.needed, left):
                left.subtract(waiter.needed)
                if waiter in unserved:
                    yield waiter
            elif self._is_due(waiter, free):
                return

    def _is_due(self, waiter: Waiter, free: Amounts) -> bool:
        """Return True if a launch has waited long, and would fit into the free and this driver's held resources."""
        if time.monotonic() - waiter.since < _PATIENCE_S:
            return False
        ours = Counter[str]()
        for amounts in (free, *self.held.values()):
            ours.update(amounts)
        return is_in(waiter.needed, ours)


_queue = _Queue()


@contextlib.contextmanager
def queued(needed: Amounts) -> Generator[Waiter]:
    """Add a launch to the end of the queue for the length of this context."""
    waiter = Waiter(needed)
    _queue.waiters.append(waiter)
    if release_is_recent():
        _queue.serve()
    try:
        yield waiter
    finally:
        _queue.waiters.remove(waiter)
        waiter.has_left = True
        waiter.pass_on()


def has_waiters() -> bool:
    """Return True if a launch of this driver waits for room."""
    return bool(_queue.waiters)


def hold(group: PlacementGroup, amounts: Amounts) -> None:
    """Note that a launch holds these resources until `release`."""
    _queue.held[group] = amounts


def release(group: PlacementGroup) -> None:
    """Offer a removed group's resources to waiting launches as soon as Ray's head knows that they are free."""
    _queue.held.pop(group, None)
    _queue.releases += 1
    _queue.last_release = time.monotonic()
    if _queue.waiters:
        _queue.serve()


async def until_head_knows(connection: Connection) -> None:
    """Wait until Ray's head shows the released resources as free, or the release is no longer recent."""
    total: dict[str, float] = await connection.call(untyped_ray.cluster_resources)
    while release_is_recent():
        known = Counter[str]()
        free: dict[str, float] = await connection.call(untyped_ray.available_resources)
        for amounts in (free, *_queue.held.values()):
            known.update(amounts)
        if all(known[name] >= total.get(name, 0) for name in ("CPU", "GPU")):
            return
        await asyncio.sleep(_POLL_S)


def release_is_recent() -> bool:
    """Return True if Ray's head may not yet know of the last release."""
    return recent_for_s() > 0


def recent_for_s() -> float:
    """Return the time for which the last release stays recent."""
    return max(0.0, _queue.last_release + _RELEASE_S - time.monotonic())


def _forget() -> object:
    """Reset the queue in a forked child, which has none of its parent's launches. Return the parent's queue."""
    global _queue
    inherited, _queue = _queue, _Queue()
    return inherited


in_child(_forget)
