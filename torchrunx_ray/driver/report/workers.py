"""Workers of a run's current attempt, for the user."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchrunx_ray.wire import messages
from torchrunx_ray.wire.ranks import Place
from torchrunx_ray.wire.worker_states import NOT_FINAL, WorkerState, news


@dataclass(frozen=True)
class WorkerInfo:
    """One worker of an attempt, as the driver knows it.

    `state` has the names of `torch.distributed.elastic.agent.server.api.WorkerState`. A launch uses them so:

    * INIT: not forked, also at the end of a launch that stopped before the fork
    * HEALTHY: forked, and not ended
    * SUCCEEDED: the function returned
    * FAILED: the function raised, the process died, or it was too long in a scope of the watchdog
    * STOPPED: ended because the launch stopped it
    * UNKNOWN: its host was lost, and nothing more is heard of the worker

    The last four are final. A launch never uses UNHEALTHY.
    """

    rank: int
    local_rank: int
    host: str
    pid: int | None
    """None before the fork."""
    attempt: int
    state: WorkerState


class Workers:
    """States of an attempt's workers. Written only in the background loop; any thread may call `infos`."""

    def __init__(self, attempt: int, hostnames: Sequence[str], places: Sequence[Place]) -> None:
        self._by_place = {
            (place.host_index, place.local_rank): WorkerInfo(
                place.rank, place.local_rank, hostnames[place.host_index], None, attempt, "INIT"
            )
            for place in places
        }

    def infos(self) -> list[WorkerInfo]:
        """Return the workers by rank."""
        return sorted(self._by_place.copy().values(), key=lambda info: info.rank)

    @property
    def have_pids(self) -> bool:
        """True if every worker was forked."""
        return all(info.pid is not None for info in self._by_place.values())

    def hear(self, host_index: int, event: messages.Event, *, is_stopped: bool) -> None:
        """Note an event of a host. `is_stopped`: our own stop explains the worker's end."""
        for local_rank, state, pid in news(event):
            is_ours = is_stopped and state == "FAILED"
            self._become(host_index, local_rank, "STOPPED" if is_ours else state, pid)
        if isinstance(event, messages.HostEnded):
            # Nobody reports the exits of workers that the kernel killed with their template.
            self._rest_become(host_index, "FAILED", ("HEALTHY",))

    def lose(self, host_index: int) -> None:
        """Note that nothing more will be heard of a host."""
        self._rest_become(host_index, "UNKNOWN", NOT_FINAL)

    def _rest_become(
        self, host_index: int, state: WorkerState, now: Collection[WorkerState]
    ) -> None:
        for (of_host, local_rank), info in list(self._by_place.items()):
            if of_host == host_index and info.state in now:
                self._become(host_index, local_rank, state)

    def _become(
        self, host_index: int, local_rank: int, state: WorkerState, pid: int | None = None
    ) -> None:
        """Enter a state, unless the present one is final. A pid is never forgotten."""
        info = self._by_place[host_index, local_rank]
        if info.state in NOT_FINAL:
            info = dataclasses.replace(info, state=state)
        self._by_place[host_index, local_rank] = dataclasses.replace(info, pid=pid or info.pid)
