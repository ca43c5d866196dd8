"""Orders to stop an attempt's workers, and the hosts that do not follow them."""

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchrunx_ray.driver.background.chores import Chores
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.running.share import Share
from torchrunx_ray.driver.running.silent_hosts import SilentHosts
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns

_LAST_WORDS_S = 12.0
"""Time after SIGKILL until a host that does not report its end is given up.

This is longer than a template waits for a process that frees much memory.
"""

_DEAF_S = 1.0
"""Time that an agent may take to confirm that it kills the workers, if the user wants them killed."""

_LAST_LINES_S = 5.0
"""Time that a handler or terminal may take for the last output of a cancelled run.

The agents have twice this time to send the output.
"""

_STUCK_S = 2.0
"""Time that a handler or terminal may take for one piece of output after that."""

Lose = Callable[[Share, str, str], None]
"""A function to call before a host is given up, with the host, what happened, and the evidence."""


@dataclass(frozen=True)
class StopOrder:
    """The last order to stop: when the first one was given, and when SIGKILL follows, on the loop's clock."""

    first_ns: int
    kills_at: float
    signum: signal.Signals
    """The signal before SIGKILL."""


class Stopping:
    """Tells the hosts of an attempt to stop, and gives up those that do not."""

    def __init__(
        self, shares: Sequence[Share], logs: RunLogs, chores: Chores, silent_hosts: SilentHosts
    ) -> None:
        self._shares = shares
        self._silent_hosts = silent_hosts
        self._logs = logs
        self._chores = chores
        self.order: StopOrder | None = None

    def stop(self, grace_s: float, signum: signal.Signals, lose: Lose) -> list[Share]:
        """Send the signal, and SIGKILL after the grace time. Returns the hosts that are told.

        A later call does nothing, unless its grace time ends earlier or is 0.
        """
        kills_at = asyncio.get_running_loop().time() + grace_s
        last = self.order
        if last is None:
            self.order = StopOrder(now_ns(), kills_at, signum)
        elif grace_s == 0 or kills_at < last.kills_at:
            self.order = StopOrder(last.first_ns, min(kills_at, last.kills_at), signum)
        else:
            return []
        told = [s for s in self._shares if s.is_watched and s.agent.connection.is_ours()]
        for share in told:
            share.stop(grace_s, signum)
        self._chores.later(self.longest_s(grace_s), self._give_up, lose)
        self._silent_hosts.refuse_unheard(self.longest_s(grace_s), grace_s)
        return told

    @staticmethod
    def longest_s(grace_s: float) -> float:
        """Return the time after which a stopped attempt has ended, at the latest."""
        return grace_s + _LAST_WORDS_S

    def grace_left_s(self, grace_s: float) -> float:
        """Return the time until SIGKILL if `stop` is called now with this grace time."""
        if self.order is None:
            return grace_s
        return min(grace_s, max(0.0, self.order.kills_at - asyncio.get_running_loop().time()))

    def has_sent(self, signal_number: int | None, died_at_ns: int) -> bool:
        """Return True if an order may have sent the signal that ended a worker."""
        if self.order is None or died_at_ns <= self.order.first_ns:
            return False
        if signal_number == signal.SIGKILL:
            return asyncio.get_running_loop().time() >= self.order.kills_at
        return signal_number == self.order.signum

    def explains(self, event: messages.Event, on_ours: Callable[[int], int]) -> bool:
        """Return True if an order explains the end of a worker, which may handle SIGTERM and raise or exit.

        A signal that no order has sent is explained by something else.
        """
        match event:
            case messages.Failed():
                time_ns, signal_number = event.time_ns, None
            case messages.Died(exited=exited):
                time_ns, signal_number = exited.time_ns, exited.signal
            case _:
                return False
        if self.order is None or on_ours(time_ns) <= self.order.first_ns:
            return False
        return signal_number is None or self.has_sent(signal_number, on_ours(time_ns))

    def give_up_deaf(self, lose: Lose) -> None:
        """Give up the agents that do not confirm the last order soon."""
        self._chores.later(_DEAF_S, self._give_up_deaf, lose)

    def bound_last_lines(self) -> None:
        """Limit the wait for the last output, which a blocked handler or a stopped terminal may not take."""
        # No chore: it may be needed after the attempt has ended.
        asyncio.get_running_loop().call_later(_LAST_LINES_S, self._logs.hurry, _STUCK_S)
        self._chores.later(2 * _LAST_LINES_S, self._give_up_silent)

    def _give_up(self, lose: Lose) -> None:
        """Give up the hosts that have not reported the end of their killed workers.

        A host that has reported the end is kept: its output may wait for the driver's terminal.
        """
        what = (
            f"{_LAST_WORDS_S:g} s after SIGKILL the agent has not reported the end of its workers"
        )
        evidence = "the machine is too busy, frozen or cut off, or a process is stuck in the kernel"
        for share in self._shares:
            if share.is_watched and not share.is_over:
                lose(share, what, evidence)
                share.give_up()

    def _give_up_deaf(self, lose: Lose) -> None:
        what = f"{_DEAF_S:g} s after the request to kill the workers the agent has not answered"
        evidence = "the machine is too busy, swapping, frozen or cut off"
        for share in self._shares:
            if share.is_watched and share.is_deaf and not share.is_over:
                lose(share, what, evidence)
                share.give_up()

    def _give_up_silent(self) -> None:
        """Give up the agents whose last output is missing, unless the driver is still writing output."""
        if self._logs.is_at_work:
            self._chores.later(_LAST_LINES_S, self._give_up_silent)
            return
        for share in self._shares:
            if share.is_watched:
                share.give_up()
