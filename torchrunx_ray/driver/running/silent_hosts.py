"""Hosts of an attempt that are silent: when they are given up, and until when their workers may live on."""

import asyncio
from collections.abc import Callable, Sequence

from torchrunx_ray.driver.background.chores import Chores
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.leases import Leases, lease_s
from torchrunx_ray.driver.running.share import End, Share
from torchrunx_ray.wire import messages
from torchrunx_ray.wire.clock import now_ns

_REPORT_OF_END_S = 0.5
"""Time for an agent to report that the lease ran out. It says more than the pulse, if it can be heard."""

_OVER = "The lease of its workers has run out, so they have ended"

_SILENT = (
    f"its agent or the whole host is frozen or very busy, or the network to it is cut. {_OVER}"
)

_NO_REPORT = f"its agent or the whole host is frozen, or a process is stuck in the kernel. {_OVER}"

Fail = Callable[[Share, int, messages.AgentFailed], None]
"""A function that notes the failure of a host, with its time on the host's clock."""


class SilentHosts:
    """Knows which hosts are silent, and waits for the ends of their leases. Without restarts there are no leases."""

    def __init__(
        self,
        attempt: messages.AttemptId,
        options: Options,
        crew: Crew,
        shares: Sequence[Share],
        chores: Chores,
        fail: Fail,
    ) -> None:
        self._shares = shares
        self._chores = chores
        self._fail = fail
        self.leases = None
        if options.may_restart:
            self.leases = Leases(attempt, crew, lease_s(options))
        self._refused: set[int] = set()
        """Hosts that were refused further leases before they were given up."""

    async def watch(self) -> None:
        """Hold the leases until cancelled, and give up hosts whose lease has run out."""
        if self.leases is not None:
            await self.leases.hold(self._lease_is_over)

    def refuse(self, share: Share) -> "asyncio.Task[bool] | None":
        """Let the lease of a host run out, because nobody knows if its workers will end otherwise.

        The task ends when they must have ended; its value is False if they may live on. None without leases.
        """
        if self.leases is None:
            return None
        self._refused.add(share.index)
        return self.leases.refuse(share.index)

    def refuse_unheard(self, within_s: float, grace_s: float) -> None:
        """Let the leases of hosts that do not report the end of their killed workers run out until `within_s` from now.

        SIGKILL is sent after `grace_s`. Before that, the workers may still need their leases.
        """
        if self.leases is not None:
            wait_s = max(grace_s, within_s - self.leases.longest_silence_s)
            self._chores.later(wait_s, self._refuse_unheard)

    async def in_doubt(self) -> list[str]:
        """Return the hosts on which processes of the attempt may live on, since they are cut off, frozen or ending.

        Wait first until the leases of such hosts must have run out.
        """
        unknown = self._unknown
        leases = self.leases
        if leases and unknown and await leases.fence(share.index for share in unknown):
            for share in unknown:
                share.note_end(End.LEASE_OVER)
        in_doubt = (End.UNKNOWN, End.NOT_KILLED)
        return [share.label for share in self._shares if share.end in in_doubt]

    def fences(self) -> "dict[str, asyncio.Task[bool]]":
        """Let the leases of all hosts in doubt run out. Return a task for each, as `refuse` does."""
        refused = {share.label: self.refuse(share) for share in self._unknown}
        return {label: task for label, task in refused.items() if task is not None}

    def close(self) -> None:
        """Give up no more hosts. Wait for no leases of workers that are known to have ended.

        The reference to the attempt goes: the attempt would otherwise wait for Python's gc.
        """
        self._fail = _nothing
        for share in self._shares:
            if self.leases is not None and share.end is not End.UNKNOWN:
                self.leases.forget(share.index)

    @property
    def _unknown(self) -> list[Share]:
        return [share for share in self._shares if share.end is End.UNKNOWN]

    def _refuse_unheard(self) -> None:
        for share in self._shares:
            if share.is_watched and not share.is_over:
                self.refuse(share)

    def _lease_is_over(self, host_index: int) -> None:
        """Give up a host whose lease must have run out, unless its agent reports the end of its workers."""
        assert self.leases is not None
        since_ns = now_ns() - int(self.leases.longest_silence_s * 1e9)
        share = self._shares[host_index]
        self._chores.later(_REPORT_OF_END_S, self._lose, share, since_ns)

    def _lose(self, share: Share, since_ns: int) -> None:
        """Give up a silent host. It failed when the silence began: what others made of that is no cause."""
        if share.is_over or not share.is_watched:
            return
        assert self.leases is not None
        what, evidence = f"the host was silent for {self.leases.lease_s:g} s", _SILENT
        if share.index in self._refused:
            what, evidence = "the agent has not reported the end of its killed workers", _NO_REPORT
        report = messages.AgentFailed(now_ns(), what, evidence)
        self._fail(share, since_ns + share.agent.ahead_ns, report)
        share.note_end(End.LEASE_OVER)
        share.give_up()


def _nothing(_share: Share, _time_ns: int, _report: messages.AgentFailed) -> None:
    pass
