"""Requests to stop, in a page of memory that the agent writes and the workers of its host read.

A request is one aligned word, which the processor writes and reads whole. So a reader never sees half of a request,
although a later request replaces an earlier one without a lock. A look at the word costs no system call.
"""

import ctypes
import os
from dataclasses import dataclass
from typing import Literal

from torchrunx_ray.wire import linux
from torchrunx_ray.wire.clock import now_ns

StopReason = Literal["drain", "resize", "cancel"]

_REASONS: tuple[StopReason, ...] = ("resize", "drain", "cancel")
"""All reasons, the most urgent one last."""

_REASON_BITS = 2
"""Low bits of the word: the reason's position in `_REASONS` plus one. The other bits are the deadline, 0 for None."""

_LATEST_US = 2 ** (64 - _REASON_BITS) - 1


@dataclass(frozen=True)
class StopAsked:
    """A request that the function saves its state and returns, on all ranks."""

    reason: StopReason
    """"drain": a host is about to leave. "resize": the run continues with another number of hosts. "cancel": the run
    was cancelled."""
    deadline: float | None
    """Time until which the function should have returned, in seconds since the epoch, on the clock of the worker's
    host (`time.time()`). None if no limit is known."""


def asked_within(reason: StopReason, within_s: float | None) -> StopAsked:
    """Return a request with its deadline on this process's clock."""
    return StopAsked(reason, None if within_s is None else now_ns() / 1e9 + within_s)


def is_more_urgent(asked: StopAsked, than: StopAsked | None) -> bool:
    """Return True if a request replaces an earlier one: by a more urgent reason, or else by an earlier deadline."""
    return than is None or _urgency(asked) > _urgency(than)


class StopBoard:
    """The agent's end of the page. The workers get `fd`."""

    def __init__(self) -> None:
        self.fd = linux.memory_file("torchrunx_ray_stop")
        os.ftruncate(self.fd, linux.PAGE_SIZE)
        self._address = linux.map_page(self.fd, is_writable=True)
        self._word = ctypes.c_uint64.from_address(self._address)
        self._asked: StopAsked | None = None

    def ask(self, asked: StopAsked) -> None:
        """Show a request to the workers, unless the request that they see is as urgent."""
        if is_more_urgent(asked, self._asked):
            self._asked = asked
            self._word.value = _word_of(asked)

    def close(self) -> None:
        """Free the page here. Workers keep theirs. No request may follow."""
        linux.unmap_page(self._address)
        os.close(self.fd)


class StopReader:
    """A worker's end of the page. Closes the descriptor that it gets."""

    def __init__(self, fd: int) -> None:
        try:
            address = linux.map_page(fd, is_writable=False)
        finally:
            os.close(fd)
        self._word = ctypes.c_uint64.from_address(address)
        self._last: tuple[int, StopAsked | None] = (0, None)
        """The last word that was read, and its request. One tuple, since threads and signal handlers read too."""

    def read(self) -> StopAsked | None:
        """Return the current request; None if there is none."""
        word, (last_word, asked) = self._word.value, self._last
        if word != last_word:
            asked = _asked_of(word)
            self._last = word, asked
        return asked


def _urgency(asked: StopAsked) -> tuple[int, float]:
    deadline = float("inf") if asked.deadline is None else asked.deadline
    return _REASONS.index(asked.reason), -deadline


def _word_of(asked: StopAsked) -> int:
    deadline_us = 0 if asked.deadline is None else int(min(asked.deadline * 1e6, _LATEST_US))
    return deadline_us << _REASON_BITS | _REASONS.index(asked.reason) + 1


def _asked_of(word: int) -> StopAsked:
    deadline_us, reason = word >> _REASON_BITS, word & (1 << _REASON_BITS) - 1
    return StopAsked(_REASONS[reason - 1], deadline_us / 1e6 if deadline_us else None)
