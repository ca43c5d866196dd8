"""The driver's pulse: the actor beside the driver that grants leases to the hosts."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from torchrunx_ray.driver.agents.pool import NAMESPACE
from torchrunx_ray.driver.background.forks import in_child
from torchrunx_ray.driver.cluster.connection import (
    ClusterLeft,
    Connection,
    is_remote_client,
    untyped_ray,
)
from torchrunx_ray.driver.cluster.inventory import context
from torchrunx_ray.pulse.actor import Pulse
from torchrunx_ray.pulse.driver_process import DriverProcess
from torchrunx_ray.wire.messages import AttemptId, LeasesWanted

_STARTING_S = 30.0
"""Time for Ray to start the actor's process."""

_ANSWER_S = 3.0
"""Time for a pulse to answer. Twice this time if user code holds the driver's GIL meanwhile."""

_DEATH_S = 30.0
"""Time for Ray to say that a killed pulse is dead."""

_STEP_S = 0.1


class PulseLost(Exception):
    """The pulse has died or does not answer. It has granted nothing since `ended_at`, on the monotonic clock.

    `ended_at` is None if that is not certain.
    """

    def __init__(self, ended_at: float | None) -> None:
        super().__init__(ended_at)
        self.ended_at = ended_at


class PulseLink:
    """The driver's link to a pulse. A pulse that does not answer is killed, so that it grants nothing unseen."""

    def __init__(self, calls: Any, connection: Connection) -> None:
        self.calls = calls
        self.connection = connection
        self.has_answered = False
        self._ending: asyncio.Task[float | None] | None = None

    @property
    def is_usable(self) -> bool:
        return self._ending is None and self.connection.is_ours()

    async def begin(self, wanted: LeasesWanted) -> None:
        """Let the pulse grant leases to an attempt's hosts. Raises PulseLost, as do the following methods."""
        await self._ask(0, self.calls.begin, wanted)

    async def watch(self, attempt: AttemptId, known: Sequence[int], within_s: float) -> list[int]:
        """Return hosts whose lease must have run out, or none after `within_s`."""
        return await self._ask(within_s, self.calls.watch, attempt, known, within_s)

    async def revoke(self, attempt: AttemptId, host_index: int) -> float | None:
        """Refuse further leases to a host. Return the seconds until its lease must have run out; None if unknown."""
        return await self._ask(0, self.calls.revoke, attempt, host_index)

    async def _ask(self, takes_s: float, method: Any, *args: Any) -> Any:
        if self._ending is None:
            try:
                answer = await self._answer(takes_s, method, *args)
            except ActorDiedError:
                self._has_ended(time.monotonic())
            except (RayError, TimeoutError):
                self._ending = self._ending or asyncio.create_task(self._end())
            else:
                self.has_answered = True
                return answer
        assert self._ending is not None
        raise PulseLost(await asyncio.shield(self._ending))

    async def _answer(self, takes_s: float, method: Any, *args: Any) -> Any:
        answer_s = _ANSWER_S if self.has_answered else _STARTING_S
        answer = asyncio.create_task(self.connection.ask(method, *args))
        try:
            # After user code has held the GIL, this loop sees the timeout before an answer that came in time.
            for timeout_s in (takes_s + answer_s, _ANSWER_S):
                await asyncio.wait({answer}, timeout=timeout_s)
                if answer.done():
                    return answer.result()
            raise TimeoutError
        finally:
            answer.cancel()
            del answer  # an exception refers to this frame, and must not wait for Python's gc

    def _has_ended(self, at: float) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(_known(at))

    async def _end(self) -> float | None:
        """Kill the pulse, and wait until Ray says that it is dead. Return the time; None if Ray does not say so."""
        with contextlib.suppress(RayError, TimeoutError, ClusterLeft):
            async with asyncio.timeout(_DEATH_S):
                await self.connection.call(untyped_ray.kill, self.calls)
                while not await self._is_dead():
                    await asyncio.sleep(_STEP_S)
                return time.monotonic()
        return None

    async def _is_dead(self) -> bool:
        try:
            await self.connection.ask(self.calls.answer)
        except ActorDiedError:
            return True
        except RayError:
            pass  # Ray does not know yet
        return False


async def _known(at: float) -> float:
    return at


_current: PulseLink | None = None
"""The pulse of this process's runs. Used only in the background loop."""

_acquiring: asyncio.Lock | None = None


def is_at_hand() -> bool:
    """Return True if this driver has a pulse that has answered."""
    return _current is not None and _current.is_usable and _current.has_answered


async def acquire() -> PulseLink:
    """Return this driver's pulse; create one if there is none that answers."""
    global _current, _acquiring
    _acquiring = _acquiring or asyncio.Lock()
    async with _acquiring:
        if _current is None or not _current.is_usable:
            connection = Connection()
            _current = PulseLink(await connection.call(_create), connection)
        return _current


def _create() -> Any:
    """Create the actor on the driver's own node, where it can see the driver.

    Through ray://, this is the node of the process that owns the driver's actors. So Ray ends the pulse with that
    process even if the network is cut.
    """
    driver = None if is_remote_client() else DriverProcess.this()
    here = NodeAffinitySchedulingStrategy(context().get_node_id(), soft=False)
    name = f"pulse-{uuid.uuid4().hex[:8]}"
    actor_class: Any = untyped_ray.remote(Pulse)
    options = {"num_cpus": 0, "name": name, "namespace": NAMESPACE, "scheduling_strategy": here}
    return actor_class.options(**options).remote(driver)


def _forget() -> object:
    global _current, _acquiring
    inherited = _current, _acquiring
    _current = _acquiring = None
    return inherited


in_child(_forget)
