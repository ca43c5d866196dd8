"""Limits on the time in which an attempt's hosts get ready to fork, and its ranks join the process group."""

import logging
from collections.abc import Callable, Sequence

from torchrunx_ray.driver.background.chores import Chores
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.report.failures import NotJoined
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.driver.running.share import Share, ShareState
from torchrunx_ray.driver.running.stopping import Lose

logger = logging.getLogger("torchrunx_ray")

_SLOW_START_S = 60.0
"""Time that a host may take until it can fork before a warning."""

_START_S = 1800.0
"""Time that a host may take until it can fork before the run fails."""


class StartLimits:
    """Finds the hosts and ranks that keep the others of an attempt waiting."""

    def __init__(
        self, shares: Sequence[Share], crew: Crew, timeline: Timeline, options: Options
    ) -> None:
        self._shares = shares
        self._crew = crew
        self._timeline = timeline
        self._options = options

    def begin(self, chores: Chores, is_starting: Callable[[], bool], lose: Lose) -> None:
        """Watch the hosts while the attempt is starting. `lose` is called for each host that takes too long."""
        for wait_s, tell in ((_SLOW_START_S, _warn), (_START_S, lose)):
            chores.later(wait_s, self._check_can_fork, wait_s, is_starting, tell)

    def not_joined(self) -> tuple[Share, NotJoined] | None:
        """Return the ranks that have not joined the process group, and the host of the first; None if all have."""
        absent = [each for each in self._crew.places if each.rank not in self._timeline.joined]
        if not absent:
            return None
        missing = {place.rank: self._shares[place.host_index].label for place in absent}
        return self._shares[absent[0].host_index], NotJoined(self._options.timeout, missing)

    def _check_can_fork(self, waited_s: float, is_starting: Callable[[], bool], tell: Lose) -> None:
        if not is_starting():
            return
        for share in self._shares:
            if share.state is ShareState.STARTING:
                what = f"{waited_s:g} s after the run began no worker can be forked"
                tell(share, what, self._why_not_ready(share))

    def _why_not_ready(self, share: Share) -> str:
        if share.index in self._timeline.loaded:
            return "the function and its arguments are still on their way to the template"
        # An agent gets the run only together with its arguments.
        preload = ", ".join(self._options.preload)
        of_template = f"still imports {preload}" if preload else "is still being started"
        return f"its template {of_template}, or the arguments are still on their way there"


def _warn(share: Share, what: str, evidence: str) -> None:
    logger.warning("%s: %s: %s", share.label, what, evidence)
