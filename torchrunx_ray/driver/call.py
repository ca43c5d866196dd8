"""A function with its arguments, on its way into the cluster."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from torchrunx_ray.driver import cluster, references
from torchrunx_ray.driver.checks import check_function, check_handlers
from torchrunx_ray.driver.cluster import untyped_ray
from torchrunx_ray.driver.options import LogHandlers, Options
from torchrunx_ray.errors import PayloadError, bytes_in_words
from torchrunx_ray.wire.payload import Packed, pack


@dataclass(frozen=True)
class Call:
    """What a run calls: a reference to the packed function, and a name for the run.

    `inserted` refer to the packed values of the references in its arguments. Ray keeps them all
    for as long as this object lives. `log_handlers` is the option, with the handlers made.
    """

    run_name: str
    packed: Any
    inserted: Sequence[Any]
    log_handlers: LogHandlers


def put_call(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> Call:
    """Check, pickle, then hand to Ray: what cannot travel fails before any resource is asked for."""
    check_function(func)
    log_handlers = _made(options)
    function_name = _name(func)
    found = references.Found()
    packed = pack(
        [(function_name, func), ("args", tuple(args)), ("kwargs", dict(kwargs))],
        replace=found.replace,
    )
    cluster.connect()
    inserted = found.packed(options.runtime_env)
    return Call(unique(options.name or function_name), _put(packed), inserted, log_handlers)


def _made(options: Options) -> LogHandlers:
    given = options.log_handlers
    if not callable(given):
        return given
    made = given()
    check_handlers(made)
    return made


def _put(packed: Packed) -> Any:
    try:
        return untyped_ray.put(packed)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        here = cluster.context().get_node_id()
        (store,) = (n.store_size for n in cluster.live_nodes() if n.node_id == here)
        raise PayloadError(
            path="the function with its arguments",
            reason=f"they have {bytes_in_words(packed.size)}; the object store of the driver's node "
            f"has {bytes_in_words(store)}, and the disk that Ray falls back to is full",
            step="store",
        ) from error


def unique(name: str) -> str:
    """A name that no other run or session of the cluster has."""
    return f"{name}-{uuid.uuid4().hex[:6]}"


def _name(func: Callable[..., Any]) -> str:
    inner = getattr(func, "func", func)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)
