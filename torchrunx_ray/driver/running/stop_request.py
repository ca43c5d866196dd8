"""Requests to the function of an attempt that it returns, because the run is to go on in another way."""

from collections.abc import Sequence

from torchrunx_ray.driver.running.share import Share
from torchrunx_ray.wire.clock import now_ns
from torchrunx_ray.wire.stop_board import StopAsked, StopReason, asked_within, is_more_urgent


class StopRequest:
    """The last request to the function of an attempt, and the ranks that have read it."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._first_ns = 0
        self.asked: StopAsked | None = None
        """The last request, on the driver's clock."""
        self.seen_by: set[int] = set()
        """Ranks that have returned after they had read a request."""

    def make(self, reason: StopReason, within_s: float | None) -> StopAsked | None:
        """Pass a request on to all hosts and return it; None if the last request is as urgent."""
        asked = asked_within(reason, within_s)
        if not is_more_urgent(asked, self.asked):
            return None
        self.asked = asked
        self._first_ns = self._first_ns or now_ns()
        for share in self._shares:
            if not share.is_over and share.agent.connection.is_ours():
                share.ask_to_stop(reason, within_s)
        return asked

    def was_made_before(self, time_ns: int) -> bool:
        """Return True if the function had been asked to stop by then."""
        return self.asked is not None and time_ns >= self._first_ns
