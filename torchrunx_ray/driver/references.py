"""ObjectRefs in the arguments of a launch: their values go to the hosts, not through the driver."""

from typing import Any

import ray
from ray.actor import ActorHandle

from torchrunx_ray.driver.cluster import untyped_ray
from torchrunx_ray.wire.payload import Inserted, Packed, pack

_of_ours: set[bytes] = set()
"""Actors of this driver whose results are Packed, by id."""

# Generic to the type checker, and of unknown parameters where they are looked for.
_ActorHandle: Any = ActorHandle
_ObjectRef: Any = ray.ObjectRef


def are_packed(actor: Any) -> None:
    """Take note that what this actor's methods return is Packed."""
    _of_ours.add(actor._actor_id.binary())


class Found:
    """Takes the references out of what is being pickled, wherever they are in it."""

    def __init__(self) -> None:
        self._refs: dict[ray.ObjectRef[Any], int] = {}

    def replace(self, value: Any) -> Any:
        if isinstance(value, _ObjectRef):
            index = self._refs.setdefault(value, len(self._refs))
            return Inserted(index).__reduce__()
        if isinstance(value, _ActorHandle):
            raise TypeError(
                "it is a handle of a Ray actor, and a worker is no process of Ray's; call the actor "
                "in the driver, or look it up by name in the function after ray.init()"
            )
        return NotImplemented

    def packed(self) -> "list[ray.ObjectRef[Any]]":
        """References to the same values, packed.

        An agent would otherwise unpickle a value that it is handed, and so import what it needs.
        """
        return [ref if _is_packed(ref) else _repack(ref) for ref in self._refs]


def _is_packed(ref: Any) -> bool:
    """What no actor made comes from a task, or from ray.put."""
    return ref.task_id().actor_id().binary() in _of_ours


def _repack(ref: "ray.ObjectRef[Any]") -> Any:
    """Where Ray runs a task with this argument: on the node that has it."""
    task: Any = untyped_ray.remote(num_cpus=0)(_pack)
    return task.remote(ref)


def _pack(value: object) -> Packed:
    return pack([("the value of an ObjectRef in the arguments", value)])
