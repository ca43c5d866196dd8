"""Events that wait for the driver's next poll."""

import asyncio
from collections.abc import Callable

from torchrunx_ray.wire.messages import Event, Printed

_FULL_AT_BYTES = 4 * 2**20
"""Of printed output: more than one poll moves at full speed, and a bound on the agent's memory."""


class Mailbox:
    """Keeps events in order until they are taken.

    It takes all it is given. `on_room` is called when output may be read again after `is_full`
    was true, so that whoever reads it stops in between: workers then block in their writes.
    """

    def __init__(self, on_room: Callable[[], None]) -> None:
        self._on_room = on_room
        self._events: list[Event] = []
        self._bytes = 0
        self._something = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return self._bytes >= _FULL_AT_BYTES

    def put(self, event: Event) -> None:
        self._events.append(event)
        if isinstance(event, Printed):
            self._bytes += len(event.data)
        self._something.set()

    async def take(self, timeout_s: float) -> list[Event]:
        """All events there are, as soon as there is one; none after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._something.wait()
        except TimeoutError:
            pass
        events, self._events = self._events, []
        was_full, self._bytes = self.is_full, 0
        self._something.clear()
        if was_full:
            self._on_room()
        return events
