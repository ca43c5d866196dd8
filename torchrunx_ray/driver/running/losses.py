"""Nodes on which a launch has lost hosts or agents."""

import time
from collections import defaultdict

_SHUNNED_S = 10.0
"""Time for which the node of a lost host gets no new host, although Ray may still call the node alive."""

_REMEMBERED_S = 600.0
"""Time after which a failure of a node counts no more."""

_MOST_FAILURES = 2


class Losses:
    """Failures of nodes, as a launch remembers them. Used only in the background loop."""

    def __init__(self) -> None:
        self._lost_at: dict[str, float] = {}
        self._failed_at: defaultdict[str, list[float]] = defaultdict(list)
        """Times of the last failures by node id, on the monotonic clock."""

    def note_lost_host(self, node_id: str) -> None:
        self._lost_at[node_id] = time.monotonic()
        self.note_failure(node_id)

    def note_failure(self, node_id: str) -> None:
        """Note a failure of a node that may be used again at once."""
        last = self._failed_at[node_id]
        last.append(time.monotonic())
        del last[:-_MOST_FAILURES]

    @property
    def shunned(self) -> set[str]:
        """Nodes whose host was lost a moment ago."""
        now = time.monotonic()
        return {node_id for node_id, at in self._lost_at.items() if now - at < _SHUNNED_S}

    @property
    def distrusted(self) -> set[str]:
        """Nodes that failed twice, and are used only if there is no other room."""
        since = time.monotonic() - _REMEMBERED_S
        return {
            node_id
            for node_id, times in self._failed_at.items()
            if len(times) == _MOST_FAILURES and times[0] > since
        }
