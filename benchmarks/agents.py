"""The driver's cost per host, for more hosts than one machine can run.

The agents fork nothing: a few Ray actors answer for all of them as fast as Ray allows, and report workers that
join, start, return and end. The driver's own code calls them, and each call goes through Ray. The benchmark
measures the CPU time of the driver process (all threads), since the actors share its cores. It measures a run on
new agents, and the next run on the same agents.

    python benchmarks/agents.py [--samples 5] [--hosts 25,50,100,250,500] [--workers 8]
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from table import print_table

from torchrunx_ray.driver.agents.pool import PooledAgent
from torchrunx_ray.driver.background import loop
from torchrunx_ray.driver.call.pack_call import put_call
from torchrunx_ray.driver.cluster.connection import Connection
from torchrunx_ray.driver.cluster.inventory import Node
from torchrunx_ray.driver.options.options import Options
from torchrunx_ray.driver.output.run_logs import RunLogs
from torchrunx_ray.driver.placing.placement import Host
from torchrunx_ray.driver.report.timeline import Timeline
from torchrunx_ray.driver.running.attempt import Attempt
from torchrunx_ray.driver.running.crew import Crew
from torchrunx_ray.wire import messages, versions
from torchrunx_ray.wire.clock import now_ns

ACTORS = 2


class Agents:
    """An actor that answers for many agents, by their index."""

    def __init__(self) -> None:
        self._events: dict[int, asyncio.Queue[list[messages.Told]]] = {}

    async def clock(self, _index: int) -> int:
        return now_ns()

    async def start(self, index: int, wanted: messages.ShareWanted, _function: object) -> None:
        times = now_ns()
        ranks = range(len(wanted.places))
        told: list[messages.Event] = [messages.TemplateLoaded(times, times)]
        for local_rank in ranks:
            told += [
                messages.Joined(local_rank, times),
                messages.Started(local_rank, local_rank, times),
            ]
        self._tell(index, wanted, told)
        await asyncio.sleep(0.05)
        told = []
        for local_rank in ranks:
            told += [
                messages.Finished(local_rank, now_ns(), 8, has_seen_stop=False),
                messages.Exited(local_rank, local_rank, now_ns(), 0, None, 0),
            ]
        self._tell(index, wanted, [*told, messages.HostEnded(()), messages.OutputEnded()])

    def _tell(self, index: int, wanted: messages.ShareWanted, events: list[messages.Event]) -> None:
        attempt = wanted.worker.attempt
        self._queue(index).put_nowait([messages.Told(attempt, event) for event in events])

    async def poll(self, index: int, _with_output: bool) -> list[messages.Told]:
        try:
            return await asyncio.wait_for(self._queue(index).get(), 5)
        except TimeoutError:
            return []

    async def others_have_ended(self, _index: int, _attempt: messages.AttemptId) -> None:
        """Do nothing, since these agents serve no store."""

    async def value(self, _index: int, _attempt: messages.AttemptId, local_rank: int) -> int:
        return local_rank

    def _queue(self, index: int) -> asyncio.Queue[list[messages.Told]]:
        return self._events.setdefault(index, asyncio.Queue())


class Bound:
    """A method of the actor, for one of its agents."""

    def __init__(self, method: Any, index: int) -> None:
        self._method, self._index = method, index

    def remote(self, *args: object) -> Any:
        return self._method.remote(self._index, *args)


class Calls:
    """Replacement for an agent's actor handle."""

    def __init__(self, actor: Any, index: int) -> None:
        self._actor, self._index = actor, index

    def __getattr__(self, name: str) -> Bound:
        return Bound(getattr(self._actor, name), self._index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--hosts", default="25,50,100,250,500")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", help="where to write the times, too")
    arguments = parser.parse_args()
    os.environ["TORCHRUNX_LOG_DIR"] = ""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    remote: Any = ray.remote
    actors = [
        remote(Agents).options(num_cpus=0, max_concurrency=100_000).remote() for _ in range(ACTORS)
    ]
    times: dict[str, list[float]] = {}
    for hosts in map(int, arguments.hosts.split(",")):
        run_twice(hosts, arguments.workers, actors)  # warm-up
        for _ in range(arguments.samples):
            for kind, taken in run_twice(hosts, arguments.workers, actors).items():
                times.setdefault(f"{hosts} hosts: {kind}", []).append(taken)
    ray.shutdown()
    print_table("seconds", times, last_head="per host, ms", last=ms_per_host)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(times, indent=1))


def run_twice(hosts: int, workers: int, actors: list[Any]) -> Mapping[str, float]:
    node = Node(ray.get_runtime_context().get_node_id(), "host", "127.0.0.1", {}, {})
    wanted: Any = None
    agents = [
        PooledAgent(
            f"node{i}",
            wanted,
            "",
            Calls(actors[i % len(actors)], i),
            Connection(),
            starts_within_s=None,
        )
        for i in range(hosts)
    ]
    met = messages.Met("127.0.0.1", 29500, False, versions.of_this_process(), None, None)
    crew = Crew(
        [Host(node, f"host{i}", workers, {}, 0) for i in range(hosts)],
        agents,
        [met] * hosts,
        [()] * hosts,
    )
    return {**run("first run", crew), **run("next run", crew)}


def run(which: str, crew: Crew) -> Mapping[str, float]:
    options = Options(console_ranks=())
    call = put_call(no_op, (), {}, options)

    async def go() -> object:
        id_ = messages.AttemptId(call.run_name, 0)
        logs = RunLogs(call.run_name, options, call.log_handlers, call.files, crew.speakers)
        attempt = Attempt(id_, options, crew, "gloo", Timeline(), logs)
        await attempt.go(call)
        await logs.drain()
        return await attempt.outcome()

    begun, cpu = time.perf_counter(), time.process_time()
    running = loop.start(go())
    values: Any = running.result()
    assert list(map(len, values)) == [host.workers for host in crew.hosts], values
    return {
        f"{which}, CPU of the driver": time.process_time() - cpu,
        f"{which}, until all have ended": time.perf_counter() - begun,
    }


def no_op() -> None:
    pass


def ms_per_host(name: str, seconds: float) -> str:
    return f"{1000 * seconds / int(name.split()[0]):.2f}"


if __name__ == "__main__":
    main()
