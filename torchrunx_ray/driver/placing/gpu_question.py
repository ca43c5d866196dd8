"""The question which GPUs a placement has on each of its hosts, answered by Ray."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from torchrunx_ray.driver.cluster import inventory
from torchrunx_ray.driver.cluster.clean_up import clean_up
from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray
from torchrunx_ray.errors import AgentFailedError

_WHAT = "the task that asks Ray for the launch's GPU ids"

_ANSWER_S = 120.0
"""Time for the tasks to answer after all agents have started, when their runtime_env is already made."""


@dataclass(eq=False, repr=False)
class GpuQuestion:
    """Asks Ray for the GPUs by a task on each host. The answers stay valid while the placement lives."""

    group: PlacementGroup
    hosts: Sequence[tuple[str, float]]
    """A hostname and a number of GPUs for each of the group's bundles, in order."""
    runtime_env: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        self._asked = self._ask()

    async def answer(self) -> list[tuple[str, ...]]:
        """Wait for every host's GPUs.

        Raises AgentFailedError if Ray cannot answer, or not in time. The next call then asks again.
        """
        asked = self._asked = self._asked or self._ask()
        # If this wait is cancelled, the tasks go on for the next call.
        await asyncio.wait(asked, timeout=_ANSWER_S, return_when=asyncio.FIRST_EXCEPTION)
        try:
            answers = [task.result() for task in asked if task.done()]
            for (hostname, _), task in zip(self.hosts, asked, strict=True):
                if not task.done():
                    raise _late(hostname)
            return answers
        except Exception:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget the answers, and cancel the tasks that have not answered."""
        asked, self._asked = self._asked, []
        for task in asked:
            task.cancel()

    def _ask(self) -> "list[asyncio.Task[tuple[str, ...]]]":
        asked = [
            asyncio.create_task(self._ask_on(i, hostname, amount))
            for i, (hostname, amount) in enumerate(self.hosts)
        ]
        for task in asked:  # a launch that fails early never retrieves their exceptions
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return asked

    async def _ask_on(self, index: int, hostname: str, amount: float) -> tuple[str, ...]:
        if not amount:
            return ()
        task = _Task(
            untyped_ray.remote(
                num_cpus=0,
                num_gpus=amount,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=index
                ),
                runtime_env=dict(self.runtime_env) if self.runtime_env else None,
            )(_own_gpu_ids)
        )
        connection = Connection()
        try:
            ids: list[str] = await connection.ask(task)
        except RayError as error:
            raise AgentFailedError(
                hostname=hostname, what=f"{_WHAT} failed", evidence=str(error)
            ) from None
        except asyncio.CancelledError:
            # The task holds the GPUs until it ends. Another task could not use them meanwhile.
            await clean_up(connection.call(task.cancel), f"cancelling {_WHAT} on {hostname}")
            raise
        return tuple(sorted(ids, key=lambda i: (not i.isdigit(), int(i) if i.isdigit() else 0, i)))


class _Task:
    """A remote function whose last call can be cancelled."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._called: list[Any] = []

    def remote(self) -> Any:
        self._called.append(self._function.remote())
        return self._called[-1]

    def cancel(self) -> None:
        for call in self._called:
            untyped_ray.cancel(call, force=True)


def _late(hostname: str) -> AgentFailedError:
    return AgentFailedError(
        hostname=hostname,
        what=f"{_WHAT} has not answered for {_ANSWER_S:g} s",
        evidence="the task waits for its runtime_env or for a Ray process on that host, or it is frozen or cut off. "
        "`ray list tasks` shows its state. Launch again, or leave that host out.",
    )


def _own_gpu_ids() -> list[str]:
    return inventory.context().get_accelerator_ids()["GPU"]
