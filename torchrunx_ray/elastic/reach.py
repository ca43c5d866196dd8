"""How an agent reaches its run: in its own process, or in a fresh one."""

import signal
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.call.pack_call import put_call
from torchrunx_ray.driver.cluster import connection
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.to_destinations import Destinations
from torchrunx_ray.driver.running.crew import GroupPlan
from torchrunx_ray.elastic.fresh import FreshRun
from torchrunx_ray.elastic.run import Assembled, ElasticRun, Ended, Work
from torchrunx_ray.worker.function import entrypoint

T = TypeVar("T")


class GroupRun(Protocol):
    """A worker group's run, as its agent uses it; see `ElasticRun`."""

    def assemble(self, restarts: int, until_warm: bool) -> Assembled: ...
    def start(self, plan: GroupPlan, destinations: Destinations) -> dict[int, int]: ...
    def ended(self) -> Ended | None: ...
    @property
    def hosts_waiting(self) -> int: ...
    def stop(self) -> None: ...
    def close(self, signum: signal.Signals) -> None: ...


class OwnRun:
    """A run in the background loop of this process. Each method waits for it."""

    def __init__(self, options: Options, work: Work) -> None:
        args = (work.entrypoint, work.args, work.drivers_interpreter, work.numa_options)
        self._run = ElasticRun(options, put_call(entrypoint.run, args, {}, options))

    def assemble(self, restarts: int, until_warm: bool) -> Assembled:
        return _await(self._run.assemble(restarts, until_warm=until_warm))

    def start(self, plan: GroupPlan, destinations: Destinations) -> dict[int, int]:
        return _await(self._run.start(plan, destinations))

    def ended(self) -> Ended | None:
        return self._run.ended()

    @property
    def hosts_waiting(self) -> int:
        return self._run.hosts_waiting

    def stop(self) -> None:
        _await(self._run.stop())

    def close(self, signum: signal.Signals = signal.SIGTERM) -> None:
        _await(self._run.close(signum))


def connect() -> None:
    """Join or start the cluster, unless only a fresh process can."""
    if not connection.is_of_parent():
        connection.connect()


def begin(options: Options, work: Work) -> GroupRun:
    """Return a run that can be used here. In a forked child of a driver, Ray works only in a fresh process."""
    if connection.is_of_parent():
        return FreshRun(options, work)
    return OwnRun(options, work)


def _await(work: Coroutine[Any, Any, T]) -> T:
    """Wait for work of the background loop. An exception of a signal handler cancels the work."""
    waiting = loop.start(work)
    try:
        loop.wait(waiting)
    except BaseException:
        waiting.cancel()
        raise
    return waiting.result()
