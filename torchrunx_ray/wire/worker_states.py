"""States of workers, as events tell them."""

from collections.abc import Iterator
from typing import Literal

from torchrunx_ray.wire import messages

WorkerState = Literal["UNKNOWN", "INIT", "HEALTHY", "UNHEALTHY", "STOPPED", "SUCCEEDED", "FAILED"]
"""Names of torch.distributed.elastic's WorkerState."""

NOT_FINAL: tuple[WorkerState, ...] = ("INIT", "HEALTHY")


def news(event: messages.Event) -> Iterator[tuple[int, WorkerState, int | None]]:
    """Return the workers that an event is about: local rank, state, and the pid if the event has it.

    A worker that the launch has stopped is FAILED here, too: an event does not have its reason.
    """
    match event:
        case messages.WorkersForked():
            for local_rank, pid in event.pids:
                yield local_rank, "HEALTHY", pid
        case messages.Joined():
            yield event.local_rank, "HEALTHY", None
        case messages.Started():
            yield event.local_rank, "HEALTHY", event.pid
        case messages.Finished():
            yield event.local_rank, "SUCCEEDED", None
        case messages.Failed():
            yield event.local_rank, "FAILED", event.pid
        case messages.ScopeExpired() if event.signal > 0:
            yield event.local_rank, "FAILED", event.pid
        case messages.Died(exited=exited) if exited.local_rank is not None:
            yield exited.local_rank, "FAILED", exited.pid
        case _:
            pass
