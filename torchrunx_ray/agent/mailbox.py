"""Events that wait for the driver's next poll."""

import asyncio
from collections.abc import Callable

from torchrunx_ray.wire.messages import AttemptId, Event, OutputEnded, Printed, Told

_FULL_AT_BYTES = 4 * 2**20
"""Limit for printed output, to bound the agent's memory. At full speed, one poll moves less."""


class Mailbox:
    """A queue that keeps events in order until the driver takes them.

    The mailbox never refuses an event. While `is_full` is true, readers of output must pause, so workers block
    in their writes. `on_room` is called when output may be read again. `on_event` is called with each event.
    A driver that cannot take more output still receives all other events, except the end of output.
    """

    def __init__(self, on_room: Callable[[], None], on_event: Callable[[Event], None]) -> None:
        self._on_room = on_room
        self._on_event = on_event
        self._events: list[Told] = []
        self._output: list[Told] = []
        self._bytes = 0
        self._nudged = False
        self._something = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return self._bytes >= _FULL_AT_BYTES

    def of(self, attempt: AttemptId | None) -> "Slot":
        """Return the slot for the events of an attempt."""
        return Slot(self, attempt)

    def put(self, told: Told) -> None:
        event = told.event
        self._on_event(event)
        if isinstance(event, Printed | OutputEnded):
            self._output.append(told)
        else:
            self._events.append(told)
        if isinstance(event, Printed):
            self._bytes += len(event.data)
        self._something.set()

    def nudge(self) -> None:
        """Make the pending `take`, or the next one, return at once."""
        self._nudged = True
        self._something.set()

    async def take(self, timeout_s: float, *, with_output: bool) -> list[Told]:
        """Return all events as soon as there is one, or none after `timeout_s`."""
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


class Slot:
    """Takes the events of one attempt; None for those of the agent and its template."""

    def __init__(self, mailbox: Mailbox, attempt: AttemptId | None) -> None:
        self._mailbox = mailbox
        self._attempt = attempt

    @property
    def is_full(self) -> bool:
        return self._mailbox.is_full

    def put(self, event: Event) -> None:
        self._mailbox.put(Told(self._attempt, event))
