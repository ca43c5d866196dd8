"""ObjectRefs in the arguments of a launch. Their values go to the hosts without passing through the driver."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from torchrunx_ray.driver.cluster.connection import Connection, untyped_ray
from torchrunx_ray.driver.report.results import LaunchResult
from torchrunx_ray.driver.report.stored import missing_after_a_second
from torchrunx_ray.wire.by_value.unfit import UnfitError
from torchrunx_ray.wire.values.payload import Inserted, Packed, pack

logger = logging.getLogger("torchrunx_ray")

_REPORT_EVERY_S = 10

_of_ours: set[bytes] = set()
"""Ids of this driver's actors whose results are Packed."""

# Any: these classes are generic to the type checker, and isinstance would leave their parameters unknown.
_ActorHandle: Any = ActorHandle
_ObjectRef: Any = ray.ObjectRef

_of_the_driver: dict[type, str] = {}
"""Types that stay in the driver, with the advice what to pass instead."""


def stays_in_driver(kind: type, advice: str) -> None:
    """Refuse objects of this type in a call. `advice` says what to pass instead."""
    _of_the_driver[kind] = advice


stays_in_driver(
    LaunchResult,
    "it is a LaunchResult, and only the driver can fetch its values; pass result.ref(i), the "
    "reference to one rank's value.",
)


def are_packed(actor: Any) -> None:
    """Note that this actor's methods return Packed values."""
    _of_ours.add(actor._actor_id.binary())


class Found:
    """A collector that replaces references, at any depth, while a call is pickled."""

    def __init__(self) -> None:
        self._refs: dict[ray.ObjectRef[Any], int] = {}

    def replace(self, value: Any) -> Any:
        if isinstance(value, _ObjectRef):
            index = self._refs.setdefault(value, len(self._refs))
            return Inserted(index).__reduce__()
        for kind, advice in _of_the_driver.items():
            if isinstance(value, kind):
                raise UnfitError(advice)
        _refuse_handle(value)
        return NotImplemented

    def packed(self, runtime_env: Mapping[str, Any] | None) -> "list[ray.ObjectRef[Any]]":
        """Return references to the packed values of the references that were found.

        Ray would unpickle an unpacked value in the agent, and so import the value's modules there.
        """
        return [ref if _is_packed(ref) else _repack(ref, runtime_env) for ref in self._refs]


async def wait_for(refs: "Sequence[ray.ObjectRef[Any]]", connection: Connection) -> None:
    """Wait until Ray has the values, or knows that it will never have them."""
    begun = time.monotonic()
    reported = -math.inf
    while refs and (
        missing := await connection.call(connection.inside, missing_after_a_second, list(refs))
    ):
        now = time.monotonic()
        if now - reported >= _REPORT_EVERY_S:
            logger.warning(
                "waiting for %d of %d ObjectRefs in the arguments, %.0f s so far; the run begins when the tasks "
                "that compute them end",
                len(missing),
                len(refs),
                now - begun,
            )
            reported = now


def _is_packed(ref: Any) -> bool:
    """Return True for a value of an agent. Other values come from a task or from ray.put."""
    return ref.task_id().actor_id().binary() in _of_ours


def _repack(ref: "ray.ObjectRef[Any]", runtime_env: Mapping[str, Any] | None) -> Any:
    """Pack the value in a task. Ray runs the task on the node that has the value."""
    environment = dict(runtime_env) if runtime_env else None
    task: Any = untyped_ray.remote(num_cpus=0, runtime_env=environment)(_pack)
    return task.remote(ref)


def _pack(value: object) -> Packed:
    return pack([("the value of an ObjectRef in the arguments", value)], replace=_refuse)


def _refuse(value: Any) -> Any:
    if isinstance(value, _ObjectRef):
        raise UnfitError(
            "it is an ObjectRef inside the value of another ObjectRef, and a worker is not a Ray process; pass "
            "it as a separate argument"
        )
    _refuse_handle(value)
    return _writable(value)


def _writable(value: Any) -> Any:
    """Replace Ray's read-only array by a writable copy: a worker's memory is its own."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray or value.flags.writeable:
        return NotImplemented
    return value.copy(order="K").__reduce_ex__(5)


def _refuse_handle(value: Any) -> None:
    if isinstance(value, _ActorHandle) or type(value).__name__ == "ClientActorHandle":
        raise UnfitError(
            "it is a handle of a Ray actor, and a worker is not a Ray process; call the actor in "
            "the driver, or call ray.init(namespace=...) in the function and look up the actor by name"
        )
