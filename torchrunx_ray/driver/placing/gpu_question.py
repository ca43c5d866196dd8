"""The question which GPUs a bundle of a placement has, answered by Ray."""

import asyncio
from collections.abc import Mapping
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
    """Asks Ray by a task which GPUs a bundle has. The answer stays valid while the bundle stays on its node."""

    group: PlacementGroup
    bundle: int
    hostname: str
    amount: float
    runtime_env: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        self._asked: asyncio.Task[tuple[str, ...]] | None = self._ask()

    async def answer(self) -> tuple[str, ...]:
        """Wait for the GPUs.

        Raises AgentFailedError if Ray cannot answer, or not in time. The next call then asks again.
        """
        asked = self._asked = self._asked or self._ask()
        # If this wait is cancelled, the task goes on for the next call.
        await asyncio.wait({asked}, timeout=_ANSWER_S)
        try:
            if not asked.done():
                raise _late(self.hostname)
            return asked.result()
        except Exception:
            self.drop()
            raise
        finally:
            del asked  # an exception refers to this frame, and must not wait for Python's gc

    def drop(self) -> None:
        """Forget the answer, and cancel a task that has not answered."""
        if self._asked is not None:
            self._asked.cancel()
            self._asked = None

    def _ask(self) -> "asyncio.Task[tuple[str, ...]]":
        asked = asyncio.create_task(self._ask_ray())
        # A launch that fails early never retrieves the exception.
        asked.add_done_callback(lambda task: task.cancelled() or task.exception())
        return asked

    async def _ask_ray(self) -> tuple[str, ...]:
        if not self.amount:
            return ()
        task = _Task(
            untyped_ray.remote(
                num_cpus=0,
                num_gpus=self.amount,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=self.bundle
                ),
                runtime_env=dict(self.runtime_env) if self.runtime_env else None,
            )(_own_gpu_ids)
        )
        connection = Connection()
        try:
            ids: list[str] = await connection.ask(task)
        except RayError as error:
            raise AgentFailedError(
                hostname=self.hostname, what=f"{_WHAT} failed", evidence=str(error)
            ) from None
        except asyncio.CancelledError:
            # The task holds the GPUs until it ends. Another task could not use them meanwhile.
            await clean_up(connection.call(task.cancel), f"cancelling {_WHAT} on {self.hostname}")
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
