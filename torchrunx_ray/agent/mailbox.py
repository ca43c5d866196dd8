"""Events that wait for the driver's next poll."""

import asyncio
from collections.abc import Callable

from torchrunx_ray.wire.messages import Event, OutputEnded, Printed

_FULL_AT_BYTES = 4 * 2**20
"""Limit for printed output: more than one poll moves at full speed, and a bound on the agent's memory."""


class Mailbox:
    """Keeps events in order until they are taken.

    It takes all it is given. `on_room` is called when output may be read again after `is_full`
    was true, so that whoever reads it stops in between: workers then block in their writes.
    `on_event` hears of each event as it comes.
    A driver that cannot take more output still hears of all else, but for the end of output.
    """

    def __init__(self, on_room: Callable[[], None], on_event: Callable[[Event], None]) -> None:
        self._on_room = on_room
        self._on_event = on_event
        self._events: list[Event] = []
        self._output: list[Event] = []
        self._bytes = 0
        self._nudged = False
        self._something = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return self._bytes >= _FULL_AT_BYTES

    def put(self, event: Event) -> None:
        self._on_event(event)
        if isinstance(event, Printed | OutputEnded):
            self._output.append(event)
        else:
            self._events.append(event)
        if isinstance(event, Printed):
            self._bytes += len(event.data)
        self._something.set()

    def nudge(self) -> None:
        """End a `take`, or the next one, at once."""
        self._nudged = True
        self._something.set()

    async def take(self, timeout_s: float, *, with_output: bool) -> list[Event]:
        """All events there are, as soon as there is one; none after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (self._nudged or self._events or (with_output and self._output)):
                    self._something.clear()
                    await self._something.wait()
        except TimeoutError:
            return []
        self._nudged = False
        events, self._events = self._events, []
        if with_output:
            events += self._output
            was_full, self._output, self._bytes = self.is_full, [], 0
            if was_full:
                self._on_room()
        return events
