"""A placement that is kept over several runs."""

import asyncio
import logging
import types
import uuid
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torchrunx_ray.driver import cluster, loop, pool
from torchrunx_ray.driver.attempt import Attempt
from torchrunx_ray.driver.checks import check_function
from torchrunx_ray.driver.cluster import untyped_ray
from torchrunx_ray.driver.options import Options
from torchrunx_ray.driver.placement import Host, Placement, place
from torchrunx_ray.driver.pool import Agent
from torchrunx_ray.driver.results import LaunchResult
from torchrunx_ray.driver.run import Run
from torchrunx_ray.driver.template import template_wanted
from torchrunx_ray.wire.payload import pack

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("torchrunx_ray")


class Session:
    """Hosts that stay reserved, so that nobody takes their GPUs between runs.

    Every run gets fresh worker processes. Runs wait for each other. A failed run leaves the
    session usable: what died is replaced. It ends with `close()`, at the end of its `with` (by an
    exception: what still runs is cancelled), or with the driver.
    """

    def __init__(self, options: Options) -> None:
        cluster.connect()
        self._inner = _Session(options)
        self._runs: list[Run[Any]] = []
        opening = loop.start(self._inner.open(_unique(options.name or "session")))
        try:
            opening.result()
        except BaseException:
            opening.cancel()
            raise

    def run(self, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> LaunchResult[R]:
        """Call the function on every worker, and wait for all of them."""
        return self.submit(func, *args, **kwargs).result()

    def submit(self, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Run[R]:
        """The same without waiting."""
        function = put_call(func, args, kwargs)
        run: Run[R] = Run(self._inner.run(function, _name(self._inner.options, func)))
        self._runs.append(run)
        return run

    def close(self) -> None:
        """Give the hosts back, after the runs that were submitted."""
        for run in self._runs:
            run.wait()
        loop.start(self._inner.close()).result()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if error is not None:
            for run in self._runs:
                run.cancel()
        self.close()


def submit_once(
    options: Options, func: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Run[R]:
    """A session of one run, which closes with it."""
    function = put_call(func, args, kwargs)
    return Run(_run_once(_Session(options), function, _name(options, func)))


async def _run_once(session: "_Session", function: Any, name: str) -> LaunchResult[Any]:
    try:
        await session.open(name)
        return await session.run(function, name)
    finally:
        await asyncio.shield(session.close())


def put_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check, pickle, then hand to Ray: what cannot travel fails before any resource is asked for."""
    check_function(func)
    packed = pack([(_function_name(func), func), ("args", args), ("kwargs", kwargs)])
    cluster.connect()
    return untyped_ray.put(packed)


class _Session:
    """The part of a session that lives in the background loop."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._placement: Placement | None = None
        self._agents: dict[int, Agent] = {}
        self._turn = asyncio.Lock()

    async def open(self, name: str) -> None:
        """Take room in the cluster; `name` is for whoever looks at it."""
        self._placement = await place(self.options, name)
        hosts = self._placement.hosts
        gpus = sum(len(host.gpu_ids) for host in hosts)
        logger.info(
            "%d hosts (%s), %d workers, %d GPUs",
            len(hosts),
            ", ".join(host.label for host in hosts),
            sum(host.workers for host in hosts),
            gpus,
        )

    async def run(self, function: Any, name: str) -> LaunchResult[Any]:
        """One run; `function` is the reference to a packed call."""
        async with self._turn:
            if self._placement is None:
                raise RuntimeError("the session is closed")
            hosts = self._placement.hosts
            agents = await asyncio.gather(
                *(self._agent(i, host, f"{name}-{i}") for i, host in enumerate(hosts))
            )
            attempt = Attempt(name, self.options, hosts, agents)
            try:
                refs = await attempt.go(function)
            finally:
                await self._drop(attempt.broken)
            return LaunchResult([host.label for host in hosts], refs)

    async def close(self) -> None:
        """Agents rest or end; the room is given back. Safe to repeat."""
        agents, self._agents = list(self._agents.values()), {}
        placement, self._placement = self._placement, None
        await asyncio.gather(*(agent.release() for agent in agents))
        if placement is not None:
            await placement.remove()

    async def _agent(self, index: int, host: Host, name: str) -> Agent:
        if index not in self._agents:
            wanted = template_wanted(self.options, one_worker=host.workers == 1)
            self._agents[index] = await pool.acquire(host.node_id, wanted, self.options, name)
        return self._agents[index]

    async def _drop(self, broken: set[int]) -> None:
        await asyncio.gather(*(self._agents.pop(i).end() for i in broken))


def _name(options: Options, func: Callable[..., Any]) -> str:
    return _unique(options.name or _function_name(func))


def _unique(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:6]}"


def _function_name(func: Callable[..., Any]) -> str:
    inner = getattr(func, "func", func)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)
